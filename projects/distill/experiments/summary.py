"""Numbers of repeated runs, as tables show them."""

from collections.abc import Sequence

import torch


def replicates(tune: bool, number: int) -> tuple[int, list[int]]:
    """Return the seed of the scenes and the seeds of ``number`` replicates.

    Tuning uses others than those whose results are reported.
    """
    data_seed, first = (0, 100) if tune else (1, 0)
    return data_seed, list(range(first, first + number))


def mean_std(values: Sequence[float | None], digits: int = 1) -> str:
    """Format the mean ± sample standard deviation, a single value, or "-" for undefined ones."""
    if not values or None in values:
        return "-"
    x = torch.tensor(values, dtype=torch.float64)
    mean = f"{x.mean():.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {x.std():.{digits}f}"


def differences(
    values: Sequence[float | None], others: Sequence[float | None]
) -> list[float | None]:
    """Return ``values`` - ``others``, paired; None where one of them is None."""
    return [None if a is None or b is None else a - b for a, b in zip(values, others)]
