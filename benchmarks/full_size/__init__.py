"""Every job at the published sizes, on a CPU with random weights: time, memory and sizes on disk."""
