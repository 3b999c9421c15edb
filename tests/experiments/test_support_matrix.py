"""Test every head with every pair of networks."""

import pytest

from distill.experiments.support_matrix import NETWORKS, SupportMatrix, support_matrix
from distill.heads import DISTILL_HEAD_REGISTRY
from distill.utils.progress import Progress

# One worker runs both tests, because the matrix takes long.
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("support matrix")]
WORKING = 3832  # pairs and heads that work; raise it when a head or a network is added


@pytest.fixture(scope="module")
def matrix() -> SupportMatrix:
    with Progress() as progress:
        return support_matrix(progress)


def test_no_step_fails(matrix: SupportMatrix) -> None:
    rows = [x for teachers in matrix.pairs.values() for x in teachers.values()]
    rows += matrix.without_teacher.values()
    reasons = {reason for row in rows for reason in row.values()}
    assert not {x for x in reasons if x.startswith("FAILS")}
    assert sum(not reason for row in rows for reason in row.values()) >= WORKING


def test_every_pair_is_tried_and_every_head_works_somewhere(matrix: SupportMatrix) -> None:
    assert list(matrix.pairs) == list(NETWORKS)
    rows = [x for teachers in matrix.pairs.values() for x in teachers.values()]
    assert len(rows) == len(NETWORKS) ** 2
    working = {head for row in rows for head, reason in row.items() if not reason}
    alone = matrix.without_teacher.values()
    working |= {head for row in alone for head, reason in row.items() if not reason}
    assert working == {name for name, _ in DISTILL_HEAD_REGISTRY}
