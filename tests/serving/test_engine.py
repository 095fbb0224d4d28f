"""The plugin in vLLM's offline engine: lossy stores, bfloat16, and a thousand adapters at once."""

import json
import os
import subprocess
import sys

import pytest
import torch

from tests.serving.conftest import MAX_MODEL_LEN, NEW_TOKENS, SHIPPED, write_wide_adapter
from vllm_jd.compressor import export_adapter

pytestmark = pytest.mark.slow

MEAN_BOUND, MAX_BOUND = 0.1, 1.0
"""Difference of a log-probability in nats, bfloat16 engine against float32 PEFT. The base model
alone, without any adapter, differs by 0.06 in the mean and 0.3 at most here."""

SCRIPT = """
import json, sys
from pathlib import Path
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest
from vllm_jd.plugin.api.requests import adapter_request
from vllm_jd.serve import engine_args
from vllm_jd.store import Store

def request_of(store, name):
    if isinstance(name, dict):  # a blend; paths are those of folders
        name = {Path(part) if part.startswith("/") else part: w for part, w in name.items()}
    return adapter_request(store, name) if name else None

if __name__ == "__main__":
    job = json.load(open(sys.argv[1]))
    store = Store.open(job["store"])
    llm = LLM(job["model"], enforce_eager=job["eager"], max_model_len=job["max_model_len"],
              dtype=job["dtype"], block_size=32, max_num_batched_tokens=4096, **job["args"],
              **engine_args(job["store"], max_num_seqs=job["max_num_seqs"],
                            core_slots=job["core_slots"], adapter_memory=job["adapter_memory"]))
    uploads = {
        name: LoRARequest(name, len(store) + 1 + i, folder)
        for i, (name, folder) in enumerate(job["uploads"].items())
    }
    results, at_once = [], []
    for batch in job["batches"]:
        params = SamplingParams(temperature=0, ignore_eos=True, max_tokens=job["max_tokens"],
                                prompt_logprobs=job["prompt_logprobs"])
        # Step by step rather than llm.generate, to see how many requests a step had.
        for i, (name, ids) in enumerate(batch):
            llm.llm_engine.add_request(
                str(i), {"prompt_token_ids": ids}, params,
                lora_request=uploads.get(str(name)) or request_of(store, name),
            )
        finished, most = {}, 0
        while llm.llm_engine.has_unfinished_requests():
            step = llm.llm_engine.step()
            most = max(most, len(step))
            finished |= {int(o.request_id.split("-")[0]): o for o in step if o.finished}
        outputs = [finished[i] for i in range(len(batch))]
        at_once.append(most)
        results.append([
            {"tokens": list(output.outputs[0].token_ids),
             "logprobs": [step[token].logprob for step, token in
                          zip(output.prompt_logprobs[1:], output.prompt_token_ids[1:])]
                         if job["prompt_logprobs"] is not None else None}
            for output in outputs
        ])
    json.dump([results, at_once], open(sys.argv[2], "w"))
"""


def run_engine(folder, store, model, batches, *, one_process=False, **options):
    """Run batches of (adapter name or None, token ids) through one engine, beside this process.

    The engine's core and its worker are processes of their own, as a server's are, each of which
    imports vLLM first; with `one_process` they are not.

    Returns each batch's outputs, and the most requests that one step of each batch answered.
    """
    job = {
        "store": str(store.path),
        "model": str(model),
        "batches": batches,
        "dtype": "float32",
        "max_tokens": NEW_TOKENS,
        "max_model_len": MAX_MODEL_LEN,
        "max_num_seqs": 32,
        "prompt_logprobs": None,
        "eager": True,
        "core_slots": None,
        "adapter_memory": None,
        "uploads": {},
        "args": {},
    } | options
    (folder / "script.py").write_text(SCRIPT)
    (folder / "job.json").write_text(json.dumps(job))
    command = [sys.executable, *(str(folder / f) for f in ("script.py", "job.json", "result.json"))]
    environment = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"} if one_process else {}
    subprocess.run(command, check=True, timeout=600, env=os.environ | environment)
    return json.loads((folder / "result.json").read_text())


def exported(store, names, folder):
    return {name: export_adapter(store, name, folder / name) for name in names}


@pytest.fixture(scope="module")
def lossy_exports(lossy_store, sources, tmp_path_factory):
    """Adapter name → folder of what the lossy store has of it; no adapter: None."""
    return exported(lossy_store, sources, tmp_path_factory.mktemp("export")) | {None: None}


