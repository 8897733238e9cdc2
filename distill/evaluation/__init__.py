"""Students against their teacher: what is measured, and how it is shown."""
