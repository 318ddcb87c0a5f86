"""`allranks watch` and `allranks logs`: show runs from outside, by reading their files only. No torch."""
