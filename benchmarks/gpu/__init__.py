"""What a first GPU can tell, in one call of less than nine minutes."""
