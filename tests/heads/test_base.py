"""The contract of every head: schedule, names, connected zeros, private randomness."""

import inspect
from dataclasses import fields

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from torch import nn

from distill.config import get_distill_cfg
from distill.errors import ConfigError
from distill.heads import DISTILL_HEAD_REGISTRY, DistillHead, build_heads
from distill.heads.base import StepGenerator
from distill.section import AUTO
from distill.structures import Batch, NetworkInfo, NetworkOutputs
from distill.utils.distributed import reduce_mean
from tests.support.networks import network_info, tiny_cfg, tiny_model

CPU = torch.device("cpu")
REGISTERED = dict(iter(DISTILL_HEAD_REGISTRY))
every_head = pytest.mark.parametrize("cls", REGISTERED.values(), ids=REGISTERED)


class Gap(DistillHead):
    """|S - T| summed and its half; an adapter that it does not use."""

    needs = frozenset({"features"})
    parts = ("", "half")

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.adapter = nn.Linear(2, 2)

    def losses(self, student, teacher):
        gap = (student.features["p2"] - teacher.features["p2"]).abs().sum()
        return {"": gap, "half": gap / 2}


def outputs(value, requires_grad=False):
    features = {
        "p2": torch.full((1, 1, 2, 2), float(value)),
        "p3": torch.full((1, 1, 1, 1), float(value)),
    }
    for x in features.values():
        x.requires_grad_(requires_grad)
    return NetworkOutputs(Batch([], (8, 8)), features=features)


@pytest.mark.parametrize(
    "iteration, expected",
    [(0, 0.0), (1, 0.5), (3, 1.5), (4, 2.0), (9, 2.0), (10, 0.0), (1000, 0.0)],
)
def test_schedule(iteration, expected):
    with EventStorage(iteration):
        assert Gap(weight=2.0, warmup_iters=4, stop_iter=10).factor() == expected


@pytest.mark.parametrize("iteration", [0, 1, 10**6])
def test_without_schedule_the_weight_is_constant(iteration):
    with EventStorage(iteration):
        assert Gap(weight=3.0).factor() == 3.0
        assert Gap(weight=0.0).factor() == 0.0


def test_outside_of_training_the_iteration_is_zero():
    assert Gap(weight=2.0).factor() == 2.0
    assert Gap(weight=2.0, warmup_iters=5).factor() == 0.0


def test_losses_are_named_and_weighted():
    losses = Gap(weight=3.0)(outputs(5), outputs(4))
    assert {k: v.item() for k, v in losses.items()} == {"loss_gap": 12.0, "loss_gap/half": 6.0}


def test_the_factor_of_the_iteration_is_applied():
    with EventStorage(1):
        losses = Gap(warmup_iters=4)(outputs(5), outputs(4))
    assert losses["loss_gap"] == 1.0


@pytest.mark.parametrize("options", [{"weight": 0.0}, {"stop_iter": 3}, {"warmup_iters": 100}])
def test_an_inactive_head_is_a_connected_zero(options):
    head, student = Gap(**options), outputs(5, requires_grad=True)
    with EventStorage(0 if "warmup_iters" in options else 3):
        losses = head(student, outputs(4))
    assert list(losses) == ["loss_gap", "loss_gap/half"]  # the names of an active head
    total = sum(losses.values())
    total.backward()
    assert total == 0
    assert all((p.grad == 0).all() for p in head.adapter.parameters())
    # The smallest feature is enough: the backbone hangs on it.
    assert student.features["p3"].grad == 0


def test_without_a_teacher_a_head_is_a_connected_zero():
    head = Gap()
    loss = head(outputs(5, requires_grad=True), None)["loss_gap"]
    loss.backward()
    assert loss == 0
    assert all(p.grad is not None for p in head.parameters())


@pytest.mark.parametrize("net", ["student", "teacher"])
def test_a_signal_that_a_network_lacks_is_named(net):
    specs = [
        NetworkInfo(
            name,
            ("Net",),
            {"p2": ShapeSpec()},
            frozenset() if name == net else frozenset({"features"}),
            (),
        )
        for name in ("student", "teacher")
    ]
    assert Gap.problem(*specs) == (f"it compares features, which the {net} (Net) does not produce")


def test_a_head_that_finds_all_its_signals_has_no_problem():
    spec = NetworkInfo("student", ("Net",), {}, frozenset({"features", "dense"}), ())
    assert Gap.problem(spec, spec) is None


