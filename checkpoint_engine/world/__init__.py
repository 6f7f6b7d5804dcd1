"""Ranks that agree: one key-value store at rank 0, collective calls, and what a gather found."""
