"""Check records turned into what people and other programs read."""
