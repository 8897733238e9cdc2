"""From predictions to numbers: no files, no models."""
