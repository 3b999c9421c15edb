"""Tests of the package, in the folders of the package; what they share is in tests/support."""

import os

import pytest

pytest.register_assert_rewrite("tests.support")
# Set before torch is imported, and inherited by the processes that tests start. Threads of busy
# cores wait for each other up to 100 times longer than the work takes.
os.environ["OMP_NUM_THREADS"] = "1"
# Data sets in layouts that are known by name are in ./datasets.
os.environ.pop("DETECTRON2_DATASETS", None)
