"""Ranks, devices and collectives: the only room that knows torch.distributed, MPI and ezpz."""
