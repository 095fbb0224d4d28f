"""The whole path: adapters → compress → store, its recorded errors, resuming and atomicity."""

import contextlib
import errno
import importlib
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import vllm_jd
from tests.compressor.run import killed_command
from vllm_jd.compressor import AdapterError, Settings, export_adapter, read_adapters
from vllm_jd.compressor.run.compress import compress
from vllm_jd.compressor.run.compress import compress as compress_function
from vllm_jd.store import Store, StoreError

SHIPPED = Path(vllm_jd.__file__).parent / "data" / "adapters"
compress_file = sys.modules[compress_function.__module__]
publish_file = importlib.import_module("vllm_jd.compressor.run.publish")

property_test = settings(
    max_examples=20, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True
)


def store_of(folders, out, **options):
    return compress(read_adapters(folders), out, Settings(**options))


def payload(store):
    """The generation's files but for the manifest, which holds the time."""
    return {
        file.name: file.read_bytes()
        for file in store.folder.iterdir()
        if file.name != "manifest.json"
    }


def exported(store, name, folder, peft_deltas):
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(folder)
    return peft_deltas(export_adapter(store, name, folder))


def relative_error(found, expected):
    total = expected.square().sum()
    return float((found - expected).square().sum() / total) if total else 0.0


def check_recorded_errors(store, folders, scratch, peft_deltas, *, rel=0.01, floor=1e-7):
    """Every recorded error is the dense float64 error of what export writes. Returns their mean."""
    errors = []
    for folder in folders:
        row = store.index(folder.name)
        found = exported(store, folder.name, scratch, peft_deltas)
        expected = peft_deltas(folder)
        assert found.keys() == expected.keys()
        for module, delta in expected.items():
            column = store.module_index(module)
            error = relative_error(found[module], delta)
            assert float(store.error[row, column]) == pytest.approx(error, rel=rel, abs=floor)
            assert float(store.norm[row, column]) == pytest.approx(float(delta.norm()), rel=1e-5)
            errors.append(error)
    return sum(errors) / len(errors)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16])
def test_recorded_errors_are_those_of_the_exported_adapter(
    tmp_path, write_adapters, peft_deltas, dtype, source
):
    folders = write_adapters(tmp_path / "in", 8, kind="real", ranks=(2, 5, 3), dtype=source)
    for clusters in (1, 3):
        options = {"clusters": clusters, "store_dtype": dtype}
        store = store_of(folders, tmp_path / "out", rank=4, **options)
        mean = check_recorded_errors(store, folders, tmp_path / "x", peft_deltas)
        assert 0.001 < mean < 0.9


@property_test
@given(
    n=st.integers(1, 6),
    ranks=st.lists(st.integers(1, 6), min_size=1, max_size=3),
    rank=st.integers(1, 30),
    clusters=st.integers(1, 4),
    dtype=st.sampled_from(["float32", "bfloat16", "float16"]),
    alpha=st.sampled_from([0, 1e-4, 0.5, 8, 300]),
    seed=st.integers(0, 1000),
)
def test_any_settings_give_true_errors_between_zero_and_one(
    tmp_path_factory,
    write_adapters,
    peft_deltas,
    n,
    ranks,
    rank,
    clusters,
    dtype,
    alpha,
    seed,
):
    tmp_path = tmp_path_factory.mktemp("any")
    folders = write_adapters(
        tmp_path / "in", n, kind="real", ranks=ranks, seed=seed, config={"alpha": alpha}
    )
    store = store_of(
        folders,
        tmp_path / "out",
        rank=rank,
        clusters=clusters,
        store_dtype=dtype,
        iterations=3,
    )
    assert float(store.error.min()) >= 0
    assert float(store.error.max()) <= 1
    check_recorded_errors(store, folders, tmp_path / "x", peft_deltas)


