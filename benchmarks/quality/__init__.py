"""How good the captions of the tiny world are."""
