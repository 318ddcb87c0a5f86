"""The training itself: its steps and evaluations, its state, when it saves and stops, what it tells."""
