"""Architectures are judged by their class: a user's own one is like the one that it extends."""

import pytest
from detectron2.modeling import META_ARCH_REGISTRY, GeneralizedRCNN, SemanticSegmentor

from distill.config import student_class, validate_config
from distill.data.cityscapes import SemanticMapper
from distill.data.datasets import check_labels, number_of_classes
from distill.engine.trainer import train_mapper
from distill.errors import DataError
from distill.nets import GFL
from tests.support.networks import tiny_cfg


class MyRCNN(GeneralizedRCNN):
    pass


class MyGFL(GFL):
    pass


class MySegmentor(SemanticSegmentor):
    pass


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    own = {cls.__name__: cls for cls in (MyRCNN, MyGFL, MySegmentor)}
    own["my_function"] = lambda cfg: MyRCNN(cfg)  # type: ignore[assignment]
    monkeypatch.setattr(META_ARCH_REGISTRY, "_obj_map", {**META_ARCH_REGISTRY._obj_map, **own})


OWN = {
    "MyRCNN": ("faster", MyRCNN, ("MODEL.ROI_HEADS.NUM_CLASSES", 3)),
    "MyGFL": ("gfl", MyGFL, ("MODEL.GFL.NUM_CLASSES", 3)),
    "MySegmentor": ("semantic", MySegmentor, ("", None)),
    "my_function": ("faster", object, ("", None)),
}


@pytest.mark.parametrize("name", OWN)
def test_own_architectures(name: str) -> None:
    family, cls, classes = OWN[name]
    cfg = tiny_cfg(family, "MODEL.META_ARCHITECTURE", name)
    assert student_class(cfg) is cls
    assert number_of_classes(cfg) == classes
    assert isinstance(train_mapper(cfg), SemanticMapper) == (name == "MySegmentor")
    if name == "my_function":
        check_labels(cfg, [{}])
    else:
        with pytest.raises(DataError, match=f"on which {name} trains"):
            check_labels(cfg, [{}])


@pytest.mark.parametrize(
    "name, key", [("MyRCNN", "TEST.AUG.ENABLED"), ("MySegmentor", "TEST.SLIDING_WINDOW.ENABLED")]
)
def test_they_are_evaluated_as_their_base_is(name: str, key: str) -> None:
    family = OWN[name][0]
    validate_config(tiny_cfg(family, "MODEL.META_ARCHITECTURE", name, key, True), training=False)
