"""What a server opens to whoever reaches it, in words for its start."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from vllm_jd.serve.tenants.rights import OPEN

LOOPBACK = ("127.0.0.1", "localhost", "::1")


def flag_value(vllm_args: Sequence[str], flag: str) -> str | None:
    """The value of one of vLLM's flags, the last if it is given twice: `--flag value` or
    `--flag=value`, `_` or `-` in its name. None: not given; empty: without a value."""
    value = None
    for place, arg in enumerate(vllm_args):
        name, given, after = arg.partition("=")
        if name.replace("_", "-") == flag:
            value = after if given else "".join(vllm_args[place + 1 : place + 2])
    return value


def exposure(
    vllm_args: Sequence[str],
    environment: Mapping[str, str],
    *,
    updating: bool,
    adapter_roots: Sequence[str] = (),
    remote: bool = False,
    adapter_dir: Path | None = None,
    api_keys: Path | None = None,
) -> list[str]:
    """Lines that say where a server answers, whether it asks for a key, and what may be loaded.

    Args:
        vllm_args: vLLM's flags that it is started with.
        environment: its environment.
        updating: whether adapters may be loaded and unloaded while it runs.
        adapter_roots: the folders and addresses that they may be loaded from.
        remote: whether they may be downloaded.
        adapter_dir: the folder that it follows.
        api_keys: the file of keys that it asks for.
    """
    unsaid = "as --config says" if flag_value(vllm_args, "--config") is not None else None
    host = flag_value(vllm_args, "--host")
    port = flag_value(vllm_args, "--port") or unsaid or "8000"
    socket = flag_value(vllm_args, "--uds")
    where = f"{host or unsaid or 'every interface'}, port {port}"
    key = flag_value(vllm_args, "--api-key") or environment.get("VLLM_API_KEY")
    if api_keys is not None:
        asked = f"one of {api_keys} asked for, but for {', '.join(sorted(OPEN))}"
    elif key:
        asked = "asked for below /v1"
    elif unsaid:
        asked = unsaid
    else:
        asked = "none asked for"
        if not socket and host not in LOOPBACK:
            asked += ": whoever reaches that address may use it (--api-key, or --host 127.0.0.1)"
    loading = "off"
    if updating:
        places = [*adapter_roots, *(["the Hugging Face Hub"] if remote else [])]
        loading = f"on, from {', '.join(places)} and in uploads"
    if adapter_dir is not None:
        loading += f"; the folder {adapter_dir} is followed"
    return [
        f"address: {f'the socket {socket}' if socket else where}",
        f"API key: {asked}",
        f"loading adapters at run time: {loading}",
    ]
