"""The balance: the heads' gradients have the ratio that is asked for, whatever their losses are."""

import copy
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

from distill import DistillModel
from distill.config import get_distill_cfg
from distill.engine.nonfinite import FiniteGuard
from distill.engine.train_loop import TrainLoop
from distill.families.recorder import Call, Recorder
from distill.modeling.balance import BOUND, MOMENTUM, PATIENCE, SPIKE, GradientBalance, balance_of
from tests.support.networks import FAMILIES, HEADS, distilled, image_dict, outspoken_model
from tests.support.processes import WORLD, needs_loopback, spawn, starts_processes

ON = ("MODEL.DISTILL.BALANCE.MODE", "gradient", "SOLVER.MAX_ITER", 100)


class Toy:
    """A student of two maps, whose gradients are what the test says.

    Args:
        heads: their names.
        fade: option of the balance, which has the ratio 2 and lasts 10 iterations.
        strengths: factors of the terms of all heads.
    """

    def __init__(self, *heads: str, fade: float = 0.0, **strengths: float):
        authors, terms = dict.fromkeys(heads, 1.0), dict.fromkeys(heads, strengths)
        shares = dict.fromkeys(heads, 1.0)
        self.balance = GradientBalance(authors, terms, shares, ratio=2.0, fade=fade, max_iter=10)
        self.iteration = 0
        self.weights = authors
        self.adapter = nn.Parameter(torch.ones(()))

    def step(self, task: Any = 1.0, /, follow: bool = True, **heads: Any) -> dict[str, Any]:
        """Return the scalars, the student's gradient by map, and the adapter's gradient.

        Args:
            task: gradient of the task in each cell of a map, or by map.
            follow: the step changes the weights, so that the balance follows it.
            heads: gradient of each head, or by map, or in one cell of P3 by term.
        """
        maps = {k: torch.ones(4, requires_grad=True) for k in ("p3", "p4")}
        outputs = {k: x * 1 for k, x in maps.items()}
        recorder = Recorder(["backbone"])
        recorder.add("backbone", Call((), outputs))
        self.adapter.grad = None
        with EventStorage(self.iteration):
            self.balance.before_step()
            self.balance.start({name: self.weights[name] for name in heads})
            loss = sum(x.sum() for x in weighted(outputs, task).values())
            for name, gradient in heads.items():
                own = self.balance.branch(name, recorder)["backbone"].output
                parts = weighted(own, gradient)
                weighed = self.balance.weigh(name, parts)
                assert weighed.keys() == parts.keys()
                loss = loss + sum(weighed.values()) * self.adapter
            with self.balance.measure():
                loss.backward()
            scalars = self.balance.after_step() if follow else {}
        self.iteration += 1
        found = {k: x.grad for k, x in maps.items()}
        return {**scalars, **found, "adapter": self.adapter.grad}


def weighted(maps: dict[str, Tensor], gradients: Any) -> dict[str, Any]:
    """Return losses with such gradients: one per map, or one with a term per cell of P3."""
    if not isinstance(gradients, dict):
        gradients = dict.fromkeys(maps, gradients)
    if gradients.keys() <= maps.keys():
        return {k: (maps[k] * x).sum() for k, x in gradients.items()}
    return {"p3": {k: maps["p3"][n] * x for n, (k, x) in enumerate(gradients.items())}}


# ---- Gradients that are known.


def test_the_ratio_is_reached_at_every_map() -> None:
    toy = Toy("FitNet")
    gradients = {"p3": 1000.0, "p4": 0.01}
    first = toy.step(3.0, FitNet=gradients)
    assert torch.equal(first["p3"], torch.full((4,), 3.0))  # it is measured only
    second = toy.step(3.0, FitNet=gradients)
    for level in ("p3", "p4"):
        torch.testing.assert_close(second[level], torch.full((4,), 3.0 + 2 * 3.0))
        assert second[f"kd_ratio/fitnet/backbone.{level}"] == pytest.approx(2.0)
    assert second["kd_factor/fitnet/backbone.p3"] == pytest.approx(2 * 3 / 1000)


def test_the_adapter_learns_from_the_loss_itself() -> None:
    toy = Toy("FitNet")
    for _ in range(2):
        assert float(toy.step(3.0, FitNet=1000.0)["adapter"]) == pytest.approx(8 * 1000.0)


