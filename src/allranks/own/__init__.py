"""A training loop of the user's own, with everything that the shipped training has: `allranks.open()`."""
