"""What happens beside the training step."""

from collections.abc import Sequence

from detectron2.engine import HookBase
from detectron2.utils.events import get_event_storage


class DistillRatio(HookBase):
    """Logs each distillation loss over the task loss, per head and level, from iteration 0."""

    def __init__(self, heads: Sequence[str]):
        self.prefixes = tuple(f"loss_{name.lower()}" for name in heads)

    def after_step(self) -> None:
        storage = get_event_storage()
        losses = {k: v for k, (v, _) in storage.latest().items() if k.startswith("loss")}
        distilled = {k: v for k, v in losses.items() if k.split("/")[0] in self.prefixes}
        task = sum(losses.values()) - sum(distilled.values())
        ratios = {f"kd_ratio/{k[5:]}": v / max(task, 1e-12) for k, v in distilled.items()}
        storage.put_scalars(**ratios, smoothing_hint=True)
