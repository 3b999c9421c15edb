"""Keys of the heads: declaration, checks, and the authors' values number by number."""

import pytest
from detectron2.config import configurable
from detectron2.modeling import GeneralizedRCNN, PanopticFPN, RetinaNet, SemanticSegmentor
from detectron2.modeling.meta_arch import fcos
from torch import nn

from distill import heads
from distill.config import get_distill_cfg, validate_config
from distill.config.defaults import TEACHERS_KEYS, declared_keys
from distill.config.detectron2_rules import leaves
from distill.config.reference import head_rows, other_rows
from distill.errors import ConfigError
from distill.heads import DISTILL_HEAD_REGISTRY, DistillHead, FPNDistillHead
from distill.nets.atss import ATSS
from distill.nets.fcos import FCOS
from distill.nets.gfl import GFL
from distill.nets.reppoints import RepPoints
from distill.section import AUTO, POSITIVE, Key, Presets, Section, at_least
from distill.structures import NetworkInfo
from tests.support.cases import for_each
from tests.support.networks import built_head, distill_opts, network_info, tiny_cfg, tiny_model

HEADS = dict(iter(DISTILL_HEAD_REGISTRY))
PRESETS = {
    name: presets
    for name, cls in HEADS.items()
    if (presets := {k: key.presets for k, key in cls.section.items() if key.presets})
}

FGD = ("ALPHA", "BETA", "GAMMA", "LAMBDA", "TEMPERATURE")
MGD = ("WEIGHT", "MASK_RATIO")
FRS = ("FEATURE_WEIGHT", "CLASS_WEIGHT")
FKD = ("ATTENTION_WEIGHT", "POOLED_WEIGHT", "RELATION_WEIGHT", "TEMPERATURE")
CROSSKD = ("CLASS_WEIGHT", "BOX_WEIGHT", "REUSED_CONVS")
ONE_STAGE = (RetinaNet, FCOS, ATSS, GFL, RepPoints)
# Values that the authors published: head, keys, detectors, values.
TABLE = [
    ("FGD", FGD, (RetinaNet, GFL), (1e-3, 5e-4, 5e-4, 5e-6, 0.5)),
    ("FGD", FGD, (RepPoints,), (1.6e-3, 8e-4, 8e-4, 8e-6, 0.5)),
    ("FGD", FGD, (FCOS,), (1.6e-3, 8e-4, 8e-4, 8e-6, 0.8)),
    ("FGD", FGD, (GeneralizedRCNN,), (5e-5, 2.5e-5, 5e-5, 5e-7, 0.5)),
    ("MGD", MGD, ONE_STAGE, (2e-5, 0.65)),
    ("MGD", MGD, (GeneralizedRCNN,), (5e-7, 0.45)),
    ("MGD", MGD, (SemanticSegmentor,), (2e-5, 0.75)),
    ("MasKD", ("WEIGHT",), (RetinaNet,), (7.0,)),
    ("MasKD", ("WEIGHT",), (FCOS, RepPoints), (10.0,)),
    ("MasKD", ("WEIGHT",), (GeneralizedRCNN,), (1.0,)),
    ("PKD", ("WEIGHT",), (RetinaNet, FCOS, RepPoints), (10.0,)),
    ("PKD", ("WEIGHT",), (GeneralizedRCNN,), (6.0,)),
    ("FRS", FRS, (RetinaNet,), (0.005, 0.02)),
    ("FRS", FRS, (FCOS,), (0.01, 0.05)),
    ("FRS", FRS, (GFL,), (0.1, 0.05)),
    ("FRS", FRS, (GeneralizedRCNN,), (0.002, 0.1)),
    ("FKD", FKD, ONE_STAGE, (4e-4, 2e-2, 4e-4, 0.5)),
    ("FKD", FKD, (GeneralizedRCNN,), (7e-5, 4e-3, 7e-5, 0.5)),
    ("CrossKD", CROSSKD, (GFL,), (1.0, 4.0, 1)),
    ("CrossKD", CROSSKD, (RetinaNet, ATSS), (1.0, 1.0, 1)),
    ("CrossKD", CROSSKD, (FCOS,), (0.4, 0.75, 2)),  # after two of four convolutions
    ("CWD", ("WEIGHT", "TEMPERATURE"), (*ONE_STAGE, GeneralizedRCNN), (10.0, 1.0)),
    ("FGFI", ("WEIGHT", "THRESHOLD"), (GeneralizedRCNN,), (0.01, 0.5)),
    ("DeFeat", ("FOREGROUND_WEIGHT", "BACKGROUND_WEIGHT"), (GeneralizedRCNN,), (3.0, 12.0)),
    ("GID", ("FEATURE_WEIGHT", "RELATION_WEIGHT", *FRS[1:]), (RetinaNet,), (5e-4, 40.0, 0.1)),
    ("GID", ("BOX_WEIGHT",), (RetinaNet,), (1.0,)),
    ("LD", ("BOX_WEIGHT", "TEMPERATURE", "REGION_WEIGHT"), (GFL,), (0.25, 10.0, 0.25)),
    ("LD", ("CLASS_WEIGHT", "CLASS_TEMPERATURE"), (GFL,), (10.0, 2.0)),
    ("ReviewKD", ("WEIGHT",), (RetinaNet, GeneralizedRCNN), (1.0,)),
    ("DKD", ("ALPHA", "BETA", "TEMPERATURE"), (GeneralizedRCNN,), (1.0, 0.25, 1.0)),
]


