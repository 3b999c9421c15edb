"""Detections of a teacher in a file: who reads them, what is refused, how they follow an image."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.config import CfgNode
from detectron2.data import transforms as T
from detectron2.structures import Boxes, Instances
from PIL import Image

from distill import cli
from distill.analysis.visualize import find_image
from distill.config import validate_config
from distill.config.resume import training_values
from distill.data.augment.labels import read_labels
from distill.data.augment.transforms import Place
from distill.data.datasets import load_training_sets
from distill.data.detection_file import hidden
from distill.data.detections import DetectionsMapper, Found, with_added
from distill.data.loader import build_train_loader
from distill.data.registration import register_own_sets
from distill.engine.trainer import train_mapper
from distill.errors import ConfigError, DataError
from distill.utils.seeding import private_randomness
from tests.support.cases import for_each
from tests.support.networks import CLASSES, tiny_cfg, write_config
from tests.support.onnx_files import write_onnx
from tests.support.trainings import Shapes, trainable_cfg

pytestmark = pytest.mark.usefixtures("catalogues")

WIDTH, HEIGHT = 64, 48
KEY = "MODEL.DISTILL.TEACHER"
# Image, class, box. Image 2 is not annotated, and image 1 has a crowd.
OBJECTS = ((0, "square", [10, 10, 20, 16]), (1, "star", [2, 2, 12, 12]))
CROWD = [30, 20, 30, 25]


def own_set(
    folder: Path, name: str = "own", order: tuple[str, ...] = CLASSES, first: int = 5
) -> tuple[str, str, str]:
    """Write three images of noise and COCO's annotations, whose ids begin with ``first``."""
    root = folder / name
    root.mkdir()
    for k in range(3):
        noise = np.random.default_rng(k).integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)
        Image.fromarray(noise).save(root / f"{k}.png")
    size = {"width": WIDTH, "height": HEIGHT}
    rows = [(image, order.index(c), box, 0) for image, c, box in OBJECTS] + [(1, 0, CROWD, 1)]
    content = {
        "images": [{"id": first + k, "file_name": f"{k}.png", **size} for k in range(3)],
        "annotations": [
            {"id": k, "image_id": first + image, "category_id": 10 + c, "bbox": b, "iscrowd": crowd}
            for k, (image, c, b, crowd) in enumerate(rows, 1)
        ],
        "categories": [{"id": 10 + k, "name": x} for k, x in enumerate(order)],
    }
    (root / "own.json").write_text(json.dumps(content))
    return name, str(root / "own.json"), str(root)


def detection(image: Any, category: Any, box: Any, score: Any = 0.75) -> dict[str, Any]:
    return {"image_id": image, "category_id": category, "bbox": box, "score": score}


RESULTS = [
    detection(5, 11, [11, 11, 19, 15]),  # the annotated square
    detection(5, 12, [40, 4, 12, 12], 0.25),
    detection(6, 10, [32, 22, 20, 20]),  # in the crowd
    detection(7, 10, [20, 20, 30, 20]),
]
NAMED: dict[str, Any] = {
    "images": [{"id": 1, "file_name": "own/0.png"}, {"id": 2, "file_name": "own/2.png"}],
    "categories": [{"id": 1, "name": "star"}, {"id": 2, "name": "circle"}],
    "annotations": [detection(1, 1, [40, 4, 12, 12], 0.25), detection(2, 2, [20, 20, 30, 20])],
}


def config(
    folder: Path, content: Any, *opts: Any, sets: Any = None, family: str = "faster"
) -> CfgNode:
    """A config with a file of detections; its data are written if ``sets`` is None."""
    path = folder / "found.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    sets = sets or [own_set(folder)]
    names = tuple(x[0] for x in sets)
    keys = ("DATASETS.COCO_FORMAT", tuple(sets), "DATASETS.TRAIN", names)
    keys += ("DATALOADER.FILTER_EMPTY_ANNOTATIONS", False, "INPUT.MIN_SIZE_TRAIN", (HEIGHT,))
    keys += ("DATALOADER.NUM_WORKERS", 0, "SOLVER.IMS_PER_BATCH", 1)
    cfg = tiny_cfg(family, *keys, f"{KEY}.DETECTIONS", str(path), *opts)
    register_own_sets(cfg)
    return cfg


def attached(cfg: CfgNode) -> dict[str, Found]:
    """The detections of each training image, by the name of its file."""
    entries = [x for _, dicts in load_training_sets(cfg) for x in dicts]
    return {Path(x["file_name"]).name: x["detections"] for x in entries}


