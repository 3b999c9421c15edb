"""Every config key, and the checks that run before any weight is loaded."""

import io
import os
import re
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.utils.file_io import PathManager
from fvcore.common.config import CfgNode as FvcoreCfgNode
from yaml import YAMLError

from .errors import ConfigError, DistillError
from .heads import DISTILL_HEAD_REGISTRY, teacher_needed
from .heads.authors import AUTO
from .inherit import INHERITED_PARTS
from .nets import add_config_read_by, add_nets_config
from .rules import check_choice, check_values, leaves, nearest

with warnings.catch_warnings():
    warnings.simplefilter("ignore", UserWarning)  # its use of pkg_resources is not our user's
    from detectron2 import model_zoo

CN = CfgNode

# Head sections by name. A head outside this package adds its own with `add_head_section`.
_HEAD_SECTIONS: dict[str, dict[str, Any]] = {}


def add_head_section(head: str, **keys: Any) -> None:
    """Declare ``MODEL.DISTILL.<HEAD>`` for a head class, on top of the keys of every head.

    Call it where the head is registered, before :func:`get_distill_cfg`.
    """
    _HEAD_SECTIONS[head.upper()] = keys


# IN_FEATURES: student levels to compare; empty: all whose stride the teacher has.
add_head_section("FitNet", IN_FEATURES=())
add_head_section(
    "IMA",
    IN_FEATURES=(),
    SCOPE="auto",  # what an instance is: image | box | mask | class; auto: by the student's family
    MASK_RATIO=0.15,  # ζ in [0, 1): expected share of removed frequencies (Eq. 2; paper silent)
    STANDARDIZE=True,  # instance standardization (Eq. 5-7)
    STANDARDIZE_TEACHER=True,  # also of the teacher (Eq. 15); False: Eq. 7 to the letter
    DEFLATE=True,  # adaptive scale deflation (Eq. 8-10)
    SCALE_ON="standardized",  # maps whose cosine is α: standardized | raw (Eq. 8 to the letter)
    SCALE_FLOOR=0.1,  # f in [0, 1]: α becomes f + (1 − f) α; 0: the paper to the letter
)
add_head_section(
    "MKD",  # WEIGHT is α (Eq. 6)
    IN_FEATURES=(),
    FEA_WEIGHT=1.0,  # of L_fea; here and below, 0 leaves the term out
    MULTISCALE_WEIGHT=1.0,  # of L_Multiscale (Eq. 1)
    FDMD_WEIGHT=1.0,  # of L_FDMD (Eq. 2-4)
    FAD_WEIGHT=1.0,  # of L_FAD (Eq. 5)
    SCALES=(1, 2, 4),  # pooling kernels of L_Multiscale in cells (paper silent)
    MASK_RATIO=0.15,  # ζ of L_FDMD in [0, 1): share of removed frequencies (paper silent)
    TEMPERATURE=1.0,  # 𝒯 > 0 of L_FAD (paper silent)
    ATTENTION=True,  # L_FAD on maps weighted by the joint attention; False: on the maps
)
# No teacher; the student's backbone must be an FPN+PAN (build_..._pafpn_backbone).
add_head_section(
    "MSSD",
    DISTILL_WEIGHT=1.0,  # of L_distill (Eq. 4); 0 leaves it out
    MASK_WEIGHT=1.0,  # of L_mask (Eq. 6); 0 leaves it out
    GAMMA=0.05,  # γ in (0, 1]: factor of the finest level (Eq. 3; the best of Table 5)
    MASK="gaussian",  # gaussian (Eq. 5) | binary (σ² = ∞)
    SIGMA2=2.0,  # σ² > 0 of the Gaussian masks (the best of Table 6)
)
# No teacher. WEIGHT is of both losses: the detection loss of the label-guided maps, and LGD's.
add_head_section(
    "LGD",
    DISTILL_WEIGHT=1.0,  # λ: of the distillation loss
    DETACH_ITERS=30000,  # iterations in which the distillation loss trains its adapter alone
    DETACH_APPEARANCE=False,  # the objects' appearance has no gradient to the student
)
add_head_section(
    "TID",
    GAMMA=0.05,  # γ in (0, 1]: share of the points in the key and weak areas (paper silent)
    TOP=0.025,  # share in (0, 1] of the points whose Score_c is 1.5
    SCORE="both",  # both | cls | reg: the tasks that the score judges
    RAW_IOU=False,  # Score_r is IOU_max itself, not by the detector's thresholds
    AREA="both",  # both | key | weak: the areas that have a value
    NMS_IOU=0.6,  # of the weak area's boxes, in [0, 1] (paper silent)
    ALPHA_HIGH=1.0,  # α_high >= 0: factor of the loss where V >= 1
    ALPHA_MED=1.0,  # α_med >= 0: where 0.01 <= V < 1
    ALPHA_LOW=1.0,  # α_low >= 0: where V < 0.01
)
add_head_section(
    "ROIKD",
    TEMPERATURE=1.0,  # T > 0
    FOREGROUND_WEIGHT=1.0,  # of the class divergence on boxes with an object
    BACKGROUND_WEIGHT=1.0,  # of the class divergence on background boxes
    BOX_WEIGHT=1.0,  # of the L1 between box deltas on foreground; 0 leaves it out
)
add_head_section("MaskKD", TEMPERATURE=1.0)  # T > 0
add_head_section("CWD", WEIGHT=10.0, IN_FEATURES=(), TEMPERATURE=1.0)  # 𝒯 > 0
add_head_section("CWDLogits", WEIGHT=3.0, TEMPERATURE=4.0)  # 𝒯 > 0
add_head_section("PixelKD", TEMPERATURE=1.0)  # T > 0
# IN_FEATURES: of SKD and IFVD, empty: the features of the semantic head, "sem_seg_head", if any.
add_head_section("SKD", IN_FEATURES=(), SCALE=0.5)  # side of a pooled cell over the map's, (0, 1]
add_head_section("IFVD", WEIGHT=200.0, IN_FEATURES=())
add_head_section(
    "CIRKD",
    MINIBATCH_WEIGHT=1.0,  # of the similarities within the batch; here and below >= 0
    PIXEL_WEIGHT=0.1,  # of those with the remembered pixels
    REGION_WEIGHT=0.1,  # of those with the remembered regions
    POOL=1,  # side in cells of what is compared within the batch; costs fall with its 4th power
    PIXELS=20000,  # remembered pixels of each class
    REGIONS=2000,  # remembered regions of each class
    PIXEL_KEYS=4096,  # remembered pixels that a step compares with, of all classes
    REGION_KEYS=1024,  # remembered regions that a step compares with, of all classes
    NEW_PIXELS=16,  # pixels of each class and picture that are remembered
)
add_head_section(
    "MasKDLogits",
    TOKENS=8,  # masks
    TOKEN_ITERS=2000,  # iterations in which the tokens are learned, before they distil
)
add_head_section("DenseKD", TEMPERATURE=1.0)  # T > 0
# AUTO: what the method's authors use for the student's detector (heads/authors.py).
add_head_section("PKD", WEIGHT=AUTO, IN_FEATURES=())
add_head_section(
    "MGD",
    WEIGHT=AUTO,
    IN_FEATURES=(),
    MASK_RATIO=AUTO,  # λ in [0, 1): expected share of the cells that are masked out
)
add_head_section(
    "FGD",
    IN_FEATURES=(),
    ALPHA=AUTO,  # of the foreground
    BETA=AUTO,  # of the background
    GAMMA=AUTO,  # of the attention
    LAMBDA=AUTO,  # of the relation
    TEMPERATURE=AUTO,  # 𝒯 > 0 of the attention
)
add_head_section("FGFI", WEIGHT=0.01, THRESHOLD=0.5)  # ψ in [0, 1]
add_head_section("DeFeat", IN_FEATURES=(), FOREGROUND_WEIGHT=3.0, BACKGROUND_WEIGHT=12.0)
add_head_section("FRS", WARMUP_ITERS=500, FEATURE_WEIGHT=AUTO, CLASS_WEIGHT=AUTO)
add_head_section(
    "FKD",
    IN_FEATURES=(),
    ATTENTION_WEIGHT=AUTO,  # of the attended maps
    POOLED_WEIGHT=AUTO,  # of their means over cells and over channels
    RELATION_WEIGHT=AUTO,  # of the relation
    TEMPERATURE=0.5,  # 𝒯 > 0 of the attention
)
add_head_section(
    "LD",
    TEMPERATURE=10.0,  # T > 0 of the sides
    BOX_WEIGHT=0.25,  # of the positives' sides
    REGION_WEIGHT=0.25,  # of the sides in the valuable localization region
    CLASS_WEIGHT=10.0,  # of the positives' classes
    CLASS_TEMPERATURE=2.0,  # T > 0 of the classes
    RELEASED_REGION=False,  # the larger region of the authors' code
)
add_head_section(
    "CrossKD",
    CLASS_WEIGHT=AUTO,
    BOX_WEIGHT=AUTO,
    REUSED_CONVS=int(AUTO),  # convolutions of the teacher's subnets that read the student
)
add_head_section(
    "GID",
    FEATURE_WEIGHT=5e-4,
    RELATION_WEIGHT=40.0,
    CLASS_WEIGHT=0.1,
    BOX_WEIGHT=1.0,
    SHARED_ADAPTER=True,  # a 3x3 convolution of the student's maps; False: as released
)
add_head_section(
    "MasKD",
    WEIGHT=AUTO,
    IN_FEATURES=(),
    TOKENS=6,  # masks
    TOKEN_ITERS=2000,  # iterations in which the tokens are learned, before they distil
    STUDENT_MASK_ITERS=5000,  # of distillation before the student's masks count, too
)
add_head_section("ReviewKD", IN_FEATURES=())
add_head_section("KD", TEMPERATURE=1.0)  # T > 0
add_head_section("DKD", TEMPERATURE=1.0, ALPHA=1.0, BETA=0.25)  # T > 0; factors of both parts


