"""The command ``distill``: training, evaluation, export, checks, experiments and analysis.

A command is a module with ``add_arguments(parser)`` and ``run(args)``, which returns the exit code.
Only the module of the command that runs is imported, so that ``distill --help`` answers at once.
"""

import sys
from argparse import RawDescriptionHelpFormatter
from collections.abc import Sequence
from importlib import import_module
from typing import Any, NamedTuple

from . import __version__
from .utils.arguments import CommandParser
from .utils.text import choices, print_error


class Command(NamedTuple):
    """A row of the table of commands.

    Attributes:
        module: below ``distill``.
        help: one line.
        options: arguments that always come first.
    """

    module: str
    help: str
    options: tuple[str, ...] = ()


COMMANDS = {
    "train": Command("launch.main", "train a plain or distilled model"),
    "eval": Command("launch.main", "evaluate a trained model", ("--eval-only",)),
    "doctor": Command("doctor", "check a distillation on two batches before it trains"),
    "convert": Command("convert", "convert the authors' weights of RTMDet or YOLO to a checkpoint"),
    "export": Command("export.main", "export a student to ONNX or TorchScript"),
    "predict": Command("export.predict", "detect objects in images, folders and videos"),
    "check-data": Command("analysis.check_data", "list every fault in the data sets of a config"),
    "convert-data": Command(
        "analysis.convert_data", "convert data sets to COCO's or YOLO's format"
    ),
    "anchors": Command("analysis.anchors", "find anchors for the boxes of a training set"),
    "compare": Command("experiments.compare", "train one student with many methods, and compare"),
    "prove": Command("experiments.prove", "decide if a distillation pays, for equal time"),
    "ablate": Command("experiments.ablation", "compare the variants of a method on rendered data"),
    "report": Command("report.command", "write a page about trainings, which may still run"),
    "analyze": Command("analysis.analyze", "compare the detections of several models"),
    "visualize": Command("analysis.visualize", "draw what methods look at in an image"),
    "replay": Command("doctor.replay", "repeat a training step that was not finite"),
    "benchmark": Command("experiments.benchmark", "measure the time and memory of distillation"),
    "shapes": Command("experiments.shapes", "render the shapes data set"),
    "demo": Command("experiments.demo", "distill a detector on rendered data, in minutes on a CPU"),
}
HELP = """usage: distill COMMAND [--help] ...

{commands}

`distill COMMAND --help` lists the options of a command. As in detectron2, a config is given by
--config-file FILE KEY VALUE ... FILE may be the name of a config of this package, such as
Shapes-Detection/faster_rcnn_R_10_FPN_32.yaml.

exit codes:
  0         The command succeeded.
  1         A check found something, or a traceback shows a bug.
  2         One sentence on stderr says what to change.
  130, 143  SIGINT or SIGTERM ended the command."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that ``argv`` (by default, that of this process) names.

    Returns:
        The exit code, see :data:`HELP`.
    """
    name, *rest = (sys.argv[1:] if argv is None else argv) or ("--help",)
    if name in ("-h", "--help"):
        print(help_text())
        return 0
    if name == "--version":
        print(f"distill {__version__}")
        return 0
    if name not in COMMANDS:
        print_error(f"'{name}' is no command of distill; there are: {choices(name, COMMANDS)}.")
        return 2
    try:
        return _run(name, rest)
    except KeyboardInterrupt:  # while the modules are imported
        print("stopped by SIGINT: start the same command again.", file=sys.stderr)
        return 130


def help_text() -> str:
    """Return the text of ``distill --help``."""
    width = max(map(len, COMMANDS))
    rows = (f"  {key:{width}}  {command.help}" for key, command in COMMANDS.items())
    return HELP.format(commands="\n".join(rows))


def command_parser(name: str) -> tuple[Any, CommandParser]:
    """Return the module of a command and the parser of its options."""
    module = import_module(f".{COMMANDS[name].module}", __package__)
    parser = CommandParser(
        prog=f"distill {name}",
        description=module.__doc__,
        formatter_class=RawDescriptionHelpFormatter,
    )
    module.add_arguments(parser)
    return module, parser


def _run(name: str, argv: Sequence[str]) -> int:
    module, parser = command_parser(name)
    # Imported here because it imports torch.
    from .launch.termination import run_command

    return run_command(lambda: module.run(parser.parse_args([*COMMANDS[name].options, *argv])))
