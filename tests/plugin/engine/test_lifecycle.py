"""The right numbers for every token, whatever becomes of adapters meanwhile.

A machine loads, unloads, overwrites, pins, prunes, blends and switches generations beside requests
that begin and end, with few slots and reads that fail. Each request is held against a dense product
with the numbers that its adapter had when it began.
"""

import hashlib
import json
import re
import shutil
from collections import Counter

import pytest
import torch

pytest.importorskip("vllm")

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from hypothesis.stateful import run_state_machine_as_test as run
from safetensors.torch import load_file, save_file
from vllm.exceptions import LoRAAdapterNotFoundError
from vllm.lora.request import LoRARequest

from tests.plugin.conftest import SHAPES, TinyModel
from tests.plugin.engine.lifecycle import (
    EMBEDDING,
    VOCABULARY,
    DistantWorker,
    Engine,
    FailingReads,
    Worker,
    engine_config,
)
from tests.several_rows import compress
from vllm_jd.compressor import Settings, read_adapters
from vllm_jd.plugin.api.blend_requests import blend_request
from vllm_jd.plugin.api.requests import store_path, upload_digest, upload_path
from vllm_jd.plugin.config import PluginConfig
from vllm_jd.plugin.engine import adapters as engine_adapters
from vllm_jd.plugin.engine.adapters import AdapterUnavailable
from vllm_jd.plugin.engine.capacity import capacity_of
from vllm_jd.plugin.engine.tables import Tables
from vllm_jd.plugin.placed import BAD_BLEND
from vllm_jd.plugin.worker.slots import keeps_codes
from vllm_jd.row import RANK, STORED_FIELDS, U_START, V_START
from vllm_jd.store.blend import Blend
from vllm_jd.store.generations import open_number, prune

N, GENERATIONS, CONTENTS, FOLDERS = 7, 3, 4, 3
PARTS = 3
PROMPTS = [[1, 2, 3, 4, 5, 6, 7, 8, 9], [1, 2, 3, 4, 5, 6, 7, 8, 10, 11], [12], [13, 14, 15, 0, 1]]

QUIET = {"lora_alpha": 0.1}
"""Adapters about as large as the model's weights. Of larger ones the model's tanh is steep where a
token comes near 0, and float32 is then off by up to 0.3 % of what it should be."""

METHODS = {
    "clusters": Settings(rank=3, clusters=3, store_dtype="float32"),
    "int8": Settings(rank=3, clusters=3, store_dtype="int8"),
    "svd": Settings(method="svd", rank=2, store_dtype="float32"),
    "own rows": Settings(rank=2, clusters=3, store_dtype="float32"),
    "kept": Settings(rank=2, clusters=3, max_adapter_error=0.7, store_dtype="float32"),
}
ROWS = {"own rows": {"own": 1}}


