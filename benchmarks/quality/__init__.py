"""Caption quality of the tiny models."""
