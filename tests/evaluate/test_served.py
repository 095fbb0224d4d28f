"""`vllm-jd evaluate` end to end on a tiny random Llama: what the engine says, against transformers
and PEFT; a store without loss; a ruined adapter."""

import json
import shutil

import numpy as np
import pytest

from tests.cli.test_cli import fail, succeed
from tests.word_llama import likely_words, losses, write_loud_adapter, write_word_llama
from vllm_jd.compressor import Settings, read_adapters
from vllm_jd.compressor.run.compress import compress
from vllm_jd.store import read_base_model

pytest.importorskip("peft")
pytestmark = pytest.mark.slow

WORDS = ["Input", "Output", ":", "cat", "dog", "horse", "cow", "hen", "goat", "mouse", "pig"]
RUINED, REFUSED = "task3", "task4"


@pytest.fixture(autouse=True)
def small_engine(monkeypatch):
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def test_a_lossless_store_says_the_same_and_a_ruined_adapter_is_found(tmp_path):
    from transformers import AutoTokenizer

    model = tmp_path / "tiny-llama"
    write_word_llama(model, WORDS)
    tokenizer = AutoTokenizer.from_pretrained(model)
    rng = np.random.default_rng(0)
    data = tmp_path / "data"
    data.mkdir()
    items = {}
    for i in range(5):
        folder = tmp_path / "adapters" / f"task{i}"
        write_loud_adapter(folder, model, seed=i)
        prompts = [f"Input : {' '.join(rng.choice(WORDS[3:], 4))} Output :" for _ in range(4)]
        said = likely_words(model, folder, [tokenizer(each).input_ids for each in prompts], 2)
        lines = [
            {"prompt": prompt, "completion": f" {tokenizer.decode(ids)}"}
            for prompt, ids in zip(prompts, said, strict=True)
        ]
        (data / f"task{i}.jsonl").write_text("\n".join(map(json.dumps, lines)))
        items[f"task{i}"] = lines
    # The store has other numbers under the name of one of them.
    changed = tmp_path / "changed"
    shutil.copytree(tmp_path / "adapters", changed)
    shutil.rmtree(changed / RUINED)
    write_loud_adapter(changed / RUINED, model, seed=77)
    compress(
        read_adapters([changed]),
        tmp_path / "store",
        Settings(method="none", store_dtype="float32"),
        base_model=read_base_model(model),
    ).close()
    # One that is refused as it is, though not by what reads its items.
    config = tmp_path / "adapters" / REFUSED / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"use_dora": True}))
    command = (
        *("evaluate", tmp_path / "store", "--adapters", tmp_path / "adapters", "--data", data),
        *("--base-model", model, "--out", tmp_path / "out", "--max-new-tokens", 6, "--json"),
    )
    text = fail(*command, "--no-such-flag", "3", code=2)
    assert "unrecognized arguments: --no-such-flag" in text

    result = succeed(*command, "--dtype", "float32")
    told = " ".join(result.stderr.split())
    assert f"{RUINED}, {REFUSED}: the files in --adapters are not those" in told
    assert f"left out {REFUSED}: it cannot be served" in told and "DoRA" in told
    found = json.loads(result.stdout)
    assert found["worst"][0] == RUINED
    answers = json.loads((tmp_path / "out" / "results.json").read_text())["answers"]
    assert [each["name"] for each in found["adapters"]] == [f"task{i}" for i in range(4)]
    for each in found["adapters"]:
        name = each["name"]
        ids = [
            (tokenizer(line["prompt"]).input_ids, tokenizer(line["completion"]).input_ids)
            for line in items[name]
        ]
        own = [answer for answer in answers if answer["adapter"] == name]
        assert [answer["prompt"] for answer in own] == [line["prompt"] for line in items[name]]
        for way, folder in {
            "base": None,
            "lora": tmp_path / "adapters" / name,
            "store": changed / name,
        }.items():
            by_peft = losses(model, folder, ids)
            assert [answer[way]["loss"] for answer in own] == pytest.approx(by_peft, abs=1e-3)
        if name == RUINED:
            assert each["store"]["agreement"] < 1 and each["loss_added"] > 0.05
        else:
            assert each["store"]["agreement"] == 1
            assert each["loss_added"] == pytest.approx(0, abs=1e-4)
            assert [a["store"]["said"] for a in own] == [a["lora"]["said"] for a in own]
    said = {answer[way]["said"] for answer in answers for way in ("base", "lora")}
    assert len(said) > len(answers) / 2, "the adapters say the same: this shows nothing"

    # No engine is started for what has been answered: it would begin its log anew.
    log = (tmp_path / "out" / "engine.log").stat().st_mtime_ns
    served = [word for name in sorted({*items} - {REFUSED}) for word in ("--adapter", name)]
    again = succeed(*command, "--dtype", "float32", *served)
    assert json.loads(again.stdout)["adapters"] == found["adapters"]
    assert (tmp_path / "out" / "engine.log").stat().st_mtime_ns == log
