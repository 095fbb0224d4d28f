"""Second moments of a real (tiny) Llama's inputs, against float64 sums over its own activations."""

import json
import pickle
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from vllm_jd.compressor.calibrate import moments as subject
from vllm_jd.compressor.calibrate.calibration import Metric
from vllm_jd.compressor.calibrate.moments import Moments, calibrate, measure
from vllm_jd.compressor.calibrate.prompts import read_prompts
from vllm_jd.compressor.errors import CalibrationError
from vllm_jd.store import BaseModelInfo, read_base_model

transformers = pytest.importorskip("transformers")

Q, K, V, OUT = (f"model.layers.0.self_attn.{letter}_proj" for letter in "qkvo")
GATE, UP, DOWN = (f"model.layers.1.mlp.{name}_proj" for name in ("gate", "up", "down"))
MODULES = {
    Q: (24, 24),
    K: (24, 12),
    V: (24, 12),
    OUT: (24, 24),
    GATE: (24, 40),
    UP: (24, 40),
    DOWN: (40, 24),
}
PROMPTS = ["w1 w2 w3", "w4 w5 w6", "w7", "w8 w9 w10 w11 w12 w13 w14", "w15 w16 w17 w18", "w3 w2 w1"]
TOKENS = 3 + 3 + 1 + 7 + 4 + 3 + len(PROMPTS)  # each has a <bos>


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """(folder, model) of a tiny Llama whose tokenizer adds <bos> and has a chat template."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=40,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=2,
        bos_token_id=1,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    for layer in model.model.layers:  # so that q, k, v's input is not that of other layers
        layer.input_layernorm.weight.data = torch.rand(24) + 0.5
    folder = tmp_path_factory.mktemp("base") / "tiny-llama"
    model.save_pretrained(folder)
    words = {"<unk>": 0, "<bos>": 1, "<pad>": 2} | {f"w{i}": i + 2 for i in range(1, 38)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 1)]
    )
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<bos>", pad_token="<pad>"
    )
    fast.chat_template = (
        "<bos>{% for m in messages %} {{ m.role }} {{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %} w30{% endif %}"
    )
    fast.save_pretrained(folder)
    return folder, model


def activations(model, rows):
    """Module → inputs float64 `[tokens, d_in]`: one row of token ids at a time, by the formulas
    of Llama's layers where they are simple, else by a forward hook."""
    found = {name: [] for name in MODULES}
    layers = model.model.layers
    for ids in rows:
        caught = {}
        handles = [
            model.get_submodule(name).register_forward_hook(
                lambda module, args, output, name=name, into=caught: into.__setitem__(name, args[0])
            )
            for name in (OUT, GATE)
        ]
        with torch.no_grad():
            states = model(torch.tensor([ids]), output_hidden_states=True).hidden_states
            normed = layers[0].input_layernorm(states[0])
            mlp = layers[1].mlp
            x = caught[GATE]
            down = torch.nn.functional.silu(mlp.gate_proj(x)) * mlp.up_proj(x)
        for handle in handles:
            handle.remove()
        inputs = {Q: normed, K: normed, V: normed, OUT: caught[OUT], GATE: x, UP: x, DOWN: down}
        for name, value in inputs.items():
            found[name].append(value[0].double())
    return {name: torch.cat(parts) for name, parts in found.items()}


def check_moments(moments, model, rows):
    for name, x in activations(model, rows).items():
        expected = (x.T @ x / len(x)).float()
        torch.testing.assert_close(moments.moment(name), expected, rtol=1e-4, atol=1e-6)


def ids_of(prompts):
    return [[1] + [int(word[1:]) + 2 for word in prompt.split()] for prompt in prompts]


def matrices(path):
    return [name for name in load_file(path) if name.startswith("moment")]


def counting_runs(monkeypatch):
    """The number of rows of each batch that the model reads from now on."""
    rows = []
    run = subject._run

    def counted(body, hooks, batches):
        def noted():
            for batch in batches:
                rows.append(tuple(batch.shape))
                yield batch

        run(body, hooks, noted())

    monkeypatch.setattr(subject, "_run", counted)
    return rows


@pytest.fixture(scope="module")
def measured(base, tmp_path_factory):
    return measure(base[0], PROMPTS, MODULES, tmp_path_factory.mktemp("moments") / "m.safetensors")


def test_moments_are_those_of_the_real_tokens(base, measured):
    check_moments(measured, base[1], ids_of(PROMPTS))
    assert measured.tokens == TOKENS
    assert list(measured) == list(MODULES) and len(measured) == len(MODULES)
    assert measured.base_model == read_base_model(base[0])


