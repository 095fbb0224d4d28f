"""Choose the settings for a wanted error or size, compress, and check that it was met."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from vllm_jd.compressor.choose.plan import PLANNED, Candidate, choose, plan
from vllm_jd.compressor.errors import SettingsError, TargetError
from vllm_jd.compressor.read.adapters import Collection
from vllm_jd.compressor.run.compress import ModuleMap, Progress, compress
from vllm_jd.compressor.run.parallel import parallel_map
from vllm_jd.compressor.settings import Settings
from vllm_jd.store import BaseModelInfo, Store


class _Missed(Exception):
    """What a candidate really comes to."""

    def __init__(self, error: float, size: int):
        super().__init__(f"error {error:.4g}, {size:,} bytes")
        self.error = error
        self.size = size


def compress_to_target(
    collection: Collection,
    out: Path,
    base: Settings,
    *,
    target_error: float | None = None,
    max_bytes: int | None = None,
    methods: Sequence[str] | None = None,
    dtypes: Sequence[str] = (),
    base_model: BaseModelInfo | None = None,
    device: str = "cpu",
    module_map: ModuleMap = parallel_map,
    on_choice: Callable[[Candidate], None] = lambda candidate: None,
    on_progress: Progress = lambda what, done, total: None,
) -> tuple[Store, list[Candidate]]:
    """Compress with the smallest settings that meet a target (§6.5, over all methods).

    The candidates' errors are estimated on a few modules (`plan`). The chosen one is compressed
    whole; if it misses, all estimates are scaled by what was learnt, and the next is tried.
    Nothing is published that misses.

    Args:
        collection: the adapters.
        out: the store's folder.
        base: what all candidates have in common (store_dtype, seed, …).
        target_error: highest mean relative squared error.
        max_bytes: largest size of the store. Without a target error, the least error within it.
        methods: look only at these, of `PLANNED`.
        dtypes: types of the stored numbers to choose among; default: that of `base`.
        base_model: see `compress`, as the arguments that follow.
        device: see `compress`.
        module_map: see `compress`.
        on_choice: called with each candidate before it is tried.
        on_progress: see `compress`.

    Returns:
        The store, and all candidates with their estimates.

    Raises:
        SettingsError: a method that is not among those.
        TargetError: no candidate meets the targets.
        StoreError, AdapterError: as `compress`.
    """
    if other := [method for method in methods or () if method not in PLANNED]:
        raise SettingsError(
            f"method {', '.join(other)} cannot meet a target: choose among {', '.join(PLANNED)}"
        )
    candidates = plan(collection, base=base, dtypes=dtypes, on_progress=on_progress)
    if methods is not None:
        candidates = [c for c in candidates if c.settings.method in methods]
    left = list(candidates)

    def accept(error: float, size: int) -> None:
        if (target_error is not None and error > target_error) or (
            max_bytes is not None and size > max_bytes
        ):
            raise _Missed(error, size)

    while order := choose(left, target_error=target_error, max_bytes=max_bytes):
        candidate = order[0]
        on_choice(candidate)
        try:
            store = compress(
                collection,
                out,
                candidate.settings,
                base_model=base_model,
                device=device,
                module_map=module_map,
                accept=accept,
                on_progress=on_progress,
            )
        except _Missed as missed:
            left = _learn(left, candidate, missed)
            continue
        return store, candidates
    raise TargetError(_closest(left, target_error, max_bytes))


def _learn(left: list[Candidate], tried: Candidate, missed: _Missed) -> list[Candidate]:
    """The other candidates, their estimates scaled by how far off the tried one's was."""
    wrong = max(1.0, missed.error / tried.error) if tried.error > 0 else 1.0
    larger = max(1.0, missed.size / tried.bytes)
    scaled = [
        replace(c, error=c.error * wrong, bytes=round(c.bytes * larger))
        for c in left
        if c is not tried
    ]
    return scaled


def _closest(left: list[Candidate], target_error: float | None, max_bytes: int | None) -> str:
    wanted = []
    if target_error is not None:
        wanted.append(f"an error of at most {target_error:g}")
    if max_bytes is not None:
        wanted.append(f"at most {max_bytes / 1e6:.1f} MB")
    message = f"no settings reach {' and '.join(wanted)}"
    fitting = [c for c in left if max_bytes is None or c.bytes <= max_bytes]
    if fitting:
        best = min(fitting, key=lambda c: c.error)
        message += f"; within that size {best.label} comes to an error of about {best.error:.2f}"
    elif left:
        smallest = min(left, key=lambda c: c.bytes)
        message += f"; the smallest, {smallest.label}, takes {smallest.bytes / 1e6:.1f} MB"
    return (
        message
        + ". `vllm-jd plan ADAPTERS` shows all; --store-dtype int8 or int4 makes stores smaller"
    )
