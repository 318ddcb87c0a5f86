"""Who am I, which device, and how do the ranks talk: the only part that knows about launchers."""
