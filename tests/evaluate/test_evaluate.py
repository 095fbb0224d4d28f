"""`vllm-jd evaluate` with an engine that knows its answers: figures against plain loops, what is
asked again, and what is told of mistakes."""

import json
import shutil
import statistics
import sys

import pytest

from tests.cli.test_cli import fail, run, succeed
from tests.evaluate.conftest import NAMES, RUINED, items, said, write_items
from vllm_jd.compressor import Settings, read_adapters
from vllm_jd.compressor.run.compress import compress
from vllm_jd.evaluate import items as choosing
from vllm_jd.evaluate import run as running
from vllm_jd.store import read_base_model


@pytest.fixture
def arguments(collection, tokens, engine):
    """Of the command, for the collection."""
    store, adapters, data = collection
    return ["evaluate", store, "--adapters", adapters, "--data", data, "--base-model", tokens]


def common(a, b):
    """Length of the longest common subsequence."""
    best = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            best[i + 1][j + 1] = best[i][j] + 1 if x == y else max(best[i][j + 1], best[i + 1][j])
    return best[-1][-1]


def rouge(expected, answer, overlap):
    a, b = expected.split(), answer.split()
    both = overlap(a, b)
    return 2 * both / (len(a) + len(b)) if both else 0.0


def reference(name, way, count):
    """Of an adapter's items, in float64: the mean of each figure."""
    figures = {"rouge_l": [], "rouge_1": [], "exact": [], "loss": [], "agreement": []}
    for line in items(name, count):
        wanted = line["completion"].strip()
        text, loss = said(way, name, wanted)
        other, _ = said("lora", name, wanted)
        figures["rouge_l"].append(rouge(wanted, text, common))
        figures["rouge_1"].append(rouge(wanted, text, lambda a, b: len(set(a) & set(b))))
        figures["exact"].append(float(text.strip() == wanted))
        figures["loss"].append(loss)
        figures["agreement"].append(float(text.strip() == other.strip()))
    return {metric: statistics.mean(values) for metric, values in figures.items()}


def test_figures_are_those_of_plain_loops(arguments):
    found = json.loads(succeed(*arguments, "--json").stdout)
    expected = {
        way: [reference(name, way, 4 + i) for i, name in enumerate(NAMES[:3])]
        for way in running.WAYS
    }
    assert [each["name"] for each in found["adapters"]] == NAMES[:3]
    for way, each in expected.items():
        for one, theirs in zip(found["adapters"], each, strict=True):
            assert one[way] == pytest.approx(theirs)
        for metric in ("rouge_l", "rouge_1", "exact", "loss", "agreement"):
            mean = statistics.mean(one[metric] for one in each)
            value, low, high = found["ways"][way]["mean"][metric]
            assert value == pytest.approx(mean) and low <= value <= high
        for metric in ("rouge_l", "rouge_1", "exact"):
            theirs = statistics.mean(one[metric] for one in expected["lora"])
            mean = statistics.mean(one[metric] for one in each)
            assert found["ways"][way]["of_lora"][metric][0] == pytest.approx(mean / theirs)
    pairs = list(zip(expected["store"], expected["lora"], strict=True))
    rises = [ours["loss"] - theirs["loss"] for ours, theirs in pairs]
    assert found["ways"]["store"]["loss_added"][0] == pytest.approx(statistics.mean(rises))
    assert [each["loss_added"] for each in found["adapters"]] == pytest.approx(rises)
    shares = [ours["rouge_l"] / theirs["rouge_l"] for ours, theirs in pairs]
    assert [each["rouge_l_kept"] for each in found["adapters"]] == pytest.approx(shares)
    assert found["items"] == 4 + 5 + 6
    assert found["worst"][0] == RUINED
    assert "answers" not in found
    assert f"{RUINED} (+0.500)" in " ".join(found["advice"])
    kept = found["ways"]["store"]["of_lora"]["rouge_l"][0]
    assert f"keeps {kept:.2f} [" in found["headline"]


