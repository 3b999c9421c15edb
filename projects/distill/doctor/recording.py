"""Pairs of outputs of the two networks, the heads that compare them, and their adapters."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

from ..heads import DISTILL_HEAD_REGISTRY, DistillHead, FPNDistillHead
from ..heads.classes import ClassMap
from ..heads.fpn import Level
from ..structures import NetworkInfo, NetworkOutputs
from .dry_run import DryRun, Inputs
from .report import ComparingHead, HeadRow, OutputRow, TensorInfo

OutputKey = tuple[str, str]  # kind of output ("features", "dense logits"); level, stage or index


class Pairing(NamedTuple):
    """Two outputs that a head compares; ``teacher`` is None if a head needs no teacher."""

    student: OutputKey
    teacher: OutputKey | None
    head: ComparingHead


def record_student(dry_run: DryRun, inputs: Inputs) -> NetworkOutputs:
    """Return all outputs of the student for a batch, without gradients."""
    family = dry_run.family
    assert family, "only networks with a family have recorded outputs"
    needs = family.outputs
    with EventStorage(), torch.no_grad(), dry_run.autocast():
        with family.record(needs) as recorder:
            dry_run.student(inputs)
        return family.read(recorder, family.batch(recorder, inputs), needs)


def ask_teacher(dry_run: DryRun, student: NetworkOutputs) -> NetworkOutputs | None:
    """Return the teacher's outputs that heads can compare, or None without a teacher."""
    own, theirs = dry_run.infos
    if dry_run.teacher is None or own is None:
        return None
    with EventStorage(), dry_run.autocast():
        return dry_run.teacher.ask(student, comparable_outputs(own, theirs))


def comparable_outputs(student: NetworkInfo, teacher: NetworkInfo | None) -> frozenset[str]:
    """Return the outputs that some registered head can compare with those of the teacher."""
    heads = [cls for _, cls in DISTILL_HEAD_REGISTRY if cls.needs_teacher]
    working = [cls.needs for cls in heads if not cls.problem(student, teacher)]
    return frozenset().union(*working)


def output_table(
    dry_run: DryRun, student: NetworkOutputs, teacher: NetworkOutputs | None
) -> list[OutputRow]:
    """Return all outputs in the student's order, paired as the heads pair them."""
    info, teacher_info = dry_run.infos
    own = described(student, info) if info else {}
    theirs = described(teacher, teacher_info) if teacher and teacher_info else {}
    compared: dict[OutputKey, dict[OutputKey | None, list[ComparingHead]]] = {}
    for head in dry_run.heads.values():
        for key, partner, comparing in pairings(head, own, theirs):
            compared.setdefault(key, {}).setdefault(partner, []).append(comparing)
    for key, tensor in own.items():  # an output that no head compares is shown with its counterpart
        alike = key in theirs and theirs[key].stride == tensor.stride
        compared.setdefault(key, {key if alike else None: []})
    paired = {partner for partners in compared.values() for partner in partners}
    rows = []
    for output in dict.fromkeys(output for output, _ in [*own, *theirs]):
        for key in (k for k in own if k[0] == output):
            for partner, heads in compared[key].items():
                counterpart = theirs[partner] if partner else None
                rows.append(OutputRow(output, own[key], counterpart, heads))
        unpaired = [k for k in theirs if k[0] == output and k not in paired]
        rows += [OutputRow(output, None, theirs[k]) for k in unpaired]
    return rows


