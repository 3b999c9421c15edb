"""The command ``distill``: its help, its exit codes, its lazy imports, and configs by name."""

import ast
import os
import signal
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

import distill
from distill import cli
from distill.config import find_config, teacher_config
from distill.errors import ConfigError
from distill.launch.termination import run_command
from tests.support.networks import tiny_cfg

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("analysis", "convert", "doctor", "experiments", "export", "launch", "report")


def python(code: str, *arguments: str, folder: Path | None = None) -> str:
    """Return the output of a Python process of its own."""
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


# ---- The table of commands.


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 100
    for name, command in cli.COMMANDS.items():
        assert sum(line.split(maxsplit=1) == [name, command.help] for line in lines) == 1


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_a_command_has_options_and_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    command = cli.COMMANDS[name]
    assert command.module.split(".")[0] in ROOMS
    with pytest.raises(SystemExit) as ended:
        cli.main([name, "--help"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: distill {name} ")


def test_an_unknown_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["benchmrak", "--size", "3"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: 'benchmrak' is no command of distill; there are: benchmark, ")
    assert all(name in line for name in cli.COMMANDS)


def test_wrong_arguments_are_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--jsn"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and line.endswith("; see `distill doctor --help`.")


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"distill {distill.__version__}\n"


@pytest.mark.parametrize("path", sorted((ROOT / "tools").glob("*.py")), ids=lambda path: path.name)
def test_no_script_imports_another(path: Path) -> None:
    text = path.read_text()
    others = {x.stem for x in path.parent.glob("*.py")}
    for node in ast.walk(ast.parse(text)):
        names = [x.name for x in node.names] if isinstance(node, ast.Import) else []
        names += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
        assert not others.intersection(name.split(".")[0] for name in names)
    assert "sys.path" not in text


# ---- Exit codes.


def raising(error: BaseException) -> Any:
    def run() -> int:
        raise error

    return run


def test_the_exit_code_is_that_of_the_command() -> None:
    assert [run_command(lambda: code) for code in (0, 1)] == [0, 1]  # noqa: B023


def test_a_mistake_of_the_user_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(raising(ConfigError("KEY is 3;\nit must be 4."))) == 2
    assert capsys.readouterr().err == "error: KEY is 3; it must be 4.\n"
    assert run_command(raising(MemoryError())) == 2
    assert capsys.readouterr().err.endswith("and start the same command again.\n")


def test_a_bug_has_a_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(raising(IndexError("a bug"))) == 1
    assert capsys.readouterr().err.splitlines()[-1] == "IndexError: a bug"


SLEEPING = """
import signal, sys, time
from distill.launch.termination import run_command

for number in signal.SIGINT, signal.SIGTERM:  # a job in the background inherits that it ignores one
    signal.signal(number, signal.SIG_DFL)

def run():
    print("ready", flush=True)
    time.sleep(60)
    return 0

sys.exit(run_command(run))
"""


@pytest.mark.e2e
@pytest.mark.slow
@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals(number: signal.Signals, code: int) -> None:
    command = [sys.executable, "-c", SLEEPING]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True) as process:
        assert process.stdout and process.stdout.readline() == "ready\n"
        process.send_signal(number)
        _, err = process.communicate(timeout=30)
    assert process.returncode == code
    assert err == f"stopped by {number.name}: start the same command again.\n"


# ---- Imports.

LOADED = "import sys; print(*sorted(sys.modules))"
HEAVY = {"torch", "detectron2", "numpy", "matplotlib"}
OPTIONAL = {"cityscapesscripts", "shapely", "timm"}


@pytest.mark.e2e
def test_help_and_the_package_load_no_library() -> None:
    code = f"import distill; from distill.cli import main; main(['--help']); {LOADED}"
    assert not HEAVY & set(python(code).split())


@pytest.mark.e2e
@pytest.mark.slow
def test_public_names_register_with_detectron2() -> None:
    code = f"""
from distill import FPNDistillHead, get_distill_cfg
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.data import DatasetCatalog
assert "DistillRCNN" in META_ARCH_REGISTRY and "GFL" in META_ARCH_REGISTRY
assert "kitti_train" in DatasetCatalog.list()
{LOADED}"""
    assert not OPTIONAL & set(python(code).split())


@pytest.mark.e2e
@pytest.mark.slow
def test_an_import_after_detectron2_registers() -> None:
    code = f"""
from detectron2.modeling import META_ARCH_REGISTRY
import distill
assert "DistillRCNN" in META_ARCH_REGISTRY
{LOADED}"""
    assert "distill.modeling.meta_arch" in python(code).split()


@pytest.mark.e2e
@pytest.mark.slow
def test_networks_need_no_optional_library() -> None:
    loaded = set(python(f"import distill.nets; {LOADED}").split())
    assert "distill.nets.timm" in loaded and not OPTIONAL & loaded
    assert "distill.engine" not in loaded


def test_every_public_name_exists() -> None:
    api = import_module("distill.api")
    assert all(getattr(distill, name) is getattr(api, name) for name in distill.__all__)
    with pytest.raises(AttributeError, match="no attribute 'FPNHead'"):
        distill.FPNHead  # noqa: B018


# ---- Configs by name.


def test_a_config_is_found_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    expected = str(ROOT / "configs" / "Base-RetinaNet.yaml")
    assert find_config("Base-RetinaNet.yaml") == find_config("configs/Base-RetinaNet.yaml")
    assert find_config("Base-RetinaNet.yaml") == expected
    (tmp_path / "Base-RetinaNet.yaml").touch()
    assert find_config("Base-RetinaNet.yaml") == "Base-RetinaNet.yaml"
    with pytest.raises(ConfigError, match=r"'Base-Retina.yaml' does not .* Base-RetinaNet\.yaml,"):
        find_config("Base-Retina.yaml")


def test_a_teacher_is_found_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    cfg = tiny_cfg("faster")
    node = cfg.MODEL.DISTILL.TEACHER
    node.CONFIG_FILE = "COCO-Detection/gfl_R_50_FPN.yaml"
    assert teacher_config(cfg).MODEL.META_ARCHITECTURE == "GFL"
    # In the model zoo, too, whose weights are those of a trained teacher.
    node.CONFIG_FILE = "COCO-Detection/retinanet_R_50_FPN_1x.yaml"
    assert teacher_config(cfg).MODEL.WEIGHTS.endswith("model_final_bfca0b.pkl")
    node.CONFIG_FILE = "COCO-Detection/gfl_R_5.yaml"
    with pytest.raises(ConfigError, match=r"TEACHER.CONFIG_FILE .* model zoo.*gfl_R_50_FPN"):
        teacher_config(cfg)


TRAINER = '''
"""A copy of tools/train_net.py."""

import sys

from distill.engine import Trainer
from distill.launch.main import main


class MyTrainer(Trainer):
    @classmethod
    def test(cls, cfg, model, evaluators=None):
        print("MyTrainer tests")
        return super().test(cfg, model, evaluators)


if __name__ == "__main__":
    sys.exit(main(trainer=MyTrainer))
'''


@pytest.mark.long
@pytest.mark.e2e
@pytest.mark.slow
def test_the_package_trains_anywhere(tmp_path: Path, shapes: tuple[str, str, str]) -> None:
    """By a config's name, and with a user's own trainer."""
    (tmp_path / "own.py").write_text(TRAINER)
    name = "Shapes-Detection/faster_rcnn_R_10_FPN_32.yaml"
    opts = ["SOLVER.MAX_ITER", 1, "SOLVER.IMS_PER_BATCH", 2, "DATALOADER.NUM_WORKERS", 0]
    opts += ["DATASETS.COCO_FORMAT", [shapes], "DATASETS.TRAIN", (shapes[0],)]
    opts += ["DATASETS.TEST", (shapes[0],), "OUTPUT_DIR", "out"]
    command = [sys.executable, "own.py", "--config-file", name, *map(str, opts)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    assert "MyTrainer tests" in done.stdout
    arguments = ["--config-file", name, *map(str, opts), "MODEL.WEIGHTS", "out/model_final.pth"]
    done = subprocess.run(
        [sys.executable, "-m", "distill", "eval", *arguments],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0 and "MyTrainer" not in done.stdout, done.stderr
    assert "Evaluation results for bbox" in done.stdout