def test_lossless_at_the_rank_of_proposition_1(tmp_path, write_adapters, peft_deltas):
    folders = write_adapters(tmp_path / "in", 4, ranks=(1, 2))
    options = {"store_dtype": "float32"}
    for clusters, rank in [(1, 6), (2, 4), (2, 30), (9, 2)]:
        store = store_of(folders, tmp_path / "out", rank=rank, clusters=clusters, **options)
        mean = check_recorded_errors(store, folders, tmp_path / "x", peft_deltas, floor=1e-11)
        assert mean < 1e-9, (clusters, rank)
        assert float(store.error.max()) < 1e-9


def test_rounding_the_bases_costs_next_to_nothing(tmp_path, write_adapters):
    """At the bound of Proposition 1 only rounding is left: the cores make up for the bases'."""
    folders = write_adapters(tmp_path / "in", 8, kind="real", ranks=(2, 5, 3))
    for dtype, limit in (("bfloat16", 1e-5), ("float16", 2e-7), ("float32", 1e-9)):
        store = store_of(folders, tmp_path / "out", rank=28, store_dtype=dtype)
        assert float(store.error.mean()) < limit


def test_shipped_adapters_have_true_recorded_errors(tmp_path, peft_deltas):
    folders = sorted(file.parent for file in SHIPPED.glob("*/adapter_config.json"))[:5]
    store = store_of(folders, tmp_path / "out", rank=8, clusters=2, iterations=2)
    mean = check_recorded_errors(store, folders[:2], tmp_path / "x", peft_deltas)
    assert 0 < mean < 1


def test_adapters_without_a_module_have_no_cluster_there(
    tmp_path, write_adapter, make_factors, peft_deltas, tiny_shapes
):
    adapters = make_factors(6, kind="real")
    modules = list(tiny_shapes)
    for factors in adapters[:4]:
        del factors[modules[0]]
    for module in modules[1:]:
        del adapters[5][module]
    folders = [write_adapter(tmp_path / "in" / str(i), f) for i, f in enumerate(adapters)]
    store = store_of(folders, tmp_path / "out", rank=4, clusters=3)
    check_recorded_errors(store, folders, tmp_path / "x", peft_deltas)
    for row, factors in enumerate(adapters):
        for column, module in enumerate(store.manifest.modules):
            absent = module.name not in factors
            assert (store.chosen[row, column].tolist() == [-1]) == absent
            assert (int(store.rank[row, column]) == 0) == absent
            if absent:
                assert float(store.error[row, column]) == 0
                assert float(store.norm[row, column]) == 0


def test_an_adapter_of_zeros_is_stored_as_zero(tmp_path, write_adapter, make_factors, peft_deltas):
    adapters = make_factors(4, kind="real")
    adapters[2] = {module: (torch.zeros_like(b), a) for module, (b, a) in adapters[2].items()}
    folders = [write_adapter(tmp_path / "in" / str(i), f) for i, f in enumerate(adapters)]
    for clusters in (1, 2, 4):
        store = store_of(folders, tmp_path / "out", rank=4, clusters=clusters)
        check_recorded_errors(store, folders, tmp_path / "x", peft_deltas)
        assert store.error[2].tolist() == [0] * 4
        assert all(not d.any() for d in exported(store, "2", tmp_path / "x", peft_deltas).values())


def test_only_adapters_of_zeros(tmp_path, write_adapters, peft_deltas):
    folders = write_adapters(tmp_path / "in", 3, config={"alpha": 0})
    store = store_of(folders, tmp_path / "out", rank=4, clusters=2)
    assert not store.error.any()
    for folder in folders:
        found = exported(store, folder.name, tmp_path / "x", peft_deltas)
        assert all(not delta.any() for delta in found.values())


@pytest.mark.parametrize(("dtype", "scale"), [("float16", 1e7), ("bfloat16", 1e25)])
def test_numbers_too_large_for_the_store_are_refused(tmp_path, write_adapters, dtype, scale):
    folders = write_adapters(tmp_path / "in", 3)
    write_adapters(tmp_path / "in", 1, prefix="huge", config={"alpha": scale})
    if dtype == "bfloat16":  # B·scale is still finite, B·scale·A is not
        huge = tmp_path / "in" / "huge000"
        file = huge / "adapter_model.safetensors"
        tensors = {k: v * (1e15 if "lora_A" in k else 1) for k, v in load_file(file).items()}
        save_file(tensors, file)
    with pytest.raises(AdapterError, match=f"huge000: .*too large for {dtype}") as caught:
        store_of([tmp_path / "in"], tmp_path / "out", rank=4, store_dtype=dtype)
    assert folders[0].name not in str(caught.value)
    assert not (tmp_path / "out" / "CURRENT").exists()


