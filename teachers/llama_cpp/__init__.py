"""The GGUF teacher: llama.cpp in a child process."""
