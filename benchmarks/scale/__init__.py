"""What grows with chunks and machines, and how far a thing walks through the code."""
