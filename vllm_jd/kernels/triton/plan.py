"""What a call of the Triton backend launches, and what that moves and computes.

Plain Python: no Triton, no GPU. The dispatcher launches exactly this plan, and the roofline is
computed from it. A plan depends on the number of tokens and on the shapes of the pools alone, never
on which adapters the tokens have: that is why one CUDA graph serves any mix of adapters.
"""

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType

Constants = MappingProxyType[str, int | bool]

MAX_BLOCK_R = 64
"""Basis vectors that a program holds at once: higher ranks are cut into chunks of so many."""
STEP_COLUMNS = 32
"""Columns of an int8 basis, and entries of a core in codes, that share one step."""
MAX_SPLITS = 16
MAX_FUSED_R = 32
"""Up to this rank a tile of tokens holds all their cores at once in registers."""
MAX_REGISTERS = 255
MAX_TILE = (8192, 4096)
"""Numbers of a basis that a program holds at once, in tiles of 16 and of 64 tokens."""
CODE_BYTES, STEP_BYTES, SCRATCH_BYTES = 1, 2, 4  # int8 codes, bfloat16 steps, float32 z and h


@dataclass(frozen=True)
class LayerShape:
    """The shape of one layer's `ModulePools`, as far as a plan depends on it.

    Args:
        d_in: width of the layer's input.
        widths: d_out of each slice (q, k, v; gate, up; o).
        depth: K, the rows that an adapter may have for one slice.
        max_rank: the largest rank that a row may have.
        element_size: bytes of one number of x, y, bases, cores and scales: 2 or 4.
        int8: whether bases may lie in int8 rows.
        scales: whether rows may have an output scale.
        core_bits: bits of a code where cores are codes, 8 or 4; 0 where they are numbers.

    Raises:
        ValueError: a size is not positive, or element_size or core_bits is not one of those.
    """

    d_in: int
    widths: tuple[int, ...]
    depth: int = 1
    max_rank: int = 16
    element_size: int = 2
    int8: bool = False
    scales: bool = False
    core_bits: int = 0

    def __post_init__(self) -> None:
        if not self.widths or min(self.d_in, *self.widths, self.depth, self.max_rank) < 1:
            raise ValueError(f"all sizes of a layer must be positive, got {self}")
        if self.element_size not in (2, 4):
            raise ValueError(
                f"element_size must be 2 (bfloat16, float16) or 4 (float32), not "
                f"{self.element_size}: the Triton kernels have no other type"
            )
        if self.core_bits not in (0, 8, 4):
            raise ValueError(f"core_bits must be 0, 8 or 4, not {self.core_bits}")

    @property
    def rows(self) -> int:
        """Rows of all slices: products that a token may take part in."""
        return len(self.widths) * self.depth

    def core_bytes(self, numbers: int) -> int:
        """Bytes of so many numbers of cores. Of codes, each counts its part of its step, and of
        its byte: the lanes of a warp that read one address at once are served once."""
        if not self.core_bits:
            return numbers * self.element_size
        return _cdiv(numbers * (self.core_bits * STEP_COLUMNS + 8 * STEP_BYTES), 8 * STEP_COLUMNS)

    @property
    def block_r(self) -> int:
        """Basis vectors a program takes at once: a power of two from 16 to `MAX_BLOCK_R`."""
        return min(MAX_BLOCK_R, max(16, 1 << (self.max_rank - 1).bit_length()))

    @property
    def chunks(self) -> int:
        """Chunks of `block_r` basis vectors that `max_rank` is cut into."""
        return _cdiv(self.max_rank, self.block_r)


