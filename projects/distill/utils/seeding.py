"""Random numbers as functions of the run's seed and of a place in the training.

What happens at an iteration, and how a sample is augmented, depends neither on what was drawn
before nor on the number of data workers. So an interrupted training goes on as if it had not been,
in every process, and a single step can be repeated by itself.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def derived_seed(*numbers: int) -> int:
    """A well mixed seed in [0, 2^63) from numbers >= 0, such as the run's seed and an iteration."""
    return int(_sequence(numbers).generate_state(1, np.uint64)[0] >> 1)


def seed_globally(*numbers: int) -> None:
    """Seed Python's, NumPy's and torch's global generators, on every device."""
    _seed_host(*numbers)
    torch.manual_seed(derived_seed(*numbers))


@contextmanager
def private_randomness(*numbers: int) -> Iterator[None]:
    """Seed the global generators of the CPU inside, and leave them outside as they were."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        try:
            _seed_host(*numbers)
            # Not torch.manual_seed: it would touch the GPUs, which data workers must not.
            torch.default_generator.manual_seed(derived_seed(*numbers))
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


def _seed_host(*numbers: int) -> None:
    random.seed(derived_seed(*numbers))
    np.random.seed(_sequence(numbers).generate_state(4))


def _sequence(numbers: tuple[int, ...]) -> np.random.SeedSequence:
    return np.random.SeedSequence((len(numbers), *numbers))  # which takes (1,) for (1, 0)
