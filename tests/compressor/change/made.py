"""Adapters in memory, stores of them, and what a store says of them."""

import hashlib

import pytest

from vllm_jd.compressor import Settings
from vllm_jd.compressor.algebra.factors import ModuleFactors
from vllm_jd.compressor.run.compress import compress

SHAPES = {"m.0": (16, 12), "m.1": (12, 20)}
METHODS = {
    "jd-full": {"rank": 3, "clusters": 2},
    "one cluster": {"rank": 5},
    "guarded": {"rank": 3, "clusters": 2, "max_adapter_error": 0.14},
    "jd-diag": {"method": "jd-diag", "rank": 5, "clusters": 2},
    "svd": {"method": "svd", "rank": 2},
    "none": {"method": "none"},
    "hydraopt": {"method": "hydraopt", "rank": 4, "matrices": 3, "steps": 20},
    "ties": {"method": "ties"},
}


class Made:
    """Adapters in memory, as a `Collection`: name → module → (B, A)."""

    def __init__(self, adapters, shapes=SHAPES, base_model="org/tiny"):
        self.adapters = adapters
        self.names = list(adapters)
        self.shapes = shapes
        self.base_model = base_model
        self.source_sha256 = [
            hashlib.sha256(b"".join(x.numpy().tobytes() for p in f.values() for x in p)).hexdigest()
            for f in adapters.values()
        ]
        self.source_bytes = [1000 + i for i in range(len(adapters))]
        self.factor_bytes = 1000

    def factors(self, module):
        pairs = [f.get(module) for f in self.adapters.values()]
        pairs = [None if pair is None else (pair[1], pair[0]) for pair in pairs]
        return ModuleFactors.stack(pairs, *self.shapes[module], [1.0] * len(pairs))


def build(path, adapters, **options):
    return compress(Made(adapters), path, Settings(**options))


def delta(store, name, module):
    b, a = store.factors(name)[module]
    return b.double() @ a.double()


def source(adapters, name, module):
    b, a = adapters[name][module]
    return b.double() @ a.double()


def relative(found, expected):
    total = expected.square().sum()
    return float((found - expected).square().sum() / total) if total else 0.0


def check_errors(store, adapters):
    """Recorded norms and errors are those of what the store gives out, in dense float64."""
    for name, factors in adapters.items():
        row = store.index(name)
        for column, info in enumerate(store.manifest.modules):
            if info.name not in factors:
                assert not store.present[row, column]
                assert (int(store.rank[row, column]), float(store.error[row, column])) == (0, 0)
                continue
            expected = source(adapters, name, info.name)
            error = relative(delta(store, name, info.name), expected)
            assert float(store.error[row, column]) == pytest.approx(error, rel=1e-3, abs=1e-6)
            assert float(store.norm[row, column]) == pytest.approx(float(expected.norm()), rel=1e-5)
            assert int(store.rank[row, column]) == factors[info.name][1].shape[0]


def bits(store):
    """What the store gives out for each adapter, to the bit, and what it says of it."""
    result = {}
    for row, name in enumerate(store.names):
        found = [x.numpy().tobytes() for pair in store.factors(name).values() for x in pair]
        columns = (store.rank, store.norm, store.error, store.exact_error)
        columns = [c[row].numpy().tobytes() for c in columns if c is not None]
        said = [bytes(store.source_sha256[row].tolist()), int(store.source_bytes[row])]
        result[name] = (found, columns, said)
    return result


def linked(store, before):
    """Files that two generations have in common on disk."""
    inodes = {file.stat().st_ino for file in before.folder.iterdir()}
    return {file.name for file in store.folder.iterdir() if file.stat().st_ino in inodes}


def payload(store):
    """The generation's files but for the manifest, which holds the time."""
    files = (file for file in store.folder.iterdir() if file.name != "manifest.json")
    return {file.name: file.read_bytes() for file in files}
