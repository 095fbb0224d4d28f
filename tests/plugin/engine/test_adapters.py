"""Who an adapter is and how long it lives in an engine: the real manager, a tiny model, PEFT's
deltas. Each test says what a server must answer after something changed around it."""

import errno
import os
import shutil
import time
from itertools import count

import pytest
import torch

pytest.importorskip("vllm")

from vllm.exceptions import LoRAAdapterNotFoundError
from vllm.lora.request import LoRARequest

from tests.plugin.conftest import HIDDEN, SHAPES, TinyModel
from vllm_jd.compressor import Settings, read_adapters
from vllm_jd.compressor.run.compress import compress
from vllm_jd.plugin.api.requests import adapter_request, store_path, upload_digest, upload_path
from vllm_jd.plugin.engine import orders
from vllm_jd.plugin.engine.adapters import AdapterUnavailable
from vllm_jd.plugin.engine.orders import AlsoAt, Carried, LoadUpload
from vllm_jd.plugin.engine.residency import Adapter, Basis
from vllm_jd.plugin.placed import placed
from vllm_jd.store.generations import prune

N = 6
SETTINGS = Settings(rank=3, clusters=3, store_dtype="float32")


@pytest.fixture(scope="module")
def adapters(tmp_path_factory, write_adapters):
    return write_adapters(tmp_path_factory.mktemp("adapters"), N, shapes=SHAPES)


@pytest.fixture(scope="module")
def store(tmp_path_factory, adapters):
    return compress(read_adapters(adapters), tmp_path_factory.mktemp("store") / "s", SETTINGS)


def deltas_of(store, name):
    return {module: b.double() @ a.double() for module, (b, a) in store.factors(name).items()}


class Requests:
    """Requests that begin, run steps together and end, as the scheduler has them."""

    def __init__(self, runner):
        self.runner, self.engine = runner, runner.adapters
        self._numbers = count()
        self.running = {}  # number → (reference, the LoRARequest with its slot)
        self._tokens = torch.Generator().manual_seed(0)

    def arrive(self, lora):
        reference = self.engine.resolve(lora)
        self.engine.keep(reference, lora.lora_name)
        return reference

    def start(self, reference):
        slot = self.engine.acquire(reference)
        assert slot is not None, "no room"
        number = next(self._numbers)
        self.running[number] = reference, placed(reference.identity, slot)
        return number

    def begin(self, lora):
        return self.start(self.arrive(lora))

    def end(self, *numbers):
        for number in numbers:
            reference, _ = self.running.pop(number)
            self.engine.release(reference)
            self.engine.let_go(reference)

    def step(self):
        """One token of each: number → (token, what the model made of it). Who failed ends."""
        step = object()
        self.engine.flush(step)
        loras = [lora for _, lora in self.running.values()]
        ids = tuple(lora.lora_int_id for lora in loras)
        self.runner._set_active_loras(ids, ids, set(loras))
        x = torch.randn(len(loras), HIDDEN, generator=self._tokens)
        found = dict(zip(self.running, zip(x, self.runner.model(x), strict=True), strict=True))
        self.failed = self.engine.failed(step)
        ended = [
            n for n, (reference, _) in self.running.items() if reference.adapter in self.failed
        ]
        self.end(*ended)
        self.engine.give_up_lost()
        return {number: each for number, each in found.items() if number not in ended}

    def check(self, expected):
        """Every running request gets the answers of its deltas: number → module → delta."""
        outputs = self.step()
        assert set(outputs) == set(expected)
        for number, (token, found) in outputs.items():
            wanted = self.runner.plain.expected(token, expected[number])
            distance = float((found.double() - wanted).norm() / wanted.norm())
            assert distance < 2e-3, (number, distance)  # others' weights: about 1


@pytest.fixture
def serve(make_runner):
    def serve(store, **plugin):
        model = TinyModel()
        runner = make_runner(store, model, **plugin)
        runner.plain = model
        return Requests(runner.load())

    return serve


def version(folder, write_adapters, seed, **kind):
    """Write an adapter of other numbers into one folder; returns it."""
    made = write_adapters(folder.parent / f"made-{seed}", 1, shapes=SHAPES, seed=seed, **kind)[0]
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(made, folder)
    return folder


def lora(name, number, folder, **options):
    return LoRARequest(name, number, str(folder), **options)


