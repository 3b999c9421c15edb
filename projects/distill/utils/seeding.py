"""Random numbers that depend only on the run's seed and a position in the training.

An iteration and the augmentation of a sample depend neither on earlier random numbers nor on the
number of data workers. So an interrupted training continues in every process as if it had not
stopped, and a single step can be repeated.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def derived_seed(*numbers: int) -> int:
    """Return a seed in [0, 2^63) mixed from numbers >= 0, such as the run's seed and iteration."""
    return int(_sequence(numbers).generate_state(1, np.uint64)[0] >> 1)


def seed_globally(*numbers: int) -> None:
    """Seed the global generators of Python, NumPy and torch, on every device."""
    _seed_host(*numbers)
    torch.manual_seed(derived_seed(*numbers))


@contextmanager
def private_randomness(*numbers: int) -> Iterator[None]:
    """Seed the global generators of the CPU in this context, and restore them after it."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        try:
            _seed_host(*numbers)
            # Do not call torch.manual_seed: data workers must not use the GPUs.
            torch.default_generator.manual_seed(derived_seed(*numbers))
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


def _seed_host(*numbers: int) -> None:
    random.seed(derived_seed(*numbers))
    np.random.seed(_sequence(numbers).generate_state(4))


def _sequence(numbers: tuple[int, ...]) -> np.random.SeedSequence:
    return np.random.SeedSequence((len(numbers), *numbers))  # without it, (1,) equals (1, 0)
