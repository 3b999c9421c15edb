"""The config keys of this package, and detectron2's default config with them.

The keys of a head are in its class: ``section`` in ``heads/<method>.py``.
"""

import re

from detectron2.config import CfgNode, get_cfg

from ..heads import DISTILL_HEAD_REGISTRY
from ..nets.config import NETS_KEYS, add_nets_config
from ..section import (
    BELOW_1,
    COUNTS,
    FRACTION,
    HEIGHT_WIDTH,
    LIST,
    POSITIVE,
    SHARE,
    SWITCH,
    TEXT,
    TEXTS,
    WHOLE,
    Key,
    Rule,
    add_keys,
    at_least,
    list_of,
    one_of,
)

SCHEDULES = ("1x", "2x", "3x")
TRACKERS = ("wandb", "mlflow", "trackio")
SIZED_STEPS = ("jitter", "affine", "fit")  # steps of INPUT.AUGMENT that give images their size
AUGMENT_STEPS = ("mosaic", *SIZED_STEPS, "mixup", "hsv", "flip")
_RANGE = Rule(
    lambda x: list_of(POSITIVE, 2, 2).holds(x) and x[0] <= x[1], "two numbers above 0, rising"
)

KEYS: dict[str, Key] = {
    "MODEL.DISTILL.STUDENT_ARCHITECTURE": Key(
        "",
        "student of META_ARCHITECTURE DistillRCNN, DistillRetinaNet or DistillSemanticSegmentor, "
        "where it is not GeneralizedRCNN, RetinaNet or SemanticSegmentor. It is PanopticFPN or a "
        "dense detector: FCOS, ATSS, GFL, RepPoints, RTMDet, RTMDetIns, YOLOX, YOLOv3, YOLOv4, "
        "YOLOv5 or YOLOv7",
        TEXT,
    ),
    "MODEL.DISTILL.HEADS": Key(
        (),
        "names of distillation heads, which switch distillation on; MODEL.META_ARCHITECTURE stays "
        "the student's. Empty: the student trains without distillation",
        TEXTS,
    ),
    "MODEL.DISTILL.INHERIT": Key(
        (),
        "parts of the student that start with the teacher's weights where the shapes fit: "
        "neck, head",
        TEXTS,
    ),
    "MODEL.DISTILL.TEACHER.CONFIG_FILE": Key(
        "",
        "any detectron2 config: path of a yaml file or LazyConfig, or a name in detectron2's model "
        "zoo or this package. timm/NAME: a model of timm, which teaches its features. "
        "file.py:function: a network of your own code. file.onnx: a network that onnxruntime runs",
        TEXT,
    ),
    "MODEL.DISTILL.TEACHER.OPTS": Key([], "KEY VALUE ... overrides of the teacher's config", LIST),
    "MODEL.DISTILL.TEACHER.WEIGHTS": Key(
        "",
        "path or URL; empty: MODEL.WEIGHTS of the teacher's config, or the trained weights of the "
        "model zoo or of timm",
        TEXT,
    ),
    "MODEL.DISTILL.TEACHER.CLASSES": Key(
        (),
        "class names in the order of the teacher's outputs; empty: those of its DATASETS.TRAIN",
        TEXTS,
    ),
    "MODEL.DISTILL.TEACHER.SCALE": Key(
        1.0,
        "size of the teacher's images relative to the student's; 2.0 suits a teacher that was "
        "trained on images of twice the size",
        Rule(lambda x: 0.25 <= x <= 4, "in [0.25, 4]"),
    ),
    "MODEL.DISTILL.TEACHER.DTYPE": Key(
        "auto",
        "precision of the teacher: float32, bfloat16 or float16, by autocast. auto: that of the "
        "student",
        one_of("auto", "float32", "bfloat16", "float16"),
    ),
    "MODEL.DISTILL.TEACHER.CHANNELS_LAST": Key(
        False, "the teacher computes in the channels-last memory format", SWITCH
    ),
    "MODEL.DISTILL.TEACHER.COMPILE": Key(
        False, "torch.compile the teacher's backbone, which needs a C++ compiler", SWITCH
    ),
    "MODEL.DISTILL.TEACHER.DETECTIONS": Key(
        "",
        "file of detections of any system in the training images, in COCO's result format. "
        "ADD_BOXES and heads with INSTANCES teacher read it, instead of the network's own",
        TEXT,
    ),
    "MODEL.DISTILL.TEACHER.ADD_BOXES": Key(
        0.0,
        "least score of DETECTIONS that become objects of the training, each with its score as the "
        "probability, except those of annotated objects; 0: none do",
        FRACTION,
    ),
    "MODEL.DISTILL.TEACHER.CACHE.DIR": Key(
        "",
        "folder of the teacher's maps, which later students that see the same images read instead "
        "of computing them; empty: none",
        TEXT,
    ),
    "MODEL.DISTILL.TEACHER.CACHE.MAX_GB": Key(
        100.0, "largest size of that folder in 10^9 bytes", POSITIVE
    ),
    "MODEL.DISTILL.TEACHER.CACHE.DTYPE": Key(
        "float32",
        "how maps are stored. float32 changes no bit of a training; the others round the maps",
        one_of("float32", "float16", "bfloat16"),
    ),
    "MODEL.DISTILL.TEACHERS": Key(
        [],
        "several teachers, each with keys of TEACHER and with NAME, HEADS and FACTOR. TEACHER then "
        "names no network, and its other values are the defaults of all",
        LIST,
    ),
    "MODEL.DISTILL.BALANCE.MODE": Key(
        "auto",
        "gradient: the heads' weights set themselves, by the gradients of heads and task. none: "
        "they are the heads' WEIGHT. auto: none if any WEIGHT is not its default, else gradient",
        one_of("auto", "none", "gradient"),
    ),
    "MODEL.DISTILL.BALANCE.RATIO": Key(
        3.0,
        "norm of the gradient of all heads over that of the task, at each tensor of the student "
        "that heads compare. A head's WEIGHT over its default multiplies it",
        POSITIVE,
    ),
    "MODEL.DISTILL.BALANCE.FADE": Key(
        0.0, "share of SOLVER.MAX_ITER, at its end, in which RATIO falls linearly to 0", FRACTION
    ),
    "MODEL.DISTILL.UNLABELED.SCORE": Key(
        [0.5],
        "least score of the teacher's detections that are the objects of unlabelled images: one "
        "number, or one per class of the student",
        list_of(FRACTION),
    ),
    "MODEL.DISTILL.UNLABELED.WEIGHT": Key(
        0.0,
        "weight of an unlabelled image in the student's own losses, with the teacher's detections "
        "as its objects; a labelled image has 1. 0: only the heads learn from unlabelled images",
        at_least(0),
    ),
    "MODEL.DISTILL.UNLABELED.WARMUP_ITERS": Key(
        0, "iterations in which that weight rises linearly from 0", at_least(0)
    ),
    "MODEL.DISTILL.COSINE_PERIOD": Key(
        100,
        "iterations between two measurements of the cosine between task and distillation "
        "gradients; 0: never",
        at_least(0),
    ),
    "MODEL.ALLOW_PICKLE": Key(
        False,
        "read *.pkl files outside detectron2's catalogue too (only NumPy arrays and plain types); "
        "it counts only on the command line",
        SWITCH,
    ),
    "MODEL.ALLOW_CODE": Key(
        False,
        "run code that builds the teacher: LazyConfigs outside detectron2's model zoo, and "
        "file.py:function; it counts only on the command line",
        SWITCH,
    ),
    "DATASETS.COCO_FORMAT": Key(
        (),
        "custom data without Python: (name, annotations.json, image folder) triples in COCO format",
        LIST,
    ),
    "DATASETS.YOLO_FORMAT": Key(
        (),
        "custom data in YOLO's format: (name, data.yaml, split) triples, where the split is train, "
        "val or test, and labels/*.txt has the objects of images/*.jpg",
        LIST,
    ),
    "DATASETS.VOC_FORMAT": Key(
        (),
        "custom data in PASCAL VOC's layout: (name, folder, split, class names) entries, where "
        "the folder has Annotations, JPEGImages and ImageSets/Main/<split>.txt",
        LIST,
    ),
    "DATASETS.SEM_SEG_FORMAT": Key(
        (),
        "custom semantic labels: (name, image folder, label folder, class names) entries, where "
        "the label of a.jpg is a.png, with class indices or MODEL.SEM_SEG_HEAD.IGNORE_VALUE",
        LIST,
    ),
    "DATASETS.FOLDER_FORMAT": Key(
        (),
        "images without labels: (name, folder) pairs for UNLABELED, with all images in the folder "
        "and below it",
        LIST,
    ),
    "DATASETS.UNLABELED": Key(
        (),
        "data sets of any format whose images are added to every batch; their annotations are not "
        "read",
        TEXTS,
    ),
    "DATASETS.UNLABELED_RATIO": Key(
        1.0, "unlabelled images per labelled image, in addition to SOLVER.IMS_PER_BATCH", POSITIVE
    ),
    "DATASETS.KEEP_GROUP_CATEGORIES": Key(
        False,
        "in DATASETS.COCO_FORMAT, a category without objects that is the supercategory of others "
        "is a class, too",
        SWITCH,
    ),
    "DATASETS.TRAIN_REPEAT_FACTOR": Key(
        (),
        "(data set, factor) pairs, by which detectron2's WeightedTrainingSampler and "
        "WeightedCategoryTrainingSampler repeat the images of a data set",
        Rule(
            lambda x: all(isinstance(name, str) and factor > 0 for name, factor in x),
            "a list of [data set, factor above 0]",
        ),
    ),
    "DATALOADER.SEED": Key(
        -1,
        "seed of the order of the images and of their augmentations, if students of different SEED "
        "shall see the same; -1: SEED",
        at_least(-1),
    ),
    "DATALOADER.RANDOM_SUBSET_RATIO": Key(
        1.0, "share of the images from which RandomSubsetTrainingSampler draws", SHARE
    ),
    "DATALOADER.ON_BAD_IMAGE": Key(
        "stop",
        "action for an image that cannot be read or is wrongly annotated; drop logs the number",
        one_of("stop", "drop"),
    ),
    "DATALOADER.CLIP_BOXES": Key(
        True,
        "in DATASETS.COCO_FORMAT and YOLO_FORMAT, clip boxes that are at most half outside their "
        "image; False: such an image is wrongly annotated, see ON_BAD_IMAGE",
        SWITCH,
    ),
    "DATALOADER.TIMEOUT": Key(
        600, "seconds to wait for a data worker; 0: without limit", at_least(0)
    ),
    "INPUT.AUGMENT.STEPS": Key(
        (),
        "augmentations of training images in their order, instead of detectron2's resizing, crop "
        f"and flip: {', '.join(AUGMENT_STEPS)}. Empty: detectron2's",
        TEXTS,
    ),
    "INPUT.AUGMENT.LAST_STEPS": Key(
        (), "augmentations instead of STEPS from iteration SWITCH_ITER on", TEXTS
    ),
    "INPUT.AUGMENT.SWITCH_ITER": Key(
        0, "iteration from which LAST_STEPS take the place of STEPS; 0: never", WHOLE
    ),
    "INPUT.AUGMENT.SIZE": Key(
        [640, 640], "height and width in pixels of augmented images", HEIGHT_WIDTH
    ),
    "INPUT.AUGMENT.FILL": Key(
        114, "value of pixels that no image covers", Rule(lambda x: 0 <= x <= 255, "in [0, 255]")
    ),
    "INPUT.AUGMENT.MIN_SIDE": Key(
        0.0,
        "objects whose box is not wider and higher than this many pixels are left out",
        at_least(0),
    ),
    "INPUT.AUGMENT.MIN_VISIBLE": Key(
        0.0, "objects with at most this share of their area in the image are left out", BELOW_1
    ),
    "INPUT.AUGMENT.MAX_ASPECT": Key(
        0.0,
        "objects whose box is this many times longer than wide are left out; 0: no limit",
        at_least(0),
    ),
    "INPUT.AUGMENT.CACHE": Key(
        64,
        "decoded images that each data process keeps for mosaic and mixup, which only saves time",
        WHOLE,
    ),
    "INPUT.MOSAIC.PROB": Key(1.0, "probability of a mosaic of four images", FRACTION),
    "INPUT.MOSAIC.SHUFFLE": Key(
        False, "put the sample at a random place of the four, as YOLOv5; False: top left", SWITCH
    ),
    "INPUT.JITTER.SCALE": Key(
        [0.1, 2.0], "range of the factor; 1 fits an image into SIZE, and keeps a mosaic", _RANGE
    ),
    "INPUT.JITTER.DRAWS": Key(
        15,
        "crops that are tried until one has an object; 1: keep all crops, as RTMDet-Ins",
        at_least(1),
    ),
    "INPUT.AFFINE.ROTATION": Key(0.0, "largest angle in degrees", at_least(0)),
    "INPUT.AFFINE.SCALE": Key([0.5, 1.5], "range of the factor, 1 as in INPUT.JITTER", _RANGE),
    "INPUT.AFFINE.SHEAR": Key(
        0.0, "largest angle in degrees", Rule(lambda x: 0 <= x < 90, "in [0, 90)")
    ),
    "INPUT.AFFINE.TRANSLATION": Key(0.1, "largest shift, as a share of SIZE", FRACTION),
    "INPUT.AFFINE.CENTERED": Key(
        True, "turn and scale around the centre, as YOLOv5; False: the corner, as YOLOX", SWITCH
    ),
    "INPUT.MIXUP.PROB": Key(1.0, "probability of a blend of two images", FRACTION),
    "INPUT.MIXUP.PARTNER": Key(
        "steps",
        "steps: the partner has gone through the steps before mixup, as in RTMDet and YOLOv5. "
        "image: it is a resized and flipped image, as in YOLOX",
        one_of("steps", "image"),
    ),
    "INPUT.MIXUP.SCALE": Key([0.5, 1.5], "range of the factor of PARTNER image", _RANGE),
    "INPUT.MIXUP.BETA": Key(
        0.0, "the image's share is drawn of Beta(BETA, BETA), such as 32; 0: it is 0.5", at_least(0)
    ),
    "INPUT.HSV.MODE": Key(
        "add",
        "add: add whole numbers to hue, saturation and value, as RTMDet and YOLOX. scale: multiply "
        "them, as YOLOv5",
        one_of("add", "scale"),
    ),
    "INPUT.HSV.GAINS": Key(
        [5.0, 30.0, 30.0],
        "largest change of hue (in [0, 180)), saturation and value (in [0, 255]); with MODE scale, "
        "of the factors, such as [0.015, 0.7, 0.4]",
        list_of(at_least(0), 3, 3),
    ),
    "INPUT.MULTI_SCALE.PERIOD": Key(
        0,
        "iterations after which all images get another random size, the same in every process; 0: "
        "always INPUT.AUGMENT.SIZE",
        WHOLE,
    ),
    "INPUT.MULTI_SCALE.RANGE": Key(
        [15, 25],
        "least and largest height in units of 32 pixels",
        Rule(
            lambda x: COUNTS.holds(x) and len(x) == 2 and x[0] <= x[1], "two whole numbers, rising"
        ),
    ),
    "SOLVER.SCHEDULE": Key(
        "1x",
        "factor of SOLVER.MAX_ITER and STEPS, as in detectron2's model zoo; it is applied, and "
        "reset to 1x, when the config is loaded",
        one_of(*SCHEDULES),
    ),
    "SOLVER.ACCUMULATE": Key(
        1,
        "parts of the SOLVER.IMS_PER_BATCH images that are computed one after the other, to save "
        "memory. An iteration is one step of the optimizer, with the mean of their gradients",
        at_least(1),
    ),
    "SOLVER.OPTIMIZER": Key("SGD", "optimizer; SGD is detectron2's", one_of("SGD", "ADAMW")),
    "SOLVER.EMA.DECAY": Key(
        0.0,
        "decay per iteration of the moving average of the student's weights, such as 0.9998; the "
        "average is evaluated and saved as the model; 0: no average",
        BELOW_1,
    ),
    "SOLVER.EMA.WARMUP_ITERS": Key(
        2000, "time constant of the decay's rise from 0, in iterations; 0: no rise", at_least(0)
    ),
    "SOLVER.QAT.ENABLED": Key(
        False,
        "quantization-aware training: the student, which starts from its trained MODEL.WEIGHTS, "
        "computes with the rounding of 8-bit integers, and `distill export --int8` uses the ranges "
        "that it learns",
        SWITCH,
    ),
    "SOLVER.QAT.CALIBRATION_ITERS": Key(
        20, "iterations at the start in which ranges are measured and nothing is rounded", WHOLE
    ),
    "SOLVER.FLAT_FRACTION": Key(
        0.5, "share of SOLVER.MAX_ITER before the cosine of WarmupFlatCosineLR", BELOW_1
    ),
    "SOLVER.TAIL_FRACTION": Key(
        0.0, "share of SOLVER.MAX_ITER after that cosine, at SOLVER.BASE_LR_END", BELOW_1
    ),
    "SOLVER.WARMUP_BIAS_FACTOR": Key(
        -1.0,
        "learning rate of biases at iteration 0 over SOLVER.BASE_LR, 10 in YOLOv5; -1: "
        "SOLVER.WARMUP_FACTOR, as that of the other parameters",
        Rule(lambda x: x == -1 or x >= 0, "-1 or at least 0"),
    ),
    "SOLVER.WARMUP_MOMENTUM": Key(
        -1.0,
        "momentum at iteration 0, 0.8 in YOLOv5; it rises linearly in SOLVER.WARMUP_ITERS. -1: "
        "SOLVER.MOMENTUM from the start",
        Rule(lambda x: x == -1 or 0 <= x < 1, "-1, or in [0, 1)"),
    ),
    "SOLVER.KEEP_CHECKPOINTS": Key(
        0,
        "number of periodic checkpoints to keep, the newest ones; 0: all. model_final and "
        "model_best are always kept",
        at_least(0),
    ),
    "SOLVER.PATIENCE": Key(
        0,
        "number of evaluations without a better TEST.BEST_METRIC after which the training ends; 0: "
        "never",
        at_least(0),
    ),
    "SOLVER.ON_NONFINITE": Key(
        "stop",
        "action for a loss or gradient that is not finite: stop, or skip the iteration; both save "
        "a reproducer",
        one_of("stop", "skip"),
    ),
    "SOLVER.MAX_SKIPS": Key(
        10, "skipped iterations of a run after which it stops nevertheless", at_least(0)
    ),
    "TEST.BEST_METRIC": Key(
        "",
        "metric, such as bbox/AP, by which model_best.pth is kept; with several test sets, the "
        "set's name stands before it; empty: no such file",
        TEXT,
    ),
    "TEST.VIS_IMAGES": Key(
        4,
        "images of each test set that an evaluation during a training draws with their labels and "
        "predictions, for TensorBoard and TRACKERS; 0: none",
        WHOLE,
    ),
    "TEST.SLIDING_WINDOW.ENABLED": Key(
        False,
        "semantic segmentation: average the logits of overlapping windows instead of one pass",
        SWITCH,
    ),
    "TEST.SLIDING_WINDOW.CROP_SIZE": Key(
        [512, 1024],
        "height and width of a window, in pixels of the network's input (after "
        "INPUT.MIN_SIZE_TEST)",
        HEIGHT_WIDTH,
    ),
    "TEST.SLIDING_WINDOW.STRIDE": Key(
        [256, 512], "vertical and horizontal stride in pixels, at most CROP_SIZE", HEIGHT_WIDTH
    ),
    "REPORT.ENABLED": Key(
        True,
        "write OUTPUT_DIR/report.html at each evaluation, a page about the run; it needs plotly",
        SWITCH,
    ),
    "REPORT.BASELINE": Key(
        "",
        "OUTPUT_DIR of the training to compare with in the report, such as that of the student "
        "alone; empty: no comparison",
        TEXT,
    ),
    "REPORT.IMAGES": Key(
        4,
        "test images in the report for each reason: those that changed most, and those where the "
        "teacher is wrong; 0: no images",
        WHOLE,
    ),
    "TRACKERS": Key(
        (),
        "programs that get all scalars, the config and the images of a training: "
        f"{', '.join(TRACKERS)}",
        TEXTS,
    ),
    "DETERMINISTIC": Key(
        False,
        "deterministic algorithms on CUDA too, which are slower: an interrupted run ends "
        "bit-identically",
        SWITCH,
    ),
}


