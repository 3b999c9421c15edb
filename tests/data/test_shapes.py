"""Test the scenes of shapes, and read each layout with its loaders and evaluators."""

import ast
import glob
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from cityscapesscripts.preparation.json2instanceImg import json2instanceImg
from cityscapesscripts.preparation.json2labelImg import json2labelImg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets.cityscapes import (
    load_cityscapes_instances,
    load_cityscapes_semantic,
)
from detectron2.data.datasets.coco import load_coco_json
from detectron2.data.datasets.pascal_voc import load_voc_instances, register_pascal_voc
from detectron2.evaluation import (
    CityscapesInstanceEvaluator,
    CityscapesSemSegEvaluator,
    PascalVOCDetectionEvaluator,
)
from detectron2.structures import Boxes, BoxMode, Instances
from PIL import Image
from pycocotools import mask as mask_util
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from distill import cli
from distill.data.shapes import (
    CITYSCAPES_THINGS,
    CLASSES,
    KITTI_CLASSES,
    KITTI_FOLD,
    LAYOUTS,
    STUFF_CLASSES,
    VOC_NAMES,
    SceneConfig,
    iter_scenes,
    make_scene,
    mask_to_box,
    write_cityscapes,
    write_coco,
    write_kitti,
    write_voc,
)
from distill.data.shapes.polygons import mask_to_pixel_outlines, mask_to_polygons

REPOSITORY = Path(__file__).parents[2]
NUM_SCENES = 24
SCENES = list(iter_scenes("val", NUM_SCENES))


def read(path):
    return np.asarray(Image.open(path))


def same_scene(a, b):
    return (
        np.array_equal(a.image, b.image)
        and a.classes == b.classes
        and np.array_equal(a.masks, b.masks)
        and np.array_equal(a.stuff, b.stuff)
    )


