"""Faults injected into real jobs, and what their tables lost."""
