"""The specification on a model of the user's: `ablation check --model`."""
