"""A finished student in use: generate, chat, judge."""
