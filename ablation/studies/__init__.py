"""Studies: lists of ablations, on many prompts or texts, and what is made of their results."""