# ---- The file.


def test_results_follow_their_images(tmp_path: Path) -> None:
    found = attached(config(tmp_path, RESULTS))
    assert found["0.png"].boxes.tolist() == [[11, 11, 30, 26], [40, 4, 52, 16]]
    assert found["0.png"].classes.tolist() == [1, 2]
    assert found["0.png"].scores.tolist() == [0.75, 0.25]
    assert found["2.png"].classes.tolist() == [0]
    assert len(found["1.png"].boxes) == 0  # the network sees no crowd


def test_images_and_categories_by_name(tmp_path: Path) -> None:
    found = attached(config(tmp_path, NAMED))
    assert found["0.png"].classes.tolist() == [2] and found["2.png"].classes.tolist() == [0]


def test_a_category_by_name_in_a_list(tmp_path: Path) -> None:
    content = [{**RESULTS[0], "category_id": "circle", "image_id": 7.0}]  # some write floats
    assert attached(config(tmp_path, content))["2.png"].classes.tolist() == [0]


def test_classes_of_a_second_set_are_matched_by_name(tmp_path: Path) -> None:
    sets = [own_set(tmp_path), own_set(tmp_path, "other", CLASSES[::-1], first=50)]
    cfg = config(tmp_path, [detection(50, 10, [1, 1, 9, 9]), *RESULTS], sets=sets)
    (_, first), (_, second) = load_training_sets(cfg)
    assert first[0]["detections"].classes.tolist() == [1, 2]
    assert second[0]["detections"].classes.tolist() == [2]  # id 10 is a star there
    entry = find_image(cfg, "other/0.png")
    assert entry["detections"].classes.tolist() == [2]


@pytest.mark.parametrize("content", [[], {"annotations": []}])
def test_no_detection(content: Any, tmp_path: Path) -> None:
    assert all(len(x.boxes) == 0 for x in attached(config(tmp_path, content)).values())


ONE = detection(5, 10, [1, 1, 9, 9])
WRONG: list[tuple[Any, str]] = [
    ([{**ONE, "image_id": 99}], r"1 of its 1 images are in no data set of DATASETS\.TRAIN: 99"),
    ([{**ONE, "category_id": 99}], "no category 99 in DATASETS.TRAIN, which has"),
    ([{**ONE, "category_id": "cirle"}], "no category 'cirle' in .* which has circle"),
    ([{**ONE, "score": 1.5}], r"detection 0 has the score 1\.5, which must be in \[0, 1\]"),
    ([{**ONE, "score": None}], "has the score None"),
    ([ONE, {**ONE, "bbox": [1, 2, 3]}], "detection 1 needs a bbox of four finite numbers"),
    ([{**ONE, "bbox": [1, 2, 3, "4"]}], "needs a bbox"),
    ("[{}]", "needs an image_id and a category_id"),
    ("[3]", "detection 0 is no object"),
    ('[{"image_id": 5, "category_id": 10, "score": 1, "bbox": [NaN, 1, 2, 3]}]', "needs a bbox"),
    ([{**ONE, "bbox": [0.1, 0.2, 0.5, 0.5]}], "its boxes are fractions"),
    ("{}", "it is no list of detections"),
    ("[", "is not valid JSON"),
    ("[" * 100_000, "is not valid JSON"),
    ({**NAMED, "categories": [{"id": 1}]}, "its 'categories' is no list of objects with 'id'"),
    ({**NAMED, "images": 3}, "its 'images' is no list"),
    ({**NAMED, "categories": NAMED["categories"][:1]}, "category_id 2, which its categories lack"),
    (
        {**NAMED, "images": [{"id": 1, "file_name": "x/0.png"}, NAMED["images"][1]]},
        r"1 of its 2 images are in no data set of DATASETS\.TRAIN: x/0\.png",
    ),
]


@pytest.mark.parametrize(("content", "words"), WRONG)
def test_wrong_files(content: Any, words: str, tmp_path: Path) -> None:
    cfg = config(tmp_path, content)
    with pytest.raises(DataError, match=words) as error:
        load_training_sets(cfg)
    message = str(error.value)
    assert message.startswith(f"{KEY}.DETECTIONS '") and "\n" not in message


def test_an_id_of_two_images_is_refused(tmp_path: Path) -> None:
    sets = [own_set(tmp_path), own_set(tmp_path, "other")]
    cfg = config(tmp_path, RESULTS, sets=sets)
    with pytest.raises(DataError, match=r"image '5' is in several training sets .*; name"):
        load_training_sets(cfg)


