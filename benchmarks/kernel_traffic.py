"""What the Triton kernels of a launch plan load, store and compute: the roofline is made of it.

Nothing runs. That these are the bytes which the kernels load and store is tested, byte by byte
(tests/kernels/triton/interpreted/check_traffic.py).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from vllm_jd.kernels.triton.plan import STEP_BYTES, Launch, LayerShape, Plan, cdiv
from vllm_jd.row import BLOCK

CODE_BYTES, SCRATCH_BYTES = 1, 4  # int8 codes; float32 z and h


@dataclass(frozen=True)
class Row:
    """One row of a token: which basis vectors and core it uses. rank 0: unused.

    Args:
        rank: of the row.
        v, u: first basis vector in the pool of V, and of U of the slice (any numbers that are
            equal where the bases are).
        core: what names the core, or None for none; `diagonal` says which kind it is.
        scale: what names the output scale, or None.
        v_int8, u_int8: whether that basis lies in int8 rows.
    """

    rank: int
    v: int = 0
    u: int = 0
    core: int | None = None
    diagonal: bool = False
    scale: int | None = None
    v_int8: bool = False
    u_int8: bool = False


UNUSED = Row(0)
TokenRows = tuple[tuple[Row, ...], ...]
"""A token's rows, [slice][k]; the empty tuple for a token without an adapter."""


@dataclass
class Traffic:
    """What one launch moves and computes.

    Args:
        loaded: bytes that the programs load, by what is loaded: most from L2, for they share it.
        stored: bytes stored.
        distinct: of what is loaded, each byte counted once: what has to come from memory.
        flops: multiplications and additions that are needed.
        executed: those that the tiles execute, padding and masked tokens included.
    """

    loaded: dict[str, int]
    stored: dict[str, int]
    distinct: dict[str, int]
    flops: int = 0
    executed: int = 0

    @property
    def loaded_bytes(self) -> int:
        """All bytes loaded."""
        return sum(self.loaded.values())

    @property
    def stored_bytes(self) -> int:
        """All bytes stored."""
        return sum(self.stored.values())

    @property
    def distinct_bytes(self) -> int:
        """All distinct bytes loaded."""
        return sum(self.distinct.values())


def uniform_content(
    shape: LayerShape,
    n_tokens: int,
    adapters: int,
    clusters: int,
    *,
    rank: int | None = None,
    core: str = "full",
    int8: bool | None = None,
) -> list[TokenRows]:
    """Tokens that are spread evenly over adapters, and adapters over clusters, in cluster order.

    Args:
        shape: of the layer.
        n_tokens: all have an adapter.
        adapters: distinct ones among the tokens, at most n_tokens count.
        clusters: distinct ones among the adapters; equal to `adapters` for uncompressed ones.
        rank: of all rows; the shape's largest by default.
        core: `full`, `diagonal` or `none`.
        int8: whether bases lie in int8 rows; as the shape says by default.

    Raises:
        ValueError: an unknown kind of core.
    """
    if core not in ("full", "diagonal", "none"):
        raise ValueError(f"core must be full, diagonal or none, not {core!r}")
    rank = shape.max_rank if rank is None else rank
    int8 = shape.int8 if int8 is None else int8
    picks = sorted((t % adapters % clusters, t % adapters) for t in range(n_tokens))

    def row(cluster: int, adapter: int, s: int, k: int) -> Row:
        basis = (cluster * len(shape.widths) + s) * shape.depth + k
        name = (adapter * len(shape.widths) + s) * shape.depth + k
        return Row(
            rank,
            v=basis * rank,
            u=basis * rank,
            core=None if core == "none" else name,
            diagonal=core == "diagonal",
            v_int8=int8,
            u_int8=int8,
        )

    return [
        tuple(tuple(row(c, a, s, k) for k in range(shape.depth)) for s in range(len(shape.widths)))
        for c, a in picks
    ]


