"""Which folders are adapters, and what they are called."""

import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel

from tests.compressor.read.peft_folders import (
    CONFIG,
    WEIGHTS,
    base_model,
    loaded,
    logits,
    same,
    save,
    train,
    trained,
    with_deltas,
)
from vllm_jd.compressor import AdapterError, Settings, read_adapters
from vllm_jd.compressor.read import hub
from vllm_jd.compressor.read.find import names_of, split_name
from vllm_jd.compressor.run.compress import compress

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def refused(*sources, **options):
    with pytest.raises(AdapterError) as caught:
        read_adapters(sources, **options)
    return caught.value.faults


def several(folder, names=("sql", "chat")):
    """PEFT's `save_pretrained` of a model with several adapters: the default at the root."""
    model = trained(1)
    for i, name in enumerate(names):
        config = {"r": 2 + i, "lora_alpha": 5, "target_modules": ["q_proj", "up_proj"]}
        model.add_adapter(name, LoraConfig(task_type="CAUSAL_LM", **config))
    for name, parameter in model.named_parameters():
        parameter.requires_grad = ".lora_" in name and ".default." not in name
    train(model, 2)
    return save(model, folder), model


def test_all_adapters_of_one_peft_folder_are_taken_with_the_numbers_of_each(tmp_path):
    folder, model = several(tmp_path / "support")
    assert (folder / CONFIG).is_file() and (folder / "sql" / CONFIG).is_file()
    collection = read_adapters([folder])
    assert collection.names == ["chat", "sql", "support"]
    for i, name in enumerate(collection.names):
        model.set_adapter("default" if name == "support" else name)
        same(with_deltas(collection, i), logits(model))
    assert read_adapters([tmp_path]).names == collection.names
    # The folder of one is that one, and NAME=PATH too.
    assert read_adapters([folder / "sql"]).names == ["sql"]
    assert read_adapters([f"alone={folder}"]).names == ["alone"]


def test_all_but_the_default_are_taken_where_it_was_not_saved(tmp_path):
    folder, _ = several(tmp_path / "support")
    (folder / CONFIG).unlink()
    (folder / WEIGHTS).unlink()
    assert read_adapters([folder]).names == ["chat", "sql"]


def test_two_such_folders_keep_their_adapters_apart(tmp_path):
    for name in ("de", "fr"):
        several(tmp_path / name)
    expected = ["de", "de/chat", "de/sql", "fr", "fr/chat", "fr/sql"]
    assert read_adapters([tmp_path]).names == expected
    assert read_adapters([tmp_path / "fr", tmp_path / "de"]).names == expected


def test_a_trainers_checkpoints_are_left_out_and_said_so(tmp_path, write_adapters):
    (adapter,) = write_adapters(tmp_path / "in", 1, prefix="sql")
    plain = shutil.copytree(adapter, tmp_path / "plain")
    for step in (100, 200, 300, 400):
        shutil.copytree(plain, adapter / f"checkpoint-{step}")
    (adapter / "runs").mkdir()
    (adapter / "checkpoint-500").mkdir()  # empty: nothing to speak of
    notes = []
    assert read_adapters([tmp_path / "in"], on_note=notes.append).names == ["sql000"]
    assert notes == [
        f"{adapter}: left out checkpoint-100, checkpoint-200, checkpoint-300 and 1 more, the same "
        "adapter at another time of its training; give one as a path to have it"
    ]
    # One line for many adapters, and none for what was given.
    shutil.copytree(adapter, tmp_path / "in" / "chat")
    notes.clear()
    read_adapters([tmp_path / "in"], on_note=notes.append)
    (note,) = notes
    assert "of its training, and those of 1 more adapters; give one" in note
    notes.clear()
    given = [adapter / f"checkpoint-{step}" for step in (100, 200, 300, 400)]
    names = [f"checkpoint-{step}" for step in (100, 200, 300, 400)]
    assert read_adapters([adapter, *given], on_note=notes.append).names == [*names, "sql000"]
    assert notes == []
    # Where they are all that there is, they are the adapters.
    for name in (CONFIG, WEIGHTS):
        (adapter / name).unlink()
    assert read_adapters([adapter]).names == names


def test_pissa_folders_of_llama_factory_give_the_converted_adapter(tmp_path, write_adapters):
    """It leaves the first adapter, a backup for the changed base and a plain LoRA beside it."""
    (adapter,) = write_adapters(
        tmp_path / "in", 1, prefix="sql", config={"init_lora_weights": "pissa"}
    )
    for i, name in enumerate(("pissa_init", "pissa_backup", "pissa_converted")):
        (made,) = write_adapters(tmp_path / "made", 1, seed=i + 1)
        made.rename(adapter / name)
    notes = []
    (alone,) = write_adapters(tmp_path / "alone", 1, seed=3)
    expected = read_adapters([alone])
    for sources in ([tmp_path / "in"], [adapter], [f"sql000={adapter}"]):
        collection = read_adapters(sources, on_note=notes.append)
        assert collection.names == ["sql000"]
        for module in expected.shapes:
            assert torch.equal(collection.factors(module).b, expected.factors(module).b)
    assert len(notes) == 2
    assert all("left out pissa_backup, pissa_init, the same adapter" in note for note in notes)


def test_a_store_beside_the_adapters_is_none(tmp_path, write_adapters):
    """Its table of adapters is called adapters.safetensors, as mlx-lm's weights are."""
    write_adapters(tmp_path, 2)
    compress(read_adapters([tmp_path]), tmp_path / "store", Settings(rank=2))
    assert list(tmp_path.rglob("adapters.safetensors"))
    assert read_adapters([tmp_path]).names == ["adapter-000", "adapter-001"]


