"""Open a store: find the live generation, check it, and read its arrays by memory map."""

import difflib
import json
import os
import re
import shlex
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open

from vllm_jd.row import CORE_DIAGONAL, CORE_FULL, CORE_KIND, CORE_NONE, STORED_FIELDS
from vllm_jd.store.bases import Bases, Codes
from vllm_jd.store.errors import StoreError
from vllm_jd.store.files import sha256_file
from vllm_jd.store.manifest import SCHEMA_VERSION, CoreShard, Manifest, ModuleInfo
from vllm_jd.store.quantise import code_width, dequantise, scale_width, unpack

CURRENT = "CURRENT"
GENERATIONS = "generations"
MANIFEST = "manifest.json"
ADAPTERS = "adapters.safetensors"

_HASHED_AT_ONCE = min(4, os.cpu_count() or 1)
_CURRENT_FORMAT = re.compile(r"([1-9][0-9]{0,8}) ([0-9a-f]{64})\n")
_DTYPE_NAMES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
_CODE_NAMES = {"int8": "I8", "int4": "U8"}
_TABLE_DTYPES = {
    "names": torch.uint8,
    "name_offsets": torch.int64,
    "cluster": torch.int32,
    "rank": torch.int32,
    "norm": torch.float32,
    "error": torch.float32,
    "source_sha256": torch.uint8,
    "source_bytes": torch.int64,
}
_OPTIONAL = {
    "exact_error": torch.float32,
    "input_error": torch.float32,
    "sources": torch.uint8,
    "source_offsets": torch.int64,
}


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

    Arrays over adapters × modules (`n` adapters in the order of `names`, `m` modules in the order
    of `manifest.modules`) are torch tensors on the CPU, backed by the memory-mapped file:

    - `cluster` int32 `[n, m, rows]`: lines of the module's cluster table that the adapter adds up,
      −1: none. Of those, at most one has a core
    - `rank` int32 `[n, m]`: rank of the source adapter's factors, 0 where it has none
    - `norm` float32 `[n, m]`: ‖BA‖_F of the source
    - `error` float32 `[n, m]`: ‖BA − B̂Â‖²_F / ‖BA‖²_F, squared, of what is stored (B̂Â)
    - `exact_error` float32 `[n, m]`, or None where nothing is quantised: the same before that
    - `input_error` float32 `[n, m]`, or None: ‖(BA − B̂Â)x‖² / ‖BAx‖² in the mean over the inputs
      x of the module that the store was calibrated with
    - `source_sha256` uint8 `[n, 32]`, `source_bytes` int64 `[n]`

    `sources` says of each adapter where it was fetched from, e.g. `org/name@commit` of the Hugging
    Face Hub, or None.
    """

    def __init__(self, path: Path, generation: int, manifest: Manifest):
        self.path = path
        self.generation = generation
        self.manifest = manifest
        self.folder = path / GENERATIONS / str(generation)
        table = _read_table(self.folder / ADAPTERS, manifest)
        self.cluster = table["cluster"]
        self.rank = table["rank"]
        self.norm = table["norm"]
        self.error = table["error"]
        self.exact_error = table.get("exact_error")
        self.input_error = table.get("input_error")
        self.source_sha256 = table["source_sha256"]
        self.source_bytes = table["source_bytes"]
        self.names = _split_names(self.folder / ADAPTERS, table["names"], table["name_offsets"])
        self.sources = _read_sources(self.folder / ADAPTERS, table, len(self.names))
        self._index = {name: i for i, name in enumerate(self.names)}
        self._modules = {module.name: i for i, module in enumerate(manifest.modules)}
        if len(self._index) != len(self.names):
            raise StoreError(f"{self.folder / ADAPTERS}: found a repeated name, expected each once")

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
        manifest = _read_manifest(folder / MANIFEST, manifest_sha256)

        def check(name: str) -> None:
            info = manifest.files[name]
            hashed = verify or name == ADAPTERS
            _check_file(folder / name, info.bytes, info.sha256 if hashed else None)

        with ThreadPoolExecutor(_HASHED_AT_ONCE) as pool:
            list(pool.map(check, manifest.files))
        store = cls(path, generation, manifest)
        if verify:
            store._check_contents()
        return store

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
        """Row of adapter `name`.

        Raises:
            KeyError: no such adapter.
        """
        return self._index[name]

    def module_index(self, name: str) -> int:
        """Column of module `name`.

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
        return (self.cluster >= 0).any(dim=2)

    @cached_property
    def _shards(self) -> list[tuple[safe_open, set[str]]]:
        files = [_opened(self.folder / name) for name in self.manifest.basis_shards]
        return [(file, set(file.keys())) for file in files]

    def bases(self, module: str) -> Bases:
        """The basis vectors and clusters of a module.

        Raises:
            KeyError: no such module.
        """
        info = self.manifest.modules[self.module_index(module)]
        return Bases(
            u=self._matrix(f"{module}.U", info.d_out),
            v=self._matrix(f"{module}.V", info.d_in),
            scales=self._matrix(f"{module}.scales", info.d_out),
            clusters=self.clusters(module),
        )

    def codes(self, module: str) -> tuple[Codes, Codes]:
        """V and U of a quantised store's module in 8 bits, of an int4 store too.

        Raises:
            KeyError: no such module.
            ValueError: the store is not quantised.
        """
        if self.manifest.quantised is None:
            raise ValueError(f"the store's bases are {self.manifest.dtype}, not quantised")
        info = self.manifest.modules[self.module_index(module)]
        v, u = (
            self._codes(f"{module}.{which}", width)
            for which, width in (("V", info.d_in), ("U", info.d_out))
        )
        return v, u

    def scales(self, module: str) -> torch.Tensor:
        """The output scales of a module alone: `[scale_rows, d_out]`.

        Raises:
            KeyError: no such module.
        """
        info = self.manifest.modules[self.module_index(module)]
        return self._matrix(f"{module}.scales", info.d_out)

    def _codes(self, key: str, width: int) -> Codes:
        held = [file for file, keys in self._shards if key in keys]
        return Codes(
            _joined(
                [unpack(file.get_tensor(key), width) for file in held],
                torch.empty(0, width, dtype=torch.int8),
            ),
            _joined(
                [file.get_tensor(f"{key}.steps") for file in held],
                torch.empty(0, scale_width(width), dtype=torch.bfloat16),
            ),
        )

    @property
    def _basis_files(self) -> Path:
        """What to name where a tensor of the bases is wrong: the one file, or their folder."""
        shards = self.manifest.basis_shards
        return self.folder / shards[0] if len(shards) == 1 else self.folder

    def clusters(self, module: str) -> torch.Tensor:
        """The cluster table of a module alone: int32 `[clusters, 5]` (`STORED_FIELDS`).

        Raises:
            KeyError: no such module.
            StoreError: the file does not hold it (found only here where `open` did not verify).
        """
        info = self.manifest.modules[self.module_index(module)]
        key = f"{module}.clusters"
        table = _joined(
            [file.get_tensor(key) for file, keys in self._shards if key in keys],
            torch.empty(0, len(STORED_FIELDS), dtype=torch.int32),
        )
        if table.shape != (info.clusters, len(STORED_FIELDS)):
            raise StoreError(
                f"{self._basis_files}: {key}: found {list(table.shape)}, expected "
                f"{[info.clusters, len(STORED_FIELDS)]}; the store is damaged, compress again"
            )
        return table

    def _cluster_alone(self, module: ModuleInfo, cluster: torch.Tensor) -> Bases:
        """The bases of one line of a module's cluster table, without reading the others."""
        v_start, u_start, rank, kind, scale_row = cluster.tolist()
        scaled = scale_row >= 0
        return Bases(
            u=self._matrix(f"{module.name}.U", module.d_out, u_start, rank),
            v=self._matrix(f"{module.name}.V", module.d_in, v_start, rank),
            scales=self._matrix(f"{module.name}.scales", module.d_out, max(0, scale_row), scaled),
            clusters=torch.tensor([[0, 0, rank, kind, 0 if scaled else -1]]),
        )

    def _matrix(
        self, key: str, width: int, first: int = 0, count: int | None = None
    ) -> torch.Tensor:
        """Rows `first … first + count - 1` (all) of a matrix, from the shards that hold them."""
        parts = []
        last = sys.maxsize if count is None else first + count
        begin = 0
        for file, keys in self._shards:
            if key not in keys:
                continue
            rows = file.get_slice(key)
            end = begin + rows.get_shape()[0]
            if max(first, begin) < min(last, end):
                at = slice(max(first, begin) - begin, min(last, end) - begin)
                part = rows[at]
                if f"{key}.steps" in keys:
                    steps = file.get_slice(f"{key}.steps")[at]
                    part = dequantise(part, steps, width).to(self.dtype)
                parts.append(part)
            begin = end
        return _joined(parts, torch.empty(0, width, dtype=self.dtype))

    def cores(self, first: int, last: int) -> torch.Tensor:
        """Core rows of adapters `first … last - 1`: `[last - first, core_row]`.

        Reads only the bytes of those rows.
        """
        width = self.manifest.core_row
        if self.manifest.quantised:
            return dequantise(*self.core_codes(first, last), width).to(self.dtype)
        return self._core_rows("cores", first, last, width, self.dtype)

    def core_codes(self, first: int, last: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The same of a quantised store as it has them: codes and steps as `quantise` gives them.

        Raises:
            ValueError: the store is not quantised.
        """
        kind, width = self.manifest.quantised, self.manifest.core_row
        if kind is None:
            raise ValueError(f"the store's cores are {self.manifest.dtype}, not quantised")
        codes = code_width(width, kind), (torch.int8 if kind == "int8" else torch.uint8)
        steps = scale_width(width), torch.bfloat16
        return (
            self._core_rows("cores", first, last, *codes),
            self._core_rows("cores.steps", first, last, *steps),
        )

    def _core_rows(
        self, key: str, first: int, last: int, width: int, dtype: torch.dtype
    ) -> torch.Tensor:
        parts = []
        for shard in self.manifest.core_shards:
            begin, end = max(first, shard.first), min(last, shard.first + shard.rows)
            if begin < end:
                with safe_open(self.folder / shard.file, framework="pt") as file:
                    at = slice(begin - shard.first, end - shard.first)
                    parts.append(file.get_slice(key)[at])
        count = 0 if width else max(0, last - first)
        return _joined(parts, torch.empty(count, width, dtype=dtype))

    def prefetch(self, index: int) -> None:
        """Have the operating system fetch an adapter's core row, without waiting for it.

        Does nothing where the system takes no such advice (macOS).
        """
        if not hasattr(os, "posix_fadvise"):
            return
        for shard, file, tensors in self._core_files:
            row = index - shard.first
            if 0 <= row < shard.rows:
                for offset, row_bytes in tensors:
                    os.posix_fadvise(
                        file.fileno(), offset + row * row_bytes, row_bytes, os.POSIX_FADV_WILLNEED
                    )

    @cached_property
    def _core_files(self) -> list[tuple[CoreShard, BinaryIO, list[tuple[int, int]]]]:
        """Of each shard: its open file, and (offset, bytes a row) of its tensors."""
        found = []
        for shard in self.manifest.core_shards:
            file = (self.folder / shard.file).open("rb")
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
            spans = [entry["data_offsets"] for key, entry in header.items() if key[0] != "_"]
            rows = [(8 + size + begin, (end - begin) // shard.rows) for begin, end in spans]
            found.append((shard, file, rows))
        return found

    def factors(self, name: str) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """What the store adds for adapter `name`: per module (B `[d_out, r]`, A `[r, d_in]`),
        float32, so that the delta is B·A.

        Raises:
            KeyError: no such adapter.
        """
        row = self.index(name)
        core_row = self.cores(row, row + 1)[0] if self.manifest.core_row else torch.empty(0)
        result = {}
        for column, module in enumerate(self.manifest.modules):
            clusters = [c for c in self.cluster[row, column].tolist() if c >= 0]
            if not clusters:
                continue
            table = self.clusters(module.name)
            core = core_row[module.core_offset : module.core_offset + module.core_size]
            parts = [self._cluster_alone(module, table[c]).factors(0, core) for c in clusters]
            result[module.name] = (
                torch.cat([b for b, _ in parts], dim=1),
                torch.cat([a for _, a in parts], dim=0),
            )
        return result

    def _check_contents(self) -> None:
        """Compare every tensor's shape and type with the manifest, and every index with what it
        points into."""
        manifest = self.manifest
        rows = {}
        widths = {}
        for module in manifest.modules:
            for key, count, width in (
                ("U", module.u_rows, module.d_out),
                ("V", module.v_rows, module.d_in),
                ("scales", module.scale_rows, module.d_out),
            ):
                rows[f"{module.name}.{key}"] = count
                widths[f"{module.name}.{key}"] = width
            rows[f"{module.name}.clusters"] = module.clusters
        found = dict.fromkeys(rows, 0)
        for shard in manifest.basis_shards:
            self._check_shard(self.folder / shard, widths, found)
        wrong = sorted(key for key in rows if rows[key] != found[key])
        if wrong:
            raise StoreError(
                f"{self._basis_files}: {wrong[0]}: found {found[wrong[0]]} rows, "
                f"expected {rows[wrong[0]]} ({len(wrong)} such tensors)"
            )
        kinds = {"cores": (_DTYPE_NAMES[manifest.dtype], manifest.core_row)}
        if manifest.quantised:
            kinds = {
                "cores": (
                    _CODE_NAMES[manifest.quantised],
                    code_width(manifest.core_row, manifest.quantised),
                ),
                "cores.steps": ("BF16", scale_width(manifest.core_row)),
            }
        for shard in manifest.core_shards:
            expected = {key: (dtype, (shard.rows, width)) for key, (dtype, width) in kinds.items()}
            _check_tensors(self.folder / shard.file, expected)
        for column, module in enumerate(manifest.modules):
            clusters = self.clusters(module.name).long()
            if not _clusters_fit(clusters, module):
                raise StoreError(
                    f"{self._basis_files}: {module.name}.clusters: found an index outside of the "
                    "module's bases or cores; the store is damaged, compress again"
                )
            if not _choice_fits(self.cluster[:, column].long(), clusters, module):
                raise StoreError(
                    f"{self.folder / ADAPTERS}: cluster: found for {module.name} one that the "
                    "module lacks, another adapter's own, or two cores of one adapter; "
                    "the store is damaged, compress again"
                )

    def _check_shard(self, file: Path, widths: dict[str, int], found: dict[str, int]) -> None:
        """Check one basis file, and add the rows of its tensors to `found`."""
        quantised = self.manifest.quantised
        tensors = _tensors_of(file)
        expected = {}
        for key, (_, shape) in tensors.items():
            name = key.removesuffix(".steps") if quantised else key
            if name not in found or (key != name and name not in widths):
                raise StoreError(f"{file}: found {key}, which the manifest does not know")
            count = shape[0] if shape else 0
            if key != name:
                continue  # expected with its codes
            found[key] += count
            if key not in widths:
                expected[key] = ("I32", (count, len(STORED_FIELDS)))
            elif quantised:
                codes = (count, code_width(widths[key], quantised))
                expected[key] = (_CODE_NAMES[quantised], codes)
                expected[f"{key}.steps"] = ("BF16", (count, scale_width(widths[key])))
            else:
                expected[key] = (_DTYPE_NAMES[self.manifest.dtype], (count, widths[key]))
        _compare(file, tensors, expected)


def _clusters_fit(clusters: torch.Tensor, module: ModuleInfo) -> bool:
    v_start, u_start, rank, kind, scale_row = clusters.unbind(1)
    core = torch.zeros_like(rank)
    core = torch.where(kind == CORE_FULL, rank * rank, core)
    core = torch.where(kind == CORE_DIAGONAL, rank, core)
    good = (v_start >= 0) & (u_start >= 0) & (rank > 0) & (kind >= CORE_NONE)
    good &= (v_start + rank <= module.v_rows) & (u_start + rank <= module.u_rows)
    good &= (kind <= CORE_DIAGONAL) & (core <= module.core_size)
    good &= (scale_row >= -1) & (scale_row < module.scale_rows)
    # A mean, the last of the shared ones, has a rank of its own.
    means = kind[max(module.shared - 1, 0) : module.shared] == CORE_NONE
    alike = module.shared - int(means.sum())
    shared_ranks = set(rank[:alike].tolist()) or {module.rank if module.shared else 0}
    return bool(good.all()) and shared_ranks == {module.rank}


def _choice_fits(chosen: torch.Tensor, clusters: torch.Tensor, module: ModuleInfo) -> bool:
    """Whether rows `[n, rows]` of the table name clusters that there are, an adapter at most one
    with a core, and those beyond the shared ones once."""
    if not ((chosen >= -1).all() and (chosen < module.clusters).all()):
        return False
    cored = torch.cat([clusters[:, CORE_KIND] != CORE_NONE, torch.tensor([False])])
    owned = torch.bincount(chosen[chosen >= module.shared])
    return bool((cored[chosen].sum(dim=1) <= 1).all() and (owned <= 1).all())


def _joined(parts: list[torch.Tensor], empty: torch.Tensor) -> torch.Tensor:
    if not parts:
        return empty
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _read_manifest(file: Path, expected_sha256: str) -> Manifest:
    _check_file(file, None, expected_sha256)
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
        found = raw.get("schema_version") if isinstance(raw, dict) else None
        if found != SCHEMA_VERSION:
            raise StoreError(
                f"{file}: found schema version {found!r}, this vllm-jd reads {SCHEMA_VERSION}; "
                "use the version that wrote it, or compress again"
            )
        manifest = Manifest.model_validate(raw)
    except (ValueError, ValidationError, RecursionError) as error:
        raise StoreError(f"{file}: not a manifest of this version: {error}") from None
    covered = 0
    for shard in manifest.core_shards:
        if shard.first != covered:
            raise StoreError(f"{file}: core shards leave a gap before adapter {shard.first}")
        covered += shard.rows
    for module in manifest.modules:
        if module.shared > module.clusters:
            raise StoreError(
                f"{file}: {module.name}: found {module.shared} shared clusters, "
                f"expected at most {module.clusters}, which is all that it has"
            )
    end = 0
    for module in sorted(manifest.modules, key=lambda module: module.core_offset):
        if module.core_offset < end:
            raise StoreError(f"{file}: the core of {module.name} overlaps another one's")
        end = module.core_offset + module.core_size
    if end > manifest.core_row:
        raise StoreError(f"{file}: found cores up to {end}, expected {manifest.core_row} a row")
    used = {ADAPTERS, *manifest.basis_shards, *(shard.file for shard in manifest.core_shards)}
    missing = sorted(used - manifest.files.keys())
    if manifest.core_row == 0 and covered == 0:
        covered = manifest.adapters  # nobody has a core
    if covered != manifest.adapters or missing:
        raise StoreError(
            f"{file}: found cores of {covered} adapters and no hash of {missing}, "
            f"expected {manifest.adapters} adapters and a hash of each file"
        )
    if any("/" in name or name.startswith(".") for name in manifest.files):
        raise StoreError(f"{file}: names a file outside of the generation's folder")
    return manifest


def _check_file(file: Path, size: int | None, sha256: str | None) -> None:
    try:
        found_size = file.stat().st_size
        if size is not None and found_size != size:
            raise StoreError(
                f"{file}: found {found_size:,} bytes, expected {size:,}; the store is damaged "
                "(restore the file, or compress again)"
            )
        if sha256 is not None and (found := sha256_file(file)) != sha256:
            raise StoreError(
                f"{file}: found sha256 {found}, expected {sha256}; the store is damaged "
                "(restore the file, or compress again)"
            )
    except FileNotFoundError:
        raise StoreError(f"{file}: missing; the store is damaged, compress again") from None
    except OSError as error:
        raise StoreError(f"{file}: cannot be read: {error}") from None


_Tensors = dict[str, tuple[str, tuple[int, ...]]]
"""What a safetensors file holds: name → (type, shape)."""


def _opened(file: Path) -> safe_open:
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise StoreError(f"{file}: not a readable safetensors file: {error}") from None


def _tensors_of(file: Path) -> _Tensors:
    with _opened(file) as tensors:
        parts = {key: tensors.get_slice(key) for key in tensors.keys()}  # noqa: SIM118
        return {k: (part.get_dtype(), tuple(part.get_shape())) for k, part in parts.items()}


def _check_tensors(file: Path, expected: _Tensors) -> None:
    _compare(file, _tensors_of(file), expected)


def _compare(file: Path, found: _Tensors, expected: _Tensors) -> None:
    if found == expected:
        return
    wrong = sorted(key for key in found.keys() | expected if found.get(key) != expected.get(key))
    raise StoreError(
        f"{file}: {wrong[0]}: found {_described(found.get(wrong[0]))}, "
        f"expected {_described(expected.get(wrong[0]))} ({len(wrong)} such tensors)"
    )


def _described(tensor: tuple[str, tuple[int, ...]] | None) -> str:
    return "nothing" if tensor is None else f"{tensor[0]} {list(tensor[1])}"


def _read_table(file: Path, manifest: Manifest) -> dict[str, torch.Tensor]:
    n, m = manifest.adapters, len(manifest.modules)
    per_module = ("rank", "norm", "error", "exact_error", "input_error")
    shapes = dict.fromkeys(per_module, (n, m)) | {"cluster": (n, m, manifest.rows)}
    shapes |= {"name_offsets": (n + 1,), "source_sha256": (n, 32), "source_bytes": (n,)}
    shapes["source_offsets"] = (n + 1,)
    try:
        with safe_open(file, framework="pt") as tensors:
            optional = _OPTIONAL.keys() & tensors.keys()
            table = {key: tensors.get_tensor(key) for key in _TABLE_DTYPES.keys() | optional}
    except SafetensorError as error:
        raise StoreError(f"{file}: not a readable adapter table: {error}") from None
    for key in table:
        dtype = (_TABLE_DTYPES | _OPTIONAL)[key]
        shape = tuple(table[key].shape)
        if table[key].dtype != dtype or shape != shapes.get(key, shape):
            raise StoreError(
                f"{file}: {key}: found {table[key].dtype} {list(shape)}, "
                f"expected {dtype} {list(shapes.get(key, shape))}"
            )
    return table


def _split_names(
    file: Path, names: torch.Tensor, offsets: torch.Tensor, what: str = "name"
) -> list[str]:
    text = names.numpy().tobytes()
    bounds = offsets.tolist()
    if bounds[0] != 0 or bounds[-1] != len(text) or any(a > b for a, b in pairwise(bounds)):
        raise StoreError(
            f"{file}: {what}_offsets: found offsets that leave the {what}s' {len(text)} bytes, "
            f"expected ascending ones from 0 to {len(text)}"
        )
    try:
        return [text[a:b].decode() for a, b in pairwise(bounds)]
    except UnicodeDecodeError as error:
        raise StoreError(f"{file}: a {what} is not UTF-8: {error}") from None


def _read_sources(file: Path, table: dict[str, torch.Tensor], n: int) -> list[str | None]:
    """Where each adapter was fetched from; None, an empty text in the file: not known."""
    pair = [table.get(key) for key in ("sources", "source_offsets")]
    if pair[0] is None and pair[1] is None:
        return [None] * n
    if pair[0] is None or pair[1] is None:
        raise StoreError(
            f"{file}: found one of sources and source_offsets, expected both or none; "
            "the store is damaged, compress again"
        )
    return [text or None for text in _split_names(file, *pair, "source")]
