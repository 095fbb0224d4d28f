"""What a generation must be before anything is read from it: its files, manifest, table, tensors,
and every index that points into them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch
from pydantic import ValidationError

from vllm_jd.row import CORE_DIAGONAL, CORE_FULL, CORE_KIND, CORE_NONE
from vllm_jd.store.errors import StoreError
from vllm_jd.store.files import sha256_file
from vllm_jd.store.manifest import ADAPTERS, SCHEMA_VERSION, Manifest, ModuleInfo
from vllm_jd.store.quantise import code_width, scale_width
from vllm_jd.store.tensors import TensorFile, Tensors

_DTYPE_NAMES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
_CODE_NAMES = {"int8": "I8", "int4": "U8"}


class Contents(Protocol):
    """What is checked of an opened generation, a `Store`."""

    folder: Path
    manifest: Manifest
    chosen: torch.Tensor
    basis_files: Sequence[TensorFile]
    core_files: Sequence[TensorFile]

    @property
    def basis_place(self) -> Path:
        """The basis file, or the folder of several."""

    def rows(self, module: str) -> torch.Tensor:
        """The rows of a module."""


def check_contents(store: Contents) -> None:
    """Compare every tensor's shape and type with the manifest, and every index with what it points
    into.

    Raises:
        StoreError: something does not fit.
    """
    manifest = store.manifest
    counts = {}
    widths = {}
    entries = {}  # of the tables of rows: the shape of one
    for module in manifest.modules:
        for key, count, width in (
            ("U", module.u_vectors, module.d_out),
            ("V", module.v_vectors, module.d_in),
            ("scales", module.scale_rows, module.d_out),
        ):
            counts[f"{module.name}.{key}"] = count
            widths[f"{module.name}.{key}"] = width
        counts[f"{module.name}.clusters"] = module.rows
        entries[f"{module.name}.clusters"] = module.row_shape
    found = dict.fromkeys(counts, 0)
    for file in store.basis_files:
        _check_basis_file(manifest, file, widths, entries, found)
    wrong = sorted(key for key in counts if counts[key] != found[key])
    if wrong:
        raise StoreError(
            f"{store.basis_place}: {wrong[0]}: found {found[wrong[0]]} entries, "
            f"expected {counts[wrong[0]]} ({len(wrong)} such tensors)"
        )
    kinds = {"cores": (_DTYPE_NAMES[manifest.dtype], manifest.core_row)}
    if manifest.quantised:
        codes = code_width(manifest.core_row, manifest.quantised)
        kinds = {
            "cores": (_CODE_NAMES[manifest.quantised], codes),
            "cores.steps": ("BF16", scale_width(manifest.core_row)),
        }
    for shard, file in zip(manifest.core_shards, store.core_files, strict=True):
        expected = {key: (dtype, (shard.adapters, width)) for key, (dtype, width) in kinds.items()}
        _compare(file, expected)
    for column, module in enumerate(manifest.modules):
        rows = store.rows(module.name).long()
        if not _rows_fit(rows, module):
            raise StoreError(
                f"{store.basis_place}: {module.name}.clusters: found an index outside of the "
                "module's bases or cores; the store is damaged, compress again"
            )
        if not _choice_fits(store.chosen[:, column].long(), rows, module):
            raise StoreError(
                f"{store.folder / ADAPTERS}: cluster: found for {module.name} a row that the "
                "module lacks, another adapter's own, or two cores of one adapter; "
                "the store is damaged, compress again"
            )


def _check_basis_file(
    manifest: Manifest,
    file: TensorFile,
    widths: dict[str, int],
    entries: dict[str, tuple[int, ...]],
    found: dict[str, int],
) -> None:
    """Check one basis file, and add the lengths of its tensors to `found`."""
    quantised = manifest.quantised
    expected: Tensors = {}
    for key, (_, shape) in file.tensors.items():
        name = key.removesuffix(".steps") if quantised else key
        if name not in found or (key != name and name not in widths):
            raise StoreError(f"{file.path}: found {key}, which the manifest does not know")
        count = shape[0] if shape else 0
        if key != name:
            continue  # expected with its codes
        found[key] += count
        if key not in widths:
            expected[key] = ("I32", (count, *entries[key]))
        elif quantised:
            codes = (count, code_width(widths[key], quantised))
            expected[key] = (_CODE_NAMES[quantised], codes)
            expected[f"{key}.steps"] = ("BF16", (count, scale_width(widths[key])))
        else:
            expected[key] = (_DTYPE_NAMES[manifest.dtype], (count, widths[key]))
    _compare(file, expected)


def _compare(file: TensorFile, expected: Tensors) -> None:
    found = file.tensors
    if found == expected:
        return
    wrong = sorted(key for key in found.keys() | expected if found.get(key) != expected.get(key))
    raise StoreError(
        f"{file.path}: {wrong[0]}: found {_described(found.get(wrong[0]))}, "
        f"expected {_described(expected.get(wrong[0]))} ({len(wrong)} such tensors)"
    )


def _described(tensor: tuple[str, tuple[int, ...]] | None) -> str:
    return "nothing" if tensor is None else f"{tensor[0]} {list(tensor[1])}"


def _rows_fit(rows: torch.Tensor, module: ModuleInfo) -> bool:
    """Whether rows int64, `[rows, 5]` or `[rows, experts, 5]`, stay within the module's vectors,
    scales and cores."""
    shared = module.shared * module.each
    v_start, u_start, rank, kind, scale_row = rows.flatten(0, -2).unbind(1)
    core = torch.zeros_like(rank)
    core = torch.where(kind == CORE_FULL, rank * rank, core)
    core = torch.where(kind == CORE_DIAGONAL, rank, core)
    # An adapter may lack some of the experts.
    least = torch.where(torch.arange(len(rank)) < shared, 1, int(not module.experts))
    good = (v_start >= 0) & (u_start >= 0) & (rank >= least) & (kind >= CORE_NONE)
    good &= (v_start + rank <= module.v_vectors) & (u_start + rank <= module.u_vectors)
    good &= (kind <= CORE_DIAGONAL) & (core <= module.expert_core)
    good &= (scale_row >= -1) & (scale_row < module.scale_rows)
    # A mean, the last of the shared ones, has a rank of its own.
    means = kind[max(shared - module.each, 0) : shared] == CORE_NONE
    alike = shared - int(means.sum())
    shared_ranks = set(rank[:alike].tolist()) or {module.rank if module.shared else 0}
    return bool(good.all()) and shared_ranks == {module.rank}


def _choice_fits(chosen: torch.Tensor, rows: torch.Tensor, module: ModuleInfo) -> bool:
    """Whether the adapters' choice `[n, K]` names rows that there are, an adapter at most one with
    a core, and those beyond the shared ones once."""
    if not ((chosen >= -1).all() and (chosen < module.rows).all()):
        return False
    kinds = rows[..., CORE_KIND].view(len(rows), module.each)
    cored = torch.cat([(kinds != CORE_NONE).any(dim=1), torch.tensor([False])])
    owned = torch.bincount(chosen[chosen >= module.shared])
    return bool((cored[chosen].sum(dim=1) <= 1).all() and (owned <= 1).all())


def read_manifest(file: Path, expected_sha256: str) -> Manifest:
    """The manifest in a file.

    Raises:
        StoreError: it has another hash, is of another version, or contradicts itself.
    """
    check_file(file, None, expected_sha256)
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
        covered += shard.adapters
    for module in manifest.modules:
        if module.shared > module.rows:
            raise StoreError(
                f"{file}: {module.name}: found {module.shared} shared rows, "
                f"expected at most {module.rows}, which is all that it has"
            )
        if module.core_size % module.each:
            raise StoreError(
                f"{file}: {module.name}: found {module.core_size} numbers of cores, expected as "
                f"many for each of its {module.experts} experts"
            )
    end = 0
    for module in sorted(manifest.modules, key=lambda module: module.core_offset):
        if module.core_offset < end:
            raise StoreError(f"{file}: the core of {module.name} overlaps another one's")
        end = module.core_offset + module.core_size
    if end > manifest.core_row:
        raise StoreError(
            f"{file}: found cores up to {end}, expected {manifest.core_row} an adapter"
        )
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


def check_file(file: Path, size: int | None, sha256: str | None) -> None:
    """Raise StoreError where a file is missing, or of another size or hash (None: any)."""
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
