"""An option: declared once as a dataclass field, with its default, help and bounds."""

import dataclasses
import math
import typing
from collections.abc import Callable
from typing import Any, TypeVar

_MOST = 2**31 - 1  # of every integer: on the device they are 32-bit integers.

_T = TypeVar("_T")


def option(
    default: Any,
    help_text: str,
    *,
    low: float | None = None,
    high: float | None = None,
    choices: tuple[str, ...] | None = None,
    compared: bool = True,
    resumable: bool = False,
) -> Any:
    """Declares a field of a frozen dataclass of options.

    Args:
      default: The default; its type is that of the annotation.
      help_text: One sentence, with the unit; it is the flag's help too.
      low: Least value, inclusive.
      high: Greatest value, inclusive.
      choices: All values allowed.
      compared: Whether runs that differ in it alone are different methods in a report.
      resumable: Whether a run may be continued with another value.
    """
    metadata = {
        "help": help_text,
        "low": low,
        "high": high,
        "choices": choices,
        "compared": compared,
        "resumable": resumable,
    }
    return dataclasses.field(default=default, metadata=metadata)


def check(options: Any) -> None:
    """Checks every field of a dataclass of options; called by its `__post_init__`.

    Raises:
      ValueError: A value has the wrong type or is out of bounds; it names the first.
    """
    types = typing.get_type_hints(type(options))
    for field in dataclasses.fields(options):
        if "help" not in field.metadata:  # A section, which checks itself.
            continue
        name, value = field.name, getattr(options, field.name)
        if type(value) is not types[name]:
            raise ValueError(f"{name} must be {types[name].__name__}, got {value!r}.")
        low, high = field.metadata["low"], field.metadata["high"]
        choices = field.metadata["choices"]
        if choices is not None and value not in choices:
            raise ValueError(
                f"{name} must be one of {', '.join(choices)}, got {value!r}."
            )
        if type(value) is int and value > _MOST:
            raise ValueError(f"{name} must be at most {_MOST}, got {value}.")
        # Comparisons are written so that NaN fails them.
        if low is not None and not value >= low:
            raise ValueError(f"{name} must be at least {low}, got {value}.")
        if high is not None and not value <= high:
            raise ValueError(f"{name} must be at most {high}, got {value}.")
        if type(value) is float and not math.isfinite(value):
            raise ValueError(f"{name} must be finite, got {value}.")


def fields_of(kind: type) -> dict[str, dataclasses.Field]:
    """Returns the options of a dataclass by name, without its sections."""
    return {f.name: f for f in dataclasses.fields(kind) if "help" in f.metadata}


def converted(values: dict[str, Any], kind: type) -> dict[str, Any]:
    """Returns values with whole numbers where floats are expected made floats."""
    types = typing.get_type_hints(kind)
    return {
        name: float(value) if types.get(name) is float and type(value) is int else value
        for name, value in values.items()
    }


def from_dict(
    kind: Callable[..., _T], values: dict[str, Any], notice: Callable[[str], None]
) -> _T:
    """Builds a dataclass of options from a JSON object.

    Args:
      kind: The dataclass.
      values: Values by name.
      notice: Is told of each option that the object lacks and that takes its default.

    Raises:
      ValueError: An option is unknown, or a value is not valid.
    """
    known = fields_of(kind)  # type: ignore[arg-type]
    if unknown := sorted(set(values) - set(known)):
        raise ValueError(f"unknown options {', '.join(unknown)}")
    for name in sorted(set(known) - set(values)):
        notice(
            f"option {name} is missing and takes its default {known[name].default!r}"
        )
    return kind(**converted(values, kind))  # type: ignore[arg-type]
