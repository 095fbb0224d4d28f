"""The overlay of names over a generation: what each stands for, and that no change is lost."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_jd.compressor import Settings, read_adapters
from vllm_jd.compressor.change.incremental import add, remove
from vllm_jd.compressor.change.uploads import take_in
from vllm_jd.compressor.run.compress import compress
from vllm_jd.store import Store, StoreError
from vllm_jd.store.fleet import (
    DELETED,
    UPLOAD_FILES,
    Compressed,
    Entry,
    Fleet,
    Uploaded,
    change_fleet,
    check_name,
    read_fleet,
    source_of,
    uploaded,
)
from vllm_jd.store.generations import open_number
from vllm_jd.store.uploads import Incoming, Writer


class Generation:
    """As much of a Store as the overlay asks for: names, and a digest of each."""

    def __init__(self, sources):
        self.names = list(sources)
        digests = [list(bytes.fromhex(digest)) for digest in sources.values()]
        self.source_sha256 = torch.tensor(digests or [[0] * 32], dtype=torch.uint8)

    def __contains__(self, name):
        return name in self.names

    def index(self, name):
        return self.names.index(name)


A, B = "aa" * 32, "bb" * 32


def fleet_of(**entries):
    return Fleet(format=1, counter=1, entries=entries)


@pytest.mark.parametrize(
    ("entry", "in_generation", "expected"),
    [
        (None, A, Compressed(0)),
        (None, None, None),
        (Entry(pinned=True), A, Compressed(0)),
        (Entry(pinned=True), None, None),
        (Entry(digest=A), A, Compressed(0)),
        (Entry(digest=A), B, Uploaded(A)),
        (Entry(digest=A), None, Uploaded(A)),
        (DELETED, A, None),
        (DELETED, None, None),
    ],
)
def test_what_a_name_stands_for(entry, in_generation, expected):
    fleet = fleet_of(**({"x": entry} if entry else {}))
    store = Generation({"x": in_generation} if in_generation else {})
    assert fleet.meaning("x", store) == expected
    assert dict(fleet.meanings(store)) == ({"x": expected} if expected else {})


def test_names_are_listed_with_the_generations_first():
    store = Generation({"z": A, "gone": A, "b": A})
    fleet = fleet_of(y=Entry(digest=B), a=Entry(digest=A), gone=DELETED, b=Entry(digest=B))
    assert list(fleet.meanings(store)) == [
        ("z", Compressed(0)),
        ("b", Uploaded(B)),
        ("a", Uploaded(A)),
        ("y", Uploaded(B)),
    ]


names = st.sampled_from("abc")
digests = st.sampled_from([A, B])
entries = st.one_of(
    st.builds(Entry, digest=digests, pinned=st.booleans()),
    st.just(Entry(pinned=True)),
    st.just(DELETED),
)


@given(
    st.dictionaries(names, entries),
    st.lists(st.dictionaries(names, digests), min_size=1, max_size=3),
)
def test_settling_changes_no_meaning_and_leaves_nothing_needless(overlay, generations):
    stores = [Generation(sources) for sources in generations]
    before = fleet_of(**overlay)
    after = fleet_of(**before.settled(stores))
    for store in stores:
        assert dict(after.meanings(store)) == dict(before.meanings(store))
    assert {n for n, e in after.entries.items() if e.pinned} == {
        n for n, e in overlay.items() if e.pinned
    }
    for name, entry in after.entries.items():
        rest = {n: e for n, e in after.entries.items() if n != name}
        plain = rest | ({name: Entry(pinned=True)} if entry.pinned else {})
        same = all(
            dict(fleet_of(**plain).meanings(store)) == dict(after.meanings(store))
            for store in stores
        )
        assert plain == after.entries or not same


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "store"
    path.mkdir()
    return path


def test_changes_are_counted_and_read_back(folder):
    assert read_fleet(folder) == Fleet(format=1, counter=0, entries={})
    odd = "../ü \\ \" ' / e\u0301"
    first = change_fleet(
        folder, lambda entries: entries.update({odd: uploaded(A, source="s3://x")})
    )
    assert first.counter == 1
    assert read_fleet(folder) == first
    assert first.entries[odd].uploaded_at > 1e9
    assert change_fleet(folder, lambda entries: entries.update(first.entries)) == first
    second = change_fleet(folder, lambda entries: entries.update(x=DELETED, y=Entry()))
    assert second.entries == first.entries | {"x": DELETED}
    assert read_fleet(folder).counter == second.counter == 2
    raw = json.loads((folder / "fleet.json").read_text())
    assert raw["format"] == 1
    assert raw["entries"]["x"] == {"deleted": True}


def test_a_change_that_fails_changes_nothing(folder):
    change_fleet(folder, lambda entries: entries.update(x=DELETED))
    before = (folder / "fleet.json").read_bytes()

    def fail(entries):
        entries.clear()
        raise KeyError("no such adapter")

    with pytest.raises(KeyError, match="no such adapter"):
        change_fleet(folder, fail)
    assert (folder / "fleet.json").read_bytes() == before
    change_fleet(folder, lambda entries: entries.clear())  # the lock is free


def test_no_change_of_many_at_once_is_lost(folder):
    def give(name):
        return change_fleet(folder, lambda entries: entries.update({name: uploaded(A)})).counter

    with ThreadPoolExecutor(8) as pool:
        counters = list(pool.map(give, map(str, range(40))))
    assert sorted(counters) == list(range(1, 41))
    assert read_fleet(folder).entries.keys() == {str(i) for i in range(40)}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "Invalid JSON"),
        ("[]", "Input should be an object"),
        ('{"format": 2, "counter": 0, "entries": {}}', "format: .*expected a fleet of format 1"),
        ('{"format": 1, "entries": {}}', "counter: "),
        ('{"format": 1, "counter": 1, "entries": {"x": {"digest": "../x"}}}', "entries.x.digest: "),
        ('{"format": 1, "counter": 1, "entries": {"x": {"blend": 1}}}', "entries.x.blend: "),
        (
            f'{{"format": 1, "counter": 1, "entries": {{"x": {{"deleted": true, "digest": "{A}"'
            "}}}",
            "entries.x: .*deleted name with an upload",
        ),
    ],
)
def test_a_fleet_of_another_form_is_refused_and_left_alone(folder, text, said):
    (folder / "fleet.json").write_text(text)
    with pytest.raises(StoreError, match=rf"fleet\.json: {said}"):
        read_fleet(folder)
    with pytest.raises(StoreError, match=said):
        change_fleet(folder, lambda entries: entries.clear())
    assert (folder / "fleet.json").read_text() == text


@pytest.mark.parametrize("name", ["x", "../../etc/passwd", "org/name@main", "ü 雪", "a" * 512])
def test_a_name_may_be_anything_that_can_be_written_down(name):
    check_name(name)


@pytest.mark.parametrize("name", ["", " ", "a\n", "a\0", "a\x7f", "\ud800", "a" * 513, "é" * 257])
def test_other_names_are_refused(name):
    with pytest.raises(ValueError, match="found"):
        check_name(name)


def test_an_upload_that_a_generation_contains_is_served_from_it(tmp_path, write_adapters):
    """With the generations of a real store: forwards, back, and settled once both have it."""
    folders = write_adapters(tmp_path / "in", 4, kind="real")
    path = tmp_path / "store"
    compress(read_adapters(folders[:3]), path, Settings(rank=3))
    writer, incoming = Writer(path), Incoming(path).folder()
    for name in UPLOAD_FILES:
        (incoming / name).write_bytes((folders[3] / name).read_bytes())
    digest = writer.accept(incoming)
    name = folders[3].name
    fleet = change_fleet(path, lambda entries: entries.update({name: uploaded(digest)}))
    with Store.open(path) as store:
        assert fleet.meaning(name, store) == Uploaded(digest)
        assert len(dict(fleet.meanings(store))) == 4
    taken = take_in(path, max_adapter_error=2)
    assert taken.compressed.keys() == {name}
    with Store.open(path) as new, open_number(path, 1) as old:
        assert source_of(new, new.index(name)) == digest
        assert fleet.meaning(name, new) == Compressed(new.index(name))
        assert fleet.meaning(name, old) == Uploaded(digest)
        assert fleet.settled([old, new]) == fleet.entries
        assert fleet.settled([new]) == {}


def test_what_is_changed_by_hand_counts_whatever_was_uploaded(tmp_path, write_adapters):
    folders = write_adapters(tmp_path / "in", 4, kind="real")
    path = tmp_path / "store"
    compress(read_adapters(folders[:3]), path, Settings(rank=3))
    first, second, _, new = (folder.name for folder in folders)

    def before(entries):
        entries |= {first: uploaded(A, pinned=True), second: uploaded(A), new: DELETED}

    def meanings():
        with Store.open(path) as store:
            return dict(read_fleet(path).meanings(store))

    change_fleet(path, before)
    assert [type(meanings()[name]) for name in (first, second)] == [Uploaded, Uploaded]
    add(path, read_adapters([folders[0], folders[3]]), replace=True)
    assert [type(meanings()[name]) for name in (first, second)] == [Compressed, Uploaded]
    assert new in meanings()
    assert read_fleet(path).entries[first] == Entry(pinned=True)
    remove(path, [second])
    assert second not in meanings(), "or its upload would be back"
