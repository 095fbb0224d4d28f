"""Blends on one worker: what the layers add is the weighted sum of what the parts' deltas are."""

import math

import pytest
import torch

pytest.importorskip("vllm")

from vllm.lora.request import LoRARequest

from tests.plugin.conftest import HIDDEN, SHAPES, TinyModel
from tests.several_rows import compress
from vllm_jd.compressor import Settings, read_adapters
from vllm_jd.plugin.api.blend_requests import blend_request
from vllm_jd.plugin.api.requests import adapter_request
from vllm_jd.plugin.engine import adapters as engine_adapters
from vllm_jd.plugin.engine.adapters import AdapterUnavailable
from vllm_jd.store.blend import Blend, BlendError

N = 7
METHODS = {
    "clusters": Settings(rank=3, clusters=3, store_dtype="float32"),
    "by module": Settings(rank=3, clusters=3, store_dtype="float32"),
    "diagonal": Settings(method="jd-diag", rank=5, clusters=2, store_dtype="float32"),
    "own rows": Settings(rank=2, clusters=3, store_dtype="float32"),
    "kept": Settings(rank=2, clusters=3, max_adapter_error=0.7, store_dtype="float32"),
    "svd": Settings(method="svd", rank=2, store_dtype="float32"),
    "ties": Settings(method="ties", store_dtype="float32"),
    "int8": Settings(rank=3, clusters=3, store_dtype="int8"),
}
ROWS = {"own rows": {"own": 1}, "by module": {"by_module": True}}


@pytest.fixture(scope="module")
def adapters(tmp_path_factory, write_adapters):
    return write_adapters(
        tmp_path_factory.mktemp("adapters"), N, shapes=SHAPES, ranks=(2, 3), kind="real"
    )


@pytest.fixture(scope="module")
def uploads(tmp_path_factory, write_adapters):
    """One on all modules, one on some of them, of another rank."""
    folder = tmp_path_factory.mktemp("uploads")
    some = dict(list(SHAPES.items())[3:9])
    (whole,) = write_adapters(folder / "whole", 1, shapes=SHAPES, ranks=(2,), seed=8, kind="real")
    (part,) = write_adapters(folder / "part", 1, shapes=some, ranks=(8,), seed=9, kind="real")
    return whole, part


@pytest.fixture(scope="module", params=METHODS)
def store(request, tmp_path_factory, adapters):
    path = tmp_path_factory.mktemp("store") / "s"
    rows = ROWS.get(request.param, {})
    return compress(read_adapters(adapters), path, METHODS[request.param], **rows)


@pytest.fixture(scope="module")
def clusters(tmp_path_factory, adapters):
    path = tmp_path_factory.mktemp("store") / "s"
    return compress(read_adapters(adapters), path, METHODS["clusters"])


def deltas_of(store, name):
    return {module: b.double() @ a.double() for module, (b, a) in store.factors(name).items()}


def added(*weighted):
    """Σ weight · deltas of some (deltas, weight)."""
    total = {}
    for deltas, weight in weighted:
        for module, delta in deltas.items():
            total[module] = total.get(module, 0) + weight * delta
    return total


def check(runner, requests, wanted, bound=1e-4):
    """A step of one token for each request against the deltas that each should have."""
    x = torch.randn(len(requests), HIDDEN, generator=torch.Generator().manual_seed(0))
    runner.begin(requests)
    found = runner.model(x)
    for i, deltas in enumerate(wanted):
        expected = TinyModel().expected(x[i], deltas)
        error = float((found[i].double() - expected).norm() / expected.norm())
        assert error < bound, f"request {i} is off by {error:.3g}"


def members(store):
    """The adapters of each cluster of the first module."""
    found = {}
    for i, cluster in enumerate(store.chosen[:, 0, 0].tolist()):
        found.setdefault(cluster, []).append(store.names[i])
    return [names for _, names in sorted(found.items())]


