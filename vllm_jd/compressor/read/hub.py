"""Adapters of the Hugging Face Hub: repositories and collections, as local folders.

Files go to huggingface_hub's own cache: what is complete there is not fetched again, and HF_TOKEN,
HF_ENDPOINT, HF_HUB_CACHE and HF_HUB_OFFLINE mean what they mean to huggingface_hub. Two files of
an adapter are fetched, its config and its safetensors weights (PEFT's or mlx-lm's); nothing else of
a repository.
"""

import fnmatch
import glob
import json
import logging
import os
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from vllm_jd.compressor.errors import AdapterError, few
from vllm_jd.compressor.read.folder import CONVERTED, LEFT_BY_TRAINERS, WEIGHTS_FILES
from vllm_jd.compressor.read.peft_config import CONFIG_FILE, METHODS

T = TypeVar("T")

_SEGMENT = r"\w[\w.-]{0,95}"
_REPOSITORY = re.compile(rf"{_SEGMENT}/{_SEGMENT}(@\S+)?", re.ASCII)
_COLLECTION = re.compile(
    rf"(?:hf://)?(?:collections/)?({_SEGMENT}/[\w.-]+-[0-9a-f]{{24}})", re.ASCII
)
_COLLECTION_URL = re.compile(r"(https?://\S+?)/collections/([^/?#\s]+/[^/?#\s]+)/?(?:[?#].*)?")

_AT_ONCE = 8  # repositories; the Hub limits requests per five minutes, not connections
_RATE_LIMIT_WAITS = 5
_RATE_LIMIT_WINDOW = 300  # seconds


@dataclass(frozen=True)
class Source:
    """One adapter that was fetched from the Hub."""

    folder: Path
    """Holds the adapter's config and weights. Its name is no adapter's name."""
    repository: str
    revision: str
    """The commit hash, whatever the user asked for."""
    name: str
    """The adapter's name in the store. It may have slashes: data, never a path."""

    @property
    def address(self) -> str:
        """`org/name@commit`, with `/folder` if it lies in one: a source that means this adapter."""
        parts = self.folder.parts
        # Below the snapshot, which has the commit's name.
        below = parts[parts.index(self.revision) + 1 :] if self.revision in parts else ()
        return "/".join((f"{self.repository}@{self.revision}", *below))


@dataclass(frozen=True)
class _Ask:
    """One repository to look into."""

    text: str  # as the user would write it
    repository: str
    revision: str | None
    folder: str = ""  # in the repository; only adapters in it or below
    collection: str | None = None  # the collection it is an item of, if the user did not name it

    @property
    def asked(self) -> str:
        """What faults call it."""
        return f"{self.text} of {self.collection}" if self.collection else self.text


@dataclass(frozen=True)
class _Found:
    """An adapter that was fetched and has no name yet."""

    snapshot: Path
    repository: str
    folder: Path  # relative to the snapshot

    def name(self, length: int) -> str:
        """Its name: 0 the shortest, 2 the one that no other adapter can have."""
        name = self.repository
        if length == 0:
            name = name.split("/")[-1]
        elif length == 2:
            name += f"@{self.snapshot.name[:8]}"
        parts = self.folder.parts
        return "/".join((name, *(parts[:-1] if parts[-1:] == (CONVERTED,) else parts)))


class _NoAdapterError(Exception):
    """A repository that holds no LoRA adapter."""


class _UnreachableError(Exception):
    """The Hub did not answer: the same fault for every repository."""


def is_hub_source(text: str) -> bool:
    """Whether `text` means something on the Hub rather than a local path.

    `hf://…` and URLs always do. A bare `org/name`, `org/name@revision` or collection does where
    no folder `org` is here: `adapters/typo` beside a folder `adapters` is a mistyped path, for
    which no network is asked.
    """
    if text.lower().startswith(("hf://", "http://", "https://")):
        return True
    return has_hub_form(text) and not Path(text.split("/")[0]).is_dir()


def has_hub_form(text: str) -> bool:
    """Whether a bare `text` could name a repository or collection."""
    return bool(_REPOSITORY.fullmatch(text))


