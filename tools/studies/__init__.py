"""Which choice gives better students at equal cost."""
