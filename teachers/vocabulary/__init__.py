"""A teacher's vocabulary cut down to the tokens that matter: which stay, what becomes of the
rest, and the tokenizer that is left."""
