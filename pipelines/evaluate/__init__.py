"""How good captions and pictures are: figures with intervals from tables, and the comparison of two."""
