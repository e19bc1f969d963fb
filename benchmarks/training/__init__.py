"""Training steps against the published one, and their memory."""
