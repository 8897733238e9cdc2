"""A new student's shape and first weights."""
