"""Every key of detectron2 is read, refused or explained: none is accepted and then ignored."""

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from distill.config import validate_config
from distill.config.detectron2_rules import UNREAD, leaves
from distill.config.validate import check_values
from distill.data.datasets import load_training_sets
from distill.engine import Trainer
from distill.engine.evaluators import check_test_sets
from distill.errors import ConfigError, DataError
from tests.support.cases import for_each
from tests.support.networks import distill_opts, tiny_cfg
from tests.support.trainings import Shapes, trainable_cfg, write_teacher

DEFAULTS = dict(leaves(get_cfg()))
# Keys by the module that reads them and by section. Many are read by one network only.
READ: dict[str, dict[str, str]] = {
    "detectron2.data.dataset_mapper": {
        "MODEL": "MASK_ON KEYPOINT_ON",
        "INPUT.CROP": "ENABLED TYPE SIZE",
        "INPUT": "FORMAT MASK_FORMAT",
    },
    "detectron2.data.detection_utils": {
        "INPUT": (
            "MIN_SIZE_TRAIN MIN_SIZE_TRAIN_SAMPLING MAX_SIZE_TRAIN MIN_SIZE_TEST "
            "MAX_SIZE_TEST RANDOM_FLIP"
        ),
    },
    "detectron2.engine.defaults": {
        "SOLVER": "REFERENCE_WORLD_SIZE",
        "TEST.PRECISE_BN": "ENABLED NUM_ITER",
        "": "CUDNN_BENCHMARK FLOAT32_PRECISION",
    },
    "detectron2.modeling.anchor_generator": {
        "MODEL.ANCHOR_GENERATOR": "NAME SIZES ASPECT_RATIOS ANGLES OFFSET",
    },
    "detectron2.modeling.backbone.build": {
        "MODEL.BACKBONE": "NAME",
    },
    "detectron2.modeling.backbone.fpn": {
        "MODEL.FPN": "IN_FEATURES OUT_CHANNELS NORM FUSE_TYPE",
    },
    "detectron2.modeling.backbone.resnet": {
        "MODEL.BACKBONE": "FREEZE_AT",
        "MODEL.RESNETS": (
            "DEPTH OUT_FEATURES NUM_GROUPS NORM WIDTH_PER_GROUP STRIDE_IN_1X1 "
            "RES5_DILATION RES2_OUT_CHANNELS STEM_OUT_CHANNELS DEFORM_ON_PER_STAGE "
            "DEFORM_MODULATED DEFORM_NUM_GROUPS"
        ),
    },
    "detectron2.modeling.meta_arch.build": {
        "MODEL": "META_ARCHITECTURE",
    },
    "detectron2.modeling.meta_arch.panoptic_fpn": {
        "MODEL.PANOPTIC_FPN": "INSTANCE_LOSS_WEIGHT",
        "MODEL.PANOPTIC_FPN.COMBINE": (
            "ENABLED OVERLAP_THRESH STUFF_AREA_LIMIT INSTANCES_CONFIDENCE_THRESH"
        ),
    },
    "detectron2.modeling.meta_arch.rcnn": {
        "MODEL": "PIXEL_MEAN PIXEL_STD",
        "": "VIS_PERIOD",
    },
    "detectron2.modeling.meta_arch.retinanet": {
        "MODEL.RETINANET": (
            "NUM_CLASSES IN_FEATURES NUM_CONVS IOU_THRESHOLDS IOU_LABELS PRIOR_PROB "
            "SCORE_THRESH_TEST TOPK_CANDIDATES_TEST NMS_THRESH_TEST BBOX_REG_WEIGHTS "
            "FOCAL_LOSS_GAMMA FOCAL_LOSS_ALPHA SMOOTH_L1_LOSS_BETA BBOX_REG_LOSS_TYPE "
            "NORM"
        ),
    },
    "detectron2.modeling.meta_arch.semantic_seg": {
        "MODEL.SEM_SEG_HEAD": (
            "NAME IN_FEATURES IGNORE_VALUE NUM_CLASSES CONVS_DIM COMMON_STRIDE NORM LOSS_WEIGHT"
        ),
    },
    "detectron2.modeling.proposal_generator.build": {
        "MODEL.PROPOSAL_GENERATOR": "NAME",
    },
    "detectron2.modeling.proposal_generator.rpn": {
        "MODEL.PROPOSAL_GENERATOR": "MIN_SIZE",
        "MODEL.RPN": (
            "HEAD_NAME IN_FEATURES BOUNDARY_THRESH IOU_THRESHOLDS IOU_LABELS "
            "BATCH_SIZE_PER_IMAGE POSITIVE_FRACTION BBOX_REG_LOSS_TYPE "
            "BBOX_REG_LOSS_WEIGHT BBOX_REG_WEIGHTS SMOOTH_L1_BETA LOSS_WEIGHT "
            "PRE_NMS_TOPK_TRAIN PRE_NMS_TOPK_TEST POST_NMS_TOPK_TRAIN "
            "POST_NMS_TOPK_TEST NMS_THRESH CONV_DIMS"
        ),
    },
    "detectron2.modeling.roi_heads.box_head": {
        "MODEL.ROI_BOX_HEAD": "NAME NUM_FC FC_DIM NUM_CONV CONV_DIM NORM",
    },
    "detectron2.modeling.roi_heads.cascade_rcnn": {
        "MODEL.ROI_BOX_CASCADE_HEAD": "BBOX_REG_WEIGHTS IOUS",
    },
    "detectron2.modeling.roi_heads.fast_rcnn": {
        "MODEL.ROI_HEADS": "NUM_CLASSES SCORE_THRESH_TEST NMS_THRESH_TEST",
        "MODEL.ROI_BOX_HEAD": (
            "BBOX_REG_LOSS_TYPE BBOX_REG_LOSS_WEIGHT BBOX_REG_WEIGHTS SMOOTH_L1_BETA "
            "USE_FED_LOSS USE_SIGMOID_CE FED_LOSS_FREQ_WEIGHT_POWER "
            "FED_LOSS_NUM_CLASSES CLS_AGNOSTIC_BBOX_REG"
        ),
        "TEST": "DETECTIONS_PER_IMAGE",
    },
    "detectron2.modeling.roi_heads.keypoint_head": {
        "MODEL.ROI_KEYPOINT_HEAD": (
            "NAME CONV_DIMS NORMALIZE_LOSS_BY_VISIBLE_KEYPOINTS LOSS_WEIGHT NUM_KEYPOINTS"
        ),
    },
    "detectron2.modeling.roi_heads.mask_head": {
        "MODEL.ROI_MASK_HEAD": "NAME NUM_CONV CONV_DIM NORM CLS_AGNOSTIC_MASK",
    },
    "detectron2.modeling.roi_heads.roi_heads": {
        "MODEL.ROI_HEADS": (
            "NAME IOU_LABELS PROPOSAL_APPEND_GT BATCH_SIZE_PER_IMAGE "
            "POSITIVE_FRACTION IN_FEATURES IOU_THRESHOLDS"
        ),
        "MODEL.ROI_BOX_HEAD": (
            "TRAIN_ON_PRED_BOXES POOLER_RESOLUTION POOLER_SAMPLING_RATIO POOLER_TYPE"
        ),
        "MODEL.ROI_MASK_HEAD": "POOLER_RESOLUTION POOLER_SAMPLING_RATIO POOLER_TYPE",
        "MODEL.ROI_KEYPOINT_HEAD": "POOLER_RESOLUTION POOLER_SAMPLING_RATIO POOLER_TYPE",
    },
    "detectron2.modeling.test_time_augmentation": {
        "TEST.AUG": "MIN_SIZES MAX_SIZE FLIP",
    },
    "detectron2.solver.build": {
        "SOLVER": (
            "LR_SCHEDULER_NAME BASE_LR BASE_LR_END MOMENTUM NESTEROV WEIGHT_DECAY "
            "WEIGHT_DECAY_NORM GAMMA STEPS NUM_DECAYS WARMUP_FACTOR WARMUP_ITERS "
            "WARMUP_METHOD RESCALE_INTERVAL BIAS_LR_FACTOR WEIGHT_DECAY_BIAS"
        ),
        "SOLVER.CLIP_GRADIENTS": "ENABLED CLIP_TYPE CLIP_VALUE NORM_TYPE",
    },
    "distill.data.datasets": {
        "MODEL.ROI_KEYPOINT_HEAD": "MIN_KEYPOINTS_PER_IMAGE",
        "DATASETS": "TRAIN",
        "DATALOADER": "FILTER_EMPTY_ANNOTATIONS",
    },
    "distill.data.loader": {
        "DATALOADER": (
            "NUM_WORKERS ASPECT_RATIO_GROUPING SAMPLER_TRAIN REPEAT_THRESHOLD REPEAT_SQRT"
        ),
        "SOLVER": "IMS_PER_BATCH",
    },
    "distill.engine.evaluators": {
        "DATASETS": "TEST",
        "TEST": "EXPECTED_RESULTS KEYPOINT_OKS_SIGMAS",
    },
    "distill.engine.trainer": {
        "MODEL": "DEVICE WEIGHTS",
        "SOLVER": "MAX_ITER CHECKPOINT_PERIOD",
        "SOLVER.AMP": "ENABLED",
        "TEST": "EVAL_PERIOD",
        "": "OUTPUT_DIR SEED",
        "TEST.AUG": "ENABLED",
    },
}
EXPLAINED = {"GLOBAL.HACK": "detectron2 keeps it for a user's own code, which may read it"}