def named(name, number, folder, **options):
    """As the API server names it."""
    return lora(name, number, upload_path(upload_digest(folder), str(folder)), **options)


# ---------------------------------------------------------------- row 1, 2, 7, 15: versions


@pytest.mark.parametrize("as_api", [True, False])
def test_two_versions_of_a_name_run_side_by_side(
    store, serve, tmp_path, write_adapters, peft_deltas, as_api
):
    """Row 1. The second is deployed in the first one's place while requests of it run and wait."""
    make = named if as_api else lora
    folder = version(tmp_path / "up", write_adapters, 1)
    requests, first = serve(store), peft_deltas(folder)
    requests.engine.add_lora(make("up", 7, folder))
    old = requests.begin(make("up", 7, folder))
    waiting = requests.arrive(make("up", 7, folder))
    requests.check({old: first})
    requests.engine.remove_lora(7)
    version(folder, write_adapters, 2)
    second = peft_deltas(folder)
    requests.engine.add_lora(make("up", 8, folder))
    new = requests.begin(make("up", 8, folder))
    late = requests.start(waiting)
    identities = {n: lora.lora_name for n, (_, lora) in requests.running.items()}
    assert identities[old] == identities[late] != identities[new], "blocks are keyed by it"
    requests.check({old: first, new: second, late: first})
    requests.end(old, late)
    requests.check({new: second})
    assert len(requests.engine._sources) == 2, "the first version is given up"


@pytest.mark.parametrize("waits_only", [True, False])
def test_who_waits_keeps_what_it_asked_for_when_that_is_unloaded(
    store, serve, tmp_path, write_adapters, peft_deltas, waits_only
):
    """Nobody runs with it: all that keeps the upload is a request that has no slot yet."""
    folder = version(tmp_path / "up", write_adapters, 3)
    deltas, requests = peft_deltas(folder), serve(store)
    requests.engine.add_lora(named("up", 7, folder))
    waiting = requests.arrive(named("up", 7, folder))
    assert requests.engine.remove_lora(7)
    if not waits_only:  # another upload is loaded meanwhile
        other = version(tmp_path / "other", write_adapters, 4)
        requests.engine.add_lora(named("other", 8, other))
    shutil.rmtree(folder)
    requests.check({requests.start(waiting): deltas})


@pytest.mark.parametrize("running", [True, False])
def test_other_files_of_the_same_name_path_and_id_are_other_weights_once_unloaded(
    store, serve, tmp_path, write_adapters, peft_deltas, running
):
    """Row 2, with the same id as well: offline, ids are the user's."""
    folder = version(tmp_path / "up", write_adapters, 1)
    requests, expected = serve(store), {}
    requests.engine.add_lora(lora("up", 1, folder))
    number = requests.begin(lora("up", 1, folder))
    expected[number] = peft_deltas(folder)
    requests.check(expected)
    if not running:
        requests.end(number)
        expected.clear()
    assert requests.engine.remove_lora(1)
    version(folder, write_adapters, 2)
    requests.engine.add_lora(lora("up", 1, folder))
    expected[requests.begin(lora("up", 1, folder))] = peft_deltas(folder)
    requests.check(expected)


def test_another_version_in_place_is_read_once_and_only_when_asked(
    store, serve, tmp_path, write_adapters, peft_deltas, monkeypatch
):
    """Row 7."""
    folder = version(tmp_path / "up", write_adapters, 1)
    requests, first = serve(store), peft_deltas(folder)
    reads = []
    uploads = requests.runner.lora_manager._uploads
    load = uploads._load
    monkeypatch.setattr(uploads, "_load", lambda request: reads.append(1) or load(request))
    requests.engine.add_lora(lora("up", 1, folder, load_inplace=True))
    old = requests.begin(lora("up", 1, folder))
    version(folder, write_adapters, 2)
    second = peft_deltas(folder)
    same = requests.begin(lora("up", 1, folder))
    requests.check({old: first, same: first})  # changed files are not served unasked
    requests.engine.add_lora(lora("up", 1, folder, load_inplace=True))
    new = requests.begin(lora("up", 1, folder))
    shutil.rmtree(folder)
    for _ in range(3):
        requests.check({old: first, same: first, new: second})
    assert len(reads) == 2
    requests.end(old, same)
    assert len(requests.engine._sources) == 2, "nothing is left of the first"
    assert requests.engine.list_loras() == {1}


