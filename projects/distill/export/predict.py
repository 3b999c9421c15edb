"""Detect objects in images, folders and videos; draw them and write them in COCO's format.

    distill predict output/student images/ --out output/predictions [--min-score 0.5]
    distill predict student.onnx street.jpg clip.mp4 --out output/predictions

The network is the OUTPUT_DIR of a training, or a file of `distill export`. The folder of --out gets
the drawn images and videos, predictions.json with all objects, and a page of the drawn images.
Semantic classes and panoptic segments are PNG files, whose pixels are classes and ids.

Objects are drawn by the package supervision if it is installed, otherwise by Pillow.
"""

import argparse
import re
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from ..errors import ConfigError, DataError
from ..utils.html import render
from ..utils.io import write_json, write_text
from ..utils.progress import Progress
from ..utils.text import clause, print_error, printable
from .runner import (
    ExportError,
    Prediction,
    Predictor,
    coco_annotations,
    draw,
    one_line,
    read_image,
)

IMAGES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
VIDEOS = (".mp4", ".avi", ".mov", ".mkv", ".webm")
JPEG_QUALITY = 92
FRAMES_PER_SECOND = 25.0  # if a video does not know its own
SHOWN_SCORE = 0.5
UNREADABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)
Predict = Callable[[Image.Image], Prediction]


class Network(NamedTuple):
    """A network that is ready to predict.

    Attributes:
        predict: maps an RGB image to its prediction.
        classes: names of the classes of objects; an index is used for a missing name.
        sem_seg_classes: names of the classes of pixels.
    """

    predict: Predict
    classes: list[str]
    sem_seg_classes: list[str]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("network", type=Path, help="OUTPUT_DIR of a training, *.onnx or *.ts")
    parser.add_argument("inputs", type=Path, nargs="+", help="images, folders of images, videos")
    parser.add_argument("--out", type=Path, default=Path("output/predictions"), metavar="DIR")
    parser.add_argument(
        "--min-score",
        type=float,
        default=SHOWN_SCORE,
        help=f"smallest score of a drawn object; default: {SHOWN_SCORE}",
    )


def run(args: argparse.Namespace) -> int:
    images, videos = inputs_of(args.inputs)
    folder = PredictionFolder(load_network(args.network), args.out, args.min_score)
    with Progress() as progress:
        for path in progress.track(images, description="images") if images else ():
            folder.add_image(path)
        for path in videos:
            folder.add_video(path, progress)
    folder.close()
    print(printable(f"{args.out / 'predictions.json'}: {folder.summary}"))
    return 1 if folder.failed else 0