def add_distill_config(cfg: CfgNode) -> None:
    """Add this package's keys with their defaults to a detectron2 config."""
    add_nets_config(cfg)
    cfg.MODEL.DISTILL = CN()
    # Meta-architecture of the student: GeneralizedRCNN, PanopticFPN, SemanticSegmentor, RetinaNet,
    # FCOS, ATSS, GFL, RepPoints
    cfg.MODEL.DISTILL.STUDENT_ARCHITECTURE = "GeneralizedRCNN"
    cfg.MODEL.DISTILL.HEADS = ()  # names in DISTILL_HEAD_REGISTRY; empty: train the student alone
    # Parts of the student that start with the teacher's weights where they fit: "neck", "head".
    cfg.MODEL.DISTILL.INHERIT = ()

    cfg.MODEL.DISTILL.TEACHER = CN()
    # Any detectron2 config: a yaml path, or a name of detectron2's model zoo.
    cfg.MODEL.DISTILL.TEACHER.CONFIG_FILE = ""
    cfg.MODEL.DISTILL.TEACHER.OPTS = []  # KEY VALUE ... overrides of that config
    # Path or URL; empty: MODEL.WEIGHTS of that config, or the model zoo's trained weights.
    cfg.MODEL.DISTILL.TEACHER.WEIGHTS = ""
    # Class names in the order of the teacher's outputs; empty: those of its DATASETS.TRAIN.
    cfg.MODEL.DISTILL.TEACHER.CLASSES = ()

    for name, keys in _HEAD_SECTIONS.items():
        section = CN()
        section.WEIGHT = 1.0  # factor of the head's losses; 0 switches it off
        section.WARMUP_ITERS = 0  # iterations of linear rise of the factor from 0
        section.STOP_ITER = 0  # iteration from which the head is off; 0: never
        for key, value in keys.items():
            section[key] = value
        cfg.MODEL.DISTILL[name] = section

    # Custom data without Python: (name, annotations.json, image folder) triples in COCO format.
    cfg.DATASETS.COCO_FORMAT = ()
    # A picture that cannot be read or is wrongly annotated: stop | drop (with a count in the log).
    cfg.DATALOADER.ON_BAD_IMAGE = "stop"
    cfg.DATALOADER.TIMEOUT = 600  # seconds >= 0 to wait for a data worker; 0: forever
    cfg.SOLVER.OPTIMIZER = "SGD"  # SGD (detectron2's) | ADAMW
    # Moving average of the student's weights, which is then evaluated and kept as "model".
    cfg.SOLVER.EMA = CN()
    cfg.SOLVER.EMA.DECAY = 0.0  # of an iteration, in [0, 1), such as 0.9998; 0: none
    cfg.SOLVER.EMA.WARMUP_ITERS = 2000  # time constant of the decay's rise from 0; 0: none
    cfg.SOLVER.FLAT_FRACTION = 0.5  # WarmupFlatCosineLR: share of MAX_ITER before the cosine
    # Periodic checkpoints to keep, the newest ones; 0: all. model_final and model_best stay.
    cfg.SOLVER.KEEP_CHECKPOINTS = 0
    # A loss or gradient that is not finite: stop | skip the iteration. Both save a reproducer.
    cfg.SOLVER.ON_NONFINITE = "stop"
    cfg.SOLVER.MAX_SKIPS = 10  # skipped iterations of a run after which it stops all the same
    # Metric of the evaluations, such as "bbox/AP", by which model_best.pth is kept; empty: none.
    cfg.TEST.BEST_METRIC = ""
    # Semantic segmentation: average the logits of overlapping windows instead of one single pass.
    cfg.TEST.SLIDING_WINDOW = CN()
    cfg.TEST.SLIDING_WINDOW.ENABLED = False
    # Height and width of a window in pixels of the network's input (after INPUT.MIN_SIZE_TEST).
    cfg.TEST.SLIDING_WINDOW.CROP_SIZE = [512, 1024]
    cfg.TEST.SLIDING_WINDOW.STRIDE = [256, 512]  # pixels, at most CROP_SIZE
    # Read *.pkl files outside detectron2's catalogue too (only NumPy arrays and plain types).
    cfg.MODEL.ALLOW_PICKLE = False
    # Iterations between two gradient cosines of task and distillation in the log; 0: none.
    cfg.MODEL.DISTILL.COSINE_PERIOD = 100
    # Deterministic algorithms on CUDA too, slower: an interrupted run ends bit-identically.
    cfg.DETERMINISTIC = False


