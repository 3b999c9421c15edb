"""Test CWD and CWDLogits on the semantic head of both networks."""

import torch

from distill.losses import cwd
from distill.structures import SEM_SEG_HEAD, NetworkOutputs
from tests.support.heads import semantic_images
from tests.support.networks import distilled, kd_losses


def test_channel_distributions_of_features_and_logits() -> None:
    opts = ("MODEL.DISTILL.CWD.IN_FEATURES", (SEM_SEG_HEAD,), "MODEL.DISTILL.CWD.WEIGHT", 1.0)
    opts += ("MODEL.DISTILL.CWDLOGITS.WEIGHT", 1.0)
    model = distilled("semantic", ["CWD", "CWDLogits"], *opts)
    heard: dict[str, tuple[NetworkOutputs, NetworkOutputs]] = {}
    for name, head in model.heads.items():
        head.register_forward_pre_hook(lambda _, args, name=name: heard.update({name: args}))
    losses = kd_losses(model, semantic_images())
    student, teacher = heard["CWD"]
    expected = cwd(student.sem_seg.features, teacher.sem_seg.features, 1.0)
    assert torch.equal(losses[f"loss_cwd/{SEM_SEG_HEAD}"], expected)
    expected = cwd(student.sem_seg.logits, teacher.sem_seg.logits, 4.0)
    assert torch.equal(losses["loss_cwdlogits"], expected)
