"""One run's directory: who owns it, its checkpoints, the cells of a sweep, and a look at it. No torch."""