# --- names ---


@pytest.mark.parametrize(
    ("paths", "expected"),
    [
        (["/in/a", "/in/b"], ["a", "b"]),
        (
            ["/sql/checkpoint-500", "/chat/checkpoint-500"],
            ["sql/checkpoint-500", "chat/checkpoint-500"],
        ),
        (["/x/sql/last", "/y/sql/last", "/y/chat/last"], ["x/sql/last", "y/sql/last", "chat/last"]),
        (["/a/x", "/b/x", "/b/y"], ["a/x", "b/x", "y"]),
        (["/x", "/a/x"], ["x", "a/x"]),
        (["/in/../out/x", "/in/x"], ["out/x", "in/x"]),
        (["/runs/sql/pissa_converted", "/runs/chat"], ["sql", "chat"]),
    ],
)
def test_names_are_as_much_of_the_path_as_tells_them_apart(paths, expected):
    assert names_of([Path(path) for path in paths]) == expected


def test_names_that_others_have_are_made_longer():
    folders = [Path("/in/a"), Path("/in/b")]
    assert names_of(folders, ["a"]) == ["in/a", "b"]
    assert names_of(folders, ["a", "in/a"]) == ["in/a", "b"]  # there is no more; refused later


def test_checkpoints_of_two_runs_are_two_adapters(tmp_path, peft_deltas, write_adapters):
    folders = []
    for i, run in enumerate(("sql", "chat")):
        (made,) = write_adapters(tmp_path / "made", 1, seed=i)
        folder = tmp_path / run / "checkpoint-500"
        folder.parent.mkdir()
        folders.append(made.rename(folder))
    for sources in (folders, folders[::-1], [tmp_path], [tmp_path / "chat", tmp_path / "sql"]):
        collection = read_adapters(sources)
        assert collection.names == ["chat/checkpoint-500", "sql/checkpoint-500"]
    for module in collection.shapes:
        found = collection.factors(module).subset(torch.tensor([1]))
        torch.testing.assert_close(
            found.b.double().T @ found.a.double(), peft_deltas(folders[0])[module]
        )


# --- NAME=PATH ---


def test_a_text_with_an_equals_sign_is_a_name_and_a_path_unless_it_is_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert split_name("sql=adapters/sql") == ("sql", "adapters/sql")
    assert split_name("a=b=c") == ("a", "b=c")
    assert split_name("org/x=y") == ("org/x", "y")
    for text in ("adapters", "=x", "x=", "https://hub/a?b=c", "hf://org/a=b"):
        assert split_name(text) == (None, text)
    (tmp_path / "lr=0.1").mkdir()
    assert split_name("lr=0.1") == (None, "lr=0.1")


def test_name_is_what_the_adapter_is_called(tmp_path, write_adapters, monkeypatch):
    first, second = write_adapters(tmp_path / "in", 2)
    monkeypatch.chdir(tmp_path)
    sources = ["acme/sql v2=in/adapter-000", "in"]
    collection = read_adapters(sources)
    assert collection.names == ["acme/sql v2", second.name], "one folder is one adapter"
    assert read_adapters(sources[::-1]).source_sha256 == collection.source_sha256
    # A name that was given is nobody else's.
    assert read_adapters([f"{second.name}={first}", second]).names == [
        second.name,
        f"in/{second.name}",
    ]
    # Two names of one folder, as with --lora-modules.
    assert read_adapters([f"x={first}", f"y={first}"]).names == ["x", "y"]
    monkeypatch.setenv("HOME", str(tmp_path))
    assert read_adapters(["x=~/in/adapter-000"]).names == ["x"]


def test_what_name_and_path_cannot_mean_is_refused(tmp_path, write_adapters):
    first, second = write_adapters(tmp_path / "in", 2)
    faults = refused(f"x={tmp_path}/in", f"y={tmp_path}/none", tmp_path / "nothing")
    assert len(faults) == 3
    assert f"found no {CONFIG} in it; x={tmp_path}/in names one adapter" in faults[0]
    assert "no such folder" in faults[1] and "read as NAME=PATH" in faults[1]
    assert "no such folder" in faults[2]
    (fault,) = refused(f"x={first}", f"x={second}")
    assert "the name 'x' is used by 2 adapters" in fault and "(NAME=PATH)" in fault
    (fault,) = refused(f"a\nb={first}")
    assert "control or undecodable characters" in fault


def test_an_adapter_of_the_hub_can_be_named(tmp_path, write_adapters, monkeypatch):
    folders = write_adapters(tmp_path / "cache", 2)
    many = [hub.Source(f, "acme/many", COMMIT, f"many/{f.name}") for f in folders]
    known = {"acme/sql": [hub.Source(folders[0], "acme/sql", COMMIT, "sql")], "acme/many": many}

    def fetch(sources, **_):
        return [source for text in sources for source in known[text]]

    monkeypatch.setattr(hub, "fetch", fetch)
    monkeypatch.chdir(tmp_path)
    collection = read_adapters(["ours=acme/sql"])
    assert collection.names == ["ours"]
    assert collection.sources == [f"acme/sql@{COMMIT}"]
    (fault,) = refused("ours=acme/many")
    assert "ours=acme/many: found 2 adapters (many/adapter-000, many/adapter-001" in fault


def test_what_peft_loads_is_what_was_saved(tmp_path):
    folder, model = several(tmp_path / "support")
    model.set_adapter("sql")
    torch.testing.assert_close(loaded(folder / "sql"), logits(model), rtol=0, atol=1e-6)
    assert isinstance(PeftModel.from_pretrained(base_model(), folder), PeftModel)
