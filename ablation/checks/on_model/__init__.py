"""The specification on the user's own model: `ablation check --model`."""