def test_modules_with_one_input_share_one_moment(measured):
    assert len(matrices(measured.path)) == 4  # q k v, o, gate up, down
    assert measured[Q] is measured[V]
    assert measured[GATE] is not measured[Q]
    metric = Metric.of(measured.moment(DOWN))
    assert torch.equal(measured[DOWN].root, metric.root)


def test_little_memory_means_more_passes_and_the_same_numbers(
    base, measured, tmp_path, monkeypatch
):
    batches = counting_runs(monkeypatch)
    told = []
    again = measure(
        base[0],
        PROMPTS,
        MODULES,
        tmp_path / "m.safetensors",
        held_bytes=2 * 4 * 24**2,
        on_progress=lambda *event: told.append(event),
    )
    # [q k v, o], [gate up], [down]: two moments of 24² fit, that of 40² alone is over the limit.
    assert sum(rows for rows, _ in batches[1:]) == 3 * len(PROMPTS)
    assert again.path.read_bytes() == measured.path.read_bytes()
    assert told[-1] == ("calibrating", 3 * len(PROMPTS), 3 * len(PROMPTS))
    done = [done for what, done, _ in told if what == "calibrating"]
    assert done == sorted(done)


def test_long_prompts_are_cut(base, tmp_path):
    moments = measure(base[0], PROMPTS, MODULES, tmp_path / "m.safetensors", max_tokens=4)
    check_moments(moments, base[1], [ids[:4] for ids in ids_of(PROMPTS)])


def test_big_batches_are_split(base, measured, tmp_path, monkeypatch):
    monkeypatch.setattr(subject, "_BATCH_TOKENS", 4)
    batches = counting_runs(monkeypatch)
    moments = measure(base[0], PROMPTS, MODULES, tmp_path / "m.safetensors")
    assert batches[1:] == [(1, 8), (1, 5), (1, 4), (1, 4), (1, 4), (1, 2)]
    torch.testing.assert_close(moments.moment(DOWN), measured.moment(DOWN))


def test_messages_go_through_the_chat_template(base, tmp_path):
    question = [{"role": "w1", "content": "w2 w3"}]
    answered = [*question, {"role": "assistant", "content": "w4"}]
    moments = measure(base[0], [question, answered], MODULES, tmp_path / "m.safetensors")
    assistant = 0  # the word is not in the vocabulary
    check_moments(moments, base[1], [[1, 3, 4, 5, 32], [1, 3, 4, 5, assistant, 6]])


def test_a_stopped_measurement_goes_on(base, measured, tmp_path, monkeypatch):
    out = tmp_path / "m.safetensors"
    each = {"held_bytes": 1}  # a pass for each of the four inputs

    def stop(what, done, total):
        if what == "calibrating" and done > 2 * len(PROMPTS):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure(base[0], PROMPTS, MODULES, out, on_progress=stop, **each)
    partial = tmp_path / "m.safetensors.partial"
    assert not out.exists() and partial.exists()
    with pytest.raises(CalibrationError, match="not finished"):
        Moments(partial)
    kept = tmp_path / "kept"
    shutil.copy(partial, kept)

    batches = counting_runs(monkeypatch)
    measure(base[0], PROMPTS, MODULES, out, **each)
    assert sum(rows for rows, _ in batches[1:]) == 2 * len(PROMPTS)
    assert out.read_bytes() == measured.path.read_bytes()
    assert not partial.exists()

    # What another set of prompts left is not taken for this one's.
    shutil.copy(kept, tmp_path / "other.safetensors.partial")
    other = measure(base[0], PROMPTS[:2], MODULES, tmp_path / "other.safetensors")
    check_moments(other, base[1], ids_of(PROMPTS[:2]))


def test_a_file_of_prompts_is_measured_once(base, measured, tmp_path, monkeypatch):
    source, folder = tmp_path / "prompts.txt", tmp_path / "kept"
    source.write_text("\n\n".join(PROMPTS) + "\n", encoding="utf-8")
    model = str(shutil.copytree(base[0], tmp_path / "tiny-llama"))
    first = calibrate(source, model, MODULES, folder)
    torch.testing.assert_close(first.moment(DOWN), measured.moment(DOWN))

    loads = []
    load = subject.load_model
    monkeypatch.setattr(subject, "load_model", lambda *args: loads.append(args) or load(*args))
    as_json = tmp_path / "same.jsonl"
    as_json.write_text("".join(json.dumps({"text": prompt}) + "\n" for prompt in PROMPTS))
    for same in (source, as_json):
        assert calibrate(same, model, MODULES, folder).path == first.path
    assert loads == []

    def changes():
        yield calibrate(source, model, MODULES, folder, max_tokens=2)
        yield calibrate(source, model, {Q: MODULES[Q]}, folder)
        source.write_text("w1", encoding="utf-8")
        yield calibrate(source, model, MODULES, folder)
        weights = tmp_path / "tiny-llama" / "model.safetensors"
        weights.write_bytes(weights.read_bytes())  # the same name and config, written anew
        yield calibrate(source, model, MODULES, folder)

    assert len({first.path, *(moments.path for moments in changes())}) == 5
    assert len(loads) == 4


