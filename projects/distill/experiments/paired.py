"""Trainings in pairs: the student alone and distilled, from the same start on the same images.

The commands that compare such trainings share their options, configs, teacher and metric.
"""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.modeling import SemanticSegmentor
from detectron2.utils.env import seed_all_rng

from ..config import (
    balance_mode,
    building,
    get_distill_cfg,
    load_config,
    merge_from_list,
    one_per_teacher,
    student_architecture,
    student_class,
    teacher_config,
    validate_config,
)
from ..data.registration import FORMATS
from ..engine import setup_config
from ..engine.evaluators import check_test_sets
from ..errors import ConfigError, of_teacher
from ..families import build_family
from ..heads import DISTILL_HEAD_REGISTRY, teacher_needed, unfinished_phases
from ..launch.termination import RERUN, RESUME, user_error
from ..modeling.distillation import Infos, build_all_heads, network_infos
from ..modeling.meta_arch import build_student
from ..modeling.teacher import build_teacher
from ..report.runs import MAIN_METRICS
from ..section import check_choice
from ..utils.arguments import add_config_arguments
from ..utils.io import replacing
from ..utils.progress import Progress
from ..utils.provenance import command, commit, versions
from ..utils.text import choices, one_line
from .compare_report import Row
from .runner import COST, Result, Runner, Stage
from .shapes import Shapes
from .summary import replicates


class NetworkPair:
    """A student and its teachers, to see which heads can compare them.

    Args:
        cfg: config of a distillation.
        taught: build the teachers, too.
        trained: load the teachers' weights, so that an unreadable file fails now.
    """

    def __init__(self, cfg: CfgNode, *, taught: bool, trained: bool):
        cfg = thawed(cfg)
        cfg.MODEL.DEVICE = "cpu"  # nothing is computed
        student = build_family(build_student(cfg))
        self.infos: Infos = {}
        for one in one_per_teacher(cfg):
            named = taught and bool(one.cfg.MODEL.DISTILL.TEACHER.CONFIG_FILE)
            with of_teacher(one.name):
                teacher = build_teacher(one.cfg, trained=trained) if named else None
                self.infos[one.name] = network_infos(one.cfg, student, teacher)

    def extra_parameters(self, cfg: CfgNode) -> int:
        """Number of parameters of the heads that ``cfg`` names.

        Raises:
            ConfigError: one of them does not work for this pair, or a value is invalid.
        """
        student, _ = next(iter(self.infos.values()))
        infos: Infos = {}
        for one in one_per_teacher(cfg):
            _, teacher = self.infos.get(one.name, (student, None))
            infos[one.name] = student, teacher if teacher_needed(one.cfg) else None
            for name in one.cfg.MODEL.DISTILL.HEADS if one.chosen else ():
                problem = DISTILL_HEAD_REGISTRY.get(name).problem(*infos[one.name])
                if problem:
                    which = f"{name}: " if len(cfg.MODEL.DISTILL.HEADS) > 1 else ""
                    raise ConfigError(f"{which}{problem}.")
        validate_config(cfg)
        with building(f"method {'+'.join(cfg.MODEL.DISTILL.HEADS)}"):
            heads = build_all_heads(cfg, infos)
        return sum(p.numel() for p in heads.parameters())


# ---- Configs.


def thawed(cfg: CfgNode) -> CfgNode:
    """Return a copy that can be changed."""
    cfg = cfg.clone()
    cfg.defrost()
    return cfg


def configure(config_file: str, opts: list[Any]) -> CfgNode:
    """Return the config that all runs share, with the settings of a comparison.

    Raises:
        DistillError: the config cannot be distilled or not evaluated.
    """
    cfg = thawed(setup_config(config_file, opts))
    inherited = tuple(cfg.MODEL.DISTILL.INHERIT)
    if not cfg.MODEL.DISTILL.HEADS:
        raise ConfigError(
            "MODEL.DISTILL.HEADS is empty, so the config trains without distillation; name a "
            "config with a teacher and a head."
        )
    if inherited:
        raise ConfigError(
            f"MODEL.DISTILL.INHERIT is {inherited}, so the baseline would start from other "
            "weights; set it to () for a comparison."
        )
    if not cfg.DATASETS.TEST:
        raise ConfigError("DATASETS.TEST is empty; name the data set on which to compare.")
    check_test_sets(cfg)
    cfg.SOLVER.KEEP_CHECKPOINTS = 1  # there are many runs
    cfg.MODEL.DISTILL.COSINE_PERIOD = 0  # the log's cosines are no cost of a method
    return cfg


