"""Captions per second, and what going on costs."""