def test_memory_of_what_is_unloaded_is_given_up_when_its_last_request_ends(store, serve, adapters):
    """Row 15, for ids that were loaded and for those that requests alone have named."""
    requests = serve(store)
    uploads = requests.runner.lora_manager._uploads
    requests.engine.add_lora(lora("loaded", 1, adapters[0]))
    both = [requests.begin(lora("loaded", 1, adapters[0]))]
    both.append(requests.begin(lora("named", 2, adapters[1])))
    requests.step()
    assert len(uploads._loaded) == 2
    assert requests.engine.remove_lora(1) and requests.engine.remove_lora(2)
    assert not requests.engine.remove_lora(1) and not requests.engine.remove_lora(99)
    requests.step()
    assert len(uploads._loaded) == 2
    for left, number in ((1, both[0]), (0, both[1])):
        requests.end(number)
        requests.step()
        assert len(uploads._loaded) == len(uploads._known) == left
    assert list(requests.engine._sources) == [1]
    assert all(adapter.source == 1 for adapter in requests.engine.residency.adapters())


def test_what_is_told_of_adapters(store, serve, adapters):
    requests = serve(store, core_slots=4, uploads=1)
    engine = requests.engine
    first, _, third = store.names[:3]
    others = [adapter_request(store, name) for name in store.names[1:5]]
    path = store_path(store.path, store.generation)
    upload = named("up", 1, adapters[0])
    asked = [(first, path), (third, path), ("nobody", path), ("up", upload.lora_path), ("x", "/y")]

    def told():
        return [each[:3] for each in engine.tell(asked)]

    unknown = (False, False, 0)
    assert told() == [(True, False, 0), (True, False, 0), unknown, unknown, unknown]
    assert [each[3] for each in engine.tell(asked)] == [None] * 5
    assert len(engine._sources) == 1, "nothing is read for it"
    before = time.time()
    waiting = engine.resolve(adapter_request(store, first))
    engine.keep(waiting, first)
    numbers = [requests.begin(each) for each in (adapter_request(store, first), upload)]
    requests.step()
    assert told()[0] == (True, True, 2) and told()[3] == (True, True, 1)
    used = [each[3] for each in engine.tell(asked)]
    assert before <= used[0] <= used[3] <= time.time() and used[1] is None
    requests.end(*numbers)
    assert told()[0] == (True, True, 1) and told()[3] == (True, True, 0)
    # A pin is no request, and holds what is resident against others.
    engine.add_lora(upload)
    engine.pin_lora(1)
    assert told()[3] == (True, True, 0)
    assert told()[0] == (True, True, 1)
    numbers = [requests.begin(each) for each in others]
    requests.step()
    requests.end(*numbers)
    assert told()[0] == (True, False, 1), "who waits holds no slot"
    engine.let_go(waiting)
    engine.remove_lora(1)
    assert told() == [(True, False, 0), (True, True, 0), unknown, unknown, unknown]
    assert engine.tell(asked)[3][3] == used[3], "it was asked for all the same"


def test_two_ids_of_one_content_are_given_up_with_the_second(store, serve, adapters):
    requests = serve(store)
    for number in (1, 2):
        requests.engine.add_lora(lora(f"n{number}", number, adapters[0]))
    assert len(requests.engine._sources) == 2, "read once"
    requests.engine.remove_lora(1)
    assert len(requests.engine._sources) == 2
    requests.engine.remove_lora(2)
    assert len(requests.engine._sources) == 1


# ---------------------------------------------------------------- row 3, 4, 5, 12: refused


def refused(requests, folder, match, error=ValueError):
    before = len(requests.engine._sources)
    with pytest.raises(error, match=match):
        requests.engine.add_lora(lora("bad", 5, folder))
    with pytest.raises(AdapterUnavailable):
        requests.engine.resolve(lora("bad", 5, folder))
    assert len(requests.engine._sources) == before
    assert requests.engine.list_loras() == set()
    assert not requests.runner.lora_manager._uploads._loaded


