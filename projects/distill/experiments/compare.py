"""Distill one student by many methods, from the same start on the same images, and compare them.

    distill compare --config-file F --heads FitNet FGD MGD FGD+DKD --seeds 3 [KEY VALUE ...]

Every seed trains the student without distillation and with each method. They start from the same
weights and see the same images in the same order, so differences are paired. Each has its 95 %
interval and a verdict, which is corrected for the number of methods. --decide 5 trains methods that
seem worse than the student alone with five fresh seeds, which then decide about them.

Without --heads, every registered head that works for the config's student and teacher takes part.
The config's sections hold the values of the heads; --set changes one for one method.

The result is a table, raw values and a figure in --out. Finished runs are reused, an interrupted
one continues from its checkpoint, and a method that fails is a row with its reason.

Exit code: 0; 1 if a method failed; 2 after one sentence if nothing can be compared.
"""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.modeling import SemanticSegmentor
from torch import nn

from ..config import (
    balance_mode,
    building,
    get_distill_cfg,
    load_config,
    merge_from_list,
    student_architecture,
    student_class,
    teacher_config,
    validate_config,
)
from ..data.registration import FORMATS
from ..engine import setup_config
from ..engine.evaluators import check_test_sets
from ..errors import ConfigError
from ..heads import DISTILL_HEAD_REGISTRY, build_heads, teacher_needed, unfinished_phases
from ..launch.termination import RERUN, RESUME, user_error
from ..modeling.meta_arch import DistillModel, build_student, network_infos
from ..modeling.teacher import build_teacher
from ..section import check_choice
from ..utils.arguments import add_config_arguments, at_least
from ..utils.io import write_json, write_text
from ..utils.progress import Progress
from ..utils.provenance import command, commit, versions
from ..utils.text import choices, one_line
from .compare_report import MethodTable, Row
from .runner import COST, Result, Runner, Stage
from .shapes import Shapes
from .summary import replicates

# The first that an evaluation has; an instance segmenter has AP of boxes, too.
METRICS = ("panoptic_seg/PQ", "segm/AP", "bbox/AP", "sem_seg/mIoU", "sem_seg/mIoU_present")


class NetworkPair:
    """A student and its teacher, to see which heads can compare them.

    Args:
        cfg: config of a distillation.
        taught: build the teacher, too.
        trained: load the teacher's weights, so that an unreadable file fails now.
    """

    def __init__(self, cfg: CfgNode, *, taught: bool, trained: bool):
        cfg = thawed(cfg)
        cfg.MODEL.DEVICE = "cpu"  # nothing is computed
        student = build_student(cfg)
        teacher = build_teacher(cfg, trained=trained) if taught else None
        model = DistillModel(student=student, teacher=teacher, heads=nn.ModuleDict())
        self.specs = network_infos(cfg, model.family, teacher)

    def extra_parameters(self, cfg: CfgNode) -> int:
        """Number of parameters of the heads that ``cfg`` names.

        Raises:
            ConfigError: one of them does not work for this pair, or a value is invalid.
        """
        student, teacher = self.specs
        teacher = teacher if teacher_needed(cfg) else None
        for name in cfg.MODEL.DISTILL.HEADS:
            problem = DISTILL_HEAD_REGISTRY.get(name).problem(student, teacher)
            if problem:
                which = f"{name}: " if len(cfg.MODEL.DISTILL.HEADS) > 1 else ""
                raise ConfigError(f"{which}{problem}.")
        validate_config(cfg)
        with building(f"method {'+'.join(cfg.MODEL.DISTILL.HEADS)}"):
            heads = build_heads(cfg, student, teacher)
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
        node.TEACHER = default.TEACHER
    return cfg


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


# ---- The comparison.


