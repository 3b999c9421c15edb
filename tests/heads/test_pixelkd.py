"""Test PixelKD: the compared classes, and logits of another resolution."""

import pytest
import torch
from torch import Tensor

from distill.heads import PixelKD
from distill.losses import pixel_kd
from distill.structures import Batch, NetworkOutputs, SemSeg
from tests.support.networks import CLASSES, network_info, tiny_cfg, tiny_model

NAMES = (*CLASSES, "background")


def logits_only(logits: Tensor, padded_size: tuple[int, int]) -> NetworkOutputs:
    """Return outputs with only these logits, which are the features too."""
    labels = torch.zeros(len(logits), *padded_size, dtype=torch.long)
    batch = Batch([{"sem_seg": x} for x in labels], padded_size)
    return NetworkOutputs(batch, features={"p2": logits}, sem_seg=SemSeg(logits, logits))


def maps(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def pixel_head(student: tuple[str, ...], teacher: tuple[str, ...]) -> PixelKD:
    model = tiny_model("semantic")
    infos = [network_info(n, model) for n in ("student", "teacher")]
    object.__setattr__(infos[0], "sem_seg_classes", student)
    object.__setattr__(infos[1], "sem_seg_classes", teacher)
    return PixelKD(tiny_cfg("semantic"), *infos)


def test_logits_are_compared_by_class_name() -> None:
    head = pixel_head(("road", "car", "sky"), ("sky", "tree", "road"))
    s, t = maps(0, 2, 3, 5, 7), maps(1, 2, 3, 5, 7)
    (loss,) = head.losses(logits_only(s, (20, 28)), logits_only(t, (20, 28))).values()
    assert torch.equal(loss, pixel_kd(s[:, [0, 2]], t[:, [2, 0]]))


def test_the_teachers_output_stride_and_padding_do_not_matter() -> None:
    """Constant logits stay what they are at any resolution; its padding is cut off."""
    head = pixel_head(NAMES, NAMES)
    s = maps(0, 1, 4, 1, 1).expand(1, 4, 9, 9)  # stride 4 of 36 pixels
    t = torch.full((1, 4, 14, 14), 99.0)  # the teacher pads to 56
    t[..., :9, :9] = s
    (same,) = head.losses(logits_only(s, (36, 36)), logits_only(t, (36, 36))).values()
    head.teacher_stride = 8
    coarse = torch.full((1, 4, 7, 7), 99.0)
    coarse[..., :5, :5] = s[..., :5, :5]
    (other,) = head.losses(logits_only(s, (36, 36)), logits_only(coarse, (36, 36))).values()
    assert float(same) == pytest.approx(0, abs=1e-6) == float(other)
