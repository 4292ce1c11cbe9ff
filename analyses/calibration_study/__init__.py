"""Whether a recommended cutoff holds on prompts that it has not seen, and what foretells the loss of a task."""
