"""Packages `projects/distill` as the distribution `distill`."""

import re
from pathlib import Path

from setuptools import find_packages, setup

INIT = Path(__file__).parent / "projects" / "distill" / "__init__.py"

# detectron2 is needed too, but is not on PyPI under its own name: see tools/install_detectron2.py.
# Besides this project's own imports the list has what detectron2 imports.
REQUIREMENTS = [
    "torch>=2.5",
    "torchvision>=0.20",
    "numpy>=1.26,<2.3",  # cityscapesscripts calls np.in1d
    "pillow>=10.1,<13",  # cityscapesscripts reads instance masks as 32-bit PNG
    "setuptools>=70.1,<82",  # detectron2.model_zoo imports pkg_resources
    "black",  # detectron2's LazyConfig.to_py
    "cityscapesscripts>=2.2",
    "cloudpickle",
    "faster-coco-eval>=1.7",
    "fvcore>=0.1.5,<0.1.6",
    "hydra-core>=1.3,<1.4",
    "iopath>=0.1.9",
    "jinja2>=3.1",
    "markupsafe>=2",
    "matplotlib>=3.8",
    "omegaconf>=2.3,<2.4",
    "opencv-python-headless>=4.9",
    "packaging",
    "pycocotools>=2.0.7",
    "pyyaml>=6",
    "rich>=13",
    "safetensors>=0.4",
    "scipy>=1.11",
    "shapely>=2",  # polygons of Cityscapes and of RandomCrop
    "tabulate>=0.9",
    "tensorboard>=2.15",
    "termcolor>=2",
    "timm>=1.0",
    "tqdm>=4.66",
    "yacs>=0.1.8",
]

# Who logs to one of these has it already, in a version of their own: `make` installs none.
TRACKERS = {"wandb": ["wandb>=0.17"], "mlflow": ["mlflow>=2.14"], "trackio": ["trackio>=0.20"]}
EXPORT = ["onnx>=1.17", "onnxruntime>=1.20", "onnxscript>=0.5", "onnxslim>=0.1.50"]

setup(
    name="distill",
    version=re.search(r'__version__ = "(.+)"', INIT.read_text("utf-8"))[1],
    description="Knowledge distillation for detectron2",
    license="Apache-2.0",
    package_dir={"": "projects", "distill.configs": "configs"},
    packages=[*find_packages("projects", include=["distill", "distill.*"]), "distill.configs"],
    package_data={"distill": ["templates/*"], "distill.configs": ["**/*.yaml"]},
    entry_points={"console_scripts": ["distill = distill.cli:main"]},
    python_requires=">=3.10",
    install_requires=REQUIREMENTS,
    extras_require={
        "dev": [
            *EXPORT,
            "filelock",
            "hypothesis>=6",
            "mypy>=1.10",
            "plotly>=6",
            "pytest>=8.4,<9.2",  # 9.2: pytest-xdist 3.8 does not see its groups
            "pytest-xdist>=3.6",
            "ruff>=0.6",
        ],
        "report": ["plotly>=6"],  # report.html of a training, and `distill report`
        **TRACKERS,
        "export": EXPORT,
        "docs": ["mkdocs>=1.6,<2", "mkdocs-material>=9.5", "mkdocstrings[python]>=0.26"],
    },
)
