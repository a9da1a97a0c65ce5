"""Every causal-LM family of transformers, as a tiny random model: supported, or refused with the reason."""
