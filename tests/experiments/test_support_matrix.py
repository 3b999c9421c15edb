"""Test every head with a part of the pairs of networks; `make docs` tries all of them."""

import pytest

from distill.experiments.support_matrix import NETWORKS, SupportMatrix, support_matrix
from distill.heads import DISTILL_HEAD_REGISTRY
from distill.utils.progress import Progress

# One worker runs both tests, because the matrix takes long.
pytestmark = [pytest.mark.long, pytest.mark.slow, pytest.mark.xdist_group("support matrix")]
WORKING = 1030  # pairs and heads that work; raise it when a head or a network is added


def teachers(student: str) -> list[str]:
    """Return a network like the student, and two others; every network teaches three students."""
    names = list(NETWORKS)
    place = names.index(student)
    return [names[(place + step) % len(names)] for step in (0, 1, 5)]


@pytest.fixture(scope="module")
def matrix() -> SupportMatrix:
    with Progress() as progress:
        return support_matrix(progress, teachers)


def test_no_step_fails(matrix: SupportMatrix) -> None:
    assert not {name: reason for name, reason in matrix.steps.items() if reason}
    assert len(matrix.steps) >= WORKING


def test_every_head_works_somewhere(matrix: SupportMatrix) -> None:
    assert {student: list(x) for student, x in matrix.pairs.items()} == {
        student: teachers(student) for student in NETWORKS
    }
    working = {name.split(",")[0] for name in matrix.steps}
    assert working == {name for name, _ in DISTILL_HEAD_REGISTRY}
