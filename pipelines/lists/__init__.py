"""Lists of URLs, captions and scores as they are published."""
