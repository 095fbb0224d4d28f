"""Take a store's uploads into its next generation, and what was deleted out of it.

An upload is projected onto the bases that are there; where that loses too much it stays as it is,
beside the generation. Or, if that is asked for, the bases are fitted anew to all adapters, from
their sources, starting from those that are there. What a name stands for is never lost: until a
generation holds an upload, and after a return to one that does not, it is served as it came
(`vllm_jd.store.fleet`).
"""

import hashlib
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from uuid import uuid4

import torch

from vllm_jd.compressor.change.incremental import check_addable
from vllm_jd.compressor.change.projection import project
from vllm_jd.compressor.change.verify import check_errors
from vllm_jd.compressor.errors import AdapterError
from vllm_jd.compressor.read.adapters import (
    PeftCollection,
    base_names_of,
    read_for_store,
    sources_of,
)
from vllm_jd.compressor.run.compress import Progress, compress
from vllm_jd.compressor.settings import Settings
from vllm_jd.store import Store, StoreError, read_current, writing
from vllm_jd.store.fleet import Compressed, Fleet, Uploaded, read_fleet, source_of, upload_folder
from vllm_jd.store.manifest import CURRENT
from vllm_jd.store.part import ModulePart
from vllm_jd.store.rewrite import Additions, publish_changed

_REFIT = ".refit"  # a store of its own, from which the generation is taken; a stopped one goes on
_FEW = 3


@dataclass(frozen=True)
class TakenIn:
    """What became of a store's uploads.

    Attributes:
        store: the live generation, a new one or the one that was.
        compressed: uploads that it holds now that the one before did not → their error, the mean
            of the relative squared ones over their modules.
        kept: uploads that stay as they are → the error that they would have.
        refused: uploads that cannot go into this store → why.
        digests: of the uploads that were tried, by their names then.
        removed: adapters that it holds no more: deleted, or another version was uploaded.
        bases: digest of the bases; what was kept or refused need not be tried again on the same.
        refitted: whether these are new.
    """

    store: Store
    compressed: dict[str, float] = field(default_factory=dict)
    kept: dict[str, float] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    digests: Mapping[str, str] = field(default_factory=dict)
    removed: list[str] = field(default_factory=list)
    bases: str = ""
    refitted: bool = False


def guard_of(store: Store) -> float:
    """The mean relative squared error above which an upload is not compressed: the limit that the
    store was made with, or else the largest that one of its adapters has."""
    recorded = store.manifest.settings.get("max_adapter_error")
    if recorded is not None:
        return float(recorded)
    return float(_mean_errors(store.error, store.present).max())


def bases_digest(store: Store) -> str:
    """Hex sha256 that tells a store's shared bases from others: of the first and the last module's
    vectors."""
    digest = hashlib.sha256()
    for info in (store.manifest.modules[0], store.manifest.modules[-1]):
        for pool in ("U", "V"):
            shared = store.vectors(info.name, pool, 0, info.shared * info.rank)
            digest.update(shared.float().numpy().tobytes())
    return digest.hexdigest()


def waiting(fleet: Fleet, store: Store, tried: Iterable[str] = ()) -> dict[str, str]:
    """Uploads that a generation does not hold, but for those that were tried: name → digest."""
    tried = set(tried)
    found = ((name, fleet.meaning(name, store)) for name, e in fleet.entries.items() if e.digest)
    return {
        name: meaning.digest
        for name, meaning in found
        if isinstance(meaning, Uploaded) and meaning.digest not in tried
    }


