"""Declaration of config keys: default, meaning and valid values of each, in one place."""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from detectron2.config import CfgNode

from .errors import ConfigError
from .utils.text import nearest, similar

# ---- Valid values


class Rule(NamedTuple):
    """A condition on a value."""

    holds: Callable[[Any], bool]  # it raises if the value has a wrong type
    text: str  # completes the sentence "it must be ..."
    names: tuple[str, ...] = ()  # the valid values for messages, if they are names

    def allows(self, value: Any) -> bool:
        try:
            return self.holds(value)
        except (
            TypeError,
            ValueError,
            ArithmeticError,
            LookupError,
            AttributeError,
            RecursionError,
        ):
            return False

    def check(self, key: str, value: Any, alternative: str = "") -> None:
        """Raise ConfigError if the value of a key is not valid.

        Args:
            alternative: a further valid value, for the message.
        """
        if self.allows(value):
            return
        if self.names:
            check_choice(key, value, self.names)
        else:
            raise ConfigError(f"{key} is {value!r:.200}; it must be {self.text}{alternative}.")


def check_choice(key: str, value: Any, valid: Iterable[str]) -> None:
    """Raise ConfigError, with the nearest names first, if a value is not a valid name."""
    names = list(valid)
    if value not in names:
        near = similar(str(value), names)
        hint = f"; did you mean {near[0]}?" if near else "."
        raise ConfigError(f"{key}: unknown value '{value}'{hint} Valid: {nearest(value, names)}.")


def one_of(*names: str) -> Rule:
    """Return the rule of a value that is one of a few names."""
    return Rule(lambda x: x in names, " | ".join(names), names)


def at_least(minimum: int) -> Rule:
    """Return the rule of a number with a lower limit."""
    return Rule(lambda x: x >= minimum, f"at least {minimum}")


def list_of(rule: Rule, least: int = 1, most: int | None = None) -> Rule:
    """Return the rule of a list of numbers.

    Args:
        rule: condition on each number.
        least, most: limits of the list's length; no upper limit if ``most`` is None.
    """
    number = f"{least} numbers" if least == most else "a list of numbers"
    return Rule(
        lambda x: (
            least <= len(x) <= (most or len(x))
            and all(is_number(k) for k in x)
            and all(map(rule.allows, x))
        ),
        f"{number}, each {rule.text}",
    )


def is_number(x: Any) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool)


def is_rising(values: Iterable[float]) -> bool:
    return all(a < b for a, b in pairwise(values))


def _is_finite(value: Any) -> bool:
    """Return whether all numbers inside are finite and fit torch's number types."""
    if isinstance(value, list | tuple):
        return all(map(_is_finite, value))
    if isinstance(value, float):
        return abs(value) <= torch.finfo(torch.float32).max  # False for NaN
    return not isinstance(value, int) or abs(value) < 2**63


FINITE = Rule(_is_finite, "finite, and no larger than torch's numbers")
NUMBER = Rule(is_number, "a number")
POSITIVE = Rule(lambda x: x > 0, "above 0")
FRACTION = Rule(lambda x: 0 <= x <= 1, "in [0, 1]")
BELOW_1 = Rule(lambda x: 0 <= x < 1, "in [0, 1)")
SHARE = Rule(lambda x: 0 < x <= 1, "in (0, 1]")
INSIDE_0_1 = Rule(lambda x: 0 < x < 1, "in (0, 1)")
WHOLE = Rule(lambda x: isinstance(x, int) and x >= 0, "a whole number from 0")
WHOLES = Rule(lambda x: all(map(WHOLE.holds, x)), "whole numbers from 0")
COUNTS = Rule(
    lambda x: len(x) > 0 and all(WHOLE.holds(k) and 0 < k < 2**31 for k in x),
    "whole numbers from 1",
)
HEIGHT_WIDTH = Rule(
    lambda x: len(x) == 2 and COUNTS.holds(x), "a height and a width, whole numbers from 1"
)
BOX_WEIGHTS = list_of(POSITIVE, 4, 4)
IOU_THRESHOLDS = Rule(
    lambda x: list_of(SHARE).holds(x) and is_rising(x), "rising numbers in (0, 1]"
)
SWITCH = Rule(lambda x: isinstance(x, bool), "True or False")
TEXT = Rule(lambda x: isinstance(x, str), "a text")
TEXTS = Rule(lambda x: all(isinstance(k, str) for k in x), "a list of texts")
LIST = Rule(lambda x: isinstance(x, list | tuple), "a list")

