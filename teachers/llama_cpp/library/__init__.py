"""The installed llama.cpp: its build, its options, what its self-check found."""