def test_the_terminal_says_the_same(arguments):
    result = succeed(*arguments)
    found = json.loads(succeed(*arguments, "--json").stdout)
    text = " ".join(result.stdout.split())
    assert found["headline"] in text
    assert all(sentence in text for sentence in found["advice"])
    table, worst, *_ = result.stdout.split("lost most")
    means = {way: each["mean"] for way, each in found["ways"].items()}
    rouge_row = next(line for line in table.splitlines() if line.strip().startswith("Rouge-L"))
    assert rouge_row.split()[1:] == [
        f"{means[way]['rouge_l'][0]:.3f}" for way in ("base", "lora", "store")
    ]
    rows = [line.split() for line in worst.splitlines() if "adapter-" in line]
    assert rows[0][:3] == [RUINED, "6", "+0.500"]


def test_each_is_asked_as_what_it_is(arguments, engine, collection):
    """The base model without an adapter, the adapter as it is by its folder and digest."""
    from vllm_jd.plugin.api.requests import upload_digest

    succeed(*arguments, "--dtype", "float32", "--max-new-tokens", 5)
    assert len(engine.asked) == 3 * 15
    assert sum(question.adapter is None for question in engine.asked) == 15
    by_folder = {q.adapter: (q.folder, q.digest) for q in engine.asked if q.folder}
    assert by_folder == {
        name: (str(collection[1] / name), upload_digest(collection[1] / name)) for name in NAMES[:3]
    }
    (settings,) = engine.settings
    assert settings.flags == ["--dtype", "float32"]
    assert settings.max_lora_rank == 8  # vLLM takes 1, 8, 16 …; theirs is 4
    longest = max(len(q.prompt) + len(q.completion) + 1 for q in engine.asked)
    assert settings.max_model_len == max(longest, 4 + 5)


# --- going on ---


def test_what_was_answered_is_not_asked_again(arguments, engine, collection, tmp_path, tokens):
    store, adapters, data = collection
    out = tmp_path / "out"

    def asked(*options):
        before = len(engine.asked)
        succeed(*arguments, "--out", out, *options)
        return [
            "base" if q.adapter is None else "lora" if q.folder else "store"
            for q in engine.asked[before:]
        ]

    assert sorted(set(asked())) == ["base", "lora", "store"]
    first = json.loads((out / "results.json").read_text())
    engines = len(engine.settings)
    assert asked() == [] and len(engine.settings) == engines
    again = json.loads((out / "results.json").read_text())
    assert first == again
    # An item more of one adapter.
    write_items(data / f"{NAMES[0]}.jsonl", items(NAMES[0], 5))
    assert asked() == ["base", "lora", "store"]
    # Other numbers in the store.
    compress(
        read_adapters([adapters]), store, Settings(rank=2), base_model=read_base_model(tokens)
    ).close()
    assert asked() == ["store"] * (5 + 5 + 6)
    # Another adapter as it is.
    config = json.loads((adapters / NAMES[1] / "adapter_config.json").read_text())
    (adapters / NAMES[1] / "adapter_config.json").write_text(json.dumps(config | {"x": 1}))
    assert asked() == ["lora"] * 5
    # Other options.
    assert len(asked("--max-new-tokens", 3)) == 3 * 16
    assert len(asked("--dtype", "float32")) == 3 * 16
    assert asked("--adapter", NAMES[1]) == []


def test_a_stopped_one_goes_on(arguments, engine, tmp_path, monkeypatch):
    monkeypatch.setattr(running, "_AT_ONCE", 10)
    out = tmp_path / "out"
    engine.stops_after = 2
    result = run(*arguments, "--out", out)
    assert result.exit_code == 130
    assert "the same command goes on from here" in result.stderr
    assert len(engine.asked) == 20
    # What a killed writer leaves of a line.
    with (out / "answers.jsonl").open("a") as file:
        file.write('{"key": "12')
    engine.stops_after = None
    succeed(*arguments, "--out", out)
    assert len(engine.asked) == 45
    expected = json.loads(succeed(*arguments, "--json").stdout)
    found = json.loads((out / "results.json").read_text())
    assert found["adapters"] == expected["adapters"]
    succeed(*arguments, "--out", out)
    assert len(engine.asked) == 90  # those of the one without --out


# --- which items ---


