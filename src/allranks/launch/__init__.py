"""From the hosts of a job to ranks that run: where each is placed, how it starts, who watches over it."""