def test_cores_are_read_across_shards(tmp_path, write_adapters, monkeypatch):
    folders = write_adapters(tmp_path / "in", 7, kind="real")
    whole = store_of(folders, tmp_path / "one", rank=3)
    monkeypatch.setattr(publish_file, "SHARD_BYTES", 2 * 4 * 9 * 2)  # two rows
    split = store_of(folders, tmp_path / "two", rank=3)
    assert [shard.adapters for shard in split.manifest.core_shards] == [2, 2, 2, 1]
    for first in range(8):
        for last in range(first, 8):
            assert torch.equal(split.cores(first, last), whole.cores(first, last))
    assert split.cores(3, 3).shape == (0, 36)


# --- the same input, the same bytes ---


def test_order_and_place_of_the_adapters_do_not_change_a_byte(tmp_path, write_adapters):
    folders = write_adapters(tmp_path / "in", 9, kind="real", ranks=(2, 4))
    options = {"rank": 4, "clusters": 3}
    first = payload(store_of(folders, tmp_path / "one", **options))
    again = payload(store_of([tmp_path / "in"], tmp_path / "two", **options))
    assert again == first
    random.Random(1).shuffle(folders)
    for i, folder in enumerate(folders):
        shutil.move(folder, tmp_path / "moved" / str(i % 2) / folder.name)
    moved = [tmp_path / "moved" / "1", tmp_path / "moved" / "0"]
    assert payload(store_of(moved, tmp_path / "three", **options)) == first


def test_the_number_of_threads_does_not_change_a_byte(tmp_path, write_adapters):
    folders = write_adapters(tmp_path / "in", 9, kind="real", ranks=(2, 4))
    threads = torch.get_num_threads()
    try:
        found = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            store = store_of(folders, tmp_path / str(count), rank=4, clusters=3)
            found.append(payload(store))
            assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(threads)
    assert found[0] == found[1] == found[2]


def test_the_seed_changes_the_solution_but_not_the_facts(tmp_path, write_adapters):
    folders = write_adapters(tmp_path / "in", 9, kind="real", ranks=(2, 4))
    one, two = (
        store_of(folders, tmp_path / str(seed), rank=4, clusters=2, seed=seed) for seed in (0, 1)
    )
    assert one.names == two.names
    assert torch.equal(one.rank, two.rank)
    assert torch.equal(one.norm, two.norm)
    assert torch.equal(one.source_sha256, two.source_sha256)
    assert torch.equal(one.source_bytes, two.source_bytes)
    assert one.manifest.settings == two.manifest.settings | {"seed": 0}
    assert one.manifest.modules == two.manifest.modules
    assert float(one.error.mean()) == pytest.approx(float(two.error.mean()), rel=0.2)
    assert payload(one)["bases-00000.safetensors"] != payload(two)["bases-00000.safetensors"]


def test_every_generation_is_new_and_the_old_ones_stay_readable(tmp_path, write_adapters):
    folders = write_adapters(tmp_path / "in", 4, kind="real")
    first = store_of(folders, tmp_path / "out", rank=2)
    bytes_before = payload(first)
    second = store_of(folders[:3], tmp_path / "out", rank=3)
    assert (first.generation, second.generation) == (1, 2)
    assert Store.open(tmp_path / "out").names == [folder.name for folder in folders[:3]]
    assert payload(first) == bytes_before
    assert not (tmp_path / "out" / ".compress").exists()


