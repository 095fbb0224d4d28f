"""Open a store: find the live generation, have it checked, and read its arrays."""

import difflib
import os
import re
import shlex
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import torch

from vllm_jd.row import RANK, SCALE_ROW, STORED_FIELDS, U_START, V_START
from vllm_jd.store.bases import Bases, Codes
from vllm_jd.store.checks import check_contents, check_file, read_manifest
from vllm_jd.store.errors import StoreError
from vllm_jd.store.holding import Hold
from vllm_jd.store.manifest import ADAPTERS, CURRENT, GENERATIONS, MANIFEST, Manifest, ModuleInfo
from vllm_jd.store.quantise import code_width, dequantise, scale_width, unpack
from vllm_jd.store.table import read_names, read_sources, read_table
from vllm_jd.store.tensors import TensorFile

Pool = Literal["U", "V", "scales"]
"""A module's pools of vectors, as the files name them."""

_HASHED_AT_ONCE = min(4, os.cpu_count() or 1)
_CURRENT_FORMAT = re.compile(r"([1-9][0-9]{0,8}) ([0-9a-f]{64})\n")


def read_current(path: Path) -> tuple[int, str]:
    """Return (number, sha256 of the manifest) of the live generation of the store at `path`.

    Raises:
        StoreError: there is no store, or its CURRENT is damaged.
    """
    file = path / CURRENT
    try:
        text = file.read_bytes().decode("utf-8", errors="replace")
    except FileNotFoundError:
        if not path.exists():
            raise StoreError(f"{path}: no such folder; expected a store") from None
        raise StoreError(
            f"{path}: found no {CURRENT} file; expected a store written by `vllm-jd compress` "
            "(a compress that was stopped before its end leaves none: run it again)"
        ) from None
    except OSError as error:
        raise StoreError(f"{file}: cannot be read: {error}") from None
    match = _CURRENT_FORMAT.fullmatch(text)
    if not match:
        raise StoreError(
            f"{file}: found {text[:80]!r}, expected '<generation> <sha256 of its manifest>'"
        )
    return int(match[1]), match[2]


