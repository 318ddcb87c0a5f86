"""allranks: the same PyTorch training run on one core, one GPU or every rank of a supercomputer."""

__version__ = "0.1.0"