def fetch(
    sources: list[str],
    *,
    cache_dir: Path | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    on_skip: Callable[[str], None] = lambda what: None,
) -> list[Source]:
    """Fetch the adapters that `sources` name, several repositories at a time.

    A source is one of

    - a repository, `[hf://]org/name[@revision][/folder]` (a slash in a revision is written %2F);
    - a collection, `org/title-0123456789abcdef01234567`;
    - the URL of either on huggingface.co or on HF_ENDPOINT.

    All adapters of a repository are taken, in sub-folders too, except for what a trainer left
    below another adapter (`LEFT_BY_TRAINERS`, such as `checkpoint-<step>`). An adapter is called
    like its repository's last part, followed by its sub-folder: `name`, `name/folder`. Adapters
    for which that is the same are called `org/name`, or `org/name@commit` where a repository was
    given at two commits.

    A commit that is complete in the cache needs no network. A branch or tag whose commit cannot be
    asked for means the commit that it had last time, as with huggingface_hub.

    Args:
        sources: texts for which `is_hub_source` is true.
        cache_dir: huggingface_hub's cache; default: the user's.
        on_progress: called with (repositories done, repositories); a collection's other items,
            such as datasets, count as done.
        on_skip: called with a sentence for each item of a collection that is no LoRA adapter.

    Returns:
        One entry an adapter, in the order of `sources` and of a collection's items; an adapter
        that was named twice is in it once.

    Raises:
        AdapterError: listing all faults of all sources. What was fetched stays in the cache.
    """
    hub = _Hub(_import_hub(sources), cache_dir)
    faults: list[str] = []
    asks: list[_Ask] = []
    collections: dict[str, list[tuple[str, str]]] = {}  # as asked → items: id, type
    for text in dict.fromkeys(sources):
        try:
            ask = hub.parse(text)
            if isinstance(ask, _Ask):
                asks.append(ask)
            else:
                collections[text] = hub.items(text, ask)
                asks += [
                    _Ask(item, item, None, collection=text)
                    for item, kind in collections[text]
                    if kind == "model"
                ]
        except AdapterError as error:
            faults += error.faults
        except _UnreachableError as error:
            faults.append(f"{text}: {error}")
    asks = _once(asks)
    foreign = [
        f"{item} of {text}: a {kind}, not a LoRA adapter"
        for text, items in collections.items()
        for item, kind in items
        if kind != "model"
    ]
    for what in foreign:
        on_skip(what)

    found: dict[_Ask, list[_Found]] = {}
    failed: dict[_Ask, list[str]] = {}
    unreachable: dict[str, set[_Ask]] = {}
    with hub.quiet(), ThreadPoolExecutor(_AT_ONCE) as pool:
        try:
            futures = {pool.submit(hub.fetch, ask): ask for ask in asks}
            for done, future in enumerate(as_completed(futures), start=len(foreign) + 1):
                ask = futures[future]
                try:
                    found[ask] = future.result()
                except _NoAdapterError as error:
                    if ask.collection:
                        on_skip(f"{ask.asked}: {error}")
                    else:
                        failed[ask] = [f"{ask.asked}: {error}"]
                except _UnreachableError as error:
                    unreachable.setdefault(str(error), set()).add(ask)
                except AdapterError as error:
                    failed[ask] = error.faults
                on_progress(done, len(foreign) + len(asks))
        except BaseException:
            hub.stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise

    faults += [fault for ask in asks for fault in failed.get(ask, [])]
    for reason, same in unreachable.items():
        texts = [ask.text for ask in asks if ask in same]
        faults.append(f"{few(texts)}: {reason}")
    if not faults:
        fetched = {ask.repository for ask in found}
        faults += [
            f"{text}: found no LoRA adapter among the collection's {len(items):,} items"
            for text, items in collections.items()
            if not any(kind == "model" and item in fetched for item, kind in items)
        ]
    if faults:
        raise AdapterError(faults)
    adapters = list(dict.fromkeys(adapter for ask in asks for adapter in found.get(ask, [])))
    return [
        Source(adapter.snapshot / adapter.folder, adapter.repository, adapter.snapshot.name, name)
        for adapter, name in zip(adapters, _names(adapters), strict=True)
    ]


