"""Examination of a training by two batches, which leaves the run unchanged."""

import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.layers.batch_norm import NaiveSyncBatchNorm
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..config import one_per_teacher, teacher_config
from ..engine.hooks import memory_mb
from ..engine.train_loop import pieces
from ..errors import ConfigError, of_teacher
from ..families import build_family
from ..heads import short_trainings, unfinished_phases
from ..heads.classes import ClassMap
from ..modeling.distillation import network_infos
from ..modeling.meta_arch import DistillModel, build_student
from ..modeling.teacher import build_teacher
from ..modeling.unlabeled import unlabeled_of
from ..structures import NetworkOutputs, tensors_of
from .dry_run import DryRun, Inputs, build_dry_run, full_weight, labeled_images, preserved
from .losses import balance_rows, loss_table, loss_warnings, losses_of
from .recording import ask_teacher, head_table, output_table, record_student
from .report import Cost, DoctorReport, Setting, TeacherCheck, TeacherCost
from .teacher import PIXELS, check_teacher, compare_classes, no_better_than_chance, teacher_ap
from .unlabeled import add_unlabeled

BATCHES = 2
ANSWERS = 2  # number of a teacher's answers that are timed
FEWEST_IMAGES = 4  # per process, for batch normalisation in training mode

Say = Callable[[str], Any]


