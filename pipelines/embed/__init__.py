"""Features of images and captions, by frozen models."""