def traffic(plan: Plan, tokens: Sequence[TokenRows]) -> list[Traffic]:
    """What each launch of the plan loads, stores and computes for these tokens.

    Counted as the kernels are written: numbers of x, V, U, cores, scales, z, h and y that are
    not masked (of cores in codes as `LayerShape.core_bytes` says). The indices that a program
    reads first (slots, rows, the table of slices; under 200 bytes a token and program) are not
    counted.

    Args:
        plan: of `plan`.
        tokens: [places] in the order in which tiles take them; of a place that is empty as of a
            token without an adapter.

    Returns:
        One for each of `plan.launches`.

    Raises:
        ValueError: another number of tokens than the plan's, or rows that do not fit the shape.
    """
    if len(tokens) != plan.places:
        raise ValueError(f"the plan is for {plan.places} tokens, got {len(tokens)}")
    shape = plan.shape
    for rows in tokens:
        if rows and [len(r) for r in rows] != [shape.depth] * len(shape.widths):
            raise ValueError(f"a token needs {len(shape.widths)} slices of {shape.depth} rows")
    count = {
        "shrink_rows": _count_shrink,
        "shrink_tiles": _count_shrink,
        "mix_rows": _count_mix,
        "expand_rows": _count_expand,
        "expand_tiles": _count_expand,
    }
    return [count[launch.kernel](plan, launch, tokens) for launch in plan.launches]


def _tiles(plan: Plan, tokens: Sequence[TokenRows]) -> list[Sequence[TokenRows]]:
    return [tokens[i : i + plan.block_m] for i in range(0, len(tokens), plan.block_m)]


def _slice_rows(tokens: Iterable[TokenRows], s: int, k: int) -> list[Row]:
    """Row (s, k) of each token that has one in use."""
    return [rows[s][k] for rows in tokens if rows and rows[s][k].rank > 0]


def _basis_bytes(shape: LayerShape, rank: int, columns: int, int8: bool) -> int:
    """Bytes of `columns` columns, from a multiple of 32 on, of rank basis vectors."""
    if int8:
        return rank * (columns * CODE_BYTES + cdiv(columns, BLOCK) * STEP_BYTES)
    return rank * columns * shape.element_size


def _parts(total: int, part: int) -> list[int]:
    return [min(part, total - i) for i in range(0, total, part)]


def _core_numbers(row: Row) -> int:
    if row.core is None:
        return 0
    return row.rank if row.diagonal else row.rank**2


def _count_shrink(plan: Plan, launch: Launch, tokens: Sequence[TokenRows]) -> Traffic:
    shape, size = plan.shape, plan.shape.element_size
    fused = bool(launch.constants.get("FUSE_MIX", False))
    loaded = {"x": 0, "v": 0, "cores": 0}
    stored = flops = executed = core_loads = 0
    bases: set[tuple[int, int, bool]] = set()
    cores: dict[object, int] = {}
    parts = _parts(shape.d_in, plan.split_width)
    for tile in _tiles(plan, tokens):
        for s in range(len(shape.widths)):
            for k in range(shape.depth):
                rows = _slice_rows(tile, s, k)
                groups = {(row.v, row.rank, row.v_int8) for row in rows}
                bases |= groups
                for _, rank, int8 in groups:
                    members = sum(
                        1 for row in rows if (row.v, row.rank, row.v_int8) == (_, rank, int8)
                    )
                    chunks = cdiv(rank, shape.block_r)
                    loaded["x"] += chunks * members * shape.d_in * size
                    loaded["v"] += sum(_basis_bytes(shape, rank, part, int8) for part in parts)
                    executed += 2 * plan.block_m * chunks * shape.block_r * shape.d_in
                for row in rows:
                    stored += row.rank * SCRATCH_BYTES * plan.splits
                    flops += 2 * row.rank * shape.d_in
                if fused:
                    core_loads += _core_loads(rows)
                    for row in rows:
                        cores[row.core, row.rank, row.diagonal] = _core_numbers(row)
                        flops += 2 * _core_numbers(row)
    loaded["cores"] = shape.core_bytes(core_loads)
    active = sum(1 for rows in tokens if any(r.rank for part in rows for r in part))
    distinct = {
        "x": active * shape.d_in * size,
        "v": sum(_basis_bytes(shape, rank, shape.d_in, int8) for _, rank, int8 in bases),
        "cores": shape.core_bytes(sum(cores.values())),
    }
    return Traffic(loaded, {"z": stored}, distinct, flops, executed)


