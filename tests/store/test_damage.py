"""A store that is damaged or does not fit is refused, and it is said which file and why."""

import json
import random
import shutil
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.store.stores import (
    live,
    live_files,
    refused,
    rewrite_file,
    rewrite_manifest,
    rewrite_tensors,
    write_synthetic,
)
from vllm_jd.row import STORED_FIELDS
from vllm_jd.store import (
    Store,
    StoreError,
)


def test_a_header_damaged_behind_an_unverified_open_is_refused(store):
    file = live(store) / "bases-00000.safetensors"
    content = bytearray(file.read_bytes())
    content[:40] = b"\xff" * 40
    file.write_bytes(content)
    with pytest.raises(StoreError, match="bases-00000"):
        Store.open(store, verify=False)


def test_a_table_renamed_behind_an_unverified_open_is_refused(store):
    file = live(store) / "bases-00000.safetensors"
    content = bytearray(file.read_bytes())
    at = content.index(b"k_proj.clusters")
    content[at : at + 6] = b"x_proj"
    file.write_bytes(content)
    opened = Store.open(store, verify=False)
    with pytest.raises(StoreError, match="bases-00000"):
        opened.rows("model.layers.0.self_attn.k_proj")


def test_one_flipped_byte_anywhere_is_refused(store):
    generator = random.Random(0)
    for file in live_files(store):
        original = file.read_bytes()
        size = len(original)
        places = {0, 1, 7, 8, 9, size // 2, size - 2, size - 1}
        places |= {generator.randrange(size) for _ in range(25)}
        if file.name == "CURRENT":
            places = set(range(size))
        for at in sorted(places):
            for flip in (1, 0x20, 0x80) if file.name == "CURRENT" else (generator.randint(1, 255),):
                damaged = bytearray(original)
                damaged[at] ^= flip
                file.write_bytes(damaged)
                with pytest.raises(StoreError) as caught:
                    Store.open(store)
                assert str(store) in str(caught.value)
        file.write_bytes(original)
    assert len(Store.open(store)) == 5


@pytest.mark.parametrize("how", ["missing", "empty", "shorter", "longer", "a folder"])
def test_a_missing_or_resized_file_is_refused_by_name(store, how):
    for file in live_files(store):
        original = file.read_bytes()
        file.unlink()
        if how == "empty":
            file.write_bytes(b"")
        elif how == "shorter":
            file.write_bytes(original[:-1])
        elif how == "longer":
            file.write_bytes(original + b"\0")
        elif how == "a folder":
            file.mkdir()
        with pytest.raises(StoreError, match=file.name):
            Store.open(store)
        if how != "missing":
            with pytest.raises(StoreError, match=file.name):
                Store.open(store, verify=False)
        shutil.rmtree(file) if file.is_dir() else file.unlink(missing_ok=True)
        file.write_bytes(original)


def test_swapped_files_are_refused(store):
    one, two = live(store) / "bases-00000.safetensors", live(store) / "cores-00000.safetensors"
    content = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(content)
    refused(store, "bases-00000.safetensors|cores-00000.safetensors")


@pytest.mark.parametrize(
    "text",
    ["", "1", "x", "1 \n", "0 " + "0" * 64 + "\n", "-1 " + "0" * 64, "1 " + "0" * 64, "../1 " * 9],
)
def test_a_malformed_current_is_refused(store, text):
    (store / "CURRENT").write_text(text)
    refused(store, "CURRENT: found .*, expected '<generation> <sha256 of its manifest>'")


def test_current_that_names_no_generation_is_refused(store):
    text = (store / "CURRENT").read_text()
    (store / "CURRENT").write_text("7" + text[1:])
    refused(store, "generations/7/manifest.json: missing")


def test_places_without_a_store_are_refused(tmp_path):
    refused(tmp_path / "none", "no such folder; expected a store")
    refused(tmp_path, "found no CURRENT file")
    (tmp_path / "file").write_text("x")
    refused(tmp_path / "file", "file")


def test_the_manifest_of_another_store_is_refused(store, tmp_path):
    write_synthetic(tmp_path / "other", 5)
    shutil.copy(live(tmp_path / "other") / "manifest.json", live(store) / "manifest.json")
    refused(store, "manifest.json: found sha256 .*, expected")
    shutil.copy(tmp_path / "other" / "CURRENT", store / "CURRENT")
    refused(store, "found .* bytes, expected")


@pytest.mark.parametrize("version", [0, 1, 3, "2", None, [2]])
def test_another_schema_version_is_refused_with_what_to_do(store, version):
    rewrite_manifest(store, lambda manifest: manifest.update(schema_version=version))
    refused(store, f"schema version {version!r}, this vllm-jd reads 2".replace("[", r"\["))


MANIFEST_LIES = {
    "unknown field": lambda m: m.update(extra=1),
    "missing field": lambda m: m.pop("dtype"),
    "no adapters": lambda m: m.update(adapters=0),
    "more adapters": lambda m: m.update(adapters=6),
    "negative size": lambda m: m["modules"][0].update(d_in=-1),
    "wrong width": lambda m: m["modules"][0].update(d_in=25),
    "wrong rank": lambda m: m["modules"][0].update(rank=2),
    "more clusters": lambda m: m["modules"][0].update(clusters=3),
    "fewer modules": lambda m: m["modules"].pop(),
    "a module renamed": lambda m: m["modules"][0].update(name="other"),
    "a module twice": lambda m: m["modules"].append(m["modules"][0]),
    "core outside of the row": lambda m: m["modules"][3].update(core_offset=28),
    "cores that overlap": lambda m: m["modules"][1].update(core_offset=0),
    "core row": lambda m: m.update(core_row=35),
    "no shards": lambda m: m.update(core_shards=[]),
    "shard gap": lambda m: m["core_shards"][0].update(first=1),
    "shard too short": lambda m: m["core_shards"][0].update(rows=4),
    "shard elsewhere": lambda m: m["core_shards"][0].update(file="../../CURRENT"),
    "file elsewhere": lambda m: m["files"].update(
        {"../../CURRENT": m["files"]["bases-00000.safetensors"]}
    ),
    "file unhashed": lambda m: m["files"].pop("bases-00000.safetensors"),
    "hash no hex": lambda m: m["files"]["bases-00000.safetensors"].update(sha256="x" * 64),
    "dtype": lambda m: m.update(dtype="float16"),
    "unknown dtype": lambda m: m.update(dtype="int8"),
}


@pytest.mark.parametrize("case", MANIFEST_LIES)
def test_a_manifest_that_does_not_fit_its_files_is_refused(store, case):
    rewrite_manifest(store, MANIFEST_LIES[case])
    with pytest.raises(StoreError) as caught:
        Store.open(store)
    assert str(live(store)) in str(caught.value)


@pytest.mark.parametrize(
    "text", [b"", b"{", b"[]", b"null", b"\xff", b"[" * 100_000, b'{"schema_version": 2}']
)
def test_a_manifest_that_is_none_is_refused(store, text):
    file = live(store) / "manifest.json"
    file.write_bytes(text)
    (store / "CURRENT").write_text(f"1 {sha256(text).hexdigest()}\n")
    refused(store, "manifest.json")


TABLE_LIES = {
    "cluster too high": lambda t: t["cluster"].fill_(2),
    "cluster too low": lambda t: t["cluster"].fill_(-2),
    "a row less": lambda t: t.update(norm=t["norm"][:-1].clone()),
    "another type": lambda t: t.update(error=t["error"].double()),
    "a column less": lambda t: t.update(rank=t["rank"][:, :-1].clone()),
    "no names": lambda t: t.pop("names"),
    "offsets backwards": lambda t: t.update(name_offsets=t["name_offsets"].flip(0)),
    "offsets beyond the names": lambda t: t["name_offsets"].mul_(3),
    "name not UTF-8": lambda t: t["names"].fill_(0xFF),
    "equal names": lambda t: t["names"].fill_(65),
    "short hashes": lambda t: t.update(source_sha256=t["source_sha256"][:, :31].clone()),
}


@pytest.mark.parametrize("case", TABLE_LIES)
def test_a_table_that_does_not_fit_is_refused(store, case):
    rewrite_tensors(store, "adapters.safetensors", TABLE_LIES[case])
    refused(store, "adapters.safetensors: ")


TENSOR_LIES = {
    "bases transposed": (
        "bases-00000.safetensors",
        lambda t: t.update({k: v.mT.contiguous() for k, v in t.items()}),
    ),
    "bases of another type": (
        "bases-00000.safetensors",
        lambda t: t.update({k: v.float() for k, v in t.items()}),
    ),
    "one basis of another type": (
        "bases-00000.safetensors",
        lambda t: t.update({max(t): t[max(t)].half()}),
    ),
    "a basis more": ("bases-00000.safetensors", lambda t: t.update(x=torch.ones(1))),
    "a basis less": ("bases-00000.safetensors", lambda t: t.pop(min(t))),
    "cores of another type": (
        "cores-00000.safetensors",
        lambda t: t.update(cores=t["cores"].half()),
    ),
    "cores flat": ("cores-00000.safetensors", lambda t: t.update(cores=t["cores"].flatten())),
    "cores renamed": ("cores-00000.safetensors", lambda t: t.update(core=t.pop("cores"))),
}


@pytest.mark.parametrize("case", TENSOR_LIES)
def test_tensors_that_do_not_fit_the_manifest_are_refused(store, case):
    name, change = TENSOR_LIES[case]
    rewrite_tensors(store, name, change)
    refused(store, name)


@pytest.mark.parametrize("name", ["adapters", "bases-00000", "cores-00000"])
def test_a_file_that_is_no_safetensors_is_refused_although_its_hash_fits(store, name):
    for content in (b"", b"x", b"\xff" * 100, b"\x02\0\0\0\0\0\0\0{}"):
        rewrite_file(store, f"{name}.safetensors", content)
        refused(store, f"{name}.safetensors")


RICH_MANIFEST_LIES = {
    "not quantised": lambda m: m.update(quantised=None),
    "the other kind": lambda m: m.update(quantised="int8" if m["quantised"] else "int4"),
    "unknown kind": lambda m: m.update(quantised="int2"),
    "dtype": lambda m: m.update(dtype="float16"),
    "fewer rows": lambda m: m.update(rows=2),
    "no rows": lambda m: m.update(rows=0),
    "more shared than there are": lambda m: m["modules"][0].update(shared=6),
    "cores in what is one adapter's": lambda m: m["modules"][0].update(shared=0),
    "private that two have": lambda m: m["modules"][0].update(shared=2),
    "a rank that no cluster has": lambda m: m["modules"][0].update(rank=4),
    "a rank beyond all numbers": lambda m: m["modules"][0].update(rank=10**30),
    "a rank without a shared cluster": lambda m: m["modules"][2].update(rank=2),
    "fewer rows of U": lambda m: m["modules"][0].update(u_rows=11),
    "more rows of U": lambda m: m["modules"][0].update(u_rows=13),
    "rows of V beyond all numbers": lambda m: m["modules"][0].update(v_rows=10**30),
    "fewer rows of scales": lambda m: m["modules"][1].update(scale_rows=1),
    "no scales": lambda m: m["modules"][1].update(scale_rows=0),
    "more scales": lambda m: m["modules"][0].update(scale_rows=1),
    "fewer clusters": lambda m: m["modules"][0].update(clusters=4),
    "more clusters": lambda m: m["modules"][0].update(clusters=6),
    "smaller core": lambda m: m["modules"][0].update(core_size=8),
    "core outside of the row": lambda m: m["modules"][1].update(core_offset=50),
    "a core row more": lambda m: m.update(core_row=m["core_row"] + 1),
    "wider U": lambda m: m["modules"][0].update(d_out=71),
    "narrower V": lambda m: m["modules"][0].update(d_in=3),
    "a basis shard less": lambda m: m["basis_shards"].pop(),
    "a basis shard twice": lambda m: m["basis_shards"].append(m["basis_shards"][0]),
    "a basis shard that is none": lambda m: m["basis_shards"].append("cores-00000.safetensors"),
    "no basis shards": lambda m: m.update(basis_shards=[]),
    "core shards in another order": lambda m: m["core_shards"].reverse(),
    "a core shard twice": lambda m: m["core_shards"].append(m["core_shards"][1]),
    "a module called as another": lambda m: m["modules"][0].update(name="m1"),
}


def refuses(rich, tmp_path, change):
    store = Path(shutil.copytree(rich, tmp_path / "store"))
    change(store)
    with pytest.raises(StoreError) as caught:
        Store.open(store)
    assert str(live(store)) in str(caught.value)


@pytest.mark.parametrize("case", RICH_MANIFEST_LIES)
def test_a_manifest_that_does_not_fit_many_kinds_of_rows_is_refused(rich, tmp_path, case):
    change = RICH_MANIFEST_LIES[case]
    manifest = json.loads((live(rich) / "manifest.json").read_text())
    changed = json.loads(json.dumps(manifest))
    change(changed)
    if changed == manifest or (case == "dtype" and manifest["quantised"]):
        return  # no lie about this store
    refuses(rich, tmp_path, lambda store: rewrite_manifest(store, change))


def set_cluster(line, field, value):
    def change(tensors):
        tensors["m0.clusters"][line, STORED_FIELDS.index(field)] = value

    return change


CLUSTER_LIES = {
    f"{field} {value} of line {line}": set_cluster(line, field, value)
    for line, field, values in [
        (0, "v_start", [-1, 13, 15, 2**31 - 1]),
        (0, "u_start", [-1, 10, 12, 2**31 - 1]),
        (0, "rank", [-1, 0, 1, 13, 2**31 - 1]),
        (0, "core_kind", [-1, 3]),
        (0, "scale_row", [-2, 0, 2**31 - 1]),
        (3, "v_start", [-1, 10]),
        (3, "u_start", [-1, 7]),
        (3, "rank", [0, 7]),
        (3, "core_kind", [-1, 3]),
        (3, "scale_row", [-2, 0]),
    ]
    for value in values
}


@pytest.mark.parametrize("case", CLUSTER_LIES)
def test_an_index_of_a_cluster_outside_of_its_pool_is_refused(rich, tmp_path, case):
    """Line 0 of the second shard is line 1 of the table; its line 3 an adapter's own."""
    name = "bases-00001.safetensors"
    change = CLUSTER_LIES[case]
    refuses(rich, tmp_path, lambda store: rewrite_tensors(store, name, change))


def set_choice(adapter, module, row, value):
    def change(tensors):
        tensors["cluster"][adapter, module, row] = value

    return change


CHOICE_LIES = {
    "beyond the clusters": set_choice(0, 1, 0, 3),
    "far beyond": set_choice(3, 2, 2, 2**31 - 1),
    "below -1": set_choice(0, 0, 2, -2),
    "far below": set_choice(0, 0, 2, -(2**31)),
    "two cores": set_choice(0, 0, 1, 1),
    "the same core twice": set_choice(0, 0, 1, 0),
    "another adapter's own": set_choice(1, 0, 2, 3),
    "its own twice": set_choice(0, 0, 1, 3),
    "fewer rows": lambda t: t.update(cluster=t["cluster"][:, :, :2].clone()),
    "flat": lambda t: t.update(cluster=t["cluster"][:, :, 0].clone()),
    "wide numbers": lambda t: t.update(cluster=t["cluster"].long()),
    "errors of another type": lambda t: t.update(error=t["error"].double()),
    "errors of fewer": lambda t: t.update(error=t["error"][:1].clone()),
}


@pytest.mark.parametrize("case", CHOICE_LIES)
def test_a_row_that_no_cluster_fits_is_refused(rich, tmp_path, case):
    name = "adapters.safetensors"
    change = CHOICE_LIES[case]
    refuses(rich, tmp_path, lambda store: rewrite_tensors(store, name, change))


def renamed(old, new):
    return lambda t: t.update({new: t.pop(old)})


BASIS_LIES = {
    "a row of U less": lambda t: t.update({"m0.U": t["m0.U"][1:].clone()}),
    "a column of U less": lambda t: t.update({"m0.U": t["m0.U"][:, 1:].clone()}),
    "U flat": lambda t: t.update({"m0.U": t["m0.U"].flatten()}),
    "U a number": lambda t: t.update({"m0.U": t["m0.U"][0, 0].clone()}),
    "U of another type": lambda t: t.update({"m0.U": t["m0.U"].to(torch.int16)}),
    "no U": lambda t: t.pop("m0.U"),
    "no clusters": lambda t: t.pop("m0.clusters"),
    "clusters flat": lambda t: t.update({"m0.clusters": t["m0.clusters"].flatten()}),
    "clusters of wide numbers": lambda t: t.update({"m0.clusters": t["m0.clusters"].long()}),
    "a field less": lambda t: t.update({"m0.clusters": t["m0.clusters"][:, :4].clone()}),
    "steps of clusters": lambda t: t.update({"m0.clusters.steps": torch.ones(1, 1).bfloat16()}),
    "another module": renamed("m0.U", "m9.U"),
    "steps of nothing": lambda t: t.update({"m9.U.steps": torch.ones(1, 1).bfloat16()}),
    "steps of steps": lambda t: t.update({"m0.U.steps.steps": torch.ones(1, 1).bfloat16()}),
    "scales that are none": lambda t: t.update({"m0.scales": t["m0.U"][:1].clone()}),
}
STEP_LIES = {
    "no steps": lambda t: t.pop("m0.U.steps"),
    "steps alone": lambda t: t.pop("m0.U"),
    "a row of steps less": lambda t: t.update({"m0.U.steps": t["m0.U.steps"][1:].clone()}),
    "a step less": lambda t: t.update({"m0.U.steps": t["m0.U.steps"][:, 1:].clone()}),
    "steps a number": lambda t: t.update({"m0.U.steps": t["m0.U.steps"][0, 0].clone()}),
    "steps of another type": lambda t: t.update({"m0.U.steps": t["m0.U.steps"].float()}),
}


@pytest.mark.parametrize("shard", [0, 1])
@pytest.mark.parametrize("case", BASIS_LIES | STEP_LIES)
def test_basis_tensors_that_do_not_fit_are_refused(rich, tmp_path, shard, case):
    name = f"bases-{shard:05d}.safetensors"
    change = (BASIS_LIES | STEP_LIES)[case]
    if case in STEP_LIES and "m0.U.steps" not in load_file(live(rich) / name):
        change = lambda t: t.update({"m0.U.steps": torch.ones(2, 3).bfloat16()})  # noqa: E731
    refuses(rich, tmp_path, lambda store: rewrite_tensors(store, name, change))


@pytest.mark.parametrize("case", ["none", "narrower", "of another type", "fewer"])
def test_core_steps_that_do_not_fit_are_refused(rich, tmp_path, case):
    def change(tensors):
        steps = tensors.pop("cores.steps", torch.ones(3, 2).bfloat16())
        changed = {
            "narrower": steps[:, 1:].clone(),
            "of another type": steps.half(),
            "fewer": steps[1:].clone(),
        }
        if case in changed:
            tensors["cores.steps"] = changed[case]
        elif tensors["cores"].is_floating_point():
            tensors["cores"] = tensors["cores"].to(torch.int8)

    name = "cores-00000.safetensors"
    refuses(rich, tmp_path, lambda store: rewrite_tensors(store, name, change))