def test_what_cannot_be_served_is_refused_when_it_is_loaded(
    store, serve, tmp_path, write_adapters, write_adapter, make_factors, adapters
):
    requests = serve(store)
    running = {
        requests.begin(adapter_request(store, name)): deltas_of(store, name)
        for name in store.names[:2]
    }
    requests.check(running)
    # Row 3: the configuration says less than the tensors have.
    (lying,) = write_adapters(
        tmp_path / "lying", 1, shapes=SHAPES, ranks=(6,), config={"r": 2, "rank_pattern": {}}
    )
    refused(requests, lying, r"of 2 layers: found rank 6, adapter_config\.json says 2$")
    # Row 4: a NaN.
    (factors,) = make_factors(1, shapes=SHAPES)
    for bad in (float("nan"), float("inf")):
        factors["model.layers.1.mlp.down_proj"][1][0, 0] = bad
        folder = write_adapter(tmp_path / "bad", factors)
        refused(requests, folder, r"layers\.1\.mlp\.down_proj\.lora_A\.weight: found NaN or infin")
    # Row 5: of a larger model of the family.
    wide = {name: (2 * d_in, 2 * d_out) for name, (d_in, d_out) in SHAPES.items()}
    (large,) = write_adapters(tmp_path / "large", 1, shapes=wide)
    refused(requests, large, r"expected \[\d+, 4\] and \[4, \d+\].*faults more")
    deep = SHAPES | {"model.layers.9.mlp.up_proj": (HIDDEN, 16)}
    (deeper,) = write_adapters(tmp_path / "deep", 1, shapes=deep)
    refused(requests, deeper, r"1 modules that cannot be served \(such as model\.layers\.9")
    (high,) = write_adapters(tmp_path / "high", 1, shapes=SHAPES, ranks=(9,))
    refused(requests, high, "max_lora_rank")
    # Row 12: what stood for vLLM's warm-up.
    refused(requests, "/not/a/real/path", "/not/a/real/path", LoRAAdapterNotFoundError)
    requests.check(running)
    number = requests.begin(lora("bad", 5, adapters[0]))
    requests.step()
    requests.end(number)
    requests.check(running)


def test_an_upload_that_one_worker_could_not_load_is_given_up_by_the_others(
    store, serve, adapters, monkeypatch
):
    requests = serve(store)
    rpc = requests.engine._rpc

    def of_two_workers(method, args=(), **how):
        """The second one fails."""
        answers = rpc(method, args, **how)
        loads = [i for i, order in enumerate(args[0]) if isinstance(order, LoadUpload)]
        failed = Carried(dict.fromkeys(loads, "out of memory"), 0.0)
        return [*answers, failed] if loads else answers

    monkeypatch.setattr(requests.engine, "_rpc", of_two_workers)
    with pytest.raises(ValueError, match="cannot be served: out of memory"):
        requests.engine.add_lora(lora("up", 1, adapters[0]))
    requests.step()
    uploads = requests.runner.lora_manager._uploads
    assert not uploads._known and not uploads._loaded


def test_a_fault_of_other_orders_fails_nobody_and_is_logged(
    store, serve, adapters, peft_deltas, monkeypatch
):
    """Of those that are sent along with a load, or with a step's fills."""
    requests, logged = serve(store), []
    monkeypatch.setattr(
        orders.logger, "error", lambda message, *args: logged.append(message % args)
    )
    requests.engine._orders.append(AlsoAt(99, "/there"))
    requests.engine.add_lora(lora("up", 1, adapters[0]))
    assert len(logged) == 1 and "did not carry out AlsoAt(source=99, path='/there')" in logged[0]
    requests.engine._orders += [AlsoAt(98, "/here")] * 2
    requests.check({requests.begin(lora("up", 1, adapters[0])): peft_deltas(adapters[0])})
    assert len(logged) == 3 and not requests.failed


def test_a_store_path_that_names_no_store_fails_its_request_alone(store, serve):
    requests = serve(store)
    for path, match in (
        ("vllm-jd:/nowhere", "expected vllm-jd:FOLDER@GENERATION"),
        ("vllm-jd:/nowhere@1", "nowhere"),
        (store_path(store.path, 9), "generation 9 of .*no generation 9 on disk; found 1"),
    ):
        with pytest.raises(AdapterUnavailable, match=match):
            requests.engine.resolve(LoRARequest("x", 1, path))
    with pytest.raises(AdapterUnavailable, match="no adapter"):
        requests.engine.resolve(LoRARequest("x", 1, store_path(store.path, 1)))