# ---- Keys

AUTO = -1
"""Config value that stands for the authors' value (:class:`Presets`)."""


class Presets(dict[str, Any]):
    """The authors' values of a key, by the class name of the student's detector.

    The config value is :data:`AUTO` until a user sets another. ::

        ALPHA=Key(Presets(DenseDetector=1e-3, FCOS=1.6e-3), "factor of the foreground", POSITIVE)
    """

    def of(self, kinds: Sequence[str]) -> Any:
        """Return the value of a detector.

        Args:
            kinds: names of its class and base classes, nearest first. A detector that is not
                listed has the first value.
        """
        return self[next((kind for kind in kinds if kind in self), next(iter(self)))]

    @property
    def auto(self) -> Any:
        """:data:`AUTO` in the type of the values, which yacs keeps."""
        return type(next(iter(self.values())))(AUTO)


@dataclass(frozen=True)
class Key:
    """A config key.

    Args:
        default: the value, or the authors' values by detector.
        meaning: one line for the config reference, with the unit and the symbol in the paper.
        rule: the valid values.
        term: name of the term of a head's loss of which the key is the factor. A head is refused
            if all its terms have the factor 0, because its adapters would get no gradient.
    """

    default: Any
    meaning: str
    rule: Rule
    term: str = ""

    def __post_init__(self) -> None:
        for value in self.presets.values() or (self.default,):
            if not (FINITE.allows(value) and self.rule.allows(value)):
                raise ValueError(f"default {value!r} must be {self.rule.text} ({self.meaning})")

    @property
    def presets(self) -> Presets:
        """The authors' values by detector; empty if the default is the same for all."""
        return self.default if isinstance(self.default, Presets) else Presets()

    def for_kinds(self, kinds: Sequence[str]) -> Any:
        """Return the authors' value for a detector, see :meth:`Presets.of`."""
        return self.presets.of(kinds) if self.presets else self.default

    @property
    def initial(self) -> Any:
        """The value in a new config."""
        return self.presets.auto if self.presets else copy.deepcopy(self.default)

    def check(self, name: str, value: Any) -> None:
        """Raise ConfigError, which names the key and the valid values, if a value is not valid."""
        if self.presets and value == AUTO:
            return
        alternative = f", or {AUTO} for the authors' value" if self.presets else ""
        for rule in (FINITE, self.rule):
            rule.check(name, value, alternative)


class Section(dict[str, Key]):
    """The keys of a head or a network, by their names in the config.

    A value that is not a :class:`Key` is a new default of an inherited key; None removes it. ::

        class CWD(FPNDistillHead):
            section = Section(WEIGHT=10.0, TEMPERATURE=Key(1.0, "temperature 𝒯", POSITIVE))
    """

    def __init__(self, **keys: Any):
        super().__init__(keys)

    def on_top_of(self, inherited: Mapping[str, Key]) -> "Section":
        """Return the inherited keys with the changes and additions of this section."""
        keys = dict(inherited)
        for name, key in self.items():
            if isinstance(key, Key):
                keys[name] = key
            elif name not in inherited:
                raise TypeError(f"{name}={key!r}: declare a new key as Key(default, meaning, rule)")
            elif key is None:
                del keys[name]
            else:
                keys[name] = replace(inherited[name], default=key)
        return Section(**keys)

    @property
    def terms(self) -> list[str]:
        """Names of the factors of the loss's terms."""
        return [name for name, key in self.items() if key.term]

    def values_for(self, node: CfgNode, kinds: Sequence[str]) -> CfgNode:
        """Return a copy of a config section with the authors' values in place of :data:`AUTO`.

        Args:
            node: the section of the config.
            kinds: class names of the student's detector, see :meth:`Presets.of`.
        """
        values = node.clone()
        for name, key in self.items():
            if key.presets and values[name] == AUTO:
                values[name] = key.for_kinds(kinds)
        return values


def add_keys(cfg: CfgNode, keys: Mapping[str, Key]) -> None:
    """Add keys with their defaults to a config.

    Args:
        keys: by dotted names, such as ``MODEL.DISTILL.HEADS``.
    """
    for name, key in keys.items():
        *path, last = name.split(".")
        node = cfg
        for part in path:
            if part not in node:
                node[part] = CfgNode()
            node = node[part]
        node[last] = key.initial
