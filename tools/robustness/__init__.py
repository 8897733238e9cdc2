"""Faults, kills and the guard on trial."""
