"""Benchmarks: every speed is a ratio of two things measured in turn in one process."""
