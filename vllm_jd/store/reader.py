"""Open a store: find the live generation, check it, and read its arrays by memory map."""

import json
import re
from functools import cached_property
from itertools import pairwise
from pathlib import Path

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open

from vllm_jd.store.errors import StoreError
from vllm_jd.store.files import sha256_file
from vllm_jd.store.manifest import SCHEMA_VERSION, Manifest, ModuleInfo

CURRENT = "CURRENT"
GENERATIONS = "generations"
MANIFEST = "manifest.json"
ADAPTERS = "adapters.safetensors"
BASES = "bases.safetensors"

_CURRENT_FORMAT = re.compile(r"([1-9][0-9]{0,8}) ([0-9a-f]{64})\n")
_DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
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

    - `cluster` int32 `[n, m]`: index of the bases that the adapter uses, −1 where it has none
    - `rank` int32 `[n, m]`: rank of the source adapter's factors, 0 where it has none
    - `norm` float32 `[n, m]`: ‖BA‖_F of the source
    - `error` float32 `[n, m]`: ‖BA − UΣVᵀ‖²_F / ‖BA‖²_F, squared, of what is stored
    - `source_sha256` uint8 `[n, 32]`, `source_bytes` int64 `[n]`
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
        self.source_sha256 = table["source_sha256"]
        self.source_bytes = table["source_bytes"]
        self.names = _split_names(self.folder / ADAPTERS, table["names"], table["name_offsets"])
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
        for name, info in manifest.files.items():
            hashed = verify or name == ADAPTERS
            _check_file(folder / name, info.bytes, info.sha256 if hashed else None)
        store = cls(path, generation, manifest)
        if verify:
            store._check_contents()
        return store

    def __len__(self) -> int:
        return len(self.names)

    def __contains__(self, name: object) -> bool:
        return name in self._index

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
        """Type of the numbers in bases and cores."""
        return getattr(torch, self.manifest.dtype)

    @property
    def stored_bytes(self) -> int:
        """Size of the generation's files, in bytes."""
        return sum(info.bytes for info in self.manifest.files.values())

    @cached_property
    def _bases(self) -> safe_open:
        return safe_open(self.folder / BASES, framework="pt")

    def bases(self, module: str) -> tuple[torch.Tensor, torch.Tensor]:
        """(U `[clusters, rank, d_out]`, V `[clusters, rank, d_in]`) of a module; rows are basis
        vectors."""
        return self._bases.get_tensor(f"{module}.U"), self._bases.get_tensor(f"{module}.V")

    def cores(self, first: int, last: int) -> torch.Tensor:
        """Core rows of adapters `first … last - 1`: `[last - first, core_row]`.

        Reads only the bytes of those rows.
        """
        parts = []
        for shard in self.manifest.core_shards:
            begin, end = max(first, shard.first), min(last, shard.first + shard.rows)
            if begin < end:
                with safe_open(self.folder / shard.file, framework="pt") as file:
                    rows = file.get_slice("cores")[begin - shard.first : end - shard.first]
                parts.append(rows)
        if not parts:
            return torch.empty(0, self.manifest.core_row, dtype=self.dtype)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def factors(self, name: str) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """What the store adds for adapter `name`: per module (B `[d_out, r]`, A `[r, d_in]`),
        float32, with B = U·Σ and A = Vᵀ, so that the delta is B·A.

        Raises:
            KeyError: no such adapter.
        """
        row = self.index(name)
        core_row = self.cores(row, row + 1)[0].float()
        result = {}
        for column, module in enumerate(self.manifest.modules):
            cluster = int(self.cluster[row, column])
            if cluster < 0:
                continue
            u, v = self.bases(module.name)
            core = _core_of(core_row, module)
            result[module.name] = (u[cluster].float().T @ core, v[cluster].float())
        return result

    def _check_contents(self) -> None:
        """Compare every tensor's shape and type with the manifest."""
        expected = {}
        for module in self.manifest.modules:
            expected[f"{module.name}.U"] = (module.clusters, module.rank, module.d_out)
            expected[f"{module.name}.V"] = (module.clusters, module.rank, module.d_in)
        _check_tensors(self.folder / BASES, expected, self.dtype)
        for shard in self.manifest.core_shards:
            shape = (shard.rows, self.manifest.core_row)
            _check_tensors(self.folder / shard.file, {"cores": shape}, self.dtype)
        limits = torch.tensor([module.clusters for module in self.manifest.modules])
        if bool(((self.cluster < -1) | (self.cluster >= limits)).any()):
            raise StoreError(
                f"{self.folder / ADAPTERS}: found a cluster index outside of the bases; "
                "the store is damaged, compress again"
            )


