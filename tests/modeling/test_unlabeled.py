"""Ground truth of unlabelled images, and what is refused."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from detectron2.structures import Boxes, Instances
from torch import nn

from distill.errors import ConfigError
from distill.heads import build_heads
from distill.heads.instances import TeacherInstances
from distill.modeling.unlabeled import PseudoLabels, Unlabeled, build_unlabeled
from tests.support.networks import CLASSES, network_info, tiny_cfg, tiny_model

NODE = "MODEL.DISTILL.UNLABELED"
ON = ("DATASETS.UNLABELED", ("more",))
TEACHER = ("circle", "star", "square")  # in another order than the student's


def detections(*rows: tuple[list[float], float, int], masks: bool = False) -> Instances:
    found = Instances((64, 96))
    found.pred_boxes = Boxes(torch.tensor([x[0] for x in rows]).reshape(-1, 4))
    found.scores = torch.tensor([x[1] for x in rows])
    found.pred_classes = torch.tensor([x[2] for x in rows], dtype=torch.int64)
    if masks:
        found.pred_masks = torch.ones(len(rows), 1, 28, 28)
        found.pred_masks[..., 14:] = 0  # the left half
    return found


def labels(scores: list[float], masks: bool = False) -> PseudoLabels:
    return PseudoLabels(TeacherInstances(min(scores), CLASSES, TEACHER), scores, masks)


def test_detections_become_objects() -> None:
    """By class, cut to the image, and in the order of the student's classes."""
    found = detections(
        ([10, 10, 90, 40], 0.6, 1),  # a star, cut to the width
        ([10, 10, 30, 40], 0.4, 2),  # a square, below its score
        ([10, 10, 30, 40], 0.4, 0),
        ([70, 10, 90, 40], 0.9, 0),  # beside the image
    )
    (truth,) = labels([0.3, 0.5, 0.5])([found], [(64, 64)], (64, 96))
    assert truth.image_size == (64, 64) and not truth.has("gt_masks")
    assert truth.gt_boxes.tensor.tolist() == [[10, 10, 64, 40], [10, 10, 30, 40]]
    assert truth.gt_classes.tolist() == [CLASSES.index("star"), CLASSES.index("circle")]


@pytest.mark.parametrize("masks", [False, True])
def test_masks_are_the_teachers_or_boxes(masks: bool) -> None:
    found = detections(([8, 8, 40, 24], 0.9, 0), masks=masks)
    one, none = labels([0.5] * 3, masks=True)(
        [found, detections(masks=masks)], [(64, 96)] * 2, (64, 96)
    )
    mask = one.gt_masks.tensor
    assert mask.shape == (1, 64, 96) and mask.dtype == torch.bool
    assert mask.sum() == pytest.approx(16 * 32 / (2 if masks else 1), rel=0.1)
    assert not mask[0, :, 41:].any()
    assert len(none) == 0 and none.gt_masks.tensor.shape == (0, 64, 96)


def infos(family: str = "faster", teacher: str = "faster", **changes: Any) -> tuple[Any, Any]:
    theirs = network_info("teacher", tiny_model(teacher))
    known = {"detection_classes": TEACHER, **changes}
    return network_info("student", tiny_model(family)), replace(theirs, **known)


def build(heads: tuple[str, ...], networks: tuple[Any, Any], *opts: Any) -> Unlabeled | None:
    cfg = tiny_cfg("faster", "MODEL.DISTILL.HEADS", heads, *ON, *opts)
    return build_unlabeled(cfg, {"": networks}, build_heads(cfg, *networks))


def test_heads_that_need_labels_are_idle_without_detections(
    caplog: pytest.LogCaptureFixture,
) -> None:
    networks = infos(outputs=frozenset({"features"}), detection_classes=())
    own = build(("FitNet", "FGD", "FKD"), networks)
    assert own is not None and own.pseudo is None and own.idle == {"FGD"}
    assert "does not train FGD: they have no teacher or the teacher" in caplog.text
    assert own.share("loss_fgd/p3", 2, 6) == 0
    assert own.share("loss_fitnet/p3", 2, 6) == 0.75
    assert own.share("loss_cls", 2, 6) == 0
    given = {"loss_cls": torch.ones(()), "loss_fitnet/p3": torch.ones(())}
    assert own.learned(given).keys() == {"loss_fitnet/p3"}


def test_with_detections_all_heads_learn() -> None:
    own = build(("FitNet", "FGD", "ROIKD"), infos(), f"{NODE}.SCORE", [0.3, 0.4, 0.5])
    assert own is not None and own.pseudo is not None and not own.idle
    assert own.pseudo.scores.tolist() == pytest.approx([0.3, 0.4, 0.5])
    assert not own.state_dict()


def test_the_first_teacher_with_detections_labels() -> None:
    student, seeing = infos()
    blind = replace(seeing, outputs=frozenset({"features"}), detection_classes=())
    cfg = tiny_cfg("faster", "MODEL.DISTILL.HEADS", ("FGD",), *ON)
    networks = {"blind": (student, blind), "seeing": (student, seeing)}
    own = build_unlabeled(cfg, networks, build_heads(cfg, student, blind))
    assert own is not None and own.teacher == "seeing" and not own.idle


BLIND = {"outputs": frozenset({"features"}), "detection_classes": ()}


@pytest.mark.parametrize(
    "heads, changes, opts, message",
    [
        (("FitNet",), BLIND, (f"{NODE}.WEIGHT", 1.0), "WEIGHT is 1.0, but the teacher .*set it"),
        (
            ("FGD",),
            BLIND,
            (),
            "UNLABELED.* the teacher .* no detections, and all of .*'FGD'.* need labels",
        ),
        (("FitNet",), {}, (f"{NODE}.SCORE", [0.1, 0.2]), "SCORE has 2 numbers; .* 3 classes"),
        (
            ("FitNet",),
            {"detection_classes": ("cat",)},
            (f"{NODE}.WEIGHT", 1.0),
            "no name in common",
        ),
        (
            ("FitNet",),
            {},
            (f"{NODE}.WEIGHT", 1.0, "MODEL.MASK_ON", True),
            "detects no masks.*MASK_ON to False",
        ),
    ],
)
def test_refusals(heads: Any, changes: Any, opts: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(heads, infos(**changes), *opts)


def test_without_the_key_nothing_is_built() -> None:
    cfg = tiny_cfg("faster", "MODEL.DISTILL.HEADS", ("FitNet",))
    assert build_unlabeled(cfg, {"": infos()}, nn.ModuleDict()) is None
