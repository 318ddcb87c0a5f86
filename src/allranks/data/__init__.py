"""Data sets, and which rank gets which examples."""
