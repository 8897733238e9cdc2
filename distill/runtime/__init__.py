"""The process itself: progress, formats, devices, processes, interrupts, the machine's checks."""
