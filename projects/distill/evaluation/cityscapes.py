"""Cityscapes' metrics, computed by its own scripts. The files for its server are kept.

detectron2's evaluators do the same in a temporary folder. Its newer commits import a private
module (https://github.com/facebookresearch/detectron2/issues/5436). The names of the metrics are
those of detectron2.

``sem_seg/mIoU_present`` is added: the mean IoU of the classes in the ground truth. The script's
own mean (``sem_seg/IoU``) also has classes that the ground truth lacks. There, a class that is
predicted somewhere counts as 0. A class that is not predicted is left out.
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
    """Base class of the two evaluators. All processes must call all methods.

    Args:
        dataset_name: data set with ``image_dir`` and ``gt_dir`` in its metadata.
        output_dir: folder that all processes share, also those on other machines. It gets a folder
            with the name of the data set. That folder holds the folder ``predictions`` and the
            results of the script.
    """

    truth_suffix: str  # suffix of the files of the ground truth
    suffix: str  # suffix of the files of the predictions
    export: str  # file of the script's results; the script's default name

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
        for image, output in zip(inputs, outputs):
            self.write(self.prediction(image["file_name"]), output)

    def prediction(self, image: str) -> str:
        """Return the path of the prediction for an image."""
        name = os.path.splitext(os.path.basename(image))[0]
        return os.path.join(self.predictions, f"{name}_pred{self.suffix}")

    def write(self, path: str, output: dict[str, Any]) -> None:
        """Write the prediction for one image."""
        raise NotImplementedError

    def evaluate(self) -> Results:
        comm.synchronize()
        if not comm.is_main_process():
            return {}
        metadata = self.metadata
        pairs = ground_truth_files(metadata.image_dir, metadata.gt_dir, (self.truth_suffix,))
        predictions = [self.prediction(image) for image, _ in pairs]
        missing = [path for path in predictions if not os.path.isfile(path)]
        if missing:
            raise DataError(
                f"Cityscapes' evaluation lacks {len(missing)} of {len(pairs)} predictions, such as "
                f"{missing[0]}; all machines must share OUTPUT_DIR."
            )
        logger.info("Cityscapes' script evaluates %d files in %s", len(pairs), self.predictions)
        with _script_environment():
            return self.score(predictions, [truth for _, truth in pairs])

    def score(self, predictions: list[str], truths: list[str]) -> Results:
        """Run the script and return its metrics."""
        raise NotImplementedError


@contextlib.contextmanager
def _script_environment() -> Iterator[None]:
    """Prepare NumPy for Cityscapes' scripts, and convert their exits to errors.

    The scripts call ``np.in1d``, which newer versions of NumPy have only as ``np.isin``.

    Raises:
        DataError: with the script's own message.
    """
    text = io.StringIO()
    in1d = mock.patch.object(np, "in1d", np.isin, create=True)
    try:
        with in1d, contextlib.redirect_stdout(text), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # NumPy warns of means over absent classes
            yield
    except SystemExit as e:
        lines = text.getvalue().strip().splitlines() or ["no reason given"]
        raise DataError(f"Cityscapes' evaluation script stopped: {lines[-1]}") from e


class CityscapesSemanticEvaluator(_CityscapesEvaluator):
    """IoU of semantic segmentation in percent, as ``"sem_seg"``.

    Predictions are PNG files of label ids. Metrics: ``IoU`` (the benchmark's), ``iIoU``,
    ``IoU_sup`` and ``iIoU_sup`` (of the categories), ``mIoU_present``, and ``IoU-<class>`` of each
    class with an IoU.
    """

    truth_suffix, suffix, export = LABEL_IDS, ".png", "resultPixelLevelSemanticLabeling.json"

    def write(self, path: str, output: dict[str, Any]) -> None:
        train_ids = output["sem_seg"].argmax(dim=0).to("cpu").numpy()
        # Classes that the benchmark lacks become 0 (unlabeled), like all ids without a train id.
        known = np.minimum(train_ids, 254).astype(np.uint8)
        Image.fromarray(label_id_table()[known]).save(path)

    def score(self, predictions: list[str], truths: list[str]) -> Results:
        import cityscapesscripts.evaluation.evalPixelLevelSemanticLabeling as script

        args = copy.copy(script.args)  # do not change the script's module
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
        return {"sem_seg": {**results, **_metrics_by_class("IoU", iou)}}


class CityscapesInstanceEvaluator(_CityscapesEvaluator):
    """AP of instance segmentation in percent, as ``"segm"``.

    The prediction for an image is a text file. Each line names a PNG file, a label id and a score
    for one instance. Metrics: ``AP``, ``AP50``, and ``AP-<class>`` of each class in the ground
    truth.
    """

    truth_suffix, suffix, export = INSTANCE_IDS, ".txt", "resultInstanceLevelSemanticLabeling.json"

    def write(self, path: str, output: dict[str, Any]) -> None:
        lines = []
        instances = output["instances"].to("cpu")
        columns = (instances.pred_masks, instances.pred_classes.tolist(), instances.scores.tolist())
        for number, (mask, index, score) in enumerate(zip(*columns)):
            name = self.metadata.thing_classes[index]
            png = f"{path.removesuffix(f'_pred{self.suffix}')}_{number}_{name}.png"
            Image.fromarray(mask.numpy().astype(bool)).save(png)
            lines.append(f"{os.path.basename(png)} {label_table()[name].id} {score}\n")
        with open(path, "w", encoding="utf-8") as f:
            f.writelines(lines)

    def score(self, predictions: list[str], truths: list[str]) -> Results:
        import cityscapesscripts.evaluation.evalInstanceLevelSemanticLabeling as script

        args = copy.copy(script.args)  # do not change the script's module
        args.quiet, args.predictionPath = True, self.predictions
        # Its evaluateImgLists is not used: it would write a cache of the ground truth. It would
        # also write NumPy integers to matches.json in the working directory, which fails.
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
        return {"segm": {**results, **_metrics_by_class("AP", classes["ap"])}}


def _metrics_by_class(metric: str, values: dict[str, float]) -> dict[str, float]:
    """Return the metrics by class, without undefined values: JSON has no NaN."""
    return {f"{metric}-{name}": x for name, x in values.items() if not math.isnan(x)}
