"""Frozen models that turn images and captions into features, for metrics, filters and duplicates."""