def test_heads_of_one_map_share_it_and_a_stopped_one_leaves_its_share() -> None:
    toy = Toy("FitNet", "IMA")
    for _ in range(2):
        found = toy.step(FitNet=5.0, IMA={"p3": 0.1})
    assert found["kd_ratio/fitnet/backbone.p3"] == pytest.approx(1.0)
    assert found["kd_ratio/ima/backbone.p3"] == pytest.approx(1.0)
    assert found["kd_ratio/fitnet/backbone.p4"] == pytest.approx(2.0)
    assert toy.balance.share("FitNet") == pytest.approx(1.5)
    assert toy.step(FitNet=5.0)["kd_ratio/fitnet/backbone.p3"] == pytest.approx(2.0)


def test_weights_and_their_schedule_multiply_the_ratio() -> None:
    toy = Toy("FitNet")
    for weight in (1.0, 0.5, 0.25, 4.0):
        toy.weights["FitNet"] = weight
        found = toy.step(FitNet=5.0)
        if toy.iteration > 1:
            assert found["kd_ratio/fitnet/backbone.p3"] == pytest.approx(2.0 * weight)


def test_a_head_may_ask_for_a_share_of_the_ratio() -> None:
    toy = Toy("AT")
    toy.balance.shares["AT"] = 0.1
    for _ in range(2):
        found = toy.step(AT=5.0)
    assert found["kd_ratio/at/backbone.p3"] == pytest.approx(0.2)
    model = distilled("semantic", ["AT", "SKD", "CWD"], *ON)
    assert model.balance.shares == {"AT": 0.1, "SKD": 0.1, "CWD": 1.0}


@pytest.mark.parametrize(("family", "share"), [("faster", 0.1), ("retinanet", 1.0)])
def test_what_follows_an_rpn_has_a_share(family: str, share: float) -> None:
    heads = ["FGFI", "DenseKD", "FitNet"]
    model = distilled(family, heads, *ON)
    assert model.balance.shares == dict(zip(heads, (share, share, 1.0)))


def test_cosines_of_a_period() -> None:
    """Each head's own, at each map; none of a gradient that is 0, as in the first step."""
    toy = Toy("FitNet", "IMA")
    toy.balance.cosine_period = 2
    task, other = torch.tensor([3.0, 0, 0, 0]), torch.tensor([0, 7.0, 0, 0])
    heads = {"FitNet": {"p3": -5 * task, "p4": 0.6 * task + 0.8 * 3 / 7 * other}, "IMA": 2 * other}
    cosines = [
        {k: x for k, x in toy.step(task, **heads).items() if k.startswith("kd_cosine")}
        for _ in range(4)
    ]
    assert cosines[0] == cosines[1] == cosines[3] == {}
    assert cosines[2] == {
        "kd_cosine/fitnet/backbone.p3": pytest.approx(-1.0),
        "kd_cosine/fitnet/backbone.p4": pytest.approx(0.6),
        "kd_cosine/ima/backbone.p3": pytest.approx(0.0),
        "kd_cosine/ima/backbone.p4": pytest.approx(0.0),
    }


def test_the_ratio_falls_to_0_at_the_end() -> None:
    toy = Toy("FitNet", fade=0.5)
    found = [toy.step(FitNet=5.0).get("kd_ratio/fitnet/backbone.p3") for _ in range(10)]
    assert found[1:] == pytest.approx([2.0] * 5 + [1.6, 1.2, 0.8, 0.4])


def test_the_factor_follows_slowly() -> None:
    toy = Toy("FitNet")
    for _ in range(2):
        toy.step(FitNet=1.0)
    ratio = toy.step(FitNet=8.0)["kd_ratio/fitnet/backbone.p3"]
    assert ratio == pytest.approx(16.0)  # before the factor follows
    factor = toy.step(FitNet=8.0)["kd_factor/fitnet/backbone.p3"]
    assert factor == pytest.approx(2.0 * 8**-MOMENTUM)


def test_a_spike_is_cut() -> None:
    toy = Toy("FitNet")
    for _ in range(2):
        toy.step(3.0, FitNet=1.0)
    found = toy.step(3.0, FitNet=1e6)
    assert found["kd_ratio/fitnet/backbone.p3"] == pytest.approx(2.0 * SPIKE)
    torch.testing.assert_close(found["p3"], torch.full((4,), 3.0 + 3.0 * 2.0 * SPIKE))


