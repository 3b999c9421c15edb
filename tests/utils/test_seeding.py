"""Seeds are functions of their place, and borrowed generators are given back."""

import itertools
import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from distill.engine.train_loop import seed_step
from distill.heads.base import StepGenerator
from distill.utils.seeding import derived_seed, private_randomness, seed_globally


def draw() -> list[float]:
    """From each of the three global generators."""
    return [random.random(), float(np.random.rand()), float(torch.rand(()))]


def test_seeds_differ_from_place_to_place() -> None:
    places = itertools.chain.from_iterable(
        itertools.product(range(12), repeat=length) for length in (1, 2, 3)
    )
    seeds = [derived_seed(*place) for place in places]
    assert len(set(seeds)) == len(seeds) == 12 + 144 + 1728  # (1,) is not (1, 0)
    assert all(0 <= x < 2**63 for x in seeds)
    bits = torch.tensor([[x >> k & 1 for k in range(63)] for x in seeds]).double()
    assert (bits.mean(0) - 0.5).abs().max() < 0.06  # neighbours share nothing; 5 sigma


def test_seeds_are_the_same_in_every_process() -> None:
    """A resume elsewhere, or with another version of NumPy, depends on these numbers."""
    assert derived_seed(0) == 3717377837946358015
    assert derived_seed(1, 2, 3) == 6530208866956668065


def test_negative_numbers_are_refused() -> None:
    with pytest.raises(ValueError):
        derived_seed(-1)


def test_global_generators_repeat() -> None:
    seed_globally(3, 4)
    first = [draw(), draw()]
    seed_globally(3, 5)
    other = draw()
    seed_globally(3, 4)
    assert [draw(), draw()] == first
    assert not set(other) & set(first[0])


def test_private_randomness_leaves_no_trace() -> None:
    seed_globally(1)
    expected = [draw(), draw()]
    seed_globally(1)
    assert draw() == expected[0]
    with private_randomness(7):
        inside = draw()
        with private_randomness(8):
            assert draw() != inside
        seed_globally(1)  # whatever happens in there
    with pytest.raises(KeyError), private_randomness(7):
        assert draw() == inside
        raise KeyError
    with pytest.raises(ValueError), private_randomness(-1):
        pass
    assert draw() == expected[1]


class Masks(nn.Module):
    """Two heads with masks of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = StepGenerator(0), StepGenerator(0)

    def draw(self) -> list[float]:
        cpu = torch.device("cpu")
        return [float(torch.rand((), generator=x.generator(cpu))) for x in self.children()]


def test_a_step_is_a_function_of_its_place() -> None:
    def numbers(*place: Any) -> list[float]:
        masks = Masks()
        masks.draw()  # at any moment
        seed_step(masks, *place)
        return draw() + masks.draw()

    first = numbers(0, 5, 0)
    assert numbers(0, 5, 0) == numbers(0, 5) == first
    assert len(set(first)) == 5  # nor do heads share numbers with each other or with torch
    for place in ((1, 5, 0), (0, 6, 0), (0, 5, 1)):
        assert not set(numbers(*place)) & set(first), place
    with private_randomness(0, 5, 0):  # a sample at the same place
        assert not set(draw()) & set(first)


def test_seeding_reaches_generators_that_do_not_exist_yet() -> None:
    early, late = Masks(), Masks()
    early.draw()
    seed_step(early, 0, 1)
    seed_step(late, 0, 1)
    assert early.draw() == late.draw()
