"""The values that the authors of a method use, by the student's detector."""

from typing import Any

from detectron2.config import CfgNode

from ..structures import NetworkInfo

AUTO = -1.0
"""Value of a config key that stands for the authors'."""

TWO_STAGE = "GeneralizedRCNN"
DENSE = "DenseDetector"  # of all that have no row of their own
# By head, key of its section and meta-architecture; a subclass has the row of its nearest base.
VALUES: dict[str, dict[str, dict[str, float]]] = {
    "FGD": {
        "ALPHA": {DENSE: 1e-3, "RepPoints": 1.6e-3, "FCOS": 1.6e-3, TWO_STAGE: 5e-5},
        "BETA": {DENSE: 5e-4, "RepPoints": 8e-4, "FCOS": 8e-4, TWO_STAGE: 2.5e-5},
        "GAMMA": {DENSE: 5e-4, "RepPoints": 8e-4, "FCOS": 8e-4, TWO_STAGE: 5e-5},
        "LAMBDA": {DENSE: 5e-6, "RepPoints": 8e-6, "FCOS": 8e-6, TWO_STAGE: 5e-7},
        "TEMPERATURE": {DENSE: 0.5, "FCOS": 0.8, TWO_STAGE: 0.5},
    },
    "MGD": {
        "WEIGHT": {DENSE: 2e-5, TWO_STAGE: 5e-7, "SemanticSegmentor": 2e-5},
        "MASK_RATIO": {DENSE: 0.65, TWO_STAGE: 0.45, "SemanticSegmentor": 0.75},
    },
    "MasKD": {"WEIGHT": {DENSE: 7.0, "FCOS": 10.0, "RepPoints": 10.0, TWO_STAGE: 1.0}},
    "PKD": {"WEIGHT": {DENSE: 10.0, TWO_STAGE: 6.0}},
    "CrossKD": {
        "CLASS_WEIGHT": {DENSE: 1.0, "FCOS": 0.4},
        "BOX_WEIGHT": {DENSE: 1.0, "GFL": 4.0, "FCOS": 0.75},
        "REUSED_CONVS": {DENSE: 1, "FCOS": 2},
    },
    "FRS": {
        "FEATURE_WEIGHT": {DENSE: 0.005, "FCOS": 0.01, "GFL": 0.1, TWO_STAGE: 0.002},
        "CLASS_WEIGHT": {DENSE: 0.02, "FCOS": 0.05, "GFL": 0.05, TWO_STAGE: 0.1},
    },
    "FKD": {
        "ATTENTION_WEIGHT": {DENSE: 4e-4, TWO_STAGE: 7e-5},
        "POOLED_WEIGHT": {DENSE: 2e-2, TWO_STAGE: 4e-3},
        "RELATION_WEIGHT": {DENSE: 4e-4, TWO_STAGE: 7e-5},
    },
}


def with_authors_values(head: str, section: CfgNode, student: NetworkInfo) -> dict[str, Any]:
    """The values of a head's section, those at :data:`AUTO` replaced by the authors'.

    A detector that they did not try has the values of the dense ones.
    """
    values = dict(section)
    for key, table in VALUES.get(head, {}).items():
        if values[key] == AUTO:
            values[key] = table[next((kind for kind in student.kinds if kind in table), DENSE)]
    return values
