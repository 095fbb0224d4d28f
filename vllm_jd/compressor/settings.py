"""How to compress: the settings of one run."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from vllm_jd.compressor.errors import SettingsError
from vllm_jd.compressor.methods.options import Option, Options
from vllm_jd.compressor.methods.registry import find_method

DEFAULT_METHOD = "jd-full"
FLOATS = ("bfloat16", "float16", "float32")
QUANTISED = ("int8", "int4")

_COMMON = (
    Option("seed", int, 0, "Of every random choice.", least=0),
    Option("store_dtype", str, "bfloat16", "", choices=(*FLOATS, *QUANTISED)),
    Option("max_adapter_error", float, None, "", least=0),
)

_GONE = {"rank_allocation": "uniform", "residual_rank": 0, "mean_rank": 0}
"""Options that there were, and what stores that were made without them say of each."""


@dataclass(frozen=True, init=False)
class Settings:
    """A method, its options, and what all methods have in common. Names as on the command line.

    `Settings(method="svd", rank=4)`, `settings.rank`, `dataclasses.replace(settings, rank=8)`:
    options read and write as if they were fields. An option that the method has not is refused;
    some can be read all the same, as what their absence means (see `Options`).

    Args:
        method: a name of the registry.
        seed: of every random choice.
        store_dtype: type of the stored numbers: a float type, `int8` or `int4`.
        max_adapter_error: an adapter whose mean relative squared error over its modules would be
            higher is stored uncompressed.
        options: options to start from, by default the method's defaults. Of another method's
            options those count which this one has, too.
        given: options of the method; they go before `options`.

    Raises:
        SettingsError: no such method or option, or a value out of its range.
    """

    method: str
    options: Options
    seed: int
    store_dtype: str
    max_adapter_error: float | None

    def __init__(
        self,
        method: str = DEFAULT_METHOD,
        *,
        seed: int = 0,
        store_dtype: str = "bfloat16",
        max_adapter_error: float | None = None,
        options: Options | None = None,
        **given: Any,
    ):
        found = find_method(method)
        found.refuse_unknown(given)
        if options is not None:
            shared = {key: value for key, value in vars(options).items() if key in found.stated}
            given = shared | given
        common = (seed, store_dtype, max_adapter_error)
        for option, value in zip(_COMMON, common, strict=True):
            option.check(value)
            object.__setattr__(self, option.name, value)
        object.__setattr__(self, "method", method)
        object.__setattr__(self, "options", found.options(**given))

    def __getattr__(self, name: str) -> Any:
        # Only for what is no field. Copying asks for dunders of an object that is still empty.
        if name.startswith("__") or name == "options":
            raise AttributeError(name)
        return getattr(self.options, name)

    @property
    def float_dtype(self) -> str:
        """Type of the stored numbers that are not quantised."""
        return "bfloat16" if self.store_dtype in QUANTISED else self.store_dtype

    @property
    def quantised(self) -> str | None:
        """`int8`, `int4`, or None."""
        return self.store_dtype if self.store_dtype in QUANTISED else None

    def has(self, name: str) -> bool:
        """Whether the method has this option."""
        return name in find_method(self.method).stated

    def adapted(self, **values: Any) -> "Settings":
        """These settings, with those of the values for which the method has an option."""
        own = {name: value for name, value in values.items() if self.has(name)}
        return replace(self, **own)

    def recorded(self, *, experts: bool = False) -> dict[str, Any]:
        """What had a say, as the manifest has it; the method has a field of its own there.

        `experts`: whether there were some. Without, what is to become of them had none.
        """
        found = asdict(self.options)
        if not experts:
            found.pop("experts", None)
        if find_method(self.method).seeded:
            found["seed"] = self.seed
        found |= {"store_dtype": self.store_dtype, "max_adapter_error": self.max_adapter_error}
        return {name: value for name, value in found.items() if value is not None}

    def as_dict(self) -> dict[str, Any]:
        """All of it, options among the rest: what `Settings` takes."""
        common = {option.name: getattr(self, option.name) for option in _COMMON}
        return {"method": self.method, **asdict(self.options), **common}

    @classmethod
    def from_recorded(cls, method: str, recorded: Mapping[str, Any]) -> "Settings":
        """The settings of a store's manifest; what it lacks takes its default.

        Raises:
            SettingsError: a method that this version does not know, or an option that is gone.
        """
        gone = [
            f"{name} {recorded[name]}"
            for name, without in _GONE.items()
            if recorded.get(name, without) != without
        ]
        if gone:
            raise SettingsError(
                f"found a store made with {', '.join(gone)}, which is served as it is but can no "
                "longer be fitted or added to; expected one made without: compress all its "
                "adapters anew (`vllm-jd compress ADAPTERS --out STORE`)"
            )
        known = {*find_method(method).stated, *(option.name for option in _COMMON)}
        return cls(method, **{key: value for key, value in recorded.items() if key in known})
