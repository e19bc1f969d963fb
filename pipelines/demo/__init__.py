"""The demo: runs all jobs on one machine and evaluates the result on unseen scenes."""
