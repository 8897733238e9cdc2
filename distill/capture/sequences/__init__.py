"""Data → tokens → sequences, streamed: tokenized once, cut, and kept on disk for every worker."""
