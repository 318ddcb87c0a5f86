"""What this job is: a process's rank, the hosts, the machine and its scheduler. No torch."""
