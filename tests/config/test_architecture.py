"""The student's architecture: the plain one, or the one inside a ``Distill*`` one."""

from collections.abc import Iterator
from typing import Any

import pytest
from detectron2.modeling import META_ARCH_REGISTRY, GeneralizedRCNN
from torch import nn

from distill import DistillRCNN
from distill.config import (
    distill_architectures,
    student_architecture,
    student_config,
    validate_config,
)
from distill.errors import ConfigError
from tests.support.networks import tiny_cfg

SELF_TAUGHT = ("MODEL.DISTILL.HEADS", ("LGD",))


def named(architecture: str, student: str = "", *opts: Any) -> Any:
    names = ("MODEL.META_ARCHITECTURE", architecture, "MODEL.DISTILL.STUDENT_ARCHITECTURE", student)
    return tiny_cfg("faster", *names, *opts)


@pytest.fixture
def own_architectures() -> Iterator[None]:
    """A user's subclass of a network, one of a distilled model, a function, and strangers."""

    class OwnRCNN(GeneralizedRCNN):
        pass

    class OwnDistillation(DistillRCNN):
        student_architecture = "OwnRCNN"

    class DistillationOfAnotherPackage(nn.Module):
        pass

    def make_rcnn(cfg: Any) -> nn.Module:
        return GeneralizedRCNN(cfg)

    own = [OwnRCNN, OwnDistillation, DistillationOfAnotherPackage, make_rcnn]
    for x in own:
        META_ARCH_REGISTRY.register(x)
    yield
    for x in own:
        META_ARCH_REGISTRY._obj_map.pop(x.__name__)


@pytest.mark.parametrize(
    "architecture, student, expected",
    [
        ("DistillRCNN", "", "GeneralizedRCNN"),
        ("DistillRetinaNet", "", "RetinaNet"),
        ("DistillSemanticSegmentor", "", "SemanticSegmentor"),
        ("DistillRCNN", "PanopticFPN", "PanopticFPN"),
        ("DistillRetinaNet", "FCOS", "FCOS"),
        ("GFL", "", "GFL"),
        ("GFL", "RetinaNet", "GFL"),  # refused if it is distilled, see below
        ("OwnRCNN", "", "OwnRCNN"),
        ("OwnDistillation", "", "OwnRCNN"),
        ("DistillationOfAnotherPackage", "", "DistillationOfAnotherPackage"),
    ],
)
def test_the_student(
    architecture: str, student: str, expected: str, own_architectures: None
) -> None:
    cfg = named(architecture, student)
    assert student_architecture(cfg) == expected
    assert student_architecture(student_config(cfg)) == expected


def test_what_distils(own_architectures: None) -> None:
    shipped = {"DistillRCNN", "DistillRetinaNet", "DistillSemanticSegmentor"}
    assert set(distill_architectures()) == shipped | {"OwnDistillation"}


@pytest.mark.parametrize(
    "architecture, student",
    [
        ("GeneralizedRCNN", ""),
        ("GeneralizedRCNN", "GeneralizedRCNN"),
        ("OwnRCNN", ""),
        ("make_rcnn", ""),  # only the built network tells its class
        ("OwnDistillation", ""),
        ("OwnDistillation", "GeneralizedRCNN"),
        ("DistillRCNN", "OwnRCNN"),
    ],
)
def test_students_that_can_be_distilled(
    architecture: str, student: str, own_architectures: None
) -> None:
    validate_config(named(architecture, student, *SELF_TAUGHT), training=False)


@pytest.mark.parametrize(
    "architecture, student, words",
    [
        ("GeneralizedRCNN", "RetinaNet", "STUDENT_ARCHITECTURE is RetinaNet.*leave.*empty"),
        ("DistillRCNN", "RetinaNet", "DistillRCNN distils GeneralizedRCNN students, not RetinaNet"),
        ("DistillRetinaNet", "GeneralizedRCNN", "DenseDetector students, not GeneralizedRCNN"),
        ("DistillRCNN", "DistillRCNN", "STUDENT_ARCHITECTURE: unknown value 'DistillRCNN'"),
        ("ProposalNetwork", "", "ProposalNetwork cannot be distilled.*DenseDetector"),
        ("DistillationOfAnotherPackage", "", "OfAnotherPackage cannot be distilled"),
        ("GeneralRCNN", "", r"MODEL\.META_ARCHITECTURE.*mean GeneralizedRCNN"),
    ],
)
def test_students_that_cannot(
    architecture: str, student: str, words: str, own_architectures: None
) -> None:
    with pytest.raises(ConfigError, match=words) as e:
        validate_config(named(architecture, student, *SELF_TAUGHT), training=False)
    assert "\n" not in str(e.value)


def test_without_heads_nothing_is_asked_of_the_student(own_architectures: None) -> None:
    for architecture in ("ProposalNetwork", "DistillationOfAnotherPackage"):
        validate_config(named(architecture, "RetinaNet"), training=False)
    validate_config(named("DistillRCNN"), training=False)


@pytest.mark.parametrize("architecture", ["SemanticSegmentor", "DistillSemanticSegmentor"])
def test_rules_know_the_student_inside(architecture: str) -> None:
    opts = ("TEST.SLIDING_WINDOW.ENABLED", True, "MODEL.META_ARCHITECTURE", architecture)
    validate_config(tiny_cfg("semantic", *opts), training=False)
