"""From a teacher and text to a store of soft targets."""