@pytest.mark.parametrize("count, expected", [(0.0, 1.0), (0.25, 1.0), (1.0, 1.0), (7.0, 7.0)])
def test_reduce_mean_in_one_process(count, expected):
    assert reduce_mean(torch.tensor(count)) == expected


def test_reduce_mean_is_detached_and_leaves_its_argument():
    mass = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    reduced = reduce_mean(mass * 1, minimum=2.0)
    assert reduced == 2 and reduced.dtype == torch.float32 and not reduced.requires_grad
    assert mass == 0.5
    assert reduce_mean(torch.tensor(1e-3), minimum=1e-6) == torch.tensor(1e-3)


def draw(random, number=3):
    return torch.rand(number, generator=random.generator(CPU)).tolist()


def test_random_state_is_a_function_of_the_seed_alone():
    before = torch.get_rng_state()
    first = draw(StepGenerator(5))
    torch.manual_seed(99)
    assert draw(StepGenerator(5)) == first
    assert draw(StepGenerator(6)) != first
    torch.set_rng_state(before)
    draw(StepGenerator(5))
    assert torch.equal(before, torch.get_rng_state())


def test_random_state_goes_on_where_it_stopped():
    random = StepGenerator(5)
    assert draw(random) != draw(random)


def test_random_state_is_reseeded_before_and_after_the_first_draw():
    random = StepGenerator(5)
    random.reseed(7)
    first = draw(random)
    draw(random, number=10)
    random.reseed(7)
    assert draw(random) == first != draw(StepGenerator(5))
    assert random.state_dict() == {}  # the trainer reseeds: a checkpoint needs nothing


def test_a_negative_seed_is_allowed():
    assert draw(StepGenerator(-1)) == draw(StepGenerator(0))  # detectron2's "no seed" is -1


def test_processes_draw_apart(monkeypatch):
    first = draw(StepGenerator(5))
    monkeypatch.setattr(comm, "get_rank", lambda: 1)
    assert draw(StepGenerator(5)) != first


@every_head
def test_registered_heads_keep_the_contract(cls):
    assert issubclass(cls, DistillHead)
    assert cls.needs and cls.needs <= {f.name for f in fields(NetworkOutputs)} - {"batch"}
    assert inspect.getdoc(cls)
    section = cls.config_node(get_distill_cfg())
    assert section.WEIGHT > 0 or section.WEIGHT == AUTO
    schedule = section.WARMUP_ITERS, section.STOP_ITER
    assert schedule == (500 if cls.__name__ == "FRS" else 0, 0)  # its authors' warm-up
    parameters = inspect.signature(cls.__init__).parameters.values()
    assert all(p.kind in (p.KEYWORD_ONLY, p.VAR_KEYWORD) for p in list(parameters)[1:])


def test_heads_are_built_by_name_in_order_with_their_keys():
    cfg = tiny_cfg("faster", "MODEL.DISTILL.HEADS", ("ROIKD", "FitNet"))
    cfg.MODEL.DISTILL.ROIKD.WEIGHT = 0.5
    cfg.MODEL.DISTILL.FITNET.WARMUP_ITERS = 7
    cfg.MODEL.DISTILL.FITNET.STOP_ITER = 9
    model = tiny_model("faster")
    heads = build_heads(cfg, network_info("student", model), network_info("teacher", model))
    assert list(heads) == ["ROIKD", "FitNet"]
    assert (heads["ROIKD"].weight, heads["ROIKD"].warmup_iters, heads["ROIKD"].stop_iter) == (
        0.5,
        0,
        0,
    )
    fitnet = heads["FitNet"]
    assert (fitnet.weight, fitnet.warmup_iters, fitnet.stop_iter) == (1.0, 7, 9)


def test_a_head_that_does_not_fit_the_family_fails_when_it_is_built():
    cfg = tiny_cfg("retinanet", "MODEL.DISTILL.HEADS", ("FitNet", "ROIKD"))
    model = tiny_model("retinanet")
    with pytest.raises(ConfigError) as e:
        build_heads(cfg, network_info("student", model), network_info("teacher", model))
    message = str(e.value)
    assert message.startswith(
        "MODEL.DISTILL.HEADS: ROIKD does not work here because it compares rois, which the student "
        "(RetinaNet) does not produce; heads that do: "
    )
    working = message.removesuffix(".").rpartition(": ")[2].split(", ")
    assert {"FitNet", "IMA", "DenseKD"} <= set(working)
    assert not {"ROIKD", "MaskLogitKD"} & set(working)
