"""The report of ``distill evaluate``."""
