"""Test DeFeat: the level of each object, and both terms against the formula."""

import numpy as np
from torch import nn

from distill.heads import DeFeat
from tests.reference import literal_methods as literal
from tests.support.heads import (
    BOXES,
    SIZES,
    check_losses,
    level_maps,
    random_outputs,
    two_level_head,
)


def test_defeat_has_each_object_on_one_level():
    head = two_level_head(DeFeat, foreground_weight=3.0, background_weight=12.0)
    boxes = [[*BOXES[0], [-40.0, -40.0, 100.0, 90.0]], [[17.0, 18.0, 21.0, 22.0]]]
    student, teacher = random_outputs(boxes=boxes)
    for adapter in head.adapters.values():
        nn.init.normal_(adapter.weight)
    assert [literal.defeat_level(x, 2) for x in boxes[0]] == [0, 0, 0, 1]
    expected = {}
    for k, (name, s, t) in enumerate(level_maps(head, student, teacher)):
        mask = np.stack([literal.defeat_mask(x, *SIZES[name], 8 * 2**k, k, 2) for x in boxes])
        assert 0 < mask.mean() < 1
        inside, outside = literal.defeat(s, t, mask)
        expected[f"loss_defeat/{name}"] = (3 * inside + 12 * outside) / 2
    check_losses(head, student, teacher, expected)