def student_alone(cfg: CfgNode) -> CfgNode:
    """Return ``cfg`` without its distillation."""
    plain = thawed(cfg)
    plain.MODEL.META_ARCHITECTURE = student_architecture(cfg)
    plain.MODEL.DISTILL = get_distill_cfg().MODEL.DISTILL
    plain.DATASETS.UNLABELED = ()  # only a teacher says what is in these images
    return plain


def method_config(cfg: CfgNode, name: str, opts: list[Any]) -> CfgNode:
    """Return ``cfg`` with the heads of one method, without sections that they do not read.

    Args:
        name: a head, or several joined by "+".
        opts: KEY VALUE overrides of this method.
    """
    cfg = thawed(cfg)
    merge_from_list(cfg, opts, f"--set {name}")
    node, default = cfg.MODEL.DISTILL, get_distill_cfg().MODEL.DISTILL
    node.HEADS = tuple(name.split("+"))
    for head, _ in DISTILL_HEAD_REGISTRY:
        if head not in node.HEADS and head.upper() in node:
            node[head.upper()] = default[head.upper()]
    if not teacher_needed(cfg):
        node.TEACHER, node.TEACHERS = default.TEACHER, default.TEACHERS
    return cfg


def remarks(cfg: CfgNode) -> list[str]:
    """Return what a reader of a method's row should know about its config."""
    constant = ["Its weights are constants."] if balance_mode(cfg) == "none" else []
    return unfinished_phases(cfg) + constant


def teachers_own_config(cfg: CfgNode) -> CfgNode:
    """Return the config that trains the teacher of ``cfg``, without a distillation of its own."""
    teacher = student_alone(teacher_config(cfg, trained=False))
    teacher.MODEL.DEVICE = cfg.MODEL.DEVICE
    teacher.SOLVER.KEEP_CHECKPOINTS = 1
    try:
        validate_config(teacher)
    except ConfigError as e:
        raise ConfigError(f"The teacher's config: {e}") from e
    return teacher


def random_teacher(path: Path, cfg: CfgNode, seed: int) -> None:
    """Write a checkpoint of the untrained teacher of ``cfg``, unless there is one."""
    if path.is_file():
        return
    seed_all_rng(seed)
    model = build_teacher(cfg, trained=False).model
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as f:
        torch.save({"model": model.state_dict()}, f)


# ---- Runs.