def examine(
    cfg: CfgNode, *, teacher_images: int = 0, drawing: str | None = None, say: Say = str
) -> DoctorReport:
    """Examine a training by two batches, without changing it.

    Args:
        cfg: config of the training.
        teacher_images: number of images of the first test set on which the teacher's AP is
            measured.
        drawing: PNG file to write with unlabelled images and their objects; None: no file.
        say: function that is called with the name of each stage.

    Raises:
        DistillError: the training would fail before its first step.
    """
    with tempfile.TemporaryDirectory() as folder:
        say("building the networks")
        dry_run = build_dry_run(cfg, folder)
        report = introduction(dry_run)
        say("loading two batches")
        start = time.perf_counter()
        batches = [next(dry_run.batches) for _ in range(BATCHES)]
        data_seconds = (time.perf_counter() - start) / BATCHES
        say("training steps")
        with preserved(dry_run):
            report.cost = measure_cost(dry_run, batches, data_seconds, cfg)
        batches = [labeled_images(batch) for batch in batches]
        say("outputs of the networks")
        with preserved(dry_run):
            add_outputs(report, dry_run, batches[0])
        say("the gradient of every loss")
        with preserved(dry_run):
            report.losses, errors = loss_table(dry_run, batches)
            if dry_run.balance:
                report.balance = balance_rows(dry_run.balance)
        say("the teacher's predictions")
        for own, part in by_teacher(report, dry_run):
            add_teacher(own, part, batches, teacher_images)
        if cfg.DATASETS.UNLABELED:
            say("the unlabelled images")
            add_unlabeled(report, dry_run, drawing)
    gather_sentences(report)
    report.errors += errors
    report.warnings += unfinished_phases(cfg)
    report.warnings += short_trainings(cfg, dry_run.images)
    report.warnings += loss_warnings(report.losses, dry_run.heads, dry_run.balance is not None)
    report.warnings += filter(
        None, [batch_norm_warning(dry_run, cfg.SOLVER.IMS_PER_BATCH // cfg.SOLVER.ACCUMULATE)]
    )
    return report


def examine_outputs(cfg: CfgNode, *, say: Say = str) -> DoctorReport:
    """Examine only the recorded outputs and their pairs, by one batch and without gradients."""
    with tempfile.TemporaryDirectory() as folder:
        say("building the networks")
        dry_run = build_dry_run(cfg, folder)
        report = introduction(dry_run)
        say("outputs of the networks")
        with preserved(dry_run):
            add_outputs(report, dry_run, labeled_images(next(dry_run.batches)))
    gather_sentences(report)
    return report


def examine_heads(cfg: CfgNode, *, say: Say = str) -> DoctorReport:
    """Examine which registered heads work for student and teacher, and why the others do not.

    There is a teacher if ``MODEL.DISTILL.TEACHER.CONFIG_FILE`` or ``TEACHERS`` names one. A
    configured head that does not work is not an error here.
    """
    say("building the networks")
    student = build_student(cfg)
    report = DoctorReport(student=type(student).__name__)
    for one in one_per_teacher(cfg):
        own = DoctorReport(student=report.student) if one.name else report
        if one.name:
            report.teachers[one.name] = own
        with of_teacher(one.name):
            taught = bool(one.cfg.MODEL.DISTILL.TEACHER.CONFIG_FILE)
            teacher = build_teacher(one.cfg) if taught else None
            infos = network_infos(one.cfg, build_family(student), teacher)
        if teacher:
            own.teacher = type(teacher.model).__name__
            own.teacher_weights = teacher_config(one.cfg).MODEL.WEIGHTS
        own.registered_heads = head_table(*infos, configured=tuple(one.cfg.MODEL.DISTILL.HEADS))
    return report


# ---- Several teachers.


def by_teacher(report: DoctorReport, dry_run: DryRun) -> Iterator[tuple[DoctorReport, DryRun]]:
    """Yield the report and the training of each teacher; those of the only one are the whole."""
    for name, part in dry_run.by_teacher().items():
        own = DoctorReport(student=report.student, heads=list(part.heads))
        yield report.teachers.setdefault(name, own) if name else report, part


def gather_sentences(report: DoctorReport) -> None:
    """Move the notes and warnings about several teachers to the end of the whole report."""
    for name, own in report.teachers.items():
        report.notes += [f"Teacher {name}: {x}" for x in own.notes]
        report.warnings += [f"Teacher {name}: {x}" for x in own.warnings]
        own.notes, own.warnings = [], []


# ---- Networks, before the first batch.


def introduction(dry_run: DryRun) -> DoctorReport:
    """Begin a report with the networks, their weights and classes."""
    report = DoctorReport(
        student=type(dry_run.student).__name__,
        heads=list(dry_run.heads),
        weights=dry_run.weights,
        notes=remarks(dry_run),
    )
    for own, part in by_teacher(report, dry_run):
        introduce_teacher(own, part)
    return report


def introduce_teacher(report: DoctorReport, dry_run: DryRun) -> None:
    """Add a teacher with its weights and classes, if there is one."""
    cfg, weights, (student, teacher) = dry_run.cfg, dry_run.weights, dry_run.infos
    if student and teacher:
        report.teacher = teacher.kind
        report.teacher_weights = teacher_config(cfg).MODEL.WEIGHTS
        report.classes = compare_classes(cfg, student, teacher)
        if not report.classes.known:
            report.warnings.append(
                "The teacher's class names are unknown, and the ones shown are assumed; set "
                "MODEL.DISTILL.TEACHER.CLASSES."
            )
        if same_file(weights.file, report.teacher_weights):
            report.warnings.append(
                f"Teacher and student have the same weights '{weights.file}', so the teacher knows "
                "no more than the student; change MODEL.DISTILL.TEACHER.WEIGHTS or MODEL.WEIGHTS."
            )


def remarks(dry_run: DryRun) -> list[str]:
    """Return notes about what the training does not do."""
    cfg, found = dry_run.cfg, []
    if not isinstance(dry_run.model, DistillModel):
        name = cfg.MODEL.META_ARCHITECTURE
        found.append(f"MODEL.META_ARCHITECTURE {name} trains without distillation.")
    elif not dry_run.heads:
        found.append("MODEL.DISTILL.HEADS is empty: the student trains without distillation.")
    elif dry_run.model.teacher is None:
        found.append("No head needs a teacher: the student teaches itself.")
    found += [
        f"MODEL.DISTILL.{type(head).__name__.upper()}.WEIGHT is 0: {name} is off."
        for name, head in dry_run.heads.items()
        if head.weight == 0
    ]
    if not cfg.MODEL.WEIGHTS:
        found.append("MODEL.WEIGHTS is empty: the student starts from random weights.")
    return found


def same_file(a: str, b: str) -> bool:
    return bool(a) and (a == b or os.path.realpath(a) == os.path.realpath(b))


def batch_norm_warning(dry_run: DryRun, total: int) -> str | None:
    """Return a warning if batch normalisation learns from too few images, or None.

    Args:
        dry_run: the training.
        total: images over all processes that are computed together.
    """
    synchronised = (nn.SyncBatchNorm, NaiveSyncBatchNorm)
    own = dry_run.cfg.SOLVER.IMS_PER_BATCH
    layers = [m for m in dry_run.student.modules() if isinstance(m, _BatchNorm) and m.training]
    images = [total if isinstance(m, synchronised) else own for m in layers]
    few = [n for n in images if n < FEWEST_IMAGES]
    if not few:
        return None
    return (
        f"{len(few)} layers of batch normalisation use {few[0]} images per process, fewer than "
        f"{FEWEST_IMAGES}; set the NORM keys to FrozenBN or GN, or raise "
        "SOLVER.IMS_PER_BATCH."
    )


# ---- Outputs and cost of the batches.


def add_outputs(report: DoctorReport, dry_run: DryRun, inputs: Inputs) -> None:
    student = record_student(dry_run, inputs) if dry_run.family else None
    for own, part in by_teacher(report, dry_run):
        if student:
            own.outputs = output_table(part, student, ask_teacher(part, student))
            own.teacher_cost = answer_cost(part, student)
        own.preprocessing = preprocessing(part, student)


def preprocessing(dry_run: DryRun, outputs: NetworkOutputs | None) -> list[Setting]:
    """Return the settings that determine the input of each network.

    Args:
        dry_run: the training.
        outputs: outputs of the student for one batch, or None if they are not recorded.
    """
    configs, models = [dry_run.cfg], [dry_run.student]
    padded_sizes = ["x".join(map(str, outputs.batch.padded_size))] if outputs else []
    if dry_run.teacher and outputs:
        configs.append(teacher_config(dry_run.cfg))
        models.append(dry_run.teacher.model)
        seen = dry_run.teacher.preprocess(outputs.batch)
        padded_sizes.append("x".join(map(str, seen.shape[-2:])))
    rows: dict[str, list[Any]] = {"INPUT.FORMAT": [x.INPUT.FORMAT for x in configs]}
    for key in ("PIXEL_MEAN", "PIXEL_STD"):
        rows[f"MODEL.{key}"] = [[round(v, 3) for v in x.MODEL[key]] for x in configs]
    backbones: list[Any] = [getattr(x, "backbone", None) for x in models]
    rows["size divisibility"] = [getattr(x, "size_divisibility", 0) or "any" for x in backbones]
    padding = [getattr(x, "padding_constraints", {}).get("square_size", 0) for x in backbones]
    rows["square padding"] = [x or "none" for x in padding]
    for key in ("MIN_SIZE_TRAIN", "MAX_SIZE_TRAIN"):
        rows[f"INPUT.{key}"] = [x.INPUT[key] for x in configs]
    rows["padded size of the first batch"] = padded_sizes
    return [
        Setting(name, str(values[0]), str(values[1]) if len(values) > 1 else None)
        for name, values in rows.items()
        if values
    ]


def measure_cost(
    dry_run: DryRun, batches: Sequence[Inputs], data_seconds: float, cfg: CfgNode
) -> Cost:
    """Measure the time and the memory of training steps with a learning rate of 0.

    Args:
        dry_run: the training.
        batches: batches of it, or parts of them with ``SOLVER.ACCUMULATE``.
        data_seconds: time to load one of them in this process.
        cfg: config of the training.
    """
    device, parts = dry_run.cfg.MODEL.DEVICE, cfg.SOLVER.ACCUMULATE
    workers = cfg.DATALOADER.NUM_WORKERS
    cuda = device.startswith("cuda")
    finish = torch.cuda.synchronize if cuda else lambda: None
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    step(dry_run, batches[0])  # warm-up
    finish()
    start = time.perf_counter()
    for batch in batches:
        step(dry_run, batch)
    finish()
    seconds = (time.perf_counter() - start) / len(batches) * parts
    data_seconds *= parts
    # Workers load while the step runs; the slower of the two decides.
    iteration = max(seconds, data_seconds / workers) if workers else seconds + data_seconds
    return Cost(
        device=torch.cuda.get_device_name() if cuda else "cpu",
        batch=len(batches[0]) * parts,
        memory_mb=memory_mb(),
        step_seconds=seconds,
        data_seconds=data_seconds,
        iterations=cfg.SOLVER.MAX_ITER,
        hours=iteration * cfg.SOLVER.MAX_ITER / 3600,
    )


def answer_cost(dry_run: DryRun, student: NetworkOutputs) -> TeacherCost | None:
    """Measure the teacher's answer to the student's outputs, or return None without a teacher."""
    teacher, model = dry_run.teacher, dry_run.model
    if teacher is None or not isinstance(model, DistillModel):
        return None
    name = next(iter(dry_run.heads.values())).taught_by
    finish = torch.cuda.synchronize if dry_run.cfg.MODEL.DEVICE.startswith("cuda") else lambda: None
    with full_weight(dry_run), dry_run.autocast():
        needs, maps = model.active_needs(teacher=name), model.teacher_maps(name)
        teacher.ask(student, needs, maps)  # warm-up
        finish()
        start = time.perf_counter()
        for _ in range(ANSWERS):
            answer = teacher.ask(student, needs, maps)
        finish()
        seconds = (time.perf_counter() - start) / ANSWERS
    return TeacherCost(
        seconds, mebibytes(teacher.model.parameters()), mebibytes(tensors_of(answer))
    )


def mebibytes(tensors: Iterable[Tensor]) -> float:
    return sum(x.numel() * x.element_size() for x in tensors) / 2**20


def step(dry_run: DryRun, batch: Inputs) -> None:
    try:
        dry_run.optimizer.zero_grad()
        for piece in pieces(batch, 1, unlabeled_of(dry_run.model)):
            losses = piece.weighted(losses_of(dry_run, list(piece.images), seed=0))
            torch.stack(list(losses.values())).sum().backward()
        dry_run.optimizer.step()
    except torch.cuda.OutOfMemoryError as e:
        raise ConfigError(
            f"A step of {len(batch)} images does not fit into the memory of "
            f"{dry_run.cfg.MODEL.DEVICE}; lower SOLVER.IMS_PER_BATCH or INPUT.MAX_SIZE_TRAIN."
        ) from e


# ---- Predictions of the teacher.


def add_teacher(
    report: DoctorReport, dry_run: DryRun, batches: Sequence[Inputs], images: int
) -> None:
    """Add the share of the ground truth that the teacher predicts, and its AP on ``images``."""
    cfg, teacher, (own, theirs) = dry_run.cfg, dry_run.teacher, dry_run.infos
    if not (teacher and own and theirs):
        if images:
            report.notes.append("The AP of the teacher cannot be measured: there is no teacher.")
        return
    classes = ClassMap(own.classes, theirs.classes)
    ignored = cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE
    check = check_teacher(teacher, classes, batches, cfg.MODEL.DEVICE, ignored)
    report.teacher_check = check
    if check is None:
        report.notes.append("The batches have no labels for the predictions of the teacher.")
    elif no_better_than_chance(check):
        report.warnings.append(chance_warning(check))
    if images:
        try:
            report.teacher_ap = teacher_ap(cfg, teacher, theirs, images)
        except ConfigError as e:
            report.notes.append(str(e))


def chance_warning(check: TeacherCheck) -> str:
    verb, things = ("labels", "pixels") if check.measure == PIXELS else ("finds", "objects")
    return (
        f"The teacher correctly {verb} {check.value:.1%} of {check.count} {things}, "
        f"no better than chance ({check.chance:.1%}); check WEIGHTS "
        "and CLASSES of MODEL.DISTILL.TEACHER, and INPUT.FORMAT of its config."
    )