def read_keys() -> list[tuple[str, str]]:
    """Return pairs of a key and the module that reads it."""
    return [
        (f"{section}.{name}".lstrip("."), module)
        for module, sections in READ.items()
        for section, names in sections.items()
        for name in names.split()
    ]


def test_every_key_is_in_one_list() -> None:
    listed = [*(key for key, _ in read_keys()), *UNREAD, *EXPLAINED]
    assert sorted(listed) == sorted(DEFAULTS)


@for_each("module", list(READ))
def test_a_module_reads_its_keys(module: str) -> None:
    spec = importlib.util.find_spec(module)
    assert spec and spec.origin
    source = Path(spec.origin).read_text("utf-8")
    keys = [key for key, reader in read_keys() if reader == module]
    assert [x for x in keys if not re.search(rf"\b{x.split('.')[-1]}\b", source)] == []


OTHER_VALUES: dict[type, Any] = {bool: True, int: 1, tuple: ("a.pkl",)}


@for_each("key", list(UNREAD))
def test_a_key_that_is_not_read_is_refused(key: str) -> None:
    value = OTHER_VALUES[type(DEFAULTS[key])]
    cfg = tiny_cfg("faster", key, value)
    sentence = f"{key} is {value!r}, but it is not read: {UNREAD[key]}, and leave this key at "
    with pytest.raises(ConfigError, match=re.escape(f"{sentence}{DEFAULTS[key]!r}.")):
        validate_config(cfg, training=False)
    check_values(cfg)  # a teacher may have it: its training is over


