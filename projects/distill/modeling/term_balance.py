"""Equal parts of a head's gradient for the terms of its loss."""

import math
from collections.abc import Mapping
from statistics import mean
from typing import TypeVar

import torch
import torch.distributed as dist
from detectron2.utils import comm
from torch import Tensor

from ..heads.base import Losses, summed

K = TypeVar("K")
BOUND = 1e3  # no factor is larger than this, or smaller than its inverse
MOMENTUM = 0.5  # weight of a new measurement in the averages
SCALE = 1024.0  # keeps small float16 gradients


class TermBalance:
    """Share the gradient of a head among the terms that compare one tensor.

    Each term gets an equal part of the gradient's norm there, times its strength. A term that
    compares several tensors has one factor for all of them. The gradients are measured at the
    branches that the head reads, by a backward from the terms to these; averages are geometric. The
    head's own parameters learn from the same mixture as the student.

    Args:
        strengths: the factor of each term over the authors' factor.
    """

    def __init__(self, strengths: Mapping[str, float]):
        self.strengths = dict(strengths)
        self.norms: dict[str, dict[str, float]] = {}  # by place and term
        self.squares: dict[tuple[str, str], Tensor] = {}  # in this step, by place and term

    def have_rivals(self, losses: Losses) -> bool:
        """Return whether several terms compare one tensor, as far as that is known."""
        names = {name for name, _, _ in _terms(losses)}
        known = {name for norms in self.norms.values() for name in norms}
        if not names <= known:
            return len(names) > 1
        return any(len(norms) > 1 for norms in self.norms.values())

    def measure(self, losses: Losses, branches: Mapping[str, Tensor]) -> None:
        """Measure the gradient of each term at the branches, by place, from which it is made."""
        for name, _, loss in _terms(losses):
            found: tuple[Tensor | None, ...] = (None,) * len(branches)
            if loss.requires_grad:
                inputs = list(branches.values())
                with torch.autocast(loss.device.type, enabled=False):  # it is for forwards
                    found = torch.autograd.grad(
                        loss * SCALE, inputs, retain_graph=True, allow_unused=True
                    )
            for place, gradient in zip(branches, found):
                # Every process has every key, though it may have nothing to compare.
                square = loss.new_zeros((), dtype=torch.float32)
                if gradient is not None:
                    square = torch.linalg.vector_norm(gradient, dtype=torch.float32).square()
                self.squares[place, name] = self.squares.get((place, name), 0) + square

    def weigh(self, losses: Losses) -> dict[str, Tensor]:
        """Return the losses by part, each the weighted sum of its terms."""
        factors = self.factors()
        weighed: dict[str, dict[str, Tensor]] = {part: {} for part in losses}
        for name, part, loss in _terms(losses):
            weighed[part][name] = loss * factors.get(name, 1.0)
        return summed(weighed)

    def factors(self) -> dict[str, float]:
        """Return the factor of each term that has been measured; 1 for a term alone."""
        wanted: dict[str, list[float]] = {}
        found: dict[str, list[float]] = {}
        for norms in self.norms.values():
            strengths = {name: self._strength(name) for name in norms}
            for shares, sizes in ((wanted, strengths), (found, norms)):
                whole = sum(sizes.values())
                for name, size in sizes.items():
                    shares.setdefault(name, []).append(size / whole)
        factors = {name: mean(wanted[name]) / mean(found[name]) for name in wanted}
        return {name: min(max(x, 1 / BOUND), BOUND) for name, x in factors.items()}

    def strength_at(self, place: str) -> float:
        """Return the mean strength of the terms that compare a tensor; 1 if none is known."""
        return mean(map(self._strength, self.norms[place])) if place in self.norms else 1.0

    def follow(self) -> None:
        """Follow the measurements of a step that changed the weights; waits for the device."""
        for (place, name), norm in reduced_norms(self.squares).items():
            if norm > 0 and math.isfinite(norm):
                norms = self.norms.setdefault(place, {})
                norms[name] = norms.get(name, norm) ** (1 - MOMENTUM) * norm**MOMENTUM

    def _strength(self, name: str) -> float:
        return self.strengths.get(name.rpartition("/")[2], 1.0)


def _terms(losses: Losses) -> list[tuple[str, str, Tensor]]:
    """Return (name, part, loss) of all terms; a loss without terms is one."""
    found = []
    for part, loss in losses.items():
        if isinstance(loss, Tensor):
            found.append((part, part, loss))
        else:
            prefix = f"{part}/" if part else ""
            found += [(f"{prefix}{term}", part, x) for term, x in loss.items()]
    return found


def reduced_norms(squares: Mapping[K, Tensor]) -> dict[K, float]:
    """Return norms over all processes, from the squares of this process."""
    return {key: math.sqrt(x) for key, x in reduced_sums(squares).items()}


def reduced_sums(sums: Mapping[K, Tensor]) -> dict[K, float]:
    """Return sums over all processes, from those of this process."""
    if not sums:
        return {}
    stacked = torch.stack(list(sums.values()))
    if comm.get_world_size() > 1:
        dist.all_reduce(stacked)
    return dict(zip(sums, stacked.tolist()))
