"""A file that differs from its network is not kept, except for what rounding errors decide."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from distill.errors import ConfigError
from distill.export import main, writer
from distill.export.main import Options, export
from distill.export.parity import (
    Limits,
    Parity,
    ParityError,
    categories_of,
    compare_predictions,
    disagreement,
    ious,
    is_excused,
    mask_iou,
    matched,
    undecided_pixels,
)
from distill.export.runner import Prediction, Predictor
from distill.export.writer import Exported
from distill.utils.progress import Progress
from tests.support.cases import for_each
from tests.support.exports import (
    confident,
    exported,
    parity_of,
    scene,
    scenes,
    without_resizing,
)
from tests.support.networks import tiny_cfg, tiny_model

INFO = {"score_threshold": 0.05, "nms_threshold": 0.5, "max_detections": 100}


def predicted(boxes: Any, scores: Any, classes: Any = None) -> Prediction:
    boxes = np.array(boxes, np.float32).reshape(-1, 4)
    classes = np.zeros(len(boxes), np.int64) if classes is None else np.array(classes)
    return Prediction((100, 100), boxes, np.array(scores, np.float64), classes)


def compared(truth: Prediction, found: Prediction, info: Any = INFO) -> Parity:
    parity = Parity()
    compare_predictions(truth, found, info, (100, 100), parity)
    return parity


A, B = [10, 10, 50, 50], [60, 60, 90, 90]


def test_disagreement_is_relative_to_the_element_or_the_map() -> None:
    expected = np.array([100.0, 1.0, 0.0, 0.0])  # root mean square 50
    assert disagreement(expected + [0.01, 0, 0, 0], expected) == pytest.approx(1e-4)
    assert disagreement(expected + [0, 0, 0.05, 0], expected) == pytest.approx(1e-3, rel=1e-3)
    assert disagreement(expected[:2], expected) == np.inf
    assert disagreement(expected[:0], expected[:0]) == 0
    assert disagreement(np.zeros(3), np.zeros(3)) == 0
    assert not disagreement(np.array([np.nan, 1]), np.array([1.0, 1])) <= 1


@for_each(
    "found, pairs, agrees",
    [
        (predicted([A, B], [0.9, 0.8]), 2, True),
        (predicted([B, A], [0.8, 0.9]), 2, True),  # the order does not matter
        (predicted([[10.09, 10, 50, 50], B], [0.9, 0.80009]), 2, True),
        (predicted([[10.2, 10, 50, 50], B], [0.9, 0.8]), 1, False),
        (predicted([A, B], [0.9, 0.7998]), 1, False),
        (predicted([A, B], [0.9, 0.8], [0, 1]), 1, False),
        (predicted([A], [0.9]), 1, False),
        (predicted([], []), 0, False),
        (predicted([A, A, B], [0.9, 0.9, 0.8]), 2, False),
    ],
)
def test_detections_agree_one_to_one(found: Prediction, pairs: int, agrees: bool) -> None:
    truth = predicted([A, B], [0.9, 0.8])
    parity = compared(truth, found)
    assert parity.detections == len(matched(truth, found)) == pairs
    assert (not parity.faults) == agrees
    if not agrees:
        with pytest.raises(ParityError, match=r"only the (network|file) has a detection of class"):
            parity.check()


def test_no_detections_agree() -> None:
    parity = compared(predicted([], []), predicted([], []))
    parity.check()
    assert (parity.detections, parity.excused) == (0, 0)


# B overlaps A with an IoU of 0.5, up to 1e-5.
HALF = [10, 10, 50, 30.0002]


@for_each(
    "k, own, other, excused",
    [
        (1, predicted([A, B], [0.9, 0.05005]), predicted([A], [0.9]), True),
        (1, predicted([A, B], [0.9, 0.06]), predicted([A], [0.9]), False),
        (1, predicted([A, HALF], [0.9, 0.6]), predicted([A], [0.9]), True),
        (1, predicted([A, HALF], [0.9, 0.6], [0, 1]), predicted([A], [0.9]), False),
        (1, predicted([A, [10, 10, 50, 32]], [0.9, 0.6]), predicted([A], [0.9]), False),
        (0, predicted([A, HALF], [0.9, 0.6]), predicted([HALF], [0.6]), False),
    ],
)
def test_only_what_is_near_a_threshold_is_excused(
    k: int, own: Prediction, other: Prediction, excused: bool
) -> None:
    limits = Limits.from_info(INFO, 1.0)
    assert is_excused(own, k, other, predicted([], []), limits) == excused


def test_the_last_of_a_full_list_is_excused() -> None:
    truth, found = predicted([A, B], [0.9, 0.3]), predicted([A, [0, 0, 9, 9]], [0.9, 0.30005])
    assert len(compared(truth, found).faults) == 2
    full = compared(truth, found, {**INFO, "max_detections": 2})
    assert not full.faults and full.excused == 2


def test_a_box_that_an_excused_one_removes_is_excused() -> None:
    near = [10, 10, 50, 31]  # removed by HALF, which only the file has
    truth = predicted([A, near], [0.9, 0.3])
    found = predicted([A, HALF], [0.9, 0.6])
    parity = compared(truth, found)
    assert not parity.faults and parity.excused == 2


def test_masks_and_pixels_agree() -> None:
    truth, found = predicted([A], [0.9]), predicted([A], [0.9])
    truth.masks, found.masks = np.zeros((2, 1, 100, 100), bool)
    truth.masks[0, 10:50, 10:50] = found.masks[0, 10:50, 10:50] = True
    truth.sem_seg = np.zeros((2, 100, 100))
    found.sem_seg = truth.sem_seg.copy()
    assert not compared(truth, found).faults
    found.masks[0, 10, 10:13] = False
    found.sem_seg[1, :1, :11] = 1
    parity = compared(truth, found)
    assert parity.mask_iou == pytest.approx(1 - 3 / 1600) and parity.pixels == 0.9989
    assert len(parity.faults) == 2


def test_pixels_near_the_threshold_of_a_mask_are_not_compared() -> None:
    grid = np.zeros((1, 4, 4), np.float32)
    grid[0, 0, 0], grid[0, 1, 1] = 0.5 + 5e-5, 0.6
    outputs = {"boxes": np.array([[0, 0, 4, 4]], np.float32), "scores": np.ones(1)}
    outputs |= {"classes": np.zeros(1, np.int64), "roi_masks": grid}
    undecided = undecided_pixels(outputs, (4, 4), (4, 4), INFO)
    assert undecided is not None and undecided.nonzero() == (0, 0, 0)
    truth, found = predicted([[0, 0, 4, 4]], [1.0]), predicted([[0, 0, 4, 4]], [1.0])
    truth.masks, found.masks = grid > 0.55, grid > 0.5
    parity = Parity()
    compare_predictions(truth, found, INFO, (100, 100), parity, undecided)
    assert parity.mask_iou == 1
    assert compared(truth, found).mask_iou == 0.5
    assert undecided_pixels({}, (4, 4), (4, 4), INFO) is None


def test_segments_are_compared_by_category() -> None:
    truth = predicted([], [])
    truth.segments = np.array([[1, 1, 2, 0]])
    truth.segments_info = [
        {"id": 1, "isthing": True, "category_id": 3},
        {"id": 2, "isthing": False, "category_id": 3},
    ]
    found = categories_of(truth)
    assert found is not None and found.tolist() == [[6, 6, 7, -1]]


def test_ious() -> None:
    assert ious(np.array(A), np.array([A, B, HALF])).tolist() == pytest.approx(
        [1, 0, 0.5], abs=1e-5
    )
    empty = np.zeros((2, 2), bool)
    assert mask_iou(empty, empty) == 1 and mask_iou(empty, ~empty) == 0


# ---- The gate.


def broken(files: tuple[Exported, Exported], name: str, change: Any) -> tuple[Exported, Exported]:
    """Return files that return another value for an output."""

    def spoil(file: Exported) -> Exported:
        def run(feed: Any) -> Any:
            outputs = dict(file.run(feed))
            if name in outputs:
                outputs[name] = change(outputs[name])
            return outputs

        return file._replace(run=run)

    return spoil(files[0]), spoil(files[1])


@pytest.mark.slow
def test_every_output_is_compared(tmp_path: Path) -> None:
    model = confident("atss")
    files = exported(model, without_resizing(tiny_cfg("atss")), tmp_path)
    for name in ("logits_s8", "quality_s64", "boxes", "scores", "classes"):
        change = (lambda x: 1 - x) if name == "classes" else (lambda x: x * 1.002)
        faults = parity_of(model, broken(files, name, change), scenes()[:1]).faults
        assert faults and all((name in x) == ("_s" in name) for x in faults), name
    missing = broken(files, "boxes", lambda x: x + [0, 0, 0.2, 0])
    with pytest.raises(ParityError, match="differs from its network, so it is not kept"):
        parity_of(model, missing, scenes()[:1]).check()


def test_a_file_for_one_shape_only_is_found(tmp_path: Path) -> None:
    """As an exporter writes it that takes a single row of a level for a constant."""
    model = confident("semantic")
    full, kept = exported(model, without_resizing(tiny_cfg("semantic")), tmp_path)
    assert full.info["coarsest_stride"] == 64

    def run(feed: Any) -> Any:
        if feed["image"].shape[2] > 128:
            raise RuntimeError("dimensions must match: 5 and 1")
        return full.run(feed)

    faults = parity_of(model, (full._replace(run=run), kept)).faults
    assert faults == [
        "the file fails for an input of 256 x 64 pixels: dimensions must match: 5 and 1"
    ]


@pytest.mark.slow
def test_proposals_and_masks_are_compared(tmp_path: Path) -> None:
    model = confident("mask")
    files = exported(model, without_resizing(tiny_cfg("mask")), tmp_path)
    for name, change in (
        ("objectness_s8", lambda x: x * 1.001),
        ("proposals", lambda x: x + np.float32(3)),
        ("proposal_scores", lambda x: x * 1.001),
        ("roi_masks", lambda x: 1 - x),
    ):
        assert parity_of(model, broken(files, name, change), scenes()[:1]).faults, name


@pytest.mark.slow
def test_a_file_is_kept_only_if_it_agrees(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = confident("atss")
    scene(0, 60, 90).save(tmp_path / "image.png")
    files, out = [str(tmp_path / "image.png")], tmp_path / "out" / "student.ts"
    cfg = without_resizing(tiny_cfg("atss"))
    with Progress() as progress:
        parity = export(cfg, model, out, files, Options("torchscript"), progress)
        assert parity.images == 1 and parity.detections > 10
        out.unlink()

        def other_weights(network: nn.Module) -> nn.Module:
            copy: Any = writer_exportable(network)
            torch.nn.init.constant_(copy.head.cls_score.bias, 0.3)
            return copy

        writer_exportable = main.exportable
        monkeypatch.setattr(main, "exportable", other_weights)
        with pytest.raises(ParityError, match="logits_s4 differs by"):
            export(cfg, model, out, files, Options("torchscript"), progress)
    assert list(out.parent.iterdir()) == []


@for_each(
    "size, message",
    [
        ((64, 48), "--size 48x64 does not fit: the network's input has sides that are multiples"),
        ((64, 64), ""),
    ],
)
def test_sizes_that_do_not_fit_are_refused(size: tuple[int, int], message: str) -> None:
    graph = main.build_graph(confident("atss"))
    if not message:
        assert writer.export_info(tiny_cfg("atss"), graph, size)["size"] == [64, 64]
        return
    with pytest.raises(ConfigError, match=message):
        writer.export_info(tiny_cfg("atss"), graph, size)


def test_a_square_network_has_a_fixed_size() -> None:
    square = "MODEL.CSPNEXT.SQUARE_PAD", 64, "MODEL.CSPNEXT.WIDTH", 0.125
    opts = *square, "MODEL.BACKBONE.NAME", "build_cspnext_pafpn_backbone"
    graph = main.build_graph(tiny_model("rtmdet", *opts, training=False))
    assert writer.export_info(tiny_cfg("rtmdet", *opts), graph, None)["size"] == [64, 64]
    with pytest.raises(ConfigError, match="input is 64x64"):
        writer.export_info(tiny_cfg("rtmdet", *opts), graph, (96, 96))


def test_an_operator_that_a_format_lacks_is_named() -> None:
    cause = RuntimeError("No function for <OpOverload(op='torchvision.deform_conv2d')>")
    lacking = pytest.raises(
        ConfigError, match=r"operator torchvision\.deform_conv2d; use the other"
    )
    with lacking, writer.refusing("onnx"):
        raise torch.onnx.OnnxExporterError("failed") from cause
    missing = pytest.raises(ConfigError, match="needs the package onnxslim: pip install")
    with missing, writer.refusing("onnx"):
        raise ModuleNotFoundError("No module named 'onnxslim'", name="onnxslim")


def test_metadata_are_read_from_the_file(tmp_path: Path) -> None:
    model = confident("semantic")
    _, kept = exported(model, tiny_cfg("semantic"), tmp_path)
    assert kept.info["architecture"] == "SemanticSegmentor" and kept.info["size"] is None
    assert "boxes" not in kept.info["outputs"]
    prediction = Predictor(*kept)(scene(0, 64, 64))
    assert prediction.sem_seg is not None and prediction.sem_seg.shape == (4, 64, 64)
    (tmp_path / "other.ts").write_bytes(b"no network")
    with pytest.raises(writer.ExportError, match="was not written by `distill export`"):
        writer.load(tmp_path / "other.ts")