def take_in(
    path: Path,
    *,
    tried: Iterable[str] = (),
    max_adapter_error: float | None = None,
    on_progress: Progress = lambda what, done, total: None,
) -> TakenIn:
    """Project a store's uploads onto its bases, and publish a generation that holds those which
    lose no more than the limit, and nothing that no name stands for any more.

    Adapters that stay do not change by a bit. Where there is nothing to do no generation is made.

    Args:
        path: the store.
        tried: digests of uploads that these bases are known not to suit.
        max_adapter_error: the limit; default: `guard_of`.
        on_progress: see `Progress`.

    Raises:
        StoreError: there is no store, it is damaged, another process writes it, or what was
            written does not give out what it should; nothing has changed.
        AdapterError: numbers that exceed its dtype.
    """
    read_current(path)  # writing() would make a folder of what is none
    with writing(path):
        drop_refit(path, unfinished=False)
        store, fleet = Store.open(path, verify=False), read_fleet(path)
        limit = guard_of(store) if max_adapter_error is None else max_adapter_error
        uploads = waiting(fleet, store, tried)
        found = TakenIn(store, digests=uploads, bases=bases_digest(store))
        fresh, refused = _readable(store, uploads, on_progress)
        found.refused.update(refused)
        parts: list[ModulePart] = []
        if fresh is not None:
            run = partial(project, store, on_progress=on_progress)
            parts = run(fresh)
            errors = _errors_of(parts)
            far = (errors > limit).tolist()
            by_name = dict(zip(fresh.names, errors.tolist(), strict=True))
            found.kept.update({n: by_name[n] for n, f in zip(fresh.names, far, strict=True) if f})
            near = [name for name in fresh.names if name not in found.kept]
            if found.kept:  # their private vectors would be left without an owner
                fresh = fresh.renamed((name, name) for name in near) if near else None
                parts = run(fresh) if near else []
            found.compressed.update({name: by_name[name] for name in near})
        dropped = _dropped(fleet, store)
        if bool(dropped.all()) and fresh is None:
            dropped[:] = False  # a store has at least one adapter; no name stands for these
        if fresh is None and not bool(dropped.any()):
            return found
        found.removed.extend(_names(store, dropped))
        on_progress("writing the store", 0, 1)
        added, accept = None, None
        if fresh is not None:
            added = Additions(
                fresh.names,
                fresh.source_sha256,
                fresh.source_bytes,
                sources_of(fresh),
                parts,
                base_names_of(fresh),
            )
            accept = partial(check_errors, collection=fresh, limit=limit)
        new = publish_changed(store, dropped, added, accept=accept)
        on_progress("writing the store", 1, 1)
        store.close()
        return replace(found, store=new)


def refit(
    path: Path,
    *,
    originals: Iterable[Path | str] = (),
    max_adapter_error: float | None = None,
    device: str = "cpu",
    on_progress: Progress = lambda what, done, total: None,
) -> TakenIn:
    """Fit a store's bases anew to all adapters that names stand for, its uploads among them,
    starting from the bases that it has.

    Only from sources, never from what was compressed before: nothing is lost twice. Uploads that
    would lose more than the limit stay as they are, other adapters of that kind are stored
    uncompressed. A stopped call goes on where it was, unless the store has changed meanwhile. Until
    the new generation is written the store can be changed by others, who then win.

    Args:
        path: the store.
        originals: folders of adapters that the store was made from, where they are no uploads.
        max_adapter_error: the limit; default: that which the store was made with, if any.
        device: where to compute, as torch names it.
        on_progress: see `Progress`.

    Raises:
        StoreError: there is no store, it is damaged, another process changed it meanwhile, or what
            was written does not give out what it should; nothing has changed.
        AdapterError: the sources of adapters are not there; numbers that exceed the dtype.
    """
    with Store.open(path, verify=False) as store:
        if not any(info.shared for info in store.manifest.modules):
            raise AdapterError(
                [f"the store's method, {store.manifest.method}, has no bases that adapters share"]
            )
        fleet = read_fleet(path)
        tried = waiting(fleet, store)
        with _changes_told(store, tried):
            uploads, refused = _readable(store, tried, on_progress)
        wanted = {n: d for n, d in _digests(fleet, store).items() if n not in refused}
        manifest = store.manifest
        settings = Settings.from_recorded(manifest.method, manifest.settings)
        if max_adapter_error is not None:
            settings = replace(settings, max_adapter_error=max_adapter_error)
        names = uploads.names if uploads else []
        with _changes_told(store, wanted):
            collection = _sources(store, wanted, originals, on_progress)
            scratch = compress(
                collection,
                path / _REFIT,
                settings,
                base_model=manifest.base_model,
                warm=store,
                device=device,
                on_progress=on_progress,
            )
            bases = bases_digest(scratch)
            far = sorted({*_names(scratch, _uncompressed(scratch))} & {*names})
            kept = _would_lose(scratch, collection, far)
        with writing(path):
            if read_current(path)[0] != store.generation:
                raise StoreError(
                    f"{path}: another process made a new generation of it meanwhile; run it again"
                )
            # What was deleted or replaced meanwhile may be in the overlay no more.
            now = _digests(read_fleet(path), store)
            stays = {n: n for n, d in wanted.items() if n not in kept and now.get(n) == d}
            if not stays:
                raise StoreError(f"{path}: no adapter is left that suits new bases")
            dropped = torch.tensor([name not in stays for name in scratch.names])
            sources = collection.renamed(stays.items())
            limit = settings.max_adapter_error
            accept = partial(check_errors, collection=sources, limit=limit)
            new = publish_changed(scratch, dropped, None, into=path, accept=accept)
            scratch.close()
            _discard(path / _REFIT)
        errors = _mean_errors(new.error, new.present)
        fresh = [name for name in names if name in new]
        return TakenIn(
            new,
            compressed={name: float(errors[new.index(name)]) for name in fresh},
            kept=kept,
            refused=refused,
            digests=tried,
            removed=[name for name in store.names if name not in new],
            bases=bases,
            refitted=True,
        )


