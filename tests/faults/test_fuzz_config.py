"""Test config values of any kind in options and yaml: they train or end with one sentence."""

import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from detectron2.modeling import (
    ANCHOR_GENERATOR_REGISTRY,
    BACKBONE_REGISTRY,
    META_ARCH_REGISTRY,
    PROPOSAL_GENERATOR_REGISTRY,
    ROI_BOX_HEAD_REGISTRY,
    ROI_HEADS_REGISTRY,
    ROI_MASK_HEAD_REGISTRY,
    RPN_HEAD_REGISTRY,
)
from hypothesis import given
from hypothesis import strategies as st

from distill.config import get_distill_cfg
from distill.config.defaults import declared_keys
from distill.config.detectron2_rules import _RULES, leaves
from distill.data.shapes import SceneConfig, write_coco
from distill.engine import Trainer, setup_config
from distill.heads import DISTILL_HEAD_REGISTRY
from tests.support.networks import DENSE, PAFPN, distill_opts
from tests.support.trainings import trainable_cfg, write_teacher

from .fuzzing import TEXT, VALUES, command_works, encoded, fuzz, garbled, like, spoilt, works

SET = "shapes_fuzzed"
# Trainings that work: family of both networks, heads, and keys whose values are changed.
SETUPS: dict[str, tuple[str, tuple[str, ...], str]] = {
    "rcnn": ("faster", ("IMA", "ROIKD"), "RPN|ROI_HEADS|BOX_HEAD|IMA|ROIKD"),
    "retinanet": ("retinanet", ("TID", "DenseKD"), "RETINANET|TID|DENSEKD"),
    "fcos": ("fcos", ("IMA",), "FCOS|EMA"),
    "atss": ("atss", ("TID",), "ATSS|INHERIT"),
    "gfl": ("gfl", ("DenseKD",), "GFL"),
    "reppoints": ("reppoints", ("IMA",), "REPPOINTS"),
    "features": ("faster", ("FitNet", "MKD", "TID"), "FITNET|MKD|TID|RPN"),
    "masks": ("mask", ("MaskLogitKD",), "MASK"),
    "cascade": ("cascade", ("FitNet",), "CASCADE"),
    "pafpn": ("faster", ("MSSD",), "MSSD|FPN"),
}
_REGISTRIES = (
    *(ANCHOR_GENERATOR_REGISTRY, BACKBONE_REGISTRY, DISTILL_HEAD_REGISTRY, META_ARCH_REGISTRY),
    *(PROPOSAL_GENERATOR_REGISTRY, ROI_BOX_HEAD_REGISTRY, ROI_HEADS_REGISTRY),
    *(ROI_MASK_HEAD_REGISTRY, RPN_HEAD_REGISTRY),
)
NAMES = sorted(
    {name for registry in _REGISTRIES for name, _ in registry}
    | {name for rule in _RULES.values() for name in rule.names}
    | {name for key in declared_keys().values() for name in key.rule.names}
    | {"BN", "SyncBN", "naiveSyncBN", "GN", "LN", "FrozenBN", "avg", "cpu", "cuda", "cuda:7", SET}
    | {
        "bbox/AP",
        "ROIPool",
        "ROIAlign",
        "ROIAlignRotated",
        "stem",
        "res2",
        "res5",
        "p2",
        "p3",
        "p6",
    }
)
TEXTS = st.sampled_from(NAMES) | TEXT
# Keys whose large values are legal but need hours or all memory, and keys of output files.
SMALL = st.sampled_from([-(2**63), -1, 0, 1, 2, 3, 8])
BOUNDED: dict[str, st.SearchStrategy[Any]] = {
    "IMS_PER_BATCH|MAX_ITER|NUM_WORKERS|NUM_ITER|INPUT.MAX_SIZE|AUG.MAX_SIZE|DEPTH": SMALL,
    "CHANNELS|_DIM$|NUM_CONVS?$|NUM_FC|NUM_GROUPS|WIDTH_PER_GROUP|STRIDE$": SMALL,
    "CANDIDATES|POINTS_PER_OBJECT|REG_MAX|RESOLUTION|SAMPLING_RATIO": SMALL,
    "NUM_CLASSES|NUM_KEYPOINTS": SMALL,
    "CONV_DIMS": st.lists(SMALL, max_size=3),
    "OUTPUT_DIR": st.sampled_from(["", "é" * 300, "a\0b", "/dev/null/x", "case.yaml", "new/er"]),
}


def nested(values: dict[str, Any]) -> dict[str, Any]:
    """Convert dotted keys to nested sections, as in yaml."""
    sections: dict[str, Any] = {}
    for key, value in values.items():
        *path, name = key.split(".")
        section = sections
        for part in path:
            section = section.setdefault(part, {})
        section[name] = without_tuples(value)
    return sections


def without_tuples(value: Any) -> Any:
    return [without_tuples(x) for x in value] if isinstance(value, list | tuple) else value