class Store:
    """One generation of a store, read only.

    All of its files are open from the start: what is read later is there whatever becomes of the
    folder meanwhile. Until `close`, or until nobody refers to it, the generation is held:
    `vllm_jd.store.generations.prune` leaves it alone. It is a context manager that closes it.

    Arrays over adapters × modules (`n` adapters in the order of `names`, `m` modules in the order
    of `manifest.modules`) are torch tensors on the CPU, backed by the memory-mapped file:

    - `chosen` int32 `[n, m, K]`: rows of the module's table that the adapter adds up, −1: none. Of
      those, at most one has a core
    - `rank` int32 `[n, m]`: rank of the source adapter's factors, 0 where it has none; of experts
      the sum over all of them
    - `norm` float32 `[n, m]`: ‖BA‖_F of the source; norms and errors of experts are of all of them
      together, as of one matrix
    - `error` float32 `[n, m]`: ‖BA − B̂Â‖²_F / ‖BA‖²_F, squared, of what is stored (B̂Â)
    - `exact_error` float32 `[n, m]`, or None where nothing is quantised: the same before that
    - `source_sha256` uint8 `[n, 32]`, `source_bytes` int64 `[n]`

    `sources` says of each adapter where it was fetched from, e.g. `org/name@commit` of the Hugging
    Face Hub, or None. `basis_files` and `core_files` are the open files, in the manifest's order.
    """

    def __init__(self, path: Path, generation: int, manifest: Manifest, hold: Hold | None = None):
        self.path = path
        self.generation = generation
        self.manifest = manifest
        self.folder = path / GENERATIONS / str(generation)
        self._hold = hold or Hold(self.folder / MANIFEST)
        file = self.folder / ADAPTERS
        table = read_table(file, manifest)
        self.chosen = table["cluster"]
        self.rank = table["rank"]
        self.norm = table["norm"]
        self.error = table["error"]
        self.exact_error = table.get("exact_error")
        self.source_sha256 = table["source_sha256"]
        self.source_bytes = table["source_bytes"]
        self.names = read_names(file, table)
        self.sources = read_sources(file, table)
        self.basis_files = [TensorFile(self.folder / name) for name in manifest.basis_shards]
        self.core_files = [TensorFile(self.folder / shard.file) for shard in manifest.core_shards]
        self._index = {name: i for i, name in enumerate(self.names)}
        self._modules = {module.name: i for i, module in enumerate(manifest.modules)}
        self._spans: dict[str, list[tuple[TensorFile, int, int]]] = {}

    @classmethod
    def open(cls, path: Path | str, *, verify: bool = True) -> "Store":
        """Open the live generation.

        Args:
            path: the store's folder.
            verify: hash every file. Without it only the manifest and the adapter table are
                hashed, and the others checked for their size: enough to list, not to serve.

        Raises:
            StoreError: a file is missing, of another size or hash, or does not hold what the
                manifest says.
        """
        path = Path(path)
        return cls.open_generation(path, *read_current(path), verify=verify)

    @classmethod
    def open_generation(
        cls, path: Path, generation: int, manifest_sha256: str, *, verify: bool
    ) -> "Store":
        """Open generation `generation`, live or not, whose manifest has this sha256; as `open`."""
        folder = path / GENERATIONS / str(generation)
        hold = Hold(folder / MANIFEST)
        manifest = read_manifest(folder / MANIFEST, manifest_sha256)

        def check(name: str) -> None:
            info = manifest.files[name]
            hashed = verify or name == ADAPTERS
            check_file(folder / name, info.bytes, info.sha256 if hashed else None)

        with ThreadPoolExecutor(_HASHED_AT_ONCE) as pool:
            list(pool.map(check, manifest.files))
        store = cls(path, generation, manifest, hold)
        if verify:
            check_contents(store)
        return store

    def close(self) -> None:
        """Close the files, and hold the generation no longer. Harmless when done twice.

        The adapter table can still be read, bases and cores cannot.
        """
        for file in [*self.basis_files, *self.core_files]:
            file.close()
        self._hold.close()

    def __enter__(self) -> "Store":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def __len__(self) -> int:
        return len(self.names)

    def __contains__(self, name: object) -> bool:
        return name in self._index

    def unknown(self, name: str) -> str:
        """What to say of a name that the store does not have."""
        close = difflib.get_close_matches(name, self.names, n=3)
        listing = f"`vllm-jd inspect {shlex.quote(str(self.path))} --json` lists them"
        hint = f"did you mean {', '.join(close)}?" if close else listing
        return f"no adapter {name!r} among its {len(self):,}; {hint}"

    def index(self, name: str) -> int:
        """Index of adapter `name`.

        Raises:
            KeyError: no such adapter.
        """
        return self._index[name]

    def module_index(self, name: str) -> int:
        """Index of module `name`.

        Raises:
            KeyError: no such module.
        """
        return self._modules[name]

    @property
    def dtype(self) -> torch.dtype:
        """Type of the numbers in bases and cores that are not quantised, and as they are read."""
        return getattr(torch, self.manifest.dtype)

    @property
    def stored_bytes(self) -> int:
        """Size of the generation's files, in bytes."""
        return sum(info.bytes for info in self.manifest.files.values())

    @property
    def present(self) -> torch.Tensor:
        """Which adapter has something in which module: bool `[n, m]`."""
        return (self.chosen >= 0).any(dim=2)

    def bases(self, module: str) -> Bases:
        """The vectors and rows of a module.

        Raises:
            KeyError: no such module.
            StoreError: a file cannot be read.
        """
        return Bases(
            u=self.vectors(module, "U"),
            v=self.vectors(module, "V"),
            scales=self.vectors(module, "scales"),
            rows=self.rows(module),
        )

    def codes(self, module: str) -> tuple[Codes, Codes]:
        """V and U of a quantised store's module in 8 bits, of an int4 store too.

        Raises:
            KeyError: no such module.
            ValueError: the store is not quantised.
            StoreError: a file cannot be read.
        """
        if self.manifest.quantised is None:
            raise ValueError(f"the store's bases are {self.manifest.dtype}, not quantised")
        return self.vector_codes(module, "V"), self.vector_codes(module, "U")

    def scales(self, module: str) -> torch.Tensor:
        """The output scales of a module alone: `[scale_rows, d_out]`; as `vectors`."""
        return self.vectors(module, "scales")

    def vectors(
        self, module: str, pool: Pool, first: int = 0, last: int | None = None
    ) -> torch.Tensor:
        """Vectors `first … last - 1` (all) of one of a module's pools: `[last - first, width]`.

        Of the files, only their bytes are read.

        Raises:
            KeyError: no such module.
            StoreError: a file cannot be read.
        """
        count = self._count(f"{module}.{pool}", first, last)
        return self.vectors_of([module], pool, [first], count)

    def vectors_of(
        self, modules: Sequence[str], pool: Pool, firsts: Sequence[int], count: int
    ) -> torch.Tensor:
        """Of several modules whose vectors are equally long, the same number of vectors each.

        Args:
            modules: their names.
            pool: which of their pools.
            firsts: the first vector of each.
            count: how many of each.

        Returns:
            `[modules · count, width]`, module after module.

        Raises:
            KeyError: no such module.
            StoreError: a file cannot be read, or has not so many.
        """
        width = self._width(modules[0], pool)
        keys = [f"{module}.{pool}" for module in modules]
        found = self._each(keys, firsts, count, width, self.dtype)
        if self.manifest.quantised is None:
            return found
        steps = self._steps_of(keys, firsts, count, width)
        return dequantise(found, steps, width).to(self.dtype)

    def rows(self, module: str) -> torch.Tensor:
        """A module's table of rows alone: int32 `[rows, 5]` (`STORED_FIELDS`), of experts
        `[rows, experts, 5]`.

        Raises:
            KeyError: no such module.
            StoreError: the file does not hold it (found only here where `open` did not verify).
        """
        info = self.manifest.modules[self.module_index(module)]
        key = f"{module}.clusters"
        table = _joined(
            [file.read(key) for file, _, _ in self.spans(key)],
            torch.empty(0, *info.row_shape, dtype=torch.int32),
        )
        if table.shape != (info.rows, *info.row_shape):
            raise StoreError(
                f"{self.basis_place}: {key}: found {list(table.shape)}, expected "
                f"{[info.rows, *info.row_shape]}; the store is damaged, compress again"
            )
        return table

    def spans(self, key: str) -> list[tuple[TensorFile, int, int]]:
        """Where a tensor of the bases lies, which is the concatenation of what the files have:
        (file, first entry, last entry + 1) of each that has some of it."""
        if key not in self._spans:
            spans, first = [], 0
            for file in self.basis_files:
                if key in file.tensors:
                    last = first + (file.tensors[key][1] or (0,))[0]
                    spans.append((file, first, last))
                    first = last
            self._spans[key] = spans
        return self._spans[key]

    @property
    def basis_place(self) -> Path:
        """What to name where a tensor of the bases is wrong: the one file, or their folder."""
        shards = self.manifest.basis_shards
        return self.folder / shards[0] if len(shards) == 1 else self.folder

    def vector_codes(
        self, module: str, pool: Pool, first: int = 0, last: int | None = None
    ) -> Codes:
        """As `vectors`, of V or U of a quantised store in 8 bits, of an int4 store too."""
        count = self._count(f"{module}.{pool}", first, last)
        return self.vector_codes_of([module], pool, [first], count)

    def vector_codes_of(
        self, modules: Sequence[str], pool: Pool, firsts: Sequence[int], count: int
    ) -> Codes:
        """As `vectors_of`, likewise."""
        width = self._width(modules[0], pool)
        keys = [f"{module}.{pool}" for module in modules]
        codes = unpack(self._each(keys, firsts, count, width, torch.int8), width)
        return Codes(codes, self._steps_of(keys, firsts, count, width))

    def _width(self, module: str, pool: Pool) -> int:
        info = self.manifest.modules[self.module_index(module)]
        return info.d_in if pool == "V" else info.d_out

    def _count(self, key: str, first: int = 0, last: int | None = None) -> int:
        """How many of the entries `first … last - 1` (all) there are."""
        end = max((end for _, _, end in self.spans(key)), default=0)
        return max(0, (end if last is None else min(last, end)) - first)

    def _steps_of(
        self, keys: Sequence[str], firsts: Sequence[int], count: int, width: int
    ) -> torch.Tensor:
        keys = [f"{key}.steps" for key in keys]
        return self._each(keys, firsts, count, scale_width(width), torch.bfloat16)

    def _each(
        self, keys: Sequence[str], firsts: Sequence[int], count: int, width: int, dtype: torch.dtype
    ) -> torch.Tensor:
        """`count` entries of each of several tensors of one type, one after the other. Of none
        they are `width` wide and of `dtype`."""
        if not count:
            return torch.empty(0, width, dtype=dtype)
        found: torch.Tensor | None = None
        at = step = 0
        for key, first in zip(keys, firsts, strict=True):
            last = first + count
            for file, begin, end in self.spans(key):
                if first < end and begin < last:
                    if found is None:
                        shape = len(keys) * count, *file.tensors[key][1][1:]
                        found = torch.empty(shape, dtype=file.dtype(key))
                        into = memoryview(found.view(-1).view(torch.uint8).numpy())
                        step = len(into) // len(found)
                    size = (min(last, end) - first) * step
                    file.read_into(into[at : at + size], key, first - begin)
                    first, at = min(last, end), at + size
            if first < last:
                raise StoreError(
                    f"{self.basis_place}: {key}: found {self._count(key)} vectors, expected "
                    f"{last}; the store is damaged, compress again"
                )
        return found

    def _alone(self, module: ModuleInfo, stored: torch.Tensor) -> Bases:
        """The bases of one row of a module's table, without reading the others."""
        own = stored.clone().view(-1, len(STORED_FIELDS))
        pools = {}
        for pool, column in (("U", U_START), ("V", V_START), ("scales", SCALE_ROW)):
            starts, lengths = own[:, column], own[:, RANK]
            if pool == "scales":
                lengths = (starts >= 0).to(starts.dtype)
            used = lengths > 0
            first = int(starts[used].min()) if bool(used.any()) else 0
            last = int((starts + lengths)[used].max()) if bool(used.any()) else 0
            pools[pool.lower()] = self.vectors(module.name, pool, first, last)
            own[used, column] -= first
        return Bases(**pools, rows=own.view(1, *stored.shape))

    def cores(self, first: int, last: int) -> torch.Tensor:
        """All cores of adapters `first … last - 1`: `[last - first, core_row]`.

        Reads only their bytes.

        Raises:
            StoreError: a file cannot be read.
        """
        width = self.manifest.core_row
        if self.manifest.quantised:
            return dequantise(*self.core_codes(first, last), width).to(self.dtype)
        return self._cores("cores", first, last, width, self.dtype)

    def core_codes(self, first: int, last: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The same of a quantised store as it has them: codes and steps as `quantise` gives them.

        Raises:
            ValueError: the store is not quantised.
            StoreError: a file cannot be read.
        """
        kind, width = self.manifest.quantised, self.manifest.core_row
        if kind is None:
            raise ValueError(f"the store's cores are {self.manifest.dtype}, not quantised")
        codes = code_width(width, kind), (torch.int8 if kind == "int8" else torch.uint8)
        steps = scale_width(width), torch.bfloat16
        return (
            self._cores("cores", first, last, *codes),
            self._cores("cores.steps", first, last, *steps),
        )

    def _cores(
        self, key: str, first: int, last: int, width: int, dtype: torch.dtype
    ) -> torch.Tensor:
        parts = []
        for shard, file in zip(self.manifest.core_shards, self.core_files, strict=True):
            begin, end = max(first, shard.first), min(last, shard.first + shard.adapters)
            if begin < end:
                whose = f" of adapter {self.names[begin]!r}"
                if end - begin > 1:
                    whose += f" and the {end - begin - 1:,} after it"
                parts.append(file.read(key, begin - shard.first, end - shard.first, whose=whose))
        count = 0 if width else max(0, last - first)
        return _joined(parts, torch.empty(count, width, dtype=dtype))

    def prefetch(self, index: int) -> None:
        """Have the operating system fetch an adapter's cores, without waiting for them.

        Does nothing where the system takes no such advice (macOS).
        """
        for shard, file in zip(self.manifest.core_shards, self.core_files, strict=True):
            place = index - shard.first
            if 0 <= place < shard.adapters:
                for key in file.tensors:
                    file.prefetch(key, place, place + 1)

    def prefetch_vectors(self, module: str, pool: Pool, first: int, last: int) -> None:
        """The same of vectors `first … last - 1` of one of a module's pools.

        Raises:
            KeyError: no such module.
        """
        key = f"{module}.{pool}"
        for file, begin, end in self.spans(key):
            at = max(first, begin) - begin, min(last, end) - begin
            if at[0] < at[1]:
                for part in (key, f"{key}.steps"):
                    if part in file.tensors:
                        file.prefetch(part, *at)

    def factors(self, name: str) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """What the store adds for adapter `name`: per module (B `[d_out, r]`, A `[r, d_in]`),
        float32, so that the delta is B·A. Of a module of experts for each of them, by its layer's
        name (`ModuleInfo.layer`), but those for which it adds nothing.

        Raises:
            KeyError: no such adapter.
            StoreError: a file cannot be read.
        """
        index = self.index(name)
        cores = self.cores(index, index + 1)[0] if self.manifest.core_row else torch.empty(0)
        result = {}
        for column, module in enumerate(self.manifest.modules):
            chosen = [row for row in self.chosen[index, column].tolist() if row >= 0]
            if not chosen:
                continue
            table = self.rows(module.name)
            core = cores[module.core_offset : module.core_offset + module.core_size]
            bases = [self._alone(module, table[row]) for row in chosen]
            for expert in range(module.each):
                parts = [own.factors(0, core, expert) for own in bases]
                b = torch.cat([b for b, _ in parts], dim=1)
                if not module.experts or bool(b.any()):
                    result[module.layer(expert)] = b, torch.cat([a for _, a in parts], dim=0)
        return result


def _joined(parts: list[torch.Tensor], empty: torch.Tensor) -> torch.Tensor:
    if not parts:
        return empty
    return parts[0] if len(parts) == 1 else torch.cat(parts)
