"""The vLLM engine arguments that put a store behind `vllm serve` and `vllm.LLM`."""

from pathlib import Path
from typing import Any

from vllm_jd.plugin.config import KEY, PluginConfig
from vllm_jd.plugin.defaults import MAX_BLEND, MAX_CPU_LORAS, MAX_LORAS
from vllm_jd.store import read_current

# Compressed adapters are all resident: the distinct adapters of a step need no bound below the
# number of its sequences. vLLM wants one all the same.
_NO_LIMIT = 1024

SCHEDULER = "vllm_jd.plugin.engine.scheduler.make_scheduler"


def engine_args(
    store: Path | str,
    *,
    max_loras: int = MAX_LORAS,
    max_cpu_loras: int = MAX_CPU_LORAS,
    max_num_seqs: int | None = None,
    store_base_model: str | None = None,
    core_slots: int | None = None,
    adapter_memory: int | None = None,
    max_blend: int = MAX_BLEND,
) -> dict[str, Any]:
    """Keyword arguments for `vllm.LLM` or `vllm.EngineArgs` that serve the store at `store`.

    Args:
        store: the store's folder.
        max_loras: uncompressed (PEFT) adapters that can be resident beside the store's.
        max_cpu_loras: uncompressed adapters that are kept in main memory.
        max_num_seqs: vLLM's setting, if it is not left to its default.
        store_base_model: the name that the store's adapters give the served model, if it is
            another than its folder's.
        core_slots: how many of the store's adapters have their cores resident at once; the others'
            are read when they are asked for. None: as many as fit into 1 GiB.
        adapter_memory: bytes for bases and cores together; where not all fit, bases are read when
            they are needed, too. None: all bases, and cores as `core_slots` says.
        max_blend: the most adapters that one request may blend. 0: no blends, and no memory for
            them.

    Returns:
        `enable_lora`, `max_loras`, `max_cpu_loras`, `scheduler_cls` and `additional_config`, and
        `max_num_seqs` if it was given. They name the store's live generation.

    Raises:
        StoreError: there is no store.
    """
    generation, manifest_sha256 = read_current(Path(store))
    config = PluginConfig(
        store=str(Path(store).resolve()),
        generation=generation,
        manifest_sha256=manifest_sha256,
        store_base_model=store_base_model,
        max_loras=max_loras,
        max_cpu_loras=max(max_cpu_loras, max_loras),
        core_slots=core_slots,
        adapter_memory=adapter_memory,
        max_blend=max_blend,
    )
    limit = max(_NO_LIMIT, max_num_seqs or 0)
    args: dict[str, Any] = {
        "enable_lora": True,
        "max_loras": limit,
        "max_cpu_loras": limit,
        "scheduler_cls": SCHEDULER,
        "additional_config": {KEY: config.model_dump(exclude_none=True)},
    }
    if max_num_seqs is not None:
        args["max_num_seqs"] = max_num_seqs
    return args
