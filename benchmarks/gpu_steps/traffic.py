"""What a call of ours has to move and compute, by its launch plan."""

from collections.abc import Sequence

from kernel_traffic import Row, traffic

from vllm_jd.kernels.triton.plan import Plan

BETWEEN_STAGES = ("z", "h")  # written by one launch and read by the next: they stay in the L2 cache


def least(plan: Plan, slots: Sequence[int], clusters: int, rank: int) -> tuple[int, int]:
    """(bytes that must come from or go to memory, floating-point operations) of one call.

    Each basis and core that the tokens need once, x once, y read and written.

    Args:
        plan: of the launches.
        slots: adapter at each of its places; adapter a has the bases of cluster a % clusters, and a
            full core of its own in each slice; -1: none.
        clusters: how many there are.
        rank: of all rows.
    """
    slices = len(plan.shape.widths)

    def row(adapter: int, s: int) -> Row:
        cluster = adapter % clusters
        start = (s * clusters + cluster) * rank
        return Row(rank, v=start, u=cluster * rank, core=adapter * slices + s)

    tokens = [
        tuple((row(adapter, s),) for s in range(slices)) if adapter >= 0 else ()
        for adapter in slots
    ]
    moved = flops = 0
    for one in traffic(plan, tokens):
        for parts in (one.distinct, one.stored):
            moved += sum(size for name, size in parts.items() if name not in BETWEEN_STAGES)
        flops += one.flops
    return moved, flops
