"""Record the calls of submodules during one forward.

Only modules that detectron2 documents by name are safe to record. Inside of them, later in-place
operations rewrite the recorded tensors.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..errors import RecorderError


class Call(NamedTuple):
    """One call of a recorded module or method."""

    args: tuple[Any, ...]
    output: Any


class Recorder:
    """The recorded calls of one forward, by the name of the module."""

    def __init__(self, names: Sequence[str]):
        self._calls: dict[str, list[Call]] = {name: [] for name in names}

    def add(self, name: str, call: Call) -> None:
        self._calls[name].append(call)

    def all(self, name: str) -> list[Call]:
        """Return all calls of ``name`` in order.

        Raises:
            RecorderError: if the module is not recorded or did not run.
        """
        if name not in self._calls:
            names = ", ".join(self._calls)
            raise RecorderError(f"Module '{name}' is not recorded; recorded: {names}.")
        if not self._calls[name]:
            raise RecorderError(
                f"The recorded module '{name}' did not run in this forward. Hooks do not fire "
                "inside a compiled graph: compile the module itself, not one that contains it."
            )
        return self._calls[name]

    def __getitem__(self, name: str) -> Call:
        """Return the last call of ``name``; see :meth:`all`."""
        return self.all(name)[-1]


class BranchRecorder(Recorder):
    """View of a recorder that replaces the tensors of its calls.

    Args:
        recorder: the calls of a forward.
        replace: function of a tensor's place, such as ``backbone.p3``, and the tensor.
    """

    def __init__(self, recorder: Recorder, replace: Callable[[str, Tensor], Tensor]):
        self.recorder = recorder
        self.replace = replace
        self.replaced: dict[str, list[Call]] = {}

    def all(self, name: str) -> list[Call]:
        if name not in self.replaced:
            calls = self.recorder.all(name)
            numbers = [""] if len(calls) == 1 else [f".{k}" for k in range(len(calls))]
            self.replaced[name] = [
                Call(
                    self._mapped(f"{name}{k}.args", call.args),
                    self._mapped(f"{name}{k}", call.output),
                )
                for k, call in zip(numbers, calls)
            ]
        return self.replaced[name]

    def _mapped(self, place: str, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self.replace(place, value)
        if isinstance(value, Mapping):
            return {k: self._mapped(f"{place}.{k}", x) for k, x in value.items()}
        if isinstance(value, list | tuple):
            items = [self._mapped(f"{place}.{k}", x) for k, x in enumerate(value)]
            return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
        return value


@contextmanager
def record(model: nn.Module, names: Sequence[str]) -> Iterator[Recorder]:
    """Record the calls of submodules and methods of ``model`` while the context is open.

    Args:
        names: submodules, such as "backbone", and methods, such as "label_anchors()".

    Raises:
        RecorderError: if ``model`` has no such submodule or method.
    """
    recorder = Recorder(names)
    with ExitStack() as hooks:
        for name in names:
            if name.endswith("()"):
                hooks.callback(_record_method(model, name, recorder))
            else:
                handle = _module(model, name).register_forward_hook(_hook(recorder, name))
                hooks.callback(handle.remove)
        yield recorder


def _record_method(model: nn.Module, name: str, recorder: Recorder) -> Callable[[], None]:
    """Record a method's calls; the returned function ends the recording."""
    attribute = name[:-2]
    method = getattr(model, attribute, None)
    if not inspect.isroutine(method):
        raise RecorderError(f"{type(model).__name__} has no method '{name}' to record.")
    own = vars(model).get(attribute)  # set on the instance by an outer recorder or by a user

    def recorded(*args: Any, **kwargs: Any) -> Any:
        output = method(*args, **kwargs)
        recorder.add(name, Call(args, output))
        return output

    setattr(model, attribute, recorded)  # only on the instance
    return lambda: setattr(model, attribute, own) if own else delattr(model, attribute)


def _module(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError as e:
        raise RecorderError(f"{type(model).__name__} has no module '{name}' to record: {e}.") from e


def _hook(recorder: Recorder, name: str) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        recorder.add(name, Call(args, output))

    return hook
