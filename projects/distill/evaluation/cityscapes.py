"""Cityscapes' measures by its own scripts, whose files stay: those that its server takes.

detectron2's evaluators do the same in a temporary folder; in its newer commits they ask for a
private module (https://github.com/facebookresearch/detectron2/issues/5436). Its metrics keep their
names here. Beside them stands ``sem_seg/mIoU_present``, the mean IoU of the classes in the ground
truth: the script's mean (``sem_seg/IoU``) counts a class that is nowhere but predicted somewhere
as 0, and one that is not even predicted not at all.
"""

import contextlib
import copy
import io
import logging
import math
import os
import shutil
import warnings
from collections.abc import Iterator
from typing import Any
from unittest import mock

import numpy as np
from detectron2.data import MetadataCatalog
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm
from PIL import Image
from tabulate import tabulate

from ..data.cityscapes import (
    INSTANCE_IDS,
    LABEL_IDS,
    ground_truth_files,
    label_id_table,
    label_table,
)
from ..errors import DataError

logger = logging.getLogger(__name__)

Results = dict[str, dict[str, float]]


class _CityscapesEvaluator(DatasetEvaluator):
    """What the two evaluators share. All processes have to call all methods.

    Args:
        dataset_name: with ``image_dir`` and ``gt_dir`` in its metadata.
        output_dir: gets a folder of the data set's name with the folder ``predictions`` and the
            script's own results. Processes on several machines have to share it.
    """

    truth: str  # end of the ground truth's file names
    end: str  # of the predictions'
    export: str  # file of the script's results, by its own default name

    def __init__(self, dataset_name: str, output_dir: str):
        self.metadata = MetadataCatalog.get(dataset_name)
        self.folder = os.path.abspath(os.path.join(output_dir, dataset_name))
        self.predictions = os.path.join(self.folder, "predictions")

    def reset(self) -> None:
        if comm.is_main_process():
            with contextlib.suppress(FileNotFoundError):
                shutil.rmtree(self.predictions)
            os.makedirs(self.predictions)
        comm.synchronize()

    def process(self, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> None:
        for picture, output in zip(inputs, outputs):
            self.write(self.prediction(picture["file_name"]), output)

    def prediction(self, picture: str) -> str:
        """Path of a picture's prediction."""
        name = os.path.splitext(os.path.basename(picture))[0]
        return os.path.join(self.predictions, f"{name}_pred{self.end}")

    def write(self, path: str, output: dict[str, Any]) -> None:
        """Write one prediction of the network."""
        raise NotImplementedError

    def evaluate(self) -> Results:
        comm.synchronize()
        if not comm.is_main_process():
            return {}
        metadata = self.metadata
        pairs = ground_truth_files(metadata.image_dir, metadata.gt_dir, (self.truth,))
        predictions = [self.prediction(picture) for picture, _ in pairs]
        missing = [path for path in predictions if not os.path.isfile(path)]
        if missing:
            raise DataError(
                f"Cityscapes' evaluation lacks {len(missing)} of {len(pairs)} predictions, such as "
                f"{missing[0]}; several machines have to share OUTPUT_DIR."
            )
        logger.info("Cityscapes' script evaluates %d files in %s", len(pairs), self.predictions)
        with _script():
            return self.score(predictions, [truth for _, truth in pairs])

    def score(self, predictions: list[str], truths: list[str]) -> Results:
        """Run the script."""
        raise NotImplementedError


@contextlib.contextmanager
def _script() -> Iterator[None]:
    """What Cityscapes' scripts need of NumPy, and their exits as errors.

    They call ``in1d``, which NumPy has long had under the name ``isin``, and now under that alone.

    Raises:
        DataError: with the script's own message.
    """
    text = io.StringIO()
    in1d = mock.patch.object(np, "in1d", np.isin, create=True)
    try:
        with in1d, contextlib.redirect_stdout(text), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # means of classes that are nowhere
            yield
    except SystemExit as e:
        lines = text.getvalue().strip().splitlines() or ["no reason given"]
        raise DataError(f"Cityscapes' evaluation script stopped: {lines[-1]}") from e


class CityscapesSemanticEvaluator(_CityscapesEvaluator):
    """IoU of semantic segmentation, as ``"sem_seg"``, in percent.

    Predictions are PNG of label ids. Metrics: ``IoU`` (the benchmark's), ``iIoU``, ``IoU_sup`` and
    ``iIoU_sup`` (of the categories), ``mIoU_present``, and ``IoU-<class>`` of each class that has
    an IoU.
    """

    truth, end, export = LABEL_IDS, ".png", "resultPixelLevelSemanticLabeling.json"

    def write(self, path: str, output: dict[str, Any]) -> None:
        train_ids = output["sem_seg"].argmax(dim=0).to("cpu").numpy()
        # Classes beyond the benchmark's become 0, unlabeled, like any id that is no train id.
        known = np.minimum(train_ids, 254).astype(np.uint8)
        Image.fromarray(label_id_table()[known]).save(path)

    def score(self, predictions: list[str], truths: list[str]) -> Results:
        import cityscapesscripts.evaluation.evalPixelLevelSemanticLabeling as script

        args = copy.copy(script.args)  # the module's own stay as they are
        args.quiet, args.JSONOutput = True, True
        args.exportFile = os.path.join(self.folder, self.export)
        found = script.evaluateImgLists(predictions, truths, args)
        counts = np.array(found["confMatrix"])  # rows: ground truth, by label id
        evaluated = [x for x in label_table().values() if x.id >= 0 and not x.ignoreInEval]
        iou = {label.name: 100 * float(found["classScores"][label.name]) for label in evaluated}
        present = [iou[label.name] for label in evaluated if counts[label.id].any()]
        results = {
            "IoU": 100 * found["averageScoreClasses"],
            "iIoU": 100 * found["averageScoreInstClasses"],
            "IoU_sup": 100 * found["averageScoreCategories"],
            "iIoU_sup": 100 * found["averageScoreInstCategories"],
            "mIoU_present": float(np.mean(present)) if present else math.nan,
        }
        rows = [[*row] for row in {**results, **iou}.items()]
        logger.info("Cityscapes' IoU in percent:\n%s", tabulate(rows, floatfmt=".2f"))
        return {"sem_seg": {**results, **_of_classes("IoU", iou)}}


class CityscapesInstanceEvaluator(_CityscapesEvaluator):
    """AP of instance segmentation, as ``"segm"``, in percent.

    Predictions are a text file a picture, which names a PNG, a label id and a score for each
    instance. Metrics: ``AP``, ``AP50``, and ``AP-<class>`` of each class in the ground truth.
    """

    truth, end, export = INSTANCE_IDS, ".txt", "resultInstanceLevelSemanticLabeling.json"

    def write(self, path: str, output: dict[str, Any]) -> None:
        lines = []
        instances = output["instances"].to("cpu")
        columns = (instances.pred_masks, instances.pred_classes.tolist(), instances.scores.tolist())
        for place, (mask, index, score) in enumerate(zip(*columns)):
            name = self.metadata.thing_classes[index]
            png = f"{path.removesuffix(f'_pred{self.end}')}_{place}_{name}.png"
            Image.fromarray(mask.numpy().astype(bool)).save(png)
            lines.append(f"{os.path.basename(png)} {label_table()[name].id} {score}\n")
        with open(path, "w", encoding="utf-8") as f:
            f.writelines(lines)

    def score(self, predictions: list[str], truths: list[str]) -> Results:
        import cityscapesscripts.evaluation.evalInstanceLevelSemanticLabeling as script

        args = copy.copy(script.args)  # the module's own stay as they are
        args.quiet, args.predictionPath = True, self.predictions
        # Its evaluateImgLists would also write a cache of the ground truth and, into the working
        # directory, matches.json with NumPy's integers, which fails.
        script.setInstanceLabels(args)
        objects = script.instances2dict(truths)
        matches = script.matchGtWithPreds(predictions, truths, objects, args)
        precisions = script.evaluateMatches(matches, args)
        averages = script.computeAverages(precisions, args)
        found = script.prepareJSONDataForResults(averages, precisions, args)
        script.writeDict2JSON(found, os.path.join(self.folder, self.export))
        results = {"AP": 100 * float(averages["allAp"]), "AP50": 100 * float(averages["allAp50%"])}
        classes = {
            kind: {name: 100 * float(x[kind]) for name, x in averages["classes"].items()}
            for kind in ("ap", "ap50%")
        }
        rows = [[name, ap, classes["ap50%"][name]] for name, ap in classes["ap"].items()]
        table = tabulate([*rows, ["all", *results.values()]], ["", *results], floatfmt=".2f")
        logger.info("Cityscapes' AP in percent:\n%s", table)
        return {"segm": {**results, **_of_classes("AP", classes["ap"])}}


def _of_classes(metric: str, values: dict[str, float]) -> dict[str, float]:
    """Metrics by class; those without a value are left out, for JSON has no NaN."""
    return {f"{metric}-{name}": x for name, x in values.items() if not math.isnan(x)}