def get_distill_cfg() -> CfgNode:
    """detectron2's default config with this package's keys."""
    cfg = get_cfg()
    add_distill_config(cfg)
    return cfg


class _SafeCfgNode(FvcoreCfgNode):
    """Loads ``_BASE_`` chains with the safe yaml loader only.

    detectron2's own RetinaNet and FCOS files compute their anchor sizes with an ``eval`` tag; that
    one expression is replaced by its value, every other tag is refused.
    """

    _EVAL = (
        '!!python/object/apply:eval ["[[x, x * 2**(1.0/3), x * 2**(2.0/3) ] '
        'for x in [32, 64, 128, 256, 512 ]]"]'
    )
    _VALUE = str([[x * 2 ** (k / 3) for k in range(3)] for x in (32.0, 64.0, 128.0, 256.0, 512.0)])

    @classmethod
    def _open_cfg(cls, filename: str) -> io.StringIO:
        if "://" in filename:  # what a _BASE_ names would be fetched and stored
            raise OSError(f"_BASE_ '{filename}' is no file; download it and name the copy")
        with PathManager.open(filename, "r") as f:
            text = io.StringIO(f.read().replace(cls._EVAL, cls._VALUE))
        text.name = filename  # yaml's messages show it
        return text


def merge_from_file(cfg: CfgNode, filename: str) -> None:
    """Merge a yaml file and its ``_BASE_`` chain into ``cfg``.

    Raises:
        ConfigError: the file is missing, no valid or safe yaml, or has an unknown key.
    """
    if not PathManager.isfile(filename):
        raise ConfigError(f"Config file '{filename}' does not exist.")
    try:
        _merge(cfg, _read_yaml(filename), filename)
    except RecursionError as e:
        raise ConfigError(
            f"The _BASE_ of config file '{filename}' leads back to itself, or its values hold "
            "themselves."
        ) from e


