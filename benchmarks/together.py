"""Many LoRA adapters of one base model, trained in one pass of it: a GPU's way to train them.

Each adapter learns from its own batches by its own schedule, as `train_adapters.train_task` has
it. In a step the batches lie side by side, a row for each adapter; a row's examples lie one behind
the other and see themselves alone. So the base model reads all rows at once, and each adapter is a
product of its own row.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from vllm_jd.compressor.choose.cores import length
from vllm_jd.compressor.choose.examples import Example
from vllm_jd.compressor.choose.model import beside

BETAS, EPSILON, CLIP = (0.9, 0.999), 1e-8, 1.0  # AdamW's own, and of the norm of an adapter's grads
EIGHTS = 8  # rows are as long as a multiple of it: what attention with a mask wants


@dataclass(frozen=True)
class Rows:
    """Examples of `count` adapters, `[count, longest]`, and which of their tokens are learnt.

    Args:
        ids, positions, examples: of each token; the padding's example is -1.
        row, column: of the tokens before those that are learnt, `[learnt]`.
        labels: the learnt ones, `[learnt]`.
        tokens: how many are learnt in each row, `[count]`.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    examples: torch.Tensor
    row: torch.Tensor
    column: torch.Tensor
    labels: torch.Tensor
    tokens: torch.Tensor

    @classmethod
    def of(cls, batches: Sequence[Sequence[Example]], device: str) -> "Rows":
        """One row for each batch, which may be empty."""
        longest = max(sum(map(length, batch)) for batch in batches)
        width = -(-longest // EIGHTS) * EIGHTS
        filled: list[list[list[int]]] = [[], [], []]
        row, column, labels, tokens = [], [], [], []
        for i, batch in enumerate(batches):
            lists: tuple[list[int], ...] = ([], [], [])
            for number, each in enumerate(batch):
                size, first = length(each), len(lists[0]) + len(each.prompt) - 1
                lists[0].extend(each.prompt + each.completion)
                lists[1].extend(range(size))
                lists[2].extend([number] * size)
                row += [i] * len(each.completion)
                column += range(first, first + len(each.completion))
                labels += each.completion
            tokens.append(sum(len(each.completion) for each in batch))
            for all_rows, own, padding in zip(filled, lists, (0, 0, -1), strict=True):
                all_rows.append(own + [padding] * (width - len(own)))
        lists_of_numbers = (*filled, row, column, labels, tokens)
        return cls(*(torch.tensor(each).to(device) for each in lists_of_numbers))

    def losses(self, model: Any) -> torch.Tensor:
        """The summed loss of each row's learnt tokens, nats, `[count]`."""
        same = self.examples[:, :, None] == self.examples[:, None, :]
        width = self.ids.shape[1]
        seen = same & torch.ones(width, width, dtype=torch.bool, device=same.device).tril()
        hidden = model.get_decoder()(
            input_ids=self.ids,
            attention_mask=seen[:, None],
            position_ids=self.positions,
            use_cache=False,
        ).last_hidden_state
        logits = model.get_output_embeddings()(hidden[self.row, self.column])
        each = torch.nn.functional.cross_entropy(logits.float(), self.labels, reduction="none")
        return torch.zeros(len(self.ids), device=each.device).index_add(0, self.row, each)


class Together:
    """Adapters of one shape, as one matrix of numbers, a row each.

    Args:
        model: the frozen base model.
        layers: those that are adapted.
        first: the tensors with which each adapter begins, of each layer as many: `[count, …]`.
        delta: (number of a layer, an adapter's tensors of it `[active, …]`) → what is added for an
            input `[active, tokens, d_in]`.
        autocast: a context in which the model is run.
        pace: by what the rate of each number is multiplied, `[count, numbers of an adapter]`.
    """

    def __init__(
        self,
        model: Any,
        layers: Sequence[torch.nn.Module],
        first: Sequence[torch.Tensor],
        delta: Callable[..., Callable[[torch.Tensor], torch.Tensor]],
        autocast: Callable[[], Any],
        pace: torch.Tensor | None = None,
    ):
        self.model, self.autocast = model, autocast
        self.device = str(next(model.parameters()).device)
        self._layers, self._delta, self._pace = layers, delta, pace
        self._each = len(first) // len(layers)
        self._shapes = [each.shape[1:] for each in first]
        self.numbers = torch.cat([each.flatten(1) for each in first], 1).float().to(self.device)
        self._gradient = torch.zeros_like(self.numbers)
        self._moments = torch.zeros_like(self.numbers), torch.zeros_like(self.numbers)

    def tensors(self, i: int) -> list[list[torch.Tensor]]:
        """Of each layer, an adapter's tensors."""
        return self._by_layer([each[0] for each in self._parts(self.numbers[i : i + 1])])

    def losses(self, examples: Sequence[Sequence[Example]], most: int) -> list[float]:
        """The mean loss of a learnt token of each adapter's examples, nats.

        Args:
            examples: of each adapter, in their order.
            most: tokens of a row that is asked at once; a longer example is by itself.
        """
        chunks = [_parts_of_at_most(each, most) for each in examples]
        total = torch.zeros(2, len(examples), dtype=torch.float64)
        with self._installed(len(examples), learning=False), torch.no_grad(), self.autocast():
            for i in range(max(map(len, chunks))):
                rows = Rows.of([each[i] if i < len(each) else [] for each in chunks], self.device)
                total += torch.stack([rows.losses(self.model), rows.tokens]).double().cpu()
        return (total[0] / total[1]).tolist()

    def train(
        self, schedules: Sequence[Sequence[Sequence[Example]]], rate: float
    ) -> Iterator[torch.Tensor]:
        """Train each adapter on its batches, in the order of a schedule.

        The rate rises over the first twentieth of a schedule, and falls to 0 over all of it.

        Args:
            schedules: an adapter's batches; longer schedules come first.
            rate: AdamW's highest.

        Yields:
            After each step: the loss of each adapter that was in it, nats a token, `[active]`.

        Raises:
            ValueError: the schedules are not in that order.
        """
        steps = [len(schedule) for schedule in schedules]
        if steps != sorted(steps, reverse=True):
            raise ValueError(f"found schedules of {steps} steps, expected the longest first")
        for step in range(steps[0]):
            active = sum(each > step for each in steps)
            with self._installed(active, learning=True) as leaves, self.autocast():
                rows = Rows.of([each[step] for each in schedules[:active]], self.device)
                losses = rows.losses(self.model) / rows.tokens
            losses.sum().backward()
            gradients = self._parts(self._gradient[:active])
            for gradient, leaf in zip(gradients, leaves, strict=True):
                gradient.copy_(leaf.grad)
            rates = [
                rate * min((step + 1) / max(1, n // 20), (n - step) / n) for n in steps[:active]
            ]
            self._update(active, step + 1, torch.tensor(rates).to(self.device))
            yield losses.detach()

    def _update(self, active: int, step: int, rates: torch.Tensor) -> None:
        """AdamW without decay, of gradients whose norm, of each adapter, is cut."""
        with torch.no_grad():
            gradient = self._gradient[:active]
            norm = gradient.norm(dim=1, keepdim=True)
            gradient *= (CLIP / (norm + 1e-6)).clamp(max=1.0)
            first, second = (moment[:active] for moment in self._moments)
            first.lerp_(gradient, 1 - BETAS[0])
            second.mul_(BETAS[1]).addcmul_(gradient, gradient, value=1 - BETAS[1])
            root = second.sqrt().div_((1 - BETAS[1] ** step) ** 0.5).add_(EPSILON)
            root = first.div(root).mul_((rates / (1 - BETAS[0] ** step))[:, None])
            self.numbers[:active] -= root if self._pace is None else root * self._pace[:active]

    def _parts(self, rows: torch.Tensor) -> list[torch.Tensor]:
        """A matrix of rows, as each module's A and B of all of them."""
        sizes = [shape.numel() for shape in self._shapes]
        pieces = rows.split(sizes, dim=1)
        return [
            piece.unflatten(1, shape) for piece, shape in zip(pieces, self._shapes, strict=True)
        ]

    def _by_layer(self, tensors: list[torch.Tensor]) -> list[list[torch.Tensor]]:
        return [tensors[i : i + self._each] for i in range(0, len(tensors), self._each)]

    @contextmanager
    def _installed(self, active: int, *, learning: bool) -> Iterator[list[torch.Tensor]]:
        """The model with the first adapters, one for each row that it is given; the tensors of all
        layers, `[active, …]`."""
        parts = self._parts(self.numbers[:active])
        leaves = [each.detach().requires_grad_(learning) for each in parts]
        deltas = [self._delta(i, *own) for i, own in enumerate(self._by_layer(leaves))]
        with beside(zip(self._layers, deltas, strict=True)):
            yield leaves


def lora(
    model: Any,
    first: dict[str, tuple[torch.Tensor, torch.Tensor]],
    count: int,
    scale: float,
    autocast: Callable[[], Any],
) -> Together:
    """LoRA adapters that begin alike.

    Args:
        model: see `Together`.
        first: module → (A `[rank, d_in]`, B `[d_out, rank]`).
        count: adapters.
        scale: alpha / rank.
        autocast: see `Together`.
    """

    def delta(_: int, a: torch.Tensor, b: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda x: torch.matmul(torch.matmul(x, a.mT), b.mT) * scale

    named = dict(model.named_modules())
    tensors = [each.expand(count, *each.shape) for pair in first.values() for each in pair]
    return Together(model, [named[name] for name in first], tensors, delta, autocast)


def _parts_of_at_most(examples: Sequence[Example], most: int) -> list[list[Example]]:
    parts: list[list[Example]] = []
    room = 0
    for each in examples:
        if length(each) > room:
            parts.append([])
            room = max(most, length(each))
        parts[-1].append(each)
        room -= length(each)
    return parts
