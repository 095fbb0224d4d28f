"""Uploads of a fleet that go into the next generation of their store."""

import shutil
from pathlib import Path

import pytest
import torch

from tests.compressor.change.made import bits
from vllm_jd.compressor import AdapterError, Settings, read_adapters
from vllm_jd.compressor.change import uploads
from vllm_jd.compressor.change.incremental import add, recompress
from vllm_jd.compressor.change.progress import read_recompression, recording
from vllm_jd.compressor.change.uploads import bases_digest, guard_of, refit, take_in, waiting
from vllm_jd.compressor.run.compress import compress
from vllm_jd.store import Store, StoreError, writing
from vllm_jd.store.blend import of_mapping
from vllm_jd.store.fleet import (
    DELETED,
    UPLOAD_FILES,
    Blended,
    Compressed,
    Uploaded,
    blended,
    change_fleet,
    read_fleet,
    upload_folder,
    uploaded,
)
from vllm_jd.store.generations import generations_on_disk, prune, revert
from vllm_jd.store.settling import settle
from vllm_jd.store.uploads import Incoming, Keeper, Writer

METHODS = {
    "jd-full": {"rank": 6, "clusters": 2},
    "jd-diag": {"method": "jd-diag", "rank": 8},
    "svd": {"method": "svd", "rank": 3},
    "none": {"method": "none"},
}


@pytest.fixture(scope="module")
def family(tmp_path_factory, write_adapters):
    """Folders of adapters that have much in common, all of one family."""
    folder = tmp_path_factory.mktemp("family")
    return write_adapters(folder, 14, kind="real", ranks=(2, 3, 4), shared=3)


@pytest.fixture(scope="module")
def strangers(tmp_path_factory, write_adapters):
    """Folders of adapters that have nothing in common with those or each other."""
    folder = tmp_path_factory.mktemp("strangers")
    return write_adapters(folder, 3, prefix="stranger-", seed=9)


def made(path, folders, **options):
    return compress(read_adapters(folders), path, Settings(**options))


def upload(path, *named):
    """Give names uploads, as a server does: (name, folder) each. Returns their digests."""
    writer, coming = Writer(path), Incoming(path)
    digests = []
    for name, folder in named:
        incoming = coming.folder()
        for file in UPLOAD_FILES:
            shutil.copy(folder / file, incoming)
        digest = writer.accept(incoming)
        change_fleet(path, lambda entries, n=name, d=digest: entries.update({n: uploaded(d)}))
        digests.append(digest)
    writer.close()
    coming.close()
    return digests


def delete(path, *names):
    change_fleet(path, lambda entries: entries.update(dict.fromkeys(names, DELETED)))


def meaning(path, name):
    return read_fleet(path).meaning(name, Store.open(path, verify=False))


def check_numbers(store, name, folder, peft_deltas):
    """What is recorded of an adapter is what the store gives out, in dense float64. Returns its
    error."""
    row, errors = store.index(name), []
    given = {module: b.double() @ a.double() for module, (b, a) in store.factors(name).items()}
    for module, expected in peft_deltas(folder).items():
        column = store.module_index(module)
        left = (given[module] - expected).square().sum() / expected.square().sum()
        assert float(store.error[row, column]) == pytest.approx(float(left), rel=1e-3, abs=1e-6)
        assert float(store.norm[row, column]) == pytest.approx(float(expected.norm()), rel=1e-5)
        errors.append(float(left))
    return sum(errors) / len(errors)


@pytest.mark.parametrize("method", METHODS)
def test_uploads_are_projected_and_the_others_keep_every_bit(
    tmp_path, family, strangers, peft_deltas, method
):
    path = tmp_path / "s"
    before = made(path, family[:8], **METHODS[method])
    expected = bits(before)
    limit = 0.6
    upload(path, ("new", family[8]), ("org/other", family[9]), ("odd", strangers[0]))
    found = take_in(path, max_adapter_error=limit)
    store = Store.open(path)
    assert store.generation == found.store.generation == 2
    assert store.names == before.names + list(found.compressed)
    assert {*found.compressed, *found.kept} == {"new", "org/other", "odd"}
    assert found.refused == {} and found.removed == []
    after = bits(store)
    assert {name: after[name] for name in expected} == expected
    sources = {"new": family[8], "org/other": family[9], "odd": strangers[0]}
    for name, error in found.compressed.items():
        true = check_numbers(store, name, sources[name], peft_deltas)
        assert error == pytest.approx(true, rel=1e-3, abs=1e-6)
        assert true <= limit
        assert isinstance(meaning(path, name), Compressed)
    for name, error in found.kept.items():
        assert error > limit
        assert isinstance(meaning(path, name), Uploaded)
    if method not in ("svd", "none"):
        assert set(found.kept) == {"odd"}


