"""Test PKD on hand-made maps against the formula of the paper."""

import pytest
from torch import nn

from distill.heads import PKD
from tests.reference import literal_methods as literal
from tests.support.heads import check_losses, level_maps, random_outputs, two_level_head


@pytest.mark.parametrize("channels", [(4, 4), (3, 4)])
def test_pkd_is_a_sum_over_the_levels(channels):
    head, (student, teacher) = two_level_head(PKD, channels, weight=6.0), random_outputs(*channels)
    assert isinstance(head.adapters["p3"], nn.Identity if channels == (4, 4) else nn.Conv2d)
    expected = {
        f"loss_pkd/{name}": 6 * literal.pkd(s, t)
        for name, s, t in level_maps(head, student, teacher)
    }
    check_losses(head, student, teacher, expected)
