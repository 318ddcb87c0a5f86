"""allranks: the same PyTorch training run on one core, one GPU or every rank of a supercomputer.

run = allranks.open("name", seed=1)     # for a training loop of one's own: docs/your-own-loop.md

heartbeat(), should_stop(), EXIT_REQUEUE    # for a program that keeps its own loop: docs/own-program.md
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from allranks.base.errors import EXIT_REQUEUE
    from allranks.job.pulse import heartbeat, should_stop
    from allranks.own.opening import open_run as open
    from allranks.own.run import Run

__version__ = "0.1.0"
__all__ = ["EXIT_REQUEUE", "Run", "__version__", "heartbeat", "open", "should_stop"]

# Where each public name is found. Some need torch, which most commands do without: so a name is imported
# when it is asked for.
_PLACES = {
    "EXIT_REQUEUE": ("allranks.base.errors", "EXIT_REQUEUE"),
    "Run": ("allranks.own.run", "Run"),
    "heartbeat": ("allranks.job.pulse", "heartbeat"),
    "open": ("allranks.own.opening", "open_run"),
    "should_stop": ("allranks.job.pulse", "should_stop"),
}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'allranks' has no attribute {name!r}")
    from importlib import import_module

    module, attribute = _PLACES[name]
    value = getattr(import_module(module), attribute)
    globals()[name] = value  # the next time it is found without this function, as in each step of a loop
    return value