@pytest.mark.parametrize("bad", [0.0, math.nan, math.inf])
def test_gradients_of_0_or_not_finite_change_nothing(bad: float) -> None:
    toy = Toy("FitNet")
    toy.step(3.0, FitNet=5.0)
    before = toy.balance.state_dict()
    toy.step(3.0, FitNet=bad)
    toy.step(bad, FitNet=5.0)
    toy.step(0.1, follow=False, FitNet=500.0)  # a skipped step
    assert toy.balance.state_dict() == before
    assert toy.step(3.0, FitNet=5.0)["kd_ratio/fitnet/backbone.p3"] == pytest.approx(2.0)


def test_a_map_that_the_task_does_not_train_gets_nothing() -> None:
    toy = Toy("FitNet", "IMA")
    for _ in range(3):
        found = toy.step({"p3": 0.0, "p4": 1.0}, FitNet=5.0, IMA=0.3)
    assert torch.equal(found["p3"], torch.zeros(4))
    assert "kd_ratio/fitnet/backbone.p3" not in found
    assert found["kd_ratio/fitnet/backbone.p4"] == pytest.approx(1.0)


def test_a_factor_has_a_bound() -> None:
    toy = Toy("FitNet")
    toy.step(FitNet=1.0)
    for gradient in (1e-10, 1e10):
        for _ in range(200):
            toy.step(FitNet=gradient)
        toy.iteration = 0
        factor = toy.step(FitNet=1.0)["kd_factor/fitnet/backbone.p3"]
        assert factor == pytest.approx(2.0 * (BOUND if gradient < 1 else 1 / BOUND), rel=1e-6)


def follow(toy: Toy, **heads: Any) -> dict[str, Any]:
    """Repeat a step until the factor of the whole has followed the mixture of its terms."""
    for _ in range(80):
        found = toy.step(3.0, **heads)
        toy.iteration = 1
    return found


def test_terms_have_equal_parts_of_the_gradient_of_their_head() -> None:
    """Each reads another cell, so that their gradients can be told apart."""
    found = follow(Toy("FGD"), FGD={"foreground": 100.0, "background": 1.0, "relation": 0.2})
    given = found["p3"] - 3.0
    torch.testing.assert_close(given[1:3], given[0].expand(2), rtol=1e-4, atol=0.0)
    assert float(given.norm()) == pytest.approx(2 * 3 * 2, rel=1e-3)
    assert found["kd_ratio/fgd/backbone.p3"] == pytest.approx(2.0, rel=1e-3)


def test_a_term_of_nearly_nothing_has_a_bound() -> None:
    given = follow(Toy("FGD"), FGD={"foreground": 1.0, "relation": 1e-6})["p3"] - 3.0
    assert float(given[1] / given[0]) == pytest.approx(1e-6 * BOUND / 0.5, rel=1e-3)


def test_explicit_weights_of_terms_divide_the_gradient() -> None:
    toy = Toy("FGD", background=3.0)
    found = follow(toy, FGD={"foreground": 100.0, "background": 1.0})
    given = found["p3"] - 3.0
    assert float(given[1] / given[0]) == pytest.approx(3.0, rel=1e-3)
    assert found["kd_ratio/fgd/backbone.p3"] == pytest.approx(2.0 * (1 + 3) / 2, rel=1e-3)


def test_a_term_alone_has_its_strength_and_keeps_its_loss() -> None:
    toy = Toy("CrossKD", p3=0.5)
    for _ in range(2):
        found = toy.step(3.0, CrossKD=10.0)
    assert found["kd_ratio/crosskd/backbone.p3"] == pytest.approx(1.0)
    assert found["kd_ratio/crosskd/backbone.p4"] == pytest.approx(2.0)
    assert float(found["adapter"]) == pytest.approx(8 * 10.0)


def test_other_backwards_are_scaled_and_not_measured() -> None:
    """Such as those of the cosines."""
    one = {"FitNet": 1.0}
    balance = GradientBalance(one, {"FitNet": {}}, one, ratio=2.0, fade=0.0, max_iter=10)
    measured = {"backbone": {"FitNet": [3.0, 1.0, 3.0]}}
    balance.load_state_dict({"measured": measured, "terms": {}})
    x = torch.ones(4, requires_grad=True)
    recorder = Recorder(["backbone"])
    recorder.add("backbone", Call((), x))
    balance.start({"FitNet": 1.0})
    branch = balance.branch("FitNet", recorder)["backbone"].output
    (gradient,) = torch.autograd.grad(branch.sum(), x, retain_graph=True)
    torch.testing.assert_close(gradient, torch.full((4,), 6.0))
    assert balance.after_step() == {}


