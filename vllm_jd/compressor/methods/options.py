"""How a method states its options: a frozen dataclass, each field with its help and range."""

import math
from dataclasses import dataclass, field, fields
from functools import cache
from numbers import Integral, Real
from types import UnionType
from typing import Any, Literal, get_args, get_origin

from vllm_jd.compressor.errors import SettingsError


@dataclass(frozen=True)
class Option:
    """One option, as a field of an `Options` class states it.

    Args:
        name: of the field; on the command line with dashes.
        kind: int, float or str.
        default: where it is not given.
        help: one sentence for people.
        choices: all values that there are, for str.
        least: the smallest value.
        above: it must be larger than this.
        most: the largest value.
        default_help: what the default means, where its value does not say it.
    """

    name: str
    kind: type
    default: Any
    help: str
    choices: tuple[str, ...] = ()
    least: float | None = None
    above: float | None = None
    most: float | None = None
    default_help: str | None = None

    def check(self, value: Any) -> None:
        """Refuse a value of another type or out of range.

        Raises:
            SettingsError: it says what was found and what is expected.
        """
        if value is None and self.default is None:
            return
        if self.choices:
            right = value in self.choices
        else:
            number = Integral if self.kind is int else Real
            right = isinstance(value, number) and not isinstance(value, bool)
            right = right and math.isfinite(value)
            right = right and (self.least is None or value >= self.least)
            right = right and (self.above is None or value > self.above)
            right = right and (self.most is None or value <= self.most)
        if not right:
            raise SettingsError(f"{self.name} is {value!r}; expected {self.expected}")

    @property
    def expected(self) -> str:
        """The values that it takes, in words."""
        if self.choices:
            return f"one of {', '.join(self.choices)}"
        bounds = (
            ("at least", self.least),
            ("above", self.above),
            ("at most", self.most),
        )
        limits = " and ".join(f"{word} {bound:g}" for word, bound in bounds if bound is not None)
        number = "a whole number" if self.kind is int else "a number"
        return f"{number}, {limits}" if limits else number


def option(
    default: Any,
    help: str,
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    default_help: str | None = None,
) -> Any:
    """A field of an `Options` class. Type and choices are in its annotation; see `Option`."""
    stated = {
        "help": help,
        "least": least,
        "above": above,
        "most": most,
        "default_help": default_help,
    }
    return field(default=default, metadata=stated)


@dataclass(frozen=True)
class Options:
    """Base class of every method's options; by itself, no options.

    The class attributes are what the stages around a method take where it has no such option.
    """

    rank = 0
    clusters = 1
    experts = "separate"

    def __post_init__(self) -> None:
        for stated in options_of(type(self)).values():
            stated.check(getattr(self, stated.name))


@cache
def options_of(kind: type[Options]) -> dict[str, Option]:
    """The options that a class states, by name and in its order."""
    found = {}
    for stated in fields(kind):
        annotation: Any = stated.type
        if isinstance(annotation, UnionType):  # float | None
            annotation = next(part for part in get_args(annotation) if part is not type(None))
        choices = get_args(annotation) if get_origin(annotation) is Literal else ()
        kind_of = str if choices else annotation
        if kind_of not in (int, float, str) or (kind_of is str and not choices):
            raise TypeError(f"{kind.__name__}.{stated.name} is {stated.type}: no type of an option")
        found[stated.name] = Option(
            stated.name, kind_of, stated.default, choices=choices, **stated.metadata
        )
    return found
