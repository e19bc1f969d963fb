"""Published lists of URLs with their captions and scores."""
