"""What an evaluation compares, checked before PyTorch is imported."""
