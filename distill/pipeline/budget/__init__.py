"""``--budget``: how much text and how many steps fit into a time."""
