"""Soft targets as values, and how they are made small."""
