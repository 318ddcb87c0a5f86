"""`python -m allranks` is the command `allranks`."""

from allranks.cli import main

main()
