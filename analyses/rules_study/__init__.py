"""Parts of `study_rules.py`: its prompts, and what it says of the rules."""