def test_a_missing_file(tmp_path: Path) -> None:
    cfg = config(tmp_path, [])
    cfg.MODEL.DISTILL.TEACHER.DETECTIONS = "none.json"
    with pytest.raises(DataError, match=r"DETECTIONS 'none\.json': it cannot be opened"):
        load_training_sets(cfg)


def test_a_box_is_hidden_by_half() -> None:
    boxes = np.array([[0, 0, 10, 10], [4, 0, 14, 10], [6, 0, 16, 10], [5, 5, 5, 5]], np.float32)
    crowd = {"bbox": [0, 0, 9, 20], "bbox_mode": 1, "iscrowd": 1}
    assert hidden(boxes, [crowd]).tolist() == [True, True, False, False]
    assert not hidden(boxes, [{**crowd, "iscrowd": 0}]).any()


# ---- Samples.


def found_of(*boxes: Any, scores: Any = None, classes: Any = None) -> Found:
    number = len(boxes)
    return Found(
        np.array(boxes, np.float32).reshape(-1, 4),
        np.array([1.0] * number if scores is None else scores, np.float32),
        np.array([0] * number if classes is None else classes, np.int64),
    )


def truth_of(*boxes: Any) -> Instances:
    number = len(boxes)
    truth = Instances((100, 100), gt_boxes=Boxes(torch.tensor(boxes).view(-1, 4).float()))
    truth.gt_classes = torch.ones(number, dtype=torch.long)
    return truth


def test_boxes_are_added_with_their_scores_as_probabilities() -> None:
    corners = np.stack(np.meshgrid(np.arange(0, 2000, 20), np.arange(0, 800, 20)), -1).reshape(
        -1, 2
    )
    boxes = np.concatenate([corners, corners + 10], 1)
    scores = np.where(boxes[:, 0] < 1000, 0.3, 0.9)
    found = found_of(*boxes, scores=scores).instances((1000, 3000))
    truth = Instances((1000, 3000), **truth_of().get_fields())
    with private_randomness(0):
        added = with_added(truth, found, 0.1).gt_boxes.tensor[:, 0]
    shares = [(added < 1000).sum() / 2000, (added >= 1000).sum() / 2000]
    assert shares == pytest.approx([0.3, 0.9], abs=0.03)


@for_each(
    "other, added",
    [
        ([10, 10, 30, 20], 0),  # IoU 1/2
        ([10, 10, 30, 19.8], 1),
        ([60, 60, 70, 70], 1),
    ],
)
def test_an_annotated_object_is_not_added(other: Any, added: int) -> None:
    found = found_of(other, classes=[2]).instances((100, 100))
    new = with_added(truth_of([10, 10, 30, 30]), found, 0.5)
    assert len(new) == 1 + added and new.gt_classes.tolist() == [1, 2][: 1 + added]


def test_boxes_of_small_scores_are_not_added() -> None:
    found = found_of([1, 1, 9, 9], scores=[0.49]).instances((100, 100))
    with private_randomness(0):
        assert not any(len(with_added(truth_of(), found, 0.5)) for _ in range(50))


def test_a_detection_outside_of_its_image_is_left_out() -> None:
    found = found_of([-9, 0, 5, 5], [200, 0, 300, 9], [3, 3, 3, 9]).instances((100, 100))
    assert found.pred_boxes.tensor.tolist() == [[0, 0, 5, 5]]


def test_the_mapper_moves_them_as_the_objects(tmp_path: Path) -> None:
    cfg = config(tmp_path, RESULTS)
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN = (2 * HEIGHT,), 10 * WIDTH
    mapper = train_mapper(cfg)
    assert isinstance(mapper, DetectionsMapper)
    (_, dicts), *_ = load_training_sets(cfg)
    mapper.augmentations.augs[:] = [
        T.Resize((2 * HEIGHT, 2 * WIDTH)),
        T.RandomFlip(1.0),
    ]
    sample = mapper(dicts[0])
    found, truth = sample["detections"], sample["instances"]
    assert found.pred_boxes.tensor.tolist() == [[68, 22, 106, 52], [24, 8, 48, 32]]
    assert found.scores.tolist() == [0.75, 0.25] and found.image_size == (96, 128)
    assert truth.gt_boxes.tensor.tolist() == [[68, 20, 108, 52]]
    assert len(mapper(dicts[1])["detections"]) == 0
    assert len(mapper(dicts[2])["instances"]) == 0  # ADD_BOXES is 0


