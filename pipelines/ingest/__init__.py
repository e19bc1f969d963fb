"""From a list of URLs to an image table: metadata -> filters -> download -> decode -> Parquet."""
