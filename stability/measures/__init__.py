"""Measures of a training step, of a model's output and of weights."""
