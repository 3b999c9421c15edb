"""No head waits for the device: nothing in a step asks for a value on the host."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib import import_module
from typing import Any
from unittest.mock import patch

import pytest
import torch
from detectron2.modeling.poolers import ROIPooler
from detectron2.utils.events import EventStorage
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from distill.heads import DISTILL_HEAD_REGISTRY
from tests.support.networks import FAMILIES, HEADS, distilled, image_dict

# Functions of detectron2 and torchvision that wait for the device.
DETECTRON2S = (
    ("distill.losses.gid", "batched_nms"),
    ("distill.losses.tid", "nms"),
    ("distill.families.detector_losses", "detection_losses"),
)
READS = ("item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "nonzero")
SYNCHRONISING = ("local_scalar_dense", "nonzero", "masked_select", "unique", "unique2", "equal")


class Guard(TorchDispatchMode):
    """Fails on operators whose result, or its size, the host has to wait for."""

    exempt = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        by_mask = name in ("index", "index_put", "index_put_") and any(
            x is not None and x.dtype == torch.bool for x in args[1]
        )
        if not self.exempt and (by_mask or name.lstrip("_") in SYNCHRONISING):
            raise AssertionError(f"{func} waits for the device")
        return func(*args, **(kwargs or {}))


def exempted(guard: Guard, function: Any) -> Any:
    """detectron2's pooler and NMS, whose boxes are counted on the host."""

    def call(*args: Any, **kwargs: Any) -> Any:
        guard.exempt += 1
        try:
            return function(*args, **kwargs)
        finally:
            guard.exempt -= 1

    return call


@contextmanager
def guarded() -> Iterator[None]:
    guard = Guard()

    def read(name: str, original: Any) -> Any:
        def fail(self: Tensor, *args: Any, **kwargs: Any) -> Any:
            if guard.exempt:
                return original(self, *args, **kwargs)
            raise AssertionError(f"Tensor.{name} waits for the device")

        return fail

    with ExitStack() as stack:
        for name in READS:
            stack.enter_context(patch.object(Tensor, name, read(name, getattr(Tensor, name))))
        stack.enter_context(patch.object(ROIPooler, "forward", exempted(guard, ROIPooler.forward)))
        for place, name in DETECTRON2S:
            original = getattr(import_module(place), name)
            stack.enter_context(patch(f"{place}.{name}", exempted(guard, original)))
        stack.enter_context(guard)
        yield


@pytest.mark.parametrize("reading", ["item", "mask", "bool", "nonzero", "cpu"])
def test_the_guard_sees(reading: str) -> None:
    x = torch.arange(3.0)
    read = {
        "item": lambda: x.sum().item(),
        "mask": lambda: x[x > 1],
        "bool": lambda: bool(x[0] > 1),
        "nonzero": lambda: torch.nonzero(x),
        "cpu": lambda: x.cpu(),
    }[reading]
    with guarded(), pytest.raises(AssertionError, match="waits"):
        read()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "tokens"), [*((f, 0) for f in FAMILIES), ("faster", 5), ("retinanet", 5)]
)
def test_heads_do_not_wait_for_the_device(family: str, tokens: int) -> None:
    """The student's own forward, which is detectron2's, is not guarded."""
    opts = ("MODEL.DISTILL.FRS.WARMUP_ITERS", 0, "MODEL.DISTILL.MASKD.TOKEN_ITERS", tokens)
    model = distilled(family, HEADS[family], *opts)
    heard: list[Any] = []
    hooks = [
        h.register_forward_pre_hook(lambda h, args: heard.append((h, args)))
        for h in model.heads.values()
    ]
    with EventStorage():
        model(
            [image_dict(0, 64, 80, semantic=True), image_dict(1, 96, 64, objects=0, semantic=True)]
        )
        for hook in hooks:
            hook.remove()
        for head, args in heard:
            with guarded():
                losses = head(*args)
            assert sum(losses.values()).requires_grad


def test_every_head_is_guarded() -> None:
    guarded_heads = {name for heads in HEADS.values() for name in heads}
    missing = {name for name, _ in DISTILL_HEAD_REGISTRY} - guarded_heads - {"MSSD"}
    assert not missing
