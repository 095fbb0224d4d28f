"""Any sequence of changes, and changes that are killed."""

import multiprocessing
import shutil
import signal

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.compressor.change import killed_change
from tests.compressor.change.made import METHODS, Made, bits, build, check_errors, payload
from vllm_jd.compressor import Settings, read_adapters
from vllm_jd.compressor.change.incremental import add, remove
from vllm_jd.compressor.run.compress import compress
from vllm_jd.store import Store
from vllm_jd.store.generations import prune

# --- any sequence of changes ---


changes = st.one_of(
    st.tuples(st.just("add"), st.integers(0, 11), st.integers(1, 4), st.sampled_from([None, 0.1])),
    st.tuples(st.just("remove"), st.integers(0, 11), st.integers(1, 4), st.none()),
)


@settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(
    method=st.sampled_from(sorted(METHODS)),
    dtype=st.sampled_from(["float32", "bfloat16", "int8", "int4"]),
    steps=st.lists(changes, min_size=1, max_size=6),
)
def test_any_sequence_of_changes_keeps_the_store_what_it_should_be(
    tmp_path_factory, some, method, dtype, steps
):
    path = tmp_path_factory.mktemp("any") / "s"
    sources = some(0, 4)
    model = bits(build(path, sources, **METHODS[method], store_dtype=dtype))
    version = 12
    for what, first, count, limit in steps:
        names = [f"adapter-{(first + i) % 12:02d}" for i in range(count)]
        if what == "add":  # new numbers under these names: an addition or a replacement
            news = {n: some(version + i, version + i + 1).popitem()[1] for i, n in enumerate(names)}
            version += count
            store = add(path, Made(news), replace=True, max_adapter_error=limit)
            model = {n: x for n, x in model.items() if n not in news}
            model |= {n: x for n, x in bits(store).items() if n in news}
            sources = {n: x for n, x in sources.items() if n not in news} | news
        else:
            names = [name for name in names if name in model]
            if len(names) == len(model) or not names:
                continue
            store = remove(path, names)
            for name in names:
                del model[name], sources[name]
        opened = Store.open(path)
        assert opened.names == list(model)
        assert bits(opened) == model
        check_errors(opened, sources)
        for column, info in enumerate(opened.manifest.modules):
            used = opened.chosen[:, column]
            own = used[used >= info.shared]
            assert sorted(own.tolist()) == list(range(info.shared, info.rows))


# --- kills ---


@pytest.fixture(scope="module")
def start():
    """Start a change in a process of its own."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["vllm_jd.compressor.change.incremental", "vllm_jd.store.generations"]
    )

    def start(*arguments, **options):
        process = context.Process(target=killed_change.run, args=arguments, kwargs=options)
        process.start()
        process.join()
        return process.exitcode

    return start


@pytest.mark.parametrize("change", ["add", "replace", "remove", "prune"])
def test_killed_at_any_step_the_store_stays_whole(tmp_path, start, write_adapters, change):
    folders = write_adapters(tmp_path / "in", 5, kind="real", ranks=(2, 4))
    more = write_adapters(tmp_path / "more", 2, kind="real", prefix="more-", seed=4)
    path, pristine = tmp_path / "s", tmp_path / "pristine"
    compress(read_adapters(folders), path, Settings(**METHODS["guarded"]))
    if change == "replace":
        add(path, read_adapters(more))
    if change == "prune":
        for folder in more:
            add(path, read_adapters([folder]))
    shutil.copytree(path, pristine)
    name, arguments, options = {
        "add": ("add", ([str(folder) for folder in more],), {}),
        "replace": ("add", ([str(folder) for folder in more],), {"replace": True}),
        "remove": ("remove", (["adapter-001", "adapter-003"],), {}),
        "prune": ("prune", (0,), {}),
    }[change]
    old = payload(Store.open(path))
    assert start(name, str(path), *arguments, log=tmp_path / "steps", **options) == 0
    new = payload(Store.open(path))
    before, after = Store.open(pristine).generation, Store.open(path).generation
    steps = int((tmp_path / "steps").read_text())
    assert steps > (10 if change == "prune" else 25)
    seen = set()
    for stop_at in sorted({*range(1, steps + 1, 13), steps}):
        shutil.rmtree(path)
        shutil.copytree(pristine, path)
        stopped = start(name, str(path), *arguments, stop_at=stop_at, **options)
        assert stopped == -signal.SIGKILL, stop_at
        left = Store.open(path)
        seen.add(left.generation)
        assert payload(left) == (old if left.generation == before else new), stop_at
        if left.generation == before:
            assert start(name, str(path), *arguments, **options) == 0
        assert payload(Store.open(path)) == new, stop_at
        left.close()
        prune(path, 0)
        assert [entry.name for entry in (path / "generations").iterdir()] == [str(after)], stop_at
    assert seen == {before, after}
