"""Pretrained parts and checkpoints: resolve, verify, load, save, export."""