# --- where the store may be written ---


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_is_no_store_is_left_alone(tmp_path, write_adapters, tree, kind):
    folders = write_adapters(tmp_path / "in", 2)
    out = tmp_path / "out"
    if kind == "file":
        out.write_text("mine")
    else:
        out.mkdir()
        (out / "mine.txt").write_text("mine")
    before = tree(tmp_path)
    with pytest.raises(StoreError, match=r"found a file|not empty and not a store"):
        store_of(folders, out, rank=2)
    assert tree(tmp_path) == before


def test_a_store_copied_without_its_hidden_files_can_be_written(tmp_path, write_adapters):
    folders = write_adapters(tmp_path / "in", 2)
    store_of(folders, tmp_path / "out", rank=2)
    (tmp_path / "copy").mkdir()
    for entry in (tmp_path / "out").iterdir():
        if not entry.name.startswith("."):
            shutil.move(entry, tmp_path / "copy" / entry.name)
    assert store_of(folders, tmp_path / "copy", rank=3).generation == 2


def test_a_full_disk_is_a_store_error_and_the_old_generation_stays(tmp_path, write_adapters, tree):
    folders = write_adapters(tmp_path / "in", 3)
    store_of(folders, tmp_path / "out", rank=2)
    before = payload(Store.open(tmp_path / "out"))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for size in (0, 2000, 5000):  # stops at the work folder, the parts, the generation
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
        try:
            with pytest.raises(
                StoreError, match="cannot be written: .*" + os.strerror(errno.EFBIG)
            ):
                store_of(folders, tmp_path / "out", rank=8, store_dtype="float32")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert payload(Store.open(tmp_path / "out")) == before
    assert store_of(folders, tmp_path / "out", rank=8, store_dtype="float32").generation == 2


# --- stopped writers: `vllm-jd compress` in a process that is killed ---


