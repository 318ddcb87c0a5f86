"""Pictures and a page of what a run has done, made from its directory at its end or at any later time."""
