"""Checkpoints of the published implementation, read into models of ours."""
