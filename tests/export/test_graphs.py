"""Graphs repeat detectron2's own inference, for images of any size, in a traced file."""

from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.layers import batched_nms
from torch import nn

from distill.errors import ConfigError
from distill.export.graphs import (
    GRAPHS,
    Graph,
    MeanGrid,
    build_graph,
    class_nms,
    divided,
    exportable,
    largest,
    register,
)
from tests.support.cases import for_each
from tests.support.exports import ASPP, PSP, confident, exported, parity_of, without_resizing
from tests.support.networks import FAMILIES, tiny_cfg, tiny_model

NETWORKS = {family: (family, ()) for family in FAMILIES}
NETWORKS |= {"pspnet": ("semantic", PSP), "deeplabv3": ("semantic", ASPP)}
QUICK = ("atss", "rtmdet", "yolox", "semantic", "pspnet")
CASES = [
    pytest.param(*case, id=name, marks=() if name in QUICK else pytest.mark.slow)
    for name, case in NETWORKS.items()
]


@pytest.mark.parametrize("family, opts", CASES)
def test_a_traced_file_predicts_what_its_network_does(
    family: str, opts: tuple[Any, ...], tmp_path: Path
) -> None:
    model = confident(family, *opts)
    files = exported(model, without_resizing(tiny_cfg(family, *opts)), tmp_path)
    parity = parity_of(model, files)
    assert not parity.faults and parity.images == 2
    assert parity.detections > 30 or family == "semantic"
    assert parity.excused == 0
    assert (parity.raw, parity.box) <= (1e-5, 1e-3)


@pytest.mark.slow
@for_each("family", ["retinanet", "mask", "rtmdet_ins", "panoptic"])
def test_an_image_without_objects_has_no_detections(family: str, tmp_path: Path) -> None:
    model: Any = confident(family)
    owner = model.roi_heads.box_predictor if hasattr(model, "roi_heads") else model
    owner.test_score_thresh = 1.0
    files = exported(model, without_resizing(tiny_cfg(family)), tmp_path)
    parity = parity_of(model, files)
    assert not parity.faults and parity.detections == 0


def test_one_detection(tmp_path: Path) -> None:
    model: Any = confident("atss")
    model.max_detections_per_image = 1
    files = exported(model, without_resizing(tiny_cfg("atss")), tmp_path)
    parity = parity_of(model, files)
    assert not parity.faults and parity.detections == 4  # two of them in extreme shapes


@pytest.mark.slow
@for_each("family, final", [("atss", True), ("rtmdet", True), ("mask", True), ("atss", False)])
def test_a_fixed_size_and_normalization_outside(family: str, final: bool, tmp_path: Path) -> None:
    model = confident(family)
    cfg = without_resizing(tiny_cfg(family))
    files = exported(model, cfg, tmp_path, size=(128, 160), normalizes=False, final=final)
    parity = parity_of(model, files)
    assert not parity.faults
    assert (parity.detections > 30) == final


def test_raw_outputs_have_the_names_of_their_levels() -> None:
    graph = build_graph(tiny_model("fcos", training=False), with_final=False)
    values = graph.values(torch.zeros(1, 3, 64, 64), torch.tensor([64, 64]))
    strides = (4, 8, 16, 32, 64)
    assert list(values) == [f"{x}_s{s}" for x in ("logits", "deltas", "quality") for s in strides]
    assert values["logits_s8"].shape == (1, 3, 8, 8)


def test_a_users_own_architecture_can_have_a_graph() -> None:
    class Own(nn.Module):
        pass

    with pytest.raises(ConfigError, match=r"Own has no graph .* distill\.export\.graphs\.register"):
        build_graph(Own())

    @register
    class OwnGraph(Graph):
        architecture = Own

    try:
        assert isinstance(build_graph(Own()), OwnGraph)
    finally:
        GRAPHS.remove(OwnGraph)


@for_each(
    "module, part, message",
    [
        ("roi_heads", "keypoint_on", "MODEL.KEYPOINT_ON is True"),
        ("roi_heads", "mask_head", "MODEL.ROI_MASK_HEAD.NAME Identity .* MaskRCNNConvUpsampleHead"),
        ("", "roi_heads", "MODEL.ROI_HEADS.NAME Identity .* StandardROIHeads"),
        ("", "proposal_generator", "MODEL.PROPOSAL_GENERATOR.NAME Identity .* an RPN"),
    ],
)
def test_parts_without_a_graph_are_refused(module: str, part: str, message: str) -> None:
    model = tiny_model("mask", training=False)
    setattr(model.get_submodule(module), part, part == "keypoint_on" or nn.Identity())
    with pytest.raises(ConfigError, match=message):
        build_graph(model)


def test_nms_is_torchvisions_batched_nms() -> None:
    g = torch.Generator().manual_seed(0)
    corners = torch.rand(300, 2, generator=g) * 100
    boxes = torch.cat([corners, corners + 5 + 40 * torch.rand(300, 2, generator=g)], 1)
    scores, classes = torch.rand(300, generator=g), torch.randint(3, (300,), generator=g)
    kept = class_nms(boxes, scores, classes, 0.5)
    assert torch.equal(kept, batched_nms(boxes, scores, classes, 0.5))
    assert 50 < len(kept) < 290
    assert len(class_nms(boxes[:0], scores[:0], classes[:0], 0.5)) == 0
    assert class_nms(boxes[:1], scores[:1], classes[:1], 0.5).tolist() == [0]


def test_the_largest_values_are_as_many_as_asked_for() -> None:
    values, index = largest(torch.tensor([1.0, 3.0, 2.0]), 5)
    assert values.tolist() == [3, 2, 1, -torch.inf, -torch.inf]
    assert index[:3].tolist() == [1, 2, 0] and index[3:].min() >= 3
    assert largest(torch.tensor([]), 2)[0].tolist() == [-torch.inf] * 2


def test_rows_and_columns() -> None:
    rows, columns = divided(torch.tensor([0, 4, 11]), 4)
    assert rows.tolist() == [0, 1, 2] and columns.tolist() == [0, 0, 3]


@for_each("size, shape", [(1, (5, 7)), (2, (6, 4)), (3, (7, 8)), (6, (4, 13)), (6, (6, 6))])
def test_a_grid_of_means_is_adaptive_pooling(size: int, shape: tuple[int, int]) -> None:
    x = torch.randn(2, 3, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(MeanGrid(size)(x), nn.AdaptiveAvgPool2d(size)(x))


def test_the_network_itself_is_not_changed() -> None:
    model = tiny_model("semantic", *PSP, training=False)
    before = [type(x) for x in model.modules()]
    copy = exportable(model)
    assert [type(x) for x in model.modules()] == before
    assert any(isinstance(x, MeanGrid) for x in copy.modules())
    assert not any(x.requires_grad for x in copy.parameters())
