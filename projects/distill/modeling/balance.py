"""Weights of distillation losses that set themselves, by the gradients that reach the student."""

import copy
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..families.recorder import BranchRecorder, Recorder
from ..heads.base import Losses
from ..utils.training import current_iteration
from .term_balance import BOUND, TermBalance, reduced_norms, reduced_sums

MOMENTUM = 0.1  # weight of a new measurement in the averages
SPIKE = 10.0  # in one step, a head gives at most this many times its share
TERM_PERIOD = 10  # iterations between two measurements of terms
PATIENCE = 10  # forwards without a step, as in a sanity check, before it is an error
ROUNDING = 1e-6  # a task's gradient below this share of the heads' is what rounding left of 0


class GradientBalance:
    """Scale the gradient of each head to a ratio of the task's, at each tensor that it compares.

    A head reads its own branch of every tensor of the student. In the backward, the branch measures
    the norm of the head's gradient g, and hands it on to the student as f · g. The whole gradient
    at the tensor, without what the branches handed on, is the task's gradient t. So nothing is
    computed twice, and the heads' own parameters learn from the unscaled loss.

    f = ratio · strength / n · T / G, where T / G stays within ``BOUND`` of its first value

    n is the number of heads that compare the tensor. T and G are the geometric moving averages of
    |t| and |g|. They start with the first measurement and act from the next step on; until then f
    is 0. A step in which |t| or |g| is 0 leaves them as they are. In a step with an unusually large
    g, f is smaller: |f · g| is at most ``SPIKE`` · ratio · strength / n · T.

    If several terms of a head's loss compare one tensor, they share the head's gradient there, see
    :class:`TermBalance`.

    Args:
        authors: the authors' weight of each head, with which its parameters learn.
        strengths: factors of the terms of each head over the authors' factors.
        shares: share of the ratio that each head gets with the authors' weight.
        ratio: |f · g| / |t| that all heads of a tensor together get if their shares are 1.
        fade: share of the training, at its end, in which the ratio falls linearly to 0.
        max_iter: iterations of the training.
        cosine_period: iterations between two cosines of the heads' gradients and the task's; 0:
            none.
    """

    def __init__(
        self,
        authors: Mapping[str, float],
        strengths: Mapping[str, Mapping[str, float]],
        shares: Mapping[str, float],
        *,
        ratio: float,
        fade: float,
        max_iter: int,
        cosine_period: int = 0,
    ):
        self.authors = dict(authors)
        self.shares = dict(shares)
        self.ratio = ratio
        self.fade = fade
        self.max_iter = max_iter
        self.cosine_period = cosine_period
        self.measured: dict[str, dict[str, Measured]] = {}  # by place, and then by head
        self.terms = {head: TermBalance(x) for head, x in strengths.items()}
        self.measuring = False
        self._stepped = False  # a step has begun
        self._unmeasured = 0  # forwards before that
        self._branches: dict[str, dict[str, Tensor]] = {}  # by head and place
        self._strengths: dict[str, float] = {}
        self._squares: dict[tuple[str, str], Tensor] = {}  # summed over the parts of a batch
        self._given: dict[str, Tensor] = {}  # to the student, by place
        self._compared: dict[str, list[tuple[str, Tensor]]] = {}  # gradients of heads, by place
        self._products: dict[tuple[str, str, str], Tensor] = {}  # for the cosines
        self._watched: set[str] = set()
        self._passing = False

    # ---- The forward.

    def start(self, heads: Mapping[str, float]) -> None:
        """Begin a forward.

        Args:
            heads: weight of each head at this iteration.

        Raises:
            RuntimeError: the training loop does not measure, so that no head has any effect.
        """
        self._unmeasured += not self._stepped
        if self._unmeasured > PATIENCE:
            raise RuntimeError(
                "MODEL.DISTILL.BALANCE is on, but this training loop does not measure. Put `with "
                "model.balance.step():` around its forward and backward, train with "
                "distill.engine.Trainer, or set MODEL.DISTILL.BALANCE.MODE none."
            )
        self._watched.clear()
        self._branches.clear()
        self._strengths = {k: x / self.authors[k] * self.shares[k] for k, x in heads.items()}

    def branch(self, head: str, recorder: Recorder) -> Recorder:
        """Return a recorder whose tensors are the branches of a head.

        Args:
            recorder: the recorder of the student's forward.
        """
        self._branches[head] = {}
        return BranchRecorder(recorder, partial(self._tensor, head))

    def weigh(self, head: str, losses: Losses) -> dict[str, Tensor]:
        """Return a head's losses by part, with the authors' weight and equal terms."""
        terms = self.terms[head]
        if current_iteration() % TERM_PERIOD == 0 and terms.have_rivals(losses):
            self._passing = True
            try:
                terms.measure(losses, self._branches[head])
            finally:
                self._passing = False
        return {k: x * self.authors[head] for k, x in terms.weigh(losses).items()}

    def ratio_now(self) -> float:
        """Return the ratio of the current iteration."""
        left = 1 - current_iteration() / self.max_iter
        return self.ratio * (min(left / self.fade, 1.0) if self.fade else 1.0)

    def share(self, head: str) -> float:
        """Return the mean ratio that a head gets at the tensors that it compares."""
        places = [place for place, heads in self.measured.items() if head in heads]
        return sum(self._share(x, head) for x in places) / max(len(places), 1)

    def factor(self, place: str, head: str) -> float:
        """Return the factor f of a head's gradient at a place."""
        return self._factor_and_most(place, head)[0]

    def _factor_and_most(self, place: str, head: str) -> tuple[float, float]:
        """Return the factor of a head's gradient, and the most that its norm may be after it."""
        measured = self.measured.get(place, {}).get(head)
        if measured is None:
            return 0.0, 0.0
        share = self._share(place, head)
        return share * measured.factor, share * measured.task * SPIKE

    def _share(self, place: str, head: str) -> float:
        sharing = sum(self._strengths.get(other, 0) > 0 for other in self.measured[place])
        strength = self._strengths.get(head, 0) * self.terms[head].strength_at(place)
        return self.ratio_now() * strength / max(sharing, 1)

    def _tensor(self, head: str, place: str, x: Tensor) -> Tensor:
        if not x.requires_grad:
            return x
        if place not in self._watched:
            self._watched.add(place)
            x.register_hook(partial(self._whole, place))
        branch = x.view_as(x)
        self._branches[head][place] = branch
        limits = self._factor_and_most(place, head)
        branch.register_hook(partial(self._scaled, place, head, *limits))
        for key in (head, ""):
            self._squares.setdefault((place, key), x.new_zeros((), dtype=torch.float32))
        return branch

    # ---- The backward.

    @contextmanager
    def measure(self) -> Iterator[None]:
        """Measure the backwards in this context; others are scaled only."""
        self.measuring = True
        try:
            yield
        finally:
            self.measuring = False
            self._given.clear()
            self._compared.clear()

    def _scaled(
        self, place: str, head: str, factor: float, most: float, gradient: Tensor
    ) -> Tensor:
        if self._passing:
            return gradient
        norm = torch.linalg.vector_norm(gradient, dtype=torch.float32)
        scaled = gradient * (most / norm).clamp(max=factor) if most else gradient * 0
        if self.measuring:
            self._add(place, head, norm)
            given = self._given.get(place)
            self._given[place] = scaled if given is None else given + scaled
            if self.cosine_period and current_iteration() % self.cosine_period == 0:
                self._compared.setdefault(place, []).append((head, scaled))
        return scaled

    def _whole(self, place: str, gradient: Tensor) -> None:
        given = self._given.pop(place, None)
        if given is not None:
            task = gradient - given
            self._add(place, "", torch.linalg.vector_norm(task, dtype=torch.float32))
            for head, own in self._compared.pop(place, []):
                for name, x in (("task", task), ("own", own)):
                    key = place, head, name
                    product = (own.float() * x.float()).sum()
                    self._products[key] = self._products.get(key, 0) + product

    def _add(self, place: str, head: str, norm: Tensor) -> None:
        self._squares[place, head] = self._squares[place, head] + norm.square()

    # ---- Between two steps.

    @contextmanager
    def step(self) -> Iterator[None]:
        """Measure the forward and backward in this context, and follow them.

        It is all that a training loop of your own needs, if it neither skips steps nor sums
        gradients over several batches.
        """
        self.before_step()
        with self.measure():
            yield
        self.after_step()

    def before_step(self) -> None:
        self._stepped = True
        self._squares.clear()
        self._products.clear()
        for terms in self.terms.values():
            terms.squares.clear()

    def after_step(self) -> dict[str, float]:
        """Follow the measurements of a step that changed the weights; waits for the device.

        Returns:
            ``kd_ratio/<head>/<place>``, the norm of what a head gave over that of the task, and
            ``kd_factor/<head>/<place>``, the factor f. Once in a ``cosine_period`` there is also
            ``kd_cosine/<head>/<place>``, the cosine of both gradients.
        """
        for terms in self.terms.values():
            terms.follow()
        norms = reduced_norms(self._squares)
        scalars: dict[str, float] = {}
        limits = {key: self._factor_and_most(*key) for key in norms if key[1]}
        for (place, head), (factor, most) in limits.items():
            own, task = norms[place, head], norms[place, ""]
            given = min(factor * own, most)
            if math.isfinite(own + task) and task > ROUNDING * given:
                name = f"{head.lower()}/{place}"
                if own > 0:
                    heads = self.measured.setdefault(place, {})
                    heads.setdefault(head, Measured(task, own)).add(task, own)
                if factor:
                    scalars[f"kd_ratio/{name}"] = given / task
                    scalars[f"kd_factor/{name}"] = factor
        return scalars | self._cosines(norms)

    def _cosines(self, norms: Mapping[tuple[str, str], float]) -> dict[str, float]:
        """Return the cosines of this step; those of a zero gradient are left out."""
        products = reduced_sums(self._products)
        cosines = {}
        for place, head, name in products:
            own, task = math.sqrt(products[place, head, "own"]), norms[place, ""]
            if name == "task" and own * task > 0 and math.isfinite(own * task):
                cosine = products[place, head, "task"] / (own * task)
                cosines[f"kd_cosine/{head.lower()}/{place}"] = cosine
        return cosines

    # ---- Checkpoints.

    def state_dict(self) -> dict[str, Any]:
        measured = {
            place: {head: x.state() for head, x in heads.items()}
            for place, heads in self.measured.items()
        }
        terms = {head: copy.deepcopy(x.norms) for head, x in self.terms.items()}
        return {"measured": measured, "terms": terms}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.measured = {
            place: {head: Measured(*x) for head, x in heads.items()}
            for place, heads in state["measured"].items()
        }
        for head, norms in state["terms"].items():
            self.terms[head].norms = copy.deepcopy(norms)


def balance_of(model: nn.Module) -> GradientBalance | None:
    """Return what sets the weights of a model's heads, or None if they are constants.

    A network of a user's own may have an attribute of that name.
    """
    balance = getattr(model, "balance", None)
    return balance if isinstance(balance, GradientBalance) else None


class Measured:
    """Geometric moving averages of the norms of two gradients.

    Args:
        task, head: the averages.
        first: the first value of their ratio.
    """

    def __init__(self, task: float, head: float, first: float | None = None):
        self.task = task
        self.head = head
        self.first = task / head if first is None else first

    @property
    def factor(self) -> float:
        """The factor with which the head's gradient has the norm of the task's."""
        return min(max(self.task / self.head, self.first / BOUND), self.first * BOUND)

    def add(self, task: float, head: float) -> None:
        self.task *= (task / self.task) ** MOMENTUM
        self.head *= (head / self.head) ** MOMENTUM

    def state(self) -> list[float]:
        return [self.task, self.head, self.first]
