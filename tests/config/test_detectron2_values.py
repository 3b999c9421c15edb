"""Values that are names in detectron2's code: those of the installed version are valid."""

from typing import Any

import pytest

from distill.config import detectron2_rules
from distill.config import detectron2_values as values
from distill.config.detectron2_values import NAME_RULES, channels, named_in, texts_in
from distill.config.validate import check_values
from distill.errors import ConfigError
from tests.support.networks import tiny_cfg

READERS = {
    "DATALOADER.SAMPLER_TRAIN": values._train_loader_from_config,
    "INPUT.CROP.TYPE": values.RandomCrop.__init__,
    "INPUT.MASK_FORMAT": values.annotations_to_instances,
    "INPUT.MIN_SIZE_TRAIN_SAMPLING": values.ResizeShortestEdge.__init__,
    "INPUT.RANDOM_FLIP": values.build_augmentation,
    "MODEL.RESNETS.STEM_TYPE": values.build_resnet_deeplab_backbone,
    "MODEL.RPN.BBOX_REG_LOSS_TYPE": values._dense_box_regression_loss,
    "SOLVER.LR_SCHEDULER_NAME": values.build_lr_scheduler,
    "SOLVER.WARMUP_METHOD": values.WarmupParamScheduler.__init__,
}
OURS = {"WarmupFlatCosineLR", "WarmupPolyLR", "quadratic"}


@pytest.mark.parametrize("key", READERS)
def test_the_installed_detectron2_has_the_names_of_the_messages(key: str) -> None:
    """Otherwise its code has moved, and values of another version would be refused."""
    assert {*NAME_RULES[key].names} - texts_in(READERS[key]) <= OURS


@pytest.mark.parametrize("key", NAME_RULES)
def test_an_unknown_value_is_refused_with_the_nearest(key: str) -> None:
    first = NAME_RULES[key].names[0]
    with pytest.raises(ConfigError, match=f"{key}: unknown value '{first}x'.* {first}"):
        check_values(tiny_cfg("faster", key, f"{first}x"))


def newer_detectron2(name: str) -> Any:
    """A function of another version, which compares with more names."""
    if name in ("TrainingSampler", "NewTrainingSampler"):
        return name
    raise ValueError(f"Unknown training sampler: {name}")


def test_names_of_another_version(monkeypatch: pytest.MonkeyPatch) -> None:
    key = "DATALOADER.SAMPLER_TRAIN"
    rule = named_in(newer_detectron2, *NAME_RULES[key].names)
    monkeypatch.setitem(detectron2_rules._RULES, key, rule)
    detectron2_rules._rules.cache_clear()
    check_values(tiny_cfg("faster", key, "NewTrainingSampler"))
    with pytest.raises(ConfigError, match=r"SAMPLER_TRAIN: unknown value 'NewestSampler'"):
        check_values(tiny_cfg("faster", key, "NewestSampler"))
    monkeypatch.undo()
    detectron2_rules._rules.cache_clear()


def test_formats_are_those_that_pillow_makes_of_an_image() -> None:
    expected = {"BGR": 3, "RGB": 3, "HSV": 3, "YUV-BT.601": 3, "L": 1, "CMYK": 4, "F": 0, "BRG": 0}
    assert {name: channels(name) for name in expected} == expected
    check_values(tiny_cfg("faster", "INPUT.FORMAT", "HSV"))
    with pytest.raises(ConfigError, match=r"one number per channel of INPUT.FORMAT CMYK"):
        check_values(tiny_cfg("faster", "INPUT.FORMAT", "CMYK"))


REPEATED = {
    "another set": ((("coco", 2.0),), "it may only have data sets of DATASETS.TRAIN"),
    "no number": ((("coco", "twice"),), r"it must be a list of \[data set, factor above 0\]"),
    "zero": ((("coco", 0.0),), r"it must be a list of \[data set, factor above 0\]"),
    "no pair": (("coco", 2.0), r"it must be a list of \[data set, factor above 0\]"),
}


@pytest.mark.parametrize("case", REPEATED)
def test_repeat_factors(case: str) -> None:
    factors, sentence = REPEATED[case]
    with pytest.raises(ConfigError, match=sentence):
        check_values(tiny_cfg("faster", "DATASETS.TRAIN_REPEAT_FACTOR", factors))
