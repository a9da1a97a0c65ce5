"""How fast a full sweep is, against what people would use instead: `python -m tests.benchmark`."""
