"""The SO8T network."""