@pytest.mark.parametrize("mode", ["eager", "compiled", "eager, torch reference"])
def test_a_lossy_store_says_what_its_export_says(
    mode, lossy_store, lossy_exports, model, prompts, peft_reference, sources, tmp_path, monkeypatch
):
    if mode.endswith("reference"):
        monkeypatch.setenv("VLLM_JD_KERNEL", "reference")
    eager = mode != "compiled"
    batch = [(name, prompt) for prompt in prompts for name in [*sources, None]]
    ((found,), _) = run_engine(
        tmp_path, lossy_store, model, [batch], eager=eager, one_process=eager
    )
    said = [output["tokens"] for output in found]
    expected = peft_reference.answers(lossy_exports, batch, said)
    assert said == expected
    original = sources | {None: None}
    assert any(
        peft_reference.greedy(original[name], prompt, guess=tokens) != tokens
        for (name, prompt), tokens in zip(batch, expected, strict=True)
    ), "the store is not lossy: this shows nothing"


def test_blends_say_what_pefts_weighted_adapters_say(
    lossy_store, lossy_exports, model, prompts, peft_reference, shipped, tmp_path
):
    """Within a cluster, across clusters, with uploads, of other ranks and modules; beside plain
    adapters and the base model, in one batch."""
    clusters = {}
    for name, cluster in zip(lossy_store.names, lossy_store.chosen[:, 0, 0].tolist(), strict=True):
        clusters.setdefault(cluster, []).append(name)
    (a, b, *_), (c, *_) = sorted(clusters.values(), key=len, reverse=True)
    wide = tmp_path / "wide"
    write_wide_adapter(wide, model, rank=4, seed=5, every=1)  # PEFT asks for all layers
    upload = str(SHIPPED / shipped[8])
    blends = [
        {a: 0.7, b: 0.3},
        {a: 1.5},
        {a: 0.6, c: 0.4},
        {a: 0.5, b: -0.25, c: 0.5, upload: 0.75},
        {upload: 0.5, str(wide): 1.25},
    ]
    batch = [(blend, prompt) for prompt in prompts for blend in [*blends, a, None]]
    ((found,), _) = run_engine(tmp_path, lossy_store, model, [batch], one_process=True)
    said = [output["tokens"] for output in found]

    def reference(blend):
        if not isinstance(blend, dict):
            return lossy_exports[blend]
        return tuple((lossy_exports.get(part, part), w) for part, w in blend.items())

    expected = [
        peft_reference.greedy(reference(blend), prompt, guess=tokens)
        for (blend, prompt), tokens in zip(batch, said, strict=True)
    ]
    assert said == expected
    assert len({tuple(tokens) for tokens in expected}) > 2 * len(prompts), "they hardly differ"


def test_cores_are_paged_and_an_upload_may_adapt_what_the_compiled_model_leaves_out(
    model, prompts, peft_reference, sources, tmp_path
):
    """Seven adapters of q, k, v pass through two slots in a compiled engine; one on every linear
    layer, which the store has nothing for, is served beside them, and not compiled."""
    from vllm_jd.compressor import Settings, read_adapters
    from vllm_jd.compressor.run.compress import compress
    from vllm_jd.store import read_base_model

    names = [name for name in sources if name != "all-linear"]
    store = compress(
        read_adapters([sources[name] for name in names]),
        tmp_path / "store",
        Settings(rank=40, store_dtype="float32"),
        base_model=read_base_model(model),
    )
    everyone = [*names, "all-linear", None]
    batch = [(name, prompt) for prompt in prompts for name in everyone]
    # Another neighbour each time, and again without the upload.
    batches = [batch, batch[::-1], [(name, ids) for name, ids in batch if name != "all-linear"]]
    found, _ = run_engine(
        tmp_path,
        store,
        model,
        batches,
        eager=False,
        max_num_seqs=2,
        core_slots=2,
        uploads={"all-linear": str(sources["all-linear"])},
    )
    folders = sources | {None: None}
    for requests, outputs in zip(batches, found, strict=True):
        said = [output["tokens"] for output in outputs]
        assert said == peft_reference.answers(folders, requests, said)


MANY_KINDS = {
    "everything at once": {
        "method": "jd-diag",
        "rank": 3,
        "residual_rank": 1,
        "mean_rank": 2,
        "store_dtype": "int8",
        "max_adapter_error": 0.12,
    },
    "one A, three B": {
        "method": "hydraopt",
        "rank": 4,
        "matrices": 3,
        "distance": "frobenius",
        "steps": 20,
    },
}


