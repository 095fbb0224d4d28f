"""SHARE's version of a collection, stored as adapters of their own so that it can be served."""

from collections.abc import Sequence
from dataclasses import replace

import baselines

from vllm_jd.compressor import Collection
from vllm_jd.compressor.algebra.factors import ModuleFactors
from vllm_jd.compressor.report.summary import Sizes


class Share:
    """A collection as lorashare rebuilds it: a `Collection` itself.

    Args:
        collection: the adapters.
        rank: SHARE may store as many numbers as JD-Full of this rank.

    Raises:
        MissingPackage: lorashare is not installed.
    """

    def __init__(self, collection: Collection, rank: int):
        self.names, self.shapes = list(collection.names), dict(collection.shapes)
        self.base_model, self.factor_bytes = collection.base_model, collection.factor_bytes
        self.source_sha256, self.source_bytes = collection.source_sha256, collection.source_bytes
        numbers = sum(
            rank * (d_in + d_out) + len(self.names) * rank**2
            for d_in, d_out in self.shapes.values()
        )
        pairs = {module: pairs_of(collection.factors(module)) for module in self.shapes}
        self.fit = baselines.lorashare(pairs, numbers)
        self._rebuilt = [self.fit.reconstruct(i) for i in range(len(self.names))]

    def sizes(self, rebuilt: Sizes) -> Sizes:
        """What SHARE stores, in 16 bits as our stores have it, in place of what is rebuilt."""
        stored = self.fit.parameters
        return replace(
            rebuilt,
            store_bytes=2 * stored,
            store_parameters=stored,
            parameter_saved_ratio=1 - stored / rebuilt.adapter_parameters,
        )

    def factors(self, module: str) -> ModuleFactors:
        """All adapters' factors for one module."""
        return ModuleFactors.stack(self.pairs(module), *self.shapes[module])

    def pairs(self, module: str) -> list[baselines.Pair]:
        """(A, B) of every adapter of a module, as they are rebuilt."""
        return [each[module] for each in self._rebuilt]


def pairs_of(factors: ModuleFactors) -> Sequence[baselines.Pair]:
    """(A, B) of every adapter of a module, zero rows filling up to the highest rank."""
    a, b = factors.per_adapter(factors.a), factors.per_adapter(factors.b)
    return [(x.clone(), y.T.clone()) for x, y in zip(a, b, strict=True)]
