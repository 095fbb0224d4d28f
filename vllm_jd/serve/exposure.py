"""What a server opens to whoever reaches it, in words for its start."""

from collections.abc import Mapping, Sequence
from pathlib import Path

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
    adapter_roots: Sequence[Path] = (),
    remote: bool = False,
) -> list[str]:
    """Lines that say where a server answers, whether it asks for a key, and what may be loaded.

    Args:
        vllm_args: vLLM's flags that it is started with.
        environment: its environment.
        updating: whether adapters may be loaded and unloaded while it runs.
        adapter_roots: the folders that they may be loaded from.
        remote: whether they may be downloaded.
    """
    unsaid = "as --config says" if flag_value(vllm_args, "--config") is not None else None
    host = flag_value(vllm_args, "--host")
    port = flag_value(vllm_args, "--port") or unsaid or "8000"
    socket = flag_value(vllm_args, "--uds")
    where = f"{host or unsaid or 'every interface'}, port {port}"
    key = flag_value(vllm_args, "--api-key") or environment.get("VLLM_API_KEY")
    if key:
        asked = "asked for below /v1"
    elif unsaid:
        asked = unsaid
    else:
        asked = "none asked for"
        if not socket and host not in LOOPBACK:
            asked += ": whoever reaches that address may use it (--api-key, or --host 127.0.0.1)"
    loading = "off"
    if updating:
        places = [*map(str, adapter_roots), *(["the Hugging Face Hub"] if remote else [])]
        loading = f"on, from {', '.join(places)}"
    return [
        f"address: {f'the socket {socket}' if socket else where}",
        f"API key: {asked}",
        f"loading adapters at run time: {loading}",
    ]
