"""Data sets, and how the ranks share them out."""
