"""The methods page: each head with its loss, its needs, its cost and its keys."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from detectron2.modeling import META_ARCH_REGISTRY
from text import code, description, table

from distill.config.reference import KeyRow, head_rows
from distill.experiments.support_matrix import SupportMatrix
from distill.heads import DISTILL_HEAD_REGISTRY
from distill.utils.old_names import HEADS as RENAMED

DOCS = Path(__file__).resolve().parents[1]
CONFIGS = DOCS.parent / "configs"
KINDS = {  # kinds of networks, by their names in the support matrix
    "R-CNN": ("Faster R-CNN", "Mask R-CNN", "Cascade Mask R-CNN", "Panoptic FPN"),
    "dense detectors": (
        *("RetinaNet", "FCOS", "ATSS", "GFL", "RepPoints"),
        *("RTMDet", "RTMDet-Ins", "YOLOX"),
        *("YOLOv3", "YOLOv4", "YOLOv5", "YOLOv7"),
    ),
    "semantic segmentation": ("Semantic FPN", "PSPNet", "DeepLabV3"),
}
ARCHITECTURES = {  # classes of students, in the tables of the authors' values
    "Faster R-CNN": "GeneralizedRCNN",
    "RetinaNet": "RetinaNet",
    "FCOS": "FCOS",
    "ATSS": "ATSS",
    "GFL": "GFL",
    "RepPoints": "RepPoints",
    "PSPNet": "SemanticSegmentor",
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

In the table, s and t are maps of the student and the teacher, N images, C channels, K classes. All
losses are computed in float32, and no gradient reaches the teacher. "needs" are the inputs besides
feature maps. A click on the name of a column sorts the table.
"""
COST = """
## Cost

A row has medians for one training step with two images of 320 × 512 pixels and 8 objects, on one
thread of a CPU. "s" are the seconds of the losses, with their backward pass to the features. "×
backbone" is the same as a multiple of the forward pass of the student's backbone. "MiB" is the
memory that a head keeps for its backward pass. R-101 teaches R-50; in `pspnet` DeepLabV3 R-101
teaches PSPNet R-18; `pafpn` is a RetinaNet with PAN. The raw files are
`docs/results/heads_<pair>.json`.
"""


def methods_page(matrix: SupportMatrix) -> str:
    """Return the page: a table of all methods, their cost, and a section for each."""
    data = yaml.safe_load((DOCS / "generate/methods.yaml").read_text())
    return "\n".join(lines(matrix, data))


def lines(matrix: SupportMatrix, data: dict[str, dict[str, Any]]) -> Iterator[str]:
    """Yield the lines of the page.

    Args:
        data: columns that the code does not know, by method.
    """
    heads = dict(DISTILL_HEAD_REGISTRY)
    overview = (
        [
            f"[`{name}`](#{name.lower()})",
            formula(cls, data.get(name, {})),
            data.get(name, {}).get("needs") or ", ".join(sorted(cls.needs - {"features"})) or "–",
            data.get(name, {}).get("learns", ""),
            shortened(students(name, matrix)),
            paper(data.get(name, {})),
        ]
        for name, cls in heads.items()
    )
    yield INTRODUCTION
    yield from table(["method", "compares", "needs", "learns", "student", "paper"], overview)
    yield COST
    yield from table(["method", "s", "× backbone", "MiB", "pair"], costs())
    rows = head_rows()
    for name, cls in heads.items():
        yield f"## {name}\n"
        yield f"{description(cls)}\n"
        yield f"- Loss: {formula(cls, data.get(name, {}))}"
        yield f"- Student: {shortened(students(name, matrix))}"
        yield f"- Paper: {paper(data.get(name, {})) or 'this package'}"
        yield f"- Balance: × {cls.balance_share:g} the ratio\n" if cls.balance_share != 1 else ""
        if cls.rpn_share != 1:
            yield f"- Balance in an R-CNN: × {cls.rpn_share:g} the ratio\n"
        yield from key_table(rows[name])
        yield from presets(name, rows[name], students(name, matrix))
        yield from configs(name)


def formula(cls: type, row: dict[str, Any]) -> str:
    return row.get("formula") or description(cls).split("\n\n")[0]


def paper(row: dict[str, Any]) -> str:
    source = row.get("paper", "")
    return source if isinstance(source, str) else "[{}]({})".format(*source)


def students(head: str, matrix: SupportMatrix) -> list[str]:
    """Return the students for which a head works, with some teacher or without one."""
    found = [
        student
        for student, teachers in matrix.pairs.items()
        if any(row.get(head) == "" for row in teachers.values())
    ]
    return found + [x for x, row in matrix.without_teacher.items() if row.get(head) == ""]


def shortened(networks: list[str]) -> str:
    """Return names of networks, with the name of a kind for all of its networks."""
    if set(networks) == {x for kind in KINDS.values() for x in kind}:
        return "every network"
    found = []
    for kind, names in KINDS.items():
        some = [x for x in names if x in networks]
        found += [kind] if len(some) == len(names) else some
    return ", ".join(found)


def costs() -> Iterator[list[str]]:
    """Yield a row of the table for each measured head."""
    for path in sorted((DOCS / "results").glob("heads_*.json")):
        pair, tokens, _ = path.stem.removeprefix("heads_").partition("_tokens")
        phase = ", while its tokens are learned" if tokens else ""
        for name, row in json.loads(path.read_text())["medians"].items():
            seconds, kept = f"{row['head']:.3f}", f"{row['kept']:.1f}"
            name = RENAMED.get(name, name) + phase
            yield [name, seconds, f"{row['ratio']:.2g}", kept, f"`{pair}`"]


def key_table(rows: list[KeyRow]) -> list[str]:
    """Return the lines of a table of keys."""
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


def presets(name: str, rows: list[KeyRow], networks: list[str]) -> Iterator[str]:
    """Yield the table of the authors' values by student, if a key of the head has any."""
    section = DISTILL_HEAD_REGISTRY.get(name).section
    keys = [row.key for row in rows if row.presets]
    if keys:
        shown = [x for x in ARCHITECTURES if x in networks]
        values = (
            [f"`{key}`", *(code(section[key.split(".")[-1]].presets.of(kinds(x))) for x in shown)]
            for key in keys
        )
        yield "The authors' values by student:\n"
        yield from table(["key", *shown], values)


def kinds(student: str) -> list[str]:
    """Return the names of a network's class and its base classes."""
    return [x.__name__ for x in META_ARCH_REGISTRY.get(ARCHITECTURES[student]).__mro__]


def configs(head: str) -> Iterator[str]:
    """Yield the list of the shipped configs with a head alone or among others."""
    paths = sorted(CONFIGS.glob("*/*/*.yaml"))
    found = [x.relative_to(CONFIGS) for x in paths if head in x.parent.name.split("-")]
    if found:
        yield "Configs:\n"
        yield from (f"- `{x.as_posix()}`" for x in found)
        yield ""
