"""What is measured at a step or on weights."""
