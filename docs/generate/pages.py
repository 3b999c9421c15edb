"""Hook of MkDocs that writes the reference pages from the code.

Pages with the same name as a head, a key, a command or a module therefore need no edit when the
code changes.
"""

import argparse
import sys
from collections.abc import Iterator
from inspect import cleandoc
from pathlib import Path

import torch
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

sys.path.insert(0, str(Path(__file__).parent))  # also while pages are written

from methods import key_table, methods_page
from text import markdown, table

from distill.cli import COMMANDS, command_parser, help_text
from distill.config.reference import other_rows
from distill.experiments.support_matrix import SupportMatrix, support_matrix
from distill.heads import DISTILL_HEAD_REGISTRY
from distill.utils.progress import Progress

ROOT = Path(__file__).resolve().parents[2]
ROOMS = {  # pages of the API, the most important first
    "distill.heads": "Heads",
    "distill.section": "Config keys of a head",
    "distill.structures": "Outputs of networks",
    "distill.losses": "Losses",
    "distill.families": "Families of networks",
    "distill.modeling": "Models",
    "distill.nets": "Networks",
    "distill.config": "Config",
    "distill.engine": "Training",
    "distill.solver": "Optimizer and averages",
    "distill.checkpoint": "Checkpoints",
    "distill.convert": "Conversion of weights",
    "distill.data": "Data",
    "distill.evaluation": "Evaluation",
    "distill.launch": "Launching",
    "distill.export": "Export",
    "distill.doctor": "Doctor",
    "distill.experiments": "Experiments",
    "distill.analysis": "Analysis",
    "distill.utils": "Helpers",
    "distill.errors": "Errors",
}


def on_config(config: MkDocsConfig) -> None:
    """Add the pages of the API to the navigation."""
    pages = [{title: f"reference/api/{room.split('.')[1]}.md"} for room, title in ROOMS.items()]
    (reference,) = (x["Reference"] for x in config.nav or () if "Reference" in x)
    reference.append({"API": ["reference/api/index.md", *pages]})


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages."""
    torch.set_num_threads(1)  # its networks are tiny; more threads wait for each other
    with Progress() as progress:
        matrix = support_matrix(progress)
    failures = [f"{name}: {reason}" for name, reason in matrix.steps.items() if reason]
    if failures:
        raise PluginError(f"The support matrix has failures: {'; '.join(failures)}.")
    pages = {
        "changelog.md": (ROOT / "CHANGELOG.md").read_text(),
        "reference/methods.md": methods_page(matrix),
        "reference/support-matrix.md": "\n".join(matrix_lines(matrix)),
        "reference/config.md": "\n".join(config_lines()),
        "reference/commands.md": "\n".join(command_lines()),
        "reference/api/index.md": "\n".join(api_index()),
        **{
            f"reference/api/{room.split('.')[1]}.md": f"# {title}\n\n::: {room}\n"
            for room, title in ROOMS.items()
        },
    }
    for path, content in pages.items():
        files.append(File.generated(config, path, content=content))
    return files


def matrix_lines(matrix: SupportMatrix) -> Iterator[str]:
    yield "# Support matrix\n"
    yield (
        "Every pair of networks is built, and every head takes a step. ✓: losses and gradients are "
        "finite, and a gradient reaches the student's backbone. Empty: the head is refused at the "
        "start, with a reason below the table. Backbones (ResNet, ResNeXt, timm's) make no "
        "difference, because feature heads match levels by stride.\n"
    )
    heads = [name for name, cls in DISTILL_HEAD_REGISTRY if cls.needs_teacher]
    for student, teachers in matrix.pairs.items():
        yield f"## Student: {student}\n"
        marks = ([x, *("" if row[x] else "✓" for row in teachers.values())] for x in heads)
        yield from table(["head, by teacher", *teachers], marks)
        reasons: dict[str, list[str]] = {}
        for head in heads:
            for reason in {row[head]: None for row in teachers.values() if row[head]}:
                reasons.setdefault(reason, []).append(head)
        yield from (f"- {', '.join(names)}: {reason}." for reason, names in reasons.items())
        yield ""
    yield "## Without a teacher\n"
    yield "The student has an FPN with a PAN, or the neck of YOLOv3.\n"
    heads = list(next(iter(matrix.without_teacher.values())))
    rows = matrix.without_teacher.items()
    yield from table(
        ["student", *heads], ([x, *(row[head] or "✓" for head in heads)] for x, row in rows)
    )


def config_lines() -> Iterator[str]:
    yield "# Config keys\n"
    yield (
        "Keys that this package adds to those of "
        "[detectron2](https://detectron2.readthedocs.io/en/latest/modules/config.html). The keys "
        "of a method, `MODEL.DISTILL.<METHOD>`, are on the page of [methods](methods.md). A value "
        "that is not valid is refused before training.\n"
    )
    sections: dict[str, list] = {}
    for row in other_rows():
        sections.setdefault(row.key.rpartition(".")[0] or "Top level", []).append(row)
    for section, rows in sections.items():
        yield f"## {section}\n"
        yield from key_table(rows)


def command_lines() -> Iterator[str]:
    yield "# Commands\n"
    yield f"```text\n{help_text()}\n```\n"
    seen = {}
    for name in COMMANDS:
        module, parser = command_parser(name)
        yield f"## distill {name}\n"
        if module in seen:
            yield f"It has the options of [`distill {seen[module]}`](#distill-{seen[module]}).\n"
            continue
        seen[module] = name
        yield markdown(cleandoc(module.__doc__ or "")) + "\n"
        yield from table(["option", "default", "meaning"], map(option_row, parser._actions[1:]))


def option_row(action: argparse.Action) -> list[str]:
    """Return an option with its value, its default and its help."""
    values = action.metavar or "|".join(map(str, action.choices or ())) or action.dest.upper()
    values = " ".join(values) if isinstance(values, tuple) else values
    names = ", ".join(action.option_strings)
    shown = f"{names} {values}".strip() if action.nargs != 0 or not names else names
    shown_default = action.default not in (None, "", False, argparse.SUPPRESS) and names
    text = (action.help or "").replace("%(default)s", str(action.default))
    return [f"`{shown}`", f"`{action.default}`" if shown_default else "", text]


def api_index() -> Iterator[str]:
    yield "# API\n"
    yield "`import distill` offers the names that most programs need:\n"
    yield "```python\nfrom distill import FPNDistillHead, Section, add_distill_config\n```\n"
    yield from table(
        ["room", ""],
        ([f"[`{room}`]({room.split('.')[1]}.md)", title] for room, title in ROOMS.items()),
    )