def spec(cls):
    """Return the student's NetworkInfo for a class that is never built."""
    return NetworkInfo("student", tuple(k.__name__ for k in cls.__mro__), {}, frozenset(), ())


def values(head, cls, cfg=None):
    return HEADS[head].config_values(cfg or get_distill_cfg(), spec(cls))


@pytest.mark.parametrize("head, keys, detectors, expected", TABLE)
def test_the_quick_table(head, keys, detectors, expected):
    for cls in detectors:
        assert tuple(values(head, cls)[key] for key in keys) == expected


def test_every_value_of_the_authors_is_in_the_table():
    """By key and row, a new one fails."""
    tested = {
        (head, key, cls.__name__)
        for head, keys, detectors, _ in TABLE
        for key in keys
        for cls in detectors
    }
    rows = {(h, key, row) for h, keys in PRESETS.items() for key, x in keys.items() for row in x}
    assert {x for x in rows if x[2] != "DenseDetector"} <= tested


@pytest.mark.parametrize("head", PRESETS)
def test_a_key_with_authors_values_is_auto_in_the_config(head):
    section = get_distill_cfg().MODEL.DISTILL[head.upper()]
    assert {k for k, v in section.items() if v == AUTO} == set(PRESETS[head])
    for cls in (*ONE_STAGE, GeneralizedRCNN, PanopticFPN, SemanticSegmentor):
        assert AUTO not in values(head, cls).values()


def subclass(cls):
    return type(f"My{cls.__name__}", (cls,), {})


@pytest.mark.parametrize("cls", [RetinaNet, FCOS, GFL, RepPoints, GeneralizedRCNN])
@pytest.mark.parametrize("head", PRESETS)
def test_a_subclass_has_the_row_of_its_base(head, cls):
    assert values(head, subclass(subclass(cls))) == values(head, cls)


def test_panoptic_fpn_is_a_two_stage_detector():
    assert values("FGD", PanopticFPN) == values("FGD", GeneralizedRCNN)
    assert values("PKD", PanopticFPN)["WEIGHT"] == 6.0


def test_detectron2s_own_fcos_has_the_row_of_fcos():
    assert not issubclass(fcos.FCOS, FCOS)
    assert values("FGD", fcos.FCOS) == values("FGD", FCOS)


@pytest.mark.parametrize("cls", [ATSS, nn.Identity])
def test_a_detector_that_they_did_not_try_has_the_values_of_the_dense_ones(cls):
    assert values("FRS", cls) == values("FRS", RetinaNet)


