"""Test MasKDLogits: tokens learn the masks first, and the masks distil then."""

import torch
from detectron2.utils.events import EventStorage

from distill.heads import MasKDLogits
from tests.support.heads import semantic_images
from tests.support.networks import distilled, kd_losses


def test_tokens_are_learned_first_and_then_distil() -> None:
    model = distilled("semantic", ["MasKDLogits"], "MODEL.DISTILL.MASKDLOGITS.TOKEN_ITERS", 3)
    head: MasKDLogits = model.heads["MasKDLogits"]
    first = kd_losses(model, semantic_images(), iteration=2)
    assert float(first["loss_maskdlogits/masks"].detach()) == 0
    sum(first.values()).backward()
    assert head.drawn.tokens.grad.abs().sum() > 0
    assert all(p.grad.abs().sum() > 0 for p in head.drawn.weighting.parameters())
    assert all(p.grad is None or p.grad.abs().sum() == 0 for p in model.student.parameters())
    model.zero_grad()
    then = kd_losses(model, semantic_images(), iteration=3)
    assert (
        float(then["loss_maskdlogits/tokens"].detach())
        == 0
        < float(then["loss_maskdlogits/masks"].detach())
    )
    sum(then.values()).backward()
    assert all(p.grad.abs().sum() == 0 for p in head.drawn.parameters())
    assert sum(float(p.grad.abs().sum()) for p in model.student.parameters()) > 0


def test_masks_stay_as_they_were_learned() -> None:
    """Weight decay and momentum move parameters whose gradient is zero."""
    model = distilled("semantic", ["MasKDLogits"], "MODEL.DISTILL.MASKDLOGITS.TOKEN_ITERS", 2)
    head: MasKDLogits = model.heads["MasKDLogits"]
    optimizer = torch.optim.SGD(head.drawn.parameters(), 0.1, momentum=0.9, weight_decay=0.1)
    learned = []
    for iteration in range(5):
        optimizer.zero_grad()
        sum(kd_losses(model, semantic_images(), iteration).values()).backward()
        optimizer.step()
        learned.append(head.learned.tokens.clone())
    assert not torch.equal(learned[0], learned[1])
    assert torch.equal(learned[1], learned[4]) and not torch.equal(head.drawn.tokens, learned[4])
    assert "learned.tokens" in head.state_dict()


def test_tokens_learn_masks_that_differ() -> None:
    model = distilled("semantic", ["MasKDLogits"])
    head: MasKDLogits = model.heads["MasKDLogits"]
    optimizer = torch.optim.Adam(head.drawn.parameters(), 0.05)
    batch, values = semantic_images(), []
    for _ in range(30):
        with EventStorage(0):
            loss = model(batch)["loss_maskdlogits/tokens"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        values.append(float(loss.detach()))
    assert values[-1] < values[0] - 0.1
