"""The tiny world: drawn scenes with exact captions, served as a small hostile web."""
