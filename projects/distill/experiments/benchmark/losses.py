"""Seconds of losses on feature maps, beside those of a plain mean squared error.

The maps are those of an FPN's P3 to P7 with 256 channels. A loss is timed with its backward to the
student's maps. All losses take turns, so that they share the machine's slow moments.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...heads.fgd import GlobalContext
from ...losses import (
    cwd,
    fgd,
    frequency_mask,
    frequency_masked_mse,
    ima,
    pkd,
    tid,
    tid_mask,
)
from ...losses.fgd import fgd_relation
from ...utils.progress import Progress
from ...utils.timing import seconds, spread

STRIDES = (8, 16, 32, 64, 128)
CHANNELS = 256
OBJECTS = (7, 100, 500)
MASK_RATIO = 0.15

Levels = list[tuple[Tensor, Tensor]]  # maps of the student and the teacher


def measure_losses(
    size: tuple[int, int], batch: int, repeats: int, device: str, progress: Progress
) -> dict[str, dict[str, Any]]:
    """Return the spread of each loss's ``seconds``, and of their ``ratio`` to ``mse``, by name.

    Args:
        size: (height, width) of the images in pixels, which are padded to whole cells of P7.
        batch: images.
        repeats: rounds, after one that warms up.
        device: where to compute, such as "cpu" or "cuda".
    """
    losses = losses_of(size, batch, device)
    maps = losses["mse"].args[0]

    def run(loss: Callable[[], Tensor]) -> None:
        for student, _ in maps:
            student.grad = None
        loss().backward()

    times: dict[str, list[float]] = {name: [] for name in losses}
    for _ in progress.track(range(repeats + 1), description="losses"):
        for name, loss in losses.items():
            times[name].append(seconds(functools.partial(run, loss), device.startswith("cuda")))
    return {
        name: {
            "seconds": spread(x[1:]),
            "ratio": spread([a / b for a, b in zip(x[1:], times["mse"][1:])]),
        }
        for name, x in times.items()
    }


def losses_of(
    size: tuple[int, int], batch: int, device: str
) -> dict[str, "functools.partial[Tensor]"]:
    """Return the losses by name, on random maps."""
    generator = torch.Generator(device).manual_seed(0)
    height, width = (-(-x // STRIDES[-1]) * STRIDES[-1] for x in size)
    sizes = [(height // x, width // x) for x in STRIDES]

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    maps = [
        (random(batch, CHANNELS, *x).requires_grad_(), random(batch, CHANNELS, *x)) for x in sizes
    ]
    masks = [frequency_mask(batch, *x, MASK_RATIO, generator) for x in sizes]
    values = [random(batch, *x).abs() for x in sizes]
    blocks = [[GlobalContext(CHANNELS).to(device) for _ in range(2)] for _ in sizes]

    def boxes(number: int) -> list[Tensor]:
        limits = torch.tensor([width, height], device=device)
        corners = torch.rand(batch, number, 2, 2, generator=generator, device=device)
        low = corners[..., 0, :] * limits * 0.6
        return list(torch.cat([low, low + (0.05 + 0.3 * corners[..., 1, :]) * limits], 2))

    by_objects = {
        f"fgd, {number} objects": functools.partial(
            _fgd, maps, boxes(number), (height, width), blocks
        )
        for number in OBJECTS
    }
    return {
        "mse": functools.partial(_sum, maps, lambda s, t, _: (s - t).square().mean()),
        "F.mse_loss": functools.partial(_sum, maps, lambda s, t, _: F.mse_loss(s, t)),
        "pkd": functools.partial(_sum, maps, lambda s, t, _: pkd(s, t)),
        "cwd": functools.partial(_sum, maps, lambda s, t, _: cwd(s, t)),
        **by_objects,
        "frequency-masked mse": functools.partial(
            _sum, maps, lambda s, t, i: frequency_masked_mse(s, t, masks[i])
        ),
        "ima": functools.partial(_sum, maps, lambda s, t, i: ima(s, t, masks[i])),
        "tid": functools.partial(
            _sum, maps, lambda s, t, i: torch.stack(tid(s, t, tid_mask(values[i])))[0]
        ),
    }


def _sum(maps: Levels, loss: Callable[[Tensor, Tensor, int], Tensor]) -> Tensor:
    """Return the sum of a loss over the levels."""
    return torch.stack([loss(s, t, i) for i, (s, t) in enumerate(maps)]).sum()


def _fgd(
    maps: Levels,
    boxes: list[Tensor],
    padded_size: tuple[int, int],
    blocks: list[list[GlobalContext]],
) -> Tensor:
    """Return FGD's four terms with factor 1 each."""

    def level(student: Tensor, teacher: Tensor, i: int) -> Tensor:
        own, other = blocks[i]
        relation = fgd_relation(student, teacher, own(student) - other(teacher))
        return torch.stack([*fgd(student, teacher, boxes, padded_size), relation]).sum()

    return _sum(maps, level)
