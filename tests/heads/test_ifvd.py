"""Test IFVD on images without a label."""

import torch

from distill.structures import SEM_SEG_HEAD
from tests.support.heads import semantic_images
from tests.support.networks import distilled, kd_losses


def test_without_a_label_classes_teach_nothing() -> None:
    model = distilled("semantic", ["IFVD"])
    batch = semantic_images()
    for x in batch:
        x["sem_seg"] = torch.full_like(x["sem_seg"], 255)
    losses = kd_losses(model, batch)
    assert float(losses[f"loss_ifvd/{SEM_SEG_HEAD}"].detach()) == 0
