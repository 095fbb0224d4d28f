"""The plugin in vLLM's offline engine: lossy stores, blends, other kinds of stores, bfloat16."""

import pytest
import torch

from tests.serving.conftest import SHIPPED, write_short_adapter, write_wide_adapter
from tests.serving.engine import exported, run_engine

pytestmark = pytest.mark.slow

MEAN_BOUND, MAX_BOUND = 0.1, 1.0
"""Difference of a log-probability in nats, bfloat16 engine against float32 PEFT. The base model
alone, without any adapter, differs by 0.06 in the mean and 0.3 at most here."""


@pytest.fixture(scope="module")
def lossy_exports(lossy_store, sources, tmp_path_factory):
    """Adapter name → folder of what the lossy store has of it; no adapter: None."""
    return exported(lossy_store, sources, tmp_path_factory.mktemp("export")) | {None: None}


@pytest.mark.parametrize("mode", ["eager", "compiled"])
def test_a_lossy_store_says_what_its_export_says(
    mode, lossy_store, lossy_exports, model, prompts, peft_reference, sources
):
    eager = mode == "eager"
    batch = [(name, prompt) for prompt in prompts for name in [*sources, None]]
    ((found,), _) = run_engine(lossy_store, model, [batch], eager=eager, one_process=eager)
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
    ((found,), _) = run_engine(lossy_store, model, [batch], one_process=True)
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
    short, prompts, short_reference, shipped, tmp_path
):
    """Seven adapters of q, k, v pass through two slots in a compiled engine; one on every linear
    layer, which the store has nothing for, is served beside them, and not compiled."""
    from vllm_jd.compressor import Settings, read_adapters
    from vllm_jd.compressor.run.compress import compress
    from vllm_jd.store import read_base_model

    sources = {name: tmp_path / name for name in [*shipped[:7], "all-linear"]}
    names = shipped[:7]
    for name in names:
        write_short_adapter(SHIPPED / name, sources[name], 4.0)
    write_wide_adapter(sources["all-linear"], short, every=1)
    store = compress(
        read_adapters([sources[name] for name in names]),
        tmp_path / "store",
        Settings(rank=40, store_dtype="float32"),
        base_model=read_base_model(short),
    )
    everyone = [*names, "all-linear", None]
    batch = [(name, prompt) for prompt in prompts for name in everyone]
    # Another neighbour each time, and again without the upload.
    batches = [batch, batch[::-1], [(name, ids) for name, ids in batch if name != "all-linear"]]
    found, _ = run_engine(
        store,
        short,
        batches,
        eager=False,
        max_num_seqs=2,
        core_slots=2,
        uploads={"all-linear": str(sources["all-linear"])},
    )
    folders = sources | {None: None}
    for requests, outputs in zip(batches, found, strict=True):
        said = [output["tokens"] for output in outputs]
        assert said == short_reference.answers(folders, requests, said)
    said = {tuple(output["tokens"]) for output in found[0]}
    assert len(said) > len(batch) / 2, "they say the same"


MANY_KINDS = {
    "everything at once": {
        "method": "jd-diag",
        "rank": 3,
        "store_dtype": "int8",
        "max_adapter_error": 0.55,
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
    from tests.several_rows import compress
    from vllm_jd.compressor import Settings, read_adapters
    from vllm_jd.compressor.report.summary import uncompressed_adapters
    from vllm_jd.store import read_base_model

    store = compress(
        read_adapters(sources.values()),
        tmp_path / "store",
        Settings(**settings),
        **({"own": 1, "mean": 2} if "max_adapter_error" in settings else {}),
        base_model=read_base_model(model),
    )
    if "max_adapter_error" in settings:
        assert store.manifest.rows == 3
        assert uncompressed_adapters(store).tolist().count(True) in range(1, len(store))
    batch = [(name, prompt) for prompt in prompts for name in [*sources, None]]
    ((found,), _) = run_engine(store, model, [batch], one_process=True)
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
