"""Checkpoints of the published implementation, loaded into our models."""