# ---------------------------------------------------------------- row 6, 8, 13, 14: ids and paths


def test_an_upload_that_has_to_be_read_again_and_is_gone_fails_alone(
    store, serve, tmp_path, write_adapters, peft_deltas
):
    """Row 6."""
    folders = [version(tmp_path / f"up{i}", write_adapters, 10 + i) for i in range(3)]
    deltas = [peft_deltas(folder) for folder in folders]
    requests = serve(store, uploads=1, max_cpu_loras=1)
    for i in (0, 1):
        number = requests.begin(lora(f"up{i}", i + 1, folders[i]))
        requests.check({number: deltas[i]})
        requests.end(number)
    shutil.rmtree(folders[0])
    bystander = requests.begin(adapter_request(store, store.names[0]))
    lost = requests.begin(lora("up0", 1, folders[0]))
    identity = requests.running[lost][0].identity
    requests.check({bystander: deltas_of(store, store.names[0])})
    (message,) = requests.failed.values()
    assert str(folders[0]) in message
    again = requests.begin(lora("up1", 2, folders[1]))
    requests.check({bystander: deltas_of(store, store.names[0]), again: deltas[1]})
    requests.end(again)
    version(folders[0], write_adapters, 10)
    back = requests.begin(lora("up0", 1, folders[0]))
    requests.check({bystander: deltas_of(store, store.names[0]), back: deltas[0]})
    assert requests.running[back][0].identity != identity, "none of the failed one's KV blocks"


def test_an_upload_is_read_again_from_whichever_of_its_folders_is_there(
    store, serve, tmp_path, write_adapters, peft_deltas
):
    """The same files in three folders, two of which came later, by a request and by a load."""
    folders = [version(tmp_path / f"copy{i}", write_adapters, 50) for i in range(3)]
    other = version(tmp_path / "other", write_adapters, 51)
    deltas, requests = peft_deltas(folders[0]), serve(store, uploads=1, max_cpu_loras=1)
    requests.engine.add_lora(lora("up", 1, folders[0]))
    for i, make in ((1, lora), (2, named)):
        requests.end(requests.begin(make("up", 1 + i, folders[i])))
    source = requests.engine._by_key[upload_digest(folders[0])].number
    assert len(requests.engine._sources) == 2, "one upload, whatever its folder"
    for gone, answers in ((0, True), (2, True), (1, False)):
        number = requests.begin(lora("other", 9, other))
        requests.check({number: peft_deltas(other)})  # the other is not in memory any more
        requests.end(number)
        shutil.rmtree(folders[gone])
        number = requests.begin(LoRARequest("up", 1, str(folders[0])))
        if answers:
            requests.check({number: deltas})
            requests.end(number)
    assert requests.step() == {}
    message = requests.failed[Adapter(source, 0)]
    assert all(str(folder) in message for folder in folders)
    version(folders[2], write_adapters, 50)
    assert requests.running == {}
    requests.check({requests.begin(LoRARequest("up", 1, str(folders[0]))): deltas})


def test_uploads_are_kept_in_main_memory(store, serve, tmp_path, write_adapters, peft_deltas):
    folders = [version(tmp_path / f"up{i}", write_adapters, 20 + i) for i in range(3)]
    deltas = [peft_deltas(folder) for folder in folders]
    requests = serve(store, uploads=1)
    for i in range(3):
        requests.engine.add_lora(lora(f"up{i}", i + 1, folders[i]))
    for folder in folders:
        shutil.rmtree(folder)
    for i in (0, 1, 2, 0):
        number = requests.begin(lora(f"up{i}", i + 1, folders[i]))
        requests.check({number: deltas[i]})
        requests.end(number)


def test_any_id_works_and_means_nothing(store, serve, adapters, peft_deltas):
    """Rows 8 and 13."""
    requests = serve(store)
    name = store.names[0]
    assert adapter_request(store, name).lora_int_id == 1
    expected = {requests.begin(adapter_request(store, name)): deltas_of(store, name)}
    for number, folder in zip((1, 2**31, 2**40), adapters[3:], strict=True):
        expected[requests.begin(lora("up", number, folder))] = peft_deltas(folder)
    requests.check(expected)


