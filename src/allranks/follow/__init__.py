"""`allranks watch` and `allranks logs`: runs looked at from outside, by their files alone. No torch."""
