"""Teachers behind a server: ``distill serve``, or one that knows ``prompt_logprobs`` (vLLM)."""