@pytest.mark.parametrize("head", PRESETS)
def test_a_value_in_the_config_wins(head):
    for key in PRESETS[head]:
        for chosen in (0, 3):  # 0 is a choice, too
            cfg = get_distill_cfg()
            section = cfg.MODEL.DISTILL[head.upper()]
            section[key] = type(section[key])(chosen)
            expected = {**values(head, RetinaNet), key: chosen}
            assert values(head, RetinaNet, cfg) == expected


def test_nothing_is_written_to_the_config():
    cfg = get_distill_cfg()
    values("FGD", FCOS, cfg)
    assert cfg.MODEL.DISTILL.FGD.ALPHA == AUTO


# ---- In the heads that are built


def test_the_authors_values_reach_the_heads():
    fgd = built_head(heads.FGD, "fcos")
    assert (*fgd.factors, fgd.lambda_, fgd.temperature) == (1.6e-3, 8e-4, 8e-4, 8e-6, 0.8)
    assert fgd.weight == 1
    mgd = built_head(heads.MGD, "faster")
    assert (mgd.weight, mgd.mask_ratio) == (5e-7, 0.45)
    assert built_head(heads.PKD, "retinanet").weight == 10
    frs = built_head(heads.FRS, "gfl")
    assert (frs.feature_weight, frs.class_weight) == (0.1, 0.05)
    fkd = built_head(heads.FKD, "faster")
    weights = fkd.attention_weight, fkd.pooled_weight, fkd.relation_weight
    assert (*weights, fkd.temperature) == (7e-5, 4e-3, 7e-5, 0.5)
    crosskd = built_head(heads.CrossKD, "gfl")
    assert (crosskd.class_weight, crosskd.box_weight) == (1, 4)
    defeat = built_head(heads.DeFeat, "faster")
    assert (defeat.foreground_weight, defeat.background_weight) == (3, 12)
    fgfi = built_head(heads.FGFI, "faster")
    assert (fgfi.weight, fgfi.threshold) == (0.01, 0.5)
    ld = built_head(heads.LD, "gfl")
    assert ld.factors == {"box": 0.25 / 4, "region": 0.25 / 16, "cls": 10}
    assert (ld.temperature, ld.class_temperature, ld.released_region) == (10, 2, False)
    gid = built_head(heads.GID, "retinanet")
    assert gid.factors == {"feature": 5e-4, "relation": 40, "cls": 0.1, "box": 1}
    assert gid.threshold == 0.5


@pytest.mark.parametrize("convs, expected", [(1, 0), (2, 1), (3, 2), (4, 2)])
def test_crosskd_leaves_the_student_one_convolution_at_least(convs, expected):
    model = tiny_model("fcos", "MODEL.FCOS.NUM_CONVS", convs)
    nets = network_info("student", model), network_info("teacher", model)
    assert heads.CrossKD(tiny_cfg("fcos"), *nets).reused_convs == expected


def test_values_of_the_config_reach_the_heads():
    opts = ("MODEL.DISTILL.FGD.ALPHA", 0.0, "MODEL.DISTILL.FGD.TEMPERATURE", 2.0)
    fgd = built_head(heads.FGD, "fcos", *opts)
    assert fgd.factors == (0.0, 8e-4, 8e-4) and fgd.temperature == 2
    assert built_head(heads.PKD, "faster", "MODEL.DISTILL.PKD.WEIGHT", 0.25).weight == 0.25


# ---- Declarations


@for_each("name, key", declared_keys().items())
def test_every_key_has_a_meaning_and_a_range_that_contains_its_values(name, key):
    assert len(key.meaning.split()) > 1 and not key.meaning.endswith(".")
    assert key.rule.text
    key.check(name, key.initial)
    for value in key.presets.values():
        key.check(name, value)


def test_the_config_has_the_declared_keys_only():
    """No key is declared in two places."""
    own = {"MODEL.DISTILL", "SOLVER.EMA", "TEST.SLIDING_WINDOW"}
    found = {k for k, _ in leaves(get_distill_cfg()) if any(k.startswith(x) for x in own)}
    assert found == {k for k in declared_keys() if any(k.startswith(x) for x in own)}


