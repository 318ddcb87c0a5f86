"""Loss and accuracy added up: on one rank, and over several in one order."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from allranks.tasks import Classification
from allranks.training.metrics import Column, Figures, Sums, columns_of, figures_of

TASK = Classification()
COLUMNS = columns_of(TASK, TASK.metrics(torch.zeros(1, 3), (None, torch.zeros(1, dtype=torch.int64))))


def runtime(rank: int = 0, ranks: int = 1, share_count: int = 0, everyone: list | None = None):
    """What Sums asks of a Runtime. `everyone`: the rows of all ranks, for a gather without processes."""
    mine = (share_count or ranks) // ranks
    return SimpleNamespace(
        device=torch.device("cpu"),
        sum_dtype=torch.float64,
        shares=range(rank * mine, (rank + 1) * mine),
        gather=lambda rows: rows if everyone is None else torch.cat(everyone),
    )


def added(sums: Sums, row: int, loss: torch.Tensor, logits: torch.Tensor, labels: torch.Tensor) -> None:
    sums.add(row, loss, len(labels), TASK.metrics(logits, (None, labels)))


def figures(loss: float, accuracy: float, examples: int) -> Figures:
    return Figures({"loss": loss, "accuracy": accuracy}, examples)


def logits_for(*answers: int) -> torch.Tensor:
    """Logits of three classes whose largest is each answer's."""
    return torch.nn.functional.one_hot(torch.tensor(answers), 3).float()


def test_mean_loss_accuracy_and_number_of_examples():
    alone = runtime()
    sums = Sums(alone, COLUMNS)
    added(sums, 0, torch.tensor(6.0), logits_for(0, 1, 2), torch.tensor([0, 1, 1]))
    added(sums, 0, torch.tensor(2.0), logits_for(2), torch.tensor([2]))
    assert sums.total(alone) == figures(loss=2.0, accuracy=75.0, examples=4)
    sums.rows.zero_()
    assert sums.total(alone) == figures(loss=0.0, accuracy=0.0, examples=0)


@pytest.mark.parametrize(("mean", "shown"), [(float("nan"), "nan"), (701.0, "inf"), (0.0, "1.0")])
def test_a_perplexity_is_nan_where_the_loss_is_nan_and_infinite_where_it_is_huge(mean, shown):
    columns = [Column("perplexity", has_weight=False, shown="exp")]
    assert str(figures_of([1.0, mean, 1], columns).values["perplexity"]) == shown


def test_a_million_small_losses_lose_no_digits():
    """float32 would stand still at 16.8 million."""
    alone = runtime()
    sums = Sums(alone, COLUMNS)
    sums.rows[0] = torch.tensor([2.0**25, 0.0, 2.0**25])
    added(sums, 0, torch.tensor(1.0), logits_for(0), torch.tensor([0]))
    assert sums.rows.tolist() == [[2.0**25 + 1, 1.0, 2.0**25 + 1]]


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_the_order_of_additions_is_that_of_the_shares(ranks):
    """Eight shares with losses of very different size: any other order gives other bits."""
    losses = [1e16, 1.0, -1e16, 1.0, 3.0, 1e-9, 7.0, 1.0]
    made = []
    for rank in range(ranks):
        here = runtime(rank, ranks, share_count=8)
        sums = Sums(here, COLUMNS)
        for row, share in enumerate(here.shares):
            loss = torch.tensor(losses[share], dtype=torch.float64)
            added(sums, row, loss, logits_for(share % 3), torch.tensor([0]))
        made.append(sums)
    rows = [sums.rows for sums in made]
    total = made[0].total(runtime(0, ranks, share_count=8, everyone=rows))
    expected = torch.tensor(losses, dtype=torch.float64).sum(dim=0).item() / 8
    assert total == figures(loss=expected, accuracy=100 * 3 / 8, examples=8)
    backwards = torch.tensor(losses[::-1], dtype=torch.float64)
    reordered = sum(backwards.tolist()) / 8
    assert reordered != sum(losses) / 8  # so that the comparison above can fail
