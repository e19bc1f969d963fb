"""HTML reports of jobs: one self-contained page each, from plain data."""