class World:
    """What the examples of one store begin with, none of which they change."""

    def __init__(self, folder, method, write_adapters, peft_deltas):
        self.folder, self._examples = folder, 0
        for g in range(1, GENERATIONS + 1):
            adapters = folder / f"adapters-{g}"
            write_adapters(
                adapters, N, shapes=SHAPES, ranks=(2, 3), seed=g, kind="real", config=QUIET
            )
            rows = ROWS.get(method, {})
            compress(read_adapters([adapters]), folder / "store", METHODS[method], **rows)
        self.deltas, self._bases = {}, {}
        for g in range(1, GENERATIONS + 1):
            with open_number(folder / "store", g) as store:
                self.names = store.names
                for name in store.names:
                    self._bases[g, name] = bases_of(store, name)
                    self.deltas[g, name] = {
                        module: b.double() @ a.double()
                        for module, (b, a) in store.factors(name).items()
                    }
        like = {"kind": "real", "config": QUIET}
        good = write_adapters(
            folder / "good", CONTENTS, shapes=SHAPES, ranks=(2, 3), seed=9, **like
        )
        some = dict(list(SHAPES.items())[3:9])
        good += write_adapters(folder / "some", 1, shapes=some, ranks=(8,), seed=10, **like)
        self.good = good
        for i, content in enumerate(good):
            self.deltas["upload", i] = peft_deltas(content)
        wide = {name: (d_in, 2 * d_out) for name, (d_in, d_out) in SHAPES.items()}
        (shape,) = write_adapters(folder / "shape", 1, shapes=wide)
        (rank,) = write_adapters(folder / "rank", 1, shapes=SHAPES, ranks=(16,))
        (said,) = write_adapters(folder / "said", 1, shapes=SHAPES, ranks=(16,))
        config = json.loads((said / "adapter_config.json").read_text())
        (said / "adapter_config.json").write_text(json.dumps(config | {"r": 2}))
        (nan,) = write_adapters(folder / "nan", 1, shapes=SHAPES)
        tensors = load_file(nan / "adapter_model.safetensors")
        next(iter(tensors.values()))[0, 0] = torch.nan
        save_file(tensors, nan / "adapter_model.safetensors")
        self.bad = [shape, rank, said, nan, folder / "missing"]
        self.vllm_config = engine_config(folder / "model")
        self.rounded = METHODS[method].store_dtype == "int8"
        self._model, self._known = TinyModel(), {}
        self._tell_apart()

    def expected(self, whose, token):
        """Of one token with the adapter of this key, or None: the base model."""
        key = whose, token
        if key not in self._known:
            deltas = {}
            for part, weight in parts_of(whose):
                for module, delta in self.deltas[part].items():
                    deltas[module] = deltas.get(module, 0) + weight * delta
            self._known[key] = self._model.expected(EMBEDDING[token], deltas)
        return self._known[key]

    def has_room(self, whose, capacity):
        """Whether an engine of this capacity has slots for all bases of this key, if nobody else
        has any."""
        needed = {
            (key[0], basis)
            for key, _ in parts_of(whose)
            for basis in self._bases.get(key, ())  # an upload has slots of its own
        }
        for side in ("v", "u"):
            counts = Counter(
                next(i for i, c in enumerate(capacity.bases[side]) if basis[-1] <= c.rank)
                for _, basis in needed
                if basis[0] == side
            )
            if any(n > capacity.bases[side][i].count for i, n in counts.items()):
                return False
        return True

    def _tell_apart(self):
        """No adapter can be taken for another, nor for the base model."""
        for token in range(VOCABULARY):
            found = torch.stack([self.expected(key, token) for key in [None, *self.deltas]])
            distance = torch.cdist(found, found) / found.norm(dim=1)
            distance.fill_diagonal_(torch.inf)
            assert float(distance.min()) > 0.02, "the test could not tell them apart"

    def begin(self):
        """A copy of the store and of its generations, and a folder for uploads."""
        self._examples += 1
        folder = self.folder / f"example-{self._examples}"
        shutil.copytree(self.folder / "store", folder / "store")
        (folder / "uploads").mkdir()
        return folder


def bases_of(store, name):
    """What an adapter's rows are made of: (side, where its vectors lie in each module, rank)."""
    own, unused = store.chosen[store.index(name)], torch.zeros(len(STORED_FIELDS), dtype=torch.int)
    found = set()
    for places in own.T.tolist():  # the k-th row of each module
        rows = [
            store.rows(module.name)[place] if place >= 0 else unused
            for module, place in zip(store.manifest.modules, places, strict=True)
        ]
        rank = max(int(row[RANK]) for row in rows)
        for side, start in (("v", V_START), ("u", U_START)) if rank else ():
            found.add((side, tuple(int(row[start]) for row in rows), rank))
    return found


def parts_of(whose):
    """(key, weight) of what a request should see."""
    if whose is None:
        return []
    return whose[1] if whose[0] == "blend" else [(whose, 1.0)]


