"""Sums of gradients in one fixed order: the same bits, however the shares are spread over ranks."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from allranks.runtime.gradients import OrderedSum
from allranks.training.gradients import Gradients


def gradients(seed: int) -> list[torch.Tensor]:
    """Of two parameters. Shares differ in size: the order of additions shows in the last bits."""
    generator = torch.Generator().manual_seed(seed)
    scale = 10.0 ** (seed % 5 - 2)
    return [torch.randn(3, 4, generator=generator) * scale, torch.randn(5, generator=generator) * scale]


def summed(shares: int, ranks: int) -> list[torch.Tensor]:
    """What `ranks` ranks give for the gradients of `shares` shares, on the first of them."""
    mine = shares // ranks
    everyones = []
    for rank in range(ranks):
        parameters = [torch.nn.Parameter(torch.zeros(3, 4)), torch.nn.Parameter(torch.zeros(5))]
        adder = OrderedSum(parameters, mine)
        for row in range(mine):
            for parameter, gradient in zip(parameters, gradients(rank * mine + row), strict=True):
                parameter.grad = gradient
            adder.take(row)
        everyones.append(adder)

    subtotals: list[torch.Tensor] = []
    for adder in everyones:
        # What a rank hands to `gather` is its own subtree's sum.
        adder.give(lambda rows: subtotals.append(rows) or rows)
    for adder in everyones:
        adder.give(lambda _: torch.cat(subtotals))
    for adder in everyones[1:]:
        for mine_, first in zip(adder.parameters, everyones[0].parameters, strict=True):
            assert torch.equal(mine_.grad, first.grad)
    return [parameter.grad for parameter in everyones[0].parameters]


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_the_same_bits_on_any_number_of_ranks(ranks):
    alone = summed(shares=8, ranks=1)
    for mine, theirs in zip(summed(shares=8, ranks=ranks), alone, strict=True):
        assert torch.equal(mine, theirs)


def test_it_is_the_sum():
    for part, found in enumerate(summed(shares=8, ranks=2)):
        exact = sum(gradients(share)[part].double() for share in range(8))
        torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)


def test_a_plain_sum_from_left_to_right_would_have_other_bits():
    """Else the tests above would prove nothing."""
    plain = gradients(0)
    for share in range(1, 8):
        plain = [total + more for total, more in zip(plain, gradients(share), strict=True)]
    alone = summed(shares=8, ranks=1)
    assert not all(torch.equal(mine, theirs) for mine, theirs in zip(plain, alone, strict=True))


def test_a_parameter_without_a_gradient_counts_as_zeros():
    used, unused = torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.zeros(3))
    adder = OrderedSum([used, unused], shares=2)
    adder.rows.fill_(7.0)  # of the step before
    for row in range(2):
        used.grad = torch.tensor([1.0, 2.0])
        adder.take(row)
        assert used.grad is None
    adder.give(lambda rows: rows)
    assert used.grad.tolist() == [2.0, 4.0]
    assert unused.grad.tolist() == [0.0, 0.0, 0.0]


def test_a_parameter_that_no_share_has_used_may_be_left_alone():
    """What another rank has used gets a gradient here too; what nobody has used keeps none."""
    here, there, nowhere = (torch.nn.Parameter(torch.zeros(2)) for _ in range(3))
    adders = [OrderedSum([here, there, nowhere], shares=2, gives_zeros=False) for _ in range(2)]
    for adder, used in zip(adders, (here, there), strict=True):
        adder.take(0)
        used.grad = torch.tensor([1.0, 2.0])
        adder.take(1)
    subtotals: list[torch.Tensor] = []
    adders[1].give(lambda rows: subtotals.append(rows) or rows)
    adders[0].give(lambda rows: torch.cat([rows, *subtotals]))
    assert here.grad.tolist() == [1.0, 2.0]
    assert there.grad.tolist() == [1.0, 2.0]
    assert nowhere.grad is None


def test_gradients_that_were_there_before_are_added_to():
    """As where a program adds up the gradients of several steps; with one share, too."""
    alone = SimpleNamespace(virtual_ranks=1, world_size=1, shares=range(1), device=torch.device("cpu"))
    alone.wrap = lambda model, *_: model
    alone.gather = lambda rows: rows
    gradients_of = Gradients(alone, spreading=None, remedy="")  # type: ignore[arg-type]
    model = gradients_of.wrap(torch.nn.Linear(1, 1, bias=False))
    for step in range(3):
        for _ in gradients_of.each_share(seed=1, step=step):
            gradients_of.backward(model.weight.sum() * 10.0**step)
    assert model.weight.grad.item() == 111.0
    assert gradients_of.are_summed