@pytest.fixture(scope="module")
def start():
    """Start `vllm-jd` with these arguments in a process of its own."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["vllm_jd.cli.app", "vllm_jd.compressor.report.summary"])

    def start(arguments, **options):
        process = context.Process(
            target=killed_command.run, args=([str(a) for a in arguments],), kwargs=options
        )
        process.start()
        return process

    return start


@pytest.fixture
def job(tmp_path, write_adapters):
    """(folder that holds a store of two adapters, arguments that compress six into it)."""
    folders = write_adapters(tmp_path / "in", 6, kind="real", ranks=(2, 4))
    out = tmp_path / "out"
    store_of(folders[:2], out, rank=2)
    options = ["--out", out, "--rank", "3", "--clusters", "2"]
    return out, ["compress", tmp_path / "in", *options]


JOB_SETTINGS = Settings(rank=3, clusters=2)


def test_killed_at_any_step_the_store_stays_whole_and_the_command_goes_on(
    tmp_path, start, job, monkeypatch
):
    out, arguments = job
    pristine = tmp_path / "pristine"
    shutil.copytree(out, pristine)
    old = payload(Store.open(out))
    undisturbed = start(arguments, log=tmp_path / "steps")
    undisturbed.join()
    assert undisturbed.exitcode == 0
    new = payload(Store.open(out))
    steps = int((tmp_path / "steps").read_text())
    assert steps > 30

    computed = []
    original = compress_file.compress_module
    monkeypatch.setattr(
        compress_file,
        "compress_module",
        lambda *args, **options: computed.append(1) or original(*args, **options),
    )
    generations_seen = set()
    for stop_at in range(1, steps + 1, 5):
        shutil.rmtree(out)
        shutil.copytree(pristine, out)
        process = start(arguments, stop_at=stop_at)
        process.join()
        assert process.exitcode == -signal.SIGKILL, stop_at
        left = Store.open(out)
        generations_seen.add(left.generation)
        assert payload(left) == (old if left.generation == 1 else new), stop_at
        finished = len(list((out / ".compress").glob("*/module-*.safetensors")))
        computed.clear()
        resumed = compress(read_adapters([tmp_path / "in"]), out, JOB_SETTINGS)
        if left.generation == 1:
            assert len(computed) == 4 - finished, stop_at
        assert payload(resumed) == new, stop_at
        assert payload(Store.open(out)) == new, stop_at
        left_over = {entry.name for entry in out.iterdir()}
        assert left_over == {".lock", "CURRENT", "generations"}, stop_at
        assert not [e for e in (out / "generations").iterdir() if e.name.startswith(".")], stop_at
    assert generations_seen == {1, 2}


def test_killed_at_random_moments(tmp_path, start, job):
    out, arguments = job
    old = payload(Store.open(out))
    generator = random.Random(0)
    for _ in range(6):
        process = start(arguments)
        process.join(generator.uniform(0.01, 0.3))
        process.kill()
        process.join()
        store = Store.open(out)
        if store.generation == 1:
            assert payload(store) == old
    assert compress(read_adapters([tmp_path / "in"]), out, JOB_SETTINGS).names[0] == "adapter-000"


def test_another_job_does_not_use_the_parts_of_a_stopped_one(tmp_path, start, job):
    out, arguments = job
    process = start(arguments, stop_at=20)
    process.join()
    assert list((out / ".compress").glob("*/module-*"))
    fresh = store_of([tmp_path / "in"], tmp_path / "fresh", rank=3, clusters=2, seed=5)
    resumed = store_of([tmp_path / "in"], out, rank=3, clusters=2, seed=5)
    assert payload(resumed) == payload(fresh)


def test_a_changed_adapter_is_compressed_again_after_a_stop(tmp_path, start, job, write_adapters):
    out, arguments = job
    process = start(arguments, stop_at=20)
    process.join()
    assert list((out / ".compress").glob("*/module-*"))
    write_adapters(tmp_path / "in", 1, kind="real", seed=9)
    fresh = store_of([tmp_path / "in"], tmp_path / "fresh", rank=3, clusters=2)
    assert payload(store_of([tmp_path / "in"], out, rank=3, clusters=2)) == payload(fresh)


def test_a_second_writer_is_refused(tmp_path, write_adapters, monkeypatch):
    folders = write_adapters(tmp_path / "in", 3)
    collection = read_adapters(folders)
    original = compress_file.compress_module
    refused = []

    def nested(*args, **options):
        if not refused:
            with pytest.raises(StoreError, match="another process is writing this store") as caught:
                compress(collection, tmp_path / "out", Settings(rank=2))
            refused.append(caught)
        return original(*args, **options)

    monkeypatch.setattr(compress_file, "compress_module", nested)
    store = compress(collection, tmp_path / "out", Settings(rank=2))
    assert refused
    assert len(store) == 3


def test_a_gpus_solvers_are_loaded_before_threads_need_them(tmp_path, write_adapters, monkeypatch):
    """On an H200 two threads whose first call it was failed: "lazy wrapper should be called at most
    once". Here the GPU is none; the test below needs one."""
    loaded = []
    monkeypatch.setattr(torch, "eye", lambda n, device: device)
    monkeypatch.setattr(torch.linalg, "eigh", loaded.append)

    def modules(function, items):
        assert loaded == ["cuda"]
        raise ArithmeticError

    collection = read_adapters(write_adapters(tmp_path / "in", 3))
    with pytest.raises(ArithmeticError):
        compress(
            collection, tmp_path / "store", Settings(rank=2), device="cuda", module_map=modules
        )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(
    "settings",
    # One iteration: more of them end in other bases of the same error, so near as random ones are.
    [
        Settings(rank=3, iterations=1),
        Settings(method="jd-diag", rank=3),
        Settings(method="svd", rank=3),
        Settings(method="ties"),
        Settings(method="dare"),
        Settings(method="task-arithmetic"),
        Settings(method="hydraopt", rank=3, matrices=2, steps=5),
    ],
    ids=lambda settings: settings.method,
)
def test_a_gpu_compresses_as_a_cpu_does(tmp_path, write_adapters, settings):
    collection = read_adapters(write_adapters(tmp_path / "in", 6))
    errors = []
    for device in ("cpu", "cuda"):
        with compress(collection, tmp_path / device, settings, device=device) as store:
            errors.append(store.error)
    torch.testing.assert_close(errors[1], errors[0], rtol=1e-3, atol=1e-5)