class Machine(RuleBasedStateMachine):
    """One engine, and what the requests of its users should see."""

    world: World
    ahead = False
    distant: DistantWorker | None = None
    options: dict

    @initialize(visited_seconds=st.sampled_from([0.0, 60.0]))
    def start(self, visited_seconds=60.0):
        world = self.world
        self._patches = pytest.MonkeyPatch()
        self._patches.setattr(engine_adapters, "_VISITED_SECONDS", visited_seconds)
        self.folder = world.begin()
        self.path = self.folder / "store"
        store = open_number(self.path, 1)
        manifest = self.path / "generations" / "1" / "manifest.json"
        digest = hashlib.sha256(manifest.read_bytes()).hexdigest()
        options = {"generation": 1, "manifest_sha256": digest, "max_loras": 2, "max_cpu_loras": 2}
        options["max_blend"] = PARTS
        options |= self.options
        self.reads = FailingReads()
        self._installed = self.reads.installed()
        self._installed.__enter__()
        workers = [Worker(store, options)]
        if self.distant is not None:
            workers.append(self.distant.start(store, options))
        self.workers = workers
        config = PluginConfig(store=str(self.path), **options)
        self.engine = Engine(world.vllm_config, workers, config, ahead=self.ahead)
        store.close()
        self.generation, self.deleted = 1, set()
        self.uploads = {}  # name → (LoRARequest, content)
        self.disk = {}  # folder → content that lies there
        self.pinned = None
        self.running = {}  # request → (key of the deltas, whether it may fail)
        self.count = self.ids = 0
        self.used_ids = []

    # --- requests ---

    def _begin(self, lora, whose, prompt, most, may_fail=False):
        self.count += 1
        name = f"r{self.count}"
        self.running[name] = whose, may_fail, self.reads.fired
        self.engine.add(name, PROMPTS[prompt], most, lora)

    prompts = st.integers(0, len(PROMPTS) - 1)
    lengths = st.integers(1, 6)

    @rule(prompt=prompts, most=lengths)
    def ask_the_base_model(self, prompt, most):
        self._begin(None, None, prompt, most)

    @rule(index=st.integers(0, N - 1), prompt=prompts, most=lengths, back=st.integers(0, 2))
    def ask_the_store(self, index, prompt, most, back):
        """Most often the generation that is served; another one can be named, too."""
        generation = self.generation if back else 1 + (self.count % GENERATIONS)
        name = self.world.names[index]
        lora = LoRARequest(name, 1000 + index, store_path(self.path, generation))
        gone = generation in self.deleted
        self._begin(lora, (generation, name), prompt, most, may_fail=gone)

    @rule(spelled=st.sampled_from(["x/../store", "./store"]), index=st.integers(0, N - 1))
    def ask_the_store_spelled_otherwise(self, spelled, index):
        (self.folder / "x").mkdir(exist_ok=True)
        name = self.world.names[index]
        path = f"vllm-jd:{self.folder}/{spelled}@{self.generation}"
        self._begin(LoRARequest(name, 5, path), (self.generation, name), 0, 2)

    @precondition(lambda self: self.uploads)
    @rule(data=st.data(), prompt=prompts, most=lengths)
    def ask_an_upload(self, data, prompt, most):
        name = data.draw(st.sampled_from(sorted(self.uploads)))
        lora, content = self.uploads[name]
        self._begin(lora, ("upload", content), prompt, most)

    @rule(
        indices=st.sets(st.integers(0, N - 1), min_size=1, max_size=PARTS),
        weights=st.permutations([0.5, -0.75, 1.0, 1.5]),
        data=st.data(),
        prompt=prompts,
        most=lengths,
    )
    def ask_a_blend(self, indices, weights, data, prompt, most):
        """Of some of the store, or of an upload with some of it."""
        store = store_path(self.path, self.generation)
        names = [self.world.names[i] for i in sorted(indices)]
        parts = {name: (store, (self.generation, name)) for name in names}
        if self.uploads and data.draw(st.booleans()):
            lora, content = self.uploads[data.draw(st.sampled_from(sorted(self.uploads)))]
            parts.pop(names[-1])
            parts[lora.lora_name] = (lora.lora_path, ("upload", content))
        weighted = dict(zip(parts, weights, strict=False))
        paths = {name: path for name, (path, _) in parts.items()}
        lora = blend_request("blend", Blend(weights=weighted), paths)
        whose = "blend", tuple((parts[name][1], weight) for name, weight in weighted.items())
        # An upload that was loaded by its path alone is known by it as long as it is loaded.
        self._begin(lora, whose, prompt, most)

    @rule(folder=st.integers(0, FOLDERS - 1), most=lengths)
    def ask_a_folder_that_was_not_loaded(self, folder, most):
        """As offline: a path and an id, at most."""
        path = self._folder(folder)
        content = self.disk.get(folder)
        self.ids += 1
        lora = LoRARequest(f"folder{folder}", 2**40 + self.ids, str(path))
        known = content is not None and content >= 0
        self._begin(lora, ("upload", content) if known else "fails", 1, most)

    @rule(name=st.sampled_from(["adapter-999", "", "../x"]))
    def ask_for_what_there_is_not(self, name):
        path = store_path(self.path, self.generation)
        try:
            lora = LoRARequest(name, 1, path)
        except ValueError:
            return
        self._begin(lora, "fails", 2, 1)

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def abort(self, data):
        name = data.draw(st.sampled_from(sorted(self.running)))
        self.engine.abort(name)
        del self.running[name]

    @rule(steps=st.integers(1, 4))
    def step(self, steps):
        for _ in range(steps):
            self._step()

    def _step(self):
        pinned = self.engine.adapters._pinned.values()
        self._kept = len({reference.adapter for reference in pinned})
        self._check(*self.engine.step())

    def _check(self, seen, failed):
        for name, reason in failed.items():
            if name not in self.running:
                continue
            whose, may_fail, fired = self.running.pop(name)
            assert reason, "it is told nothing"
            if whose == "fails" or may_fail:
                continue
            uploads = [key[1] for key, _ in parts_of(whose) if key[0] == "upload"]
            if reason.startswith(BAD_BLEND):
                assert not self.world.has_room(whose, self.engine.adapters.capacity), reason
                assert "bases of rank" in reason and "have room at once" in reason, reason
                continue
            if "pinned adapters" in reason:
                assert uploads and (self.ahead or self._kept == 2), reason
                continue
            named = [f for f in range(FOLDERS) if str(self._folder(f)) in reason]
            if uploads and (named or whose[0] == "upload"):
                assert named, reason
                assert self.ahead or all(self.disk.get(f) not in uploads for f in named), reason
                continue
            assert "cannot be read" in reason, reason
            # Of a step that is scheduled ahead, what failed in the one before it counts.
            assert self.reads.fired > (0 if self.ahead else fired), reason
        for name, (tokens, rows) in seen.items():
            if name not in self.running:
                continue
            whose = self.running[name][0]
            assert whose != "fails", f"{name} was answered"
            assert self.world.has_room(whose, self.engine.adapters.capacity), f"{name}, {whose}"
            for place, token in enumerate(tokens):
                wanted = self.world.expected(whose, token)
                error = float((rows[place].double() - wanted).norm() / wanted.norm())
                rounded = self.world.rounded and whose is not None and whose[0] == "blend"
                assert error < (0.03 if rounded else 1e-3), (
                    f"{name}, {whose}: token {place} is off by {error:.3g}"
                )
        for name in list(self.running):
            if name not in self.engine.scheduler.requests:
                whose = self.running.pop(name)[0]
                assert whose != "fails", f"{name} ended, and was not told why: {failed}"

    # --- uploads ---

    def _folder(self, folder):
        return self.folder / "uploads" / f"f{folder}"

    @rule(folder=st.integers(0, FOLDERS - 1), content=st.integers(-4, CONTENTS))
    def overwrite(self, folder, content):
        """Negative ones are those that cannot be served."""
        path = self._folder(folder)
        source = self.world.good[content] if content >= 0 else self.world.bad[-content - 1]
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(source, path)
        self.disk[folder] = content

    @rule(folder=st.integers(0, FOLDERS - 1))
    def delete(self, folder):
        shutil.rmtree(self._folder(folder), ignore_errors=True)
        self.disk.pop(folder, None)

    @rule(
        name=st.sampled_from(["a", "b", "c"]),
        folder=st.integers(0, FOLDERS - 1),
        digested=st.booleans(),
        again=st.booleans(),
    )
    def load(self, name, folder, digested, again):
        """Under a new id, one that was in use before, or in place."""
        path, content = self._folder(folder), self.disk.get(folder)
        before = self.uploads.get(name)
        if before is not None:
            number = before[0].lora_int_id
        elif again and self.used_ids:
            number = self.used_ids.pop()
        else:
            self.ids += 1
            number = self.ids
        spelled = str(path)
        if digested and path.exists():
            spelled = upload_path(upload_digest(path), spelled)
        lora = LoRARequest(name, number, spelled, load_inplace=before is not None)
        if content is None or content < 0:
            with pytest.raises((ValueError, LoRAAdapterNotFoundError)):
                self.engine.add_lora(lora)
            return
        assert self.engine.add_lora(lora)
        assert number in self.engine.list_loras()
        lora.load_inplace = False
        self.uploads[name] = lora, content

    @precondition(lambda self: self.uploads)
    @rule(data=st.data())
    def unload(self, data):
        self.unload_by_name(data.draw(st.sampled_from(sorted(self.uploads))))

    def unload_by_name(self, name):
        lora, _ = self.uploads.pop(name)
        assert self.engine.remove_lora(lora.lora_int_id)
        assert lora.lora_int_id not in self.engine.list_loras()
        self.used_ids.append(lora.lora_int_id)

    @precondition(lambda self: self.uploads)
    @rule(data=st.data())
    def pin(self, data):
        """Up to all of the slots for uploads."""
        name = data.draw(st.sampled_from(sorted(self.uploads)))
        try:
            self.engine.pin_lora(self.uploads[name][0].lora_int_id)
        except ValueError as error:
            assert "slots are held" in str(error)

    # --- the store ---

    @rule(generation=st.integers(1, GENERATIONS))
    def serve(self, generation):
        fired = self.reads.fired
        try:
            self.engine.adapters.serve_generation(str(self.path), generation)
        except AdapterUnavailable:
            assert generation in self.deleted or self.reads.fired > fired
        else:
            self.generation = generation

    @rule(force=st.booleans())
    def prune(self, force):
        self.deleted |= set(prune(self.path, 0, force=force).deleted)

    @rule(of=st.sampled_from(["bases", "cores"]), count=st.integers(1, 6))
    def have_reads_fail(self, of, count):
        self.reads.of, self.reads.left = f"/{of}", count
        if self.distant is not None:
            self.distant.fail(f"/{of}", count)

    @rule()
    def let_reads_be(self):
        self.reads.left = 0
        if self.distant is not None:
            self.distant.fail("", 0)

    @rule()
    def warm_up(self):
        for worker in self.workers:
            worker.warm_up()

    def teardown(self):
        if not hasattr(self, "engine"):
            return
        try:
            for _ in range(300):
                if not self.running:
                    break
                self._step()
            assert not self.running, "some never end"
            for seen, failed in self.engine.finish():
                self._check(seen, failed)
        finally:
            self._installed.__exit__(None, None, None)
            self._patches.undo()
            shutil.rmtree(self.folder, ignore_errors=True)