def test_any_blend_is_the_weighted_sum(store, uploads, make_runner, peft_deltas):
    """Beside plain adapters and the base model, in one batch."""
    runner = make_runner(store, TinyModel(), max_blend=8).load()
    names = store.names
    known = {name: deltas_of(store, name) for name in names}
    known |= {folder: peft_deltas(folder) for folder in uploads}
    whole, part = uploads
    blends = [
        {names[0]: 0.7, names[1]: 0.3},
        dict.fromkeys(names, 0.25),
        {names[2]: -0.5},
        {names[0]: 1.0, whole: 1.0},
        {names[3]: 0.5, names[4]: -1.5, whole: 0.75, part: 2.0},
        {part: 0.5},
        {whole: 1.0},
    ]
    for some in (blends[:3], blends[3:6], blends[6:], blends[:3]):
        requests = [None, *(adapter_request(store, blend) for blend in some)]
        requests.append(adapter_request(store, names[5]))
        wanted = [{}, *(added(*((known[p], w) for p, w in blend.items())) for blend in some)]
        # What is summed of int8 cores is rounded to 8 bits once more.
        bound = 0.02 if store.manifest.quantised else 1e-4
        check(runner, requests, [*wanted, known[names[5]]], bound)


def test_within_a_cluster_it_takes_one_core_slot_and_no_long_one(clusters, make_runner):
    runner = make_runner(clusters, TinyModel(), max_blend=4).load()
    cluster = max(members(clusters), key=len)
    request = adapter_request(clusters, dict.fromkeys(cluster[:4], 0.5))
    (placed,) = runner.hold([request])
    count = runner.adapters.capacity.cores
    assert count <= placed.lora_int_id - 1 < count + runner.adapters.capacity.blends
    across = adapter_request(clusters, {each[0]: 0.5 for each in members(clusters)})
    (placed,) = runner.hold([across])
    assert placed.lora_int_id - 1 >= count + runner.adapters.capacity.blends
    assert runner.adapters.residency.fills["basis"] == 0, "its bases were there"


def test_each_part_is_read_once_whatever_the_clusters(clusters, make_runner, monkeypatch):
    """For the core of each cluster only the parts that are in it."""
    runner = make_runner(clusters, TinyModel(), max_blend=8).load()
    worker, read = runner.lora_manager._stores[1].store, []
    cores = worker.cores

    def counted(first, last):
        read.extend(range(first, last))
        return cores(first, last)

    monkeypatch.setattr(worker, "cores", counted)
    blend = dict(zip(clusters.names, (0.5, -0.25, 1.0, 0.75, 2.0, -1.5, 0.1), strict=True))
    known = added(*((deltas_of(clusters, name), weight) for name, weight in blend.items()))
    check(runner, [adapter_request(clusters, blend)], [known])
    assert len(members(clusters)) == 3 and sorted(read) == list(range(N))


def test_one_order_of_parts_is_another_of_the_same_blend(clusters, make_runner):
    runner = make_runner(clusters, TinyModel(), max_blend=4).load()
    a, b = clusters.names[:2]
    requests = [
        adapter_request(clusters, {a: 0.7, b: 0.3}),
        adapter_request(clusters, {b: 0.3, a: 0.7}),
        adapter_request(clusters, {b: 0.3, a: 0.7, clusters.names[2]: 0.0}),
        adapter_request(clusters, {a: 0.7, b: 0.30001}),
        adapter_request(clusters, {a: 0.3, b: 0.7}),
    ]
    found = [runner.adapters.resolve(request).identity for request in requests]
    assert found[0] == found[1] == found[2]
    assert len(set(found)) == 3


def test_what_it_is_known_by_is_known_before_anything_is_read(clusters, make_runner):
    runner = make_runner(clusters, TinyModel(), max_blend=4).load()
    request = adapter_request(clusters, dict.fromkeys(clusters.names[:2], 0.5))
    assert runner.adapters._known_identity(request) is None
    identity = runner.adapters.resolve(request).identity
    assert runner.adapters._known_identity(request) == identity


def test_uploads_may_come_while_a_part_is_looked_for(clusters, uploads, make_runner):
    """vLLM hashes requests in another thread than the one in which uploads are loaded."""
    adapters = make_runner(clusters, TinyModel(), max_blend=4).load().adapters

    class Changing(str):
        """Another upload comes as this one is looked at."""

        def __eq__(self, other):
            adapters._uploads[len(adapters._uploads), "another"] = "digest"
            return super().__eq__(other)

        __hash__ = str.__hash__

    for folder in uploads:
        adapters._uploads[len(adapters._uploads), Changing(folder)] = "digest"
    own = blend_request("b", Blend(weights={"own": 1.0}), {"own": "/not/loaded"})
    assert adapters._known_identity(own) is None and len(adapters._uploads) == 4