def _import_hub(sources: Iterable[str]) -> ModuleType:
    try:
        import huggingface_hub
        import huggingface_hub.errors
        from huggingface_hub import get_cached_repo_tree, parse_hf_uri  # noqa: F401, the newest used
    except ImportError:
        raise AdapterError(
            [
                f"{text}: {'' if '://' in text else 'no such folder here; '}adapters of the "
                "Hugging Face Hub need the package huggingface_hub, 1.31 or newer: "
                "pip install 'vllm-jd[hub]'"
                for text in sources
            ]
        ) from None
    return huggingface_hub


def _once(asks: list[_Ask]) -> list[_Ask]:
    """Each repository, revision and folder once; as the user's own where it is that too."""
    once: dict[tuple[str, str | None, str], _Ask] = {}
    for ask in asks:
        key = (ask.repository, ask.revision, ask.folder)
        if key not in once or ask.collection is None:
            once[key] = ask
    return list(once.values())


def _names(found: list[_Found]) -> list[str]:
    """A name for each adapter: the shortest that only it has."""
    lengths = [0] * len(found)
    while True:
        names = [adapter.name(length) for adapter, length in zip(found, lengths, strict=True)]
        uses = Counter(names)
        longer = [min(2, n + (uses[name] > 1)) for n, name in zip(lengths, names, strict=True)]
        if longer == lengths:
            return names
        lengths = longer


