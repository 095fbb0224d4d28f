"""What a call of ours has to move and compute, by its launch plan."""

from collections.abc import Sequence

from kernel_traffic import Row, traffic

from vllm_jd.kernels.triton.plan import Config, LayerShape, plan

BETWEEN_STAGES = ("z", "h")  # written by one launch and read by the next: they stay in the L2 cache


def least(
    shape: LayerShape, config: Config, slots: Sequence[int], clusters: int, rank: int
) -> tuple[int, int]:
    """(bytes that must come from or go to memory, floating-point operations) of one call.

    Each basis and core that the tokens need once, x once, y read and written.

    Args:
        shape: of the layer.
        config: of the launches.
        slots: adapter of each token, in the order in which tiles take them; adapter a has the bases
            of cluster a % clusters, and a full core of its own in each slice.
        clusters: how many there are.
        rank: of all rows.
    """
    slices = len(shape.widths)

    def row(adapter: int, s: int) -> Row:
        cluster = adapter % clusters
        start = (s * clusters + cluster) * rank
        return Row(rank, v=start, u=cluster * rank, core=adapter * slices + s)

    tokens = [tuple((row(adapter, s),) for s in range(slices)) for adapter in slots]
    moved = flops = 0
    for one in traffic(plan(shape, len(slots), config), tokens):
        for parts in (one.distinct, one.stored):
            moved += sum(size for name, size in parts.items() if name not in BETWEEN_STAGES)
        flops += one.flops
    return moved, flops
