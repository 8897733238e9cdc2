"""Random teachers and bases of any size."""
