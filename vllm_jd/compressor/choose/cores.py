"""Cores in the bases of some clusters, beside a base model that they can be trained with, and the
loss of examples."""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from vllm_jd.compressor.choose.examples import Example
from vllm_jd.compressor.choose.model import beside, seen_by
from vllm_jd.row import CORE_FULL, Row
from vllm_jd.store import Store

_IGNORED = -100  # cross_entropy skips this label


class Cores:
    """A core of zeros for each module and each of some clusters, and the clusters' bases."""

    def __init__(self, store: Store, layers: dict[str, torch.nn.Module], clusters: Sequence[int]):
        self._names = list(layers)
        self._layers = list(layers.values())
        self._u, self._v, self.values = [], [], []
        for info, layer in zip(store.manifest.modules, self._layers, strict=True):
            table = store.rows(info.name)
            rows = [Row(*table[cluster].tolist()) for cluster in clusters]
            device = next(layer.parameters()).device
            u, v = (
                torch.stack([store.vectors(info.name, pool, at, at + row.rank) for row, at in each])
                .float()
                .to(device)
                for pool, each in (
                    ("U", [(row, row.u_start) for row in rows]),
                    ("V", [(row, row.v_start) for row in rows]),
                )
            )
            shape = (info.rank,) * (2 if rows[0].core_kind == CORE_FULL else 1)
            self._u.append(u)
            self._v.append(v)
            core = torch.zeros(len(rows), *shape, device=device)
            self.values.append(torch.nn.Parameter(core))

    @contextmanager
    def installed(self) -> Iterator["Cores"]:
        """The model with all of them, until the block ends."""
        with beside((layer, self._delta(i)) for i, layer in enumerate(self._layers)):
            yield self

    def factors(self) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Module → (B = U·Σ, A = Vᵀ) of the first cluster's."""
        found = {}
        with torch.no_grad():
            for name, u, v, core in zip(self._names, self._u, self._v, self.values, strict=True):
                square = core[0] if core.ndim == 3 else core[0].diag()
                found[name] = (u[0].T @ square).cpu(), v[0].cpu()
        return found

    def _delta(self, i: int) -> Callable[[torch.Tensor], torch.Tensor]:
        u, v, core = self._u[i].flatten(0, 1), self._v[i].flatten(0, 1), self.values[i]

        def delta(x: torch.Tensor) -> torch.Tensor:
            h = seen_by(v, x).unflatten(-1, core.shape[:2])
            h = torch.einsum("...kr,ksr->...ks", h, core) if core.ndim == 3 else h * core
            return h.flatten(-2) @ u

        return delta


def length(example: Example) -> int:
    """In tokens."""
    return len(example.prompt) + len(example.completion)


def batches(
    examples: Sequence[Example], batch_tokens: int, rng: random.Random | None
) -> list[list[Example]]:
    """Examples of like length together, rows × longest at most `batch_tokens`; a longer one is by
    itself. `rng` shuffles batches, and examples of nearly one length."""
    spread = [rng.random() * 0.1 if rng else 0.0 for _ in examples]
    order = sorted(range(len(examples)), key=lambda i: length(examples[i]) * (1 + spread[i]))
    found: list[list[Example]] = []
    longest = 0
    for example in (examples[i] for i in order):
        longest = max(longest, length(example))
        if not found or (len(found[-1]) + 1) * longest > batch_tokens:
            found.append([])
            longest = length(example)
        found[-1].append(example)
    if rng:
        rng.shuffle(found)
    return found


def summed_loss(model: torch.nn.Module, batch: Sequence[Example]) -> torch.Tensor:
    """The summed loss of the completions' tokens, in nats."""
    device = next(model.parameters()).device
    width, kept = max(map(length, batch)), max(len(each.completion) for each in batch) + 1
    ids = torch.zeros(len(batch), width, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    labels = torch.full((len(batch), kept - 1), _IGNORED)
    # Padded on the left, all completions end together, and the output layer sees no more than them.
    for row, each in enumerate(batch):
        ids[row, width - length(each) :] = torch.tensor(each.prompt + each.completion)
        mask[row, width - length(each) :] = 1
        labels[row, kept - 1 - len(each.completion) :] = torch.tensor(each.completion)
    logits = model(
        input_ids=ids.to(device),
        attention_mask=mask.to(device),
        position_ids=(mask.cumsum(-1) - 1).clamp(min=0).to(device),
        logits_to_keep=kept,
        use_cache=False,
    ).logits
    return torch.nn.functional.cross_entropy(
        logits[:, :-1].float().flatten(0, 1),
        labels.flatten().to(device),
        ignore_index=_IGNORED,
        reduction="sum",
    )


def mean_loss(model: torch.nn.Module, examples: Sequence[Example], batch_tokens: int) -> float:
    """The mean loss of a token of the completions, in nats."""
    total = tokens = 0.0
    with torch.no_grad():
        for batch in batches(examples, batch_tokens, None):
            total += float(summed_loss(model, batch))
            tokens += sum(len(example.completion) for example in batch)
    return total / tokens
