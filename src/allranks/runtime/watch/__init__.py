"""Who hangs and who has died: the ranks of a run watch over each other.

`progress` is written by the training, `thread` looks at it and talks with the other ranks, `verdict`
decides who is to blame, and `postmortem` looks at a process of this host. Nothing here knows the rest of
the runtime.
"""
