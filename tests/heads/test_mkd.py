"""MKD on feature levels: its terms are the public losses, each switchable and weighted."""

import pytest
import torch

from distill import losses
from distill.heads.base import StepGenerator
from tests.support.networks import distilled, image_dict, kd_losses, outspoken_model, tiny_cfg

TERMS = {
    "fea": losses.fitnet,
    "multiscale": losses.multi_scale,
    "fad": losses.channel_alignment,
}


def mkd_model(**keys):
    opts = [x for k, v in keys.items() for x in (f"MODEL.DISTILL.MKD.{k}", v)]
    return distilled("faster", ["MKD"], *opts)


def features(model, batch):
    """Student and teacher maps by level."""
    heard = []
    handle = model.heads["MKD"].register_forward_pre_hook(lambda _, args: heard.extend(args))
    found = kd_losses(model, batch)
    handle.remove()
    student, teacher = heard
    return found, student.features, teacher.features


def test_terms_are_the_public_losses_averaged_over_the_levels():
    found, student, teacher = features(
        mkd_model(WEIGHT=2.0), [image_dict(0), image_dict(1, 96, 64)]
    )
    assert set(found) == {f"loss_mkd/p{k}/{t}" for k in range(2, 7) for t in (*TERMS, "fdmd")}
    for level, s in student.items():
        for term, loss in TERMS.items():
            expected = 2 * loss(s, teacher[level]) / 5
            torch.testing.assert_close(found[f"loss_mkd/{level}/{term}"], expected)


def test_the_masked_term_draws_from_the_heads_own_generator():
    model = mkd_model(MASK_RATIO=0.3)
    found, student, teacher = features(model, [image_dict(0)])
    generator = StepGenerator(0).generator(torch.device("cpu"))
    for level in model.heads["MKD"].levels:
        s, t = student[level.student], teacher[level.student]
        mask = losses.frequency_mask(1, *s.shape[2:], 0.3, generator)
        expected = losses.frequency_masked_mse(s, t, mask) / 5
        torch.testing.assert_close(found[f"loss_mkd/{level.student}/fdmd"], expected)


def test_without_masking_two_terms_are_equal():
    found = kd_losses(mkd_model(MASK_RATIO=0.0), [image_dict(0)])
    for k in range(2, 7):
        assert torch.equal(found[f"loss_mkd/p{k}/fdmd"], found[f"loss_mkd/p{k}/fea"])


@pytest.mark.parametrize("term", losses.MKD_TERMS)
def test_a_term_is_switched_off_or_weighted_alone(term):
    everything = kd_losses(mkd_model(MASK_RATIO=0.0), [image_dict(0)])
    key = f"{term.upper()}_WEIGHT"
    without = kd_losses(mkd_model(MASK_RATIO=0.0, **{key: 0.0}), [image_dict(0)])
    tripled = kd_losses(mkd_model(MASK_RATIO=0.0, **{key: 3.0}), [image_dict(0)])
    assert set(everything) - set(without) == {f"loss_mkd/p{k}/{term}" for k in range(2, 7)}
    for name, value in everything.items():
        factor = 3 if name.endswith(f"/{term}") else 1
        torch.testing.assert_close(tripled[name], factor * value)


def test_options_of_a_config():
    keys = {"SCALES": (2, 3), "TEMPERATURE": 2.0, "ATTENTION": False}
    keys |= {"MULTISCALE_POWER": 1, "NORMALIZE": "channel"}
    head = mkd_model(**keys).heads["MKD"]
    assert head.options == {
        "terms": losses.MKD_TERMS,
        "scales": (2, 3),
        "temperature": 2.0,
        "attention": False,
        "power": 1,
        "normalize": "channel",
    }


def test_adapters_learn_from_every_term():
    model = distilled("faster", ["MKD"], teacher=outspoken_model("faster", seed=1, fpn=24))
    sum(kd_losses(model, [image_dict(0)]).values()).backward()
    assert all(p.grad.abs().sum() > 0 for p in model.heads["MKD"].adapters.parameters())


def test_defaults_are_the_papers():
    node = tiny_cfg("faster").MODEL.DISTILL.MKD
    assert (node.WEIGHT, node.MASK_RATIO, node.TEMPERATURE, node.ATTENTION) == (1, 0.15, 1, True)
    assert [node[f"{t.upper()}_WEIGHT"] for t in losses.MKD_TERMS] == [1, 1, 1, 1]
