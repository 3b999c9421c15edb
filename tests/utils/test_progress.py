"""Progress where stdout is no terminal: lines at the start, at each tenth and at the end."""

import io
import sys
from collections.abc import Callable

import pytest

from distill.utils import progress as module
from distill.utils.progress import Progress

Tick = Callable[[float], None]


@pytest.fixture
def tick(monkeypatch: pytest.MonkeyPatch) -> Tick:
    """Let seconds pass on the clock of the lines."""
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])

    def tick(seconds: float) -> None:
        now[0] += seconds

    return tick


def test_a_stage_prints_a_line_for_each_tenth(
    tick: Tick, capsys: pytest.CaptureFixture[str]
) -> None:
    with Progress() as progress:
        task = progress.add_task("train", total=40)
        for _ in range(40):
            tick(1)
            progress.advance(task)
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert lines[:3] == [
        "train: 0 of 40",
        "train: 4 of 40, ETA 0:00:36",
        "train: 8 of 40, ETA 0:00:32",
    ]
    assert lines[-1] == "train: done in 0:00:40" and len(lines) == 11
    assert not captured.err


def test_a_tracked_sequence_prints_the_same_lines(
    tick: Tick, capsys: pytest.CaptureFixture[str]
) -> None:
    with Progress() as progress:
        for _ in progress.track(range(4), description="students"):
            tick(3)
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "students: 0 of 4",
        "students: 1 of 4, ETA 0:00:09",
        "students: 2 of 4, ETA 0:00:06",
        "students: 3 of 4, ETA 0:00:03",
        "students: done in 0:00:12",
    ]


def test_a_quick_stage_prints_two_lines(tick: Tick, capsys: pytest.CaptureFixture[str]) -> None:
    with Progress() as progress:
        assert list(progress.track(range(30), description="[red]a\ud800[/]")) == [*range(30)]
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["[red]a\\ud800[/]: 0 of 30", "[red]a\\ud800[/]: done in 0:00:00"]


def test_a_resumed_stage_estimates_by_its_own_steps(
    tick: Tick, capsys: pytest.CaptureFixture[str]
) -> None:
    with Progress() as progress:
        task = progress.add_task("train", completed=50, total=100)
        tick(10)
        progress.update(task, completed=60)
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["train: 50 of 100", "train: 60 of 100, ETA 0:00:40"]


def test_a_finished_or_empty_stage_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress() as progress:
        progress.add_task("reused", completed=1, total=1)
        progress.add_task("nothing", total=0)
    assert capsys.readouterr().out.splitlines() == ["reused", "nothing"]


def test_a_stage_of_one_step_is_one_line(tick: Tick, capsys: pytest.CaptureFixture[str]) -> None:
    with Progress() as progress:
        task = progress.add_task("building the networks", total=1)
        tick(60)
        progress.advance(task)
    assert capsys.readouterr().out == "building the networks ...\n"


def test_json_on_stdout_stays_json(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(json=True) as progress:
        progress.advance(progress.add_task("check", total=1))
    assert capsys.readouterr() == ("", "")


def test_lines_are_printed_while_a_stage_writes_to_a_file(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with Progress() as progress:
        monkeypatch.setattr(sys, "stdout", io.StringIO())
        progress.add_task("train", total=2)
        monkeypatch.undo()
    assert "train: 0 of 2" in capsys.readouterr().out


def test_a_terminal_shows_bars(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    with Progress() as progress:
        task = progress.add_task("[b]train", total=2)
        progress.advance(task)
    output = capsys.readouterr().out
    assert "[b]train" in output and "1/2" in output and "━" in output
