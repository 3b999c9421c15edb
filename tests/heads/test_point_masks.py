"""Test the comparison of the masks of RTMDet-Ins."""

from typing import Any

import pytest
import torch
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

from distill.heads import DISTILL_HEAD_REGISTRY
from distill.nets.assign import dynamic_masks
from distill.nets.dense import points_and_strides
from tests.support.cases import for_each
from tests.support.networks import (
    CLASSES,
    distilled,
    image_dict,
    kd_losses,
    network_info,
    outspoken_model,
    tiny_model,
)
from tests.support.networks import record as record_outputs

HEAD = DISTILL_HEAD_REGISTRY.get("PointMaskKD")
LOSS, TEMPERATURE = "loss_pointmaskkd", "MODEL.DISTILL.POINTMASKKD.TEMPERATURE"


def batch(objects: tuple[int, int] = (2, 0)) -> list[dict[str, Any]]:
    sizes = ((64, 96), (96, 64))
    return [image_dict(k, *sizes[k], objects=number) for k, number in enumerate(objects)]


def masks_of(network: nn.Module, predictions: Any, image: int, rows: Tensor) -> Tensor:
    """Return the mask logits of some priors of an image, prior by prior."""
    model: Any = network
    points, strides = points_and_strides(model.anchor_generator(predictions[2]))
    kernels = torch.cat([x.flatten(2).transpose(1, 2) for x in predictions[2]], 1)[image]
    found = [
        dynamic_masks(kernels[[k]], points[[k]], strides[[k]], predictions[3][0][image])
        for k in rows.tolist()
    ]
    return torch.cat(found)


def test_the_masks_of_the_same_points() -> None:
    """They are of the points on which the student trains; other rows do not count."""
    model = distilled("rtmdet_ins", ["PointMaskKD"])
    losses, student, teacher = record_outputs(model, batch())
    own, theirs = student.point_masks, teacher.point_masks
    assert own is not None and theirs is not None and teacher.dense is None
    assert [len(x) for x in own.rows] == [26, 0]
    assert (own.labels[own.rows[0] < 0] == len(CLASSES)).all()
    matched = own.rows[0][own.rows[0] >= 0]
    assert 2 <= len(matched) < 26 and len(set(matched.tolist())) == len(matched)
    assert set(own.labels[: len(matched)].tolist()) == set(
        batch()[0]["instances"].gt_classes.tolist()
    )

    expected = []
    pairs = (own, student, model.student), (theirs, teacher, model.teacher.model)
    for masks, outputs, network in pairs:
        maps = [outputs.features[name] for name in network.head_in_features]
        with torch.no_grad():
            logits = masks_of(network, network.head(maps), 0, matched)
        torch.testing.assert_close(masks.logits[: len(matched)], logits)
        expected.append(logits.double())
    s, t = expected
    p, q = t.sigmoid(), s.sigmoid()
    divergence = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
    assert losses[LOSS].item() == pytest.approx(divergence.mean().item(), rel=1e-4)


@for_each("objects", [(0, 0), (0, 1), (1, 0)])
def test_images_without_objects(objects: tuple[int, int]) -> None:
    model = distilled("rtmdet_ins", ["PointMaskKD"])
    with EventStorage():
        losses = model(batch(objects))
    loss = losses[LOSS]
    assert (loss > 0) == any(objects)
    loss.backward()
    assert model.student.head.prototypes.weight.grad.isfinite().all()
    reached = model.student.head.kernel_pred[0].weight.grad
    assert reached is not None and reached.isfinite().all()


def test_a_teacher_that_pads_further() -> None:
    """Its maps are cut to the student's cells, which the padding changes a little."""
    plain = kd_losses(distilled("rtmdet_ins", ["PointMaskKD"]), batch())
    model = distilled("rtmdet_ins", ["PointMaskKD"])
    asked = model.teacher.family.ask

    def padded(images: Tensor, *args: Any) -> Any:
        return asked(nn.functional.pad(images, (0, 64, 0, 32)), *args)

    model.teacher.family.ask = padded
    found = kd_losses(model, batch())
    assert found[LOSS].item() == pytest.approx(plain[LOSS].item(), rel=0.2)


def test_classes_that_the_teacher_lacks_do_not_count() -> None:
    classes = ("circle", "other", "another")
    model = distilled("rtmdet_ins", ["PointMaskKD"], teacher_classes=classes)
    known = [image_dict(0, 64, 64)]
    known[0]["instances"].gt_classes[:] = 0
    assert kd_losses(model, known)[LOSS] > 0
    known[0]["instances"].gt_classes[:] = 1
    assert kd_losses(model, known)[LOSS] == 0


def test_temperature() -> None:
    """A high one makes the divergence quadratic, so that T² keeps its size."""
    losses = [
        float(kd_losses(distilled("rtmdet_ins", ["PointMaskKD"], *opts), batch())[LOSS].detach())
        for opts in ((TEMPERATURE, 50.0), (TEMPERATURE, 100.0))
    ]
    assert losses[0] == pytest.approx(losses[1], rel=0.01)


@for_each(
    "student, teacher, reason",
    [
        ("rtmdet", "rtmdet_ins", "point_masks, which the student (RTMDet) does not produce"),
        ("rtmdet_ins", "mask", "point_masks, which the teacher (GeneralizedRCNN) does not"),
    ],
)
def test_what_has_no_such_masks_is_refused(student: str, teacher: str, reason: str) -> None:
    networks = {"student": student, "teacher": teacher}
    infos = [network_info(role, tiny_model(family)) for role, family in networks.items()]
    assert reason in (HEAD.problem(*infos) or "")


def test_other_strides_are_refused() -> None:
    info = network_info("student", tiny_model("rtmdet_ins"))
    levels = ("MODEL.RTMDETINS.IN_FEATURES", ["p3", "p4"])
    teacher = network_info("teacher", outspoken_model("rtmdet_ins", *levels))
    assert "strides differ" in (HEAD.problem(info, teacher) or "")
