"""Captions for others: WebDataset shards, and data sets on the Hugging Face hub."""
