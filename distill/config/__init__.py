"""Settings: the schema and how it is read."""
