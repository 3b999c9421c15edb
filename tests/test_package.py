"""Importing the package."""

import subprocess
import sys

import pytest

ANCHORS = """
import {package}
import torch
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator

generator = DefaultAnchorGenerator(sizes=[[32]], aspect_ratios=[[1.0]], strides=[8])
generator([torch.zeros(1, 1, 2, 2)])
"""


def warnings_of(package: str, *options: str) -> str:
    code = ANCHORS.format(package=package)
    done = subprocess.run([sys.executable, *options, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.mark.long
@pytest.mark.e2e
def test_detectron2s_meshgrid_warning_does_not_reach_the_user() -> None:
    assert "meshgrid" not in warnings_of("distill")
    assert "meshgrid" in warnings_of("detectron2")
    assert "meshgrid" in warnings_of("distill", "-W", "default::UserWarning")
