"""What the compressor raises for input that it cannot use, and how it says so."""

from collections.abc import Sequence

_FEW = 3


def few(names: Sequence[object]) -> str:
    """The first of many names, and how many more there are."""
    more = f" and {len(names) - _FEW:,} more" if len(names) > _FEW else ""
    return ", ".join(map(str, names[:_FEW])) + more


class CompressorError(Exception):
    """The message says what was found, what was expected, and what to do."""


class AdapterError(CompressorError):
    """Adapters that cannot be compressed. `faults` lists every fault of every adapter."""

    def __init__(self, faults: list[str]):
        self.faults = faults
        count = f"{len(faults)} faults" if len(faults) > 1 else "1 fault"
        super().__init__(
            f"the adapters cannot be compressed ({count}):\n"
            + "\n".join(f"  - {fault}" for fault in faults)
            + "\nNothing was written. Mend these adapters or leave them out."
        )


class SettingsError(CompressorError, ValueError):
    """A method that is not there, an option that the method has not, or a value out of range."""


class ModelError(CompressorError):
    """A base model that cannot be run, or whose chat template cannot be applied."""


class TargetError(CompressorError):
    """No settings meet the targets; the message says what comes closest."""