def described(outputs: NetworkOutputs, net: NetworkInfo) -> dict[OutputKey, TensorInfo]:
    """Describe every tensor of ``outputs``, by name for features and by index for all others."""
    found: dict[OutputKey, TensorInfo] = {}

    def add(output: str, key: str, x: Tensor, name: str = "", stride: float | None = None) -> None:
        dtype = str(x.dtype).removeprefix("torch.")
        found[output, key] = TensorInfo(name or key, list(x.shape), stride, dtype)

    for output in ("features", "shallow"):
        maps: dict[str, Tensor] = getattr(outputs, output)
        for name in sorted(maps, key=lambda n: net.features[n].stride):
            add(output, name, maps[name], stride=net.features[name].stride)
    if outputs.dense and net.dense:
        layout, inside = net.dense, outputs.head_features
        for output, levels in (
            ("dense logits", outputs.dense.logits),
            ("dense deltas", outputs.dense.deltas),
            ("dense_boxes", outputs.dense_boxes),
            # Only the last convolution is shown: the others have the same shapes.
            ("head_features classes", inside.classes[-1] if inside else ()),
            ("head_features boxes", inside.boxes[-1] if inside else ()),
        ):
            for k, (x, name, stride) in enumerate(zip(levels, layout.levels, layout.strides)):
                add(output, str(k), x, name, stride)
    if outputs.targets:
        add("targets labels", "0", outputs.targets.labels, "all levels")
        add("targets boxes", "0", outputs.targets.boxes, "all levels")
    for k, rois in enumerate(outputs.rois):
        add("rois logits", str(k), rois.logits, f"stage {k}")
        add("rois deltas", str(k), rois.deltas, f"stage {k}")
    if outputs.masks:
        add("masks logits", "0", outputs.masks.logits, "masks")
    if outputs.point_masks:
        add("point_masks logits", "0", outputs.point_masks.logits, "masks")
    if outputs.sem_seg:
        cell = net.sem_seg.stride if net.sem_seg else None
        add("sem_seg features", "0", outputs.sem_seg.features, "sem_seg", cell)
        add("sem_seg logits", "0", outputs.sem_seg.logits, "sem_seg", cell)
    return found


def pairings(
    head: DistillHead,
    student: Mapping[OutputKey, TensorInfo],
    teacher: Mapping[OutputKey, TensorInfo],
) -> list[Pairing]:
    """Return the pairs that a head compares: features as it matches them, others by index."""
    name, needs, found = head.name, set(head.needs), []
    if isinstance(head, FPNDistillHead):
        needs.discard("features")
        for level in head.levels:
            adapter = level_adapter(head.adapters[level.student], level, student, teacher)
            own, theirs = ("features", level.student), ("features", level.teacher)
            found.append(Pairing(own, theirs, ComparingHead(name, adapter)))
    # Another kind of head may read only some levels: its losses are named after them.
    parts = {part.split("/")[0] for part in head.parts}
    levels = parts.intersection(key for output, key in student if output == "features")
    for entry in student:
        output, key = entry
        kind = output.split()[0]
        if kind not in needs or (kind in ("features", "shallow") and levels and key not in levels):
            continue
        if not head.needs_teacher:
            found.append(Pairing(entry, None, ComparingHead(name, "with itself")))
        elif entry in teacher:
            adapter = output_adapter(head, output, student[entry], teacher[entry])
            found.append(Pairing(entry, entry, ComparingHead(name, adapter)))
    return found


def level_adapter(
    adapter: nn.Module,
    level: Level,
    student: Mapping[OutputKey, TensorInfo],
    teacher: Mapping[OutputKey, TensorInfo],
) -> str:
    """Describe how the maps of a feature level are adapted before they are compared."""
    if isinstance(adapter, nn.Identity):
        text = "identity"
    elif isinstance(adapter, nn.Conv2d):
        size = "x".join(map(str, adapter.kernel_size))
        text = f"{size} conv {adapter.in_channels}→{adapter.out_channels}"
    else:
        text = type(adapter).__name__
    if level.stride != level.teacher_stride:
        return f"{text}, resized /{level.teacher_stride:g}→/{level.stride}"
    s, t = student["features", level.student], teacher["features", level.teacher]
    return text if s.shape[2:] == t.shape[2:] else f"{text}, cut to the padded size"


def output_adapter(head: DistillHead, output: str, student: TensorInfo, teacher: TensorInfo) -> str:
    """Describe how predictions are adapted before they are compared."""
    steps = []
    classes = getattr(head, "classes", None)
    if isinstance(classes, ClassMap) and not classes.identity:
        steps.append(f"{len(classes.in_student)} of {len(classes.position) - 1} classes")
    if output.startswith("masks") and student.shape[-1] != teacher.shape[-1]:
        steps.append(f"resized {teacher.shape[-1]}→{student.shape[-1]}")
    return ", ".join(steps) or "identity"


def head_table(
    student: NetworkInfo, teacher: NetworkInfo | None, configured: tuple[str, ...]
) -> list[HeadRow]:
    """Return a row for every registered head, with the reason if it does not work here."""
    return [
        HeadRow(
            head=name,
            compares=sorted(cls.needs),
            needs_teacher=cls.needs_teacher,
            configured=name in configured,
            problem=cls.problem(student, teacher),
        )
        for name, cls in sorted(DISTILL_HEAD_REGISTRY)
    ]
