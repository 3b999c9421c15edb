"""A config leaves some values open, which follow from others."""

from typing import Any

import pytest

from distill.config import balance_mode
from tests.support.networks import tiny_cfg

IMA = ("MODEL.DISTILL.HEADS", ("IMA",))
PAIR = ("MODEL.DISTILL.HEADS", ("IMA", "PKD"))


@pytest.mark.parametrize(
    "opts, mode",
    [
        ((), "none"),
        (IMA, "gradient"),
        (PAIR, "gradient"),
        ((*PAIR, "MODEL.DISTILL.PKD.WEIGHT", 60.0), "none"),
        ((*IMA, "MODEL.DISTILL.IMA.WEIGHT", 0.0), "none"),
        ((*IMA, "MODEL.DISTILL.IMA.WEIGHT", 1.0), "gradient"),  # the default, written out
        ((*IMA, "MODEL.DISTILL.PKD.WEIGHT", 60.0), "gradient"),  # this head does not work
        ((*IMA, "MODEL.DISTILL.IMA.MASK_RATIO", 0.5), "gradient"),
    ],
)
def test_weights_set_themselves_where_none_is_set(opts: tuple[Any, ...], mode: str) -> None:
    assert balance_mode(tiny_cfg("faster", *opts, "MODEL.DISTILL.BALANCE.MODE", "auto")) == mode
    for fixed in ("none", "gradient") if opts else ():
        assert balance_mode(tiny_cfg("faster", *opts, "MODEL.DISTILL.BALANCE.MODE", fixed)) == fixed
