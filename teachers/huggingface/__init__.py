"""The transformers teacher."""
