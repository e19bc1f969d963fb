"""Jobs on Ray: connecting, chunks, progress, metrics, rows that kill a process."""
