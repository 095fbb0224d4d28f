"""Names that a server's flags take, and an adapter that has one of them."""

import argparse
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_jd.serve.names import flag_values, lora_modules, name_clash

STORE = ["a", "b", "c"]


@pytest.mark.parametrize(
    ("model", "args", "named"),
    [
        ("b", [], "--model"),
        ("/models/x", ["--served-model-name", "x", "c"], "--served-model-name"),
        ("/models/x", ["--served_model_name=c", "--port", "1"], "--served-model-name"),
        ("/models/x", ["--lora-modules", "z=/p", "a=/q"], "--lora-modules"),
        ("/models/x", ["--lora_modules", '{"name": "a", "path": "/q"}'], "--lora-modules"),
        ("/models/x", ["--port", "1", "--lora-modules=a=/q"], "--lora-modules"),
    ],
)
def test_a_name_used_twice_is_told_with_the_flag(model, args, named):
    assert named in name_clash(STORE, model, args)


@pytest.mark.parametrize(
    ("model", "args"),
    [
        ("/models/b", []),
        ("b", ["--served-model-name", "x"]),
        ("x", ["--lora-modules", "z=a", "--chat-template", "a=b"]),
        ("x", ["--lora-modules", "{", '["a"]', '{"name": ["a"]}']),
        ("x", ["--lora-modules", "a=/p", "--lora-modules", "z=/p"]),
        ("x", []),
    ],
)
def test_other_names_are_free(model, args):
    assert name_clash(STORE, model, args) is None


def test_names_and_paths_of_both_forms():
    args = ["--lora-modules", "x=/p=q", '{"name": "y", "path": "/r", "base_model_name": "m"}']
    assert list(lora_modules(args)) == [("x", "/p=q"), ("y", "/r")]


words = st.sampled_from(
    ["--some-flag", "--some_flag", "--other", "-v", "x", "y=z", "--some-flag=q"]
)


@given(st.lists(words, max_size=7))
def test_values_are_those_that_argparse_takes(args):
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--some-flag", "--some_flag", nargs="*", default=[])
    parser.add_argument("--other", nargs="*")
    parser.add_argument("-v", nargs="*")
    parser.add_argument("rest", nargs="*")
    known, _ = parser.parse_known_args(args)
    assert flag_values(args, "--some-flag") == known.some_flag


@pytest.mark.parametrize("item", ["a=/q", json.dumps({"name": "a", "path": "/q"})])
def test_items_are_read_as_vllm_reads_them(item):
    pytest.importorskip("vllm")
    from vllm.entrypoints.launchers.cli_args import LoRAParserAction

    parser = argparse.ArgumentParser()
    parser.add_argument("--lora-modules", nargs="*", action=LoRAParserAction)
    (theirs,) = parser.parse_args(["--lora-modules", item]).lora_modules
    assert list(lora_modules(["--lora-modules", item])) == [(theirs.name, theirs.path)]
