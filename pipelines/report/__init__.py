"""Reports of jobs: one self-contained HTML page each, from plain data."""