def _read_yaml(filename: str) -> CfgNode:
    try:
        return CfgNode(_SafeCfgNode.load_yaml_with_base(filename, allow_unsafe=False))
    except (YAMLError, OSError, ValueError) as e:  # yaml's scanner raises the last, too
        reason = " ".join(str(e).split())
        raise ConfigError(f"Config file '{filename}' cannot be read as safe yaml: {reason}") from e
    except (AttributeError, TypeError, AssertionError) as e:
        detail = f": {e}" if isinstance(e, AssertionError) else "."
        raise ConfigError(
            f"Config file '{filename}' or its _BASE_ is no mapping of KEY: VALUE sections{detail}"
        ) from e


def merge_from_list(cfg: CfgNode, opts: list[Any], source: str = "the command line") -> None:
    """Merge ``KEY VALUE ...`` overrides into ``cfg``.

    Raises:
        ConfigError: a key is unknown, a value is missing or of another type.
    """
    options = [x for x in opts[0::2] if str(x).startswith("--")]
    if options:
        raise ConfigError(f"{options[0]} must stand before the KEY VALUE overrides.")
    if len(opts) % 2:
        raise ConfigError(f"Overrides must be KEY VALUE pairs; '{opts[-1]}' has no value.")
    for key, value in zip(opts[0::2], opts[1::2]):
        with _keeping_types(cfg, [str(key)], source):
            try:
                cfg.merge_from_list([key, value])
            except (ValueError, AssertionError) as e:
                raise ConfigError(f"{key} {value}: {_said(e)}") from e