def test_new_configs_share_no_lists():
    get_distill_cfg().MODEL.DISTILL.TEACHER.OPTS.append("SEED")
    assert get_distill_cfg().MODEL.DISTILL.TEACHER.OPTS == []


@pytest.mark.parametrize("head", [x for x in HEADS if HEADS[x].section.terms])
def test_all_terms_0_is_refused(head):
    cfg = get_distill_cfg()
    node = cfg.MODEL.DISTILL[head.upper()]
    first, *others = HEADS[head].section.terms
    for key in (first, *others):
        node[key] = 0.0
    with pytest.raises(ConfigError, match="are all 0") as error:
        HEADS[head].check_config(cfg)
    assert all(key in str(error.value) for key in (first, *others))
    node[first] = 0.5
    HEADS[head].check_config(cfg)
    node[first] = AUTO  # the authors' value
    HEADS[head].check_config(cfg)


@pytest.mark.parametrize(
    "family, head, opts, words",
    [
        ("faster", "IMA", ("SCOPE", "mask"), ["IMA.SCOPE is mask", "MODEL.MASK_ON True"]),
        ("faster", "MasKD", ("TOKEN_ITERS", 40000), ["MASKD.TOKEN_ITERS is 40000", "MAX_ITER"]),
        ("faster", "MasKD", ("STOP_ITER", 2000), ["MASKD.TOKEN_ITERS is 2000", "STOP_ITER"]),
        ("semantic", "MasKDLogits", ("TOKEN_ITERS", 50000), ["MASKDLOGITS.TOKEN_ITERS is 50000"]),
        ("semantic", "CIRKD", ("PIXELS", 100), ["SOLVER.IMS_PER_BATCH is 16", "CIRKD.PIXELS 100"]),
        ("semantic", "CIRKD", ("REGIONS", 15), ["SOLVER.IMS_PER_BATCH is 16", "REGIONS 15"]),
    ],
)
def test_a_head_checks_keys_together(family, head, opts, words):
    cfg = tiny_cfg(family, *distill_opts(family, (head,)))
    validate_config(cfg, training=False)
    cfg.MODEL.DISTILL[head.upper()][opts[0]] = opts[1]
    with pytest.raises(ConfigError) as error:
        validate_config(cfg, training=False)
    assert all(word in str(error.value) for word in words), error.value


# ---- The config reference


def test_the_reference_has_every_declared_key_once():
    rows = [*other_rows(), *(row for rows in head_rows().values() for row in rows)]
    of_teachers = [f"MODEL.DISTILL.TEACHERS[i].{name}" for name in TEACHERS_KEYS]
    assert sorted(row.key for row in rows) == sorted([*declared_keys(), *of_teachers])


def test_a_row_of_the_reference_says_all_of_a_key():
    rows = {row.key: row for row in head_rows()["CrossKD"]}
    row = rows["MODEL.DISTILL.CROSSKD.REUSED_CONVS"]
    assert row.default == AUTO and row.presets == {"DenseDetector": 1, "FCOS": 2}
    assert row.values == "a whole number from 0" and "convolutions" in row.meaning
    assert rows["MODEL.DISTILL.CROSSKD.WEIGHT"].presets == {}


# ---- A head of a user


@pytest.fixture
def angle():
    """A registered head, and its registration undone."""

    @DISTILL_HEAD_REGISTRY.register()
    class Angle(FPNDistillHead):
        section = Section(
            WEIGHT=Presets(DenseDetector=2.0, GeneralizedRCNN=3.0),
            WARMUP_ITERS=100,
            POWER=Key(1.0, "exponent of the angle", POSITIVE),
            NEAR=Key(1.0, "factor of the nearest cells", at_least(0), term=True),
            FAR=Key(0.0, "factor of the other cells", at_least(0), term=True),
        )

        @configurable
        def __init__(self, *, power, near, far, **kwargs):
            super().__init__(**kwargs)
            self.options = power, near, far

    yield Angle
    DISTILL_HEAD_REGISTRY._obj_map.pop("Angle")


