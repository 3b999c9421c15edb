"""The methods page: each head with its loss, its needs, its cost and its keys."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from detectron2.modeling import META_ARCH_REGISTRY
from text import code, description, table

from distill.config.reference import KeyRow, head_rows
from distill.experiments.support_matrix import SupportMatrix
from distill.heads import DISTILL_HEAD_REGISTRY
from distill.utils.old_names import HEADS as RENAMED

DOCS = Path(__file__).resolve().parents[1]
CONFIGS = DOCS.parent / "configs"
KINDS = {  # of networks, by their names in the support matrix
    "R-CNN": ("Faster R-CNN", "Mask R-CNN", "Cascade Mask R-CNN", "Panoptic FPN"),
    "dense detectors": ("RetinaNet", "FCOS", "ATSS", "GFL", "RepPoints"),
    "semantic segmentation": ("Semantic FPN", "PSPNet", "DeepLabV3"),
}
STUDENTS = {  # by class, in the tables of the authors' values
    "GeneralizedRCNN": "R-CNN",
    "PanopticFPN": "Panoptic FPN",
    "RetinaNet": "RetinaNet",
    "FCOS": "FCOS",
    "ATSS": "ATSS",
    "GFL": "GFL",
    "RepPoints": "RepPoints",
    "SemanticSegmentor": "semantic",
}
INTRODUCTION = """# Methods

`MODEL.DISTILL.HEADS` names one method or several. Each has a section of keys, its name in
capitals:

```yaml
MODEL:
  DISTILL:
    HEADS: ("FGD", "DKD")
    FGD:
      ALPHA: 0.002  # the default, -1, stands for the authors' value for this detector
```

[Papers as implemented](../explanation/papers.md) has the equations of IMA, MKD, TID and MSSD.
[Differences](../explanation/differences.md) says where this code differs from that of the authors.
The [support matrix](support-matrix.md) has every pair of teacher and student.

In the table, s and t are maps of the student and the teacher. All losses are computed in float32,
and no gradient reaches the teacher. Click on the name of a column to sort the table.
"""
COST = """## Cost

The columns "s", "× backbone" and "MiB" are medians for one training step. They are measured with
two images of 320 × 512 pixels and 8 objects, on one thread of a CPU. The time is that of the
losses, with their backward pass to the features. It is also given as a multiple of the time of the
student's backbone. The memory is what a head keeps for its backward pass. "pair" is the network:
R-101 teaches R-50, in `pspnet` DeepLabV3 R-101 teaches PSPNet R-18. `pafpn` is a RetinaNet R-50
with PAN. MasKD and MasKDLogits cost more while their tokens are learned; the page has their second
rows below.
"""


class Cost(NamedTuple):
    """Measured cost of a head.

    Attributes:
        pair: networks.
        head: seconds of the losses with their backward pass.
        ratio: as a multiple of the student's backbone.
        kept: MiB that are kept for the backward pass.
    """

    pair: str
    head: float
    ratio: float
    kept: float

    @property
    def cells(self) -> list[str]:
        return [f"{self.head:.3f}", f"{self.ratio:.2g}", f"{self.kept:.1f}", self.pair]


def costs() -> dict[tuple[str, bool], Cost]:
    """Return the costs in docs/results by head, and by whether tokens are being learned."""
    found = {}
    for path in sorted((DOCS / "results").glob("heads_*.json")):
        pair, _, tokens = path.stem.removeprefix("heads_").partition("_tokens")
        learning = path.stem.endswith("_tokens")
        pair = path.stem.removeprefix("heads_").removesuffix("_tokens")
        for name, row in json.loads(path.read_text())["medians"].items():
            name = RENAMED.get(name, name)
            found[name, learning] = Cost(pair, row["head"], row["ratio"], row["kept"])
    return found


def works_for(head: str, matrix: SupportMatrix) -> list[str]:
    """Return the students for which a head works with some teacher."""
    works = [
        student
        for student, teachers in matrix.pairs.items()
        if any(row.get(head, "no") == "" for row in teachers.values())
    ]
    return works + [x for x, row in matrix.without_teacher.items() if row.get(head, "no") == ""]


def shortened(students: list[str]) -> str:
    """Return names of networks, with the name of a kind for all of its networks."""
    if set(students) == {x for kind in KINDS.values() for x in kind}:
        return "every network"
    found = []
    for kind, names in KINDS.items():
        some = [x for x in names if x in students]
        found += [kind] if len(some) == len(names) else some
    return ", ".join(found)


def configs(head: str) -> list[str]:
    """Return names of the shipped configs with a head alone or among others."""
    paths = sorted(CONFIGS.glob("*/*/*.yaml"))
    return [x.relative_to(CONFIGS).as_posix() for x in paths if head in x.parent.name.split("-")]


def presets(name: str, rows: list[KeyRow], students: list[str]) -> list[str]:
    """Return the table of the authors' values by detector, which may be empty."""
    keyed = [row for row in rows if row.presets]
    if not keyed:
        return []
    shown = {
        title: [x.__name__ for x in META_ARCH_REGISTRY.get(architecture).__mro__]
        for architecture, title in STUDENTS.items()
        if set(students) & {title, *KINDS.get(title, ())} or title == "semantic" in students
    }
    section = DISTILL_HEAD_REGISTRY.get(name).section
    values = [
        [
            f"`{row.key}`",
            *(code(section[row.key.rpartition(".")[2]].presets.of(k)) for k in shown.values()),
        ]
        for row in keyed
    ]
    return ["The authors' values by the student's detector:", "", *table(["key", *shown], values)]