def drop_refit(path: Path, *, unfinished: bool = True) -> None:
    """Delete what a `refit` that was killed has left. One that runs is left alone.

    Args:
        path: the store.
        unfinished: also if the same call would go on there.

    Raises:
        StoreError: it cannot be deleted.
    """
    scratch = path / _REFIT
    for half in path.glob(f"{_REFIT}-*"):
        shutil.rmtree(half, ignore_errors=True)
    if not scratch.is_dir() or not (unfinished or (scratch / CURRENT).exists()):
        return
    with suppress(StoreError), writing(scratch):
        _discard(scratch)


def _discard(scratch: Path) -> None:
    """Delete it in one step: half of it would be taken for a folder of something else."""
    half = scratch.with_name(f"{_REFIT}-{uuid4().hex}")
    scratch.rename(half)
    shutil.rmtree(half, ignore_errors=True)  # what is left of it, `drop_refit` deletes


def _readable(
    store: Store, uploads: Mapping[str, str], on_progress: Progress
) -> tuple[PeftCollection | None, dict[str, str]]:
    """Uploads (name → digest) that can be read and suit the store, by their names; and what is
    wrong with the others."""
    refused: dict[str, str] = {}
    good: dict[str, str] = {}
    wrong: dict[str, str | None] = {}  # by digest: names may share one
    for done, (name, digest) in enumerate(uploads.items()):
        on_progress("reading uploads", done, len(uploads))
        if digest not in wrong:
            wrong[digest] = _fault(store, digest)
        if wrong[digest] is None:
            good[name] = digest
        else:
            refused[name] = wrong[digest] or ""
    on_progress("reading uploads", len(uploads), len(uploads))
    if not good:
        return None, refused
    folders = [upload_folder(store.path, digest) for digest in dict.fromkeys(good.values())]
    collection = read_for_store(folders, store.manifest)
    return collection.renamed((digest, name) for name, digest in good.items()), refused


def _fault(store: Store, digest: str) -> str | None:
    """What is wrong with one upload by itself."""
    folder = upload_folder(store.path, digest)
    try:
        alone = read_for_store([folder], store.manifest)
        check_addable(store, alone)
    except AdapterError as error:
        return "; ".join(error.faults)
    if alone.source_sha256[0] != digest:
        return f"{folder}: found files of sha256 {alone.source_sha256[0]}: damaged since"
    return None


