"""Which of the store's adapters hold which slot: all of them, or the most recently used.

A slot is a row of `cores` and of `rows` (kernels/pools.py), the index that a step's tokens carry.
A store with no more adapters than there are slots is resident as a whole. Of a larger one, a core
is read when a step first needs it, and goes when its slot is needed. The scheduler has the
operating system fetch it when the request arrives (`Store.prefetch`), so that no step waits for a
disk.

The cores of a quantised store stay codes, which the kernels decode (`keeps_codes`): two to four
times as many slots take the same memory.
"""

import functools
import math
from collections import OrderedDict
from collections.abc import Collection, Sequence

import numpy as np
import torch

from vllm_jd.kernels.cpu.memory import large_pages
from vllm_jd.plugin.worker.step import copy_to, to_device
from vllm_jd.row import BLOCK, CORE_KIND, CORE_NONE, CORE_OFFSET, CORE_SLOT, ROW_FIELDS, SCALE_ROW
from vllm_jd.store import Store
from vllm_jd.store.quantise import Kind, code_width

_READ = 1024  # adapters whose cores are read at once


def keeps_codes(store: Store, dtype: torch.dtype) -> bool:
    """Whether the slots of a model of `dtype` hold a store's cores as codes. In another dtype than
    the store's they would be rounded once, and the store's own numbers are rounded twice."""
    return store.manifest.quantised is not None and dtype == store.dtype


class Slots:
    """The slots of one worker's model, shared by all layers.

    Slots `0 … count-1` are for the store's adapters; `count … count+max_loras-1` are places for
    uncompressed ones, which the layers fill themselves.

    Args:
        store: the open store.
        columns: for every slice of every layer, in order, the store's module or None.
        lines: for each of those, the clusters' rows, int32 `[clusters, 7]` (`ROW_FIELDS`);
            their core_slot and core_offset are not looked at.
        count: slots for the store's adapters.
        max_loras: places for uncompressed adapters.
        dtype: of the model.
        device: of cores and rows.

    Attributes:
        cores, core_steps: as in `ModulePools`; codes with their steps where `keeps_codes` says so,
            else numbers of `dtype`, and None.
        rows: int32 `[count + max_loras, slices, K, 7]`.
    """

    def __init__(
        self,
        store: Store,
        columns: Sequence[int | None],
        lines: Sequence[torch.Tensor],
        *,
        count: int,
        max_loras: int,
        dtype: torch.dtype,
        device: torch.device,
    ):
        self._store = store
        self.count = min(count, len(store))
        kind = store.manifest.quantised if keeps_codes(store, dtype) else None
        offsets, held = _held(store, columns, BLOCK if kind else 1)
        self._cores_of = functools.partial(_cores_of, store, held, kind)
        cores, steps = self._cores_of(0, 0)
        self.cores = _zeros((self.count, cores.shape[1]), cores.dtype if kind else dtype, device)
        self.core_steps = (
            None if steps is None else _zeros((self.count, steps.shape[1]), steps.dtype, device)
        )
        empty = torch.zeros(1, len(ROW_FIELDS), dtype=torch.int32)
        empty[:, SCALE_ROW] = -1
        empty[:, CORE_SLOT] = -1
        empty[:, CORE_KIND] = CORE_NONE
        shape = (self.count + max_loras, len(columns), store.manifest.rows, len(ROW_FIELDS))
        self.rows = _zeros(shape, torch.int32, device)
        self.rows[:] = empty.to(device)
        # Line 0 is for an adapter that has nothing in a module.
        known = [(j, column) for j, column in enumerate(columns) if column is not None]
        self._slices = torch.tensor([j for j, _ in known], dtype=torch.long, device=device)
        self._columns = torch.tensor([column for _, column in known], dtype=torch.long)
        sizes = torch.tensor([0, *(len(lines[j]) for j, _ in known)])
        self._first_line = 1 + sizes.cumsum(0)[:-1]
        self._lines = torch.cat([empty, *(lines[j] for j, _ in known)])
        for first, size, (_, column) in zip(self._first_line, sizes[1:], known, strict=True):
            self._lines[first : first + size, CORE_OFFSET] = offsets[column]
        self._slot: OrderedDict[int, int] = OrderedDict()  # adapter → slot, least recent first
        self._cluster, clusters = first_clusters(store.chosen)
        places = self.count + max_loras
        self.keys = np.arange(places, dtype=np.int64) + clusters * places
        """int64 `[slots]`: going by it, slots of one cluster stand side by side."""
        self.reads = 0  # cores that were read into a slot since the start
        if self.paged:
            self._free = list(range(self.count - 1, -1, -1))
        else:
            for first in range(0, self.count, _READ):
                last = min(first + _READ, self.count)
                self._set(list(range(first, last)), list(range(first, last)))

    @property
    def paged(self) -> bool:
        """Whether the store has more adapters than there are slots."""
        return self.count < len(self._store)

    @property
    def nbytes(self) -> int:
        """Bytes of all cores."""
        return self.cores.nbytes + (0 if self.core_steps is None else self.core_steps.nbytes)

    def resident(self, adapter: int) -> bool:
        """Whether an adapter's core lies in a slot now."""
        return not self.paged or adapter in self._slot

    def take(self, adapters: Collection[int]) -> dict[int, int]:
        """The slots of one step's adapters (indices of the store), reading those that have none.

        An adapter of this step never loses its slot to another one of it.

        Raises:
            ValueError: more distinct adapters than slots.
        """
        if not self.paged:
            return {adapter: adapter for adapter in adapters}
        wanted = set(adapters)
        if len(wanted) > self.count:
            raise ValueError(
                f"a step has {len(wanted)} distinct adapters, and there are {self.count} slots; "
                "raise --core-slots to at least --max-num-seqs"
            )
        fresh = []
        for adapter in sorted(wanted):
            if adapter in self._slot:
                self._slot.move_to_end(adapter)
            else:
                fresh.append(adapter)
        for adapter in fresh:
            # Those of this step stand at the end: the first is never one of them.
            slot = self._free.pop() if self._free else self._slot.popitem(last=False)[1]
            self._slot[adapter] = slot
        if fresh:
            self._set([self._slot[adapter] for adapter in fresh], fresh)
        return {adapter: self._slot[adapter] for adapter in wanted}

    def _set(self, slots: list[int], adapters: list[int]) -> None:
        if self.cores.shape[1]:
            for slot, first, last in _runs(slots, adapters):
                cores, steps = self._cores_of(first, last)
                copy_to(self.cores[slot : slot + last - first], cores)
                if self.core_steps is not None and steps is not None:
                    copy_to(self.core_steps[slot : slot + last - first], steps)
        index = torch.tensor(slots)
        chosen = self._store.chosen[torch.tensor(adapters)][:, self._columns].long()
        lines = torch.where(chosen < 0, 0, chosen + self._first_line[:, None])
        rows = self._lines[lines]
        rows[..., CORE_SLOT] = index[:, None, None].int()
        device = self.rows.device
        self.rows[to_device(index, device)[:, None], self._slices] = to_device(rows, device)
        self.keys[slots] = self._cluster[adapters] * len(self.keys) + slots
        self.reads += len(adapters)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    return large_pages(math.prod(shape) * dtype.itemsize).view(dtype).view(shape)


