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

z is in the model's dtype: what the first product sums in float32 is rounded once, and in
row-parallel layers the sum over the workers again. (vLLM's own path keeps float32 there.)
"""

from collections.abc import Sequence
from typing import Literal

import torch
from vllm.distributed import tensor_model_parallel_all_gather, tensor_model_parallel_all_reduce
from vllm.lora.layers import (
    BaseLayerWithLoRA,
    ColumnParallelLinearWithLoRA,
    RowParallelLinearWithLoRA,
)

from vllm_jd.kernels import Int8Rows
from vllm_jd.plugin.worker.bases import Part, SliceBases
from vllm_jd.row import BLOCK, CORE_KIND, CORE_NONE, RANK, SCALE_ROW, U_START, V_START
from vllm_jd.store import Store

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

    def __init__(self, layer: BaseLayerWithLoRA, n_slices: int):
        super().__init__(layer, n_slices)
        (self._whole,) = self.widths
        first, last = (
            self._whole * rank // layer.tp_size for rank in (layer.tp_rank, layer.tp_rank + 1)
        )
        self.columns = slice(first, last)
        """Of the layer's output, what this worker adds to."""
        self.widths = (last - first,)

    def cut(self, s: int, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """This worker's part of A `[r, d_in]` and B `[d_out, r]`."""
        a, b = super().cut(s, a, b)
        # Nothing of one that has another width: it is not this layer's.
        return a, b[self.columns] if len(b) == self._whole else b[:0]


class Shards:
    """How the first product's output z is laid out, and what both products are made of.

    z has a place for each of an adapter's rows k of each slice, as wide as the highest rank that
    stands there. Of a column-parallel layer entry j of a row is computed by worker j mod t, so that
    a rank that t does not divide gives the first workers one more, and where an entry stands does
    not depend on the rank.

    Args:
        parallel: how the workers share the layer.
        tp_rank: which worker this is.
        tp_size: how many there are.
        ranks: for each slice and each row k of an adapter the highest rank.
    """

    def __init__(
        self, parallel: Parallel, tp_rank: int, tp_size: int, ranks: Sequence[Sequence[int]]
    ):
        self._parallel = parallel
        self._worker, self._workers = (tp_rank, tp_size) if parallel == "column" else (0, 1)
        widths = torch.tensor([[self.share(rank) for rank in each] for each in ranks])
        self._first = widths.cumsum(1) - widths  # place of row k among those of its slice
        self._slice_widths = widths.sum(1).tolist()
        self.width = sum(self._slice_widths)
        """Numbers of z that one worker computes for a token."""
        self._units = [torch.eye(width) for width in self._slice_widths]
        """U of the first product, for each slice: where in z its rows stand."""
        self._picks = self._make_picks(ranks)
        counts = torch.tensor(ranks)
        self._first_pick = counts.cumsum(1) - counts

    def share(self, rank: int) -> int:
        """The most of a rank that any worker computes."""
        return -(-rank // self._workers)

    def _make_picks(self, ranks: Sequence[Sequence[int]]) -> list[torch.Tensor]:
        """For each slice one row for each entry of each of its rows: 1 where in z it stands."""
        picks = []
        first = 0
        for s, each in enumerate(ranks):
            entries = torch.cat([torch.arange(rank) for rank in each])
            places = torch.repeat_interleave(self._first[s], torch.tensor(each))
            columns = entries % self._workers * self.width
            columns += first + places + entries // self._workers
            rows = torch.zeros(len(entries), self._workers * self.width)
            picks.append(rows.scatter_(1, columns[:, None], 1))
            first += self._slice_widths[s]
        return picks

    def units(self, rank: int) -> list[torch.Tensor]:
        """U of the first product of all uncompressed adapters, for each slice."""
        return [rows[:rank] for rows in self._units]

    def picks(self, rank: int) -> list[torch.Tensor]:
        """V of the second product of all uncompressed adapters, for each slice."""
        return [rows[:rank] for rows in self._picks]

    def split(
        self, slices: list[SliceBases], places: list[torch.Tensor]
    ) -> tuple[list[SliceBases], list[SliceBases]]:
        """The bases of both products.

        Args:
            slices: this worker's part, V as vLLM cuts it.
            places: for each slice, which row k of an adapter each cluster is: int64 `[clusters]`.
        """
        first, second = [], []
        for s, (bases, k) in enumerate(zip(slices, places, strict=True)):
            units, picks = self._units[s], self._picks[s]
            if isinstance(bases.v, Int8Rows):
                units, picks = _int8(units), _int8(picks)
            taken, starts, ranks = self._rows(bases.clusters[:, V_START], bases.clusters[:, RANK])
            table = bases.clusters.clone()
            table[:, V_START], table[:, U_START], table[:, RANK] = starts, self._first[s][k], ranks
            table[:, CORE_KIND], table[:, SCALE_ROW] = CORE_NONE, -1
            no_scales = torch.empty(0, self._slice_widths[s])
            first.append(SliceBases(_take(bases.v, taken), units, no_scales, table))
            table = bases.clusters.clone()
            table[:, V_START] = self._first_pick[s][k]
            second.append(SliceBases(picks, bases.u, bases.scales, table))
        return first, second

    def _rows(
        self, starts: torch.Tensor, ranks: torch.Tensor
    ) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]:
        """Which rows of V are this worker's (None: all), and each basis' start and rank in them."""
        if self._workers == 1:
            return None, starts, ranks
        own = (ranks.long() + self._workers - 1 - self._worker) // self._workers
        bases, index = starts.long().unique(return_inverse=True)
        held = torch.zeros_like(bases).scatter_reduce_(0, index, own, "amax")
        begin = held.cumsum(0) - held
        entry = torch.arange(int(held.sum())) - begin.repeat_interleave(held)
        taken = bases.repeat_interleave(held) + self._worker + entry * self._workers
        return taken, begin[index].int(), own.int()

    def split_adapter(
        self, pairs: list[tuple[torch.Tensor, torch.Tensor] | None]
    ) -> tuple[list[tuple[torch.Tensor, None] | None], list[tuple[None, torch.Tensor] | None]]:
        """Of an uncompressed adapter's factors, cut as the bases are, those of both products."""
        return (
            [pair and (pair[0][self._worker :: self._workers], None) for pair in pairs],
            [pair and (None, pair[1]) for pair in pairs],
        )

    def gather(self, z: torch.Tensor) -> torch.Tensor:
        """What all workers computed: z `[tokens, width]` → what the second product takes.

        One collective, of the same size on all workers in each step of so many tokens.
        """
        if self._parallel == "column":
            return tensor_model_parallel_all_gather(z)
        return tensor_model_parallel_all_reduce(z)


def places_of(store: Store, column: int | None) -> torch.Tensor:
    """Which of an adapter's rows k each cluster of a module is: int64 `[clusters]`.

    Raises:
        ValueError: one cluster is another row for another adapter, which no store that vllm-jd
            writes has.
    """
    if column is None:
        return torch.zeros(0, dtype=torch.long)
    module = store.manifest.modules[column]
    places = torch.zeros(module.rows, dtype=torch.long)
    rows = store.manifest.rows
    chosen = [store.chosen[:, column, k].long() for k in range(rows if rows > 1 else 0)]
    chosen = [clusters[clusters >= 0] for clusters in chosen]
    for k, clusters in enumerate(chosen):
        places[clusters] = k
    for k, clusters in enumerate(chosen):
        wrong = clusters[places[clusters] != k]
        if len(wrong):
            raise ValueError(
                f"cluster {int(wrong[0])} of {module.name} is row {k} of one adapter and row "
                f"{int(places[wrong[0]])} of another, expected the same for all with "
                "--fully-sharded-loras; leave that out, or compress the adapters again"
            )
    return places


def highest_ranks(
    slices: list[SliceBases], places: list[torch.Tensor], rows: int, max_rank: int
) -> list[list[int]]:
    """For each slice the highest rank of each of an adapter's `rows` rows; uncompressed ones, of
    `max_rank`, take the first."""
    highest = []
    for bases, k in zip(slices, places, strict=True):
        found = torch.zeros(rows, dtype=torch.long)
        found.scatter_reduce_(0, k, bases.clusters[:, RANK].long(), "amax")
        found[0] = max(int(found[0]), max_rank)
        highest.append(found.tolist())
    return highest


def _take(rows: torch.Tensor | Int8Rows, index: torch.Tensor | None) -> torch.Tensor | Int8Rows:
    if index is None:
        return rows
    if isinstance(rows, Int8Rows):
        return Int8Rows(rows.codes[index], rows.steps[index])
    return rows[index]


def _int8(rows: torch.Tensor) -> Int8Rows:
    """Rows of zeros and ones in 8 bits."""
    blocks = -(-rows.shape[1] // BLOCK)
    return Int8Rows(rows.to(torch.int8), torch.ones(len(rows), blocks, dtype=torch.bfloat16))
