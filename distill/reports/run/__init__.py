"""The report on a run, and on two of them."""