def inputs_of(paths: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    """Return the images and the videos that paths name; folders are searched for images.

    Raises:
        DataError: a path does not exist, a folder has no images, or a file is neither.
    """
    images: list[Path] = []
    videos: list[Path] = []
    for path in paths:
        if path.is_dir():
            images += folder_images(path)
        elif not path.is_file():
            raise DataError(f"'{path}' does not exist; name images, folders or videos.")
        elif path.suffix.lower() in VIDEOS:
            videos.append(path)
        elif path.suffix.lower() in IMAGES:
            images.append(path)
        else:
            raise DataError(
                f"'{path}' is neither an image ({', '.join(IMAGES)}) nor a video "
                f"({', '.join(VIDEOS)}); convert it."
            )
    return images, videos


def folder_images(folder: Path) -> list[Path]:
    """Return the images of a folder and of its folders, sorted.

    Raises:
        DataError: if there are no images.
    """
    files = sorted(x for x in folder.rglob("*") if x.suffix.lower() in IMAGES)
    if not files:
        raise DataError(f"'{folder}' has no images ({', '.join(IMAGES)}); name another folder.")
    return files


def load_network(path: Path) -> Network:
    """Load the network of a training, or an exported file.

    Only an ONNX file needs no torch.

    Raises:
        ConfigError: if the path is neither.
    """
    if path.is_dir():
        from .student import student_predictor

        return Network(*student_predictor(path))
    if not path.is_file():
        raise ConfigError(f"'{path}' does not exist; name the OUTPUT_DIR of a training or a file.")
    try:
        if path.suffix == ".onnx":
            predictor = Predictor.from_onnx(str(path))
        else:
            from .writer import load

            predictor = Predictor(*load(path))
    except ImportError as e:
        raise ConfigError(f"'{path}' needs the package {e.name}: pip install {e.name}.") from e
    except ExportError as e:
        raise ConfigError(f"{clause(e)}; name a file of `distill export`.") from e
    return Network(predictor, predictor.classes, predictor.sem_seg_classes)


class PredictionFolder:
    """A folder to which the predictions of images and videos are written.

    Args:
        network: the network.
        out: the folder.
        min_score: smallest score of a drawn object.
    """

    def __init__(self, network: Network, out: Path, min_score: float):
        self.network = network
        self.out = out
        self.min_score = min_score
        self.images: list[dict[str, Any]] = []
        self.annotations: list[dict[str, Any]] = []
        self.failed = 0
        out.mkdir(parents=True, exist_ok=True)

    @property
    def summary(self) -> str:
        """Numbers of what was written."""
        failed = f", {self.failed} files could not be read" if self.failed else ""
        return f"{len(self.images)} images, {len(self.annotations)} objects{failed}"

    def add_image(self, path: Path) -> None:
        """Predict, draw and record an image. An unreadable one is reported and left out."""
        try:
            image = read_image(path)
        except UNREADABLE as e:
            self.failed += 1
            print_error(f"'{one_line(printable(str(path)))}' cannot be read: {clause(e)}")
            return
        name = safe_name(len(self.images) + 1, path)
        drawn = self._add(image, file_name=str(path), drawn=f"{name}.jpg")
        drawn.save(self.out / f"{name}.jpg", quality=JPEG_QUALITY)

    def add_video(self, path: Path, progress: Progress) -> None:
        """Predict, draw and record the frames of a video.

        Raises:
            DataError: if no frame can be read.
        """
        import cv2

        video = cv2.VideoCapture(str(path))
        rate = video.get(cv2.CAP_PROP_FPS) or FRAMES_PER_SECOND
        total = max(int(video.get(cv2.CAP_PROP_FRAME_COUNT)), 0) or None
        name = f"{safe_name(len(self.images) + 1, path)}.mp4"
        task = progress.add_task(path.name, total=total)
        sink = None
        for k, image in enumerate(frames(video)):
            drawn = self._add(image, file_name=str(path), frame=k, drawn=name)
            if sink is None:
                codec = cv2.VideoWriter.fourcc(*"mp4v")
                sink = cv2.VideoWriter(str(self.out / name), codec, rate, drawn.size)
            sink.write(np.asarray(drawn)[..., ::-1])
            progress.advance(task)
        video.release()
        if sink is None:
            raise DataError(f"'{path}' has no frame that OpenCV can read; convert it to mp4.")
        sink.release()

    def _add(self, image: Image.Image, **described: Any) -> Image.Image:
        """Record the prediction of an image, and return the image with it drawn."""
        prediction = self.network.predict(image)
        number = len(self.images) + 1
        found = coco_annotations(prediction, number)
        for k, annotation in enumerate(found, len(self.annotations) + 1):
            annotation["id"] = k
        self.annotations += found
        size = {"width": image.width, "height": image.height}
        self.images.append({"id": number, **described, **size, **self._maps(prediction, number)})
        classes = class_names(self.network.classes, int(prediction.classes.max(initial=-1)) + 1)
        shown = prediction.above(self.min_score)
        with_boxes = len(shown.scores) and prediction.segments is None
        if with_boxes and find_spec("supervision"):
            return draw_with_supervision(image, shown, classes)
        return draw(image, shown, classes)

    def _maps(self, prediction: Prediction, number: int) -> dict[str, Any]:
        """Write the classes or segments of all pixels, and return what describes them."""
        described: dict[str, Any] = {}
        if prediction.segments is not None:
            described["segments"] = f"{number:06d}-segments.png"
            described["segments_info"] = list(prediction.segments_info)
            pixels = Image.fromarray(prediction.segments.astype(np.uint16))
            pixels.save(self.out / described["segments"])
        elif prediction.sem_seg is not None:
            described["sem_seg"] = f"{number:06d}-classes.png"
            kind = np.uint8 if len(prediction.sem_seg) <= 256 else np.uint16
            pixels = Image.fromarray(prediction.sem_seg.argmax(0).astype(kind))
            pixels.save(self.out / described["sem_seg"])
        return described

    def close(self) -> None:
        """Write predictions.json and the page."""
        number = max((x["category_id"] for x in self.annotations), default=0)
        names = class_names(self.network.classes, number)
        content = {
            "images": self.images,
            "annotations": self.annotations,
            "categories": [{"id": k, "name": x} for k, x in enumerate(names, 1)],
            "sem_seg_classes": self.network.sem_seg_classes,
        }
        write_json(self.out / "predictions.json", content)
        shown = [x for x in self.images if "frame" not in x]
        page = render("predictions.html", title="Predictions", images=shown)
        write_text(self.out / "index.html", page)


def frames(video: Any) -> Iterator[Image.Image]:
    """Yield the frames of an OpenCV video as RGB images."""
    while True:
        read, frame = video.read()
        if not read:
            return
        yield Image.fromarray(np.ascontiguousarray(frame[..., ::-1]))


def safe_name(number: int, path: Path) -> str:
    """Return a file name of letters, digits, "_" and "-" that no other input has."""
    return f"{number:06d}-{re.sub(r'[^A-Za-z0-9_-]+', '_', path.stem)[:80]}"


def class_names(names: Sequence[str], number: int) -> list[str]:
    """Return the class names, continued by indices if there are not so many."""
    return [*names, *(f"class {k}" for k in range(len(names), number))]


def draw_with_supervision(
    image: Image.Image, prediction: Prediction, classes: Sequence[str]
) -> Image.Image:
    """Return an RGB image with the masks, boxes, class names and scores drawn on it."""
    import supervision as sv

    found = sv.Detections(
        xyxy=prediction.boxes,
        mask=prediction.masks,
        confidence=prediction.scores,
        class_id=prediction.classes,
    )
    labels = [
        f"{one_line(classes[k])} {x:.2f}" for k, x in zip(prediction.classes, prediction.scores)
    ]
    drawn = image.copy()
    if prediction.masks is not None:
        drawn = sv.MaskAnnotator().annotate(drawn, found)
    drawn = sv.BoxAnnotator().annotate(drawn, found)
    return sv.LabelAnnotator().annotate(drawn, found, labels)
