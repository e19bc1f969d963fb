"""Questions about images that a language model answers from captions alone."""
