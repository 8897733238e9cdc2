"""A model with a part of its vocabulary."""
