"""Run the commands of the README and of the tutorials, in order, as a reader would.

Commands whose data are rendered run with small networks on few images. The others, which need
COCO or Cityscapes, are parsed, and their configs are loaded and validated.
"""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distill import cli
from distill.config import load_config, teacher_config, validate_config
from distill.data.shapes import SceneConfig, write_coco
from tests.docs.pages import README, ROOT, TUTORIALS, Command, blocks, commands
from tests.support.processes import call

NETWORK = [
    *("MODEL.WEIGHTS", "", "MODEL.RESNETS.NORM", "BN", "MODEL.BACKBONE.FREEZE_AT", "0"),
    *("MODEL.FPN.OUT_CHANNELS", "16", "MODEL.ROI_BOX_HEAD.FC_DIM", "16"),
]
NARROW = [  # for ResNets of 50 layers and more, which the shapes do not need
    *("MODEL.RESNETS.STEM_OUT_CHANNELS", "8", "MODEL.RESNETS.RES2_OUT_CHANNELS", "16"),
    *("MODEL.RESNETS.WIDTH_PER_GROUP", "4"),
]
QUICK = [
    *("MODEL.DEVICE", "cpu", "SOLVER.MAX_ITER", "2", "SOLVER.STEPS", "()"),
    *("SOLVER.IMS_PER_BATCH", "2"),
    *("INPUT.MIN_SIZE_TRAIN", "(64,)", "INPUT.MIN_SIZE_TEST", "64", "DATALOADER.NUM_WORKERS", "0"),
]
FEW_IMAGES = ["--train", "4", "--val", "2", "--size", "64"]
KEY = re.compile(r"[A-Z_]+(\.[A-Z0-9_]+)*$")
NOT_RUN = ("compare", "demo")  # they have tests of their own
STUDENT = "output/Shapes-Detection/faster_rcnn_R_10_FPN_32"
WRITTEN = {  # files that a page promises, with a text in each
    "first-distillation": [("output/report.html", "distilled")],
    "own-data": [("output/student/student.yaml", "GeneralizedRCNN")],
    "write-a-head": [(f"{STUDENT}/metrics.json", '"kd_ratio/angle/backbone.p2"')],
}


@pytest.mark.long
@pytest.mark.e2e
@pytest.mark.slow
@pytest.mark.parametrize("page", [README, *TUTORIALS], ids=lambda page: page.stem)
def test_commands(page: Path, tmp_path: Path) -> None:
    folder = tmp_path / "reader"
    folder.mkdir()
    (folder / "configs").symlink_to(ROOT / "configs")
    if "data/annotations" in page.read_text():
        for split in ("train", "val"):
            write_coco(folder / "data", split, 4, config=SceneConfig(height=64, width=64))
    for block in blocks(page, "yaml", "python"):
        if block.title:
            (folder / block.title).write_text(block.text)
    done = call(run_all, list(commands(page, "sh")), folder, folder=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    if page.stem == "own-data":
        done = call(deploy, folder, folder=tmp_path)
        assert done.returncode == 0, done.stderr[-3000:]
    for file, text in WRITTEN.get(page.stem, ()):
        assert text in (folder / file).read_text()


def deploy(folder: Path) -> int:
    """Run the README's example on the student of the tutorial, whose config has another name."""
    os.chdir(folder)
    (example,) = blocks(README, "python")
    namespace: dict[str, Any] = {}
    exec(example.text.replace("output/distilled", "output/student"), namespace)
    found = namespace["predictor"](np.zeros((64, 64, 3), np.uint8))
    return 0 if "instances" in found else 1


def run_all(found: list[Command], folder: Path) -> int:
    """Run commands in a folder; return the exit code of the first that fails, otherwise 0."""
    os.chdir(folder)
    for command in found:
        code = run(command)
        if code:
            print(f"exit code {code}: {command}", file=sys.stderr)
            return code
    return 0


def run(command: Command) -> int:
    program, arguments = command.program, command.arguments
    if command.variables:  # some of them are read by imports
        argv = [sys.executable, "-m", program, *quick(arguments)]
        return subprocess.run(argv, env={**os.environ, **command.variables}).returncode
    if program == "distill":
        return cli.main(quick(arguments)) if runs_here(*arguments) else 0
    if program == "python":
        sys.argv = [arguments[0], *quick(arguments[1:])]
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(arguments[0], run_name="__main__")
        return int(ended.value.code or 0)
    if program == "make":
        return subprocess.run(["make", "-n", "-C", str(ROOT), *arguments]).returncode
    return 0 if program == "." else 1


def runs_here(name: str, *arguments: str) -> bool:
    """Return whether a command can run with rendered data; check its options and config if not."""
    _, parser = cli.command_parser(name)
    args = parser.parse_args(arguments)
    cfg = load_config(args.config_file, args.opts) if "--config-file" in arguments else None
    if name not in NOT_RUN and (cfg is None or cfg.DATASETS.COCO_FORMAT):
        return True
    if cfg is not None:
        validate_config(cfg)
        if cfg.MODEL.DISTILL.TEACHER.CONFIG_FILE:
            teacher_config(cfg)
    return False


def quick(arguments: list[str]) -> list[str]:
    """Add options that make a command quick, before its own KEY VALUE overrides."""
    if arguments[0] == "shapes":
        return [*arguments, *FEW_IMAGES]
    if "--config-file" not in arguments:
        return arguments
    own = next((k for k, x in enumerate(arguments) if KEY.match(x)), len(arguments))
    shapes = any("Shapes-" in x for x in arguments)
    network = NETWORK if shapes else [*NETWORK, *NARROW]
    teacher = ("MODEL.DISTILL.TEACHER.OPTS", repr(network))
    return [*arguments[:own], *network, *teacher, *QUICK, *arguments[own:]]
