"""What can be said of a compressed adapter without asking it: how far its numbers are off.

All are relative to the adapter itself. With D = BA of one module and D̂ what is stored of it:

- `error`: ‖D − D̂‖²_F / ‖D‖²_F, the mean over modules; `worst`: of the worst module;
- `energy`: Σ ‖D − D̂‖²_F / Σ ‖D‖²_F, sums over modules: a module counts as much as it changes;
- `beyond`: ‖D − D̂‖²_F / ‖R‖²_F, the mean over modules, R being what of D is orthogonal to the
  collection's mean: 1 where a store keeps no more than what is common to all.
"""

import torch

from vllm_jd.compressor import Collection
from vllm_jd.store import Store

NAMES = ("error", "worst", "energy", "beyond")

Pair = tuple[torch.Tensor, torch.Tensor]


class Judge:
    """Of one collection, for any number of stores of it.

    Args:
        collection: the adapters as they are.
    """

    def __init__(self, collection: Collection):
        self.names = list(collection.names)
        self._factors: dict[str, Pair] = {}
        self._own: dict[str, torch.Tensor] = {}  # ‖D‖², ‖R‖²: [n, 2]
        for module in collection.shapes:
            factors = collection.factors(module)
            a, b = (factors.per_adapter(rows).double() for rows in (factors.a, factors.b))
            self._factors[module] = (a, b)
            self._own[module] = self._of_module(a, b)

    def errors(self, store: Store) -> dict[str, dict[str, float]]:
        """Of each adapter, all of `NAMES`."""
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # for products as small as these, more wait for each other
        try:
            return {name: self._of_adapter(store, i, name) for i, name in enumerate(self.names)}
        finally:
            torch.set_num_threads(threads)

    def _of_module(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        n = len(a)
        # <D_i, D_j> = Σ (A_i A_jᵀ) ∘ (B_i B_jᵀ), rank rows of each
        inner = torch.zeros(n, n, dtype=torch.float64)
        for i in range(n):
            inner[i] = ((a[i] @ a.mT) * (b[i] @ b.mT)).sum((1, 2))
        squares = inner.diagonal()
        mean = inner.mean(1)  # <D_i, mean>
        beyond = squares - mean.square() / mean.mean().clamp_min(1e-300)
        return torch.stack([squares, beyond], dim=1)

    def _of_adapter(self, store: Store, i: int, name: str) -> dict[str, float]:
        stored = store.factors(name)
        found = []
        for module, (a, b) in self._factors.items():
            own = self._own[module][i]
            if not own[0]:
                continue
            x, y = a[i], b[i]
            if module in stored:
                kept_b, kept_a = stored[module]
                x = torch.cat([x, kept_a.double()])
                y = torch.cat([y, -kept_b.T.double()])
            lost = ((x @ x.T) * (y @ y.T)).sum()
            found.append(torch.stack([lost, *own]))
        lost, squares, beyond = torch.stack(found).clamp_min(0).unbind(1)
        relative = lost / squares
        figures = (
            relative.mean(),
            relative.max(),
            lost.sum() / squares.sum(),
            (lost / beyond).mean(),
        )
        return {key: float(value) for key, value in zip(NAMES, figures, strict=True)}
