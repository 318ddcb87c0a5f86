"""Trackers: where a run's figures are sent besides its own directory (docs/trackers.md)."""
