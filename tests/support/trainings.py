"""Short trainings on rendered shapes, and what may interrupt them."""

from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.engine import HookBase
from detectron2.evaluation.testing import flatten_results_dict
from detectron2.utils.env import seed_all_rng

from distill.config import merge_from_list, student_config
from distill.data.loader import TrainLoader
from distill.data.registration import register_own_sets
from distill.engine import Trainer
from distill.engine.evaluators import metric_names
from distill.launch.main import main
from tests.support.networks import (
    DENSE,
    YOLO,
    distill_opts,
    image_dict,
    outspoken_model,
    tiny_cfg,
    write_config,
)

Shapes = tuple[str, str, str]
"""A data set as ``DATASETS.COCO_FORMAT`` has it: its name, its annotations, its folder."""

Shared = Callable[[str, Callable[[Path], object]], Path]
"""Fixture that returns the folder of a name, filled once by a function of its path."""


def semantic_images(patch: pytest.MonkeyPatch) -> None:
    """Images with semantic labels, which the shapes in COCO format lack."""

    def image_dicts(self: TrainLoader) -> Iterator[list[dict[str, Any]]]:
        for k in count(self.batches.start):
            batch = [image_dict(2 * k + i, 64, 80, semantic=True) for i in range(2)]
            yield [{**x, "file_name": f"{k}-{i}.jpg"} for i, x in enumerate(batch)]

    patch.setattr(TrainLoader, "__iter__", image_dicts)
    patch.setattr("distill.engine.trainer.check_labels", lambda cfg, dicts: None)


_TEACHER_FILES = "teacher.yaml", "teacher.pth"
_TEACHERS: dict[str, dict[str, bytes]] = {}  # contents of the files, by teacher


def write_teacher(folder: Path, family: str, *opts: Any, **kw: Any) -> list[Any]:
    """Write a teacher's yaml and checkpoint; returns the overrides that name them."""
    folder.mkdir(parents=True, exist_ok=True)
    key = repr((family, opts, sorted(kw.items())))
    if key not in _TEACHERS:
        cfg = tiny_cfg(family, *opts, **kw)
        write_config(student_config(cfg), folder / "teacher.yaml")
        model = outspoken_model(family, *opts, seed=1, **kw)
        torch.save({"model": model.state_dict()}, folder / "teacher.pth")
        _TEACHERS[key] = {name: (folder / name).read_bytes() for name in _TEACHER_FILES}
    for name, content in _TEACHERS[key].items():
        (folder / name).write_bytes(content)
    return [
        *("MODEL.DISTILL.TEACHER.CONFIG_FILE", str(folder / "teacher.yaml")),
        *("MODEL.DISTILL.TEACHER.WEIGHTS", str(folder / "teacher.pth")),
    ]


def trainable_cfg(family: str, shapes: Shapes, output: Path, *opts: Any, **kw: Any) -> CfgNode:
    """:func:`tiny_cfg` with the data of :func:`shapes`, registered, and a short schedule."""
    cfg = tiny_cfg(family, **kw)
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 8
    for name in ("RetinaNet", *DENSE.values(), *YOLO.values()):
        cfg.MODEL[name.upper()].NUM_CLASSES = 8
    cfg.DATASETS.COCO_FORMAT = (shapes,)
    cfg.DATASETS.TRAIN = (shapes[0],)
    cfg.INPUT.MIN_SIZE_TRAIN = (64, 80)
    cfg.INPUT.MIN_SIZE_TEST = 64
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.SOLVER.IMS_PER_BATCH = 2
    cfg.SOLVER.BASE_LR = 0.01
    cfg.SOLVER.WARMUP_ITERS = 0
    cfg.REPORT.ENABLED = False  # it has its own tests
    cfg.OUTPUT_DIR = str(output)
    merge_from_list(cfg, list(opts))
    register_own_sets(cfg)
    return cfg


def distillation_file(folder: Path, shapes: Shapes, *opts: Any) -> str:
    """Write a config that distills a tiny Faster R-CNN in three iterations; return its path."""
    eight = ("MODEL.ROI_HEADS.NUM_CLASSES", 8)
    teacher = write_teacher(folder, "faster", *eight, fpn=24)
    short = ("SOLVER.MAX_ITER", 3, "SOLVER.CHECKPOINT_PERIOD", 2, "DATASETS.TEST", (shapes[0],))
    opts = (*distill_opts("faster", ["FitNet"]), *teacher, *short, *opts)
    cfg = trainable_cfg("faster", shapes, folder / "unused", *opts, norm="BN")
    return str(write_config(cfg, folder / "config.yaml"))


class Interrupted(Exception):
    pass


class Interruption(HookBase):
    """Ends the run before an iteration, as a crash would."""

    def __init__(self, iteration: int):
        self.iteration = iteration

    def before_step(self) -> None:
        if self.trainer.iter == self.iteration:
            raise Interrupted


def differences(a: Any, b: Any, where: str = "") -> list[str]:
    """Paths at which two checkpoints differ in a bit."""
    if isinstance(a, torch.Tensor):
        return [] if torch.equal(a, b) else [where]
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        return [x for k in a for x in differences(a[k], b[k], f"{where}.{k}")]
    if isinstance(a, list | tuple):
        assert len(a) == len(b), where
        return [x for k in range(len(a)) for x in differences(a[k], b[k], f"{where}.{k}")]
    return [] if a == b else [where]


def assert_declared(cfg: CfgNode, results: dict[str, Any]) -> None:
    """The metrics of an evaluation are declared; the classes may be fewer than declared."""
    found = {name for name in flatten_results_dict(results) if "_TTA/" not in name}
    declared = {*(metric_names(cfg) or ())}
    assert found <= declared
    assert [name for name in declared - found if "-" not in name] == []


class Run:
    """A distillation that would train, to be spoilt by overrides or by files.

    Args:
        folder: place of the config, the teacher and the output.
        shapes: ``DATASETS.COCO_FORMAT`` triple.
        capsys: captures what the user sees.
    """

    def __init__(self, folder: Path, shapes: Shapes, capsys: pytest.CaptureFixture[str]):
        self.folder, self.capsys = folder, capsys
        self.output = folder / "output"
        self.teacher = folder / "teacher.pth"
        self.config = folder / "config.yaml"
        opts = [*distill_opts("faster", ["IMA", "ROIKD"]), *self.write_teacher()]
        opts += ["SOLVER.MAX_ITER", 1]
        write_config(trainable_cfg("faster", shapes, self.output, *opts), self.config)

    def write_teacher(self, family: str = "faster", *opts: Any, **kw: Any) -> list[Any]:
        classes = ("MODEL.ROI_HEADS.NUM_CLASSES", 8, "MODEL.RETINANET.NUM_CLASSES", 8)
        return write_teacher(self.folder, family, *classes, *opts, **kw)

    def __call__(self, *opts: str) -> int:
        return main(["--config-file", str(self.config), *opts])

    def fails(self, *opts: str) -> str:
        """The one line on stderr."""
        assert self(*opts) == 2
        (line,) = self.capsys.readouterr().err.splitlines()
        assert line.startswith("error: ")
        assert not list(self.folder.rglob("model_*.pth"))
        return line


def train(cfg: CfgNode, *hooks: HookBase, resume: bool = False, seed: int = 3) -> dict[str, Any]:
    """Train, with its own seed of the global random state, as a resumed process has."""
    seed_all_rng(seed)
    trainer = Trainer(cfg, hooks)
    trainer.resume_or_load(resume=resume)
    trainer.train()
    return torch.load(Path(cfg.OUTPUT_DIR) / "model_final.pth", weights_only=True)
