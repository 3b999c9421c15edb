"""Evaluators are found by the type of a data set, a user's own ones too."""

import pytest
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import DatasetEvaluator

from distill.engine import Trainer
from distill.engine.evaluators import EVALUATOR_REGISTRY, check_test_sets
from distill.errors import ConfigError
from tests.support.networks import tiny_cfg


class Counter(DatasetEvaluator):
    pass


def test_a_users_own_type(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EVALUATOR_REGISTRY, "_obj_map", {**EVALUATOR_REGISTRY._obj_map})
    DatasetCatalog.register("counted", list)
    MetadataCatalog.get("counted").evaluator_type = "coo"
    cfg = tiny_cfg("faster", "DATASETS.TEST", ("counted",))
    with pytest.raises(ConfigError, match=r"'counted' has evaluator type 'coo'.*: coco, .* lvis"):
        check_test_sets(cfg)

    @EVALUATOR_REGISTRY.register()
    def coo(cfg: CfgNode, dataset_name: str, folder: str) -> list[DatasetEvaluator]:
        assert (dataset_name, folder) == ("counted", f"{cfg.OUTPUT_DIR}/inference")
        return [Counter()]

    check_test_sets(cfg)
    (evaluator,) = Trainer.build_evaluator(cfg, "counted")._evaluators
    assert isinstance(evaluator, Counter)