def test_the_guard_is_the_stores_or_its_worst_adapters(tmp_path, family):
    store = made(tmp_path / "a", family[:6], rank=2, max_adapter_error=0.25)
    assert guard_of(store) == 0.25
    store = made(tmp_path / "b", family[:6], rank=2)
    errors = [float(store.error[i][store.present[i]].double().mean()) for i in range(len(store))]
    assert guard_of(store) == pytest.approx(max(errors))
    upload(tmp_path / "b", ("new", family[8]))
    found = take_in(tmp_path / "b")
    ((_, error),) = {**found.compressed, **found.kept}.items()
    assert ("new" in found.compressed) == (error <= max(errors))


def test_what_was_replaced_or_deleted_goes_and_what_was_tried_is_not_tried_again(
    tmp_path, family, strangers
):
    path = tmp_path / "s"
    made(path, family[:6], rank=6, max_adapter_error=0.5)
    first, second, third = (folder.name for folder in family[:3])
    digests = upload(path, (first, family[8]), (second, strangers[0]), ("twin", family[8]))
    delete(path, third)
    found = take_in(path)
    assert set(found.compressed) == {first, "twin"} and set(found.kept) == {second}
    assert sorted(found.removed) == [first, second, third]
    store = Store.open(path)
    assert store.names == [*(f.name for f in family[3:6]), first, "twin"]
    assert bytes(store.source_sha256[3].tolist()).hex() == digests[0]
    again = take_in(path, tried=[digests[1]])
    assert again.store.generation == store.generation == 2, "there was nothing to do"
    assert (again.compressed, again.kept, again.removed) == ({}, {}, [])
    assert again.bases == found.bases == bases_digest(store)
    assert set(take_in(path).kept) == {second}
    assert generations_on_disk(path) == [1, 2]
    # One call goes back, and nothing that a name stands for is lost.
    revert(path, 1)
    assert meaning(path, first) == Uploaded(digests[0])
    assert meaning(path, second) == Uploaded(digests[1])
    assert meaning(path, third) is None
    assert isinstance(meaning(path, family[3].name), Compressed)


def test_a_store_of_which_everything_was_deleted_stays_a_store(tmp_path, family, strangers):
    path = tmp_path / "s"
    made(path, family[:3], rank=6, max_adapter_error=0.5)
    delete(path, *(folder.name for folder in family[:3]))
    assert take_in(path).store.generation == 1
    upload(path, ("odd", strangers[0]))
    assert take_in(path).store.generation == 1
    upload(path, ("new", family[8]))
    assert take_in(path).store.names == ["new"]


def test_an_upload_that_is_damaged_or_does_not_fit_keeps_nobody_else_out(
    tmp_path, family, write_adapter, make_factors
):
    path = tmp_path / "s"
    made(path, family[:6], rank=6, max_adapter_error=0.5)
    shapes = {"model.layers.7.self_attn.q_proj": (24, 24)}
    other = write_adapter(tmp_path / "other", make_factors(1, shapes=shapes)[0])
    digests = upload(path, ("flipped", family[8]), ("cut", family[9]), ("other", other))
    upload(path, ("good", family[10]))
    weights = upload_folder(path, digests[0]) / UPLOAD_FILES[1]
    content = bytearray(weights.read_bytes())
    content[-7] ^= 4
    weights.write_bytes(content)
    weights = upload_folder(path, digests[1]) / UPLOAD_FILES[1]
    weights.write_bytes(weights.read_bytes()[:-5])
    found = take_in(path)
    assert set(found.compressed) == {"good"}
    assert set(found.refused) == {"flipped", "cut", "other"}
    assert "damaged since" in found.refused["flipped"]
    assert "truncated" in found.refused["cut"]
    assert "model.layers.7.self_attn.q_proj" in found.refused["other"]
    assert meaning(path, "flipped") == Uploaded(digests[0])


