"""Administration of tables and runs: status, takedown."""
