"""Every config key and its default."""

import warnings
from typing import Any

from detectron2.config import CfgNode, get_cfg

from ..heads.authors import AUTO
from ..nets import add_nets_config

with warnings.catch_warnings():
    warnings.simplefilter("ignore", UserWarning)  # its use of pkg_resources is not our user's


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
add_head_section("MaskLogitKD", TEMPERATURE=1.0)  # T > 0
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
    # Of detectron2's samplers, which reads these keys and has no defaults for them:
    # WeightedTrainingSampler: ((data set, factor > 0), ...), by which its images are repeated.
    cfg.DATASETS.setdefault("TRAIN_REPEAT_FACTOR", ())
    # RandomSubsetTrainingSampler: share of the images that are trained on, in (0, 1].
    cfg.DATALOADER.setdefault("RANDOM_SUBSET_RATIO", 1.0)
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
