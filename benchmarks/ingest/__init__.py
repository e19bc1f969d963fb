"""Ingest compared with img2dataset; reading of URL lists; the local web server."""
