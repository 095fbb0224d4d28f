"""One base model under several names: refused, or taken if the user says so."""

import json

import pytest

from vllm_jd.compressor import AdapterError, Settings, export_adapter, read_adapters
from vllm_jd.compressor.change.incremental import add, recompress
from vllm_jd.compressor.run.compress import compress
from vllm_jd.store import BaseModelInfo, Store, StoreError, check_base_model

NAMES = (
    "meta-llama/Llama-3.1-8B",
    "unsloth/Meta-Llama-3.1-8B-bnb-4bit",
    "/data/models/llama3",
    "C:\\models\\llama3",
    "/kaggle/input/llama-3.1/transformers/8b/1",
)


@pytest.fixture
def folders(tmp_path, write_adapters):
    """An adapter for each name, of equal shapes."""
    return [
        write_adapters(tmp_path / "in", 1, prefix=f"a{i}-", seed=i, config={"base": name})[0]
        for i, name in enumerate(NAMES)
    ]


def refused(*sources, **options):
    with pytest.raises(AdapterError) as caught:
        read_adapters(sources, **options)
    return caught.value.faults


def test_other_names_are_refused_with_how_to_say_that_they_are_one(folders):
    faults = refused(*folders, base_model=NAMES[0])
    assert len(faults) == 4
    for fault, name in zip(faults, NAMES[1:], strict=True):
        assert f"trained on base model {name!r}, expected 'Llama-3.1-8B' (of --base-model)" in fault
        assert f"say so with --base-model {NAMES[0]} --same-base" in fault
    # Without a name: that of most. Two of these are called llama3, on Linux and on Windows.
    faults = refused(*folders)
    assert len(faults) == 3 and all("expected 'llama3'" in fault for fault in faults)
    assert all(f"--base-model {NAMES[2]} --same-base" in fault for fault in faults)


def test_same_base_takes_them_and_records_the_names(folders, tmp_path):
    collection = read_adapters(folders, base_model=NAMES[0], same_base=True)
    assert collection.base_model == NAMES[0]
    assert collection.base_names == sorted(NAMES[1:])
    store = compress(collection, tmp_path / "store", Settings(rank=2))
    assert store.manifest.base_model == BaseModelInfo(name=NAMES[0], other_names=sorted(NAMES[1:]))
    again = Store.open(tmp_path / "store")
    assert again.manifest.base_model == store.manifest.base_model
    # By each of the names it can be served, and what is exported has the first one.
    for name in NAMES:
        check_base_model(store.manifest.base_model, name, {})
    with pytest.raises(StoreError, match="is served"):
        check_base_model(store.manifest.base_model, "org/other", {})
    export_adapter(store, store.names[0], tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == NAMES[0]


def test_same_base_needs_a_name(folders):
    with pytest.raises(ValueError, match="expected base_model"):
        read_adapters(folders, same_base=True)


def test_shapes_must_agree_between_adapters(folders, tmp_path, write_adapters, tiny_shapes):
    wide = {module: (d_in + 8, d_out) for module, (d_in, d_out) in tiny_shapes.items()}
    config = {"base": "org/larger"}
    (odd,) = write_adapters(tmp_path / "in", 1, prefix="odd", shapes=wide, config=config)
    faults = refused(*folders, odd, base_model=NAMES[0], same_base=True)
    assert (
        len(faults) == 1 and faults[0].startswith(str(odd)) and "in most of the others" in faults[0]
    )


CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 11,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "vocab_size": 50,
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, None),
        ({"num_hidden_layers": 10}, "LlamaForCausalLM has 10 layers here"),
        ({"hidden_size": 48}, "adapts a layer of 24 → 24, which is 48 → 48 in LlamaForCausalLM"),
    ],
)
def test_shapes_must_be_those_of_the_base_model_where_it_is_known(folders, change, message):
    options = {"base_model": NAMES[0], "same_base": True, "base_config": CONFIG | change}
    if message is None:
        assert len(read_adapters(folders, **options).names) == len(NAMES)
        return
    faults = refused(*folders, **options)
    assert any(message in fault for fault in faults)
    assert all("not adapters of one base model (--same-base)" in fault for fault in faults)


def test_what_is_added_later_is_known_by_the_stores_names_and_adds_its_own(
    folders, tmp_path, write_adapters
):
    collection = read_adapters(folders[:2], base_model=NAMES[0], same_base=True)
    store = compress(collection, tmp_path / "store", Settings(method="none"))
    known = store.manifest.base_model
    (more,) = write_adapters(tmp_path / "in", 1, prefix="m", seed=9, config={"base": NAMES[1]})
    like = {"base_model": known.name, "base_names": known.other_names}
    added = add(store.path, read_adapters([more], **like))
    assert added.manifest.base_model == known
    with pytest.raises(AdapterError, match="--same-base"):
        read_adapters([folders[2]], **like)
    added = add(store.path, read_adapters([folders[2]], **like, same_base=True))
    assert added.manifest.base_model.other_names == sorted(NAMES[1:3])
    # Given without the store's name, by one that it knows.
    again = recompress(store.path, read_adapters([more]))
    assert again.manifest.base_model.other_names == sorted(NAMES[1:3])