class _Hub:
    """huggingface_hub, with this module's errors."""

    def __init__(self, library: ModuleType, cache_dir: Path | None):
        from huggingface_hub.utils import tqdm

        class Silent(tqdm):  # one bar a repository and file is too many
            def __init__(self, *args: Any, **kwargs: Any):
                super().__init__(*args, **(kwargs | {"disable": True}))

        self._library = library
        self._errors = library.errors
        self._bar = Silent
        # huggingface_hub reads the variable only once, when it is imported.
        self._endpoint = os.environ.get("HF_ENDPOINT", "").rstrip("/") or None
        self._api = library.HfApi(endpoint=self._endpoint)
        self._cache = cache_dir or Path(library.constants.HF_HUB_CACHE)
        self.stop = threading.Event()

    def parse(self, text: str) -> _Ask | str:
        """The repository that `text` names, or the slug of the collection.

        Raises:
            AdapterError: it is neither.
        """
        if match := _COLLECTION.fullmatch(text):
            return match[1]
        slug, uri = None, text
        if match := _COLLECTION_URL.fullmatch(text):
            # The parser does not know collections: it checks the host.
            slug, uri = match[2], f"{match[1]}/{match[2].split('/')[0]}/collection"
        elif "://" not in text:
            uri = f"hf://{text}"
        try:
            parsed = self._library.parse_hf_uri(uri, endpoint=self._endpoint)
        except self._errors.HfUriError as error:
            raise AdapterError(
                [
                    f"{text}: names nothing on the Hub ({error.msg.strip(' .')}); expected "
                    "org/name, org/name@revision, a collection's slug, or the URL of one of them"
                ]
            ) from None
        if slug is not None:
            return slug
        if parsed.type != "model":
            raise AdapterError(
                [f"{text}: found a {parsed.type}, expected a model repository with LoRA adapters"]
            )
        return _Ask(text, parsed.id, parsed.revision, parsed.path_in_repo.strip("/"))

    def items(self, text: str, slug: str) -> list[tuple[str, str]]:
        """The items of a collection: (id, type).

        Raises:
            AdapterError, _UnreachableError: it cannot be had.
        """
        try:
            items = self._patiently(lambda: self._api.get_collection(slug)).items
        except Exception as error:
            raise self._explained(_Ask(text, slug, None), error, "collection") from error
        return [(item.item_id, item.item_type) for item in items]

    def fetch(self, ask: _Ask) -> list[_Found]:
        """Fetch all adapters of a repository.

        Raises:
            _NoAdapterError: it has none.
            AdapterError, _UnreachableError: it cannot be had.
        """
        # The configs come first: they say which weights are wanted. The listing of the
        # repository's files is in the cache after this, so that the second call costs no request.
        snapshot = self._snapshot(ask, [CONFIG_FILE, f"*/{CONFIG_FILE}"])
        pinned = replace(ask, revision=snapshot.name)
        folders = _adapter_folders(snapshot, ask.folder)
        if not folders:
            raise _NoAdapterError(
                f"found no {CONFIG_FILE} in {ask.folder or 'it'}{self._files(pinned)}; expected a "
                "LoRA adapter as PEFT saves it"
            )
        methods = [_other_method(snapshot / folder / CONFIG_FILE) for folder in folders]
        if None not in methods:
            found = ", ".join(sorted({method for method in methods if method}))
            expected = " or ".join(METHODS)
            raise _NoAdapterError(f"found peft_type {found} in {CONFIG_FILE}, expected {expected}")
        # Another method beside such an adapter is a fault that reading the adapters tells.
        weights = [(folder / file).as_posix() for folder in folders for file in WEIGHTS_FILES]
        self._snapshot(pinned, [glob.escape(file) for file in weights])
        missing = [
            folder
            for folder in folders
            if not any((snapshot / folder / file).is_file() for file in WEIGHTS_FILES)
        ]
        if missing:
            raise AdapterError([self._without_weights(pinned, folder) for folder in missing])
        return [_Found(snapshot, ask.repository, folder) for folder in folders]

    def _snapshot(self, ask: _Ask, patterns: list[str]) -> Path:
        """The folder of the commit in the cache, with the files of `patterns` in it."""
        try:
            return Path(
                self._patiently(
                    lambda: self._library.snapshot_download(
                        ask.repository,
                        revision=ask.revision,
                        cache_dir=self._cache,
                        allow_patterns=patterns,
                        endpoint=self._endpoint,
                        tqdm_class=self._bar,
                        max_workers=2,
                    )
                )
            )
        # The transports (HTTP, Xet) raise errors of their own, without a common class.
        except Exception as error:
            raise self._explained(ask, error, "repository") from error

    def _patiently(self, call: Callable[[], T]) -> T:
        """`call`, again after each pause that the Hub's rate limit asks for."""
        for _ in range(_RATE_LIMIT_WAITS):
            try:
                return call()
            except Exception as error:
                seconds = self._rate_limit(error)
                if seconds is None or self.stop.wait(seconds):
                    raise
        return call()

    def _rate_limit(self, error: BaseException) -> int | None:
        """Seconds until the Hub takes requests again; None if that is not the fault."""
        for cause in _causes(error):
            response = getattr(cause, "response", None)
            if response is not None and response.status_code == 429:
                # RateLimit: "api";r=0;t=55 (draft-ietf-httpapi-ratelimit-headers-09)
                reset = re.search(r";\s*t\s*=\s*(\d+)", response.headers.get("RateLimit", ""))
                after = response.headers.get("Retry-After", "")
                seconds = int(reset[1] if reset else after if after.isdecimal() else 30)
                return min(seconds, _RATE_LIMIT_WINDOW)
        return None

    def _explained(self, ask: _Ask, error: Exception, what: str) -> Exception:
        """`error` as what was asked, what was found, what to do."""
        errors = self._errors
        typed = ask.collection is None and "://" not in ask.text
        here = ", and no such folder here" if typed else ""
        login = "log in (hf auth login, or HF_TOKEN) if it is private"
        for cause in _causes(error):
            status = getattr(getattr(cause, "response", None), "status_code", None)
            if isinstance(cause, errors.OfflineModeIsEnabled):
                found = f"not complete in the cache {self._cache}"
                if what == "collection":
                    found = "the list of a collection is not kept in the cache"
                if typed:
                    found += ", no such folder here"
                reason = f"{found}, and HF_HUB_OFFLINE is set; unset it, or give other adapters"
            elif isinstance(cause, errors.GatedRepoError):
                reason = (
                    "a gated repository, and the Hub refused access; ask for it on the "
                    "repository's page, then log in (hf auth login, or HF_TOKEN)"
                )
            elif isinstance(cause, errors.RevisionNotFoundError):
                reason = "the repository has no such revision; expected a branch, tag or commit"
            elif isinstance(cause, errors.RepositoryNotFoundError) or status == 404:
                reason = f"found no such {what} on the Hub{here}; check the name, or {login}"
            elif status in (401, 403):
                reason = (
                    f"the Hub refused access ({status}: {_brief(cause)}); check the token "
                    "(hf auth whoami, HF_TOKEN) and its permissions"
                )
            elif status == 429:
                reason = "the Hub's limit of requests is used up; log in for a higher one, or wait"
            elif isinstance(status, int) and status >= 500:
                reason = f"the Hub answered {status} ({_brief(cause)}); try again later"
            # The root error of httpx, whichever release of it the library was built on.
            elif status is None and isinstance(cause, errors.HfHubHTTPError.__mro__[1]):
                return _UnreachableError(
                    f"{'no such folder here, and ' * typed}the connection to "
                    f"{self._api.endpoint} failed ({_brief(cause)}); check the network and "
                    "HF_ENDPOINT, then run this again: what is complete is not fetched again"
                )
            else:
                continue
            return AdapterError([f"{ask.asked}: {reason}"])
        return AdapterError(
            [
                f"{ask.asked}: cannot be fetched ({_brief(error)}); run this again: what is "
                "complete is not fetched again"
            ]
        )

    def _files(self, ask: _Ask) -> str:
        """The first files of a repository, in brackets; nothing if they are not known."""
        files = self._listing(ask) or []
        more = ", …" if len(files) > 3 else ""
        return f" (its files: {', '.join(files[:3])}{more})" if files else ""

    def _listing(self, ask: _Ask) -> list[str] | None:
        """The files of a commit, as far as the cache knows."""
        try:
            files = self._library.get_cached_repo_tree(
                ask.repository, revision=ask.revision, cache_dir=self._cache
            )
        except self._errors.CachedRepoTreeNotFoundError:
            return None
        return sorted(file.path for file in files)

    def _without_weights(self, ask: _Ask, folder: Path) -> str:
        file = (folder / WEIGHTS_FILES[0]).as_posix()
        listing = self._listing(ask)
        if listing is None:
            return (
                f"{ask.asked}: {file} is not in the cache {self._cache}, and the Hub could not be "
                "asked for it; run this again with network"
            )
        others = fnmatch.filter(listing, f"{glob.escape(file.removesuffix('.safetensors'))}.*")
        return (
            f"{ask.asked}: found {', '.join(others) or 'no weights'} beside its {CONFIG_FILE}, "
            f"expected {file}; save it again with PEFT's save_pretrained(…, "
            "safe_serialization=True) and give that folder"
        )

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """Keep the library from warning of each item that holds no adapter."""
        logger = logging.getLogger("huggingface_hub._snapshot_download")

        def is_news(record: logging.LogRecord) -> bool:
            return not record.getMessage().startswith("No files matched")

        logger.addFilter(is_news)
        try:
            yield
        finally:
            logger.removeFilter(is_news)


def _adapter_folders(snapshot: Path, below: str) -> list[Path]:
    """The adapters of a snapshot in its folder `below`, as paths relative to the snapshot."""
    folders = {file.parent.relative_to(snapshot) for file in snapshot.rglob(CONFIG_FILE)}
    return sorted(
        folder
        for folder in folders
        if folder.is_relative_to(below)
        and (folder.as_posix() == below or not _is_left(folder, folders))
        and folder / CONVERTED not in folders
    )


def _is_left(folder: Path, folders: set[Path]) -> bool:
    """Whether a trainer left `folder` as an earlier state of an adapter further up."""
    return any(
        parent in folders and any(map(LEFT_BY_TRAINERS.fullmatch, folder.relative_to(parent).parts))
        for parent in folder.parents
    )


def _other_method(config: Path) -> str | None:
    """PEFT's type of an adapter that cannot be read; a config that cannot is judged later."""
    try:
        method = json.loads(config.read_bytes())["peft_type"]
    except (OSError, ValueError, RecursionError, LookupError, TypeError):
        return None
    return method if isinstance(method, str) and method.upper() not in METHODS else None


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error and what it was raised from, outermost first."""
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__


def _brief(error: BaseException) -> str:
    """Class and first line of an error."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
