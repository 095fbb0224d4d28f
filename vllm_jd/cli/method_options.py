"""The options of `compress` that the methods state, and which of them were given.

They are looked up when `compress` itself is called or asked for help: the methods import torch,
which the other commands need not wait for.
"""

from collections.abc import Callable
from enum import StrEnum
from inspect import Parameter, Signature
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

if TYPE_CHECKING:
    from vllm_jd.compressor.methods.method import Method
    from vllm_jd.compressor.methods.options import Option

_KEY = "vllm_jd.method_options"
_PANEL = "Method, and its options (in brackets: of which methods)"


def flag(name: str) -> str:
    """An option as it is typed."""
    return f"--{name.replace('_', '-')}"


def is_given(context: Any, name: str) -> bool:
    """Whether the user gave this option."""
    source = context.get_parameter_source(name)
    return source is not None and source.name != "DEFAULT"


def given_options(context: typer.Context) -> dict[str, Any]:
    """`method` and its options, those that the user gave: name → value."""
    return context.meta[_KEY]


class MethodCommand(TyperCommand):
    """A command that has, beside its own, `--method` and every method's options."""

    def get_params(self, ctx: Any) -> list[Any]:
        """All options, those of the methods in the place of their panel."""
        own = super().get_params(ctx)
        at = next(i for i, param in enumerate(own) if param.name == "store_dtype")
        return [*own[:at], *self._stated(), *own[at:]]

    def _stated(self) -> list[Any]:
        if not hasattr(self, "_found"):
            self._found = _stated_params()
        return self._found

    def invoke(self, ctx: Any) -> Any:
        """Call the command; what the methods state is in `given_options`, not in its arguments."""
        stated = {param.name: ctx.params.pop(param.name) for param in self._stated()}
        ctx.meta[_KEY] = {
            name: str(value) if isinstance(value, str) else value
            for name, value in stated.items()
            if is_given(ctx, name)
        }
        return super().invoke(ctx)


def _stated_params() -> list[Any]:
    """`--method`, and one option for each name that any method states."""
    from vllm_jd.compressor.methods.registry import METHODS
    from vllm_jd.compressor.settings import DEFAULT_METHOD

    names = dict.fromkeys(name for method in METHODS.values() for name in method.stated)
    parameters = [
        _parameter(
            "method",
            _choice("method", METHODS),
            default=DEFAULT_METHOD,
            help="How to compress.",
        )
    ]
    for name in names:
        having = [method for method in METHODS.values() if name in method.stated]
        parameters.append(_shared_parameter(name, having))
    return _params(parameters)


def _shared_parameter(name: str, methods: list["Method"]) -> Parameter:
    """The option of several methods: limits and default are shown where all have the same."""
    stated: list[Option] = [method.stated[name] for method in methods]
    first = stated[0]
    choices = list(dict.fromkeys(choice for option in stated for choice in option.choices))
    limits: dict[str, Any] = {}
    if len({(option.kind, option.least, option.most) for option in stated}) == 1:
        limits = {"min": first.least, "max": first.most}
    same = len({(option.default, option.default_help) for option in stated}) == 1
    return _parameter(
        name,
        _choice(name, choices) if choices else first.kind,
        default=first.default if same else None,
        show_default=(first.default_help or True) if same else "the method's",
        help=f"{first.help} ({', '.join(method.name for method in methods)})",
        **limits,
    )


def _choice(name: str, values: Any) -> type[StrEnum]:
    return StrEnum(name, {value: value for value in values})


def _parameter(name: str, kind: Any, *, default: Any, **shown: Any) -> Parameter:
    annotation = Annotated[kind | None, typer.Option(flag(name), rich_help_panel=_PANEL, **shown)]
    return Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _params(parameters: list[Parameter]) -> list[Any]:
    """What Typer makes of a function with these parameters."""

    def command(**options: Any) -> None:
        """Never called."""

    made: Callable[..., None] = command
    made.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
    made.__annotations__ = {each.name: each.annotation for each in parameters}
    app = typer.Typer(add_completion=False)
    app.command()(made)
    return [param for param in typer.main.get_command(app).params if param.name != "help"]
