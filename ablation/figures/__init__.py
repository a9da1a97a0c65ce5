"""Figures as files: one module for each kind of result, and the parts that they share."""