class MethodComparison:
    """Trains the methods that the arguments name, and writes the results after every run.

    Raises:
        DistillError: nothing can be compared.
    """

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.out: Path = args.out.resolve()
        os.makedirs(self.out, exist_ok=True)
        self.runner = Runner(self.out, Progress())
        self.data_seed, self.seeds = replicates(args.tune, args.seeds)
        data = self._render() if args.shapes else []
        self.cfg = configure(args.config_file, [*args.opts, *data, "OUTPUT_DIR", str(self.out)])
        self.report = MethodTable(screening=self.seeds)
        self.configs = {self.report.baseline.name: student_alone(self.cfg)}
        self.skipped: dict[str, str] = {}

    def _render(self) -> list[Any]:
        """Render images in the layout that the student needs; return their KEY VALUE overrides."""
        cfg = load_config(self.args.config_file, self.args.opts)
        semantic = issubclass(student_class(cfg), SemanticSegmentor)
        shapes = Shapes(self.out, self.data_seed, "cityscapes" if semantic else "coco")
        with Progress() as progress:
            shapes.render(progress)
        return shapes.opts()

    def run(self) -> int:
        """Returns the exit code."""
        self._choose()
        self._train(self.report.methods, self.seeds)
        if self.args.decide:
            first = self.seeds[-1] + 1
            self.report.fresh = list(range(first, first + self.args.decide))
            flagged = self.report.flagged()
            names = ", ".join(row.name for row in flagged) or "none"
            print(f"worse than the baseline in the screening: {names}")
            if flagged:
                self._train(flagged, self.report.fresh)
        self.report.print()
        self.report.draw(self.out / "comparison.png")
        print(f"wrote {self.out}/comparison.md, .json and .png")
        return int(any(x.failures for x in (self.report.baseline, *self.report.methods)))

    def _train(self, methods: list[Row], seeds: Sequence[int]) -> None:
        for seed in seeds:
            for row in (self.report.baseline, *methods):
                if seed not in row.failures:
                    self._attempt(row, seed)
                    self._write()

    def _choose(self) -> None:
        """Find the methods that work; then train the teacher if that is asked for."""
        names = self.args.heads or [name for name, _ in DISTILL_HEAD_REGISTRY]
        own = self.args.train_teacher or self.args.shapes
        teacher = self._own_teacher(names) if own else None
        for name in names:
            opts = [x for method, *pair in self.args.set if method == name for x in pair]
            self.configs[name] = method_config(self.cfg, name, opts)
        taught = any(teacher_needed(self.configs[name]) for name in names)
        taught &= bool(self.cfg.MODEL.DISTILL.TEACHER.CONFIG_FILE)
        pair = NetworkPair(self.cfg, taught=taught, trained=not teacher)
        refused: dict[str, str] = {}
        for name in names:
            try:
                row = Row(name, pair.extra_parameters(self.configs[name]))
            except ConfigError as e:
                refused[name] = str(e)
            else:
                row.notes = remarks(self.configs[name])
                self.report.methods.append(row)
        reasons = [f"{name}: {why}" for name, why in refused.items()]
        if not self.report.methods:
            raise ConfigError(f"None of the methods works here: {' '.join(reasons)}")
        for sentence in reasons:
            print(f"left out: {sentence}")
        if self.args.heads:
            for name, why in refused.items():
                row = Row(name, failures=dict.fromkeys(self.seeds, why))
                self.report.methods.append(row)
        else:
            self.skipped = refused
        comparable = [self.configs[row.name] for row in self.report.methods if not row.failures]
        if teacher and any(map(teacher_needed, comparable)):
            result = self._run(teacher)
            self.report.teacher = Row(teacher.name, results={teacher.seed: result})
            self.report.metric = chosen_metric(self.args.metric, result)

    def _own_teacher(self, names: list[str]) -> Stage | None:
        """Return the run that trains the teacher on the student's data, or None without a need."""
        heads = {head for name in names for head in name.split("+")}
        if not any(DISTILL_HEAD_REGISTRY.get(head).needs_teacher for head in heads):
            return None
        node = self.cfg.MODEL.DISTILL.TEACHER
        keys = ("TRAIN", "TEST", *FORMATS)
        sets = [(f"DATASETS.{k}", self.cfg.DATASETS[k]) for k in keys]
        node.WEIGHTS, node.OPTS = "", [*node.OPTS, *(x for pair in sets for x in pair)]
        stage = self.runner.describe("teacher", self.seeds[0], teachers_own_config(self.cfg))
        node.WEIGHTS = str(stage.weights)
        return stage

    def _attempt(self, row: Row, seed: int) -> None:
        stage = self.runner.describe(row.name, seed, self.configs[row.name])
        try:
            result = self._run(stage)
        except Exception as e:
            row.failures[seed] = reason(e, stage.folder / "log.txt")
            print(f"{stage.title} failed: {row.failures[seed]}")
            return
        self.report.metric = self.report.metric or chosen_metric(self.args.metric, result)
        row.results[seed] = result

    def _run(self, stage: Stage) -> Result:
        with Progress() as progress:  # one for all runs would outgrow the screen
            self.runner.progress = progress
            return self.runner.run(stage)

    def _write(self) -> None:
        left_out = "".join(f"- {name}: {why}\n" for name, why in self.skipped.items())
        note = f"\nLeft out:\n\n{left_out}" if left_out else ""
        write_text(self.out / "comparison.md", self.report.markdown() + note)
        cuda = self.cfg.MODEL.DEVICE.startswith("cuda")
        content = {
            "metric": self.report.metric,
            "seeds": self.seeds,
            "fresh_seeds": list(self.report.fresh),
            "rows": self.report.raw(),
            "skipped": self.skipped,
            "data_seed": self.data_seed if self.args.shapes else None,
            "command": command(),
            "device": torch.cuda.get_device_name() if cuda else "cpu",
            "threads": torch.get_num_threads(),
            "commit": commit(),
            "versions": versions(),
        }
        write_json(self.out / "comparison.json", content)


