"""Engines that proved themselves, laid out for those who serve them."""