def test_an_upload_that_only_a_blend_names_goes_with_it(clusters, uploads, make_runner):
    runner = make_runner(clusters, TinyModel(), max_blend=4).load()
    adapters = runner.adapters
    request = adapter_request(clusters, {clusters.names[0]: 0.5, uploads[0]: 0.5})
    reference = adapters.resolve(request)
    adapters.keep(reference, "blend")
    assert len(adapters._sources) == 3
    adapters.let_go(reference)
    assert list(adapters._sources) == [1]
    assert len(runner.lora_manager._blends._known) == 0
    runner.hold([adapter_request(clusters, clusters.names[0])])
    assert runner.lora_manager._uploads._known == {}, "the workers keep it"


def test_one_that_others_name_stays(clusters, uploads, make_runner):
    runner = make_runner(clusters, TinyModel(), max_blend=4).load()
    own = LoRARequest("own", 50, str(uploads[0]))
    runner.add_lora(own)
    blend = adapter_request(clusters, {clusters.names[0]: 0.5, uploads[0]: 0.5})
    runner.hold([blend])
    runner.hold([])
    assert len(runner.adapters._sources) == 3
    runner.remove_lora(50)
    assert list(runner.adapters._sources) == [1]


def test_with_a_source_its_blends_go_and_no_others(clusters, uploads, make_runner, monkeypatch):
    monkeypatch.setattr(engine_adapters, "_BLENDS", 3)
    runner = make_runner(clusters, TinyModel(), max_blend=4).load()
    adapters, (a, b) = runner.adapters, clusters.names[:2]
    for number, folder in enumerate(uploads):
        runner.add_lora(LoRARequest(f"own{number}", 50 + number, str(folder)))
    asked = [{a: 0.5, b: 0.5}, {a: 0.5, uploads[0]: 0.5}, {b: 1.0, uploads[1]: 0.5}]
    made = [adapters.resolve(adapter_request(clusters, blend)).identity for blend in asked]
    runner.remove_lora(51)
    assert list(adapters._blends) == made[:2]
    made += [adapters.resolve(adapter_request(clusters, {n: 0.5})).identity for n in (a, b)]
    assert list(adapters._blends) == made[1:2] + made[3:], "the oldest made way for the last"
    runner.remove_lora(50)
    assert list(adapters._blends) == made[3:] and set(adapters._sources) >= {1}
    runner.hold([])
    assert len(runner.lora_manager._blends._known) == 2, "the workers know no others"
    assert {n for own in adapters._blends_of.values() for n in own} == set(made[3:])


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_codes_are_rounded_once_more(dtype, tmp_path, adapters, make_runner):
    """By about what one rounding costs."""
    settings = Settings(rank=3, clusters=1, store_dtype=dtype)
    store = compress(read_adapters(adapters), tmp_path / "s", settings)
    blend = {store.names[0]: 0.7, store.names[1]: 0.3}
    known = added(*((deltas_of(store, name), weight) for name, weight in blend.items()))
    runner = make_runner(store, TinyModel(), max_blend=2).load()
    check(runner, [adapter_request(store, blend)], [known], {"int8": 0.02, "int4": 0.2}[dtype])


