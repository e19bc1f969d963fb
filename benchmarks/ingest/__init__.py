"""Ingest against img2dataset; lists, and the web that is asked."""