def test_a_users_head_has_its_section(angle):
    section = get_distill_cfg().MODEL.DISTILL.ANGLE
    assert section == {
        **{"WEIGHT": -1.0, "WARMUP_ITERS": 100, "STOP_ITER": 0, "IN_FEATURES": ()},
        **{"POWER": 1.0, "NEAR": 1.0, "FAR": 0.0},
    }


def test_a_users_head_is_built_from_its_section(angle):
    head = built_head(angle, "faster", "MODEL.DISTILL.ANGLE.POWER", 2.0)
    assert head.options == (2.0, 1.0, 0.0) and head.weight == 3.0
    assert built_head(angle, "retinanet").weight == 2.0


@pytest.mark.parametrize(
    "opts, words",
    [
        (("POWER", 0.0), ["MODEL.DISTILL.ANGLE.POWER is 0.0", "above 0"]),
        (
            ("WEIGHT", -2.0),
            ["MODEL.DISTILL.ANGLE.WEIGHT is -2.0", "at least 0", "-1 for the auth"],
        ),
        (("NEAR", 0.0), ["MODEL.DISTILL.ANGLE: NEAR, FAR are all 0"]),
        (("IN_FEATURES", (3,)), ["MODEL.DISTILL.ANGLE.IN_FEATURES is (3,)", "list of texts"]),
    ],
)
def test_a_users_head_gets_the_same_checks(opts, words, angle):
    cfg = users_cfg()
    cfg.MODEL.DISTILL.ANGLE[opts[0]] = opts[1]
    with pytest.raises(ConfigError) as error:
        validate_config(cfg, training=False)
    assert all(word in str(error.value) for word in words), error.value


def users_cfg():
    return tiny_cfg(
        "faster",
        *("MODEL.META_ARCHITECTURE", "DistillRCNN", "MODEL.DISTILL.HEADS", ("Angle",)),
    )


def test_a_users_head_may_check_keys_together(angle, monkeypatch):
    def check(cls, cfg):
        raise ConfigError(f"{cfg.MODEL.DISTILL.ANGLE.POWER} is odd")

    cfg = users_cfg()
    validate_config(cfg, training=False)
    monkeypatch.setattr(angle, "check_config", classmethod(check))
    with pytest.raises(ConfigError, match=r"1\.0 is odd"):
        validate_config(cfg, training=False)


def test_a_head_that_is_registered_too_late_says_so(angle):
    cfg = users_cfg()
    del cfg.MODEL.DISTILL["ANGLE"]
    with pytest.raises(ConfigError, match=r"Angle has no config section; .*get_distill_cfg"):
        validate_config(cfg, training=False)


@pytest.mark.parametrize(
    "keys, error, words",
    [
        ({"POWER": 1.0}, TypeError, "POWER=1.0: declare a new key"),
        ({"WEIGHT": -2.0}, ValueError, "default -2.0 must be at least 0"),
        ({"IN_FEATURES": None}, TypeError, "IN_FEATURES=None"),
    ],
)
def test_a_wrong_declaration_fails_where_it_is_made(keys, error, words):
    with pytest.raises(error, match=words):
        type("Wrong", (DistillHead,), {"section": Section(**keys)})


def test_a_default_outside_its_range_is_refused():
    with pytest.raises(ValueError, match=r"default 0 must be above 0"):
        Key(Presets(DenseDetector=1, FCOS=0), "a factor", POSITIVE)


def test_sections_are_inherited_replaced_and_removed():
    class Base(DistillHead):
        section = Section(A=Key(1, "first key", POSITIVE), B=Key(2, "second key", POSITIVE))

    class Derived(Base):
        section = Section(A=3, B=None, C=Key(4, "third key", POSITIVE))

    class Same(Derived):
        pass

    schedule = {"WEIGHT": 1.0, "WARMUP_ITERS": 0, "STOP_ITER": 0}
    assert {k: x.initial for k, x in Derived.section.items()} == {**schedule, "A": 3, "C": 4}
    assert Same.section == Derived.section and set(Base.section) == {*schedule, "A", "B"}
    assert Derived.section["A"].meaning == "first key"
