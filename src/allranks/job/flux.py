"""Flux: the hosts of an instance of it, as Flux 0.88 tells them.

Flux is a scheduler that also runs within a job of another one. What is started in an instance of it, as
by `flux alloc -N2` or `flux start`, has FLUX_URI in its environment. allranks starts ranks there by `flux
run`. It queues no jobs with Flux: `flux batch` does.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping

from allranks.base.errors import UserError
from allranks.base.text import one_line
from allranks.job.batch import call, refusal

_ASK = ("flux", "resource", "R")


def is_here(environ: Mapping[str, str]) -> bool:
    """Whether this process runs in an instance of Flux."""
    return bool(environ.get("FLUX_URI"))


def resources() -> str:
    """What the instance says of its hosts. Raises UserError if it does not answer."""
    done = call(_ASK, os.environ, "Flux")
    if done.returncode:
        raise refusal(done)
    return done.stdout


def node_lists_and_counts(answer: str) -> tuple[list[str], list[tuple[int, int]]]:
    """(lists of hosts' names, (cores, GPUs) of each host in the order of the names).

    `answer` is Flux's set of resources in JSON, called R (its RFC 20). In it `rank` says which hosts, by
    their number, a row is about. Raises UserError if the answer is of another form.
    """
    try:
        values = json.loads(answer)["execution"]
        counts: dict[int, tuple[int, int]] = {}
        for row in values["R_lite"]:
            cores, gpus = (len(_numbers(row["children"].get(kind, ""))) for kind in ("core", "gpu"))
            counts |= dict.fromkeys(_numbers(row["rank"]), (cores, gpus))
        return [str(names) for names in values["nodelist"]], [counts[rank] for rank in sorted(counts)]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"`{' '.join(_ASK)}` has an answer that is not understood: {one_line(answer)[:99]!r}. Name the "
            "hosts yourself with --hosts FILE."
        ) from error


def _numbers(text: str) -> list[int]:
    """`0-2,5` gives [0, 1, 2, 5]."""
    found: list[int] = []
    for span in filter(None, str(text).split(",")):
        first, _, last = span.partition("-")
        found += range(int(first), int(last or first) + 1)
    return found
