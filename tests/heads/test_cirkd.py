"""Test CIRKD: what its memories hold, and what it compares without them."""

from typing import Any

import pytest
import torch

from distill.heads import CIRKD
from distill.heads.fpn import cell_labels
from tests.support.heads import semantic_images
from tests.support.networks import built_head, distilled, distilled_from_itself, kd_losses


def test_one_image_a_process_is_too_few_for_relations(caplog: Any) -> None:
    built_head(CIRKD, "semantic", "SOLVER.IMS_PER_BATCH", 1)
    assert "there is only one" in caplog.text


def test_without_a_label_only_images_are_compared() -> None:
    model = distilled("semantic", ["CIRKD"])
    batch = semantic_images()
    for x in batch:
        x["sem_seg"] = torch.full_like(x["sem_seg"], 255)
    losses = kd_losses(model, batch)
    assert float(losses["loss_cirkd/minibatch"].detach()) > 0
    for name in ("loss_cirkd/pixel", "loss_cirkd/region"):
        assert float(losses[name].detach()) == 0
    assert int(model.heads["CIRKD"].pixel_memory.count.sum()) == 0


def test_memory_holds_the_teachers_regions_and_pixels() -> None:
    model = distilled("semantic", ["CIRKD"])
    head, batch = model.heads["CIRKD"], semantic_images()
    heard: list[Any] = []
    head.register_forward_pre_hook(lambda _, args: heard.extend(args))
    kd_losses(model, batch)
    features = torch.nn.functional.normalize(heard[1].sem_seg.features, dim=1)
    labels = cell_labels(heard[0].batch.sem_seg, *features.shape[2:])
    for k in range(4):
        regions = []
        for f, own in zip(features, labels):
            if (own == k).any():
                mean = f[:, own == k].mean(1)
                regions.append(mean / mean.norm())
        held = head.region_memory.queue[k, : int(head.region_memory.count[k])]
        assert len(held) == len(regions)
        if regions:
            assert torch.allclose(held, torch.stack(regions), atol=1e-5)
        cells = torch.cat([f[:, own == k].T for f, own in zip(features, labels)])
        pixels = head.pixel_memory.queue[k, : int(head.pixel_memory.count[k])]
        assert len(pixels) == sum(min(16, int((own == k).sum())) for own in labels)
        if len(pixels):
            assert float((pixels @ cells.T).max(1).values.min()) > 1 - 1e-5
    assert {"pixel_memory.queue", "region_memory.pointer"} <= head.state_dict().keys()


def test_memory_of_a_student_that_is_its_teacher_teaches_once_the_projection_differs() -> None:
    losses = kd_losses(distilled_from_itself("semantic", ["CIRKD"]), semantic_images())
    assert float(losses["loss_cirkd/minibatch"].detach()) == pytest.approx(0, abs=1e-6)
    assert float(losses["loss_cirkd/pixel"].detach()) > 0
