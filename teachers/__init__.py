"""Running a teacher: GGUF files through llama.cpp, soft targets, and the store of them."""

from pathlib import Path


def example_teacher() -> Path:
    """Path of the example teacher that ships with the package."""
    return Path(__file__).parent / "example" / "teacher.gguf"
