"""This project beside others that do the same job, in comparisons that anybody can repeat."""
