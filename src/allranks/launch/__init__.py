"""From an allocation to a command line: where the ranks run, how they start, what they see. No torch."""
