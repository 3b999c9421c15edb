"""Fixtures of the fault tests: one training and one ledger, which is printed at the end."""

import os
import signal
from pathlib import Path

import pytest
import torch

from .ledger import Ledger
from .runs import SESSIONS, Reference, Training, survivors

LEDGER = Ledger()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--faults-report", metavar="FILE", help="write the counts of faults as json")


def pytest_terminal_summary(config: pytest.Config) -> None:
    if LEDGER.rows:
        LEDGER.print()
        report = config.getoption("--faults-report")
        if report:
            LEDGER.write(Path(report))


def pytest_sessionfinish() -> None:
    for pid in survivors(SESSIONS):
        os.kill(pid, signal.SIGKILL)


@pytest.fixture(scope="session")
def ledger() -> Ledger:
    return LEDGER


@pytest.fixture(scope="session")
def training(tmp_path_factory: pytest.TempPathFactory) -> Training:
    torch.set_num_threads(1)
    return Training(tmp_path_factory.mktemp("training"))


@pytest.fixture(scope="session")
def reference(training: Training, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return Reference(training, tmp_path_factory.mktemp("reference"))
