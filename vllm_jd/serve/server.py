"""Start vLLM's OpenAI-compatible server on a store."""

import importlib.util
import json
import os
import sys
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from vllm_jd.plugin.config import KEY
from vllm_jd.serve.engine import engine_args
from vllm_jd.store import Store, StoreError, check_base_model

_MODULE = "vllm.entrypoints.openai.api_server"
_DRAIN_SECONDS = 10  # what running requests get at Ctrl-C; vLLM's own default is to drop them


class ServeError(Exception):
    """The server cannot be started as asked; the message says what to change."""


def server_command(
    store: Path,
    model: str,
    vllm_args: list[str],
    *,
    max_loras: int,
    max_cpu_loras: int,
    max_num_seqs: int | None,
    store_base_model: str | None,
    additional_config: str | None,
) -> list[str]:
    """The command that serves `store`: vLLM's own server with the plugin's settings.

    Raises:
        ServeError: vLLM is not installed or not the one that the plugin knows, or a flag among
            `vllm_args` contradicts what serving a store needs.
        StoreError: the store is damaged or belongs to another base model.
    """
    _check_vllm()
    _check_flags(vllm_args)
    _check_store(store, model, store_base_model)
    args = engine_args(
        store,
        max_loras=max_loras,
        max_cpu_loras=max_cpu_loras,
        max_num_seqs=max_num_seqs,
        store_base_model=store_base_model,
    )
    args["additional_config"] |= _parse_additional(additional_config)
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-m", _MODULE]
    command += ["--model", model]
    for key, value in args.items():
        flag = "--" + key.replace("_", "-")
        if value is True:
            command.append(flag)
        else:
            command += [flag, json.dumps(value) if isinstance(value, dict) else str(value)]
    if not any(_flag(arg) == "--shutdown-timeout" for arg in vllm_args):
        command += ["--shutdown-timeout", str(_DRAIN_SECONDS)]
    return command + vllm_args


def server_environment() -> dict[str, str]:
    """The environment for `server_command`: our HTTP routes and run-time LoRA loading on."""
    environment = dict(os.environ)
    environment.setdefault("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "1")
    if "VLLM_PLUGINS" in environment:
        names = environment["VLLM_PLUGINS"].split(",")
    else:
        # Naming one plugin shuts out all others: name those too that would have been loaded.
        groups = ("general", "platform", "io_processor", "stat_logger")
        found = [entry_points(group=f"vllm.{group}_plugins") for group in groups]
        names = [point.name for group in found for point in group]
    environment["VLLM_PLUGINS"] = ",".join(sorted({*filter(None, names), KEY}))
    return environment


def _check_vllm() -> None:
    if importlib.util.find_spec("vllm") is None:
        raise ServeError(
            "vLLM is not installed; expected vLLM 0.32: "
            "pip install 'vllm-jd[cpu]' (or 'vllm-jd[cuda]' on a GPU machine)"
        )
    points = entry_points(group="vllm.general_plugins", name=KEY)
    if not points:
        raise ServeError(
            "the vLLM plugin 'vllm_jd' is not registered in this environment; "
            "install the package with pip (pip install vllm-jd) rather than by PYTHONPATH"
        )


def _check_flags(vllm_args: list[str]) -> None:
    given = {_flag(arg) for arg in vllm_args}
    for flag, why in {
        "--scheduler-cls": "the store's own scheduler is used",
        "--fully-sharded-loras": "the store's bases are not sharded that way",
        "--no-enable-lora": "the store's adapters need it",
    }.items():
        if flag in given:
            raise ServeError(f"{flag} cannot be used here: {why}. Leave it out")


def _flag(arg: str) -> str:
    """`--some_flag=value` → `--some-flag`."""
    return arg.split("=", 1)[0].replace("_", "-")


def _check_store(store: Path, model: str, store_base_model: str | None) -> None:
    """Refuse quickly what the worker would refuse after loading the model."""
    opened = Store.open(store)
    config = Path(model) / "config.json"
    if config.is_file():
        try:
            found = json.loads(config.read_text(encoding="utf-8"))
        except ValueError as error:
            raise StoreError(f"{config}: cannot be read as JSON: {error}") from None
        check_base_model(opened.manifest.base_model, model, found, store_base_model)


def _parse_additional(text: str | None) -> dict[str, Any]:
    if text is None:
        return {}
    try:
        found = json.loads(text)
    except ValueError as error:
        raise ServeError(f"--additional-config is not JSON: {error}") from None
    if not isinstance(found, dict) or KEY in found:
        raise ServeError(f"--additional-config must be a JSON object without the key {KEY!r}")
    return found
