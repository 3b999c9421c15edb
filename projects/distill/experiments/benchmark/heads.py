"""Seconds and memory of the heads' losses with their backward."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ...structures import NetworkOutputs, tensors_of
from ...utils.progress import Progress
from ...utils.timing import seconds, spread
from .memory import MIB
from .networks import Networks, answers, said


def measure_heads(
    networks: Networks, inputs: list[Any], repeats: int, progress: Progress
) -> dict[str, dict[str, Any]]:
    """Return the costs of each head's losses by its name.

    A row has the spread of the seconds of ``head``, with its backward to the features, and of
    ``backbone``, the student's forward. It also has their ``ratio``, the ``largest`` tensor that
    the head makes relative to the largest feature map, and the MiB ``kept`` by autograd.
    """
    model = networks.model(list(networks.heads))
    student = said(model, inputs)
    taught = answers(model, student)
    for x in tensors_of(student):
        x.requires_grad_(x.is_floating_point())
    cuda = networks.cfg.MODEL.DEVICE.startswith("cuda")
    images = model.family.preprocess([x["image"] for x in inputs], student.batch.padded_size)
    heads = networks.heads

    def answer_to(head: Any) -> NetworkOutputs | None:
        return taught[head.taught_by] if head.needs_teacher else student

    def backward(head: nn.Module) -> None:
        sum(head(student, answer_to(head)).values()).backward()

    @torch.no_grad()
    def forward() -> None:
        networks.student.backbone(images)  # type: ignore[operator]

    largest, kept = {}, {}
    for name, head in heads.items():
        with LargestTensor() as mode:
            backward(head)
        largest[name] = mode.numel / max(x.numel() for x in student.features.values())
        kept[name] = mebibytes_kept(functools.partial(head, student, answer_to(head)), head)
    backbone: list[float] = []
    times: dict[str, list[float]] = {name: [] for name in heads}
    for _ in progress.track(range(repeats), description="heads"):
        backbone.append(seconds(forward, cuda))
        for name, head in heads.items():
            times[name].append(seconds(functools.partial(backward, head), cuda))
    return {
        name: {
            "head": spread(x),
            "backbone": spread(backbone),
            "ratio": spread([a / b for a, b in zip(x, backbone)]),
            "largest": largest[name],
            "kept": kept[name],
        }
        for name, x in times.items()
    }


def mebibytes_kept(forward: Callable[[], Any], head: nn.Module) -> float:
    """MiB that autograd stores in a forward, without the head's own parameters."""
    own = {x.untyped_storage().data_ptr() for x in head.parameters()}
    sizes: dict[int, int] = {}
    stored = []  # or another tensor would get the memory of one that is gone

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
        stored.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        losses = forward()
    del losses
    return sum(sizes.values()) / MIB


class LargestTensor(TorchDispatchMode):
    """Remembers the most elements that an operation has returned, views excluded."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            for x in result if isinstance(result, (tuple, list)) else (result,):
                if isinstance(x, Tensor):
                    parts = 2 if x.is_complex() else 1
                    self.numel = max(self.numel, x.numel() * parts)
        return result