class PairedTrainings:
    """Base of a command that trains students in pairs of the same seed.

    Args:
        args: see :func:`add_paired_arguments`, and ``seeds``.
        first: number of earlier seeds to leave out.

    Attributes:
        cfg: config of the distillation, see :func:`configure`.
        seeds: seeds of the pairs.

    Raises:
        DistillError: nothing can be compared.
    """

    def __init__(self, args: argparse.Namespace, first: int = 0):
        self.args = args
        self.out: Path = args.out.resolve()
        os.makedirs(self.out, exist_ok=True)
        self.runner = Runner(self.out, Progress())
        self.data_seed, seeds = replicates(args.tune, first + args.seeds)
        self.seeds, self.teacher_seed = seeds[first:], seeds[0]
        if args.train_teacher or args.shapes:
            check_one_teacher(args)
        data = self._render() if args.shapes else []
        self.cfg = configure(args.config_file, [*args.opts, *data, "OUTPUT_DIR", str(self.out)])

    def _render(self) -> list[Any]:
        """Render images in the layout that the student needs; return their KEY VALUE overrides."""
        cfg = load_config(self.args.config_file, self.args.opts)
        semantic = issubclass(student_class(cfg), SemanticSegmentor)
        shapes = Shapes(self.out, self.data_seed, "cityscapes" if semantic else "coco")
        with Progress() as progress:
            shapes.render(progress)
        return shapes.opts()

    def own_teacher(self, methods: Sequence[str]) -> Stage | None:
        """Return the run that trains the teacher on the student's data.

        None: the arguments do not ask for it, or no method needs a teacher.
        """
        heads = {head for name in methods for head in name.split("+")}
        asked = self.args.train_teacher or self.args.shapes
        if not asked or not any(DISTILL_HEAD_REGISTRY.get(x).needs_teacher for x in heads):
            return None
        node = self.cfg.MODEL.DISTILL.TEACHER
        keys = ("TRAIN", "TEST", *FORMATS)
        sets = [(f"DATASETS.{k}", self.cfg.DATASETS[k]) for k in keys]
        node.WEIGHTS, node.OPTS = "", [*node.OPTS, *(x for pair in sets for x in pair)]
        stage = self.runner.describe("teacher", self.teacher_seed, teachers_own_config(self.cfg))
        node.WEIGHTS = str(stage.weights)
        return stage

    def run_stage(self, stage: Stage) -> Result:
        with Progress() as progress:  # one for all runs would outgrow the screen
            self.runner.progress = progress
            return self.runner.run(stage)

    def attempt(self, row: Row, stage: Stage) -> Result | None:
        """Run a stage, and keep its results or the reason of its failure in its row."""
        try:
            result = self.run_stage(stage)
        except Exception as e:
            row.failures[stage.seed] = reason(e, stage.folder / "log.txt")
            print(f"{stage.title} failed: {row.failures[stage.seed]}")
            return None
        row.results[stage.seed] = result
        return result

    def facts(self) -> dict[str, Any]:
        """Return what a reader needs to repeat the runs, for JSON."""
        cuda = self.cfg.MODEL.DEVICE.startswith("cuda")
        return {
            "data_seed": self.data_seed if self.args.shapes else None,
            "command": command(),
            "device": torch.cuda.get_device_name() if cuda else "cpu",
            "threads": torch.get_num_threads(),
            "commit": commit(),
            "versions": versions(),
        }


def check_one_teacher(args: argparse.Namespace) -> None:
    """Refuse to train a teacher where the config names several, before images are rendered.

    Raises:
        ConfigError: it does.
    """
    if load_config(args.config_file, args.opts).MODEL.DISTILL.TEACHERS:
        option = "--train-teacher" if args.train_teacher else "--shapes"
        raise ConfigError(
            f"{option} trains one teacher, but MODEL.DISTILL.TEACHERS names several; train each by "
            "its own config, and leave the option out."
        )


def chosen_metric(asked: str | None, result: Result) -> str:
    """Return the full name of the metric to compare.

    Args:
        asked: the name of ``--metric``, or None for that of the task on the first test set.

    Raises:
        ConfigError: the evaluation has no such metric.
    """
    names = [name for name in result if name not in COST]
    if asked is not None:
        check_choice("--metric", asked, names)
        return asked
    for metric in MAIN_METRICS:
        for name in names:
            if f"/{name}".endswith(f"/{metric}"):
                return name
    raise ConfigError(f"Name what to compare with --metric; there are: {choices('', names)}.")


def reason(error: Exception, log: Path) -> str:
    """Return one sentence that says why a run failed."""
    found = user_error(error)
    if found:
        return one_line(found).replace(RESUME, RERUN)
    return f"{type(error).__name__}: {one_line(error):.200}; the traceback is in {log}."


def add_paired_arguments(parser: argparse.ArgumentParser, out: str) -> None:
    """Add the options of every command that trains in pairs, except ``--seeds``."""
    add_config_arguments(parser)
    parser.add_argument("--metric", help="such as bbox/AP50; default: that of the task")
    parser.add_argument(
        "--train-teacher",
        action="store_true",
        help="first train MODEL.DISTILL.TEACHER.CONFIG_FILE on the student's data",
    )
    parser.add_argument(
        "--shapes", action="store_true", help="on rendered images, with a teacher trained on them"
    )
    parser.add_argument("--tune", action="store_true", help="other seeds and scenes than reported")
    parser.add_argument("--out", type=Path, default=Path(out), help="default: %(default)s")