@dataclass(frozen=True)
class Config:
    """What may be tuned without a change of meaning.

    Args:
        name: for reports.
        row_tokens: up to so many tokens a program serves one token (no tensor cores); with more,
            a tile of tokens. A tile goes through its clusters one after the other, so that few
            tokens of many clusters wait less without it (benchmarks/roofline.py).
        small_tile_tokens: up to so many tokens a tile has 16 of them, above 64.
        programs: d_in is split until a launch has about so many programs (an H100 has 132 SMs).
        fuse_bytes: cores are applied inside the expand stage while all its programs together
            read at most so many bytes of cores (from L2); beyond, a launch of their own is cheaper.
        row_elements: numbers of a basis that a program of the row variant holds at once.
        tile_k: columns of d_in at once, in tiles of 16 and of 64 tokens.
        tile_n: columns of d_out at once, in tiles of 16 and of 64 tokens.
        warps: in tiles of 16 and of 64 tokens; the row variant has 4 warps.
        stages: of the loads that run ahead in the shrink stage.
    """

    name: str
    row_tokens: int = 64
    small_tile_tokens: int = 256
    programs: int = 264
    fuse_bytes: int = 4 << 20
    row_elements: int = 4096
    tile_k: tuple[int, int] = (128, 64)
    tile_n: tuple[int, int] = (128, 128)
    warps: tuple[int, int] = (4, 8)
    stages: int = 3


DEFAULT = Config("default")
CONFIGS: tuple[Config, ...] = (
    DEFAULT,
    Config("row limit 16", row_tokens=16),
    Config("unfused", fuse_bytes=0),
    Config("more splits", programs=528),
    Config("narrow", tile_k=(64, 64), tile_n=(64, 64), stages=4),
    Config("wide", tile_k=(128, 128)),
)
"""What ships: `make gpu-check` tries these, and the tests compile each of them."""


@dataclass(frozen=True)
class Launch:
    """One kernel launch: its name in `kernels.py`, its grid, and what it is specialised on."""

    kernel: str
    grid: tuple[int, int, int]
    num_warps: int
    num_stages: int
    constants: Constants = field(hash=False)

    @property
    def options(self) -> dict[str, int | bool]:
        """What Triton is told besides: multiplications and additions may be fused, and a thread
        may have all registers that there are (left to itself, ptxas spills a few bytes here and
        there to let more programs run at once)."""
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        return options | {"maxnreg": MAX_REGISTERS, "enable_fp_fusion": True}


@dataclass(frozen=True)
class Plan:
    """The launches of one call, in order, with the scratch memory between them.

    z is [splits, n_tokens, rows, scratch_width] float32, h the same without splits. Where
    `has_mix`, a launch of its own turns z into h; else z is read by the stage that applies the
    cores (`fused_expand`), or already holds h, from the stage that applied them (`fused_shrink`).
    """

    shape: LayerShape
    config: Config
    n_tokens: int
    block_m: int
    splits: int
    split_width: int
    has_mix: bool
    launches: tuple[Launch, ...]

    @property
    def variant(self) -> str:
        """`rows` (a program serves a token) or `tiles` (a program serves block_m tokens)."""
        return "rows" if self.block_m == 1 else "tiles"

    @property
    def scratch_width(self) -> int:
        """float32 numbers of a token's z for one row."""
        return self.shape.chunks * self.shape.block_r

    @property
    def z_shape(self) -> tuple[int, int, int, int]:
        """Shape of z, float32."""
        return self.splits, self.n_tokens, self.shape.rows, self.scratch_width

    @property
    def h_shape(self) -> tuple[int, int, int] | None:
        """Shape of h, float32; None where no launch of its own makes it."""
        return self.z_shape[1:] if self.has_mix else None


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


@functools.lru_cache(maxsize=4096)
def plan(shape: LayerShape, n_tokens: int, config: Config = DEFAULT) -> Plan:
    """The launches of `add_adapters` for n_tokens tokens on a layer of that shape.

    Raises:
        ValueError: n_tokens is not positive.
    """
    if n_tokens < 1:
        raise ValueError(f"n_tokens must be positive, got {n_tokens}")
    # Tensor cores would round float32: these pools are served by the row variant.
    rows_variant = n_tokens <= config.row_tokens or shape.element_size == 4
    make = _plan_rows if rows_variant else _plan_tiles
    return make(shape, n_tokens, config)


