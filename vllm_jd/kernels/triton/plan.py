"""What a call of the Triton backend launches.

Plain Python: no Triton, no GPU. The dispatcher launches exactly this plan. A plan depends on the
number of tokens and on the shapes of the pools alone, never on which adapters the tokens have: that
is why one CUDA graph serves any mix of adapters.
"""

import functools
from dataclasses import dataclass, field
from types import MappingProxyType

from vllm_jd import row
from vllm_jd.kernels import tiles

Constants = MappingProxyType[str, int | bool]

MAX_BLOCK_R = 64
"""Basis vectors that a program holds at once: higher ranks are cut into chunks of so many."""
MAX_SPLITS = 16
MAX_REGISTERS = 255
MAX_WARPS = 8
"""Of a program whose threads may have that many registers."""
MAX_TILE = (8192, 4096)
"""Numbers of a basis that a program holds at once, in tiles of 16 and of 64 tokens."""
STEP_BYTES = 2
"""Of the step of a block of codes, bfloat16."""


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
        long_depth: the rows that an adapter of `ModulePools.long_rows` may have for one slice; 0:
            there are none of those.

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
    long_depth: int = 0

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
        """Rows of all slices: products that a token may take part in, but for those of long
        rows, which the same programs see to."""
        return len(self.widths) * self.depth

    @property
    def scratch_rows(self) -> int:
        """The same with those: so many have a place in z and h."""
        return len(self.widths) * max(self.depth, self.long_depth)

    def core_bytes(self, numbers: int) -> int:
        """Bytes of so many numbers of cores. Of codes, each counts its part of its step, and of
        its byte: the lanes of a warp that read one address at once are served once."""
        if not self.core_bits:
            return numbers * self.element_size
        return cdiv(numbers * (self.core_bits * row.BLOCK + 8 * STEP_BYTES), 8 * row.BLOCK)

    @property
    def block_r(self) -> int:
        """Basis vectors a program takes at once: a power of two from 16 to `MAX_BLOCK_R`."""
        return min(MAX_BLOCK_R, max(16, 1 << (self.max_rank - 1).bit_length()))

    @property
    def chunks(self) -> int:
        """Chunks of `block_r` basis vectors that `max_rank` is cut into."""
        return cdiv(self.max_rank, self.block_r)


@dataclass(frozen=True)
class Config:
    """What may be tuned without a change of meaning.

    Args:
        name: for reports.
        row_tokens: up to so many tokens a program serves one token (no tensor cores; in the shrink
            stage one input of tokens); with more, a tile of tokens (`kernels.tiles`).
        small_tile_tokens: up to so many tokens a tile has 16 of them, above 64.
        programs: d_in is split until a launch has about so many programs (an H100 has 132 SMs, each
            of which holds several), in rows and tiles of 16, and in tiles of 64 tokens. What a
            program reads one after the other it waits for.
        fuse_bytes: of the row variant: cores are applied inside the expand stage while all its
            programs together read at most so many bytes of cores (from L2); beyond, a launch of
            their own is cheaper.
        row_elements: numbers of a basis that a program of the row variant holds at once.
        tile_k: columns of d_in at once, in tiles of 16 and of 64 tokens.
        tile_n: columns of d_out at once, in tiles of 16 and of 64 tokens.
        warps: in tiles of 16 and of 64 tokens; the row variant has 4 warps.
        stages: of the loads that run ahead in the shrink stage.
    """

    name: str
    row_tokens: int = 32
    small_tile_tokens: int = tiles.SMALL_TOKENS
    programs: tuple[int, int] = (528, 264)
    fuse_bytes: int = 4 << 20
    row_elements: int = 4096
    tile_k: tuple[int, int] = (128, 128)
    tile_n: tuple[int, int] = (256, 128)
    warps: tuple[int, int] = (2, 4)
    stages: int = 3