@pytest.fixture(scope="module", params=list(LAYOUTS))
def layout(request):
    return request.param


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Write the first scenes of the split val in each layout."""
    root = tmp_path_factory.mktemp("data sets")
    for name, write in LAYOUTS.items():
        write(root / name, "val", NUM_SCENES)
    return root


# ---------------------------------------------------------------------------- scenes


def test_a_scene_depends_on_seed_split_and_index_only():
    assert same_scene(make_scene("val", 5), SCENES[5])
    assert same_scene(list(iter_scenes("val", 3))[2], SCENES[2])
    for other in (make_scene("train", 5), make_scene("val", 6), make_scene("val", 5, seed=1)):
        assert not same_scene(other, SCENES[5])


def test_masks_are_disjoint_without_holes_and_visible_enough():
    config = SceneConfig()
    for scene in SCENES:
        assert 1 <= len(scene.classes) <= config.max_objects
        assert np.sum(scene.masks, axis=0).max() == 1
        for mask, full, outside in zip(
            scene.masks, scene.full_masks, scene.truncations, strict=True
        ):
            assert not (mask & ~full).any()
            assert mask.sum() >= config.min_area
            assert mask.sum() >= config.min_visible * full.sum() / (1 - outside) - 1e-6
            mask_to_polygons(mask)  # raises an error for holes
            assert len(mask_to_pixel_outlines(full)) == 1


def test_boxes_are_tight():
    for scene in SCENES:
        assert scene.boxes.shape == (len(scene.classes), 4)
        for box, mask in zip(scene.boxes, scene.masks, strict=True):
            x0, y0, x1, y1 = box.astype(int)
            assert mask.sum() == mask[y0:y1, x0:x1].sum()
            inside = mask[y0:y1, x0:x1]
            assert inside[0].any() and inside[-1].any()
            assert inside[:, 0].any() and inside[:, -1].any()


def test_semantic_labels_agree_with_the_masks():
    for scene in SCENES:
        for class_id in range(len(CLASSES)):
            masks = [m for m, c in zip(scene.masks, scene.classes, strict=True) if c == class_id]
            expected = np.any(masks, axis=0) if masks else np.zeros(scene.stuff.shape, bool)
            assert np.array_equal(scene.semantic == class_id, expected)
        background = scene.semantic >= len(CLASSES)
        assert np.array_equal(scene.semantic[background] - len(CLASSES), scene.stuff[background])


def test_scenes_vary():
    scenes = list(iter_scenes("train", 150))
    visible = np.array([v for scene in scenes for v in scene.visible_fractions])
    outside = np.array([t for scene in scenes for t in scene.truncations])
    counts = np.bincount([c for scene in scenes for c in scene.classes], minlength=len(CLASSES))
    assert 0.1 < (visible < 0.95).mean() < 0.5
    assert 0.05 < (outside > 0.05).mean() < 0.5
    assert counts.min() > 0.5 * counts.mean()
    assert {len(scene.classes) for scene in scenes} == {1, 2, 3, 4, 5, 6}
    stuff = np.bincount(np.concatenate([scene.stuff.ravel() for scene in scenes]))
    assert (stuff > 0.02 * stuff.sum()).all() and len(stuff) == len(STUFF_CLASSES)


def test_colour_does_not_determine_the_class():
    """The mean colour of a class is that of all objects, up to its sampling error."""
    colors = [
        (c, scene.image[mask].mean(axis=0))
        for scene in iter_scenes("train", 150)
        for c, mask in zip(scene.classes, scene.masks, strict=True)
    ]
    everything = np.array([color for _, color in colors])
    for class_id in range(len(CLASSES)):
        group = np.array([color for c, color in colors if c == class_id])
        error = everything.std(axis=0) / np.sqrt(len(group))
        assert (np.abs(group.mean(axis=0) - everything.mean(axis=0)) < 4 * error).all()


def test_config_sets_size_and_number():
    config = SceneConfig(height=64, width=160, min_objects=2, max_objects=2, max_size=0.4)
    for scene in iter_scenes("val", 5, config=config):
        assert scene.image.shape == (64, 160, 3) and scene.image.dtype == np.uint8
        assert len(scene.classes) == 2
        assert (scene.boxes[:, 2:] - scene.boxes[:, :2]).max() <= 0.4 * 64 + 1


@pytest.mark.parametrize(
    "wrong",
    [
        {"height": 8},
        {"min_objects": 0},
        {"min_objects": 7},
        {"min_size": 0.6},
        {"max_size": 1.5},
        {"min_visible": 1.0},
        {"min_area": 10_000},
    ],
)
def test_config_refuses(wrong):
    with pytest.raises(ValueError):
        SceneConfig(**wrong)


def test_shapes_need_no_deep_learning():
    folder = REPOSITORY / "projects/distill/data"
    for path in [*folder.glob("shapes*.py"), *folder.glob("shapes_io/*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module]
            assert not {"torch", "detectron2"} & {name.split(".")[0] for name in names}, path


# ---------------------------------------------------------------------------- polygons


def rasterise(polygons, height, width):
    return mask_util.decode(mask_util.merge(mask_util.frPyObjects(polygons, height, width))).astype(
        bool
    )


def test_polygons_of_pieces_that_touch_at_corners():
    mask = np.array([[1, 0, 0, 0], [0, 1, 1, 1], [1, 1, 0, 1], [0, 1, 1, 0]], dtype=bool)
    polygons = mask_to_polygons(mask)
    assert len(polygons) == 2  # the ring is open only at a corner, and has no hole
    assert np.array_equal(rasterise(polygons, 4, 4), mask)


def test_polygon_of_a_rectangle_by_hand():
    mask = np.zeros((5, 6), dtype=bool)
    mask[1:3, 2:6] = True
    assert mask_to_polygons(mask) == [[2, 1, 6, 1, 6, 3, 2, 3]]
    assert mask_to_box(mask) == (2, 1, 6, 3)


def test_a_hole_is_refused():
    mask = np.ones((3, 3), dtype=bool)
    mask[1, 1] = False
    with pytest.raises(ValueError, match="hole"):
        mask_to_polygons(mask)


# ---------------------------------------------------------------------------- COCO


def test_coco_is_read_by_detectron2(data):
    root = data / "coco"
    dicts = load_coco_json(str(root / "annotations/instances_val.json"), str(root / "images/val"))
    assert len(dicts) == NUM_SCENES
    for record, scene in zip(dicts, SCENES, strict=True):
        height, width = scene.stuff.shape
        assert (record["height"], record["width"]) == (height, width)
        difference = read(record["file_name"]).astype(int) - scene.image
        assert np.abs(difference).mean() < 12  # JPEG halves the resolution of colours
        annotations = record["annotations"]
        assert [a["category_id"] for a in annotations] == [c + 1 for c in scene.classes]
        for annotation, box, mask in zip(annotations, scene.boxes, scene.masks, strict=True):
            xyxy = BoxMode.convert(annotation["bbox"], annotation["bbox_mode"], BoxMode.XYXY_ABS)
            assert np.array_equal(xyxy, box)
            assert np.array_equal(rasterise(annotation["segmentation"], height, width), mask)


def test_coco_evaluator_gives_100_on_the_ground_truth(data):
    truth = COCO(str(data / "coco/annotations/instances_val.json"))
    assert [c["name"] for c in truth.loadCats(truth.getCatIds())] == list(CLASSES)
    # Area and crowd flags are not given: loadRes computes them from the segmentation.
    predictions = [
        {
            "image_id": a["image_id"],
            "category_id": a["category_id"],
            "segmentation": truth.annToRLE(a),
            "score": 1.0,
        }
        for a in truth.dataset["annotations"]
    ]
    results = truth.loadRes(predictions)
    for kind in ("bbox", "segm"):
        evaluation = COCOeval(truth, results, kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
        assert evaluation.stats[0] == pytest.approx(1.0)
    areas = {a["id"]: a["area"] for a in results.dataset["annotations"]}
    assert areas == {a["id"]: a["area"] for a in truth.dataset["annotations"]}


def test_coco_semantic_and_panoptic_labels(data):
    root = data / "coco"
    panoptic = json.loads((root / "annotations/panoptic_val.json").read_text())
    assert len(panoptic["categories"]) == len(CLASSES + STUFF_CLASSES)
    for annotation, scene in zip(panoptic["annotations"], SCENES, strict=True):
        name = annotation["file_name"]
        assert np.array_equal(read(root / "semantic_val" / name), scene.semantic)
        expected = np.where(scene.semantic < len(CLASSES), 0, scene.stuff + 1)
        assert np.array_equal(read(root / "stuff_val" / name), expected)
        ids = read(root / "panoptic_val" / name).astype(int) @ (1, 256, 65536)
        segments = annotation["segments_info"]
        assert sorted(s["id"] for s in segments) == np.unique(ids).tolist()
        for segment in segments:
            mask = ids == segment["id"]
            assert (scene.semantic[mask] == segment["category_id"] - 1).all()
            assert mask.sum() == segment["area"]


# ---------------------------------------------------------------------------- Cityscapes


def cityscapes_files(data, ending):
    return sorted(glob.glob(str(data / f"cityscapes/gtFine/val/*/*_gtFine_{ending}")))


@pytest.mark.e2e
@pytest.mark.parametrize("from_json", [False, True])
def test_cityscapes_instances_are_read_by_detectron2(data, from_json):
    root = data / "cityscapes"
    dicts = load_cityscapes_instances(
        str(root / "leftImg8bit/val"), str(root / "gtFine/val"), from_json, to_polygons=from_json
    )
    assert len(dicts) == NUM_SCENES
    for record, scene in zip(sorted(dicts, key=lambda d: d["file_name"]), SCENES, strict=True):
        assert np.array_equal(read(record["file_name"]), scene.image)
        annotations = record["annotations"]
        assert sorted(a["category_id"] for a in annotations) == sorted(scene.classes)
        # The loader's order is that of the ids, or from the nearest object for the json file.
        order = np.argsort(scene.classes, kind="stable") if not from_json else range(-1, -9, -1)
        for annotation, index in zip(annotations, order, strict=False):
            assert annotation["category_id"] == scene.classes[index]
            x0, y0, x1, y1 = annotation["bbox"]
            if from_json:  # detectron2 makes Shapely's outlines half a pixel larger
                assert np.abs(np.array([x0, y0, x1, y1]) - scene.boxes[index]).max() <= 1
            else:
                assert np.array_equal([x0, y0, x1 + 1, y1 + 1], scene.boxes[index])
                mask = mask_util.decode(annotation["segmentation"])
                assert np.array_equal(mask, scene.masks[index])


def test_cityscapes_semantic_is_read_by_detectron2(data):
    root = data / "cityscapes"
    dicts = load_cityscapes_semantic(str(root / "leftImg8bit/val"), str(root / "gtFine/val"))
    train_ids = {label.name: label.train_id for label in CITYSCAPES_THINGS}
    by_name = sorted(dicts, key=lambda d: d["file_name"])
    for record, scene in zip(by_name, SCENES, strict=True):
        labels = read(record["sem_seg_file_name"])
        for class_id, mask in zip(scene.classes, scene.masks, strict=True):
            assert (labels[mask] == train_ids[CITYSCAPES_THINGS[class_id].name]).all()
        assert 255 not in labels


def test_cityscapes_label_images_are_those_of_cityscapesscripts(data, tmp_path):
    drawn = tmp_path / "drawn.png"
    for path in cityscapes_files(data, "polygons.json"):
        for encoding, ending in (("ids", "labelIds"), ("trainIds", "labelTrainIds")):
            json2labelImg(path, str(drawn), encoding)
            assert np.array_equal(read(drawn), read(path.replace("polygons.json", f"{ending}.png")))
        json2instanceImg(path, str(drawn), "ids")
        assert np.array_equal(read(drawn), read(path.replace("polygons.json", "instanceIds.png")))


@pytest.fixture
def cityscapes_metadata(data):
    name = "shapes_test_cityscapes"
    yield MetadataCatalog.get(name).set(
        name=name,
        gt_dir=str(data / "cityscapes/gtFine/val"),
        thing_classes=[label.name for label in CITYSCAPES_THINGS],
    )
    MetadataCatalog.remove(name)


def test_cityscapes_instance_evaluator_gives_100_on_the_ground_truth(
    data, cityscapes_metadata, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)  # the script writes matches.json to the working directory
    evaluator = CityscapesInstanceEvaluator(cityscapes_metadata.name)
    evaluator.reset()
    for index, scene in enumerate(SCENES):
        instances = Instances(scene.stuff.shape)
        instances.pred_classes = torch.tensor(scene.classes)
        instances.pred_masks = torch.from_numpy(np.stack(scene.masks))
        instances.scores = torch.linspace(0.5, 1, len(scene.classes))
        file_name = f"val_{index:06d}_000000_leftImg8bit.png"
        evaluator.process([{"file_name": file_name}], [{"instances": instances}])
    assert evaluator.evaluate()["segm"] == pytest.approx({"AP": 100, "AP50": 100})


def test_cityscapes_semantic_evaluator_gives_100_on_the_ground_truth(data, cityscapes_metadata):
    evaluator = CityscapesSemSegEvaluator(cityscapes_metadata.name)
    evaluator.reset()
    for index, path in enumerate(cityscapes_files(data, "labelTrainIds.png")):
        labels = torch.from_numpy(read(path).astype(np.int64))
        scores = torch.nn.functional.one_hot(labels, 19).permute(2, 0, 1)
        file_name = f"val_{index:06d}_000000_leftImg8bit.png"
        evaluator.process([{"file_name": file_name}], [{"sem_seg": scores}])
    results = evaluator.evaluate()["sem_seg"]
    assert results["IoU"] == pytest.approx(100) and results["iIoU"] == pytest.approx(100)


# ---------------------------------------------------------------------------- VOC


def test_voc_is_read_by_detectron2(data):
    dicts = load_voc_instances(str(data / "voc"), "val", VOC_NAMES)
    assert len(load_voc_instances(str(data / "voc"), "trainval", VOC_NAMES)) == NUM_SCENES
    for record, scene in zip(dicts, SCENES, strict=True):
        assert read(record["file_name"]).shape == scene.image.shape
        assert [a["category_id"] for a in record["annotations"]] == scene.classes
        assert np.array_equal([a["bbox"] for a in record["annotations"]], scene.boxes)
        classes = read(data / f"voc/SegmentationClass/{record['image_id']}.png")
        objects = read(data / f"voc/SegmentationObject/{record['image_id']}.png")
        for index, (class_id, mask) in enumerate(zip(scene.classes, scene.masks, strict=True)):
            assert np.array_equal(objects == index + 1, mask)
            assert (classes[mask] == class_id + 1).all()
        assert ((classes == 0) == (objects == 0)).all()


def test_voc_palette_starts_with_vocs_colours(data):
    image = Image.open(next((data / "voc/SegmentationClass").iterdir()))
    assert image.mode == "P"
    assert image.getpalette()[:12] == [0, 0, 0, 128, 0, 0, 0, 128, 0, 128, 128, 0]


def test_voc_evaluator_gives_100_on_the_ground_truth(data):
    name = "shapes_test_voc"
    register_pascal_voc(name, str(data / "voc"), "val", 2007, VOC_NAMES)
    try:
        evaluator = PascalVOCDetectionEvaluator(name)
        evaluator.reset()
        for index, scene in enumerate(SCENES):
            instances = Instances(scene.stuff.shape)
            instances.pred_boxes = Boxes(torch.from_numpy(scene.boxes))
            instances.scores = torch.ones(len(scene.classes))
            instances.pred_classes = torch.tensor(scene.classes)
            evaluator.process([{"image_id": f"val_{index:06d}"}], [{"instances": instances}])
        assert evaluator.evaluate()["bbox"]["AP"] == pytest.approx(100)
    finally:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


# ---------------------------------------------------------------------------- KITTI


def test_kitti_labels(data):
    ids = (data / "kitti/ImageSets/val.txt").read_text().split()
    assert ids[:2] == ["100000", "100001"] and len(ids) == NUM_SCENES
    names, levels = set(), set()
    for image_id, scene in zip(ids, SCENES, strict=True):
        assert np.array_equal(read(data / f"kitti/training/image_2/{image_id}.png"), scene.image)
        text = (data / f"kitti/training/label_2/{image_id}.txt").read_text()
        rows = [line.split() for line in text.splitlines()]
        left = {tuple(box): CLASSES[c] for box, c in zip(scene.boxes, scene.classes, strict=True)}
        for row in rows:
            assert len(row) == 15
            shape = left.pop(tuple(float(value) for value in row[4:8]))
            assert row[0] in ("DontCare", KITTI_FOLD[shape])
            assert [float(v) for v in row[8:]] == [-1, -1, -1, -1000, -1000, -1000, -10]
            assert row[0] != "DontCare" or row[1:4] == ["-1", "-1", "-10"]
            names.add(row[0])
            levels.add(int(row[2]))
        assert not left
    assert names == {*KITTI_CLASSES, "DontCare"}
    assert levels == {-1, 0, 1, 2}


def test_kitti_refuses_an_unknown_split(tmp_path):
    with pytest.raises(ValueError, match="train, val, test"):
        write_kitti(tmp_path, "minival", 1)


# ---------------------------------------------------------------------------- publishing


def contents(root):
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in root.rglob("*")
        if path.is_file() and ".shapes" not in path.parts
    }


def test_a_larger_split_starts_with_the_same_files(layout, tmp_path):
    for count in (2, 4):
        LAYOUTS[layout](tmp_path / str(count), "train", count)
    small, large = contents(tmp_path / "2"), contents(tmp_path / "4")
    files = [name for name in small if name.endswith((".png", ".jpg", ".xml"))]
    assert files and all(large[name] == small[name] for name in files)


def test_a_split_is_kept_or_refused_or_overwritten(layout, tmp_path):
    write = LAYOUTS[layout]
    write(tmp_path, "train", 3)
    write(tmp_path, "val", 2)
    before = contents(tmp_path)
    calls = []
    write(tmp_path, "train", 3, progress=lambda: calls.append(1))
    assert not calls  # nothing is rendered again
    for settings in ({"num_scenes": 2}, {"num_scenes": 3, "seed": 1}):
        with pytest.raises(FileExistsError, match="other settings"):
            write(tmp_path, "train", **settings)
    assert contents(tmp_path) == before
    write(tmp_path, "train", 2, overwrite=True)
    write(tmp_path / "fresh", "train", 2)
    write(tmp_path / "fresh", "val", 2)
    fresh = contents(tmp_path / "fresh")
    assert {k: v for k, v in contents(tmp_path).items() if not k.startswith("fresh")} == fresh


def test_an_interrupted_call_leaves_nothing(layout, tmp_path):
    def interrupt():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        LAYOUTS[layout](tmp_path, "train", 2, progress=interrupt)
    assert contents(tmp_path) == {}
    LAYOUTS[layout](tmp_path, "train", 2)


def test_a_half_moved_split_is_written_again(tmp_path):
    write_coco(tmp_path, "train", 2)
    before = contents(tmp_path)
    marker = tmp_path / ".shapes/coco-train.json"
    marker.write_text(json.dumps({**json.loads(marker.read_text()), "complete": False}))
    (tmp_path / "annotations/instances_train.json").unlink()
    write_coco(tmp_path, "train", 2)
    assert contents(tmp_path) == before


def test_files_from_another_source_are_never_replaced(tmp_path):
    foreign = tmp_path / "training/image_2/000000.png"
    foreign.parent.mkdir(parents=True)
    foreign.write_bytes(b"real data")
    with pytest.raises(FileExistsError, match="from another source"):
        write_kitti(tmp_path, "train", 1, overwrite=True)
    assert foreign.read_bytes() == b"real data"


@pytest.mark.parametrize(
    ("write", "arguments", "message"),
    [
        (write_coco, ("a/b", 1), "letters and digits"),
        (write_cityscapes, ("a_b", 1), "letters and digits"),
        (write_voc, ("val", 0), "at least one scene"),
        (write_kitti, ("val", 1, -1), "negative"),
    ],
)
def test_writers_refuse(write, arguments, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        write(tmp_path, *arguments)


# ---------------------------------------------------------------------------- command line


def test_command_writes_all_layouts(tmp_path):
    arguments = ["--layout", "all", "--train", "2", "--val", "1", "--size", "96x64"]
    assert cli.main(["shapes", *arguments, "--out", str(tmp_path)]) == 0
    assert {path.name for path in tmp_path.iterdir()} == set(LAYOUTS)
    assert read(tmp_path / "coco/images/train/000000000001.jpg").shape == (64, 96, 3)


@pytest.mark.parametrize(
    "arguments",
    [["--train", "-1"], ["--train", "0", "--val", "0"], ["--size", "16"], ["--max-objects", "0"]],
)
def test_command_ends_with_one_line(arguments, tmp_path, capsys):
    assert cli.main(["shapes", *arguments, "--out", str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")


def test_command_refuses_to_replace(tmp_path, capsys):
    arguments = ["--out", str(tmp_path), "--train", "1", "--val", "0"]
    assert cli.main(["shapes", *arguments]) == 0
    assert cli.main(["shapes", *arguments]) == 0
    assert cli.main(["shapes", *arguments, "--seed", "1"]) == 2
    assert "other settings" in capsys.readouterr().err
    assert cli.main(["shapes", *arguments, "--seed", "1", "--overwrite"]) == 0
