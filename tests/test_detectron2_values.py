"""Values that are names in detectron2's code: those of the installed version are valid."""

from typing import Any

import pytest
from conftest import tiny_cfg

from distill.config import detectron2_values
from distill.config.detectron2_rules import check_values
from distill.config.detectron2_values import NAMES, Names, _named_in, channels
from distill.errors import ConfigError

OURS = ("WarmupFlatCosineLR", "WarmupPolyLR")


@pytest.mark.parametrize("key", NAMES)
def test_the_installed_detectron2_knows_what_messages_list(key: str) -> None:
    """A new name of a function there would leave only the lists."""
    listed, accepts = NAMES[key]
    assert [x for x in listed if not accepts(x) and x not in OURS] == []
    assert not accepts("nothing")


@pytest.mark.parametrize("key", NAMES)
def test_an_unknown_value_is_refused_with_the_nearest(key: str) -> None:
    first = NAMES[key].listed[0]
    with pytest.raises(ConfigError, match=f"{key}: unknown value '{first}x'.* {first}"):
        check_values(tiny_cfg("faster", key, f"{first}x"))


def newer_detectron2(name: str) -> Any:
    """A function of another version, which compares with more names."""
    if name in ("TrainingSampler", "NewTrainingSampler"):
        return name
    raise ValueError(f"Unknown training sampler: {name}")


def test_names_of_another_version(monkeypatch: pytest.MonkeyPatch) -> None:
    key = "DATALOADER.SAMPLER_TRAIN"
    names = Names(NAMES[key].listed, _named_in(newer_detectron2))
    monkeypatch.setitem(detectron2_values.NAMES, key, names)
    check_values(tiny_cfg("faster", key, "NewTrainingSampler"))
    with pytest.raises(ConfigError, match=r"SAMPLER_TRAIN: unknown value 'NewestSampler'"):
        check_values(tiny_cfg("faster", key, "NewestSampler"))


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
