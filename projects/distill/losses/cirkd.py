"""Cross-image relational distillation (CIRKD; Yang et al., "Cross-image relational knowledge
distillation for semantic segmentation"): similarities between the pixels of several pictures.

Features are those that the classifier reads; all are compared by their cosine.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .ifvd import class_sums
from .reduce import class_members, full_precision, same_cells, same_shape, unit

CHUNK = 128  # rows whose similarities are held at once, at least
UNFILLED = -1e9  # logit of an empty slot: no weight, and finite where all slots are empty


def cross_image_relation(
    student: Tensor, teacher: Tensor, temperature: float = 0.1, pool: int = 1
) -> Tensor:
    """Similarities of each cell with the cells of each picture (mini-batch pixel-to-pixel).

    1/N² Σ_ij 1/M Σ_m KL(softmax(F_i^T F_j / τ)_m of the teacher || of the student) over all ordered
    pairs of pictures, i = j included; M cells of length 1. There is no τ².

    Args:
        student: (N, C, H, W).
        teacher: (N, C', H, W); no gradient reaches it.
        temperature: τ > 0.
        pool: side of the patches, in cells, whose mean is a cell here: time grows with 1/pool⁴.

    Returns:
        A scalar >= 0 (up to rounding) in float32; a connected zero for an empty batch.

    Raises:
        ValueError: batches or sizes differ, or ``pool`` is below 1.
    """
    if pool < 1:
        raise ValueError(f"pool must be at least 1, got {pool}")
    student, teacher = same_cells(student, teacher)
    if len(student) == 0:  # pooling refuses it
        return student.sum()
    s, t = (
        unit(F.avg_pool2d(x, pool, ceil_mode=True).flatten(2), 1).transpose(1, 2).contiguous()
        for x in (student, teacher.detach())
    )
    rows, weight = s.flatten(0, 1), s.new_ones(s.shape[0] * s.shape[1])
    total: Tensor = _RowKL.apply(rows, s, t.flatten(0, 1), t, weight, None, temperature)
    return total / (len(s) * len(weight))


def memory_contrast(
    student: Tensor,
    teacher: Tensor,
    keys: Tensor,
    temperature: float = 0.1,
    kd_temperature: float = 1.0,
    filled: Tensor | None = None,
    labelled: Tensor | None = None,
) -> Tensor:
    """Similarities of each pixel with the keys of a memory (pixel-to-pixel, pixel-to-region).

    T²/P Σ_p KL(softmax(t_p·k / (τT)) || softmax(s_p·k / (τT))), the softmax over the keys.

    Args:
        student, teacher: (P, C) features of pixels, the student's after its projection; brought to
            length 1 here. No gradient reaches the teacher.
        keys: (K, C) of length 1, without gradient.
        temperature: τ > 0 of the similarities.
        kd_temperature: T > 0 of the divergence.
        filled: (K,) bool, the keys to compare with; None: all. Without any the loss is zero.
        labelled: (P,) bool, the pixels that count, P is their number; None: all.

    Returns:
        A scalar >= 0 (up to rounding) in float32; a connected zero without pixels.

    Raises:
        ValueError: shapes differ, or keys or pixels do not fit.
    """
    student, teacher = same_shape(student, teacher)
    if keys.ndim != 2 or keys.shape[1] != student.shape[1]:
        raise ValueError(
            f"keys {tuple(keys.shape)} do not fit pixels {tuple(student.shape)}: they must be "
            "(K, C)"
        )
    for name, mask, of in (("filled", filled, keys), ("labelled", labelled, student)):
        if mask is not None and mask.shape != of.shape[:1]:
            raise ValueError(f"{name} {tuple(mask.shape)} must be of shape ({len(of)},)")
    weight = student.new_ones(len(student)) if labelled is None else labelled.to(student.dtype)
    k, s, t = full_precision(keys.detach())[None], unit(student, 1), unit(teacher.detach(), 1)
    total: Tensor = _RowKL.apply(s, k, t, k, weight, filled, temperature * kd_temperature)
    return total * kd_temperature**2 / weight.sum().clamp(min=1)


class _RowKL(torch.autograd.Function):
    """Σ_r w_r Σ_j KL(P_rj || Q_rj), Q_rj = softmax_m(s_r · k_jm / τ), P_rj so for the teacher.

    The gradient is found along with the value, some rows at a time: the R × J·M similarities of a
    batch (8192² for two maps of 64 × 64 cells) are never held, nor computed twice.

    Args:
        student, teacher: (R, C) rows.
        student_keys, teacher_keys: J groups of M keys, (J, M, C).
        weight: (R,) w.
        filled: (M,) bool, the keys that enter; None: all.
        temperature: τ.
    """

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        student_keys: Tensor,
        teacher: Tensor,
        teacher_keys: Tensor,
        weight: Tensor,
        filled: Tensor | None,
        temperature: float,
    ) -> Tensor:
        total = student.new_zeros(())
        row_grad, key_grad = torch.zeros_like(student), torch.zeros_like(student_keys)
        with torch.autocast(student.device.type, enabled=False):  # it would halve matrix products
            keys = max(student_keys.shape[:2].numel(), 1)
            chunk = max(CHUNK, student.numel() // keys)  # as much as the rows themselves
            for start in range(0, len(student), chunk):
                rows = slice(start, start + chunk)
                log_q = _log_relation(student[rows], student_keys, filled, temperature)
                log_p = _log_relation(teacher[rows], teacher_keys, filled, temperature)
                p = log_p.exp()
                total += log_p.sub_(log_q).mul_(p).sum((1, 2)) @ weight[rows]
                slope = log_q.exp_().sub_(p).flatten(1).mul_(weight[rows, None] / temperature)
                row_grad[rows] = slope @ student_keys.flatten(0, 1)
                if ctx.needs_input_grad[1]:
                    key_grad += (slope.T @ student[rows]).view_as(key_grad)
        ctx.save_for_backward(row_grad, key_grad)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        row_grad, key_grad = ctx.saved_tensors
        return row_grad * gradient, key_grad * gradient, None, None, None, None, None


def _log_relation(rows: Tensor, keys: Tensor, filled: Tensor | None, temperature: float) -> Tensor:
    """(r, J, M) logarithm of the softmax over each group's keys."""
    logits = (rows @ keys.flatten(0, 1).T).div_(temperature).view(len(rows), *keys.shape[:2])
    if filled is not None:
        logits.masked_fill_(~filled, UNFILLED)
    return logits.log_softmax(-1)


@torch.no_grad()
def class_regions(features: Tensor, labels: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Keys of the region memory: the mean feature of each class of each picture.

    Args:
        features: (N, C, H, W) of the teacher.
        labels: (N, H, W) integers; pixels outside [0, num_classes) belong to no region.
        num_classes: K.

    Returns:
        keys: (N, K, C) means of the features of length 1, themselves of length 1; 0 for absent
            classes.
        present: (N, K) bool.

    Raises:
        ValueError: the labels have another size than the features.
    """
    member = class_members(labels, features, num_classes)
    cells = unit(full_precision(features).flatten(2), 1)
    return unit(class_sums(cells, member), 2), member.any(2)  # the sum points where the mean does


@torch.no_grad()
def class_pixels(
    features: Tensor, labels: Tensor, num_classes: int, number: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Keys of the pixel memory: random pixels of each class of each picture, none twice.

    The released code draws the positions within a class's list of pixels and reads them as
    positions in the map: it stores pixels of any class. Here they are of the class.

    Args:
        features: (N, C, H, W) of the teacher.
        labels: (N, H, W) integers; pixels outside [0, num_classes) are never drawn.
        num_classes: K.
        number: m >= 1.
        generator: source of randomness, on the device of the features.

    Returns:
        keys: (N, K, m, C) of length 1.
        valid: (N, K, m) bool, False where the class has fewer pixels; these keys mean nothing.

    Raises:
        ValueError: the labels have another size than the features.
    """
    member = class_members(labels, features, num_classes)
    batch, _, size = member.shape
    draw = torch.rand((batch, 1, size), generator=generator, device=features.device)
    # As many on every map: processes with smaller ones send keys of the same shape.
    drawn = F.pad(draw.where(member, -1), (0, max(number - size, 0)), value=-1).topk(number, dim=2)
    cells = unit(full_precision(features).flatten(2).transpose(1, 2), 2)
    index = drawn.indices.clamp(max=size - 1)
    keys = _take(cells, index.flatten(1)).unflatten(1, index.shape[1:])
    return keys, drawn.values >= 0


class ClassQueues(nn.Module):
    """A memory of keys: a ring buffer for each class, in which the newest replace the oldest.

    The released code starts with random noise and compares with it from the first step; here a
    slot is not used before a key lies in it. The buffers are part of the ``state_dict``, so that a
    resumed training goes on with the same memory.

    Args:
        num_classes: K.
        size: slots of each class; the authors take 20000 for pixels and 2000 for regions.
        channels: C.
    """

    queue: Tensor
    pointer: Tensor
    count: Tensor

    def __init__(self, num_classes: int, size: int, channels: int):
        super().__init__()
        self.register_buffer("queue", torch.zeros(num_classes, size, channels))
        self.register_buffer("pointer", torch.zeros(num_classes, dtype=torch.long))
        self.register_buffer("count", torch.zeros(num_classes, dtype=torch.long))
        self._before: tuple[Tensor, ...] | None = None

    def mark(self) -> None:
        """Remember the present content, for :meth:`undo`; cheaper than a copy of the memory."""
        self._before = None

    @torch.no_grad()
    def undo(self) -> None:
        """Take back the push since :meth:`mark`, if there was one."""
        if self._before is not None:
            slots, kept, pointer, count = self._before
            self.queue.scatter_(1, slots[..., None].expand_as(kept), kept)
            self.pointer.copy_(pointer)
            self.count.copy_(count)
        self._before = None

    @torch.no_grad()
    def push(self, keys: Tensor, valid: Tensor) -> None:
        """Store keys in their order, once between two calls of :meth:`mark`.

        Args:
            keys: (K, m, C), m at most the number of slots.
            valid: (K, m) bool; the others are not stored.

        Raises:
            ValueError: the keys do not fit the memory, or ``valid`` not the keys.
        """
        classes, size, channels = self.queue.shape
        pushed = keys.shape[1]
        if keys.shape != (classes, pushed, channels) or pushed > size:
            raise ValueError(
                f"keys {tuple(keys.shape)} do not fit a memory of {tuple(self.queue.shape)}: they "
                "must be (K, m, C) with m at most the number of slots"
            )
        if valid.shape != keys.shape[:2]:
            raise ValueError(f"valid {tuple(valid.shape)} must be (K, m) of {tuple(keys.shape)}")
        # How many keys are stored is known on the device only, so that m slots are written in any
        # case: first the valid keys', then others that receive what they hold.
        stored = valid.sum(1)
        behind = torch.where(valid, valid.cumsum(1), stored[:, None] + (~valid).cumsum(1)) - 1
        slots = (self.pointer[:, None] + behind) % size
        kept = _take(self.queue, slots)
        self._before = slots, kept, self.pointer.clone(), self.count.clone()
        content = torch.where(valid[..., None], keys.to(kept.dtype), kept)
        self.queue.scatter_(1, slots[..., None].expand_as(content), content)
        self.pointer.copy_((self.pointer + stored) % size)
        self.count.copy_((self.count + stored).clamp(max=size))

    def sample(self, number: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Random keys of each class, none twice; from the same slots where all are filled.

        Args:
            number: keys of each class; at most all slots.
            generator: source of randomness, on the device of the memory.

        Returns:
            keys: (K·number, C), a class's keys next to each other.
            filled: (K·number,) bool, False where a class has fewer keys.
        """
        size = self.queue.shape[1]
        draw = torch.rand(size, generator=generator, device=self.queue.device)
        is_filled = torch.arange(size, device=draw.device) < self.count[:, None]
        drawn = draw.where(is_filled, -1).topk(min(number, size), dim=1)
        keys = _take(self.queue, drawn.indices)
        return keys.flatten(0, 1), (drawn.values >= 0).flatten()


def _take(rows: Tensor, index: Tensor) -> Tensor:
    """(B, m, C) rows of each (B, R, C) at (B, m)."""
    return rows.gather(1, index[..., None].expand(-1, -1, rows.shape[2]))