def test_a_generation_that_gives_out_something_else_is_not_published(
    tmp_path, family, monkeypatch, tree
):
    path = tmp_path / "s"
    made(path, family[:6], rank=6, max_adapter_error=0.5)
    upload(path, ("new", family[8]))
    expected = tree(path)
    real = uploads.project

    def wrong(*arguments, **options):
        parts = real(*arguments, **options)
        parts[1].cores.data[0] *= -1
        return parts

    monkeypatch.setattr(uploads, "project", wrong)
    with pytest.raises(StoreError, match=r"adapter 'new', model\.layers\.0.*not published"):
        take_in(path)
    assert tree(path) == expected, "something was left"
    monkeypatch.undo()
    assert set(take_in(path).compressed) == {"new"}


def test_two_at_once_are_one_too_many(tmp_path, family):
    path = tmp_path / "s"
    made(path, family[:6], rank=6)
    with writing(path), pytest.raises(StoreError, match="another process is writing this store"):
        take_in(path)


# --- new bases ---


def test_refit_gives_strangers_bases_and_leaves_the_worst_as_they_are(
    tmp_path, family, strangers, peft_deltas, write_adapters
):
    path = tmp_path / "s"
    made(path, family[:6], rank=10, clusters=2, store_dtype="float32", max_adapter_error=0.5)
    others = write_adapters(
        tmp_path / "others", 6, kind="real", shared=3, prefix="other-", seed=3, ranks=(2, 3)
    )
    named = [(folder.name, folder) for folder in [*others, family[7]]]
    upload(path, *named)
    before = take_in(path)
    assert set(before.kept) == {folder.name for folder in others}
    with pytest.raises(AdapterError, match=r"sources of 6 of 13 .*--originals DIR"):
        refit(path)
    assert generations_on_disk(path) == [1, 2]
    delete(path, family[0].name)
    found = refit(path, originals=[family[0].parent])
    assert found.refitted and found.bases != before.bases
    assert found.removed == [family[0].name]
    store = Store.open(path)
    assert store.generation == 3
    assert store.manifest.settings == before.store.manifest.settings
    sources = dict(named) | {folder.name: folder for folder in family[1:6]}
    assert set(store.names) == sources.keys() - found.kept.keys()
    assert len(found.compressed) >= 4
    for name in store.names:
        error = check_numbers(store, name, sources[name], peft_deltas)
        assert error <= 0.5
        assert name not in found.compressed or error == pytest.approx(found.compressed[name])
    for name, error in found.kept.items():
        assert error > 0.5 and isinstance(meaning(path, name), Uploaded)
    assert not (path / ".refit").exists()


def test_who_changes_the_store_while_bases_are_fitted_wins(tmp_path, family, monkeypatch):
    path = tmp_path / "s"
    made(path, family[:6], rank=6)
    folder = family[0].parent
    upload(path, ("new", family[8]), ("gone", family[9]))
    real = uploads.compress

    def deleting(*arguments, **options):
        delete(path, "gone")
        upload(path, ("new", family[10]))
        settle(path)  # of which nothing is left in the overlay
        return real(*arguments, **options)

    monkeypatch.setattr(uploads, "compress", deleting)
    found = refit(path, originals=[folder])
    assert "gone" not in found.store and "new" not in found.store
    assert meaning(path, "gone") is None
    assert isinstance(meaning(path, "new"), Uploaded)

    def adding(*arguments, **options):
        add(path, read_adapters([family[11]]))
        return real(*arguments, **options)

    monkeypatch.setattr(uploads, "compress", adding)
    with pytest.raises(StoreError, match="made a new generation of it meanwhile"):
        refit(path, originals=[folder])
    assert family[11].name in Store.open(path)
    monkeypatch.undo()
    refit(path, originals=[folder])
    assert family[11].name in Store.open(path)
    with pytest.raises(AdapterError, match="no bases that adapters share"):
        made(tmp_path / "svd", family[:3], method="svd", rank=2)
        refit(tmp_path / "svd")


# --- the record, and what is forgotten ---


