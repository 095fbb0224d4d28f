"""Examples of a task, as a file has them: their form, and which of their tokens are said."""

import json

import pytest
from jinja2 import TemplateError

from vllm_jd.compressor.choose.examples import Example, ExampleError, read_examples, read_lines

VOCABULARY = 32


class Tokenizer:
    """A token for each letter."""

    def __call__(self, text, **_):
        return {"input_ids": [ord(letter) % VOCABULARY for letter in text]}

    def apply_chat_template(self, messages, *, add_generation_prompt, **_):
        if any(m["role"] == "nobody" for m in messages):
            raise TemplateError("no such role")
        text = "".join(f"{m['role'][0]}{m['content']}." for m in messages)
        return text + ("a" if add_generation_prompt else "")


def write(tmp_path, *lines):
    file = tmp_path / "task.jsonl"
    file.write_text(
        "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    )
    return file


def read(tmp_path, *lines):
    return read_examples(write(tmp_path, *lines), Tokenizer())


MESSAGES = [
    {"role": "system", "content": "s"},
    {"role": "user", "content": "b"},
    {"role": "assistant", "content": "c"},
]


def test_prompts_and_completions(tmp_path):
    (found,) = read(tmp_path, {"prompt": "ab", "completion": "cd"}, "")
    assert found == Example([1, 2], [3, 4])


def test_messages(tmp_path):
    (found,) = read(tmp_path, {"messages": MESSAGES[1:]})
    assert found == Example([21, 2, 14, 1], [3, 14])


def test_what_people_read(tmp_path):
    first, second = read_lines(
        write(tmp_path, {"prompt": "ab", "completion": "cd"}, "", {"messages": MESSAGES})
    )
    assert (first.asked, first.expected) == ("ab", "cd")
    assert (second.asked, second.expected) == ("system: s\nuser: b", "c")
    assert second.where.endswith("task.jsonl:3")


def test_long_ones_are_cut_only_if_asked_to(tmp_path):
    (line,) = read_lines(write(tmp_path, {"prompt": "ab", "completion": "cd" * 400}))
    assert len(line.encoded(Tokenizer()).completion) == 800
    assert line.encoded(Tokenizer(), 3) == Example([1, 2], [3])
    with pytest.raises(ExampleError, match=r"task\.jsonl:1: found no completion within 2 tokens"):
        line.encoded(Tokenizer(), 2)


@pytest.mark.parametrize(
    ("line", "match"),
    [
        ("{", "JSON"),
        ('{"prompt": "\\ud800", "completion": "a"}', "JSON"),
        ({"prompt": "a"}, "prompt and completion"),
        ([1], "prompt and completion"),
        ({"messages": [{"role": "user", "content": "a"}]}, "assistant"),
        ({"messages": ["a", MESSAGES[-1]]}, "assistant"),
        ({"messages": [{"role": "nobody", "content": "a"}, MESSAGES[-1]]}, "chat template"),
        ({"messages": [{"content": "a"}, MESSAGES[-1]]}, "chat template"),
        ({"prompt": "a", "completion": ""}, "neither empty"),
        ({"prompt": "", "completion": "a"}, "neither empty"),
    ],
)
def test_mistakes_name_the_line(tmp_path, line, match):
    with pytest.raises(ExampleError, match=rf"task\.jsonl:2.*{match}"):
        read(tmp_path, {"prompt": "a", "completion": "b"}, line)


def test_no_file_and_no_examples(tmp_path):
    with pytest.raises(ExampleError, match="cannot be read"):
        read_examples(tmp_path / "none.jsonl", Tokenizer())
    with pytest.raises(ExampleError, match="no examples"):
        read(tmp_path, "")