def test_items_are_drawn_by_the_seed(arguments, engine):
    def asked(seed):
        before = len(engine.asked)
        succeed(*arguments, "--items", 2, "--seed", seed)
        return [tuple(q.prompt + q.completion) for q in engine.asked[before:] if q.folder]

    drawn = [asked(seed) for seed in (0, 0, 1, 2, 3)]
    assert {len(each) for each in drawn} == {3 * 2}
    assert drawn[0] == drawn[1]
    assert len({tuple(each) for each in drawn}) > 1


def test_items_that_are_too_long_are_left_out_and_counted(arguments, engine, collection):
    data = collection[2]
    long = {"prompt": "cat says : " * 42, "completion": " cat"}  # 126 tokens, and room for 128
    write_items(data / f"{NAMES[1]}.jsonl", [long, *items(NAMES[1], 3), long])
    result = succeed(*arguments, "--json", "--max-new-tokens", 8)
    assert "longer than the model's 128 tokens with an answer of 8: 2\n" in result.stderr
    found = json.loads(result.stdout)
    assert found["too_long"] == 2
    assert [each["items"] for each in found["adapters"]] == [4, 3, 6]
    assert max(len(q.prompt) for q in engine.asked) < 126
    # By the option: prompts of 4 tokens and 7 of an answer do not fit into 9.
    text = fail(*arguments, "--max-new-tokens", 7, "--max-model-len", 9)
    assert "no item fits into 9 tokens" in text
    write_items(data / f"{NAMES[1]}.jsonl", [long])
    result = succeed(*arguments, "--json", "--max-new-tokens", 8)
    assert f"left out {NAMES[1]}: none of its items fits" in result.stderr
    assert [each["name"] for each in json.loads(result.stdout)["adapters"]] == [NAMES[0], RUINED]


def test_messages_are_asked_as_the_chat_template_says(arguments, engine, collection, tokens):
    line = {
        "messages": [
            {"role": "user", "content": "cat says"},
            {"role": "assistant", "content": "cat dog"},
        ]
    }
    write_items(collection[2] / f"{NAMES[0]}.jsonl", [line])
    assert "adapter-000.jsonl:1" in fail(*arguments)  # there is no chat template
    template = "{% for m in messages %}{{ m.content }} : {% endfor %}"
    folder = shutil.copytree(tokens, collection[2].parent / "chat" / "tiny-llama")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": template}))
    arguments[-1] = folder
    result = succeed(*arguments, "--adapter", NAMES[0], "--json")
    assert json.loads(result.stdout)["items"] == 1
    assert engine.tokenizer.decode(engine.asked[0].asked) == "cat says :"
    assert engine.tokenizer.decode(engine.asked[0].completion) == "cat dog :"


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"r": 16}, 16),
        ({"r": 17}, 32),
        ({"r": 4, "rank_pattern": {"q_proj": 40, "k_proj": 2}}, 64),
        ({"r": "many"}, 1),
    ],
)
def test_the_highest_rank_that_an_engine_needs(tmp_path, config, expected):
    whole = {"peft_type": "LORA", "lora_alpha": 8, "target_modules": ["q_proj"]} | config
    (tmp_path / "adapter_config.json").write_text(json.dumps(whole))
    assert choosing.highest_rank([tmp_path, tmp_path / "elsewhere"]) == expected


# --- what is left out, and mistakes ---


def test_files_of_nobody_and_adapters_without_a_folder_are_told(arguments, engine, collection):
    _, adapters, data = collection
    write_items(data / "nobody.jsonl", items(NAMES[0]))
    shutil.rmtree(adapters / NAMES[1])
    result = succeed(*arguments, "--json")
    assert "left out what no adapter of" in result.stderr and "nobody.jsonl" in result.stderr
    assert f"left out {NAMES[1]}: found items, but no folder" in result.stderr
    assert [each["name"] for each in json.loads(result.stdout)["adapters"]] == [NAMES[0], RUINED]
    # It was asked for.
    text = fail(*arguments, "--adapter", NAMES[1])
    assert f"found no folder of {NAMES[1]}" in text


def test_other_files_than_the_store_was_made_from_are_told(arguments, collection):
    config = collection[1] / NAMES[0] / "adapter_config.json"
    config.write_text(config.read_text() + " ")
    result = succeed(*arguments)
    assert f"{NAMES[0]}: the files in --adapters are not those" in " ".join(result.stderr.split())


