"""Second moments E[xxᵀ] of what a base model's linear layers are given: measured once, kept in a
file, given out as metrics.

A moments file is a safetensors file: `tokens` int64 `[inputs]`, how many tokens each distinct input
was measured on (0: not yet), and one float32 `[d_in, d_in]` an input. Its metadata say of which
model, prompts and modules.
"""

import hashlib
import itertools
import json
import os
import struct
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from safetensors import SafetensorError, safe_open

from vllm_jd.compressor.calibrate.calibration import DAMPING, Metric
from vllm_jd.compressor.calibrate.prompts import Prompt, encode, prompts_sha256, read_prompts
from vllm_jd.compressor.errors import CalibrationError, few
from vllm_jd.store import BaseModelInfo, StoreError, read_base_model, short_name
from vllm_jd.store.files import fsync, sha256_file

Progress = Callable[[str, int, int], None]
"""Called with (what is going on, done, total)."""

_FORMAT = "vllm-jd moments 1"
_BATCH_TOKENS = 4096
_HELD_BYTES = 2 << 30
_SAMPLE_TOKENS = 16  # enough to see which modules are given the same input
_WEIGHTS = (".safetensors", ".bin", ".index.json")


class Moments(Mapping[str, Metric]):
    """A moments file as a mapping: module → `Metric`, read and factorised when asked for.

    Only the last metric is kept, for the modules that share an input follow each other. It may be
    pickled: a file's path and a few names travel, and the other side reads the same file.

    Args:
        path: the moments file.
        device: where to factorise, as torch names it.

    Raises:
        CalibrationError: not a complete moments file.
    """

    def __init__(self, path: Path, device: str = "cpu"):
        self.path = path.absolute()
        self.device = device
        metadata, shapes, tokens = _read_header(path)
        inputs = json.loads(metadata["inputs"])
        if not bool((tokens > 0).all()):
            raise CalibrationError(f"{path}: the measurement of these moments was not finished")
        self.base_model = BaseModelInfo(
            name=metadata["model"],
            fingerprint=metadata["fingerprint"] or None,
            config=json.loads(metadata["config"]),
        )
        self.prompts_sha256 = metadata["prompts_sha256"]
        self.tokens = int(tokens.max())
        """Tokens that the model read."""
        self.key = metadata["key"]
        self._input = {name: f"moment.{i}" for i, names in enumerate(inputs) for name in names}
        self._d_in = {name: shapes[tensor][0] for name, tensor in self._input.items()}
        self._forget()

    def __iter__(self) -> Iterator[str]:
        return iter(self._input)

    def __len__(self) -> int:
        return len(self._input)

    def __contains__(self, module: object) -> bool:
        # Mapping's own would factorise.
        return module in self._input

    def __getitem__(self, module: str) -> Metric:
        """The metric of a module; KeyError if the file has no moment of it.

        Raises:
            CalibrationError: the file cannot be read any more, or holds NaN or infinity.
        """
        tensor = self._input[module]
        # One at a time: a factorisation holds about five times the metric's own size.
        with self._lock:
            if self._last is None or self._last[0] != tensor:
                self._last = None
                self._last = (tensor, Metric.of(self.moment(module).to(self.device)).to("cpu"))
            return self._last[1]

    def moment(self, module: str) -> torch.Tensor:
        """E[xxᵀ] of a module's inputs, float32 `[d_in, d_in]`.

        Raises:
            CalibrationError: as above.
        """
        try:
            with safe_open(self.path, framework="pt") as tensors:
                moment = tensors.get_tensor(self._input[module])
        except (OSError, SafetensorError) as error:
            raise CalibrationError(f"{self.path}: cannot be read: {error}") from None
        if not bool(moment.isfinite().all()):
            raise CalibrationError(
                f"{self.path}: the moments of {module} hold NaN or infinity: the file is damaged; "
                "delete it and measure again"
            )
        return moment

    @property
    def digest(self) -> str:
        """Hex digest of everything that decides the metrics; reads the file once."""
        if self._digest is None:
            text = f"{sha256_file(self.path)} {DAMPING}"
            self._digest = hashlib.sha256(text.encode()).hexdigest()
        return self._digest

    def check(self, modules: Mapping[str, tuple[int, int]], base_model: BaseModelInfo) -> None:
        """Refuse moments of another base model, or without some module.

        Args:
            modules: module → (d_in, d_out), what is to be compressed.
            base_model: what is known of the adapters' base model.

        Raises:
            CalibrationError: saying what differs.
        """
        mine, theirs = self.base_model.config, base_model.config
        differing = [
            f"{key}: found {mine[key]!r}, expected {theirs[key]!r}"
            for key in sorted(mine.keys() & theirs.keys())
            if mine[key] != theirs[key]
        ]
        if short_name(self.base_model.name).lower() != short_name(base_model.name).lower():
            differing.insert(0, f"found {self.base_model.name!r}, expected {base_model.name!r}")
        if differing:
            raise CalibrationError(
                f"{self.path}: these moments were measured on another base model "
                f"({', '.join(differing)}); calibrate with prompts to measure this one"
            )
        missing = [name for name in modules if name not in self]
        if missing:
            raise CalibrationError(
                f"{self.path}: holds no moments of {few(missing)}, which the adapters have; "
                "calibrate with prompts to measure them"
            )
        for name, (d_in, _) in modules.items():
            if self._d_in[name] != d_in:
                raise CalibrationError(
                    f"{self.path}: {name}: found inputs of {self._d_in[name]} numbers, the "
                    f"adapters have {d_in}"
                )

    def _forget(self) -> None:
        self._last: tuple[str, Metric] | None = None
        self._lock = threading.Lock()
        self._digest: str | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in vars(self).items() if k not in ("_last", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._forget()
        vars(self).update(state)


def calibrate(
    source: Path,
    model: str,
    modules: Mapping[str, tuple[int, int]],
    folder: Path,
    *,
    max_tokens: int = 512,
    device: str = "cpu",
    on_progress: Progress = lambda what, done, total: None,
) -> Moments:
    """What `--calibrate SOURCE` means: moments measured before, or prompts to measure them with.

    Args:
        source: a moments file (`.safetensors`), or prompts (see `read_prompts`).
        model: the base model, a folder or a Hub id.
        modules: module → (d_in, d_out), of the adapters.
        folder: where moments are kept. They are measured again only if the model, the prompts,
            the modules or `max_tokens` are others.
        max_tokens: of each prompt, the first ones.
        device: where to run the model and to factorise.
        on_progress: see `Progress`.

    Raises:
        CalibrationError: prompts, moments or model cannot be used; the message says why.
    """
    if source.suffix == ".safetensors":
        moments = Moments(source, device)
        known = _base_model(Path(model)) if Path(model).is_dir() else BaseModelInfo(name=model)
        moments.check(modules, known)
        return moments
    prompts = read_prompts(source)
    config_folder = _config_folder(model)
    base_model = _base_model(config_folder, model)
    key = _key(base_model, config_folder, prompts, modules, max_tokens)
    name = short_name(base_model.name).rsplit("/", 1)[-1]
    out = folder / f"{name}-{key[:16]}.safetensors"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(out.with_suffix(".lock"))
        with lock:
            if not out.exists():
                measure(
                    model,
                    prompts,
                    modules,
                    out,
                    max_tokens=max_tokens,
                    device=device,
                    on_progress=on_progress,
                )
    except OSError as error:
        raise CalibrationError(f"{folder}: cannot be written: {error}") from None
    return Moments(out, device)


def measure(
    model: Path | str,
    prompts: list[Prompt],
    modules: Mapping[str, tuple[int, int]],
    out: Path,
    *,
    max_tokens: int = 512,
    device: str = "cpu",
    held_bytes: int = _HELD_BYTES,
    on_progress: Progress = lambda what, done, total: None,
) -> Moments:
    """Run the base model over prompts and write E[xxᵀ] of the modules' inputs to `out`.

    Every token counts once, those that the tokenizer or the chat template adds included. Prompts
    of the same number of tokens are run together, so there are no padding tokens. Modules that
    are given the same tensor (q, k and v; gate and up) share one moment.

    Memory: the model, a batch's activations, and at most `held_bytes` of moments, or one moment
    where that is more (d_in² × 4 bytes: 67 MB at 4096, 822 MB at 14336). What does not fit is
    measured in another pass over the prompts. Finished passes are kept in `out`.partial: the same
    call after a stop goes on from there.

    Args:
        model: a folder with a Hugging Face model and its tokenizer, or a Hub id.
        prompts: see `Prompt`.
        modules: module → (d_in, d_out), named as the adapters name them.
        out: the file to write.
        max_tokens: of each prompt, the first ones.
        device: where to run the model.
        held_bytes: see above.
        on_progress: see `Progress`; counts prompts, those of each pass.

    Raises:
        CalibrationError: the model cannot be loaded, or does not have or run these modules.
    """
    model = str(model)
    config_folder = _config_folder(model)
    base_model = _base_model(config_folder, model)
    on_progress("loading the base model", 0, 1)
    loaded, tokenizer = load_model(model, device)
    on_progress("loading the base model", 1, 1)
    linears = _linear_layers(loaded, model, modules)
    # The model without its head: logits would take more than all else, and nobody looks at them.
    body = loaded.base_model
    if not set(linears.values()) <= set(body.modules()):
        body = loaded
    batches = _batches(encode(prompts, tokenizer, max_tokens))
    inputs = _distinct_inputs(body, linears, batches[0][:1, :_SAMPLE_TOKENS].to(device))
    sizes = [modules[names[0]][0] for names in inputs]
    metadata = {
        "format": _FORMAT,
        "model": base_model.name,
        "fingerprint": base_model.fingerprint or "",
        "config": json.dumps(base_model.config),
        "prompts_sha256": prompts_sha256(prompts),
        "max_tokens": str(max_tokens),
        "inputs": json.dumps(inputs),
        "key": _key(base_model, config_folder, prompts, modules, max_tokens),
    }
    partial = out.with_name(out.name + ".partial")
    tokens = _open_partial(partial, metadata, sizes)
    passes = _passes([i for i, count in enumerate(tokens.tolist()) if not count], sizes, held_bytes)
    for number, chosen in enumerate(passes):

        def told(done: int, number: int = number, total: int = len(passes)) -> None:
            on_progress("calibrating", number * len(prompts) + done, total * len(prompts))

        hooked = {linears[inputs[i][0]]: (i, sizes[i]) for i in chosen}
        try:
            moments, counts = _accumulate(body, hooked, batches, device, told)
        except torch.cuda.OutOfMemoryError as error:
            raise CalibrationError(
                f"the memory of {device} is too small to run {model}: {error}"
            ) from None
        never = [name for i in chosen if not counts[i] for name in inputs[i]]
        if never:
            raise CalibrationError(
                f"the prompts never reached {few(never)} of {model} "
                f"({type(loaded).__name__}): their inputs cannot be measured"
            )
        for i in chosen:
            moment = moments.pop(i).div_(counts[i]).cpu()
            if not bool(moment.isfinite().all()):
                raise CalibrationError(
                    f"the inputs of {inputs[i][0]} overflow: {model} gives NaN or infinity on "
                    f"these prompts in {loaded.dtype}"
                )
            _write_moment(partial, sizes, i, moment, counts[i])
    fsync(partial)
    partial.replace(out)
    return Moments(out, device)


def _config_folder(model: str) -> Path:
    """The folder that holds a model's `config.json`; of a Hub id, its snapshot in the cache."""
    if Path(model).is_dir():
        return Path(model)
    try:
        from huggingface_hub import hf_hub_download
    except ImportError as error:
        raise _not_installed(error) from None
    try:
        return Path(hf_hub_download(model, "config.json")).parent
    except (OSError, ValueError) as error:  # its errors derive from these two
        raise _not_loadable(model, error) from None


def _base_model(folder: Path, name: str | None = None) -> BaseModelInfo:
    try:
        return read_base_model(folder, None if name is None else short_name(name))
    except StoreError as error:
        raise CalibrationError(f"the base model cannot be used: {error}") from None


def load_model(model: str, device: str, dtype: str = "auto") -> tuple[Any, Any]:
    """(a base model, by default in its checkpoint's dtype, its tokenizer).

    Raises:
        CalibrationError: it cannot be loaded.
    """
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils import logging
    except (ImportError, RuntimeError) as error:
        raise _not_installed(error) from None
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # the caller shows progress
    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
        loaded = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
        return loaded.to(device).eval(), tokenizer
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
        raise _not_loadable(model, error) from None
    finally:
        if bars:
            logging.enable_progress_bar()


def _not_installed(error: Exception) -> CalibrationError:
    return CalibrationError(
        f"the base model is run with transformers, which cannot be imported ({error}); "
        "`pip install 'vllm-jd[calibrate]'`"
    )


def _not_loadable(model: str, error: Exception) -> CalibrationError:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return CalibrationError(
        f"the base model {model!r} cannot be loaded: {lines[0]}; expected the folder or the Hub "
        "id of a causal language model with its tokenizer (--base-model)"
    )


def _linear_layers(
    loaded: Any, model: str, modules: Mapping[str, tuple[int, int]]
) -> dict[str, torch.nn.Module]:
    """Module name → the model's own module."""
    named = dict(loaded.named_modules())
    what = f"{model} ({type(loaded).__name__})"
    missing = [name for name in modules if name not in named]
    if missing:
        linear = (name for name, module in named.items() if hasattr(module, "in_features"))
        raise CalibrationError(
            f"the base model {what} has no {few(missing)}, which the adapters have; it has "
            f"{few(list(linear))}"
        )
    for name, (d_in, _) in modules.items():
        found = getattr(named[name], "in_features", None)
        if found is None:
            raise CalibrationError(
                f"{name} of {what} is of type {type(named[name]).__name__}, expected a linear layer"
            )
        if found != d_in:
            raise CalibrationError(
                f"{name} of {what} takes inputs of {found} numbers, the adapters have {d_in}: "
                "they belong to another base model"
            )
    return {name: named[name] for name in modules}


def _batches(encoded: list[list[int]]) -> list[torch.Tensor]:
    """Int64 `[prompts, length]`, each of prompts of one length; the longest first."""
    batches = []
    ordered = sorted((ids for ids in encoded if ids), key=len, reverse=True)
    for length, same in itertools.groupby(ordered, key=len):
        ids = torch.tensor(list(same))
        batches += ids.split(max(1, _BATCH_TOKENS // length))
    if not batches:
        raise CalibrationError("the tokenizer makes no tokens of the calibration prompts")
    return batches


def _distinct_inputs(
    body: torch.nn.Module, linears: dict[str, torch.nn.Module], sample: torch.Tensor
) -> list[list[str]]:
    """The modules, grouped by the input that they are given, in the order of `linears`."""
    given: dict[str, list[Any]] = {name: [] for name in linears}
    alive = []  # else a later tensor may lie at the same address

    def note(name: str, x: torch.Tensor) -> None:
        alive.append(x)
        given[name].append((x.data_ptr(), x.shape, x.stride(), x._version))

    _run(body, {module: _bound(note, name) for name, module in linears.items()}, [sample])
    groups: dict[Any, list[str]] = {}
    for name, seen in given.items():
        # One that the sample does not reach (an expert) shares with nobody.
        groups.setdefault(tuple(seen) or name, []).append(name)
    return list(groups.values())


def _accumulate(
    body: torch.nn.Module,
    hooked: dict[torch.nn.Module, tuple[int, int]],
    batches: list[torch.Tensor],
    device: str,
    told: Callable[[int], None],
) -> tuple[dict[int, torch.Tensor], dict[int, int]]:
    """Σ xxᵀ (float32) and the number of x, by input. `hooked`: module → (input, d_in)."""
    sums = {i: torch.zeros(d_in, d_in, device=device) for i, d_in in hooked.values()}
    counts = dict.fromkeys(sums, 0)

    def add(i: int, x: torch.Tensor) -> None:
        x = x.reshape(-1, x.shape[-1]).to(sums[i])
        sums[i].addmm_(x.T, x)
        counts[i] += len(x)

    done = 0

    def fed() -> Iterator[torch.Tensor]:
        nonlocal done
        for batch in batches:
            told(done)
            yield batch.to(device)
            done += len(batch)

    _run(body, {module: _bound(add, i) for module, (i, _) in hooked.items()}, fed())
    told(done)
    return sums, counts


def _bound(function: Callable[[Any, torch.Tensor], None], first: Any) -> Callable[..., None]:
    """A hook that calls `function(first, the module's input)`."""

    def hook(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        function(first, args[0] if args else kwargs["input"])

    return hook


def _run(
    body: torch.nn.Module,
    hooks: dict[torch.nn.Module, Callable[..., None]],
    batches: Any,
) -> None:
    with ExitStack() as stack, torch.no_grad():
        for module, hook in hooks.items():
            stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
        for batch in batches:
            body(input_ids=batch, use_cache=False)


def _passes(inputs: list[int], sizes: list[int], held_bytes: int) -> list[list[int]]:
    """The inputs, in stretches whose moments fit into `held_bytes`; at least one in each."""
    passes: list[list[int]] = []
    held = 0
    for i in inputs:
        bytes_ = 4 * sizes[i] ** 2
        if not passes or held + bytes_ > held_bytes:
            passes.append([])
            held = 0
        passes[-1].append(i)
        held += bytes_
    return passes


def _key(
    base_model: BaseModelInfo,
    folder: Path,
    prompts: list[Prompt],
    modules: Mapping[str, tuple[int, int]],
    max_tokens: int,
) -> str:
    """Which moments these are: the same key, the same numbers."""
    # A Hub snapshot's folder is named after the commit; another folder's weights may be replaced.
    if folder.parent.name == "snapshots":
        weights: list[Any] = [folder.name]
    else:
        files = (file for file in sorted(folder.iterdir()) if file.name.endswith(_WEIGHTS))
        weights = [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    parts = {
        "format": _FORMAT,
        "model": [base_model.name, base_model.fingerprint, weights],
        "prompts": prompts_sha256(prompts),
        "max_tokens": max_tokens,
        "modules": {name: d_in for name, (d_in, _) in modules.items()},
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _open_partial(path: Path, metadata: dict[str, str], sizes: list[int]) -> torch.Tensor:
    """Tokens int64 `[inputs]` that an unfinished file has been measured on; made if not there.

    The file has its full length from the start (most file systems take no room for the rest),
    so it is never in memory as a whole.
    """
    try:
        found, _, tokens = _read_header(path)
        if found == metadata:
            return tokens
    except CalibrationError:
        pass  # there is none, or one that was never begun
    header = _header(metadata, sizes)
    with path.open("wb") as file:
        file.write(header)
        file.truncate(len(header) + 8 * len(sizes) + sum(4 * size**2 for size in sizes))
    return torch.zeros(len(sizes), dtype=torch.int64)


def _header(metadata: dict[str, str], sizes: list[int]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": metadata}
    end = 8 * len(sizes)
    entries["tokens"] = {"dtype": "I64", "shape": [len(sizes)], "data_offsets": [0, end]}
    for i, size in enumerate(sizes):
        span = [end, end + 4 * size**2]
        entries[f"moment.{i}"] = {"dtype": "F32", "shape": [size, size], "data_offsets": span}
        end = span[1]
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _write_moment(path: Path, sizes: list[int], i: int, moment: torch.Tensor, tokens: int) -> None:
    """Put moment `i` in its place, and only then its number of tokens, which says it is there."""
    with path.open("r+b") as file:
        start = 8 + struct.unpack("<Q", file.read(8))[0]
        file.seek(start + 8 * len(sizes) + sum(4 * size**2 for size in sizes[:i]))
        file.write(moment.numpy().data)
        file.flush()
        os.fsync(file.fileno())
        file.seek(start + 8 * i)
        file.write(struct.pack("<q", tokens))


def _read_header(path: Path) -> tuple[dict[str, str], dict[str, tuple[int, ...]], torch.Tensor]:
    """(metadata, shapes by tensor, tokens) of a moments file.

    Raises:
        CalibrationError: there is none, or it is something else.
    """
    try:
        with safe_open(path, framework="pt") as tensors:
            metadata = tensors.metadata() or {}
            if metadata.get("format") != _FORMAT:
                raise CalibrationError(
                    f"{path}: found format {metadata.get('format')!r}, expected {_FORMAT!r}: "
                    "not a file of moments that this version can use"
                )
            names = tensors.keys()
            shapes = {name: tuple(tensors.get_slice(name).get_shape()) for name in names}
            return metadata, shapes, tensors.get_tensor("tokens")
    except FileNotFoundError:
        raise CalibrationError(f"{path}: no such file") from None
    except (OSError, SafetensorError) as error:
        raise CalibrationError(f"{path}: cannot be read as safetensors: {error}") from None
