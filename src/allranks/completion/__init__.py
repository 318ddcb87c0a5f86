"""What the TAB key offers after `allranks`, in bash, zsh and fish. No torch."""
