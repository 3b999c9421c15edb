"""Extension of griffe, which reads the docstrings for the API pages."""

import sys
from pathlib import Path
from typing import Any

import griffe

sys.path.insert(0, str(Path(__file__).parent))

from text import markdown


class Roles(griffe.Extension):
    """Replace the roles of Sphinx by links of Markdown."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring:
            obj.docstring.value = markdown(obj.docstring.value)
