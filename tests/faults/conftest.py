"""Fixtures of the fault tests: one training, and a ledger, whose report is printed at the end."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from .ledger import FaultReport, Ledger, Row
from .runs import SESSIONS, Reference, Training, survivors

STARTED = time.monotonic()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--faults-report", metavar="FILE", help="write the counts of faults as json")


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give the fuzz tests to one worker, and the trainings to another one."""
    for item in items:
        if item.path.parent == Path(__file__).parent:
            group = "fuzz" if item.path.name.startswith("test_fuzz") else "faults"
            item.add_marker(pytest.mark.xdist_group(group))
            item.add_marker("e2e")


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    reports = [x for xs in terminalreporter.stats.values() for x in xs]
    notes = [
        note for x in reports if getattr(x, "when", "") == "call" for note in x.user_properties
    ]
    rows = [Row(**note) for name, note in notes if name == "faults"]
    fuzzed: dict[str, int] = {}
    for name, note in notes:
        fuzzed |= note if name == "fuzzed" else {}
    if rows:
        report = FaultReport(rows, fuzzed, time.monotonic() - STARTED)
        report.print()
        if path := config.getoption("--faults-report"):
            report.write(Path(path))


def pytest_sessionfinish() -> None:
    for pid in survivors(SESSIONS):
        os.kill(pid, signal.SIGKILL)


@pytest.fixture
def ledger(record_property: Callable[[str, Any], None]) -> Ledger:
    return Ledger(record_property)


@pytest.fixture(scope="session")
def training(tmp_path_factory: pytest.TempPathFactory) -> Training:
    torch.set_num_threads(1)
    return Training(tmp_path_factory.mktemp("training"))


@pytest.fixture(scope="session")
def reference(training: Training, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return Reference(training, tmp_path_factory.mktemp("reference"))
