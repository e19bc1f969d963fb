"""From the bytes of an image file to a picture, and back: whatever the file, by one set of rules."""
