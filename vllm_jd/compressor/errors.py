"""What the compressor raises for input that it cannot use."""


class AdapterError(Exception):
    """Adapters that cannot be compressed. `faults` lists every fault of every adapter."""

    def __init__(self, faults: list[str]):
        self.faults = faults
        count = f"{len(faults)} faults" if len(faults) > 1 else "1 fault"
        super().__init__(
            f"the adapters cannot be compressed ({count}):\n"
            + "\n".join(f"  - {fault}" for fault in faults)
            + "\nNothing was written. Mend these adapters or leave them out."
        )
