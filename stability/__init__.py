"""Watching a training run. Works on any module and optimizer; knows nothing of teachers or SO8T."""
