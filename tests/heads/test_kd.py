"""Test the default keys of KD; its values are compared in test_roi.py."""

from distill.heads import KD
from tests.support.networks import built_head


def test_kd_has_the_authors_keys():
    head = built_head(KD, "faster")
    assert head.weight == 1 and head.temperature == 1
