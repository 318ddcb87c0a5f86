"""`python -m allranks` is the command `allranks`."""

import sys

# `python -m` puts the present directory first. A file there, such as the user's random.py, is not Python's.
if __name__ == "__main__" and not (sys.flags.isolated or getattr(sys.flags, "safe_path", False)):
    del sys.path[0]

from allranks.cli import main

main()