def test_the_record_tells_of_the_last_recompression(tmp_path, family, strangers):
    path = tmp_path / "s"
    store = made(path, family[:6], rank=6, max_adapter_error=0.5)
    assert read_recompression(path) is None
    (_, odd) = upload(path, ("new", family[8]), ("odd", strangers[0]))
    with recording(path, refit=False) as recorder:
        recorder.on_progress("projecting adapters", 1, 4)
        now = read_recompression(path)
        assert (now.state, now.what, now.done, now.total) == ("running", recorder.now.what, 1, 4)
        recorder.finish(take_in(path))
    last = read_recompression(path)
    assert (last.state, last.generation, last.compressed) == ("done", 2, 1)
    assert last.kept.keys() == {odd} and last.kept[odd] > 0.5
    assert last.tried(bases_digest(store)) == {odd}
    assert last.tried("other bases") == set()
    with pytest.raises(ZeroDivisionError), recording(path, refit=False):
        raise ZeroDivisionError("no")
    last = read_recompression(path)
    assert (last.state, last.message) == ("failed", "no")
    assert last.kept.keys() == {odd}, "what was known is known still"
    second = recording(path, refit=False)
    already = pytest.raises(StoreError, match="recompresses this store already")
    with recording(path, refit=False) as recorder, already:
        second.__enter__()
    recorder.now.state = "running"
    recorder.write()  # as a process that was killed then
    assert read_recompression(path).state == "stopped"
    (path / "recompress.json").write_text("{")
    assert read_recompression(path) is None


def test_settling_forgets_what_all_generations_say_and_keeps_what_new_bases_need(
    tmp_path, family, strangers
):
    path = tmp_path / "s"
    made(path, family[:6], rank=6, max_adapter_error=0.5)
    assert settle(path).uploads == 0
    new, odd, old = upload(path, ("new", family[8]), ("odd", strangers[0]), ("x", family[9]))
    delete(path, "x")
    delete(path, family[0].name)
    take_in(path)
    everything = dict(read_fleet(path).entries)

    def meanings():
        store = Store.open(path, verify=False)
        return {name: type(m) for name, m in read_fleet(path).meanings(store)}

    before = meanings()
    done = settle(path)
    assert done.names == ["x"] and (done.uploads, done.held) == (1, None)
    assert not upload_folder(path, old).exists()
    assert read_fleet(path).entries.keys() == everything.keys() - {"x"}
    prune(path, 0)
    done = settle(path)
    assert sorted(done.names) == sorted([family[0].name, "new"])
    assert read_fleet(path).entries.keys() == {"odd"}
    assert upload_folder(path, new).exists(), "bases can be fitted to it still"
    keeper = Keeper(path)
    assert "another server" in settle(path, originals=True).held
    keeper.close()
    assert settle(path, originals=True).uploads == 1
    assert not upload_folder(path, new).exists() and upload_folder(path, odd).exists()
    assert meanings() == before
    assert waiting(read_fleet(path), Store.open(path)) == {"odd": odd}