REFUSED: dict[str, tuple[str, tuple[Any, ...], str]] = {
    "proposals": (
        "faster",
        ("MODEL.PROPOSAL_GENERATOR.NAME", "PrecomputedProposals"),
        "MODEL.PROPOSAL_GENERATOR.NAME is 'PrecomputedProposals'; it must be a network such as RPN",
    ),
    "two settings of cuDNN": (
        "faster",
        ("CUDNN_BENCHMARK", True, "DETERMINISTIC", True),
        "CUDNN_BENCHMARK is True, which DETERMINISTIC True switches off",
    ),
    "a drawing dense detector": (
        "retinanet",
        ("VIS_PERIOD", 5),
        "VIS_PERIOD is 5, but only GeneralizedRCNN and PanopticFPN draw",
    ),
    "a drawing segmentor": ("semantic", ("VIS_PERIOD", 5), "VIS_PERIOD is 5, but only"),
    "patience without a metric": (
        "faster",
        ("SOLVER.PATIENCE", 3, "TEST.EVAL_PERIOD", 10),
        "SOLVER.PATIENCE is 3, but TEST.BEST_METRIC is '' and TEST.EVAL_PERIOD 10; it needs both",
    ),
    "patience without evaluations": (
        "faster",
        ("SOLVER.PATIENCE", 3, "TEST.BEST_METRIC", "bbox/AP"),
        "SOLVER.PATIENCE is 3, but TEST.BEST_METRIC is 'bbox/AP' and TEST.EVAL_PERIOD 0",
    ),
    "sigmas": ("faster", ("TEST.KEYPOINT_OKS_SIGMAS", [0.1, 0.0]), "KEYPOINT_OKS_SIGMAS is .*abov"),
}


@for_each("case", list(REFUSED))
def test_a_value_without_effect_is_refused(case: str) -> None:
    family, opts, sentence = REFUSED[case]
    with pytest.raises(ConfigError, match=sentence):
        validate_config(tiny_cfg(family, *opts), training=False)