def _core_loads(rows: Sequence[Row]) -> int:
    """Numbers of cores that a tile loads: a diagonal for each token, a full core once."""
    full = {(row.core, row.rank) for row in rows if row.core is not None and not row.diagonal}
    diagonal = sum(row.rank for row in rows if row.core is not None and row.diagonal)
    return diagonal + sum(rank**2 for _, rank in full)


def _count_mix(plan: Plan, launch: Launch, tokens: Sequence[TokenRows]) -> Traffic:
    shape = plan.shape
    z = h = core_loads = flops = 0
    cores: dict[object, int] = {}
    for s in range(len(shape.widths)):
        for k in range(shape.depth):
            for row in _slice_rows(tokens, s, k):
                full = row.core is not None and not row.diagonal
                chunks = cdiv(row.rank, shape.block_r) if full else 1
                z += chunks * plan.splits * row.rank * SCRATCH_BYTES
                h += row.rank * SCRATCH_BYTES
                core_loads += _core_numbers(row)
                cores[s, k, row.core, row.rank, row.diagonal] = _core_numbers(row)
                flops += 2 * _core_numbers(row)
    distinct = {"z": plan.splits * h, "cores": shape.core_bytes(sum(cores.values()))}
    loaded = {"z": z, "cores": shape.core_bytes(core_loads)}
    return Traffic(loaded, {"h": h}, distinct, flops, flops)


def _count_expand(plan: Plan, launch: Launch, tokens: Sequence[TokenRows]) -> Traffic:
    shape, size = plan.shape, plan.shape.element_size
    fused = bool(launch.constants.get("FUSE_MIX", False))
    block = int(launch.constants["BLOCK_N"])
    source = "h" if plan.has_mix else "z"
    splits = plan.splits if fused else 1
    loaded = {source: 0, "u": 0, "cores": 0, "scales": 0, "y": 0}
    distinct = dict.fromkeys(loaded, 0)
    flops = executed = core_loads = stored = 0
    products = 1 if plan.variant == "rows" else 2  # tensor cores take h in two parts
    cores: dict[object, int] = {}
    for s, width in enumerate(shape.widths):
        parts = _parts(width, block)
        bases: set[tuple[int, int, bool]] = set()
        scales: set[int] = set()
        for tile in _tiles(plan, tokens):
            active = sum(1 for rows in tile if rows and any(row.rank for row in rows[s]))
            stored += active * width * size
            loaded["y"] += sum(1 for rows in tile if rows) * width * size
            for k in range(shape.depth):
                rows = _slice_rows(tile, s, k)
                groups = {(row.u, row.rank, row.u_int8) for row in rows}
                bases |= groups
                for _, rank, int8 in groups:
                    chunks = cdiv(rank, shape.block_r)
                    loaded["u"] += sum(_basis_bytes(shape, rank, part, int8) for part in parts)
                    numbers = plan.block_m * chunks * shape.block_r * len(parts) * block
                    executed += 2 * products * numbers
                for row in rows:
                    loaded[source] += len(parts) * splits * row.rank * SCRATCH_BYTES
                    distinct[source] += splits * row.rank * SCRATCH_BYTES
                    flops += 2 * row.rank * width
                    if row.scale is not None:
                        scales.add(row.scale)
                        loaded["scales"] += width * size
                    if fused:
                        core_loads += len(parts) * _core_numbers(row)
                        cores[s, k, row.core, row.rank, row.diagonal] = _core_numbers(row)
                        flops += 2 * _core_numbers(row)
        distinct["u"] += sum(_basis_bytes(shape, rank, width, int8) for _, rank, int8 in bases)
        distinct["scales"] += len(scales) * width * size
    distinct["y"] = loaded["y"]
    loaded["cores"] = shape.core_bytes(core_loads)
    distinct["cores"] = shape.core_bytes(sum(cores.values()))
    return Traffic(loaded, {"y": stored}, distinct, flops, executed)