def test_without_the_key_nothing_changes(tmp_path: Path) -> None:
    """Images, objects and draws are those of detectron2's mapper, also with the key."""
    plain = config(tmp_path, [])
    plain.MODEL.DISTILL.TEACHER.DETECTIONS = ""
    given = plain.clone()
    given.MODEL.DISTILL.TEACHER.DETECTIONS = str(tmp_path / "found.json")
    (tmp_path / "found.json").write_text(json.dumps(RESULTS))
    samples = []
    for cfg in (plain, given):
        loader = build_train_loader(cfg, load_training_sets(cfg), train_mapper(cfg), seed=3)
        samples.append([x for _, (x,) in zip(range(6), loader)])
    for a, b in zip(*samples):
        assert "detections" not in a and "detections" in b
        assert torch.equal(a["image"], b["image"])
        assert torch.equal(a["instances"].gt_boxes.tensor, b["instances"].gt_boxes.tensor)


AUGMENTED: dict[str, tuple[Any, ...]] = {
    "detectron2's": (),
    "mosaic": ("INPUT.AUGMENT.STEPS", ("mosaic", "affine", "mixup", "flip")),
    "jitter": ("INPUT.AUGMENT.STEPS", ("jitter", "flip")),
}


@pytest.mark.parametrize("name", AUGMENTED)
def test_a_copy_of_the_objects_moves_with_them(name: str, tmp_path: Path) -> None:
    """Detections that are the annotated boxes stay so in every augmentation."""
    content = [detection(5 + image, 10 + CLASSES.index(c), box, 0.5) for image, c, box in OBJECTS]
    opts = ("INPUT.AUGMENT.SIZE", [64, 64], *AUGMENTED[name])
    cfg = config(tmp_path, content, *opts)
    loader = build_train_loader(cfg, load_training_sets(cfg), train_mapper(cfg), seed=1)
    seen = 0
    for _, (x,) in zip(range(12), loader):
        found, truth = x["detections"], x["instances"]
        assert torch.allclose(found.pred_boxes.tensor, truth.gt_boxes.tensor, atol=1e-4)
        assert torch.equal(found.pred_classes, truth.gt_classes)
        seen += len(found)
    assert seen > 5


@pytest.mark.parametrize("name", AUGMENTED)
def test_added_boxes_are_a_function_of_seed_and_position(name: str, tmp_path: Path) -> None:
    opts = ("INPUT.AUGMENT.SIZE", [64, 64], *AUGMENTED[name], f"{KEY}.ADD_BOXES", 0.1)
    cfg = config(tmp_path, RESULTS, *opts)
    sets = load_training_sets(cfg)

    def boxes(seed: int, start: int = 0) -> list[Any]:
        loader = build_train_loader(cfg, sets, train_mapper(cfg), seed=seed, start=start)
        found = [x["instances"].gt_boxes.tensor.tolist() for _, (x,) in zip(range(8), loader)]
        return [*[None] * start, *found]

    first = boxes(1)
    assert first == boxes(1) and first[3:] == boxes(1, start=3)[3:8]
    assert first != boxes(2) and any(first)


def test_masks_of_the_objects_stay_theirs() -> None:
    polygon = [float(x) for x in (4, 4, 20, 4, 20, 20, 4, 20)]
    row = {"bbox": [4, 4, 20, 20], "bbox_mode": 0, "category_id": 1, "segmentation": [polygon]}
    found = found_of([30, 10, 40, 30], scores=[0.5], classes=[2])
    labels = read_labels([row], (HEIGHT, WIDTH), True, found)
    moved = labels.moved(Place(5, 3, (HEIGHT, WIDTH), 0), (HEIGHT, WIDTH))
    truth = moved.instances((HEIGHT, WIDTH), "polygon")
    assert len(truth.gt_masks) == 1 and truth.gt_boxes.tensor.tolist() == [[9, 7, 25, 23]]
    assert moved.detections.boxes.tolist() == [[35, 13, 45, 33]]
    assert moved.detections.classes.tolist() == [2]
    assert len(read_labels([row], (HEIGHT, WIDTH), True).detections.boxes) == 0


# ---- Configs.