def test_a_path_may_be_spelled_as_it_is_liked(store, serve, adapters, peft_deltas, monkeypatch):
    """Row 14, and the server's home in an upload's path."""
    requests, name = serve(store), store.names[1]
    (store.path.parent / "x").mkdir(exist_ok=True)
    expected = {}
    for spelled in (store.path, f"{store.path.parent}/x/../{store.path.name}", f"{store.path}//"):
        asked = LoRARequest(name, 3, f"vllm-jd:{spelled}@{store.generation}")
        expected[requests.begin(asked)] = deltas_of(store, name)
    assert len({reference for reference, _ in requests.running.values()}) == 1
    monkeypatch.setenv("HOME", str(adapters[2].parent))
    expected[requests.begin(lora("up", 9, f"~/{adapters[2].name}"))] = peft_deltas(adapters[2])
    requests.check(expected)


# ---------------------------------------------------------------- row 9, 10: generations, reads


def generation(store, folders, settings=SETTINGS):
    return compress(read_adapters(folders), store.path, settings)


@pytest.fixture
def own(tmp_path, adapters):
    """A store that a test may write to."""
    return compress(read_adapters(adapters), tmp_path / "own", SETTINGS)


@pytest.mark.parametrize("core_slots", [None, 4])
def test_a_pruned_generation_is_read_to_its_end(own, serve, write_adapters, tmp_path, core_slots):
    """Row 9."""
    old = {name: deltas_of(own, name) for name in own.names}
    requests = serve(own, core_slots=core_slots)
    generation(own, write_adapters(tmp_path / "new", N, shapes=SHAPES, seed=5))
    assert 1 in prune(own.path, 0).held
    assert prune(own.path, 0, force=True).deleted == [1]
    for name in (*own.names, own.names[0]):
        number = requests.begin(LoRARequest(name, 1, store_path(own.path, 1)))
        requests.check({number: old[name]})
        requests.end(number)


@pytest.mark.parametrize("memory", [None, "half"])
def test_a_new_generation_is_served_beside_the_old_one_which_drains(
    own, serve, write_adapters, tmp_path, memory
):
    old = {name: deltas_of(own, name) for name in own.names}
    budget = {}
    if memory:
        whole = sum(4 * 3 * 3 * sum(shape) for shape in SHAPES.values())
        budget = {"adapter_memory": int(whole * 0.75) + 4 * 2000}
    requests = serve(own, **budget)
    second = generation(own, write_adapters(tmp_path / "new", N, shapes=SHAPES, seed=5))
    new = {name: deltas_of(second, name) for name in second.names}
    first_path, second_path = (store_path(own.path, number) for number in (1, 2))
    expected = {requests.begin(LoRARequest(own.names[0], 1, first_path)): old[own.names[0]]}
    # Of the same cluster: with half the memory a third one's basis finds a slot beside theirs.
    cluster = own.chosen[:, 0, 0].tolist()
    other = own.names[cluster.index(cluster[0], 1)]
    waiting = requests.arrive(LoRARequest(other, 2, first_path))
    assert requests.engine.measure(0)["draining"] == []
    requests.engine.serve_generation(str(own.path), 2)
    requests.engine.serve_generation(str(own.path), 2)  # another API process says so, too
    told = requests.engine.measure(1)
    assert (told["swaps"], told["draining"], told["recent"]) == (1, [(1, 2)], [other])
    requests.check(expected)
    for name in own.names:  # each cluster's basis gets a slot from somebody
        number = requests.begin(LoRARequest(name, 1, second_path))
        requests.check(expected | {number: new[name]})
        requests.end(number)
    expected[requests.start(waiting)] = old[other]
    requests.check(expected)
    for name in own.names:
        number = requests.begin(LoRARequest(name, 1, first_path))
        requests.check(expected | {number: old[name]})
        requests.end(number)
    told = requests.engine.measure(0)
    cores, bases = (requests.engine.residency.counts()[kind] for kind in ("core", "basis"))
    assert told["cores"] == (N, N) and told["whole"] == (memory is None)
    assert told["bases"][1] == 2 * 3 and told["slots"]["core"] == cores[:3]
    assert told["evictions"]["basis"] == bases.evictions > 0
    assert len(told["page_in_seconds"]) > N and min(told["page_in_seconds"]) > 0
    again = requests.engine.measure(0)
    assert sum(again["misses"].values()) == sum(again["hits"].values()) == again["swaps"] == 0
    assert again["page_in_seconds"] == [], "what was told once is not told again"
    requests.end(*expected)
    assert requests.engine.measure(0)["draining"] == []
    assert [source.path for source in requests.engine._sources.values()] == [str(own.path)]
    assert all(each.source != 1 for each in requests.engine.residency.adapters())
    late = requests.begin(LoRARequest(own.names[0], 1, first_path))  # it was on its way
    requests.check({late: old[own.names[0]]})
    requests.end(late)
    assert requests.engine._visited, "it goes after a while"


