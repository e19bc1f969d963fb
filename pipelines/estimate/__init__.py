"""What a job takes before it starts: memory, disk, hours and dollars."""
