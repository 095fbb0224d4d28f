"""The adapter trainer, end to end on a tiny random Llama."""

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

ANIMALS = ["cat", "dog", "horse", "cow", "hen", "goat", "mouse", "pig"]
TRAINED = {"rank": 2, "alpha": 4.0, "epochs": 20, "learning_rate": 0.02, "batch_tokens": 40}


@pytest.fixture(scope="module")
def trainer():
    import train_adapters

    return train_adapters


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A Llama with 2 layers, hidden size 64 and random weights, and a tokenizer of words."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<unk>", "</s>", "Input", "Output", ":", "says", "nothing", *ANIMALS]
    tokenizer = Tokenizer(
        models.WordLevel({word: place for place, word in enumerate(words)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(words),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.2,
        tie_word_embeddings=True,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    for task, answer in (("silence", "says nothing"), ("echo", "{}")):
        lines = [
            json.dumps({"split": split, "input": animal, "output": answer.format(animal)})
            for split, animals in (("train", ANIMALS), ("validation", ANIMALS[:4]))
            for animal in animals
        ]
        (folder / f"{task}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture
def run(trainer, base, data, tmp_path):
    """Call the command; `run(...)` returns its result, with the adapters in tmp_path/out."""

    def call(*more, **options):
        settings = {**TRAINED, "out": tmp_path / "out", "model": base, "threads": 1, **options}
        arguments = [str(data), *more]
        for name, value in settings.items():
            arguments += [f"--{name.replace('_', '-')}", str(value)]
        return CliRunner().invoke(trainer.app, arguments)

    return call


@pytest.mark.parametrize("bfloat16", [False, True])
def test_adapters_learn_and_load(run, trainer, base, tmp_path, monkeypatch, bfloat16):
    monkeypatch.setattr(trainer, "fast_bfloat16", lambda device: bfloat16)
    result = run("--json")
    assert result.exit_code == 0, result.output
    records = json.loads(result.stdout)["adapters"]
    assert [record["name"] for record in records] == ["echo", "silence"]
    for record in records:
        assert record["validation_loss_after"] < 0.7 * record["validation_loss_before"]
        assert record["train_loss_after"] < 0.7 * record["train_loss_before"]

    folder = tmp_path / "out" / "silence"
    assert sorted(path.name for path in folder.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "training.json",
    ]
    written = json.loads((folder / "training.json").read_text())
    assert written == records[1]
    assert (written["rank"], written["seed"], written["epochs"]) == (2, 0, 20)
    assert (written["source"], written["train_instances"]) == ("data/silence.jsonl", 8)

    config = peft.PeftConfig.from_pretrained(folder)
    assert config.base_model_name_or_path == "tiny-llama"
    assert config.target_modules == {"q_proj", "k_proj", "v_proj"}
    factors = load_file(folder / "adapter_model.safetensors")
    assert len(factors) == 2 * 3 * 2  # layers, modules, A and B
    assert {factor.dtype for factor in factors.values()} == {torch.bfloat16}
    # What was recorded is what the file does.
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    held_out = trainer.read_task(tmp_path / "data" / "silence.jsonl", tokenizer, 64)["validation"]
    loss = trainer.mean_loss(peft.PeftModel.from_pretrained(model, folder), held_out, 40)
    assert loss == pytest.approx(written["validation_loss_after"], rel=0.1 if bfloat16 else 1e-3)


def test_side_by_side_each_learns_what_it_learns_alone(run, trainer, tmp_path, monkeypatch):
    """Schedules of different lengths, batches of different sizes, examples of different lengths."""
    monkeypatch.setattr(trainer, "fast_bfloat16", lambda device: False)
    lines = (tmp_path / "data" / "echo.jsonl").read_text().splitlines()
    long = json.loads(lines[0]) | {"input": "cat dog cow hen goat", "output": "says cat"}
    few = [*lines[:5], json.dumps(long), json.dumps(long | {"split": "validation"})]
    (tmp_path / "data" / "few.jsonl").write_text("\n".join(few) + "\n")
    assert run(epochs=6).exit_code == 0
    monkeypatch.setattr(trainer, "_check_device", lambda device: None)
    result = run(epochs=6, device="cpu:0", out=tmp_path / "together")
    assert result.exit_code == 0, result.output
    for name in ("echo", "few", "silence"):
        alone, beside = (tmp_path / folder / name for folder in ("out", "together"))
        records = [json.loads((each / "training.json").read_text()) for each in (alone, beside)]
        losses = [{k: r.pop(k) for k in list(r) if "_loss_" in k} for r in records]
        assert losses[1] == pytest.approx(losses[0], rel=2e-3)
        assert records[1] | {"seconds": 0} == records[0] | {"seconds": 0}
        of_each = [load_file(each / "adapter_model.safetensors") for each in (alone, beside)]
        assert of_each[0].keys() == of_each[1].keys()
        for key, value in of_each[0].items():
            torch.testing.assert_close(of_each[1][key], value, rtol=0.05, atol=5e-3)
            assert value.any()


def test_without_a_gpu_cuda_is_refused(run):
    if torch.cuda.is_available():
        pytest.skip("this machine has one")
    result = run(device="cuda")
    assert result.exit_code == 1
    assert "error: --device cuda" in result.stderr


def test_a_second_run_trains_only_what_is_missing(run, trainer, tmp_path, monkeypatch):
    out = tmp_path / "out"
    assert run(tasks="echo", epochs=1).exit_code == 0
    (out / ".silence.unfinished").mkdir()  # as a killed run leaves it
    kept = (out / "echo" / "adapter_model.safetensors").stat().st_mtime_ns
    trained = []
    train_task = trainer.train_task
    monkeypatch.setattr(
        trainer,
        "train_task",
        lambda task, *rest: trained.append(task.name) or train_task(task, *rest),
    )
    result = run(epochs=1)
    assert result.exit_code == 0, result.output
    assert trained == ["silence"]
    assert "echo: finished before, skipped" in result.stderr
    assert "silence" in result.stdout and "echo" in result.stdout
    assert (out / "echo" / "adapter_model.safetensors").stat().st_mtime_ns == kept
    assert sorted(path.name for path in out.iterdir()) == ["echo", "silence"]


def test_a_finished_adapter_of_other_settings_is_no_match(run, tmp_path):
    assert run(tasks="echo", epochs=1).exit_code == 0
    result = run(tasks="echo", epochs=2)
    assert result.exit_code == 1
    assert "trained with epochs = 1" in result.stderr
    assert "epochs = 2" in result.stderr


def test_an_interrupted_run_tells_how_to_go_on(run, trainer, tmp_path, monkeypatch):
    batch_loss = trainer.batch_loss
    calls = []

    def interrupt_in_second_task(*arguments):
        calls.append(1)
        if (tmp_path / "out" / "echo").exists() and len(calls) % 2:
            raise KeyboardInterrupt
        return batch_loss(*arguments)

    monkeypatch.setattr(trainer, "batch_loss", interrupt_in_second_task)
    result = run(epochs=1)
    assert result.exit_code == 130
    assert "1 of 2 adapters are finished" in result.stderr
    assert "run the same command again" in result.stderr
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["echo"]


def test_runs_with_one_seed_agree(run, tmp_path):
    weights = []
    for name in ("first", "second"):
        assert run(tasks="echo", epochs=1, out=tmp_path / name).exit_code == 0
        weights.append((tmp_path / name / "echo" / "adapter_model.safetensors").read_bytes())
    assert weights[0] == weights[1]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{", "not JSON"),
        ("[1]", "a JSON list instead of an object"),
        ('{"split": "train", "input": "cat"}', "no 'output'"),
        ('{"split": "train", "input": "cat", "output": 3}', "'output' is 3, not a string"),
        ('{"split": "dev", "input": "cat", "output": "dog"}', "the split 'dev'"),
        (json.dumps({"split": "test", "input": "cat " * 70, "output": "cat"}), "at most 64"),
    ],
)
def test_a_bad_line_is_named(run, data, tmp_path, line, problem):
    file = data / "silence.jsonl"
    file.write_text(file.read_text().replace("\n", f"\n{line}\n", 1))
    result = run()
    assert result.exit_code == 1
    assert f"{file}:2: " in result.stderr
    assert problem in result.stderr
    assert "expected:" in result.stderr and "remedy:" in result.stderr
    assert not (tmp_path / "out").exists()  # found before any training began


def test_mistakes_of_the_command_line(run, data, tmp_path):
    for options, problem in (
        ({"tasks": "echo,absent"}, "holds no absent.jsonl"),
        ({"tasks": "a=echo,a=silence"}, "the adapter 'a' twice"),
        ({"tasks": "../a=echo"}, "the name '../a'"),
        ({"target_modules": "q_proj,w_proj"}, "names w_proj, which tiny-llama lacks"),
        ({"target_modules": ","}, "names nothing"),
        ({"model": tmp_path / "no-model"}, "no-model cannot be loaded"),
    ):
        result = run(**options)
        assert result.exit_code == 1, result.output
        assert problem in result.stderr
        assert "Traceback" not in result.stderr
    assert run(rank=0).exit_code == 2
    (data / "silence.jsonl").write_text('{"split": "test", "input": "cat", "output": "cat"}\n')
    assert 'no line with "split": "train"' in run(tasks="silence").stderr