TEACHERS_KEYS: dict[str, Key] = {
    "NAME": Key(
        "",
        "name of the teacher in logs, losses and checkpoints, without regard to capital letters",
        Rule(
            lambda x: x == "" or bool(re.fullmatch(r"[a-zA-Z]\w*", x, re.ASCII)),
            "letters, digits and _, beginning with a letter",
        ),
    ),
    "HEADS": Key(
        (), "heads of MODEL.DISTILL.HEADS that it teaches; empty: all that work with it", TEXTS
    ),
    "FACTOR": Key(
        1.0, "factor of its losses, and with BALANCE of the ratio that its heads get", POSITIVE
    ),
}
"""Keys of a section of ``MODEL.DISTILL.TEACHERS`` besides those of ``MODEL.DISTILL.TEACHER``."""


def head_keys() -> dict[str, Key]:
    """Return the keys of all registered heads by dotted name."""
    return {
        f"MODEL.DISTILL.{cls.__name__.upper()}.{name}": key
        for _, cls in DISTILL_HEAD_REGISTRY
        for name, key in cls.section.items()
    }


def declared_keys() -> dict[str, Key]:
    """Return every key of this package, its networks and all registered heads by dotted name."""
    return {**NETS_KEYS, **KEYS, **head_keys()}


def add_distill_config(cfg: CfgNode) -> None:
    """Add this package's keys with their defaults to a detectron2 config.

    A head of your own has its section if it is registered before this call.
    """
    add_nets_config(cfg)
    add_keys(cfg, {**KEYS, **head_keys()})


def get_distill_cfg() -> CfgNode:
    """Return detectron2's default config with this package's keys."""
    cfg = get_cfg()
    add_distill_config(cfg)
    return cfg