def test_a_generation_that_only_requests_name_goes_some_time_after_the_last(
    own, serve, write_adapters, tmp_path, monkeypatch
):
    """The first, a served one and a pinned adapter's stay."""
    clock = [1000.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    requests, made = serve(own), {1: own}
    for number in (2, 3):
        folders = write_adapters(tmp_path / f"new-{number}", N, shapes=SHAPES, seed=number)
        made[number] = generation(own, folders)
    deltas = {number: deltas_of(store, own.names[0]) for number, store in made.items()}

    def ask(number):
        asked = LoRARequest(own.names[0], number, store_path(own.path, number))
        return requests.begin(asked)

    def open_ones():
        requests.step()
        here = [source.store.generation for source in requests.engine._sources.values()]
        assert len(requests.runner.lora_manager._stores) == len(here)
        return here

    def later(seconds):
        clock[0] += seconds
        return open_ones()

    first, second = ask(2), ask(2)
    requests.check({first: deltas[2], second: deltas[2]})
    requests.end(first)
    assert later(1000) == [1, 2], "it is in use"
    requests.end(second)
    assert later(59) == [1, 2], "the next one finds it open"
    third = ask(2)
    requests.end(third)
    assert later(59) == [1, 2]
    assert later(2) == [1]
    again = ask(2)
    requests.check({again: deltas[2]})  # opened once more
    requests.engine.serve_generation(str(own.path), 2)
    requests.end(again)
    assert later(1000) == [2], "it is served"
    back = ask(1)
    requests.check({back: deltas[1]})
    requests.end(back)
    assert later(61) == [2], "the one that it started with is no other"
    asked = LoRARequest(own.names[0], 7, store_path(own.path, 3))
    requests.engine.add_lora(asked)
    requests.engine.pin_lora(7)
    assert later(1000) == [2, 3]
    requests.engine.remove_lora(7)
    assert later(61) == [2]
    requests.engine.add_lora(asked)
    assert requests.engine.list_loras() == {7} and later(61) == [2]
    assert requests.engine.list_loras() == set(), "an id that means nothing any more"
    with pytest.raises(ValueError, match="no loaded adapter of id 7"):
        requests.engine.pin_lora(7)


def fail_reads(monkeypatch, file, times):
    """The next reads of a file give EIO."""
    left, preadv = [times], os.preadv

    def failing(descriptor, *args):
        if left[0] and os.path.samestat(os.fstat(descriptor), file.stat()):
            left[0] -= 1
            raise OSError(errno.EIO, "Input/output error")
        return preadv(descriptor, *args)

    monkeypatch.setattr(os, "preadv", failing)
    return left


def test_a_core_that_cannot_be_read_fails_its_request_and_is_read_again(store, serve, monkeypatch):
    """Row 10."""
    requests = serve(store, core_slots=4)
    deltas = {name: deltas_of(store, name) for name in store.names}
    names = list(store.names)
    bystander = requests.begin(adapter_request(store, names[0]))
    requests.check({bystander: deltas[names[0]]})
    (file,) = store.folder.glob("cores-*")
    for name in names[1:]:
        left = fail_reads(monkeypatch, file, 2)  # together, and then alone
        number = requests.begin(adapter_request(store, name))
        identity = requests.running[number][0].identity
        requests.check({bystander: deltas[names[0]]})
        assert "Input/output error" in requests.failed[Adapter(1, store.index(name))]
        left[0] = 0
        number = requests.begin(adapter_request(store, name))
        assert requests.running[number][0].identity != identity
        requests.check({bystander: deltas[names[0]], number: deltas[name]})
        requests.end(number)


def test_a_basis_that_cannot_be_read_fails_those_who_need_it(store, serve, monkeypatch):
    """And what was written of them meanwhile is not trusted: the next try gets the same slots."""
    row = 4 * store.manifest.core_row + len(SHAPES) * store.manifest.rows * 28
    per_cluster = 4 * 3 * sum(d_in + d_out for d_in, d_out in SHAPES.values())
    requests = serve(store, adapter_memory=2 * per_cluster + N * row)
    assert [each.count for each in requests.engine.capacity.bases["v"]] == [2]
    deltas = {name: deltas_of(store, name) for name in store.names}
    clusters = {name: int(store.chosen[i, 0, 0]) for i, name in enumerate(store.names)}
    (file,) = store.folder.glob("bases*")
    for name in store.names:
        for other in [n for n in store.names if clusters[n] != clusters[name]][:1]:
            bystander = requests.begin(adapter_request(store, other))
            requests.check({bystander: deltas[other]})
            left = fail_reads(monkeypatch, file, 10**6)
            mates = [n for n in store.names if clusters[n] == clusters[name]][:2]
            for mate in mates:
                requests.begin(adapter_request(store, mate))
            outputs = requests.step()
            left[0] = 0
            if requests.failed:  # its basis was not there
                assert {store.index(mate) for mate in mates} == {
                    adapter.number for adapter in requests.failed
                }
                assert list(outputs) == [bystander]
            requests.end(*[number for number in requests.running if number != bystander])
            numbers = {requests.begin(adapter_request(store, mate)): mate for mate in mates}
            requests.check(
                {bystander: deltas[other]} | {number: deltas[m] for number, m in numbers.items()}
            )
            requests.end(bystander, *numbers)
    assert requests.engine._broken, "no read failed"


def test_a_pinned_adapter_whose_numbers_failed_holds_no_slot(
    store, serve, tmp_path, write_adapters, peft_deltas
):
    folders = [version(tmp_path / f"up{i}", write_adapters, 30 + i) for i in range(2)]
    deltas = [peft_deltas(folder) for folder in folders]
    requests = serve(store, uploads=1, max_cpu_loras=1)
    for i in (0, 1):
        requests.engine.add_lora(lora(f"up{i}", i + 1, folders[i]))
    shutil.rmtree(folders[0])
    requests.engine.pin_lora(1)
    requests.step()
    assert len(requests.failed) == 1
    version(folders[0], write_adapters, 30)
    number = requests.begin(lora("up0", 1, folders[0]))
    requests.check({number: deltas[0]})
    requests.engine.pin_lora(1)
    requests.end(number)
    requests.check({})
    assert requests.engine.residency.resident(
        Adapter(requests.engine._by_key[upload_digest(folders[0])].number, 0)
    )


# ---------------------------------------------------------------- the two halves agree


@pytest.mark.parametrize("clusters", [2, 3])
def test_the_engine_and_the_worker_begin_with_the_same_slots(
    tmp_path, adapters, serve, clusters, write_adapters
):
    folders = write_adapters(tmp_path / "real", N, kind="real", shapes=SHAPES, seed=clusters)
    settings = Settings(rank=3, clusters=clusters, store_dtype="float32")
    made = compress(read_adapters([*folders][::-1]), tmp_path / "s", settings)
    requests = serve(made)
    worker = requests.runner.lora_manager._stores[1]
    residency = requests.engine.residency
    for side, slots in worker.slots.items():
        for basis, slot in enumerate(slots.tolist()):
            assert residency._place[Basis(1, side, basis)].slot(Basis(1, side, basis)) == slot
    for i in range(N):
        assert residency.core_slot(Adapter(1, i)) == i


def test_one_store_of_another_shape_is_refused_beside_the_first(
    own, serve, write_adapters, tmp_path, peft_deltas
):
    requests = serve(own)
    generation(own, write_adapters(tmp_path / "new", N, shapes=SHAPES, seed=5), Settings(rank=7))
    faults = "found V of rank 7, expected 3 at most; found U of rank 7, expected 3 at most"
    with pytest.raises(AdapterUnavailable, match=rf"{faults}.*Start the server anew"):
        requests.engine.serve_generation(str(own.path), 2)
    number = requests.begin(adapter_request(own, own.names[0]))
    requests.check({number: deltas_of(own, own.names[0])})
