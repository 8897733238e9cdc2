"""The embedded example teacher, made by ``tools/make_teacher.py``; see docs/example-teacher.md."""
