"""An existing model as a student: LoRA and a gated projection."""
