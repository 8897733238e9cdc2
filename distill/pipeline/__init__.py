"""The order in which it all happens."""
