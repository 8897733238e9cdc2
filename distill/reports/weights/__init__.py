"""The report on weights alone, and on two of them."""