def test_moments_measured_before_are_taken_as_they_are(base, measured, monkeypatch, tmp_path):
    monkeypatch.setattr(subject, "load_model", None)
    for model in (str(base[0]), "org/tiny-llama", "Tiny-Llama"):
        moments = calibrate(measured.path, model, {Q: MODULES[Q]}, tmp_path / "unused")
        assert torch.equal(moments.moment(Q), measured.moment(Q))
    assert not (tmp_path / "unused").exists()


def test_the_mapping_is_lazy_picklable_and_has_a_digest(base, measured, tmp_path, monkeypatch):
    expected = measured[DOWN].root
    moments = Moments(measured.path)
    made = []
    of = Metric.of
    monkeypatch.setattr(Metric, "of", lambda moment: made.append(1) or of(moment))
    assert Q in moments and "lm_head" not in moments and moments.get("lm_head") is None
    assert list(moments) and moments.digest == measured.digest
    assert made == []
    assert moments[Q] is moments[K] and made == [1]

    sent = pickle.dumps(moments)
    assert len(sent) < 5000
    received = pickle.loads(sent)
    assert torch.equal(received[DOWN].root, expected)
    assert received.digest == measured.digest
    with pytest.raises(KeyError):
        received["lm_head"]

    other = measure(base[0], PROMPTS[:1], MODULES, tmp_path / "other.safetensors")
    assert other.digest != measured.digest


def test_a_relative_path_is_found_from_anywhere(measured, tmp_path, monkeypatch):
    monkeypatch.chdir(measured.path.parent)
    sent = pickle.dumps(Moments(measured.path.relative_to(measured.path.parent)))
    monkeypatch.chdir(tmp_path)
    assert torch.equal(pickle.loads(sent).moment(Q), measured.moment(Q))