def _merge(cfg: CfgNode, loaded: CfgNode, source: str) -> None:
    with _keeping_types(cfg, [key for key, _ in leaves(loaded)], source):
        try:
            cfg.merge_from_other_cfg(loaded)
        except (KeyError, ValueError, AssertionError) as e:
            raise ConfigError(f"{source}: {_said(e)}") from e


def _said(error: Exception) -> str:
    """What yacs says of a value, in words for users where it names Python's types."""
    sentence = str(error.args[0] if error.args else error)
    found = _MISMATCH.search(sentence)
    if not found:
        return sentence
    expected, given, value, key = found.groups()
    name = f'; write ("{value}",)' if given == "str" and expected in ("list", "tuple") else ""
    return f"{key} must be of type {expected}; {value} is of type {given}{name}."


_MISMATCH = re.compile(
    r"Type mismatch \(<class '(\w+)'> vs\. <class '(\w+)'>\) with values \(.* vs\. (.*)\) "
    r"for config key: ([\w.]+)",
    re.DOTALL,
)


@contextmanager
def _keeping_types(cfg: CfgNode, keys: list[str], source: str) -> Iterator[None]:
    """Refuse unknown keys, and None for a value that is not None, which yacs takes."""
    before = {key: _value(cfg, key, source) for key in keys}
    yield
    for key, value in before.items():
        if value is not None and _value(cfg, key, source) is None:
            raise ConfigError(f"{key} in {source} is None; it must be a {type(value).__name__}.")


def _value(cfg: CfgNode, key: str, source: str) -> Any:
    """The value of a key; None if detectron2 knows it as one of earlier times.

    Raises:
        ConfigError: it is unknown, or a section.
    """
    path: list[str] = []
    node = cfg
    for name in key.split("."):
        if not isinstance(node, CfgNode) or name not in node:
            if cfg.key_is_deprecated(key) or cfg.key_is_renamed(key):
                return None
            valid = nearest(name, node) if isinstance(node, CfgNode) else "no key below it"
            where = ".".join(path) or "the top level"
            raise ConfigError(f"Unknown config key '{key}' in {source}; {where} has: {valid}.")
        node = node[name]
        path.append(name)
    if isinstance(node, CfgNode):
        raise ConfigError(
            f"'{key}' in {source} is a section, not a value; it has: {nearest('', node)}."
        )
    return node


def student_config(cfg: CfgNode) -> CfgNode:
    """The plain detectron2 config of the student: what ``student.yaml`` holds.

    It has no key that stock detectron2 does not know, but for networks that read those of
    :func:`distill.nets.add_nets_config`. Weights of a timm backbone are in the checkpoint.
    """
    student = get_cfg()
    add_config_read_by(cfg, student)
    _copy_known(cfg, student)
    if "TIMM" in student.MODEL:
        student.MODEL.TIMM.PRETRAINED, student.MODEL.TIMM.WEIGHTS = False, ""
    if cfg.MODEL.META_ARCHITECTURE in distill_architectures():
        student.MODEL.META_ARCHITECTURE = cfg.MODEL.DISTILL.STUDENT_ARCHITECTURE
    return student


