"""Published files without this project; fresh safety prompts; the AMX build."""
