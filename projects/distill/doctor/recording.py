"""Which tensors of the two networks are compared, by which head, through which adapter."""

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
from .report import Comparison, HeadRow, Said, Tap

Place = tuple[str, str]  # signal ("features", "dense logits") and level, stage or index


class Pair(NamedTuple):
    """Two places that a head compares; None: the student's own."""

    student: Place
    teacher: Place | None
    comparison: Comparison


def record_both(dry_run: DryRun, inputs: Inputs) -> tuple[NetworkOutputs, NetworkOutputs | None]:
    """Everything that the student says of a batch, and what a head could compare it with."""
    family, (own, theirs) = dry_run.family, dry_run.specs
    assert family and own, "only networks with a probe have taps"
    needs = family.outputs
    with EventStorage(), torch.no_grad(), dry_run.autocast():
        with family.record(needs) as recorder:
            dry_run.student(inputs)
        student = family.read(recorder, family.batch(recorder, inputs), needs)
        teacher = dry_run.teacher
        return student, teacher.ask(student, comparable(own, theirs)) if teacher else None


def comparable(student: NetworkInfo, teacher: NetworkInfo | None) -> frozenset[str]:
    """The signals that some registered head can compare with the teacher's."""
    heads = [cls for _, cls in DISTILL_HEAD_REGISTRY if cls.needs_teacher]
    working = [cls.needs for cls in heads if not cls.problem(student, teacher)]
    return frozenset().union(*working)


def tap_table(
    dry_run: DryRun, student: NetworkOutputs, teacher: NetworkOutputs | None
) -> list[Tap]:
    """All signals in the order of the student's, paired as the heads pair them."""
    spec, teacher_spec = dry_run.specs
    own = places(student, spec) if spec else {}
    theirs = places(teacher, teacher_spec) if teacher and teacher_spec else {}
    compared: dict[Place, dict[Place | None, list[Comparison]]] = {}
    for head in dry_run.heads.values():
        for place, partner, comparison in pairs(head, own, theirs):
            compared.setdefault(place, {}).setdefault(partner, []).append(comparison)
    for place, said in own.items():  # what no head compares stands beside its like
        like = place in theirs and theirs[place].stride == said.stride
        compared.setdefault(place, {place if like else None: []})
    answered = {partner for partners in compared.values() for partner in partners}
    taps = []
    for signal in dict.fromkeys(signal for signal, _ in [*own, *theirs]):
        for place in (p for p in own if p[0] == signal):
            for partner, heads in compared[place].items():
                answer = theirs[partner] if partner else None
                taps.append(Tap(signal, own[place], answer, heads))
        alone = [p for p in theirs if p[0] == signal and p not in answered]
        taps += [Tap(signal, None, theirs[p]) for p in alone]
    return taps


def places(outputs: NetworkOutputs, net: NetworkInfo) -> dict[Place, Said]:
    """Every tensor of ``signals``; dense levels, stages are keyed by index, features by name."""
    found: dict[Place, Said] = {}

    def add(signal: str, key: str, x: Tensor, name: str = "", stride: int | None = None) -> None:
        dtype = str(x.dtype).removeprefix("torch.")
        found[signal, key] = Said(name or key, list(x.shape), stride, dtype)

    for signal in ("features", "shallow"):
        maps: dict[str, Tensor] = getattr(outputs, signal)
        for name in sorted(maps, key=lambda n: net.features[n].stride):
            add(signal, name, maps[name], stride=net.features[name].stride)
    if outputs.dense and net.dense:
        layout, inside = net.dense, outputs.head_features
        for signal, levels in (
            ("dense logits", outputs.dense.logits),
            ("dense deltas", outputs.dense.deltas),
            ("dense_boxes", outputs.dense_boxes),
            # Of the last convolution: those before it are alike.
            ("head_features classes", inside.classes[-1] if inside else ()),
            ("head_features boxes", inside.boxes[-1] if inside else ()),
        ):
            for k, (x, name, cell) in enumerate(zip(levels, layout.levels, layout.strides)):
                add(signal, str(k), x, name, cell)
    if outputs.targets:
        add("targets labels", "0", outputs.targets.labels, "all levels")
        add("targets boxes", "0", outputs.targets.boxes, "all levels")
    for k, rois in enumerate(outputs.rois):
        add("rois logits", str(k), rois.logits, f"stage {k}")
        add("rois deltas", str(k), rois.deltas, f"stage {k}")
    if outputs.masks:
        add("masks logits", "0", outputs.masks.logits, "masks")
    if outputs.sem_seg:
        stride = net.sem_seg.stride if net.sem_seg else None
        add("sem_seg features", "0", outputs.sem_seg.features, "sem_seg", stride)
        add("sem_seg logits", "0", outputs.sem_seg.logits, "sem_seg", stride)
    return found


def pairs(
    head: DistillHead, student: Mapping[Place, Said], teacher: Mapping[Place, Said]
) -> list[Pair]:
    """What a head compares; feature levels as it has matched them, everything else by index."""
    name, needs, found = type(head).__name__, set(head.needs), []
    if isinstance(head, FPNDistillHead):
        needs.discard("features")
        for level in head.levels:
            adapter = level_adapter(head.adapters[level.student], level, student, teacher)
            comparison = Comparison(name, adapter)
            found.append(Pair(("features", level.student), ("features", level.teacher), comparison))
    # A head of another kind may read some levels alone: its losses are named after them.
    parts = {part.split("/")[0] for part in head.parts}
    levels = parts.intersection(key for signal, key in student if signal == "features")
    for place in student:
        signal, key = place
        kind = signal.split()[0]
        if kind not in needs or (kind in ("features", "shallow") and levels and key not in levels):
            continue
        if not head.needs_teacher:
            found.append(Pair(place, None, Comparison(name, "with itself")))
        elif place in teacher:
            adapter = output_adapter(head, signal, student[place], teacher[place])
            found.append(Pair(place, place, Comparison(name, adapter)))
    return found


def level_adapter(
    adapter: nn.Module, level: Level, student: Mapping[Place, Said], teacher: Mapping[Place, Said]
) -> str:
    """What happens to the maps of a feature level before they are compared."""
    if isinstance(adapter, nn.Identity):
        text = "identity"
    elif isinstance(adapter, nn.Conv2d):
        size = "x".join(map(str, adapter.kernel_size))
        text = f"{size} conv {adapter.in_channels}→{adapter.out_channels}"
    else:
        text = type(adapter).__name__
    if level.stride != level.teacher_stride:
        return f"{text}, resized /{level.teacher_stride}→/{level.stride}"
    s, t = student["features", level.student], teacher["features", level.teacher]
    return text if s.shape[2:] == t.shape[2:] else f"{text}, cut to the canvas"


def output_adapter(head: DistillHead, signal: str, student: Said, teacher: Said) -> str:
    """What happens to predictions before they are compared."""
    steps = []
    classes = getattr(head, "classes", None)
    if isinstance(classes, ClassMap) and not classes.identity:
        steps.append(f"{len(classes.in_student)} of {len(classes.position) - 1} classes")
    if signal.startswith("masks") and student.shape[-1] != teacher.shape[-1]:
        steps.append(f"resized {teacher.shape[-1]}→{student.shape[-1]}")
    return ", ".join(steps) or "identity"


def head_table(
    student: NetworkInfo, teacher: NetworkInfo | None, configured: tuple[str, ...]
) -> list[HeadRow]:
    """Every registered head and whether it works for the two networks."""
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
