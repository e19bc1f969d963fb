"""Pretrained parts and checkpoints: found, checked, loaded, saved, exported."""
