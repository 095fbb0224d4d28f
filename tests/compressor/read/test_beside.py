"""Chat templates and tokens that adapters bring along: said, since the server does not use them."""

import json

import pytest

from vllm_jd.compressor import read_adapters

TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"
OTHER = "{{ messages[0].content }}"


def notes_of(*folders, **options):
    notes = []
    read_adapters(folders, on_note=notes.append, **options)
    return notes


def write(folder, name, content):
    folder.mkdir(parents=True, exist_ok=True)
    text = content if isinstance(content, str) else json.dumps(content)
    (folder / name).write_text(text, encoding="utf-8")


@pytest.fixture
def base(tmp_path):
    folder = tmp_path / "tiny-llama"
    write(folder, "config.json", {"model_type": "llama"})
    write(folder, "chat_template.jinja", TEMPLATE + "\n")
    vocabulary = {"<s>": 0, "a": 1, "<known>": 2}
    added = [{"id": 0, "content": "<s>"}]
    write(folder, "tokenizer.json", {"added_tokens": added, "model": {"vocab": vocabulary}})
    return folder


FORMS = {
    "a file": ("chat_template.jinja", OTHER),
    "the tokenizer's config": ("tokenizer_config.json", {"chat_template": OTHER}),
    "several, by name": (
        "tokenizer_config.json",
        {"chat_template": [{"name": "default", "template": OTHER}]},
    ),
    "a processor's": ("chat_template.json", {"chat_template": OTHER}),
}


@pytest.mark.parametrize("case", FORMS)
def test_a_chat_template_of_its_own_is_said_with_what_the_server_does(
    tmp_path, write_adapters, base, case
):
    first, second, third = write_adapters(tmp_path / "in", 3)
    write(first, *FORMS[case])
    write(second, "chat_template.jinja", TEMPLATE)  # the base model's: nothing to say
    (note,) = notes_of(first, second, third, base_folder=base)
    assert note.startswith(f"{first.name}: a chat template of its own; the server renders every")
    assert "--chat-template FILE" in note and "--trust-request-chat-template" in note
    (note,) = notes_of(first, second, third)
    assert note.startswith(f"{first.name}, {second.name}: a chat template beside it, not compared")
    assert "--base-model FOLDER" in note


def test_the_base_models_folder_may_be_what_the_adapters_name(tmp_path, write_adapters, base):
    (folder,) = write_adapters(tmp_path / "in", 1, config={"base": str(base)})
    write(folder, "chat_template.jinja", TEMPLATE)
    assert notes_of(folder) == []


ADDED = {
    "added_tokens.json": {"<tool>": 3, "<s>": 0},
    "tokenizer_config.json": {
        "added_tokens_decoder": {"0": {"content": "<s>"}, "3": {"content": "<tool>"}}
    },
    "tokenizer.json": {
        "version": "1.0",
        "added_tokens": [{"id": 2, "content": "<known>"}, {"id": 3, "content": "<tool>"}],
        "model": {"vocab": {}},
    },
}


@pytest.mark.parametrize("name", ADDED)
def test_tokens_that_the_base_model_has_not_are_said(tmp_path, write_adapters, base, name):
    first, second = write_adapters(tmp_path / "in", 2)
    for folder in (first, second):
        write(folder, name, ADDED[name])
    (note,) = notes_of(first, second, base_folder=base)
    assert note.startswith(f"{first.name}, {second.name}: tokens that the base model's tokenizer")
    assert "('<tool>')" in note and "takes these tokens apart" in note
    assert notes_of(first, second) == [], "without the base model there is nothing to compare"


@pytest.mark.parametrize("text", ["", "[]", "null", "{", '{"added_tokens": {', '"added_tokens"[1'])
def test_files_of_nonsense_are_no_fault_of_the_adapter(tmp_path, write_adapters, base, text):
    (folder,) = write_adapters(tmp_path / "in", 1)
    for name in ("tokenizer.json", "tokenizer_config.json", "added_tokens.json"):
        write(folder, name, text)
    write(folder, "chat_template.json", text)
    assert notes_of(folder, base_folder=base) == []
