"""Keeping torch's compiler out of processes that compile nothing.

Optimizers and DDP import torch._dynamo, and with it the whole compiler, only to say that they must not be
compiled. That costs 1.2 s and some 15,000 file-system calls on every rank (benchmarks/startup.py). The
profiler imports torch._inductor, to ask for one setting, and torchvision imports torch._dynamo.utils for a
function that only object detection calls. Here small modules stand in for the compiler's. They answer the
few questions that training without compilation asks. If anything else is asked of them, the real compiler
is imported after all.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any

from allranks.base.imports import without_path_lookups

NAME = "torch._dynamo"
INDUCTOR = "torch._inductor"


class _Understudy(ModuleType):
    """Stands in for a module of torch's compiler.

    It answers the few questions that a training without the compiler asks. Any other question makes it
    import the real module.
    """

    answers: dict[str, Any]

    def __getattr__(self, name: str) -> Any:
        if name in self.answers:
            return self.answers[name]
        if name == "__file__":  # inspect asks every module for it, to find the one of a piece of code
            raise AttributeError(f"{self.__name__} stands in for a module, and has no file")
        if name == "__path__" and self.__name__ not in (NAME, INDUCTOR):  # asked by `from ... import ...`
            raise AttributeError(f"{self.__name__} stands in for a module, which is no package")
        return getattr(_real(self.__name__), name)


@contextmanager
def quick_import() -> Iterator[None]:
    """Makes the import of torch quick in the block, for a process that compiles nothing."""
    with without_path_lookups():
        keep_compiler_out()
        yield


def keep_compiler_out() -> None:
    """From here on `import torch._dynamo` costs nothing until something really needs it."""
    if NAME in sys.modules:
        return
    import torch  # not before quick_import() has made that quick

    utils = _Understudy(f"{NAME}.utils")  # asked by DistributedDataParallel, and imported by torchvision
    utils.answers = {
        "get_optimize_ddp_mode": lambda: "no_optimization",
        # torchvision keeps this function when it is imported. Only a call of it needs the compiler.
        "is_compile_supported": lambda device_type: _real(utils.__name__).is_compile_supported(device_type),
    }
    rules = _Understudy(f"{NAME}.trace_rules")  # asked by init_process_group
    rules.answers = {"clear_lru_cache": lambda: None}
    dynamo = _Understudy(NAME)  # asked by every optimizer
    dynamo.answers = {
        "disable": lambda fn, recursive=True, **_: fn,
        "graph_break": lambda *_, **__: None,
        "utils": utils,
        "trace_rules": rules,
    }
    settings = _Understudy(f"{INDUCTOR}.config")  # asked by the profiler: without compiled code, no graphs
    settings.answers = {"triton": SimpleNamespace(cudagraphs=False)}
    inductor = _Understudy(INDUCTOR)
    inductor.answers = {"config": settings}
    for module in (dynamo, utils, inductor, settings):
        sys.modules[module.__name__] = module
    torch._dynamo = dynamo
    torch._inductor = inductor


def _real(name: str) -> ModuleType:
    """The compiler's own module of this name.

    All of the compiler's own modules take the place of those that stood in for them: they import each
    other, and must not find one that stands in.
    """
    import torch

    standing_in = [module for module in sys.modules.values() if isinstance(module, _Understudy)]
    if standing_in:
        for module in standing_in:
            del sys.modules[module.__name__]
        del torch._dynamo
        del torch._inductor
        importlib.import_module(NAME)
    return importlib.import_module(name)
