"""llama.cpp with faults, or with GPUs, that it has not."""
