"""`--fully-sharded-loras`: a layer's adapters spread over the workers of tensor parallelism.

Without it V is whole on each worker in column-parallel layers, and U in row-parallel ones. With it
nothing is, as in S-LoRA (Sheng et al., 2023, section 5) and vLLM's own sharded layers:

- column-parallel (q, k, v, gate, up): each worker has its share of the ranks of V and computes
  that share of z = V x; all get the whole z, and each goes on with its rows of U;
- row-parallel (o, down): each worker has its columns of V, the parts of z are summed, and each adds
  its share of the columns of the output, which the layer's own all-reduce brings together.

So a layer has two products, each an instance of the one that the kernels compute: the first has
this worker's V, no core, and unit vectors for U; the second has for V unit vectors that pick out of
z what a row needs, and the cores and this worker's U.

An embedding has two such products, too, on one worker as on many, each of which has all of it: the
first one's x would be 1 at a token's number, so that z is looked up in V (`…worker.embedding`).

z is in the model's dtype: what the first product sums in float32 is rounded once, and in
row-parallel layers the sum over the workers again. (vLLM's own path keeps float32 there.)
"""

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import torch
from vllm.distributed import tensor_model_parallel_all_gather, tensor_model_parallel_all_reduce
from vllm.lora.layers import (
    BaseLayerWithLoRA,
    ColumnParallelLinearWithLoRA,
    RowParallelLinearWithLoRA,
)

from vllm_jd.plugin.engine.residency import SlotClass
from vllm_jd.plugin.worker.bases import Part, Spans, Vectors, take

Parallel = Literal["column", "row"]


def parallel_of(layer: BaseLayerWithLoRA) -> Parallel | None:
    """How the workers share a layer, or None: one worker has it as a whole."""
    if layer.tp_size == 1:
        return None
    if isinstance(layer, ColumnParallelLinearWithLoRA):
        return "column"
    return "row" if isinstance(layer, RowParallelLinearWithLoRA) else None


class OutputPart(Part):
    """A worker's part of a row-parallel layer: vLLM's own, and of B a share of the rows."""

    def __init__(self, layer: BaseLayerWithLoRA, outputs: Sequence[int], whole: Sequence[int]):
        super().__init__(layer, outputs, whole)
        (self._width,) = self.widths
        first, last = (
            self._width * rank // layer.tp_size for rank in (layer.tp_rank, layer.tp_rank + 1)
        )
        self.columns = slice(first, last)
        """Of the layer's output, what this worker adds to."""
        self.widths = (last - first,)

    def cut(self, s: int, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """This worker's part of A `[r, d_in]` and B `[d_out, r]`."""
        a, b = super().cut(s, a, b)
        # Nothing of one that has another width: it is not this layer's.
        return a, b[self.columns] if len(b) == self._width else b[:0]


class Shards:
    """How the first product's output z is laid out, and what both products are made of.

    z has a place for each of an adapter's rows k of each slice, as wide as the highest rank that
    stands there. Of a column-parallel layer entry j of a row is computed by worker j mod t, so that
    a rank that t does not divide gives the first workers one more, and where an entry stands does
    not depend on the rank.

    Args:
        parallel: how the workers share the layer; None: each has all of it.
        tp_rank: which worker this is.
        tp_size: how many there are.
        ranks: for each slice and each row k of an adapter the highest rank.
    """

    def __init__(
        self, parallel: Parallel | None, tp_rank: int, tp_size: int, ranks: Sequence[Sequence[int]]
    ):
        self._parallel = parallel
        self.worker, self.workers = (tp_rank, tp_size) if parallel == "column" else (0, 1)
        widths = torch.tensor([[self.share(rank) for rank in each] for each in ranks])
        self._first = widths.cumsum(1) - widths  # place of row k among those of its slice
        self._slice_widths = widths.sum(1).tolist()
        self.width = sum(self._slice_widths)
        """Numbers of z that one worker computes for a token."""
        self.z_width = self.width * self.workers
        """Numbers of z that the second product takes."""
        self.units = [torch.eye(width) for width in self._slice_widths]
        """U of the first product, for each slice: where in z its rows stand."""
        self.picks = self._make_picks(ranks)
        """V of the second product, for each slice: one row for each entry of each of its rows, 1
        where in z it stands."""
        counts = torch.tensor(ranks)
        self._first_pick = counts.cumsum(1) - counts

    def share(self, rank: int) -> int:
        """The most of a rank that any worker computes."""
        return -(-rank // self.workers)

    def own(self, rank: int) -> int:
        """How much of a rank this worker computes."""
        return (rank + self.workers - 1 - self.worker) // self.workers

    def slice_width(self, s: int) -> int:
        """Numbers of z of one slice."""
        return self._slice_widths[s]

    def place(self, s: int) -> np.ndarray:
        """Which of `units` row k of slice `s` begins with: int64 `[K]`."""
        return self._first[s].numpy()

    def pick(self, s: int) -> np.ndarray:
        """Which of `picks` row k of slice `s` begins with: int64 `[K]`."""
        return self._first_pick[s].numpy()

    def _make_picks(self, ranks: Sequence[Sequence[int]]) -> list[torch.Tensor]:
        picks = []
        first = 0
        for s, each in enumerate(ranks):
            entries = torch.cat([torch.arange(rank) for rank in each])
            places = torch.repeat_interleave(self._first[s], torch.tensor(each))
            columns = entries % self.workers * self.width
            columns += first + places + entries // self.workers
            rows = torch.zeros(len(entries), self.workers * self.width)
            picks.append(rows.scatter_(1, columns[:, None], 1))
            first += self._slice_widths[s]
        return picks

    def split(
        self, classes: Mapping[str, Sequence[SlotClass]]
    ) -> tuple[dict[str, Sequence[SlotClass]], dict[str, Sequence[SlotClass]]]:
        """The slots of both products: V's in the first, the others' in the second."""
        v = tuple(SlotClass(self.share(c.rank), c.first, c.count) for c in classes["v"])
        return (
            {"v": v, "u": (), "scales": ()},
            {"v": (), "u": classes["u"], "scales": classes["scales"]},
        )

    def share_of(self, spans: Spans, vectors: Vectors) -> tuple[Spans, Vectors]:
        """This worker's vectors of V, of each run of them."""
        if self.workers == 1:
            return spans, vectors
        own = (spans.ranks + self.workers - 1 - self.worker) // self.workers
        ends = np.cumsum(own)
        entry = np.arange(ends[-1]) - np.repeat(ends - own, own)
        index = np.repeat(spans.starts, own) + self.worker + entry * self.workers
        return Spans(spans.slots, ends - own, own), take(vectors, index)

    def share_of_adapter(self, a: torch.Tensor) -> torch.Tensor:
        """The same of A `[r, d_in]`."""
        return a[self.worker :: self.workers]

    def gather(self, z: torch.Tensor) -> torch.Tensor:
        """What all workers computed: z `[tokens, width]` → what the second product takes.

        One collective, of the same size on all workers in each step of so many tokens.
        """
        if self._parallel is None:
            return z
        if self._parallel == "column":
            return tensor_model_parallel_all_gather(z)
        return tensor_model_parallel_all_reduce(z)
