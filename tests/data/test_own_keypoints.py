"""Test keypoints of annotation files in COCO's format, whose names are the user's own."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.detection_utils import create_keypoint_hflip_indices
from detectron2.structures import Boxes, Instances
from PIL import Image

from distill.config import validate_config
from distill.data.datasets import find_issues, load_training_sets
from distill.data.registration import register_own_sets
from distill.engine.evaluators import build_evaluators, check_test_sets
from distill.errors import DataError
from distill.launch.main import main
from tests.support.networks import distill_opts, tiny_cfg, write_config
from tests.support.trainings import trainable_cfg, write_teacher

SIZE = 64
NAMES = ["nose", "left_eye", "right_eye"]
POINTS = [20, 12, 2, 30, 20, 2, 14, 20, 1]
ON = ("MODEL.KEYPOINT_ON", True, "MODEL.ROI_HEADS.NUM_CLASSES", 2)
THREE = ("MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS", 3, "TEST.KEYPOINT_OKS_SIGMAS", [0.05] * 3)


def content() -> dict[str, Any]:
    """Return three images with an animal, and in the last one also a thing without keypoints."""
    box = {"bbox": [10, 8, 30, 40], "area": 1200, "iscrowd": 0}
    size = {"height": SIZE, "width": SIZE}
    animals = [
        {"id": k, "image_id": k, "category_id": 1, **box, "keypoints": POINTS} for k in (1, 2, 3)
    ]
    return {
        "images": [{"id": k, "file_name": f"{k}.png", **size} for k in (1, 2, 3)],
        "annotations": [*animals, {"id": 4, "image_id": 3, "category_id": 2, **box}],
        "categories": [
            {"id": 1, "name": "animal", "keypoints": NAMES, "skeleton": [[1, 2], [1, 3], [9, 1]]},
            {"id": 2, "name": "thing"},
        ],
    }


def write(folder: Path, kind: str, own: dict[str, Any]) -> tuple[str, str, str]:
    images = folder / "images"
    images.mkdir(exist_ok=True)
    for k in (1, 2, 3):
        Image.new("RGB", (SIZE, SIZE), (90, 60 * k, 70)).save(images / f"{k}.png")
    path = folder / f"{kind}.json"
    path.write_text(json.dumps(own))
    return f"{folder.name}_{kind}", str(path), str(images)


def config(folder: Path, train: dict[str, Any], test: dict[str, Any], *opts: Any) -> CfgNode:
    """Return the config of a registered training set and test set."""
    cfg = tiny_cfg("faster", *ON, *THREE, *opts)
    triples = write(folder, "train", train), write(folder, "test", test)
    cfg.DATASETS.COCO_FORMAT = triples
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ((x[0],) for x in triples)
    register_own_sets(cfg)
    validate_config(cfg)
    return cfg


def test_names_sides_and_skeleton_are_registered(tmp_path: Path) -> None:
    cfg = config(tmp_path, content(), content())
    ((name, dicts),) = load_training_sets(cfg)
    metadata = MetadataCatalog.get(name)
    assert metadata.keypoint_names == tuple(NAMES)
    assert metadata.keypoint_flip_map == (("left_eye", "right_eye"),)
    assert create_keypoint_hflip_indices(name) == [0, 2, 1]
    edges = [(a, b) for a, b, _ in metadata.keypoint_connection_rules]
    assert edges == [("nose", "left_eye"), ("nose", "right_eye")]
    assert dicts[2]["annotations"][1]["keypoints"][2::3] == [0, 0, 0]  # the thing
    assert dicts[0]["annotations"][0]["keypoints"][:3] == [20.5, 12.5, 2]  # as detectron2


def test_names_without_sides_are_not_swapped(tmp_path: Path) -> None:
    own = content()
    own["categories"][0]["keypoints"] = ["a", "b", "left"]
    ((name, _),) = load_training_sets(config(tmp_path, own, own))
    assert MetadataCatalog.get(name).keypoint_flip_map == ()
    assert create_keypoint_hflip_indices(name) == [0, 1, 2]


def test_a_perfect_model_has_all_keypoints(tmp_path: Path) -> None:
    cfg = config(tmp_path, content(), content(), "OUTPUT_DIR", str(tmp_path))
    load_training_sets(cfg)
    check_test_sets(cfg)
    (name,) = cfg.DATASETS.TEST
    (evaluator,) = build_evaluators(cfg, name, str(tmp_path))
    evaluator.reset()
    for entry in DatasetCatalog.get(name):
        found = Instances((SIZE, SIZE))
        found.pred_boxes = Boxes(torch.tensor([[10.0, 8.0, 40.0, 48.0]]))
        found.scores, found.pred_classes = torch.tensor([0.9]), torch.tensor([0])
        points = torch.tensor(POINTS).float().reshape(1, 3, 3)
        found.pred_keypoints = points + torch.tensor([0.5, 0.5, 0])
        evaluator.process([entry], [{"instances": found}])
    assert evaluator.evaluate()["keypoints"]["AP"] == pytest.approx(100)


def rename(own: dict[str, Any]) -> None:
    own["categories"][1]["keypoints"] = ["nose", "tail", "ear"]


def repeat(own: dict[str, Any]) -> None:
    own["categories"][0]["keypoints"] = ["nose", "nose", "ear"]


def add(own: dict[str, Any]) -> None:
    own["categories"][0]["keypoints"] = [*NAMES, "tail"]
    for annotation in own["annotations"][:3]:
        annotation["keypoints"] = [*POINTS, 1, 1, 2]


def shorten(own: dict[str, Any]) -> None:
    own["annotations"][1]["keypoints"] = POINTS[:6]


def leave_out(own: dict[str, Any]) -> None:
    del own["categories"][0]["keypoints"]


def number(own: dict[str, Any]) -> None:
    own["categories"][0]["keypoints"] = 3


@pytest.mark.parametrize(
    "spoil, words",
    [
        (rename, "categories 'animal' and 'thing' have different keypoints"),
        (repeat, "category 'animal' has the keypoint 'nose' twice; rename one"),
        (add, "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS is 3, but its categories have 4 keypoints"),
        (shorten, "(annotation 2): its keypoints are 6 numbers, not 9"),
        (leave_out, "MODEL.KEYPOINT_ON is True, but no category has keypoints"),
        (number, "category 'animal' has keypoints 3, which is not a list of names"),
    ],
)
def test_keypoints_that_cannot_be_learnt(spoil: Any, words: str, tmp_path: Path) -> None:
    """They are refused in training and test sets, and `check-data` lists them."""
    wrong = content()
    spoil(wrong)
    cfg = config(tmp_path, wrong, wrong)
    for check in (load_training_sets, check_test_sets):
        with pytest.raises(DataError) as stopped:
            check(cfg)
        assert words in str(stopped.value) and "\n" not in str(stopped.value)
    assert any(words.split(": ")[-1] in x.detail for x in find_issues(cfg, cfg.DATASETS.TEST[0])[0])
    cfg.MODEL.KEYPOINT_ON = False
    register_own_sets(cfg)
    load_training_sets(cfg)
    check_test_sets(cfg)


def test_sets_with_other_keypoints(tmp_path: Path) -> None:
    other = content()
    other["categories"][0]["keypoints"] = NAMES[::-1]
    cfg = config(tmp_path, content(), other)
    load_training_sets(cfg)
    with pytest.raises(DataError, match=r"unlike DATASETS.TRAIN '.*_train', 'nose', 'left_eye'"):
        check_test_sets(cfg)
    cfg.DATASETS.TRAIN = (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST)
    with pytest.raises(DataError, match="it has the keypoints 'right_eye', 'left_eye', 'nose'"):
        load_training_sets(cfg)


@pytest.mark.slow
@pytest.mark.e2e
def test_keypoints_are_distilled_and_evaluated(tmp_path: Path) -> None:
    triple = write(tmp_path, "train", content())
    network = (*ON, *THREE[:2], "MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS", (16,))
    opts = [*network, *THREE[2:], "DATASETS.TEST", (triple[0],), "SOLVER.MAX_ITER", 2]
    opts += [*distill_opts("faster", ["PKD"]), *write_teacher(tmp_path, "faster", *network)]
    cfg = trainable_cfg("faster", triple, tmp_path / "out", *opts)
    arguments = ["--config-file", str(write_config(cfg, tmp_path / "config.yaml"))]
    assert main(arguments) == 0
    rows = [json.loads(x) for x in (tmp_path / "out" / "metrics.json").read_text().splitlines()]
    assert any("keypoints/AP" in row for row in rows)
    assert any({"loss_keypoint", "loss_pkd/p2"} <= {*row} for row in rows)
    DatasetCatalog.remove(triple[0])  # an evaluation does not need the training set
    MetadataCatalog.remove(triple[0])
    test = write(tmp_path, "test", content())
    arguments += ["DATASETS.COCO_FORMAT", str((triple, test)), "DATASETS.TEST", f"('{test[0]}',)"]
    weights = ["MODEL.WEIGHTS", str(tmp_path / "out" / "model_final.pth")]
    assert main(["--eval-only", *arguments, *weights]) == 0
