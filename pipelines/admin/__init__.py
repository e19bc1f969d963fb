"""What is done to finished tables: status, takedown."""
