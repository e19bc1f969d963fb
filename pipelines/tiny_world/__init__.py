"""The tiny world: drawn scenes with exact captions, and a web server with typical errors."""
