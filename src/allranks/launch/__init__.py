"""From an allocation to a command line: where ranks run, how they start, what they see."""
