"""Cost of many chunks and machines, and the files that one item passes through."""