@pytest.fixture(scope="module", params=METHODS)
def world(request, tmp_path_factory, write_adapters, peft_deltas, one_worker):
    return World(tmp_path_factory.mktemp("world"), request.param, write_adapters, peft_deltas)


@pytest.fixture(autouse=True)
def few_blends(monkeypatch):
    """More than these are forgotten once nobody asks for them."""
    monkeypatch.setattr(engine_adapters, "_BLENDS", 3)


QUICK = (Phase.explicit, Phase.generate)  # what fails is found again, and made small, by hand


def try_it(examples, steps, **attributes):
    machine = type("Lifecycle", (Machine,), attributes)
    machine.TestCase.settings = None
    run(
        machine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            derandomize=True,  # the same lives each time; other seeds are for a search by hand
            phases=QUICK,
            report_multiple_bugs=False,
            suppress_health_check=list(HealthCheck),
        ),
    )


def few_slots(world, share=0.5):
    """Settings with room for so much of what is beyond the least."""
    with open_number(world.folder / "store", 1) as store:
        config = PluginConfig(store=str(store.path), adapter_memory=1, max_blend=PARTS)
        with pytest.raises(ValueError, match="--adapter-memory") as refused:
            capacity_of(
                store,
                Tables(store),
                config,
                max_num_seqs=4,
                max_lora_rank=8,
                in_codes=keeps_codes(store, torch.float32),
            )
    least, everything = (
        int(number.replace(",", ""))
        for number in re.findall(r"(?:at least|takes) ([0-9,]+)", str(refused.value))
    )
    return {"adapter_memory": int(least + share * (everything - least))}


