"""Test PKD on hand-made outputs against its formula."""

import pytest
from torch import nn

from distill.heads import PKD
from tests.reference import literal_methods as literal
from tests.support.heads import check, heard, of_both_levels, pairs


@pytest.mark.parametrize("channels", [(4, 4), (3, 4)])
def test_pkd_is_a_sum_over_the_levels(channels):
    head, (student, teacher) = of_both_levels(PKD, channels, weight=6.0), heard(*channels)
    assert isinstance(head.adapters["p3"], nn.Identity if channels == (4, 4) else nn.Conv2d)
    expected = {
        f"loss_pkd/{name}": 6 * literal.pkd(s, t) for name, s, t in pairs(head, student, teacher)
    }
    check(head, student, teacher, expected)
