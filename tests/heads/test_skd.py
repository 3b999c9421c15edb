"""Test SKD on the features of a detector."""

from tests.support.heads import semantic_images
from tests.support.networks import distilled, kd_losses


def test_similarities_of_detectors() -> None:
    losses = kd_losses(distilled("retinanet", ["SKD"]), semantic_images())
    assert set(losses) == {f"loss_skd/p{k}" for k in range(2, 7)}