def _held(
    store: Store, columns: Sequence[int | None], block: int
) -> tuple[dict[int, int], torch.Tensor | None]:
    """What of a core row one worker needs: of a pipeline's stage, the modules of its own layers.

    Returns:
        Where the core of each module begins then, by its column, and which blocks of `block`
        entries of the row it holds (int64), or None: all of them.
    """
    modules = store.manifest.modules
    used = sorted({column for column in columns if column is not None})
    if len(used) == len(modules):
        return {column: modules[column].core_offset for column in used}, None
    first = [modules[column].core_offset // block for column in used]
    ranges = [
        torch.arange(begin, -(-(module.core_offset + module.core_size) // block))
        for begin, module in zip(first, (modules[column] for column in used), strict=True)
    ]
    held = torch.cat([torch.empty(0, dtype=torch.long), *ranges]).unique()
    places = torch.searchsorted(held, torch.tensor(first, dtype=torch.long)).tolist()
    offsets = {
        column: place * block + modules[column].core_offset % block
        for column, place in zip(used, places, strict=True)
    }
    return offsets, held


def _cores_of(
    store: Store, held: torch.Tensor | None, kind: Kind | None, first: int, last: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What slots hold of adapters `first … last-1`: cores and None, or codes of `kind` and steps.

    `held`: which entries of the row, or blocks of its codes, or None for all.
    """
    if kind is None:
        cores = store.cores(first, last)
        return cores if held is None else cores[:, held], None
    codes, steps = store.core_codes(first, last)
    if held is None:
        return codes, steps
    width = code_width(BLOCK, kind)
    columns = (held[:, None] * width + torch.arange(width)).flatten()
    return codes[:, columns[columns < codes.shape[1]]], steps[:, held]


def first_clusters(cluster: torch.Tensor) -> tuple[np.ndarray, int]:
    """One number for each adapter, equal where the first bases that they read are the same.

    Assignments per adapter, and those per module that go the same way, are the same in the other
    modules too.

    Args:
        cluster: int32 `[n, m, rows]`, `Store.chosen`.

    Returns:
        int64 `[n]`, and how many numbers there are.
    """
    lines = cluster.flatten(1).numpy()
    first = (lines >= 0).argmax(axis=1)
    chosen = np.stack([first, np.take_along_axis(lines, first[:, None], axis=1)[:, 0]], axis=1)
    distinct, numbers = np.unique(chosen, axis=0, return_inverse=True)
    return numbers.reshape(-1).astype(np.int64), len(distinct)


def _runs(slots: list[int], adapters: list[int]) -> list[tuple[int, int, int]]:
    """(first slot, first adapter, last adapter + 1) where both go up by one together."""
    runs: list[tuple[int, int, int]] = []
    for slot, adapter in zip(slots, adapters, strict=True):
        if runs and runs[-1][2] == adapter and runs[-1][0] + adapter - runs[-1][1] == slot:
            runs[-1] = (*runs[-1][:2], adapter + 1)
        else:
            runs.append((slot, adapter, adapter + 1))
    return runs