class TestWays:
    """Against PEFT's own functions, on the cores."""

    @pytest.mark.parametrize("way", ["ties", "dare_linear", "dare_ties"])
    def test_cores_are_merged_as_peft_merges_task_tensors(
        self, way, clusters, make_runner, monkeypatch
    ):
        from peft.utils import merge_utils

        from vllm_jd.store import blend as blends

        names = max(members(clusters), key=len)[:3]
        weights = dict(zip(names, (0.9, 0.6, -0.4), strict=False))
        drawn = {}
        if way != "ties":  # what DARE drops is drawn: have both draw the same

            def draw(n, density, seed, whose, module):
                generator = torch.Generator().manual_seed(hash((whose, module)) % 2**31)
                drawn[whose, module] = torch.rand(n, generator=generator) < density
                return drawn[whose, module]

            monkeypatch.setattr(blends, "_drawn", draw)
        runner = make_runner(clusters, TinyModel(), max_blend=4).load()
        request = adapter_request(clusters, weights, way=way, density=0.5)
        wanted = {}
        check(runner, [None], [{}])
        runner.hold([request])
        order = next(iter(runner.lora_manager._blends._known.values())).order
        ordered = [clusters.names[term.number] for term in order.terms]
        for module in clusters.manifest.modules:
            its = slice(module.core_offset, module.core_offset + module.core_size)
            cores = []
            for name in ordered:
                i = clusters.index(name)
                cores.append(clusters.cores(i, i + 1)[0, its])
            if way != "ties":
                masks = [drawn[whose, module.name] for whose in order.whose]
                taken = iter(masks)
                monkeypatch.setattr(
                    merge_utils,
                    "random_pruning",
                    lambda tensor, density, rescale, taken=taken: tensor * next(taken) / density,
                )
            w = torch.tensor([weights[name] for name in ordered])
            merged = getattr(merge_utils, way)(cores, w, 0.5)
            bases = clusters.bases(module.name)
            row = int(clusters.chosen[clusters.index(names[0]), clusters.module_index(module.name)])
            b, a = bases.factors(row, merged)
            wanted[module.name] = b.double() @ a.double()
        check(runner, [request], [wanted])

    def test_what_dare_drops_depends_on_the_seed_alone(self, clusters, make_runner):
        names = max(members(clusters), key=len)[:2]
        x = torch.randn(1, HIDDEN, generator=torch.Generator().manual_seed(0))
        found = []
        for seed in (0, 0, 1):
            runner = make_runner(clusters, TinyModel(), max_blend=4).load()
            how = {"way": "dare_linear", "density": 0.5, "seed": seed}
            runner.begin([adapter_request(clusters, dict.fromkeys(names, 0.5), **how)])
            found.append(runner.model(x))
        assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])

    def test_parts_of_other_clusters_are_refused(self, clusters, uploads, make_runner):
        runner = make_runner(clusters, TinyModel(), max_blend=4).load()
        first, second = (each[0] for each in members(clusters)[:2])
        for blend in ({first: 0.5, second: 0.5}, {first: 0.5, uploads[0]: 0.5}):
            request = adapter_request(clusters, blend, way="ties", density=0.5)
            with pytest.raises(AdapterUnavailable, match="parts of one cluster"):
                runner.adapters.resolve(request)
        assert list(runner.adapters._sources) == [1], "an upload that was loaded for it stays"


class TestRefusals:
    @pytest.mark.parametrize(
        ("weight", "how", "match"),
        [
            (math.nan, {}, "the weight nan of"),
            (math.inf, {}, "the weight inf of"),
            (1e5, {}, "at most 100"),
            (0.0, {}, "other than 0"),
            (1.0, {"way": "cat"}, "way"),
            (1.0, {"density": 0.5}, "drops nothing"),
            (1.0, {"way": "ties"}, "density None"),
            (1.0, {"way": "ties", "density": 1.5}, "density 1.5"),
        ],
    )
    def test_one_that_cannot_be(self, clusters, weight, how, match):
        with pytest.raises(BlendError, match=match):
            adapter_request(clusters, {clusters.names[0]: weight}, **how)

    def test_nobody(self, clusters):
        with pytest.raises(BlendError, match="no parts"):
            adapter_request(clusters, {})

    def test_too_many_parts(self, clusters, make_runner):
        runner = make_runner(clusters, TinyModel(), max_blend=2).load()
        request = adapter_request(clusters, dict.fromkeys(clusters.names[:3], 0.5))
        with pytest.raises(AdapterUnavailable, match="found 3 parts, expected 2 at most"):
            runner.adapters.resolve(request)

    def test_a_server_without_them(self, clusters, make_runner):
        runner = make_runner(clusters, TinyModel()).load()
        request = adapter_request(clusters, {clusters.names[0]: 0.5})
        with pytest.raises(AdapterUnavailable, match="--max-blend 0"):
            runner.adapters.resolve(request)
        assert runner.lora_manager._slots.long_rows is None

    def test_an_unknown_part(self, clusters):
        with pytest.raises(KeyError):
            adapter_request(clusters, {"nobody": 0.5})