class Ground:
    """Trainings of :data:`SETUPS`, whose values are changed.

    Args:
        folder: folder for their images, teachers and configs.
    """

    def __init__(self, folder: Path):
        write_coco(folder, "train", 2, config=SceneConfig(height=64, width=64, min_size=0.25))
        annotations = folder / "annotations" / "instances_train.json"
        self.shapes = (SET, str(annotations), str(folder / "images" / "train"))
        self.folder = folder
        self.values = {name: self._write(name) for name in SETUPS}

    def _write(self, name: str) -> dict[str, Any]:
        """Write values that differ from the defaults to a yaml, and return all values by key."""
        family, heads, _ = SETUPS[name]
        sections = ("ROI_HEADS", "RETINANET", *map(str.upper, DENSE.values()))
        classes = [x for name in sections for x in (f"MODEL.{name}.NUM_CLASSES", 8)]
        opts = [
            *write_teacher(self.folder / family, family, *classes),
            *distill_opts(family, heads),
            *(PAFPN if name == "pafpn" else ()),
            *("INPUT.MAX_SIZE_TRAIN", 96, "INPUT.MAX_SIZE_TEST", 96, "TEST.AUG.MAX_SIZE", 96),
            *("DATASETS.TEST", (SET,), "SOLVER.MAX_ITER", 1),
        ]
        cfg = trainable_cfg(family, self.shapes, self.folder / "output", *opts)
        values, defaults = dict(leaves(cfg)), dict(leaves(get_distill_cfg()))
        changed = {key: value for key, value in values.items() if value != defaults[key]}
        (self.folder / f"{name}.yaml").write_text(yaml.safe_dump(nested(changed)))
        return values

    def path(self, name: str, values: dict[str, Any] | None = None) -> str:
        """Return the config file of a setup, or write one that is based on it."""
        if values is None:
            return str(self.folder / f"{name}.yaml")
        content = {"_BASE_": f"{name}.yaml", **nested(values)}
        file = self.folder / "case.yaml"
        file.write_text(yaml.safe_dump(content, allow_unicode=True), encoding="utf-8")
        return str(file)


def train(config: str, opts: list[str]) -> None:
    trainer = Trainer(setup_config(config, opts))
    trainer.resume_or_load(resume=False)
    trainer.train()


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Ground:
    return Ground(tmp_path_factory.mktemp("ground"))


class Case(NamedTuple):
    setup: str
    values: dict[str, Any]
    in_yaml: bool  # False: on the command line


@st.composite
def cases(draw: st.DrawFn, keys: str = "") -> Case:
    """Draw one or two keys with extreme values of the right type, or values of any type."""
    defaults = dict(leaves(get_distill_cfg()))
    key = draw(st.sampled_from([key for key in defaults if keys in key]))
    fitting = [name for name, (*_, part) in SETUPS.items() if re.search(part, key)]
    others = draw(
        st.just([]) | st.just([]) | st.lists(st.sampled_from(sorted(defaults)), max_size=1)
    )
    values = {k: draw(value_of(k, defaults[k])) for k in [key, *others]}
    setup = draw(st.sampled_from(fitting or ["rcnn", "retinanet"]))
    return Case(setup, values, draw(st.booleans()))


def value_of(key: str, default: Any) -> st.SearchStrategy[Any]:
    for pattern, values in BOUNDED.items():
        if re.search(pattern, key):
            wrong = VALUES.filter(lambda x: not isinstance(x, int | str))
            return values | values | wrong
    right = like(default, TEXTS)
    return right | right | right | VALUES


def given_as(case: Case, ground: Ground) -> tuple[str, list[str]]:
    """Return the arguments for the config file and the overrides."""
    if case.in_yaml:
        return ground.path(case.setup, case.values), []
    return ground.path(case.setup), [str(x) for pair in case.values.items() for x in pair]


@pytest.fixture(autouse=True)
def _elsewhere(ground: Ground, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ground.folder)


def test_the_setups_train(ground: Ground) -> None:
    for name in SETUPS:
        assert works("config", lambda name=name: train(ground.path(name), [])), name


@fuzz(800)
@given(case=cases())
def test_values(case: Case, ground: Ground) -> None:
    works("config", lambda: train(*given_as(case, ground)))


@fuzz(60)
@given(case=cases())
def test_values_on_the_command_line(case: Case, ground: Ground) -> None:
    config, opts = given_as(case, ground)
    command_works("config", ["--config-file", config, *opts])


@st.composite
def files(draw: st.DrawFn) -> bytes:
    """Draw a config that is based on one of :data:`SETUPS`, with wrong values or bytes."""
    setup = draw(st.sampled_from(sorted(SETUPS)))
    values = {"_BASE_": f"{setup}.yaml", **nested(dict(draw(st.lists(LEAVES, max_size=3))))}
    content = draw(st.just(values) | spoilt(values))
    text = yaml.safe_dump(content, allow_unicode=True)
    whole = draw(st.just(text.encode()) | encoded(text))
    return draw(st.just(whole) | garbled(whole) | st.binary(max_size=20))


LEAVES = st.sampled_from(list(leaves(get_distill_cfg())))


@fuzz(200)
@given(content=files())
def test_files(content: bytes, ground: Ground) -> None:
    """The networks are only built: a training with large legal numbers would be too long."""
    file = ground.folder / "case.yaml"
    file.write_bytes(content)
    works("config", lambda: Trainer(setup_config(str(file))))
