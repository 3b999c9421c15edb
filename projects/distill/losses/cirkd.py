"""Cross-image relational distillation (CIRKD; Yang et al., "Cross-image relational knowledge
distillation for semantic segmentation").

The losses compare similarities between pixels of several images. The features are those that the
classifier reads, and every similarity is a cosine.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .ifvd import class_sums
from .reduce import class_members, full_precision, same_cells, same_shape, unit

CHUNK = 128  # minimum number of rows whose similarities are held at once
UNFILLED = -1e9  # logit of an empty slot; finite, because -inf in all slots would give NaN


def cross_image_relation(
    student: Tensor, teacher: Tensor, temperature: float = 0.1, pool: int = 1
) -> Tensor:
    """Mini-batch pixel-to-pixel distillation of CIRKD: similarities of each cell with each image.

    L = 1/N² Σ_ij 1/M Σ_m KL(softmax(F_i^T F_j / τ)_m of the teacher || of the student)

    The sum runs over all ordered pairs of images, i = j included. M is the number of cells of an
    image. Features have length 1. There is no factor τ², as in the released code.

    Args:
        student: (N, C, H, W).
        teacher: (N, C', H, W); no gradient reaches it.
        temperature: τ > 0.
        pool: side of the patches, in cells, that are averaged first. The time falls with pool⁴.

    Returns:
        A scalar >= 0 (up to rounding) in float32; a connected zero for an empty batch.

    Raises:
        ValueError: if batches or sizes differ, or ``pool`` is below 1.
    """
    if pool < 1:
        raise ValueError(f"pool must be at least 1, got {pool}")
    student, teacher = same_cells(student, teacher)
    if len(student) == 0:  # pooling raises on an empty batch
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
    """CIRKD's memory-based distillation: similarities of each pixel with the keys of a memory.

    L = T²/P Σ_p KL(softmax(t_p·k / (τT)) || softmax(s_p·k / (τT)))

    The softmax runs over the keys. With keys of pixels this is the pixel-to-pixel loss. With keys
    of regions it is the pixel-to-region loss.

    Args:
        student, teacher: (P, C) features of pixels, the student's after its projection. They are
            brought to length 1 here. No gradient reaches the teacher.
        keys: (K, C) of length 1; no gradient reaches them.
        temperature: τ > 0 of the similarities.
        kd_temperature: T > 0 of the divergence.
        filled: (K,) bool, True for the keys to compare with. None means all keys. Without any key
            the loss is zero.
        labelled: (P,) bool, True for the pixels that count; P is then their number. None means all
            pixels.

    Returns:
        A scalar >= 0 (up to rounding) in float32; a connected zero without pixels.

    Raises:
        ValueError: if shapes differ, or keys or masks do not fit.
    """
    student, teacher = same_shape(student, teacher)
    if keys.ndim != 2 or keys.shape[1] != student.shape[1]:
        raise ValueError(
            f"keys {tuple(keys.shape)} do not fit pixels {tuple(student.shape)}: they must be "
            "(K, C)"
        )
    for name, mask, rows in (("filled", filled, keys), ("labelled", labelled, student)):
        if mask is not None and mask.shape != rows.shape[:1]:
            raise ValueError(f"{name} {tuple(mask.shape)} must be of shape ({len(rows)},)")
    weight = student.new_ones(len(student)) if labelled is None else labelled.to(student.dtype)
    k, s, t = full_precision(keys.detach())[None], unit(student, 1), unit(teacher.detach(), 1)
    total: Tensor = _RowKL.apply(s, k, t, k, weight, filled, temperature * kd_temperature)
    return total * kd_temperature**2 / weight.sum().clamp(min=1)


class _RowKL(torch.autograd.Function):
    """Σ_r w_r Σ_j KL(P_rj || Q_rj) with Q_rj = softmax_m(s_r · k_jm / τ) and P_rj of the teacher.

    The literal form, whose similarities would take R × J·M numbers (8192² for two maps of 64 x 64
    cells)::

        log_q = einsum("rc,jmc->rjm", student, student_keys).div(temperature).log_softmax(2)
        log_p = einsum("rc,jmc->rjm", teacher, teacher_keys).div(temperature).log_softmax(2)
        loss = weight @ (log_p.exp() * (log_p - log_q)).sum((1, 2))

    Here some rows are computed at a time. The forward pass also computes the gradient, so that the
    similarities are neither stored nor computed twice.

    Args:
        student, teacher: (R, C) rows.
        student_keys, teacher_keys: (J, M, C), J groups of M keys.
        weight: (R,) w.
        filled: (M,) bool, True for the keys that enter. None means all keys.
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
        with torch.autocast(student.device.type, enabled=False):  # keeps the products in float32
            keys = max(student_keys.shape[:2].numel(), 1)
            chunk = max(CHUNK, student.numel() // keys)  # takes as much memory as the rows
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
    """Return (r, J, M) log-softmax of the similarities over the keys of each group."""
    logits = (rows @ keys.flatten(0, 1).T).div_(temperature).view(len(rows), *keys.shape[:2])
    if filled is not None:
        logits.masked_fill_(~filled, UNFILLED)
    return logits.log_softmax(-1)


@torch.no_grad()
def class_regions(features: Tensor, labels: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Return CIRKD's keys of the region memory: the mean feature of each class in each image.

    Args:
        features: (N, C, H, W) of the teacher.
        labels: (N, H, W) integers. Pixels outside [0, num_classes) belong to no region.
        num_classes: K.

    Returns:
        keys: (N, K, C) means of unit features, themselves of length 1; 0 for absent classes.
        present: (N, K) bool, True for the classes in an image.

    Raises:
        ValueError: if the labels have another size than the features.
    """
    member = class_members(labels, features, num_classes)
    cells = unit(full_precision(features).flatten(2), 1)
    return unit(class_sums(cells, member), 2), member.any(2)  # sum and mean have one direction


@torch.no_grad()
def class_pixels(
    features: Tensor, labels: Tensor, num_classes: int, number: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Draw CIRKD's keys of the pixel memory: distinct random pixels of each class in each image.

    The released code has a bug: it draws positions within a class's list of pixels, but reads them
    as positions in the map. It therefore stores pixels of any class. Here they are of the class.

    Args:
        features: (N, C, H, W) of the teacher.
        labels: (N, H, W) integers. Pixels outside [0, num_classes) are never drawn.
        num_classes: K.
        number: m >= 1 pixels per class and image.
        generator: source of randomness, on the device of the features.

    Returns:
        keys: (N, K, m, C) of length 1.
        valid: (N, K, m) bool, False where the class has fewer pixels. Those keys are undefined.

    Raises:
        ValueError: if the labels have another size than the features.
    """
    member = class_members(labels, features, num_classes)
    batch, _, size = member.shape
    draw = torch.rand((batch, 1, size), generator=generator, device=features.device)
    # Padding to m: processes with smaller maps send keys of the same shape.
    drawn = F.pad(draw.where(member, -1), (0, max(number - size, 0)), value=-1).topk(number, dim=2)
    cells = unit(full_precision(features).flatten(2).transpose(1, 2), 2)
    index = drawn.indices.clamp(max=size - 1)
    keys = _take(cells, index.flatten(1)).unflatten(1, index.shape[1:])
    return keys, drawn.values >= 0


class ClassQueues(nn.Module):
    """CIRKD's memory of keys: a ring buffer per class, in which the newest keys replace the oldest.

    The released code starts with random noise and compares with it from the first step. Here a slot
    is used only after a key was stored in it. The buffers are part of the ``state_dict``, so that a
    resumed training continues with the same memory.

    Args:
        num_classes: K.
        size: slots per class. The authors use 20000 for pixels and 2000 for regions.
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
        """Start a new step: :meth:`undo` reverts only what is pushed from now on.

        This is cheaper than a copy of the memory.
        """
        self._before = None

    @torch.no_grad()
    def undo(self) -> None:
        """Revert the push since :meth:`mark`, if there was one."""
        if self._before is not None:
            slots, kept, pointer, count = self._before
            self.queue.scatter_(1, slots[..., None].expand_as(kept), kept)
            self.pointer.copy_(pointer)
            self.count.copy_(count)
        self._before = None

    @torch.no_grad()
    def push(self, keys: Tensor, valid: Tensor) -> None:
        """Store keys in their order. Call this at most once after each :meth:`mark`.

        The literal form for each class k, whose number of keys the host would have to wait for::

            new = keys[k, valid[k]]
            slots = (pointer[k] + arange(len(new))) % size
            queue[k, slots] = new
            pointer[k], count[k] = (pointer[k] + len(new)) % size, min(count[k] + len(new), size)

        Args:
            keys: (K, m, C), m at most the number of slots.
            valid: (K, m) bool, True for the keys to store.

        Raises:
            ValueError: if the keys do not fit the memory, or ``valid`` does not fit the keys.
        """
        classes, size, channels = self.queue.shape
        pushed = keys.shape[1]
        if keys.shape != (classes, pushed, channels) or pushed > size:
            raise ValueError(
                f"keys {tuple(keys.shape)} do not fit a memory of {tuple(self.queue.shape)}: they "
                "must be (K, m, C) with m at most the number of slots"
            )
        if valid.shape != keys.shape[:2]:
            raise ValueError(
                f"valid {tuple(valid.shape)} does not fit keys {tuple(keys.shape)}: it must be "
                "(K, m)"
            )
        # Only the device knows the number of valid keys. Therefore m slots are always written:
        # first those of the valid keys, then others, which keep their content.
        stored = valid.sum(1)
        order = torch.where(valid, valid.cumsum(1), stored[:, None] + (~valid).cumsum(1)) - 1
        slots = (self.pointer[:, None] + order) % size
        kept = _take(self.queue, slots)
        self._before = slots, kept, self.pointer.clone(), self.count.clone()
        content = torch.where(valid[..., None], keys.to(kept.dtype), kept)
        self.queue.scatter_(1, slots[..., None].expand_as(content), content)
        self.pointer.copy_((self.pointer + stored) % size)
        self.count.copy_((self.count + stored).clamp(max=size))

    def sample(self, number: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw distinct stored keys of each class. All full queues are read at the same slots.

        Args:
            number: keys per class, at most the number of slots.
            generator: source of randomness, on the device of the memory.

        Returns:
            keys: (K·number, C), the keys of a class next to each other.
            filled: (K·number,) bool, False where a class has fewer keys.
        """
        size = self.queue.shape[1]
        draw = torch.rand(size, generator=generator, device=self.queue.device)
        is_filled = torch.arange(size, device=draw.device) < self.count[:, None]
        drawn = draw.where(is_filled, -1).topk(min(number, size), dim=1)
        keys = _take(self.queue, drawn.indices)
        return keys.flatten(0, 1), (drawn.values >= 0).flatten()


def _take(rows: Tensor, index: Tensor) -> Tensor:
    """Return the (B, m, C) rows of (B, R, C) at the (B, m) indices."""
    return rows.gather(1, index[..., None].expand(-1, -1, rows.shape[2]))