DEFAULT = Config("default")
CONFIGS: tuple[Config, ...] = (
    DEFAULT,
    Config("fewer splits", programs=(264, 132)),
    Config("more splits", programs=(1056, 528)),
    Config("long rows", row_elements=8192),
    Config("narrow", tile_n=(128, 64)),
    Config("more warps", warps=(4, 8)),
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

    Tiles take the tokens from `places`; programs of the row variant take each token once.
    z is [splits, n_tokens, scratch_rows, scratch_width] float32, h the same without splits. Where
    `has_mix`, a launch of its own turns z into h; else z is read by the stage that applies the
    cores (`fused_expand`), or already holds h, from the stage that applied them (`fused_shrink`).
    """

    shape: LayerShape
    config: Config
    n_tokens: int
    places: int
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
        return self.splits, self.n_tokens, self.shape.scratch_rows, self.scratch_width

    @property
    def h_shape(self) -> tuple[int, int, int] | None:
        """Shape of h, float32; None where no launch of its own makes it."""
        return self.z_shape[1:] if self.has_mix else None


def cdiv(a: int, b: int) -> int:
    """⌈a / b⌉."""
    return -(-a // b)


@functools.lru_cache(maxsize=4096)
def plan(
    shape: LayerShape,
    n_tokens: int,
    config: Config = DEFAULT,
    fan: int = 1,
    places: int | None = None,
) -> Plan:
    """The launches of `add_adapters` for n_tokens tokens on a layer of that shape, of which `fan`
    neighbours each have one input.

    Args:
        shape: of the layer.
        n_tokens: tokens.
        config: what may be tuned.
        fan: tokens of one input.
        places: of the order in which tiles take the tokens; None: one for each token.

    Raises:
        ValueError: n_tokens or places is not positive, or no multiple of fan.
    """
    places = n_tokens if places is None else places
    for name, number in (("n_tokens", n_tokens), ("places", places)):
        if number < 1 or number % fan:
            raise ValueError(f"{name} must be a positive multiple of {fan}, got {number}")
    # Tensor cores would round float32: these pools are served by the row variant.
    if n_tokens <= config.row_tokens or shape.element_size == 4:
        return _plan_rows(shape, n_tokens, config, fan)
    return _plan_tiles(shape, n_tokens, config, fan, places)


def _split(shape: LayerShape, wanted: int, programs: int, block: int) -> tuple[int, int]:
    """(splits of d_in, columns of each) so that a launch has about `wanted` programs."""
    most = min(MAX_SPLITS, cdiv(shape.d_in, block))
    splits = max(1, min(most, cdiv(wanted, programs)))
    width = cdiv(cdiv(shape.d_in, splits), block) * block
    return cdiv(shape.d_in, width), width


def column_blocks(shape: LayerShape, block: int) -> int:
    """Blocks of that many columns in all slices; no block has columns of two."""
    return sum(cdiv(width, block) for width in shape.widths)


def _fuses_into_expand(shape: LayerShape, n_tokens: int, blocks: int, config: Config) -> bool:
    if shape.chunks > 1:
        return False
    cores = shape.core_bytes(n_tokens * blocks * shape.depth * shape.max_rank**2)
    return cores <= config.fuse_bytes


def _mix(shape: LayerShape, n_tokens: int) -> Launch:
    constants = {"BLOCK_R": shape.block_r, "CORE_BITS": shape.core_bits, "LONG": _long(shape)}
    # A warp is enough for a small core, and needs no barrier.
    warps = min(4, shape.block_r // 16)
    return Launch("mix_rows", (n_tokens, shape.rows, shape.chunks), warps, 1, _frozen(constants))


def _long(shape: LayerShape) -> bool:
    return shape.long_depth > 0


def _frozen(constants: dict[str, int | bool]) -> Constants:
    return MappingProxyType(constants)


def _plan_rows(shape: LayerShape, n_tokens: int, config: Config, fan: int) -> Plan:
    block_r = shape.block_r
    block_k = max(64, config.row_elements // block_r)
    block_n = max(64, config.row_elements // block_r)
    inputs = n_tokens // fan
    programs = inputs * shape.rows * shape.chunks
    splits, width = _split(shape, config.programs[0], programs, block_k)
    blocks = column_blocks(shape, block_n)
    fused = _fuses_into_expand(shape, n_tokens, blocks, config)
    common = {"BLOCK_R": block_r, "HAS_INT8": shape.int8, "LONG": _long(shape)}
    shrink = Launch(
        "shrink_rows",
        (inputs, shape.rows * shape.chunks, splits),
        4,
        config.stages,
        _frozen(common | {"BLOCK_K": block_k, "FAN": fan}),
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
    return Plan(shape, config, n_tokens, n_tokens, 1, splits, width, not fused, launches)


def _plan_tiles(shape: LayerShape, n_tokens: int, config: Config, fan: int, places: int) -> Plan:
    small = n_tokens <= config.small_tile_tokens
    block_m, size = (16, 0) if small else (64, 1)
    most = MAX_TILE[size] // shape.block_r
    block_k, block_n = min(config.tile_k[size], most), min(config.tile_n[size], most)
    crowded = shape.chunks > 1 or shape.block_r > 16 or shape.scales or shape.int8 or _long(shape)
    if crowded:
        # Sums, vectors and scales of one tile have to wait in registers together.
        block_n = max(row.BLOCK, block_n // 2)
    tiles, input_tiles = cdiv(places, block_m), cdiv(places // fan, block_m)
    programs = input_tiles * shape.rows * shape.chunks
    splits, width = _split(shape, config.programs[size], programs, block_k)
    blocks = column_blocks(shape, block_n)
    fused_shrink = splits == 1 and shape.chunks == 1
    warps = config.warps[size]
    if shape.block_r > 16 and (shape.int8 or _long(shape)):
        warps = min(MAX_WARPS, 2 * warps)  # what is decoded, or looked for, needs registers, too
    common = {"BLOCK_M": block_m, "BLOCK_R": shape.block_r, "HAS_INT8": shape.int8}
    common["LONG"] = _long(shape)
    shrink = Launch(
        "shrink_tiles",
        (shape.rows * shape.chunks, input_tiles, splits),
        warps,
        config.stages,
        _frozen(
            common
            | {
                "BLOCK_K": block_k,
                "FUSE_MIX": fused_shrink,
                "CORE_BITS": shape.core_bits if fused_shrink else 0,
                "FAN": fan,
            }
        ),
    )
    expand = Launch(
        "expand_tiles",
        (blocks, tiles, 1),
        config.warps[size],
        config.stages,
        _frozen(common | {"BLOCK_N": block_n, "HAS_SCALES": shape.scales}),
    )
    middle = () if fused_shrink else (_mix(shape, n_tokens),)
    launches = (shrink, *middle, expand)
    return Plan(shape, config, n_tokens, places, block_m, splits, width, bool(middle), launches)
