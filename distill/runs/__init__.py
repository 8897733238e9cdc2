"""A run's folder: files, records, audit log, exports, provenance."""
