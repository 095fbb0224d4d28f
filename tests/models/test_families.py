"""Each family of models in the real engine: what its adapters say is what PEFT says.

`scripts/models_table.py` makes the table of docs/models.md of what comes of this.
"""

from itertools import combinations

import pytest
import torch

from tests.forked import EngineFailed
from tests.models.engine import serve
from tests.models.families import FAMILIES
from tests.models.tiny import UPLOAD, Reference, make_adapters, make_model
from vllm_jd.compressor import Settings, export_adapter, read_adapters
from vllm_jd.compressor.run.compress import compress
from vllm_jd.demo.smollm2 import ensure_smollm2
from vllm_jd.serve import engine_args
from vllm_jd.store import read_base_model

pytestmark = pytest.mark.slow

TOKENS = 6
TEXTS = ("The old clock in the hall stopped at noon.", "bright", "12 eggs on Monday and 7 on")
TOLERANCE = 2e-3
"""Of a log-probability in nats: both compute in float32, in other orders."""

STORES = {
    "lossless": Settings(rank=24, clusters=2, store_dtype="float32", experts="separate"),
    "lossy": Settings(rank=3, clusters=2, store_dtype="float32", experts="joint"),
}
RUNS = [
    pytest.param(family, kind, workers, id=f"{family.name}-{kind}-{workers}")
    for family in FAMILIES
    for kind, workers in [("lossless", 1), *(("lossy", n) for n in family.workers)]
    if kind == "lossless" or not family.cannot
]


@pytest.fixture(scope="session")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(ensure_smollm2())


@pytest.fixture(scope="session")
def made(tmp_path_factory, tokenizer):
    """Family → (model, adapter name → folder), made when it is first asked for."""
    known = {}

    def make(family):
        if family.name not in known:
            folder = tmp_path_factory.mktemp("family")
            make_model(family, folder / "model", tokenizer)
            known[family.name] = (
                folder / "model",
                make_adapters(family, folder / "model", folder / "adapters"),
            )
        return known[family.name]

    return make


@pytest.fixture(scope="session")
def served(tmp_path_factory, made, tokenizer):
    """(family, kind, workers) → (store, batch, what an engine says to it).

    One worker's engine has both kinds, as two generations of a store; each is a batch with an
    upload and the base model in it.
    """
    known = {}

    def serve_family(family, kind, workers):
        kinds = ["lossless", "lossy"] if workers == 1 else ["lossy"]
        if (family.name, kind, workers) not in known:
            model, sources = made(family)
            prompts = [tokenizer(text).input_ids for text in TEXTS]
            path = tmp_path_factory.mktemp("stores") / "store"
            stores, settings = [], {}
            for each in kinds:
                compressed = [folder for name, folder in sources.items() if name != UPLOAD]
                base_model = read_base_model(model)
                stores.append(
                    compress(read_adapters(compressed), path, STORES[each], base_model=base_model)
                )
                # It starts with the first.
                settings = settings or engine_args(path, max_num_seqs=32)
            batch = [(name, ids) for ids in prompts for name in [*stores[0].names, UPLOAD, None]]
            options = {"language_model_only": True} if family.text else {}
            found = serve(
                model,
                batch,
                TOKENS,
                generations=stores,
                uploads={UPLOAD: sources[UPLOAD]},
                dtype=family.dtype,
                tensor_parallel_size=workers,
                **settings,
                **options,
            )
            for each, store, answers in zip(kinds, stores, found, strict=True):
                known[family.name, each, workers] = store, batch, answers
        return known[family.name, kind, workers]

    return serve_family


def test_a_compiled_model_says_of_experts_and_embedding_what_an_eager_one_does(made, served):
    family = next(family for family in FAMILIES if family.name == "Qwen 3 MoE")
    store, batch, eager = served(family, "lossy", 1)
    model, sources = made(family)
    (compiled,) = serve(
        model,
        batch,
        TOKENS,
        generations=[store],
        uploads={UPLOAD: sources[UPLOAD]},
        compiled=True,
        dtype=family.dtype,
        **engine_args(store.path, max_num_seqs=32),
    )
    for one, other in zip(compiled, eager, strict=True):
        assert one["tokens"] == other["tokens"]
        distances = [abs(a - b) for a, b in zip(one["logprobs"], other["logprobs"], strict=True)]
        assert max(distances) < TOLERANCE


@pytest.mark.parametrize(("family", "kind", "workers"), RUNS)
def test_a_family_says_what_its_export_says(
    family, kind, workers, made, served, tokenizer, tmp_path
):
    model, sources = made(family)
    if family.cannot:
        batch = [(UPLOAD, tokenizer(TEXTS[0]).input_ids)]
        with pytest.raises(EngineFailed) as failed:
            serve(model, batch, TOKENS, uploads=sources, enable_lora=True)
        lines = str(failed.value).splitlines()
        reason = next((line.strip() for line in lines[::-1] if family.cannot in line), None)
        assert reason, lines
        pytest.skip(f"vLLM on CPU: {reason}")
    store, batch, found = served(family, kind, workers)
    lossless = float(store.error.max()) < 1e-8
    assert lossless if kind == "lossless" else float(store.error.mean()) > 0.05
    folders = {name: export_adapter(store, name, tmp_path / name) for name in store.names}
    folders[UPLOAD] = sources[UPLOAD]
    reference = Reference(model, folders, apart=bool(family.experts))
    said, distances = {}, {}
    for (name, ids), answer in zip(batch, found, strict=True):
        expected = reference.log_probabilities(name, [*ids, *answer["tokens"][:-1]])
        following = torch.tensor([*ids, *answer["tokens"]])[1:, None]
        distance = torch.tensor(answer["logprobs"]) - expected.gather(1, following)[:, 0]
        distances.setdefault(name, []).append(distance.abs())
        said.setdefault(name, {})[tuple(ids)] = answer["logprobs"]
        if family.dtype == "float32":
            assert expected[len(ids) - 1 :].argmax(-1).tolist() == answer["tokens"], name
    distances = {name: torch.cat(each) for name, each in distances.items()}
    if family.dtype == "float32":
        furthest = {name: float(each.max()) for name, each in distances.items()}
        assert max(furthest.values()) < TOLERANCE, furthest
    else:
        mean = {name: float(each.mean()) for name, each in distances.items()}
        assert max(mean.values()) < 2 * mean[None] < 0.2, mean
    for one, other in combinations(said, 2):
        differences = [
            abs(a - b)
            for ids in said[one]
            for a, b in zip(said[one][ids], said[other][ids], strict=True)
        ]
        assert max(differences) > 10 * TOLERANCE, f"{one} and {other} say the same"
