"""Making the embedded example teacher."""