@pytest.mark.parametrize("ahead", [False, True], ids=["in turn", "ahead"])
def test_every_token_has_the_numbers_its_request_began_with(world, make_runner, ahead):
    try_it(4, 40, world=world, options=few_slots(world), ahead=ahead)


@pytest.mark.slow
@pytest.mark.parametrize("ahead", [False, True], ids=["in turn", "ahead"])
@pytest.mark.parametrize("room", ["all", "cores", "few"])
def test_so_it_has_in_many_lives(world, make_runner, room, ahead):
    options = {"all": {}, "cores": {"core_slots": 4}, "few": few_slots(world)}[room]
    try_it(8, 40, world=world, options=options, ahead=ahead)


@pytest.fixture(scope="module")
def distant(tmp_path_factory):
    worker = DistantWorker(tmp_path_factory.mktemp("distant"))
    yield worker
    worker.end()


def test_two_workers_of_other_hash_seeds_hold_the_same(world, make_runner, distant):
    """Bit for bit, after every step."""
    try_it(2, 40, world=world, options=few_slots(world), distant=distant)


class TestFaultsThatItFound:
    """Each by itself, on the one store with clusters."""

    @pytest.fixture(scope="class")
    def world(self, tmp_path_factory, write_adapters, peft_deltas, one_worker):
        folder = tmp_path_factory.mktemp("faults")
        return World(folder, "clusters", write_adapters, peft_deltas)

    @pytest.fixture
    def begin(self, world, make_runner):
        """(settings, ahead) → a machine whose rules are called by name."""
        begun = []

        def begin(options, ahead=False):
            made = type("Lifecycle", (Machine,), {"world": world, "ahead": ahead})
            machine = made()
            machine.options = options
            machine.start()
            begun.append(machine)
            return machine

        yield begin
        for machine in begun:
            machine.teardown()

    def ask(self, machine, index, generation=1, prompt=0, most=2):
        name = machine.world.names[index]
        lora = LoRARequest(name, 1, store_path(machine.path, generation))
        machine._begin(lora, (generation, name), prompt, most)

    def steps(self, machine, count):
        for _ in range(count):
            machine._check(*machine.engine.step())

    def cluster(self, world):
        with open_number(world.folder / "store", 1) as store:
            return store.chosen[:, 0, 0].tolist()

    def test_a_source_stays_for_those_that_wait(self, begin):
        machine = begin({})
        self.ask(machine, 0)
        machine.engine.adapters.serve_generation(str(machine.path), 2)
        self.steps(machine, 4)
        assert not machine.running
        assert all(
            s.path != str(machine.path) or s.store.generation == 2
            for s in machine.engine.adapters._sources.values()
        ), "it went with the last"

    def test_another_generation_takes_the_slots_that_the_workers_mean(self, begin, world):
        """One after the other puts the three bases of the first out of their slots."""
        machine = begin({})
        cluster = self.cluster(world)
        for kept in range(3):
            self.ask(machine, cluster.index(kept), most=30)
            self.steps(machine, 1)
            for index in range(N):
                self.ask(machine, index, generation=2, most=1)
                self.steps(machine, 2)
            for name in list(machine.running):
                machine.engine.abort(name)
                del machine.running[name]

    def test_rows_made_without_their_basis_are_made_again(self, begin):
        machine = begin({"core_slots": 4})
        machine.reads.of, machine.reads.left = "/generations/2/bases", 0
        machine.engine.adapters.serve_generation(str(machine.path), 2)
        machine.reads.left = 10**6
        self.ask(machine, 0, generation=2)
        self.steps(machine, 1)
        assert not machine.running, "it fails"
        machine.reads.left = 0
        self.ask(machine, 0, generation=2)
        self.steps(machine, 4)
        assert not machine.running

    @pytest.mark.parametrize("again", [True, False])
    def test_what_is_pinned_and_could_not_be_read_is_read_again(self, begin, again):
        machine = begin({})
        for folder, name in enumerate("abc"):
            machine.overwrite(folder, folder)
            machine.load(name, folder, False, False)
        machine.overwrite(0, 3)  # a is not in the worker's memory any more, nor on the disk
        assert machine.engine.pin_lora(machine.uploads["a"][0].lora_int_id)
        machine._begin(machine.uploads["a"][0], ("upload", 0), 0, 2)
        self.steps(machine, 1)
        assert not machine.running, "it fails"
        if again:
            machine.overwrite(0, 0)
        machine._begin(machine.uploads["a"][0], ("upload", 0), 0, 2)
        self.steps(machine, 1)
        assert bool(machine.running) == again, "it fails again where it is not there"
        self.steps(machine, 3)
        assert not machine.running

    def test_who_waits_takes_no_blocks_of_a_step_that_failed(self, begin):
        machine = begin({"core_slots": 4})
        for index in (1, 2, 3, 4):
            self.ask(machine, index, most=1)
        self.ask(machine, 1, most=1)  # the fifth of four
        machine.reads.of, machine.reads.left = "/cores", 10**6
        self.steps(machine, 1)
        machine.reads.left = 0
        assert len(machine.running) == 1
        self.steps(machine, 3)
        assert not machine.running

    def test_an_id_that_was_removed_means_nothing(self, begin):
        """The first one is still held by a request when other files come under its id and path."""
        machine = begin({})
        machine.overwrite(0, 0)
        machine.load("a", 0, False, False)
        lora, _ = machine.uploads["a"]
        machine._begin(lora, ("upload", 0), 0, 6)
        self.steps(machine, 1)
        machine.unload_by_name("a")
        machine.overwrite(0, 1)
        machine.load("a", 0, False, True)
        assert machine.uploads["a"][0].lora_int_id == lora.lora_int_id
        machine._begin(machine.uploads["a"][0], ("upload", 1), 0, 6)
        self.steps(machine, 7)
        assert not machine.running

    def test_a_failure_is_remembered_when_its_source_has_gone(self, begin):
        machine = begin({})
        for folder, name in enumerate("abc"):
            machine.overwrite(folder, folder)
            machine.load(name, folder, False, False)
        machine.overwrite(0, 3)
        machine._begin(machine.uploads["a"][0], ("upload", 0), 0, 2)
        self.steps(machine, 1)
        assert not machine.running, "it fails"
        machine.unload_by_name("a")
        machine.overwrite(0, 0)
        machine.load("b", 0, False, False)
        machine._begin(machine.uploads["b"][0], ("upload", 0), 0, 2)
        self.steps(machine, 3)
        assert not machine.running
