"""Checkpoints in this rank's host memory: where their bytes come from and lie, and their sums."""