def _split(shape: LayerShape, config: Config, programs: int, block: int) -> tuple[int, int]:
    """(splits of d_in, columns of each) so that a launch has about `config.programs` programs."""
    most = min(MAX_SPLITS, _cdiv(shape.d_in, 2 * block))
    splits = max(1, min(most, _cdiv(config.programs, programs)))
    width = _cdiv(_cdiv(shape.d_in, splits), block) * block
    return _cdiv(shape.d_in, width), width


def column_blocks(shape: LayerShape, block: int) -> int:
    """Blocks of that many columns in all slices; no block has columns of two."""
    return sum(_cdiv(width, block) for width in shape.widths)


def _fuses_into_expand(shape: LayerShape, n_tokens: int, blocks: int, config: Config) -> bool:
    if shape.chunks > 1:
        return False
    cores = shape.core_bytes(n_tokens * blocks * shape.depth * shape.max_rank**2)
    return cores <= config.fuse_bytes


def _mix(shape: LayerShape, n_tokens: int) -> Launch:
    constants = {"BLOCK_R": shape.block_r, "CORE_BITS": shape.core_bits}
    return Launch("mix_rows", (n_tokens, shape.rows, shape.chunks), 4, 1, _frozen(constants))


def _frozen(constants: dict[str, int | bool]) -> Constants:
    return MappingProxyType(constants)


