"""Imports go down only: tools → launch, doctor → engine → modeling → heads, families → losses."""

import ast
import sys
from graphlib import TopologicalSorter
from importlib.util import resolve_name
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "projects" / "distill"
# What a room may import besides itself and the standard library: ".x" is distill.x, "*" every
# third-party library. Imports inside functions count. The row of a module is its longest prefix.
ALLOWED = {
    ".errors": "",
    ".utils": "torch numpy detectron2",
    ".structures": "torch detectron2 .errors",
    ".losses": "torch torchvision",
    ".nets": "torch torchvision detectron2 fvcore timm .utils",
    ".heads": "* .losses .structures .errors .utils .nets",
    ".families": "* .structures .errors",
    ".checkpoint": "",
    ".checkpoint.load": "* .errors",
    ".checkpoint.save": "* .errors .checkpoint",
    ".config": "* .errors .heads .families .losses .nets .utils",
    ".data": "* .errors .config .nets .utils",
    ".evaluation": "* .errors .data",
    ".modeling": "* .errors .config .checkpoint .data.datasets .heads .families .structures",
    ".solver": "* .errors .config .checkpoint",
    ".engine": "* .errors .config .checkpoint .utils .data .evaluation .heads .families"
    " .structures .modeling .solver",
    ".doctor": "* .errors .config .checkpoint .utils .data .heads .families .structures .modeling"
    " .engine",
    ".launch": "* .errors .config .checkpoint .engine .doctor",
    "": ".nets .config .data.cityscapes .data.kitti .heads .modeling",  # distill/__init__.py
}


def short_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return "".join(f".{p}" for p in parts if p != "__init__")


FILES = {short_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def within(name: str, room: str) -> bool:
    return f"{name}.".startswith(f"{room}.") if room else not name


def imported(name: str) -> set[str]:
    """Everything that a module imports, anywhere in its source; of this package as ".x.y"."""
    package = f"distill{name}"
    if FILES[name].name != "__init__.py":
        package = package.rpartition(".")[0]
    names = []
    for node in ast.walk(ast.parse(FILES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = resolve_name("." * node.level + (node.module or ""), package)
            names += [f"{base}.{alias.name}" for alias in node.names]
    names = [n for n in names if n.partition(".")[0] not in sys.stdlib_module_names]
    return {n.removeprefix("distill") if within(n, "distill") else n for n in names}


@pytest.mark.parametrize("name", FILES)
def test_imports_go_down(name):
    rooms = [room for room in ALLOWED if within(name, room)]
    assert rooms, f"give distill{name} a row in ALLOWED"
    room = max(rooms, key=len)
    allowed = [room, *ALLOWED[room].split()]
    wrong = {n for n in imported(name) if not any(within(n, a) for a in allowed)}
    if "*" in allowed:
        wrong = {n for n in wrong if n.startswith(".") or not n}
    assert not wrong, f"distill{name} must not import {', '.join(sorted(wrong))}"


def test_no_import_cycle():
    graph = {
        name: {m for n in imported(name) for m in FILES if within(n, m) and not within(name, m)}
        for name in FILES
    }
    TopologicalSorter(graph).prepare()  # CycleError names the modules


def test_the_reader_of_imports_sees_what_is_there():
    found = imported(".losses.kd")
    assert found == {"torch.nn.functional", "torch.Tensor", ".losses.reduce.same_shape"}
    assert ".nets" in imported("")
    assert ".doctor.run_doctor" in imported(".launch.main")  # inside a function
