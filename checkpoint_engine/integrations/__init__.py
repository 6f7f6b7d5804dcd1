"""Plug-ins of engines and trainers, each imported by its own program alone."""