@pytest.mark.e2e
@pytest.mark.parametrize("family", ["faster", "mask"])
def test_training_images_are_drawn_while_distilling(
    family: str, shapes: Shapes, tmp_path: Path
) -> None:
    teacher = write_teacher(tmp_path / "teacher", family, "MODEL.ROI_HEADS.NUM_CLASSES", 8)
    opts = (*distill_opts(family, ("IMA", "ROIKD")), *teacher, "SOLVER.MAX_ITER", 2)
    cfg = trainable_cfg(family, shapes, tmp_path / "out", *opts, "VIS_PERIOD", 1)
    validate_config(cfg)
    Trainer(cfg).train()
    log = EventAccumulator(str(tmp_path / "out")).Reload()
    drawn = {name.split(";")[0] for name in log.Tags()["images"]}
    masks = {"Left: mask prediction"} if family == "mask" else set()
    assert drawn == {"Left: GT bounding boxes", *masks}


# ---- Keypoints.

KEYPOINTS = ("MODEL.KEYPOINT_ON", True, "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS", 2)


@pytest.fixture
def people(tmp_path: Path) -> str:
    """Return a data set whose images have 0 to 2 visible keypoints of 2."""
    name = f"people_{tmp_path.name}"
    (tmp_path / "a.png").touch()
    common = {"file_name": str(tmp_path / "a.png"), "height": 9, "width": 9}
    box = {"bbox": [0, 0, 5, 5], "bbox_mode": 0, "category_id": 0, "iscrowd": 0}

    def dicts() -> list[dict[str, Any]]:
        points = [[1, 1, 2 * (k > 0), 3, 3, 2 * (k > 1)] for k in range(3)]
        return [
            {**common, "image_id": k, "annotations": [{**box, "keypoints": x}]}
            for k, x in enumerate(points)
        ]

    DatasetCatalog.register(name, dicts)
    MetadataCatalog.get(name).set(thing_classes=["person"], keypoint_names=["a", "b"])
    return name


@pytest.mark.parametrize("least, kept", [(0, [0, 1, 2]), (1, [1, 2]), (2, [2])])
def test_images_with_few_keypoints_are_left_out(people: str, least: int, kept: list[int]) -> None:
    keys = ("DATASETS.TRAIN", (people,), "MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE", least)
    ((_, dicts),) = load_training_sets(tiny_cfg("faster", *KEYPOINTS, *keys))
    assert [x["image_id"] for x in dicts] == kept
    ((_, dicts),) = load_training_sets(tiny_cfg("faster", *keys))  # which predicts no keypoints
    assert len(dicts) == 3


def test_no_image_with_enough_keypoints(people: str) -> None:
    keys = ("DATASETS.TRAIN", (people,), "MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE", 3)
    with pytest.raises(DataError, match=r"has 3 keypoints; lower .*MIN_KEYPOINTS_PER_IMAGE"):
        load_training_sets(tiny_cfg("faster", *KEYPOINTS, *keys))


@pytest.fixture
def posed(shapes: Shapes, tmp_path: Path) -> Shapes:
    """Return the shapes with two keypoints."""
    content = json.loads(Path(shapes[1]).read_text())
    for category in content["categories"]:
        category["keypoints"] = ["left", "right"]
    path = tmp_path / "posed.json"
    path.write_text(json.dumps(content))
    return f"posed_{tmp_path.name}", str(path), shapes[2]


def test_sigmas_reach_the_evaluator(posed: Shapes, tmp_path: Path) -> None:
    test = ("DATASETS.TEST", (posed[0],), "TEST.KEYPOINT_OKS_SIGMAS", [0.1, 0.2])
    cfg = trainable_cfg("faster", posed, tmp_path, *KEYPOINTS, *test)
    check_test_sets(cfg)
    (evaluator,) = Trainer.build_evaluator(cfg, posed[0])._evaluators
    assert evaluator._kpt_oks_sigmas == [0.1, 0.2]


@pytest.mark.parametrize("sigmas, given", [([], "no sigma, so COCO uses 17"), ([0.1], "1")])
def test_each_keypoint_needs_a_sigma(
    sigmas: list[float], given: str, posed: Shapes, tmp_path: Path
) -> None:
    """Otherwise the evaluation after the training fails."""
    test = ("DATASETS.TEST", (posed[0],), "TEST.KEYPOINT_OKS_SIGMAS", sigmas)
    cfg = trainable_cfg("faster", posed, tmp_path, *KEYPOINTS, *test)
    with pytest.raises(ConfigError, match=rf"OKS_SIGMAS has {given}; .* the 2 of .*NUM_KEYPOINTS"):
        check_test_sets(cfg)
    cfg.MODEL.KEYPOINT_ON = False
    check_test_sets(cfg)