@pytest.mark.parametrize("settings", MANY_KINDS.values(), ids=MANY_KINDS)
def test_stores_of_other_kinds_say_what_their_export_says(
    settings, model, prompts, peft_reference, sources, tmp_path
):
    from vllm_jd.compressor import Settings, read_adapters
    from vllm_jd.compressor.report.summary import uncompressed_adapters
    from vllm_jd.compressor.run.compress import compress
    from vllm_jd.store import read_base_model

    store = compress(
        read_adapters(sources.values()),
        tmp_path / "store",
        Settings(**settings),
        base_model=read_base_model(model),
    )
    if "max_adapter_error" in settings:
        assert store.manifest.rows == 3
        assert uncompressed_adapters(store).tolist().count(True) in range(1, len(store))
    batch = [(name, prompt) for prompt in prompts for name in [*sources, None]]
    ((found,), _) = run_engine(tmp_path, store, model, [batch], one_process=True)
    folders = exported(store, sources, tmp_path / "export") | {None: None}
    said = [output["tokens"] for output in found]
    assert said == peft_reference.answers(folders, batch, said)


@pytest.mark.parametrize("store_dtype", ["bfloat16", "int8"])
def test_in_bfloat16_log_probabilities_stay_close(
    store_dtype, lossy_store, lossy_exports, model, prompts, peft_reference, sources, tmp_path
):
    """Of a quantised store too, whose bases and cores are then served as codes."""
    store, exports = lossy_store, lossy_exports
    if store_dtype == "int8":
        from vllm_jd.compressor import Settings, read_adapters
        from vllm_jd.compressor.run.compress import compress
        from vllm_jd.store import read_base_model

        settings = Settings(rank=3, clusters=2, store_dtype="int8")
        collection = read_adapters(sources.values())
        store = compress(
            collection, tmp_path / "store", settings, base_model=read_base_model(model)
        )
        assert store.dtype == torch.bfloat16
        exports = exported(store, sources, tmp_path / "export") | {None: None}
    texts = [prompt + prompts[0][3:9] for prompt in prompts]
    batch = [(name, ids) for ids in texts for name in [*sources, None]]
    ((found,), _) = run_engine(
        tmp_path,
        store,
        model,
        [batch],
        dtype="bfloat16",
        max_tokens=1,
        prompt_logprobs=0,
        one_process=True,
    )
    differences = {True: [], False: []}
    for (name, ids), output in zip(batch, found, strict=True):
        expected = peft_reference.log_probabilities(exports[name], ids)
        difference = torch.tensor(output["logprobs"]) - torch.tensor(expected)
        differences[name is not None].append(difference.abs())
    adapters, base = torch.cat(differences[True]), torch.cat(differences[False])
    assert float(adapters.max()) < MAX_BOUND
    assert float(adapters.mean()) < MEAN_BOUND
    assert float(adapters.mean()) < 2 * float(base.mean()), "more than bfloat16 costs the model"


def test_a_thousand_adapters_are_in_flight_at_once(
    model, peft_reference, tmp_path_factory, tmp_path
):
    from benchmarks.synthetic import RandomCollection
    from vllm_jd.compressor import Settings
    from vllm_jd.compressor.run.compress import compress
    from vllm_jd.store import read_base_model

    collection = RandomCollection(model, 1024, rank=16, scale=0.5, targets=("q_proj", "v_proj"))
    settings = Settings(rank=8, iterations=1, solver="eigen")
    path = tmp_path_factory.mktemp("thousand") / "store"
    store = compress(collection, path, settings, base_model=read_base_model(model))
    prompt = [504, 1343, 314, 253]
    everyone = [(name, prompt) for name in store.names]
    some = everyone[:: len(everyone) // 8]
    (at_once, few), most = run_engine(
        tmp_path,
        store,
        model,
        [everyone, some],
        max_num_seqs=1024,
        max_model_len=32,
        max_tokens=4,
        one_process=True,
    )
    assert most[0] == len(everyone), "not all of them were in one step"
    said = {name: output["tokens"] for (name, _), output in zip(everyone, at_once, strict=True)}
    assert len({tuple(tokens) for tokens in said.values()}) > 100, "adapters should differ"
    for (name, _), output in zip(some, few, strict=True):
        assert output["tokens"] == said[name], "the batch changed what an adapter says"
    folders = exported(store, [name for name, _ in some], tmp_path / "export")
    for name, folder in folders.items():
        answer = peft_reference.greedy(folder, prompt, tokens=4, guess=said[name])
        assert said[name] == answer
