"""What `compress` and `verify` say of a store that `vllm-jd serve` would refuse."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape

if TYPE_CHECKING:
    from vllm_jd.store import Store


@dataclass(frozen=True)
class Fit:
    """Sentences about modules that will not be served, and about those that may not be."""

    refused: list[str] = field(default_factory=list)
    doubtful: list[str] = field(default_factory=list)

    def tell(self, console: Console) -> None:
        """Print both; nothing where all fits."""
        for what, lines in (
            ("`vllm-jd serve` will refuse this store", self.refused),
            ("`vllm-jd serve` may refuse this store", self.doubtful),
        ):
            if lines:
                console.print(f"[yellow]{what}:[/]")
            for line in lines:
                console.print(f"  - {escape(line)}", soft_wrap=True)


def base_folder(given: str | None, named: str) -> Path | None:
    """The base model's folder: what the user gave, or what the adapters name, if it is one."""
    folder = Path(given or named)
    return folder if (folder / "config.json").is_file() else None


def fit_of(store: "Store", config: Mapping[str, Any]) -> Fit:
    """Compare a store's modules with the base model.

    Args:
        store: the store.
        config: the base model's `config.json`, or as much of it as is known.
    """
    from vllm_jd.compressor.read.base_layers import misfits, told

    modules = [(module.name, module.d_in, module.d_out) for module in store.manifest.modules]
    found = misfits(modules, config)
    return Fit(
        told(misfit for misfit in found if misfit.certain),
        told(misfit for misfit in found if not misfit.certain),
    )