def test_an_adapter_that_cannot_be_served_is_left_out(arguments, engine):
    engine.fails = {NAMES[0]: "found NaN"}
    result = succeed(*arguments, "--json")
    assert f"left out {NAMES[0]}: it cannot be served: found NaN" in result.stderr
    found = json.loads(result.stdout)
    assert found["failed"] == {NAMES[0]: "found NaN"}
    assert [each["name"] for each in found["adapters"]] == NAMES[1:3]
    engine.fails = dict.fromkeys(NAMES, "found NaN")
    assert "none of the adapters could be served" in fail(*arguments)


def damaged(kind, arguments, collection):
    """Make a mistake; returns the arguments."""
    store, adapters, data = collection
    if kind == "no data":
        for file in data.iterdir():
            file.rename(data / f"x{file.name}")
    elif kind == "malformed":
        file = data / f"{NAMES[1]}.jsonl"
        file.write_text(file.read_text() + '{"prompt": "a"}\n')
    elif kind == "empty":
        (data / f"{NAMES[1]}.jsonl").write_text("\n")
    elif kind == "no folders":
        shutil.rmtree(adapters)
        adapters.mkdir()
    elif kind == "other names":
        for folder in adapters.iterdir():
            folder.rename(adapters / f"x{folder.name}")
    elif kind == "no store":
        arguments[1] = store / "none"
    elif kind == "no model":
        arguments[-1] = store / "none"
    elif kind == "other model":
        folder = shutil.copytree(arguments[-1], store.parent / "other" / "tiny-llama")
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"hidden_size": 32}))
        arguments[-1] = folder
    elif kind == "other name":
        arguments[-1] = shutil.copytree(arguments[-1], store.parent / "other-llama")
    elif kind == "a file for --out":
        (store.parent / "file").write_text("")
        arguments += ["--out", store.parent / "file"]
    return arguments


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("no data", "expected at least one named by an adapter"),
        ("malformed", "adapter-001.jsonl:6: expected an object with prompt and completion"),
        ("empty", "adapter-001.jsonl: found no examples"),
        ("no folders", "--adapters: "),
        ("other names", "found no folder of adapter-000, adapter-001, adapter-002 among 4"),
        ("no store", "none"),
        ("no model", "no model configuration found"),
        ("other model", "hidden_size"),
        ("other name", "--store-base-model"),
        ("a file for --out", "expected a folder to write into"),
    ],
)
def test_mistakes_end_with_a_message(arguments, engine, collection, kind, expected):
    assert expected in fail(*damaged(kind, arguments, collection))
    assert engine.asked == []


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["more"], "found 'more' without an option"),
        (["--adapter", "adapter-00"], "no adapter 'adapter-00' among its 4; did you mean"),
        (["--data", "nowhere"], "nowhere: no such folder"),
        (["--items", "0"], "Invalid value for '--items'"),
    ],
)
def test_wrong_usage(arguments, engine, options, expected):
    assert expected in fail(*arguments, *options, code=2)
    assert engine.asked == []


def test_flags_that_contradict_a_store(arguments):
    assert "--scheduler-cls cannot be used here" in fail(*arguments, "--scheduler-cls", "x")


def test_what_is_not_installed_is_named(arguments, tmp_path, monkeypatch):
    out = tmp_path / "out"
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "pip install 'vllm-jd[evaluate]'" in fail(*arguments, "--out", out)
    assert not out.exists()
    for name in [name for name in sys.modules if name.split(".")[0] == "rouge_score"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "rouge_score", None)
    assert "pip install 'vllm-jd[evaluate]'" in fail(*arguments)


@pytest.mark.parametrize("method", ["ties", "none", "svd"])
def test_other_methods(arguments, collection, tokens, method):
    store, adapters, _ = collection
    settings = Settings(method).adapted(rank=2)
    compress(read_adapters([adapters]), store, settings, base_model=read_base_model(tokens)).close()
    found = json.loads(succeed(*arguments, "--json").stdout)
    assert found["store"]["method"] == method
    assert found["adapters"][0]["error"] == pytest.approx(0, abs=1e-4) or method != "none"
