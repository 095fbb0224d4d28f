"""Write a new generation beside the live one and publish it with one atomic rename."""

import contextlib
import shutil
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import filelock
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from vllm_jd import __version__
from vllm_jd.store.checks import check_contents
from vllm_jd.store.errors import StoreError
from vllm_jd.store.files import fsync, replace_text, sha256_file
from vllm_jd.store.manifest import (
    ADAPTERS,
    CURRENT,
    GENERATIONS,
    MANIFEST,
    BaseModelInfo,
    CoreShard,
    FileInfo,
    Manifest,
    ModuleInfo,
)
from vllm_jd.store.reader import Store, read_current
from vllm_jd.store.table import packed

_LOCK = ".lock"

Accept = Callable[[Store], None]
"""Looks at a generation that is about to become the live one; what it raises prevents that."""


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Hold the store's writer lock.

    Raises:
        StoreError: another process is writing this store, the folder holds something else, or
            (from inside of the `with`) a file cannot be written.
    """
    if path.exists() and not path.is_dir():
        raise StoreError(f"{path}: found a file, expected a folder for the store")
    # A copy may have lost the hidden lock file.
    is_store = (path / _LOCK).exists() or (path / CURRENT).exists()
    if path.is_dir() and not is_store and any(path.iterdir()):
        raise StoreError(
            f"{path}: the folder is not empty and not a store; choose a new or an empty one"
        )
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(path / _LOCK)
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise StoreError(
            f"{path}: another process is writing this store; wait for it to end"
        ) from None
    except OSError as error:
        raise StoreError(f"{path}: cannot be written: {error}") from None
    try:
        yield
    except BaseException as error:
        # Half a generation on a full disk would be in the way of whatever comes next.
        with contextlib.suppress(OSError, StoreError):
            sweep(path)
        if isinstance(error, OSError | SafetensorError):
            raise StoreError(f"{path}: cannot be written: {error}") from error
        raise
    finally:
        lock.release()


def sweep(path: Path) -> int:
    """Delete what a writer that failed or was killed has left: hidden folders, and a generation
    that CURRENT never came to name. Call it inside of `writing(path)`.

    Returns:
        The number of the live generation, 0 if there is none.

    Raises:
        StoreError: CURRENT is damaged.
        OSError: something cannot be deleted.
    """
    live = read_current(path)[0] if (path / CURRENT).exists() else 0
    generations = path / GENERATIONS
    for left in generations.iterdir() if generations.is_dir() else ():
        if left.name.startswith(".") or (left.name.isdigit() and int(left.name) > live):
            shutil.rmtree(left)
    return live


class GenerationWriter:
    """Builds generation `number` in a hidden folder; `publish` makes it the live one.

    Used inside `writing(path)`. Nothing of the store changes before `publish`'s last rename.
    """

    def __init__(self, path: Path):
        self.path = path
        generations = path / GENERATIONS
        generations.mkdir(exist_ok=True)
        self.number = sweep(path) + 1
        self.folder = generations / f".{self.number}.partial"
        self.folder.mkdir()
        self._linked: dict[str, FileInfo] = {}

    def write_tensors(self, file: str, tensors: dict[str, torch.Tensor]) -> None:
        """Write one safetensors file of the generation."""
        save_file({key: value.contiguous() for key, value in tensors.items()}, self.folder / file)

    def link_file(self, source: Store, file: str) -> None:
        """Take over an unchanged file of another generation of this store.

        The two generations then share it on disk, and it is not hashed again. Where the file
        system has no hard links it is copied.

        Raises:
            StoreError: a copy is not what the manifest says: the file is damaged.
        """
        known = source.manifest.files[file]
        target = self.folder / file
        try:
            target.hardlink_to(source.folder / file)
        except OSError:
            shutil.copyfile(source.folder / file, target)
            if (found := sha256_file(target)) != known.sha256:
                raise StoreError(
                    f"{source.folder / file}: found sha256 {found}, expected {known.sha256}; "
                    "the store is damaged (restore the file, or compress again)"
                ) from None
        else:
            self._linked[file] = known

    def write_table(
        self,
        names: list[str],
        *,
        chosen: torch.Tensor,
        rank: torch.Tensor,
        norm: torch.Tensor,
        error: torch.Tensor,
        exact_error: torch.Tensor | None = None,
        source_sha256: list[str],
        source_bytes: list[int],
        sources: list[str | None] | None = None,
    ) -> None:
        """Write the adapter table; shapes and meanings as in `Store`."""
        texts, offsets = packed(names)
        origins = {}
        if any(sources or []):
            origins = dict(zip(("sources", "source_offsets"), packed(sources or []), strict=True))
        digests = bytearray(b"".join(bytes.fromhex(digest) for digest in source_sha256))
        self.write_tensors(
            ADAPTERS,
            {
                "names": texts,
                "name_offsets": offsets,
                "cluster": chosen.to(torch.int32),
                "rank": rank.to(torch.int32),
                "norm": norm.to(torch.float32),
                "error": error.to(torch.float32),
                "source_sha256": torch.frombuffer(digests, dtype=torch.uint8).view(-1, 32),
                "source_bytes": torch.tensor(source_bytes, dtype=torch.int64),
            }
            | origins
            | ({} if exact_error is None else {"exact_error": exact_error.to(torch.float32)}),
        )

    def publish(
        self,
        *,
        base_model: BaseModelInfo,
        dtype: str,
        quantised: str | None = None,
        method: str,
        settings: dict[str, Any],
        adapters: int,
        modules: list[ModuleInfo],
        rows: int,
        core_row: int,
        core_shards: list[CoreShard],
        basis_shards: list[str],
        accept: Accept | None = None,
    ) -> Store:
        """Hash, read back and check every file, then move CURRENT to this generation.

        The bytes of linked files are not read again.

        Returns the new generation, opened. Raises StoreError if what was written does not read
        back, or what `accept` raises; the old generation then stays the live one.
        """
        manifest = Manifest(
            created_by=f"vllm-jd {__version__}",
            created_at=datetime.now(UTC).isoformat(timespec="seconds"),
            base_model=base_model,
            dtype=dtype,
            quantised=quantised,
            method=method,
            settings=settings,
            adapters=adapters,
            modules=modules,
            rows=rows,
            core_row=core_row,
            core_shards=core_shards,
            basis_shards=basis_shards,
            files=self._files(),
        )
        return self._publish(manifest, accept)

    def publish_again(self, old: Store) -> Store:
        """Make an older generation's content the live one, under a new number; as `publish`."""
        for file in old.manifest.files:
            self.link_file(old, file)
        created = datetime.now(UTC).isoformat(timespec="seconds")
        manifest = old.manifest.model_copy(update={"created_at": created, "files": self._files()})
        return self._publish(manifest, None)

    def _files(self) -> dict[str, FileInfo]:
        """What lies in the folder, flushed to disk."""
        files = dict(self._linked)
        for file in sorted(self.folder.iterdir()):
            if file.name not in files:
                fsync(file)
                files[file.name] = FileInfo(bytes=file.stat().st_size, sha256=sha256_file(file))
        return dict(sorted(files.items()))

    def _publish(self, manifest: Manifest, accept: Accept | None) -> Store:
        replace_text(
            self.folder / MANIFEST, manifest.model_dump_json(indent=1, by_alias=True) + "\n"
        )
        digest = sha256_file(self.folder / MANIFEST)
        published = self.path / GENERATIONS / str(self.number)
        self.folder.rename(published)
        fsync(published)
        fsync(published.parent)
        store = self._read_back(digest)
        if accept is not None:
            try:
                accept(store)
            except BaseException:
                store.close()
                shutil.rmtree(published, ignore_errors=True)
                raise
        replace_text(self.path / CURRENT, f"{self.number} {digest}\n")
        return store

    def _read_back(self, digest: str) -> Store:
        if not self._linked:
            return Store.open_generation(self.path, self.number, digest, verify=True)
        store = Store.open_generation(self.path, self.number, digest, verify=False)
        for name, info in store.manifest.files.items():
            if name in self._linked:
                continue
            if (found := sha256_file(store.folder / name)) != info.sha256:
                raise StoreError(
                    f"{store.folder / name}: found sha256 {found}, expected {info.sha256}; "
                    "it was not written as it should be"
                )
        check_contents(store)
        return store
