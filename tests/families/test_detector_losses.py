"""A detector's own losses on other maps leave the detector as it was."""

import copy

import pytest
import torch
from detectron2.utils.events import EventStorage
from torch import nn

from distill.families import build_family
from distill.families.detector_losses import DetectorLosses, detection_losses, no_side_effects
from tests.support.networks import DENSE, YOLO, image_dict, outspoken_model, tiny_model

CPU = torch.device("cpu")
DETECTORS = ("faster", "mask", "cascade", "panoptic", "retinanet", *DENSE, *YOLO)


def batch():
    return [image_dict(0, 64, 80, semantic=True), image_dict(1, 96, 64, semantic=True)]


@pytest.mark.parametrize("family", DETECTORS)
def test_detection_losses_on_the_students_own_maps_are_its_own(family):
    student = outspoken_model(family)
    twin = copy.deepcopy(student)
    reader = build_family(student)
    with EventStorage(), reader.record({"features"}) as calls:
        torch.manual_seed(0)
        expected = student(batch())
    outputs = reader.read(calls, reader.batch(calls, batch()), {"features"})
    torch.manual_seed(0)
    with EventStorage():
        found = detection_losses(twin, outputs.features, outputs.batch)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[k], expected[k]) for k in expected)


def test_the_second_run_normalizes_by_its_own_batch():
    """Not by running statistics, which are the student's."""
    norm = nn.Sequential(nn.BatchNorm2d(2)).train()
    x = torch.randn(4, 2, 3, 3, generator=torch.Generator().manual_seed(0)) * 5 + 2
    with no_side_effects(norm, CPU):
        found = norm(x)
    assert not norm[0].running_mean.any() and norm[0].num_batches_tracked == 0
    assert torch.equal(found, norm(x)) and norm[0].running_mean.all()


def test_an_error_in_the_second_run_leaves_no_trace_either():
    student = tiny_model("retinanet", "MODEL.RETINANET.NORM", "BN")
    before = torch.get_rng_state()
    student.loss_normalizer = 7.0
    with (
        pytest.raises(FloatingPointError),
        EventStorage(5) as events,
        no_side_effects(student, CPU),
    ):
        student.loss_normalizer = 9.0
        torch.rand(3)
        raise FloatingPointError
    assert torch.equal(before, torch.get_rng_state()) and not events.latest()
    norms = [x for x in student.modules() if isinstance(x, nn.BatchNorm2d)]
    assert norms and all(x.track_running_stats for x in norms) and student.loss_normalizer == 7.0


@pytest.mark.parametrize("family", ["faster", "retinanet"])
def test_the_callable_is_the_losses_without_a_trace(family):
    student = outspoken_model(family)
    reader = build_family(student)
    with EventStorage(), reader.record({"features"}) as calls:
        student(batch())
    outputs = reader.read(calls, reader.batch(calls, batch()), {"features"})
    before, normalizer = torch.get_rng_state(), getattr(student, "loss_normalizer", None)
    with EventStorage() as events:
        found = DetectorLosses(student)(outputs.features, outputs.batch)
        expected = DetectorLosses(student)(outputs.features, outputs.batch)
    assert not events.latest() and torch.equal(before, torch.get_rng_state())
    assert getattr(student, "loss_normalizer", None) == normalizer
    assert found and all(torch.equal(found[k], expected[k]) for k in expected)


@pytest.mark.parametrize("family", DETECTORS)
def test_the_levels_are_those_that_the_heads_read(family):
    expected = ("p3", "p4", "p5") if family in YOLO else ("p2", "p3", "p4", "p5", "p6")
    assert DetectorLosses(tiny_model(family)).levels == expected


def test_a_copy_of_a_model_copies_its_detector():
    student = tiny_model("retinanet")
    losses, twin = copy.deepcopy((DetectorLosses(student), student))
    assert losses.detector is twin is not student
