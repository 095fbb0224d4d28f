"""Compare what a generation gives out with what it was made from, before it is the live one.

By other arithmetic than what made it: whole factors, neither projected nor by parts.
"""

import torch

from vllm_jd.compressor.algebra.factors import ModuleFactors
from vllm_jd.compressor.read.adapters import Collection
from vllm_jd.compressor.run.experts import entries, with_experts
from vllm_jd.store import Store, StoreError

_MOST = 256  # adapters whose cores and factors of one module are held at once
_TOLERANCE = 1e-3  # of an error; what is left of float32 in products of thousands


def check_errors(store: Store, collection: Collection, *, limit: float | None = None) -> None:
    """Compute anew the errors of adapters of a generation: of all that the collection has, or of
    256 evenly spaced ones.

    Args:
        store: the generation, which has all of the collection's names.
        collection: what it was made from.
        limit: the mean relative squared error over its modules that no compressed adapter may
            exceed.

    Raises:
        StoreError: an adapter's error is not what the generation says, or above the limit.
    """
    n = len(collection.names)
    some = torch.arange(n)[:: -(-n // _MOST)]
    places = [store.index(collection.names[i]) for i in some.tolist()]
    cores = [store.cores(i, i + 1)[0] for i in places] if store.manifest.core_row else None
    total, count = torch.zeros(len(some), dtype=torch.float64), torch.zeros(len(some))
    for column, info in enumerate(store.manifest.modules):
        if info.name not in collection.shapes:
            continue
        source = collection.factors(info.name)
        if info.experts:
            source = with_experts(source, n, info.experts)
        source = source.subset(entries(some, info.experts))
        bases = store.bases(info.name)
        pairs: list[tuple[torch.Tensor, torch.Tensor] | None] = []
        for i, place in enumerate(places):
            at = slice(info.core_offset, info.core_offset + info.core_size)
            core = torch.empty(0) if cores is None else cores[i][at]
            chosen = [row for row in store.chosen[place, column].tolist() if row >= 0]
            for expert in range(info.each):
                parts = [bases.factors(row, core, expert) for row in chosen]
                if not parts:
                    pairs.append(None)
                    continue
                a, b = torch.cat([a for _, a in parts]), torch.cat([b for b, _ in parts], dim=1)
                pairs.append((a, b))
        served = ModuleFactors.stack(pairs, info.d_in, info.d_out)
        norms = source.squared_norms().view(-1, info.each).sum(dim=1)
        left = source.minus(served).squared_norms().view(-1, info.each).sum(dim=1).clamp_min(0)
        found = torch.where(norms > 0, left / norms.clamp_min(1e-300), 0.0)
        said = store.error[places, column].double()
        wrong = ((found - said).abs() > _TOLERANCE * (1 + said)).nonzero()[:, 0].tolist()
        if wrong:
            name = collection.names[int(some[wrong[0]])]
            raise StoreError(
                f"{store.folder}: adapter {name!r}, {info.name}: found an error of "
                f"{float(found[wrong[0]]):.4g}, expected {float(said[wrong[0]]):.4g}; the "
                "generation was not published"
            )
        has = source.ranks.view(-1, info.each).sum(dim=1) > 0
        total += torch.where(has, found, 0.0)
        count += has
    mean = total / count.clamp_min(1)
    if limit is not None and bool((mean > limit * (1 + _TOLERANCE) + _TOLERANCE).any()):
        worst = int(mean.argmax())
        raise StoreError(
            f"{store.folder}: adapter {collection.names[int(some[worst])]!r}: found an error of "
            f"{float(mean[worst]):.4g}, expected {limit:.4g} at most; the generation was not "
            "published"
        )
