"""Reproducible runs of a loop of one's own: this rank's shares of a batch, which run.pieces() goes through.

With `allranks.open(virtual_ranks=4)` each batch is cut into four shares on any number of ranks, and a rank
takes one, two or four of them, one after the other. So run.steps() cannot give a batch. It gives a
StepShares, which only run.pieces() can use.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, NoReturn

from allranks.base.errors import ANYONE, UserError
from allranks.data.batches import Dealt
from allranks.data.nests import described

# Who writes a loop for one batch a step has to change these two lines.
_REMEDY = (
    "Write `for batch in run.steps(...):`, and in it `for inputs, targets in run.pieces(batch):` around "
    "the forward and the backward pass. What comes once in a step, such as optimizer.step(), follows after "
    "that inner loop."
)


class StepShares:
    """What run.steps() gives in a reproducible run: this rank's shares of the step's batch.

    Only run.pieces() takes it. If a program uses it as a batch, a UserError says what to write.
    """

    def __init__(self, shares: Sequence[Dealt]) -> None:
        self.shares = tuple(shares)

    def __iter__(self) -> Iterator[Any]:
        _refuse()

    def __len__(self) -> int:  # noqa: PLE0303 (it raises an error on purpose)
        _refuse()

    def __getitem__(self, key: Any) -> Any:
        _refuse()

    def __getattr__(self, name: str) -> Any:
        # Python and its libraries look for names that begin with an underscore, as to copy an object.
        if name.startswith("_"):
            raise AttributeError(name)
        _refuse()

    @classmethod
    def __torch_function__(cls, *_: Any, **__: Any) -> Any:
        """torch calls this where the batch is given to one of its functions, as by model(batch)."""
        _refuse()


def _refuse() -> NoReturn:
    raise UserError(
        "A batch of run.steps() was used without run.pieces(). In a run with virtual_ranks it consists of "
        f"several shares, which are computed one after the other. {_REMEDY}",
        said_by=ANYONE,
    )


def together(shares: Iterator[Dealt], count: int) -> Iterator[Dealt]:
    """`count` shares, one after the other, as one for each step: its batch is a StepShares."""
    while True:
        of_step = tuple(islice(shares, count))
        if not of_step:
            return
        counted = sum(each.counted for each in of_step)
        last = of_step[-1]
        yield Dealt(StepShares(of_step), counted, last.total, last.digest, last.examples)


def shares_of(in_hand: Dealt) -> Sequence[Dealt]:
    """The shares that the program has in hand: all of a step, or one in a loop over pieces or batches."""
    if isinstance(in_hand.batch, StepShares):
        return in_hand.batch.shares
    return (in_hand,)


def as_it_came(batch: Any, in_hand: Dealt) -> StepShares:
    """The batch that the program gives to run.pieces(), which must be the one that it has got."""
    if batch is not in_hand.batch:
        raise UserError(
            f"run.pieces() got {described(batch)}. In a run with virtual_ranks give it the batch of "
            "run.steps() as it came, and change it in the loop over run.pieces().",
            said_by=ANYONE,
        )
    assert isinstance(batch, StepShares)
    return batch


def outside_of_pieces(what: str) -> UserError:
    """The error of a program that has a whole step in hand, and calls what belongs to one share."""
    return UserError(
        f"{what} is called in a step, but not in a loop over run.pieces(). In a run with virtual_ranks "
        f"each share of a batch has a loss of its own. {_REMEDY}",
        said_by=ANYONE,
    )


def within_pieces(what: str) -> UserError:
    """The error of a program that calls, for one share, what belongs to the whole step."""
    return UserError(
        f"{what} is called within a loop over run.pieces(). In a run with virtual_ranks this loop has "
        "several turns on few ranks and one on many, so it would not be called as often on each number of "
        "ranks: call it after the loop.",
        said_by=ANYONE,
    )


def one_for_each_share(what: str, shares: int, got: str) -> UserError:
    """The error of a program that has given the means of a step, but not one for each share."""
    return UserError(
        f"{what} takes one value for each of this rank's {shares} shares of the step in a run with "
        f"virtual_ranks, but got {got}: collect them in the loop over run.pieces(batch), as by "
        "`losses.append(loss.detach())`.",
        said_by=ANYONE,
    )
