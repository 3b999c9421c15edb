"""tools/install_detectron2.py: the restored prefix, and one sentence for each way it can fail."""

import hashlib
import importlib.util
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "tools" / "install_detectron2.py"

FILES = {
    "EZannot/detectron2/__init__.py": "__version__ = '0.6'\n",
    "EZannot/detectron2/model_zoo/__init__.py": "from EZannot.detectron2 import __version__\n",
    "EZannot/detectron2/model_zoo/configs/common/a.py": "t = '_target_: EZannot.detectron2.X'\n",
    "EZannot/detectron2/model_zoo/configs/Base.yaml": "NAME: EZannot.detectron2.Y\n",
}
OUTSIDE = {"EZannot/gui.py": "GPL = True\n", "ezannot-1.1.0.dist-info/WHEEL": "\n"}


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script as a module, expecting the few files of the toy wheel."""
    spec = importlib.util.spec_from_file_location("install_detectron2", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "EXPECTED_FILES", {".py": 3, ".yaml": 1})
    return module


@pytest.fixture
def make_wheel(tool, tmp_path, monkeypatch):
    """Writes a toy wheel with the given files and makes its hash the expected one."""

    def make(files: dict[str, str]) -> Path:
        wheel = tmp_path / "ezannot-1.1.0-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            for name, text in files.items():
                archive.writestr(name, text)
        monkeypatch.setattr(tool, "SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
        return wheel

    return make


@pytest.fixture
def no_detectron2(tool, monkeypatch):
    """As in a virtual environment without detectron2."""
    monkeypatch.setattr(tool, "is_installed", lambda: False)
    monkeypatch.setattr(tool.sys, "prefix", "/some/venv")


def fake_python(monkeypatch, tool, returncode=0, stdout="", stderr=""):
    """Replaces every child process by one with the given result."""

    def run(*arguments):
        return subprocess.CompletedProcess(arguments, returncode, stdout, stderr)

    monkeypatch.setattr(tool, "run_python", run)


def failure(tool, capsys, *arguments) -> str:
    """Runs the tool, which must fail with one line; returns that line."""
    assert tool.main([str(argument) for argument in arguments]) == 1
    message = capsys.readouterr().err
    assert message.startswith("install_detectron2: ") and message.count("\n") == 1, message
    return message


@pytest.mark.e2e
def test_builds_a_wheel_with_the_prefix_restored(tool, make_wheel, tmp_path, capsys):
    target = tmp_path / "with space" / "wheels"
    wheel = make_wheel({**FILES, **OUTSIDE})
    assert tool.main(["--from-wheel", str(wheel), "--wheel", str(target)]) == 0

    (built,) = target.iterdir()
    assert built.name == "detectron2-0.6-py3-none-any.whl"
    with zipfile.ZipFile(built) as archive:
        texts = {name: archive.read(name).decode() for name in archive.namelist()}
    packaged = {name for name in texts if ".dist-info/" not in name}
    assert packaged == {name.removeprefix("EZannot/") for name in FILES}
    assert not any("ezannot" in texts[name].lower() for name in packaged)
    assert texts["detectron2/model_zoo/configs/Base.yaml"] == "NAME: detectron2.Y\n"
    licenses = "detectron2-0.6.dist-info/licenses/"
    assert "Apache License" in texts[licenses + "LICENSE"]
    assert "ezannot==1.1.0" in texts[licenses + "NOTICE"]


def test_an_importable_detectron2_is_kept(tool, monkeypatch, capsys):
    fake_python(monkeypatch, tool, stdout="0.6 in /somewhere/detectron2\n")
    monkeypatch.setattr(tool, "build_wheel", lambda *_: pytest.fail("must not build"))
    assert tool.main([]) == 0
    assert capsys.readouterr().out == "detectron2 0.6 in /somewhere/detectron2 is kept.\n"


def test_a_broken_detectron2_is_reported(tool, monkeypatch, capsys):
    monkeypatch.setattr(tool, "is_installed", lambda: True)
    fake_python(monkeypatch, tool, 1, stderr="ModuleNotFoundError: No module named 'fvcore'\n")
    message = failure(tool, capsys)
    assert "No module named 'fvcore'" in message and "uninstall" in message


def test_refuses_outside_a_virtual_environment(tool, no_detectron2, monkeypatch, capsys):
    monkeypatch.setattr(tool.sys, "prefix", sys.base_prefix)
    assert "--allow-system" in failure(tool, capsys)


def test_environment_not_writable(tool, no_detectron2, monkeypatch, capsys):
    monkeypatch.setattr(tool.os, "access", lambda *_: False)
    assert "is not writable" in failure(tool, capsys)


def test_no_network(tool, no_detectron2, monkeypatch, capsys):
    fake_python(monkeypatch, tool, 1, stderr="WARNING: retrying\nERROR: No matching distribution\n")
    message = failure(tool, capsys)
    assert "(No matching distribution)" in message and "--from-wheel" in message


def test_hash_mismatch(tool, no_detectron2, make_wheel, monkeypatch, capsys):
    wheel = make_wheel(FILES)
    monkeypatch.setattr(tool, "SHA256", "0" * 64)
    assert f"instead of {'0' * 64}" in failure(tool, capsys, "--from-wheel", wheel)


def test_wheel_file_missing(tool, no_detectron2, tmp_path, capsys):
    assert "No such file or directory" in failure(
        tool, capsys, "--from-wheel", tmp_path / "none.whl"
    )


def test_not_a_wheel(tool, no_detectron2, tmp_path, monkeypatch, capsys):
    wheel = tmp_path / "ezannot.whl"
    wheel.write_bytes(b"no zip")
    monkeypatch.setattr(tool, "SHA256", hashlib.sha256(b"no zip").hexdigest())
    assert "is not a wheel" in failure(tool, capsys, "--from-wheel", wheel)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (OUTSIDE, "has no folder EZannot/detectron2/"),
        (dict(list(FILES.items())[1:]), "{'.py': 2, '.yaml': 1} files instead of"),
        ({**FILES, "EZannot/detectron2/_C.so": ""}, "detectron2/_C.so is not as expected"),
        ({**FILES, "EZannot/detectron2/b.py": "import EZannot\n"}, "detectron2/b.py is not as"),
    ],
)
def test_unexpected_contents(tool, no_detectron2, make_wheel, capsys, files, expected):
    assert expected in failure(tool, capsys, "--from-wheel", make_wheel(files))


def test_build_fails(tool, no_detectron2, make_wheel, monkeypatch, capsys):
    output = """
          error: invalid command 'bdist_wheel'
          [end of output]
    error: metadata-generation-failed
    hint: See above for details.
    """
    fake_python(monkeypatch, tool, 1, stderr=output)
    message = failure(tool, capsys, "--from-wheel", make_wheel(FILES))
    assert "could not be built (invalid command 'bdist_wheel')" in message


def test_wheel_folder_not_writable(tool, make_wheel, tmp_path, capsys):
    (tmp_path / "file").touch()
    target = tmp_path / "file" / "wheels"
    message = failure(tool, capsys, "--from-wheel", make_wheel(FILES), "--wheel", target)
    assert "Not a directory" in message


def test_pip_cannot_install(tool, no_detectron2, monkeypatch, capsys):
    monkeypatch.setattr(tool, "build_wheel", lambda *_: Path("detectron2.whl"))
    fake_python(monkeypatch, tool, 1, stderr="ERROR: No space left on device\n")
    assert "could not install" in failure(tool, capsys)


def test_import_fails_afterwards(tool, no_detectron2, monkeypatch, capsys):
    def run(*arguments):
        broken = "-c" in arguments
        return subprocess.CompletedProcess(arguments, int(broken), "", "ImportError: no torch\n")

    monkeypatch.setattr(tool, "build_wheel", lambda *_: Path("detectron2.whl"))
    monkeypatch.setattr(tool, "run_python", run)
    message = failure(tool, capsys)
    assert "cannot be imported (ImportError: no torch)" in message and "constraints.txt" in message
