"""allranks: the same PyTorch training run on one core, one GPU or every rank of a supercomputer.

run = allranks.open("name", seed=1)     # for a training loop of one's own: docs/your-own-loop.md
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from allranks.own.opening import open_run as open
    from allranks.own.run import Run

__version__ = "0.1.0"
__all__ = ["Run", "__version__", "open"]

# Where each public name is found. They need torch, which most commands do without: so a name is imported
# when it is asked for.
_PLACES = {
    "Run": ("allranks.own.run", "Run"),
    "open": ("allranks.own.opening", "open_run"),
}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'allranks' has no attribute {name!r}")
    from importlib import import_module

    module, attribute = _PLACES[name]
    return getattr(import_module(module), attribute)