# ---- Networks.


def steps(
    model: DistillModel,
    batches: list[Any],
    folder: Path,
    parts: int = 1,
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.SGD,
) -> TrainLoop:
    """Train as the trainer does."""
    cfg = get_distill_cfg()
    cfg.OUTPUT_DIR = str(folder)
    loop = TrainLoop(
        model,
        batches,
        optimizer([p for p in model.parameters() if p.requires_grad], lr=1e-3),
        amp=False,
        device="cpu",
        seed=0,
        guard=FiniteGuard(cfg, model, model.student, seed=0),
        accumulate=parts,
    )
    with EventStorage() as storage:
        for loop.iter in range(len(batches)):
            loop.run_step()
            storage.step()
    return loop


def batches_of(number: int, size: int = 2) -> list[Any]:
    return [
        [image_dict(size * k + i, 64, 64, semantic=True) for i in range(size)]
        for k in range(number)
    ]


@pytest.mark.e2e
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("family", ["faster", "retinanet"])
def test_the_size_of_a_loss_does_not_matter(
    family: str, optimizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thousand times the loss trains the same student.

    With SGD, adapters would learn a thousand times as fast. So the networks need no adapters.
    """
    heads = ("FitNet", "DenseKD", "MKD")
    teacher = outspoken_model(family, seed=1, fpn=16 if optimizer is torch.optim.SGD else 24)
    students = []
    for scale in (1.0, 1024.0):
        model = distilled(family, heads, *ON, teacher=copy.deepcopy(teacher))
        for head in model.heads.values():
            larger = partial(scaled, head.losses, scale)
            monkeypatch.setattr(head, "losses", larger)
        steps(model, batches_of(4), tmp_path, optimizer=optimizer)
        students.append(model.student.state_dict())
    for name, x in students[0].items():
        torch.testing.assert_close(x, students[1][name], rtol=1e-4, atol=1e-5)


def scaled(losses: Callable[..., dict[str, Tensor]], factor: float, *args: Any) -> Any:
    return {k: x * factor for k, x in losses(*args).items()}


def test_the_heads_own_gradients_are_those_without_a_balance() -> None:
    gradients = []
    for opts in ((), ON):
        model = distilled("faster", ["FitNet"], *opts, teacher=outspoken_model("faster", fpn=24))
        with EventStorage():
            torch.manual_seed(0)
            sum(model(batches_of(1)[0]).values()).backward()
        gradients.append([p.grad for p in model.heads.parameters()])
    assert len(gradients[0]) > 3
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.e2e
@pytest.mark.parametrize("family", FAMILIES)
def test_every_head_of_every_family_is_measured(family: str, tmp_path: Path) -> None:
    keys = ("MASKD.TOKEN_ITERS", "MASKDLOGITS.TOKEN_ITERS", "LGD.DETACH_ITERS", "FRS.WARMUP_ITERS")
    opts = [*ON, *(x for key in keys for x in (f"MODEL.DISTILL.{key}", 0))]
    teacher = outspoken_model(family, seed=1, fpn=24)
    model = distilled(family, HEADS[family], *opts, teacher=teacher)
    steps(model, batches_of(2), tmp_path)
    measured = {head for heads in model.balance.measured.values() for head in heads}
    assert measured == set(HEADS[family])


@pytest.mark.e2e
def test_what_self_distillation_makes_of_the_student_has_its_own_gradient(tmp_path: Path) -> None:
    """Before LGD distils, its teacher's detection losses reach the student as without balance."""
    found = []
    for mode in ("gradient", "none"):
        opts = (*ON, "MODEL.DISTILL.BALANCE.MODE", mode, "MODEL.DISTILL.LGD.DETACH_ITERS", 9)
        model = distilled("retinanet", ["LGD"], *opts)
        steps(model, batches_of(2), tmp_path)
        found.append([x.grad for x in model.student.parameters() if x.grad is not None])
    assert found[0]
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.e2e
def test_phases_and_schedules_act_after_the_factor(tmp_path: Path) -> None:
    """In its first phase MasKD gives the student nothing; then it is measured once."""
    phase = ("MODEL.DISTILL.MASKD.TOKEN_ITERS", 2, "MODEL.DISTILL.FITNET.WARMUP_ITERS", 4)
    stop = ("MODEL.DISTILL.PKD.STOP_ITER", 2)
    model = distilled("faster", ["MasKD", "FitNet", "PKD"], *ON, *phase, *stop)
    steps(model, batches_of(2), tmp_path)
    measured = {head for heads in model.balance.measured.values() for head in heads}
    assert measured == {"FitNet", "PKD"}
    loop = steps(model, batches_of(4), tmp_path)
    with EventStorage(3):
        model.balance.start({name: head.factor() for name, head in model.heads.items()})
        assert model.balance.share("PKD") == 0
        assert model.balance.share("FitNet") == pytest.approx(3.0 * 0.75 / 2)
    assert loop.balance is model.balance


@pytest.mark.e2e
def test_parts_of_a_batch_are_measured_together(tmp_path: Path) -> None:
    """One image twice: the sum of the squares of its halves is that of the whole, over 2."""
    batch = [image_dict(0, semantic=True)] * 2
    measured = []
    for parts in (1, 2):
        model = distilled("semantic", ["FitNet"], *ON)
        steps(model, [batch], tmp_path, parts=parts)
        measured.append(model.balance.state_dict()["measured"])
    for place, heads in measured[0].items():
        assert heads["FitNet"] == pytest.approx(measured[1][place]["FitNet"], rel=1e-4)


def test_a_loop_of_ones_own_measures_or_is_stopped() -> None:
    balance = Toy("FitNet").balance
    for _ in range(2):
        recorder = Recorder(["backbone"])
        recorder.add("backbone", Call((), {"p3": torch.ones(4, requires_grad=True) * 1}))
        with EventStorage(), balance.step():
            balance.start({"FitNet": 1.0})
            own = balance.branch("FitNet", recorder)["backbone"].output["p3"]
            (recorder["backbone"].output["p3"] * 3 + own * 5).sum().backward()
    assert balance.measured["backbone.p3"]["FitNet"].factor == pytest.approx(3 / 5)

    other = Toy("FitNet").balance
    with pytest.raises(RuntimeError, match=r"with model\.balance\.step"):
        for _ in range(PATIENCE + 1):
            other.start({"FitNet": 1.0})


def test_a_network_may_have_something_else_of_that_name() -> None:
    network = nn.Linear(1, 1)
    assert balance_of(network) is None
    network.balance = (4.0, 1.0, 0.4)  # type: ignore[assignment]
    assert balance_of(network) is None


@pytest.mark.e2e
def test_a_compiled_backbone_is_measured_too(tmp_path: Path) -> None:
    measured = []
    for compiled in (False, True):
        model = distilled("retinanet", ["FitNet"], *ON)  # it samples no boxes
        if compiled:
            model.student.backbone.compile(backend="aot_eager")
        steps(model, batches_of(1), tmp_path)
        measured.append(model.balance.state_dict()["measured"])
    assert measured[0].keys() == measured[1].keys() and measured[0]
    for place, heads in measured[0].items():
        assert heads["FitNet"] == pytest.approx(measured[1][place]["FitNet"], rel=0.1)


# ---- Two processes.


def write_state(rank: int, folder: Path) -> None:
    """Train on other images in each process, and write the states of the balance."""
    model = distilled("faster", ["FitNet", "IMA", "MKD"], *ON)
    batches = [[image_dict(10 * k + rank, objects=2 * (1 - rank))] for k in range(2)]
    steps(model, batches, folder)
    states = comm.all_gather(model.balance.state_dict())
    if rank == 0:
        torch.save(states, folder / "states.pth")


@starts_processes
@needs_loopback
def test_processes_have_the_same_factors(tmp_path: Path) -> None:
    """Though the second has no object, so that IMA compares nothing there."""
    spawn(write_state, tmp_path)
    states = torch.load(tmp_path / "states.pth", weights_only=True)
    assert len(states) == WORLD and states[0] == states[1]
    assert {"FitNet", "IMA", "MKD"} <= {h for x in states[0]["measured"].values() for h in x}
    assert states[0]["terms"]["MKD"]["backbone.p2"].keys() == {
        f"p2/{term}" for term in ("fea", "multiscale", "fdmd", "fad")
    }