def _plan_rows(shape: LayerShape, n_tokens: int, config: Config) -> Plan:
    block_r = shape.block_r
    block_k = max(64, config.row_elements // block_r)
    block_n = max(64, config.row_elements // block_r)
    programs = n_tokens * shape.rows * shape.chunks
    splits, width = _split(shape, config, programs, block_k)
    blocks = column_blocks(shape, block_n)
    fused = _fuses_into_expand(shape, n_tokens, blocks, config)
    common = {"BLOCK_R": block_r, "HAS_INT8": shape.int8}
    shrink = Launch(
        "shrink_rows",
        (n_tokens, shape.rows * shape.chunks, splits),
        4,
        config.stages,
        _frozen(common | {"BLOCK_K": block_k}),
    )
    expand = Launch(
        "expand_rows",
        (n_tokens, blocks, 1),
        4,
        1,
        _frozen(
            common
            | {
                "BLOCK_N": block_n,
                "HAS_SCALES": shape.scales,
                "FUSE_MIX": fused,
                "CORE_BITS": shape.core_bits if fused else 0,
            }
        ),
    )
    middle = () if fused else (_mix(shape, n_tokens),)
    launches = (shrink, *middle, expand)
    return Plan(shape, config, n_tokens, 1, splits, width, not fused, launches)


def _plan_tiles(shape: LayerShape, n_tokens: int, config: Config) -> Plan:
    small = n_tokens <= config.small_tile_tokens
    block_m, size = (16, 0) if small else (64, 1)
    most = MAX_TILE[size] // shape.block_r
    block_k, block_n = min(config.tile_k[size], most), min(config.tile_n[size], most)
    if shape.chunks > 1 and not small:
        # Sums of one chunk wait in registers for those of the next.
        block_n = max(STEP_COLUMNS, block_n // 2)
    tiles = _cdiv(n_tokens, block_m)
    splits, width = _split(shape, config, tiles * shape.rows * shape.chunks, block_k)
    blocks = column_blocks(shape, block_n)
    fused_shrink = splits == 1 and shape.chunks == 1
    fused_expand = (
        not fused_shrink
        and small
        and shape.block_r <= MAX_FUSED_R
        and _fuses_into_expand(shape, n_tokens, blocks, config)
    )
    common = {"BLOCK_M": block_m, "BLOCK_R": shape.block_r, "HAS_INT8": shape.int8}
    shrink = Launch(
        "shrink_tiles",
        (shape.rows * shape.chunks, tiles, splits),
        config.warps[size],
        config.stages,
        _frozen(
            common
            | {
                "BLOCK_K": block_k,
                "FUSE_MIX": fused_shrink,
                "CORE_BITS": shape.core_bits if fused_shrink else 0,
            }
        ),
    )
    expand = Launch(
        "expand_tiles",
        (blocks, tiles, 1),
        config.warps[size],
        config.stages,
        _frozen(
            common
            | {
                "BLOCK_N": block_n,
                "HAS_SCALES": shape.scales,
                "FUSE_MIX": fused_expand,
                "CORE_BITS": shape.core_bits if fused_expand else 0,
            }
        ),
    )
    has_mix = not fused_shrink and not fused_expand
    middle = (_mix(shape, n_tokens),) if has_mix else ()
    launches = (shrink, *middle, expand)
    return Plan(shape, config, n_tokens, block_m, splits, width, has_mix, launches)


# ---------------------------------------------------------------- what a plan moves


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
        tokens: [n_tokens] in the order in which tiles take them.

    Returns:
        One for each of `plan.launches`.

    Raises:
        ValueError: another number of tokens than the plan's, or rows that do not fit the shape.
    """
    if len(tokens) != plan.n_tokens:
        raise ValueError(f"the plan is for {plan.n_tokens} tokens, got {len(tokens)}")
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
        return rank * (columns * CODE_BYTES + _cdiv(columns, STEP_COLUMNS) * STEP_BYTES)
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
                    chunks = _cdiv(rank, shape.block_r)
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
                chunks = _cdiv(row.rank, shape.block_r) if full else 1
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
    fused = bool(launch.constants["FUSE_MIX"])
    block = int(launch.constants["BLOCK_N"])
    source = "h" if plan.has_mix else "z"
    splits = plan.splits if fused else 1
    loaded = {source: 0, "u": 0, "cores": 0, "scales": 0, "y": 0}
    distinct = dict.fromkeys(loaded, 0)
    flops = executed = core_loads = 0
    products = 1 if plan.variant == "rows" else 2  # tensor cores take h in two parts
    cores: dict[object, int] = {}
    for s, width in enumerate(shape.widths):
        parts = _parts(width, block)
        bases: set[tuple[int, int, bool]] = set()
        scales: set[int] = set()
        for tile in _tiles(plan, tokens):
            active = sum(1 for rows in tile if rows and any(row.rank for row in rows[s]))
            loaded["y"] += active * width * size
            for k in range(shape.depth):
                rows = _slice_rows(tile, s, k)
                groups = {(row.u, row.rank, row.u_int8) for row in rows}
                bases |= groups
                for _, rank, int8 in groups:
                    chunks = _cdiv(rank, shape.block_r)
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
    return Traffic(loaded, {"y": loaded["y"]}, distinct, flops, executed)


def variants(
    config: Config, *, element_size: int = 2, core_bits: Sequence[int] = (0,)
) -> list[tuple[Plan, Launch]]:
    """Each kernel of a configuration, once for each way in which it may be specialised.

    What `benchmarks/kernels_compiled.py` and the tests compile, with an example of a plan in which
    it is launched: q, k and v of Mistral-7B.

    Args:
        config: of the launches.
        element_size: as in `LayerShape`.
        core_bits: as in `LayerShape`, all that are wanted. Those who have cores in codes have
            bases in 8 bits too, and ranks that need no chunks.
    """
    base = LayerShape(4096, (4096, 1024, 1024), element_size=element_size, scales=True)
    shapes = [
        replace(base, max_rank=max_rank, int8=int8, core_bits=bits)
        for bits in core_bits
        for max_rank in (16, 32, 64, 256)
        for int8 in (False, True)
        if not bits or (int8 and max_rank <= MAX_BLOCK_R)
    ]
    found: dict[tuple[object, ...], tuple[Plan, Launch]] = {}
    for shape in shapes:
        for n_tokens in (1, 16, 17, 64, 65, 256, 257, 1024, 8192):
            one = plan(shape, n_tokens, config)
            for launch in one.launches:
                constants = tuple(sorted(launch.constants.items()))
                key = (launch.kernel, launch.num_warps, launch.num_stages, constants)
                key += (shape.chunks > 1,)  # Triton compiles an argument of 1 in
                found.setdefault(key, (one, launch))
    return list(found.values())
