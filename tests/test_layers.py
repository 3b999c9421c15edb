"""Imports go down only, from the command line to the losses: see :data:`ALLOWED`."""

import ast
import sys
from graphlib import TopologicalSorter
from importlib.util import resolve_name
from pathlib import Path

from tests.support.cases import for_each

PACKAGE = Path(__file__).parents[1] / "projects" / "distill"
# Imports that a room may have besides itself and the standard library: ".x" is distill.x, "*" is
# every third-party library. Imports inside functions count. The row of a module is its longest
# prefix.
ALLOWED = {
    ".errors": "",
    ".utils": "torch torchvision numpy detectron2 jinja2 rich .errors .__version__",
    ".structures": "torch detectron2 .errors",
    ".section": "torch detectron2 .errors .utils",
    ".losses": "torch torchvision",
    ".nets": "torch torchvision detectron2 fvcore timm omegaconf .section .utils .losses.boxes"
    " .losses.reduce",
    ".nets.onnx": "torch detectron2 onnx onnxruntime .nets.module .utils.io .utils.text",
    ".heads": "* .losses .section .structures .errors .utils",
    ".families": "* .losses.boxes .nets.features .structures .errors .utils.training .utils.text",
    ".checkpoint": "",
    ".checkpoint.unpickler": "*",
    ".checkpoint.compare": "torch .errors .utils",
    ".checkpoint.formats": "torch .errors .utils",
    ".checkpoint.load": "* .errors .utils .checkpoint.formats .checkpoint.unpickler",
    ".checkpoint.save": "* .errors .checkpoint .utils",
    ".config": "* .errors .section .heads .families .nets .utils",
    ".data": "* .errors .config .nets .structures .utils",
    ".evaluation": "* .errors .data .utils",
    ".modeling": "* .errors .config .checkpoint .data.datasets .heads .families .structures .utils",
    ".solver": "* .errors .config .checkpoint",
    ".report": "* .errors .config .data .evaluation .utils",
    ".engine": "* .errors .section .config .checkpoint .utils .data .evaluation .heads .families"
    " .structures .modeling .solver .report",
    ".convert": "* .errors .config .checkpoint .utils .data.datasets .modeling .engine",
    ".doctor": "* .errors .config .checkpoint .utils .data .evaluation .heads .families"
    " .structures .modeling .engine",
    ".launch": "* .errors .config .checkpoint .utils .data .engine .doctor",
    ".experiments": "* .errors .section .config .checkpoint .utils .data .evaluation .losses"
    " .heads .families .structures .modeling .engine .launch.termination .report",
    ".analysis": "* .errors .section .config .checkpoint .utils .data .evaluation .losses .heads"
    " .structures .modeling .engine .report",
    ".export": "* .errors .config .checkpoint.load .modeling.quantization .nets .utils .engine",
    ".export.runner": "numpy PIL onnxruntime",
    ".export.predict": "numpy PIL cv2 supervision .errors .utils .export",
    ".api": ".nets .config .section .data.cityscapes .data.kitti .heads .modeling",
    "": ".api",  # distill/__init__.py
    ".cli": ".errors .utils .launch .__version__",  # and the module of a command, by its name
    ".__main__": ".cli",
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


@for_each("name", FILES)
def test_imports_go_down(name):
    rooms = [room for room in ALLOWED if within(name, room)]
    assert rooms, f"give distill{name} a row in ALLOWED"
    room = max(rooms, key=len)
    allowed = [room, *ALLOWED[room].split()]
    wrong = {n for n in imported(name) if not any(within(n, a) for a in allowed)}
    if "*" in allowed:
        wrong = {n for n in wrong if n.startswith(".") or not n}
    assert not wrong, f"distill{name} must not import {', '.join(sorted(wrong))}"


@for_each("name", [name for name in FILES if within(name, ".heads")])
def test_heads_never_reach_into_a_network(name):
    """Everything that they may know is in :class:`distill.structures.NetworkInfo`."""
    tree = ast.parse(FILES[name].read_text(encoding="utf-8"))
    lines = [x.lineno for x in ast.walk(tree) if isinstance(x, ast.Attribute) and x.attr == "model"]
    assert not lines, f"distill{name} reads .model in lines {lines}: add a field to NetworkInfo"


def test_no_import_cycle():
    graph = {
        name: {m for n in imported(name) for m in FILES if within(n, m) and not within(name, m)}
        for name in FILES
    }
    TopologicalSorter(graph).prepare()  # CycleError names the modules


def test_the_reader_of_imports_sees_what_is_there():
    found = imported(".losses.kd")
    assert found == {"torch.nn.functional", "torch.Tensor", ".losses.reduce.same_shape"}
    assert ".nets" in imported(".api")
    assert ".doctor.run_doctor" in imported(".launch.main")  # inside a function