def _sources(
    store: Store,
    wanted: Mapping[str, str],
    originals: Iterable[Path | str],
    on_progress: Progress,
) -> PeftCollection:
    """All adapters (name → digest) as they were, from uploads and other folders.

    Raises:
        AdapterError: some are in neither.
    """
    folders = {digest: upload_folder(store.path, digest) for digest in set(wanted.values())}
    here = [folder for folder in folders.values() if folder.is_dir()]
    originals = list(originals)
    on_progress("reading adapters", 0, 1)
    collection = None
    if here or originals:
        collection = read_for_store([*here, *originals], store.manifest)
    on_progress("reading adapters", 1, 1)
    known: dict[str, str] = {}
    if collection is not None:
        known = dict(zip(collection.source_sha256, collection.names, strict=True))
    missing = [name for name, digest in wanted.items() if digest not in known]
    if missing or collection is None:
        more = ", …" if len(missing) > _FEW else ""
        raise AdapterError(
            [
                f"the sources of {len(missing):,} of {len(wanted):,} adapters are not there "
                f"({', '.join(missing[:_FEW])}{more}); bases are fitted to sources only: name the "
                "folders that the store was made from (--originals DIR)"
            ]
        )
    return collection.renamed((known[digest], name) for name, digest in wanted.items())


@contextmanager
def _changes_told(store: Store, wanted: Mapping[str, str]) -> Iterator[None]:
    """Uploads may be deleted, replaced and given again while they (name → digest) are read here:
    that is no fault of theirs.

    Raises:
        StoreError: another process did so meanwhile.
    """
    folders = sorted(upload_folder(store.path, digest) for digest in set(wanted.values()))
    before = [_which(folder) for folder in folders]
    try:
        yield
    except AdapterError as error:
        stand = _digests(read_fleet(store.path), store)
        if (
            all(stand.get(name) == digest for name, digest in wanted.items())
            and before == [_which(folder) for folder in folders]
            and read_current(store.path)[0] == store.generation
        ):
            raise
        raise StoreError(
            f"{store.path}: another process changed its uploads meanwhile; run it again"
        ) from error


def _which(folder: Path) -> tuple[int, int] | None:
    """What tells a folder from another that comes in its place; None: there is none."""
    try:
        found = folder.stat()
    except OSError:
        return None
    return found.st_ino, found.st_ctime_ns


def _digests(fleet: Fleet, store: Store) -> dict[str, str]:
    """What each name stands for, by its sources' digest."""
    return {
        name: source_of(store, meaning.index) if isinstance(meaning, Compressed) else meaning.digest
        for name, meaning in fleet.meanings(store)
    }


def _would_lose(
    store: Store,
    collection: PeftCollection,
    names: list[str],
) -> dict[str, float]:
    """The errors of adapters if they were projected onto a store's bases."""
    if not names:
        return {}
    some = collection.renamed((name, name) for name in names)
    errors = _errors_of(project(store, some)).tolist()
    return {name: error for name, error in zip(names, errors, strict=True) if error}


def _uncompressed(store: Store) -> torch.Tensor:
    """Which adapters have nothing but rows of their own: bool `[n]`."""
    shared = torch.tensor([info.shared for info in store.manifest.modules])
    return ~((store.chosen >= 0) & (store.chosen < shared[None, :, None])).any(dim=(1, 2))


def _dropped(fleet: Fleet, store: Store) -> torch.Tensor:
    """Which adapters no name stands for: bool `[n]`."""
    stand = [isinstance(fleet.meaning(name, store), Compressed) for name in store.names]
    return ~torch.tensor(stand)


def _names(store: Store, which: torch.Tensor) -> list[str]:
    return [name for name, yes in zip(store.names, which.tolist(), strict=True) if yes]


def _errors_of(parts: list[ModulePart]) -> torch.Tensor:
    error = torch.stack([part.error for part in parts], dim=1)
    return _mean_errors(error, torch.stack([part.rank > 0 for part in parts], dim=1))


def _mean_errors(error: torch.Tensor, present: torch.Tensor) -> torch.Tensor:
    """Of each adapter over its modules: float64 `[n]`."""
    return (error.double() * present).sum(1) / present.sum(1).clamp_min(1)
