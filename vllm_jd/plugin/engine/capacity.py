"""How many slots there are: the same on the engine and on its workers, from what both are told."""

from vllm_jd.plugin.config import PluginConfig
from vllm_jd.plugin.engine.residency import Capacity, SlotClass
from vllm_jd.plugin.engine.tables import SIDES, Tables
from vllm_jd.row import BLOCK, ROW_FIELDS
from vllm_jd.store import Store
from vllm_jd.store.quantise import code_width, scale_width

_CORE_BYTES = 1 << 30
_CORES_SHARE = (
    0.1  # of a budget that not all fits into: a core is hundreds of times cheaper to read
)


def capacity_of(
    store: Store,
    tables: Tables,
    config: PluginConfig,
    *,
    max_num_seqs: int,
    max_lora_rank: int,
    in_codes: bool,
) -> Capacity:
    """The slots of a server that starts with `store`.

    Without a budget (`config.adapter_memory`): all its bases, and the cores of
    `config.core_slots` adapters, or of as many as fit into 1 GiB. With one: everything, if it
    fits; else cores in a tenth of it (of `max_num_seqs` adapters at least), and bases in the rest,
    of each rank the same share. Core slots for `config.max_loras` uploads come on top.

    Args:
        store: the open store.
        tables: of it.
        config: the plugin's settings.
        max_num_seqs: how many requests one step may have.
        max_lora_rank: the highest rank of an upload.
        in_codes: whether bases and cores of a quantised store stay codes.

    Raises:
        ValueError: the budget, or the number of core slots, is too small to serve anything.
    """
    n, manifest = len(store), store.manifest
    kind = manifest.quantised if in_codes else None
    item = store.dtype.itemsize
    if kind is None:
        core = manifest.core_row * item
    else:
        core = code_width(manifest.core_row, kind) + scale_width(manifest.core_row) * 2
    core += len(manifest.modules) * manifest.rows * len(ROW_FIELDS) * 4
    vector = item if kind is None else 1 + 2 / BLOCK
    widths = {
        "v": sum(module.d_in for module in manifest.modules) * vector,
        "u": sum(module.d_out for module in manifest.modules) * vector,
        "scales": sum(module.d_out for module in manifest.modules) * item,
    }
    counts = {
        side: {int(rank): int((ranks == rank).sum()) for rank in sorted({*ranks.tolist()}) if rank}
        for side, ranks in tables.ranks.items()
    }
    bases = sum(
        widths[side] * rank * count
        for side, ranks in counts.items()
        for rank, count in ranks.items()
    )
    share, least = 1.0, min(max_num_seqs, n)  # share: of what is more than one basis of each rank
    if config.core_slots is not None:
        cores = min(config.core_slots, n)
    else:
        cores = min(n, max(least, _CORE_BYTES // max(1, core)))
    if config.adapter_memory is not None and bases + cores * core > config.adapter_memory:
        needed = sum(widths[side] * rank for side, ranks in counts.items() for rank in ranks)
        if config.core_slots is None:
            most = min(config.adapter_memory * _CORES_SHARE, config.adapter_memory - needed)
            cores = min(cores, max(least, int(most // core)))
        left = config.adapter_memory - cores * core - needed
        share = min(1.0, left / max(1, bases - needed))
        if left < 0:
            raise ValueError(
                f"found --adapter-memory {config.adapter_memory:,} bytes, expected at least "
                f"{int(needed + cores * core):,}: {cores} cores and one basis of each rank; all of "
                f"the store takes {int(bases + n * core):,}"
            )
    if cores < least:
        raise ValueError(
            f"found {cores} slots for cores (--core-slots), expected at least {least} "
            "(--max-num-seqs): so many adapters one step may have"
        )
    slots, uploads = {}, {}
    for side in SIDES:
        classes, first = [], 0
        for rank, count in counts[side].items():
            classes.append(SlotClass(rank, first, 1 + int((count - 1) * share)))
            first += classes[-1].count
        slots[side] = tuple(classes)
        if side != "scales":
            uploads[side] = SlotClass(max_lora_rank, 0, config.max_loras)
    whole = all(c.count == counts[side][c.rank] for side in SIDES for c in slots[side])
    return Capacity(cores + config.max_loras, slots, uploads, whole)
