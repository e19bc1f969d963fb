"""Rows and their keys; images wherever they lie; which rows a job takes."""
