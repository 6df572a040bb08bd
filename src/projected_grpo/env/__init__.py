"""The environment: problems, prompts, graders and rewards. It imports no torch, transformers or trl."""
