"""Weights for a blend, found on a few examples of a task: LoRA-hub's protocol (Huang et al., 2023,
2307.13269) on the bases of a store.

What is minimised is the loss of the examples' completions plus `_SPARSE` · Σ|w|, with weights of at
most `_MOST` in size, as theirs; by gradients instead of a search, since in shared bases a blend is
as cheap to differentiate as to compute. The gradient at no weights at all also says, of every
adapter of a store in one pass, which are worth a try.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from vllm_jd.compressor.choose.examples import Example
from vllm_jd.compressor.choose.model import beside, layers_of, seen_by
from vllm_jd.compressor.errors import CompressorError
from vllm_jd.row import CORE_FULL, RANK, SCALE_ROW, Row
from vllm_jd.store import Store
from vllm_jd.store.reader import Pool

Progress = Callable[[str, int, int], None]
"""Called with (what is going on, done, total)."""

_SPARSE, _MOST, _RATE = 0.05, 1.5, 0.1
_CANDIDATES = 20
_AT_ONCE = 1 << 27  # numbers that are adapters' own, of those whose slopes are taken in one pass
_SMALL = 0.01  # weights below it are left out


class BlendFitError(CompressorError):
    """Candidates or a base model that cannot be used, or no weights that help."""


@dataclass(frozen=True)
class Fitted:
    """What was found.

    Args:
        weights: of the adapters that count, the largest first.
        before: mean loss of the completions' tokens on the base model, in nats.
        best: adapter and loss of the best single one among the candidates, with weight 1.
        after: the same loss with the weights.
        candidates: who was tried.
        tokens: how many tokens the loss is taken of.
    """

    weights: dict[str, float]
    before: float
    best: tuple[str, float]
    after: float
    candidates: tuple[str, ...]
    tokens: int


def fit_blend(
    store: Store,
    model: torch.nn.Module,
    examples: Sequence[Example],
    *,
    candidates: Sequence[str] | None = None,
    most: int = 8,
    steps: int = 40,
    on_progress: Progress = lambda what, done, total: None,
) -> Fitted:
    """Find weights.

    Args:
        store: whose adapters are blended.
        model: transformers' base model; it is as it was afterwards.
        examples: of the task.
        candidates: names of adapters; None: the 20 of the store that promise most.
        most: parts that may be left.
        steps: of the search.
        on_progress: see `Progress`.

    Raises:
        BlendFitError: an adapter is unknown, or no weights were found with which the loss is
            smaller than without any.
        ModelError: the model lacks a module of the store.
    """
    unknown = [name for name in candidates or () if name not in store]
    if unknown:
        raise BlendFitError(f"{store.path}: found {store.unknown(unknown[0])}")
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    if candidates is None:
        names = _promising(store, model, examples, on_progress)
    else:
        names = list(dict.fromkeys(candidates))
    with _Blended(store, model, names).installed() as blended:
        before = blended.loss(examples, torch.zeros(len(names)))
        alone = []
        for i in range(len(names)):
            alone.append(blended.loss(examples, torch.eye(len(names))[i]))
            on_progress("single adapters", i + 1, len(names))
        keep = torch.ones(len(names), dtype=torch.bool)
        weights = blended.search(examples, keep, steps, on_progress, "weights")
        largest = weights.abs().topk(min(most, len(names))).indices
        keep[:] = False
        keep[largest[weights[largest].abs() >= _SMALL]] = True
        if not bool(keep.any()):
            keep[largest[:1]] = True
        if int(keep.sum()) < int((weights != 0).sum()):
            again = max(1, steps // 2)
            weights = blended.search(examples, keep, again, on_progress, "weights again", weights)
        weights = (weights * keep).double().mul(10_000).round().div(10_000)
        after = blended.loss(examples, weights.float())
    if not after < before:  # nor where it is NaN
        raise BlendFitError(
            f"no weights of the {len(names)} adapters tried make the examples' loss smaller than "
            f"the base model's {before:.3f} by more than they cost; name others (--adapter), allow "
            "more parts (--most) or steps (--steps), or check that the examples are in the form "
            "that the adapters were trained on"
        )
    order = weights.abs().argsort(descending=True).tolist()
    best = min(range(len(names)), key=alone.__getitem__)
    return Fitted(
        weights={names[i]: float(weights[i]) for i in order if weights[i]},
        before=before,
        best=(names[best], alone[best]),
        after=after,
        candidates=tuple(names),
        tokens=sum(len(example.completion) for example in examples),
    )


def _promising(
    store: Store, model: torch.nn.Module, examples: Sequence[Example], on_progress: Progress
) -> list[str]:
    """The adapters along which the loss is steepest, up or down, relative to their size."""
    if len(store) <= _CANDIDATES:
        return list(store.names)
    longest = max(len(example.prompt) + len(example.completion) for example in examples)
    slopes, done = [], 0
    for count in _groups(store, longest):
        names = store.names[done : done + count]
        weights = torch.zeros(count, requires_grad=True)
        with _Blended(store, model, names).installed() as blended:
            for example in examples:
                blended.one_loss(example, weights).backward()
        size = store.norm[done : done + count].double().square().sum(dim=1).sqrt()
        slopes.append(weights.grad.double().abs() / size.clamp(min=1e-12))
        done += count
        on_progress("adapters looked at", done, len(store))
    best = torch.cat(slopes).topk(_CANDIDATES).indices
    return [store.names[i] for i in best.tolist()]


def _groups(store: Store, longest: int) -> Iterator[int]:
    """How many adapters, in the store's order, to look at in each pass: as many as have
    `_AT_ONCE` numbers of their own (cores, private vectors and scales, and what a row of theirs
    keeps of a text of `longest` tokens for the gradient), and one at least."""
    own = torch.full((len(store),), store.manifest.core_row, dtype=torch.int64)
    for column, module in enumerate(store.manifest.modules):
        table = store.rows(module.name)[:, [RANK, SCALE_ROW]].long()
        rank, scaled = table[:, 0], table[:, 1] >= 0
        costs = rank * (module.d_in + module.d_out + 2 * longest)
        costs += scaled * module.d_out * (1 + longest)
        costs[: module.shared] = 0  # held once, whoever uses them
        for number in store.chosen[:, column].long().unbind(dim=1):
            there = number >= 0
            own[there] += costs[number[there]]
    count = total = 0
    for numbers in own.tolist():
        if count and total + numbers > _AT_ONCE:
            yield count
            count = total = 0
        count, total = count + 1, total + numbers
    yield count


class _Row:
    """One row of a module, and what some adapters have of it."""

    def __init__(self, row: Row, vectors: "_Vectors", users: torch.Tensor, cores: torch.Tensor):
        self.users = users  # int64 [k]
        self.v = vectors.get("V", row.v_start, row.rank)
        self.u = vectors.get("U", row.u_start, row.rank)
        self.kind, self.rank = row.core_kind, row.rank
        self.scale = vectors.get("scales", row.scale_row, 1)[0] if row.scale_row >= 0 else None
        self.cores = cores[:, : row.core_size].float() if row.core_size else None

    def delta(self, x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """What it adds for x `[…, d_in]`, of an embedding int `[…]`, with all adapters' weights."""
        own = weights[self.users]
        h = seen_by(self.v, x)
        if self.cores is None:
            h = h * own.sum()
        else:
            core = own @ self.cores
            h = h @ core.view(self.rank, self.rank).T if self.kind == CORE_FULL else h * core
        y = h @ self.u
        return y if self.scale is None else y * self.scale