def test_a_refit_that_is_killed_while_its_scratch_is_deleted_is_in_nobodys_way(
    tmp_path, family, monkeypatch
):
    path = tmp_path / "s"
    made(path, family[:6], rank=6)
    folder = family[0].parent

    rmtree = shutil.rmtree

    def killed(folder, **options):
        if not Path(folder).name.startswith(".refit"):
            return rmtree(folder, **options)
        (folder / "CURRENT").unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr(uploads.shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        refit(path, originals=[folder])
    monkeypatch.undo()
    assert refit(path, originals=[folder]).store.generation == 3
    take_in(path)
    assert not [*path.glob(".refit*")]


def test_a_name_of_an_upload_or_a_blend_is_given_away_only_when_asked_to(tmp_path, family):
    path = tmp_path / "s"
    made(path, family[:6], rank=6)
    upload(path, ("late", family[7]))
    change_fleet(path, lambda entries: entries.update(ab=blended(of_mapping({"late": 2.0}))))
    news = read_adapters([f"late={family[8]}", f"ab={family[9]}", family[10]])
    with pytest.raises(AdapterError, match=r"ab, late \(2 in all\)"):
        add(path, news)
    assert isinstance(meaning(path, "late"), Uploaded) and isinstance(meaning(path, "ab"), Blended)
    add(path, news, replace=True)
    assert all(isinstance(meaning(path, name), Compressed) for name in news.names)
    upload(path, ("late", family[7]))
    recompress(path, news)
    assert isinstance(meaning(path, "late"), Compressed)


def test_adapters_by_other_names_of_the_base_model_are_taken_in(tmp_path, write_adapters):
    """Those that the user said are of one model (--same-base), by refits too."""
    path, folders = tmp_path / "s", []
    for i, base in enumerate(("llama", "unsloth/llama-4bit", "llama", "unsloth/llama-4bit")):
        options = {"prefix": f"a{i}-", "seed": i, "ranks": (2,), "config": {"base": base}}
        folders += write_adapters(tmp_path / "in", 1, **options)
    collection = read_adapters(folders[:3], base_model="llama", same_base=True)
    compress(collection, path, Settings(rank=6, max_adapter_error=1.0))
    upload(path, ("late", folders[3]))
    found = take_in(path)
    assert found.compressed.keys() == {"late"} and not found.refused
    assert found.store.manifest.base_model.other_names == ["unsloth/llama-4bit"]
    again = refit(path, originals=[folders[0].parent])
    assert {*again.store.names} == {*collection.names, "late"}
    assert again.store.manifest.base_model.other_names == ["unsloth/llama-4bit"]


def test_a_store_whose_base_model_has_no_name_takes_uploads_of_any(tmp_path, write_adapters):
    path, folders = tmp_path / "s", []
    for i, base in enumerate((None, None, "one", "two")):
        options = {"prefix": f"a{i}-", "seed": i, "ranks": (2,), "config": {"base": base}}
        folders += write_adapters(tmp_path / "in", 1, **options)
    made(path, folders[:2], rank=6, max_adapter_error=1.0)
    upload(path, ("x", folders[2]), ("y", folders[3]))
    assert take_in(path).compressed.keys() == {"x", "y"}


@pytest.mark.parametrize("again", [False, True], ids=["deleted", "given again"])
@pytest.mark.parametrize("before", ["compress", "_sources"])
def test_uploads_that_are_deleted_while_bases_are_fitted_to_them_are_no_fault(
    again, before, tmp_path, family, strangers, monkeypatch
):
    path = tmp_path / "s"
    made(path, family[:6], rank=6)
    upload(path, ("gone", strangers[0]))
    real = getattr(uploads, before)

    def deleting(*arguments, **options):
        delete(path, "gone")
        settle(path)
        if again:
            upload(path, ("gone", strangers[0]))
        return real(*arguments, **options)

    monkeypatch.setattr(uploads, before, deleting)
    if before == "_sources" and again:  # they are read as they are now
        assert "gone" in refit(path, originals=[family[0].parent]).compressed
        return
    with pytest.raises(StoreError, match="another process changed its uploads meanwhile"):
        refit(path, originals=[family[0].parent])
    assert Store.open(path).generation == 1
    monkeypatch.undo()
    assert again == (meaning(path, "gone") is not None)
    assert again or "gone" not in refit(path, originals=[family[0].parent]).store


def test_what_a_killed_refit_has_left_goes(tmp_path, family, monkeypatch):
    path = tmp_path / "s"
    made(path, family[:6], rank=6)
    folder = family[0].parent

    def killed(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(uploads, "publish_changed", killed)
    with pytest.raises(KeyboardInterrupt):
        refit(path, originals=[folder])
    monkeypatch.undo()
    assert (path / ".refit" / "CURRENT").exists()
    take_in(path)
    assert not (path / ".refit").exists()
    (path / ".refit-1").mkdir()  # killed while it was deleted
    take_in(path)
    assert not (path / ".refit-1").exists()
    (path / ".refit" / ".compress").mkdir(parents=True)
    (path / ".refit" / ".lock").touch()
    take_in(path)
    assert (path / ".refit").exists(), "a refit would go on there"
    uploads.drop_refit(path)
    assert not (path / ".refit").exists()
    assert Path(path / "CURRENT").read_text().startswith("1 ")


def test_bases_are_told_from_others(tmp_path, family):
    store = made(tmp_path / "a", family[:6], rank=6)
    assert bases_digest(store) == bases_digest(add(tmp_path / "a", read_adapters(family[6:7])))
    other = made(tmp_path / "b", family[:6], rank=6, seed=5, clusters=2)
    assert bases_digest(store) != bases_digest(other)
    assert torch.is_tensor(store.error)