def remarks(cfg: CfgNode) -> list[str]:
    """Return what a reader of a method's row should know about its config."""
    constant = ["Its weights are constants."] if balance_mode(cfg) == "none" else []
    return unfinished_phases(cfg) + constant


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
    for metric in METRICS:
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


# ---- The command line.


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config_arguments(parser)
    parser.add_argument(
        "--heads",
        nargs="+",
        metavar="METHOD",
        default=[],
        help="each a method; A+B: both at once; default: all that work",
    )
    parser.add_argument("--seeds", type=at_least(1), default=1, help="trainings of each method")
    parser.add_argument(
        "--decide",
        type=at_least(2),
        metavar="SEEDS",
        help="further seeds for the methods that seem worse than the student alone. Only these "
        "seeds decide about them",
    )
    parser.add_argument("--metric", help="such as bbox/AP50; default: that of the task")
    parser.add_argument(
        "--set",
        nargs=3,
        action="append",
        default=[],
        metavar=("METHOD", "KEY", "VALUE"),
        help="override for one method; repeatable",
    )
    parser.add_argument(
        "--train-teacher",
        action="store_true",
        help="first train MODEL.DISTILL.TEACHER.CONFIG_FILE on the student's data",
    )
    parser.add_argument(
        "--shapes", action="store_true", help="on rendered images, with a teacher trained on them"
    )
    parser.add_argument("--tune", action="store_true", help="other seeds and scenes than reported")
    parser.add_argument("--out", type=Path, default=Path("output/compare"))


def run(args: argparse.Namespace) -> int:
    split_heads(args)
    check_names(args)
    return MethodComparison(args).run()


def split_heads(args: argparse.Namespace) -> None:
    """Move KEY VALUE that stand right after the heads to the other overrides."""
    sections = get_distill_cfg()
    overrides = (k for k, x in enumerate(args.heads) if x.split(".")[0] in sections)
    end = next(overrides, len(args.heads))
    args.heads, args.opts = list(dict.fromkeys(args.heads[:end])), args.heads[end:] + args.opts


def check_names(args: argparse.Namespace) -> None:
    registered = [name for name, _ in DISTILL_HEAD_REGISTRY]
    for method in args.heads:
        for head in method.split("+"):
            check_choice("--heads", head, registered)
    for method, *_ in args.set:
        check_choice("--set", method, args.heads or registered)
