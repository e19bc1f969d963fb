"""Trains the base models of the tiny world, which are shipped in `pipelines/tiny_world/pretrained`."""
