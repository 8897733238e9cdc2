"""Data, labels and fitting of the safety and the verification head."""
