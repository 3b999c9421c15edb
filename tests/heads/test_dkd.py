"""Test the default keys of DKD; its values are compared in test_roi.py."""

from distill.heads import DKD
from tests.support.networks import built_head


def test_dkd_has_the_authors_keys():
    head = built_head(DKD, "faster")
    assert head.weight == 1 and head.temperature == 1
    assert (head.alpha, head.beta) == (1, 0.25)