@pytest.mark.parametrize(
    ("modules", "base_model", "message"),
    [
        ({}, BaseModelInfo(name="other"), "found 'tiny-llama', expected 'other'"),
        (
            {},
            BaseModelInfo(name="tiny-llama", config={"hidden_size": 4096, "rms_norm_eps": 0}),
            "hidden_size: found 24, expected 4096",
        ),
        ({"model.layers.7.q": (24, 1)}, BaseModelInfo(name="tiny-llama"), r"layers\.7\.q"),
        ({Q: (32, 24)}, BaseModelInfo(name="tiny-llama"), "found inputs of 24.*adapters have 32"),
    ],
)
def test_moments_of_something_else_are_refused(measured, modules, base_model, message):
    with pytest.raises(CalibrationError, match=message):
        measured.check(modules, base_model)


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        (
            {f"model.layers.{i}.self_attn.q_proj": (24, 24) for i in range(1, 7)},
            r"tiny-llama \(LlamaForCausalLM\) has no model\.layers\.2\.self_attn\.q_proj, .* and 2 "
            r"more, .*; it has model\.layers\.0\.",
        ),
        ({Q: (32, 24)}, r"takes inputs of 24 numbers, the adapters have 32"),
        ({"model.embed_tokens": (24, 40)}, "is of type Embedding, expected a linear layer"),
    ],
)
def test_modules_that_do_not_fit_the_model_are_named(base, tmp_path, modules, message):
    with pytest.raises(CalibrationError, match=message):
        measure(base[0], PROMPTS, modules, tmp_path / "m.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_a_module_that_is_never_run_is_named(base, tmp_path, monkeypatch):
    load = subject.load_model

    def with_an_idle_layer(*args):
        model, tokenizer = load(*args)
        model.model.idle = torch.nn.Linear(24, 24)
        return model, tokenizer

    monkeypatch.setattr(subject, "load_model", with_an_idle_layer)
    with pytest.raises(CalibrationError, match=r"never reached model\.idle"):
        measure(base[0], PROMPTS, {"model.idle": (24, 24)}, tmp_path / "m.safetensors")


def test_the_head_can_be_measured_too(base, tmp_path):
    moments = measure(base[0], PROMPTS, {"lm_head": (24, 40)}, tmp_path / "m.safetensors")
    with torch.no_grad():
        states = [
            base[1](torch.tensor([ids]), output_hidden_states=True).hidden_states[-1][0]
            for ids in ids_of(PROMPTS)
        ]
    x = torch.cat(states).double()
    expected = (x.T @ x / len(x)).float()
    torch.testing.assert_close(moments.moment("lm_head"), expected, rtol=1e-4, atol=1e-6)


def test_numbers_that_overflow_are_not_kept(base, tmp_path, monkeypatch):
    load = subject.load_model

    def overflowing(*args):
        model, tokenizer = load(*args)
        model.model.layers[0].input_layernorm.weight.data[0] = float("inf")
        return model, tokenizer

    monkeypatch.setattr(subject, "load_model", overflowing)
    with pytest.raises(CalibrationError, match="NaN or infinity"):
        measure(base[0], PROMPTS, MODULES, tmp_path / "m.safetensors")
    assert not (tmp_path / "m.safetensors").exists()


def test_a_model_that_is_not_there_is_told(base, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("w1")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CalibrationError, match=r"config\.json"):
        calibrate(prompts, str(tmp_path / "empty"), MODULES, tmp_path / "kept")
    (tmp_path / "no-weights").mkdir()
    shutil.copy(base[0] / "config.json", tmp_path / "no-weights")
    with pytest.raises(CalibrationError, match="no-weights' cannot be loaded"):
        calibrate(prompts, str(tmp_path / "no-weights"), MODULES, tmp_path / "kept")
    with pytest.raises(CalibrationError, match="'not a name' cannot be loaded"):
        calibrate(prompts, "not a name", MODULES, tmp_path / "kept")


def test_without_transformers_the_extra_is_named(base, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(CalibrationError, match=r"vllm-jd\[calibrate\]"):
        measure(base[0], PROMPTS, MODULES, tmp_path / "m.safetensors")


def test_messages_without_a_chat_template_are_told(base, tmp_path):
    folder = tmp_path / "tiny-llama"
    shutil.copytree(base[0], folder, ignore=shutil.ignore_patterns("chat_template*"))
    with pytest.raises(CalibrationError, match=r"prompt 2: .*chat template"):
        measure(folder, ["w1", [{"role": "user", "content": "w1"}]], MODULES, tmp_path / "m")


def test_prompts_are_read_line_by_line(tmp_path):
    text = tmp_path / "prompts.txt"
    text.write_bytes("one\r\n\n  two words \nthree\u2028still three\n".encode())
    assert read_prompts(text) == ["one", "  two words ", "three\u2028still three"]
    lines = tmp_path / "prompts.jsonl"
    messages = [{"role": "user", "content": "Hi"}]
    lines.write_text(
        "\n".join(
            [
                '{"prompt": "a\\nb", "completion": "c"}',
                '{"text": "\u00e9"}',
                json.dumps({"messages": messages}),
            ]
        ),
        encoding="utf-8",
    )
    assert read_prompts(lines) == ["a\nb", "\u00e9", messages]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.txt", b"", "found no prompts"),
        ("p.txt", b" \n\n", "found no prompts"),
        ("p.txt", b"\xff\xfe\x00", "not UTF-8"),
        ("p.csv", b"a", r"expected prompts as \.txt"),
        ("p.jsonl", b'{"text": "a"}\n{"tex', r"p\.jsonl:2: cannot be read as JSON"),
        ("p.jsonl", b'["a"]', "p.jsonl:1: found list, expected a JSON object"),
        ("p.jsonl", b'{"text": 3}', "text: found int, expected a string"),
        ("p.jsonl", b'{"input": "a", "output": "b"}', "found the fields input, output; expected"),
        ("p.jsonl", b'{"messages": []}', "list of objects with role"),
        ("p.jsonl", b'{"messages": [{"content": "a"}]}', "list of objects with role"),
        ("p.jsonl", b'{"text": "\\ud800"}', "p.jsonl:1: cannot be read as JSON"),
    ],
)
def test_prompts_that_cannot_be_used_are_told(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CalibrationError, match=message):
        read_prompts(tmp_path / name)


def test_missing_files_are_told(tmp_path):
    with pytest.raises(CalibrationError, match=r"p\.txt: cannot be read: No such file"):
        read_prompts(tmp_path / "p.txt")
    with pytest.raises(CalibrationError, match=r"m\.safetensors: no such file"):
        Moments(tmp_path / "m.safetensors")


def test_other_safetensors_files_are_refused(tmp_path, measured):
    file = tmp_path / "m.safetensors"
    save_file({"tokens": torch.ones(1, dtype=torch.int64)}, file)
    with pytest.raises(CalibrationError, match="not a file of moments"):
        Moments(file)
    file.write_bytes(measured.path.read_bytes()[:-8])
    with pytest.raises(CalibrationError, match="cannot be read as safetensors"):
        Moments(file)
    damaged = bytearray(measured.path.read_bytes())
    damaged[-4:] = b"\xff\xff\xff\xff"  # NaN
    file.write_bytes(damaged)
    with pytest.raises(CalibrationError, match="NaN or infinity"):
        Moments(file)[DOWN]