def _core_of(core_row: torch.Tensor, module: ModuleInfo) -> torch.Tensor:
    size = module.rank * module.rank
    flat = core_row[module.core_offset : module.core_offset + size]
    return flat.view(module.rank, module.rank)


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
    end = 0
    for module in sorted(manifest.modules, key=lambda module: module.core_offset):
        if module.core_offset < end:
            raise StoreError(f"{file}: the core of {module.name} overlaps another one's")
        end = module.core_offset + module.rank * module.rank
    if end > manifest.core_row:
        raise StoreError(f"{file}: found cores up to {end}, expected {manifest.core_row} a row")
    used = {ADAPTERS, BASES, *(shard.file for shard in manifest.core_shards)}
    missing = sorted(used - manifest.files.keys())
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


def _check_tensors(file: Path, expected: dict[str, tuple[int, ...]], dtype: torch.dtype) -> None:
    try:
        with safe_open(file, framework="pt") as tensors:
            slices = {key: tensors.get_slice(key) for key in tensors.keys()}  # noqa: SIM118
            found = {key: tuple(part.get_shape()) for key, part in slices.items()}
            if found != expected:
                wrong = sorted(
                    key for key in found.keys() | expected if found.get(key) != expected.get(key)
                )
                raise StoreError(
                    f"{file}: {wrong[0]}: found shape {found.get(wrong[0])}, "
                    f"expected {expected.get(wrong[0])} ({len(wrong)} such tensors)"
                )
            for key, part in slices.items():
                if part.get_dtype() != _DTYPE_NAMES[dtype]:
                    raise StoreError(f"{file}: {key}: found {part.get_dtype()}, expected {dtype}")
    except SafetensorError as error:
        raise StoreError(f"{file}: not a readable safetensors file: {error}") from None


def _read_table(file: Path, manifest: Manifest) -> dict[str, torch.Tensor]:
    n, m = manifest.adapters, len(manifest.modules)
    shapes = dict.fromkeys(("cluster", "rank", "norm", "error"), (n, m))
    shapes |= {"name_offsets": (n + 1,), "source_sha256": (n, 32), "source_bytes": (n,)}
    try:
        with safe_open(file, framework="pt") as tensors:
            table = {key: tensors.get_tensor(key) for key in _TABLE_DTYPES}
    except SafetensorError as error:
        raise StoreError(f"{file}: not a readable adapter table: {error}") from None
    for key, dtype in _TABLE_DTYPES.items():
        shape = tuple(table[key].shape)
        if table[key].dtype != dtype or shape != shapes.get(key, shape):
            raise StoreError(
                f"{file}: {key}: found {table[key].dtype} {list(shape)}, "
                f"expected {dtype} {list(shapes.get(key, shape))}"
            )
    return table


def _split_names(file: Path, names: torch.Tensor, offsets: torch.Tensor) -> list[str]:
    text = names.numpy().tobytes()
    bounds = offsets.tolist()
    try:
        return [text[a:b].decode() for a, b in pairwise(bounds)]
    except UnicodeDecodeError as error:
        raise StoreError(f"{file}: a name is not UTF-8: {error}") from None
