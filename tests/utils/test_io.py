"""Files are written completely or not at all."""

import json
from pathlib import Path

import pytest

from distill.utils.io import replacing, write_json, write_text


def test_a_failure_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    write_text(path, "old")
    with pytest.raises(ZeroDivisionError), replacing(path) as f:
        f.write(b"new")
        raise ZeroDivisionError
    assert path.read_text() == "old"
    assert [x.name for x in tmp_path.iterdir()] == ["file.txt"]


def test_text_and_json_in_a_new_folder(tmp_path: Path) -> None:
    write_json(tmp_path / "a" / "b.json", {"x": [1, None]})
    assert json.loads((tmp_path / "a" / "b.json").read_text()) == {"x": [1, None]}
    write_text(tmp_path / "c.txt", "λ \ud800\n")
    assert (tmp_path / "c.txt").read_text(encoding="utf-8") == "λ \\ud800\n"


def test_a_relative_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_text("here.txt", "x")
    assert Path("here.txt").read_text() == "x"