def _copy_known(source: CfgNode, target: CfgNode) -> None:
    for key, value in target.items():
        if isinstance(value, CfgNode) and key in source:
            _copy_known(source[key], value)
        elif key in source:
            target[key] = source[key]


def distill_architectures() -> list[str]:
    """Registered meta-architectures that hold a student."""
    return [name for name, _ in META_ARCH_REGISTRY if name.startswith("Distill")]


def teacher_config(cfg: CfgNode, *, trained: bool = True) -> CfgNode:
    """The teacher's own config, resolved from ``MODEL.DISTILL.TEACHER``.

    Args:
        trained: ``MODEL.WEIGHTS`` of a model-zoo config are those that its training ended with;
            False: those that it starts from.

    Raises:
        ConfigError: no config file is given, or it is neither a file nor in the model zoo.
    """
    node = cfg.MODEL.DISTILL.TEACHER
    if not node.CONFIG_FILE:
        raise ConfigError(
            "MODEL.DISTILL.TEACHER.CONFIG_FILE is empty; name the teacher's yaml, or a model-zoo "
            "config such as COCO-Detection/faster_rcnn_R_101_FPN_3x.yaml."
        )
    teacher = get_distill_cfg()
    own_file = os.path.isfile(node.CONFIG_FILE)
    path = node.CONFIG_FILE if own_file else _zoo_file(node.CONFIG_FILE)
    if path is None:
        raise ConfigError(
            f"MODEL.DISTILL.TEACHER.CONFIG_FILE '{node.CONFIG_FILE}' is neither a file (seen from "
            f"{os.getcwd()}) nor a config of detectron2's model zoo."
        )
    merge_from_file(teacher, path)
    if trained and not own_file and not node.WEIGHTS:
        teacher.MODEL.WEIGHTS = model_zoo.get_checkpoint_url(node.CONFIG_FILE)
    merge_from_list(teacher, list(node.OPTS), "MODEL.DISTILL.TEACHER.OPTS")
    if node.WEIGHTS:
        teacher.MODEL.WEIGHTS = node.WEIGHTS
    return teacher


def _zoo_file(name: str) -> str | None:
    try:
        return model_zoo.get_config_file(name)
    except RuntimeError:
        return None


def validate_config(cfg: CfgNode, *, training: bool = True) -> None:
    """Check every value that this package reads; runs before any weight is loaded.

    Args:
        cfg: the whole config.
        training: check the training sets and the teacher's config too; evaluation needs neither.

    Raises:
        ConfigError: names the key, its value and the valid choices, nearest first.
    """
    check_values(cfg)
    if cfg.MODEL.LOAD_PROPOSALS:
        raise ConfigError(
            "MODEL.LOAD_PROPOSALS is True; detectron2 reads proposals from pickles, which can run "
            "any code: set it False."
        )
    architectures = [name for name, _ in META_ARCH_REGISTRY]
    check_choice("MODEL.META_ARCHITECTURE", cfg.MODEL.META_ARCHITECTURE, architectures)
    for key in ("TRAIN", "TEST") if training else ("TEST",):
        for name in cfg.DATASETS[key]:
            check_choice(f"DATASETS.{key}", name, DatasetCatalog.list())
    if training and not cfg.DATASETS.TRAIN:
        raise ConfigError("DATASETS.TRAIN is empty; name at least one data set.")
    for name in cfg.DATASETS.TRAIN if training and cfg.MODEL.KEYPOINT_ON else ():
        if not MetadataCatalog.get(name).get("keypoint_names"):
            raise ConfigError(
                f"MODEL.KEYPOINT_ON is True, but DATASETS.TRAIN '{name}' has no keypoints; set it "
                "False."
            )
    if cfg.MODEL.META_ARCHITECTURE in distill_architectures():
        _validate_distill(cfg)
        if training and teacher_needed(cfg):
            _validate_teacher(teacher_config(cfg))


def _validate_teacher(teacher: CfgNode) -> None:
    try:
        check_values(teacher)
    except ConfigError as e:
        raise ConfigError(f"The teacher's config: {e}") from e


