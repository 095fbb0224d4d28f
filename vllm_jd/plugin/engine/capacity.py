"""How many slots there are: the same on the engine and on its workers, from what both are told."""

import itertools
from collections import Counter

from vllm_jd.plugin.config import PluginConfig
from vllm_jd.plugin.engine.residency import Capacity, SlotClass
from vllm_jd.plugin.engine.tables import SIDES, Tables
from vllm_jd.row import BLOCK, RANK, ROW_FIELDS
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
    fully_sharded: bool = False,
) -> Capacity:
    """The slots of a server that starts with `store`.

    Without a budget (`config.adapter_memory`): all its bases, and the cores of
    `config.core_slots` adapters, or of as many as fit into 1 GiB. With one: everything, if it
    fits; else cores in a tenth of it (of `max_num_seqs` adapters at least), and bases in the rest,
    of each rank the same share. Core slots for `config.max_loras` uploads come on top.

    For blends of up to `config.max_blend` parts there are core slots of their own, as many as
    requests a step may have (and no less than one blend may take), and as many long slots; a
    budget counts them.

    Args:
        store: the open store.
        tables: of it.
        config: the plugin's settings.
        max_num_seqs: how many requests one step may have.
        max_lora_rank: the highest rank of an upload.
        in_codes: whether bases and cores of a quantised store stay codes.
        fully_sharded: whether adapters are spread over the workers (`--fully-sharded-loras`), where
            blends of several rows are not served.

    Raises:
        ValueError: the budget, or the number of core slots, is too small to serve anything.
    """
    n, manifest = len(store), store.manifest
    kind = manifest.quantised if in_codes else None
    item = store.dtype.itemsize
    blends = long = depth = tail = 0
    if config.max_blend:
        blends = max(max_num_seqs, config.max_blend + 1)
        long = 0 if fully_sharded else max_num_seqs
        depth = manifest.rows * config.max_blend
        highest = int(tables.rows[:, RANK].max())
        tail = -(-max(highest, max_lora_rank) // BLOCK) * BLOCK
    numbers = manifest.core_row + tail
    core = numbers * item if kind is None else code_width(numbers, kind) + scale_width(numbers) * 2
    row = int(tables.each.sum()) * len(ROW_FIELDS) * 4
    core += manifest.rows * row
    blending = blends * core + long * depth * row
    vector = item if kind is None else 1 + 2 / BLOCK
    # Bytes of one vector of each module; of a wide basis, of one for each expert.
    widths = {
        (side, wide): sum(
            (module.d_in if side == "v" else module.d_out) * (module.each if wide else 1)
            for module in manifest.modules
        )
        * (item if side == "scales" else vector)
        for side in SIDES
        for wide in (False, True)
    }
    counts = {
        side: Counter((wide, rank) for wide, rank in tables.kinds(side) if rank) for side in SIDES
    }
    bases = sum(
        widths[side, wide] * rank * count
        for side, kinds in counts.items()
        for (wide, rank), count in kinds.items()
    )
    share, least = 1.0, min(max_num_seqs, n)  # share: of what is more than one basis of each rank
    if config.core_slots is not None:
        cores = min(config.core_slots, n)
    else:
        cores = min(n, max(least, _CORE_BYTES // max(1, core)))
    budget = None if config.adapter_memory is None else config.adapter_memory - blending
    if budget is not None and bases + cores * core > budget:
        needed = sum(
            widths[side, wide] * rank for side, kinds in counts.items() for wide, rank in kinds
        )
        if config.core_slots is None:
            most = min(budget * _CORES_SHARE, budget - needed)
            cores = min(cores, max(least, int(most // core)))
        left = budget - cores * core - needed
        share = min(1.0, left / max(1, bases - needed))
        if left < 0:
            also = f" ({blending:,} of it for blends, see --max-blend)" if blending else ""
            raise ValueError(
                f"found --adapter-memory {config.adapter_memory:,} bytes, expected at least "
                f"{int(needed + cores * core + blending):,}{also}: {cores} cores and one basis of "
                f"each rank; all of the store takes {int(bases + n * core + blending):,}"
            )
    if cores < least:
        raise ValueError(
            f"found {cores} slots for cores (--core-slots), expected at least {least} "
            "(--max-num-seqs): so many adapters one step may have"
        )
    slots, uploads = {}, {}
    for side in SIDES:
        classes, first = [], 0
        for (wide, rank), count in sorted(counts[side].items()):
            classes.append(SlotClass(rank, first, 1 + int((count - 1) * share), wide))
            first += classes[-1].count
        slots[side] = tuple(classes)
        if side != "scales":
            uploads[side] = SlotClass(max_lora_rank, 0, config.max_loras)
    whole = all(c.count == counts[side][c.wide, c.rank] for side in SIDES for c in slots[side])
    return Capacity(cores + config.max_loras, slots, uploads, whole, blends, long, depth, tail)


def misfits(
    first: Store, store: Store, tables: Tables, capacity: Capacity, *, in_codes: bool
) -> list[str]:
    """Why the workers' tensors, which cannot grow, have no place for a generation.

    Args:
        first: the generation that the server started with.
        store: the other one.
        tables: of it.
        capacity: what `capacity_of` said of the first.
        in_codes: whether bases and cores of a quantised store stay codes.
    """
    old, new = first.manifest, store.manifest
    known = {module.name: (module.d_in, module.d_out, module.experts) for module in old.modules}
    other = [m.name for m in new.modules if known.get(m.name) != (m.d_in, m.d_out, m.experts)]
    faults = []
    if other:
        faults.append(f"it adapts {len(other)} modules more (such as {other[0]})")
    if new.rows > old.rows:
        faults.append(f"found {new.rows} rows an adapter, expected {old.rows} at most")
    if new.core_row > old.core_row:
        faults.append(f"found cores of {new.core_row} numbers, expected {old.core_row}")
    if in_codes and new.quantised != old.quantised:
        faults.append(f"found {new.quantised or new.dtype}, expected {old.quantised}")
    for side, wide in itertools.product(tables.ranks, (False, True)):
        most = _highest_rank(capacity, side, wide)
        found = max((rank for own, rank in tables.kinds(side) if own == wide), default=0)
        if side == "scales" and found > most:
            faults.append("found output scales, expected none")
        elif found > most:
            what = " that experts do not share" if wide else ""
            faults.append(f"found {side.upper()} of rank {found}{what}, expected {most} at most")
    return faults


def _highest_rank(capacity: Capacity, side: str, wide: bool) -> int:
    """Of a basis that has a slot: of one that experts share a wide slot will do, too."""
    return max((c.rank for c in capacity.bases[side] if c.wide >= wide), default=0)