class _Vectors:
    """A module's vectors in float32: those that are asked for are read, and once."""

    def __init__(self, store: Store, module: str):
        self._store, self._module = store, module
        self._read: dict[tuple[Pool, int, int], torch.Tensor] = {}

    def get(self, pool: Pool, first: int, count: int) -> torch.Tensor:
        """`count` vectors of a pool, `[count, width]`."""
        key = pool, first, count
        if key not in self._read:
            found = self._store.vectors(self._module, pool, first, first + count)
            self._read[key] = found.float()
        return self._read[key]


class _Blended:
    """A base model to which the blend of some adapters of a store is added."""

    def __init__(self, store: Store, model: torch.nn.Module, names: Sequence[str]):
        self._model = model
        self.weights = torch.zeros(len(names))
        index = torch.tensor([store.index(name) for name in names])
        cores = torch.cat([store.cores(i, i + 1) for i in index.tolist()])
        if any(module.experts for module in store.manifest.modules):
            raise BlendFitError(
                "the store adapts experts (MoE), whose weights are not searched for"
            )
        self._layers: list[tuple[torch.nn.Module, list[_Row]]] = []
        layers = layers_of(store, model)
        for column, module in enumerate(store.manifest.modules):
            chosen = store.chosen[index, column]
            table, vectors = store.rows(module.name), _Vectors(store, module.name)
            own = cores[:, module.core_offset : module.core_offset + module.core_size]
            rows = []
            for number in chosen[chosen >= 0].unique().tolist():
                users = (chosen == number).any(dim=1).nonzero().flatten()
                row = Row(*table[number].tolist())
                if row.rank:
                    rows.append(_Row(row, vectors, users, own[users]))
            self._layers.append((layers[module.name], rows))

    @contextmanager
    def installed(self) -> Iterator["_Blended"]:
        """The model with it, until the block ends."""

        def delta(rows: list[_Row]) -> Callable[[torch.Tensor], torch.Tensor]:
            return lambda x: sum(row.delta(x, self.weights) for row in rows)

        with beside((layer, delta(rows)) for layer, rows in self._layers if rows):
            yield self

    def one_loss(self, example: Example, weights: torch.Tensor) -> torch.Tensor:
        """The summed loss of one completion, in nats."""
        self.weights = weights
        ids = torch.tensor([example.prompt + example.completion])
        logits = self._model(input_ids=ids, use_cache=False).logits[0]
        first = len(example.prompt) - 1
        wanted = torch.tensor(example.completion)
        scores = torch.log_softmax(logits[first:-1].float(), -1)
        return -scores.gather(1, wanted[:, None]).sum()

    @torch.no_grad()
    def loss(self, examples: Sequence[Example], weights: torch.Tensor) -> float:
        """The mean over all tokens of the completions."""
        total = sum(float(self.one_loss(example, weights)) for example in examples)
        return total / sum(len(example.completion) for example in examples)

    def search(
        self,
        examples: Sequence[Example],
        keep: torch.Tensor,
        steps: int,
        on_progress: Progress,
        what: str,
        first: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Weights that minimise the objective; 0 where not `keep`. The best that were seen."""
        weights = torch.zeros(len(keep)) if first is None else (first * keep)
        weights.requires_grad_(True)
        optimizer = torch.optim.Adam([weights], lr=_RATE)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        tokens = sum(len(example.completion) for example in examples)
        best = (float("inf"), weights.detach().clone())
        for step in range(steps + 1):
            optimizer.zero_grad()
            loss = 0.0
            for example in examples:
                one = self.one_loss(example, weights) / tokens
                if step < steps:
                    one.backward()
                loss += float(one.detach())
            objective = loss + _SPARSE * float(weights.detach().abs().sum())
            if objective < best[0]:
                best = (objective, weights.detach().clone())
            if step == steps:
                break
            with torch.no_grad():
                weights.grad += _SPARSE * weights.sign()
                weights.grad *= keep
            optimizer.step()
            schedule.step()
            with torch.no_grad():
                weights.clamp_(-_MOST, _MOST).mul_(keep)
            on_progress(what, step + 1, steps)
        return best[1]