def _validate_distill(cfg: CfgNode) -> None:
    node = cfg.MODEL.DISTILL
    plain = [n for n, _ in META_ARCH_REGISTRY if n not in distill_architectures()]
    check_choice("MODEL.DISTILL.STUDENT_ARCHITECTURE", node.STUDENT_ARCHITECTURE, plain)
    student = META_ARCH_REGISTRY.get(node.STUDENT_ARCHITECTURE)
    if isinstance(student, type):  # of a function that builds one, the network itself will tell
        META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE).check_student(student)
    if len(set(node.HEADS)) < len(node.HEADS):
        raise ConfigError(f"MODEL.DISTILL.HEADS {tuple(node.HEADS)} names a head twice.")
    for name in node.HEADS:
        check_choice("MODEL.DISTILL.HEADS", name, [n for n, _ in DISTILL_HEAD_REGISTRY])
        if name.upper() not in node:
            raise ConfigError(
                f"MODEL.DISTILL.HEADS: {name} has no config section; call "
                f"add_head_section('{name}') where it is registered."
            )
        _validate_terms(name.upper(), node[name.upper()])
    for part in node.INHERIT:
        check_choice("MODEL.DISTILL.INHERIT", part, INHERITED_PARTS)
    if node.INHERIT and not teacher_needed(cfg):
        raise ConfigError(
            f"MODEL.DISTILL.INHERIT is {tuple(node.INHERIT)}, but no head of MODEL.DISTILL.HEADS "
            "has a teacher; name one that has, or empty it."
        )
    if "IMA" in node.HEADS and node.IMA.SCOPE == "mask" and not cfg.MODEL.MASK_ON:
        raise ConfigError(
            "MODEL.DISTILL.IMA.SCOPE is mask, which needs ground-truth masks; "
            "set MODEL.MASK_ON True or SCOPE box."
        )


# Factors of the terms of a loss: without any, adapters would get no gradient.
_TERMS = {
    "CROSSKD": ("CLASS_WEIGHT", "BOX_WEIGHT"),
    "DEFEAT": ("FOREGROUND_WEIGHT", "BACKGROUND_WEIGHT"),
    "DKD": ("ALPHA", "BETA"),
    "FGD": ("ALPHA", "BETA", "GAMMA", "LAMBDA"),
    "FKD": ("ATTENTION_WEIGHT", "POOLED_WEIGHT", "RELATION_WEIGHT"),
    "FRS": ("FEATURE_WEIGHT", "CLASS_WEIGHT"),
    "GID": ("FEATURE_WEIGHT", "RELATION_WEIGHT", "CLASS_WEIGHT", "BOX_WEIGHT"),
    "LD": ("BOX_WEIGHT", "REGION_WEIGHT", "CLASS_WEIGHT"),
    "MKD": ("FEA_WEIGHT", "MULTISCALE_WEIGHT", "FDMD_WEIGHT", "FAD_WEIGHT"),
    "MSSD": ("DISTILL_WEIGHT", "MASK_WEIGHT"),
    "TID": ("ALPHA_HIGH", "ALPHA_MED", "ALPHA_LOW"),
}


def _validate_terms(head: str, section: CfgNode) -> None:
    terms = _TERMS.get(head, ())
    if terms and not any(section[key] for key in terms):
        raise ConfigError(
            f"MODEL.DISTILL.{head}: {', '.join(terms)} are all 0; set one of them above 0, or "
            "WEIGHT 0.0 to switch the head off."
        )


_UNBUILDABLE = (
    *(ArithmeticError, AssertionError, AttributeError, LookupError),
    *(RuntimeError, TypeError, ValueError),
)


@contextmanager
def building(network: str) -> Iterator[None]:
    """Say in one sentence what detectron2 asserts about a config that it cannot build.

    Raises:
        ConfigError: with the statement that failed, which names the key in most cases.
    """
    try:
        yield
    except DistillError:
        raise
    except _UNBUILDABLE as e:
        frame = traceback.extract_tb(e.__traceback__)[-1]
        reason = " ".join(str(e.args[0] if e.args else "").split())
        where = f" at {os.path.basename(frame.filename)}:{frame.lineno} `{frame.line}`"
        if (frame.line or "").startswith("raise "):  # then the reason is written for users
            where = ""
        raise ConfigError(
            f"The {network} cannot be built from its config: {type(e).__name__} {reason}{where}"
        ) from e
