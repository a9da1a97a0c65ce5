"""Adapters of libraries, to check a version of them, or to start an adapter from: one module and one class for each.

For example, `ablation check ablation.checks.libraries.nnsight:Nnsight`. Each module needs its library installed.
"""
