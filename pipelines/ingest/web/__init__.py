"""Asking the web for images: requests, answers, hosts, limits."""
