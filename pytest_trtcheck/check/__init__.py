"""The use case: a request goes through steps to a record."""