def key_table(rows: list[KeyRow]) -> list[str]:
    return table(
        ["key", "default", "valid", "meaning"],
        (
            [
                f'`{row.key}`{{ id="{row.key}" }}',
                "authors' value" if row.presets else code(row.default),
                row.values,
                row.meaning,
            ]
            for row in rows
        ),
    )


def methods_page(matrix: SupportMatrix) -> str:
    data: dict[str, dict[str, Any]] = yaml.safe_load((DOCS / "generate/methods.yaml").read_text())
    return "\n".join(_lines(matrix, data, costs()))


def _lines(matrix: SupportMatrix, data: dict[str, Any], cost: dict[Any, Cost]) -> Iterator[str]:
    rows = head_rows()
    yield INTRODUCTION
    names = ["method", "compares", "needs", "learns", "student", "paper"]
    overview, details = [], []
    for name, cls in DISTILL_HEAD_REGISTRY:
        own = data.get(name, {})
        paper = "[{}]({})".format(*own["paper"]) if "paper" in own else ""
        needs = own.get("needs") or ", ".join(sorted(cls.needs - {"features"})) or "–"
        students = works_for(name, matrix)
        measured = cost.get((name, False))
        overview.append(
            [
                f"[`{name}`](#{name.lower()})",
                own.get("formula") or description(cls).splitlines()[0],
                needs,
                own.get("learns", ""),
                shortened(students),
                paper,
                *(measured.cells if measured else [""] * 4),
            ]
        )
        details += ["", f"## {name}", "", description(cls), ""]
        if "formula" in own:
            details += [f"Loss: {own['formula']}.", ""]
        details += [f"Works for: {shortened(students)}.{f' Paper: {paper}.' if paper else ''}", ""]
        details += key_table(rows[name])
        details += presets(name, rows[name], students)
        if configs(name):
            details += ["Configs:", "", *(f"- `{x}`" for x in configs(name)), ""]
    yield from table([*names, "s", "× backbone", "MiB", "pair"], overview)
    yield COST
    tokens = [[name, *x.cells] for (name, learning), x in cost.items() if learning]
    yield from table(["while tokens are learned", "s", "× backbone", "MiB", "pair"], tokens)
    yield from details