@pytest.mark.parametrize(
    ("opts", "words"),
    [
        ((), r"which nothing reads; set .*ADD_BOXES above 0, or INSTANCES teacher"),
        ((f"{KEY}.ADD_BOXES", 0.5, f"{KEY}.DETECTIONS", ""), "ADD_BOXES is 0.5, but .* is empty"),
        ((f"{KEY}.ADD_BOXES", 0.5, "MODEL.MASK_ON", True), "adds boxes only, but MODEL.MASK_ON"),
        ((f"{KEY}.ADD_BOXES", 1.5), r"ADD_BOXES is 1\.5; it must be in \[0, 1\]"),
    ],
)
def test_wrong_keys(opts: Any, words: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=words):
        validate_config(config(tmp_path, RESULTS, *opts))


def test_a_semantic_student_has_no_boxes(tmp_path: Path) -> None:
    cfg = config(tmp_path, RESULTS, f"{KEY}.ADD_BOXES", 0.5, family="semantic")
    with pytest.raises(ConfigError, match="but a SemanticSegmentor has no boxes; empty it"):
        validate_config(cfg)


def test_a_resume_compares_the_content(tmp_path: Path) -> None:
    name = f"{KEY}.DETECTIONS"
    cfg = config(tmp_path, RESULTS)
    before = training_values(cfg)[name]
    cfg.MODEL.DISTILL.TEACHER.DETECTIONS = str(tmp_path / "moved.json")
    (tmp_path / "found.json").rename(tmp_path / "moved.json")
    assert training_values(cfg)[name] == before
    (tmp_path / "moved.json").write_text("[]")
    assert training_values(cfg)[name] != before


# ---- Trainings.


def shapes_results(shapes: Shapes) -> list[dict[str, Any]]:
    """The annotated boxes as detections, and a further one in each image."""
    content = json.loads(Path(shapes[1]).read_text())
    rows = [detection(x["image_id"], x["category_id"], x["bbox"]) for x in content["annotations"]]
    kind = content["categories"][0]["id"]
    return rows + [detection(x["id"], kind, [0, 0, 9, 9], 0.9) for x in content["images"]]


@pytest.mark.e2e
@pytest.mark.slow
def test_a_student_trains_with_added_boxes_and_no_head(
    shapes: Shapes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Such a teacher needs no network. An unknown image ends the command with one line."""
    path = tmp_path / "found.json"
    path.write_text(json.dumps(shapes_results(shapes)))
    keys = ("SOLVER.MAX_ITER", 2, f"{KEY}.DETECTIONS", str(path), f"{KEY}.ADD_BOXES", 0.3)
    cfg = trainable_cfg("retinanet", shapes, tmp_path / "out", *keys)
    file = str(write_config(cfg, tmp_path / "config.yaml"))
    assert cli.main(["train", "--config-file", file]) == 0
    assert (tmp_path / "out" / "model_final.pth").exists()
    path.write_text(json.dumps([detection(12345, 1, [0, 0, 9, 9])]))
    capsys.readouterr()
    assert cli.main(["train", "--config-file", file, "OUTPUT_DIR", str(tmp_path / "x")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {KEY}.DETECTIONS '") and "12345" in line


@pytest.mark.e2e
@pytest.mark.slow
def test_features_of_a_network_are_compared_at_detections_of_a_file(
    shapes: Shapes, tmp_path: Path
) -> None:
    """The network has no detections; training resumes with the content of the file only."""
    path = tmp_path / "found.json"
    path.write_text(json.dumps(shapes_results(shapes)))
    network = write_onnx(tmp_path / "teacher.onnx")
    keys = (
        "SOLVER.MAX_ITER",
        2,
        f"{KEY}.DETECTIONS",
        str(path),
        f"{KEY}.CONFIG_FILE",
        str(network),
    )
    keys += (f"{KEY}.OPTS", ["MODEL.ONNX.LEVELS", [["fine", 8]]])
    keys += ("MODEL.DISTILL.HEADS", ("FGD",), "MODEL.DISTILL.FGD.INSTANCES", "teacher")
    keys += ("INPUT.AUGMENT.STEPS", ("mosaic", "jitter"), "INPUT.AUGMENT.SIZE", [64, 64])
    cfg = trainable_cfg("retinanet", shapes, tmp_path / "out", *keys)
    file = str(write_config(cfg, tmp_path / "config.yaml"))
    assert cli.main(["train", "--config-file", file]) == 0
    lines = (tmp_path / "out" / "metrics.json").read_text().splitlines()
    assert json.loads(lines[-1])["loss_fgd/p3"] > 0
    path.write_text("[]")
    again = ["train", "--config-file", file, "--resume", "SOLVER.MAX_ITER", "3"]
    assert cli.main(again) == 2
