"""Injects faults into real jobs and checks their tables and runs."""
