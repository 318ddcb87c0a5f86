"""Job scripts, queues and successors: from a login node to jobs, and what became of them. No torch."""
