"""A student made of an existing model: does it match the teacher, does it fit in memory."""
