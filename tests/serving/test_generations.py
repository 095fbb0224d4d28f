"""An engine under load that is given one generation of its store after another."""

import json
import os
import random

import pytest

from tests.forked import run
from tests.serving.conftest import MAX_MODEL_LEN, NEW_TOKENS, SHIPPED, write_short_adapter
from vllm_jd.compressor import Settings, export_adapter, read_adapters
from vllm_jd.compressor.run.compress import compress
from vllm_jd.store import Store

pytestmark = pytest.mark.slow

SWITCHES, GENERATIONS = 20, 3


def answers(job):
    """What is asked for, and what an engine says to it, in the process that it is in."""
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    from vllm_jd.plugin.api.generations import serve_generation
    from vllm_jd.plugin.api.requests import store_path
    from vllm_jd.serve import engine_args

    llm = LLM(
        job["model"],
        enforce_eager=True,
        max_model_len=MAX_MODEL_LEN,
        dtype="float32",
        block_size=32,
        max_num_batched_tokens=512,
        **engine_args(job["store"], max_num_seqs=8),
    )
    engine = llm.llm_engine
    params = SamplingParams(temperature=0, ignore_eos=True, max_tokens=NEW_TOKENS)
    choose = random.Random(0)
    asked, said = [], {}

    def ask(generation):
        name, prompt = choose.choice(job["names"]), choose.choice(job["prompts"])
        request = LoRARequest(name, 1 + choose.randrange(100), store_path(job["store"], generation))
        prompt_ids = {"prompt_token_ids": prompt}
        engine.add_request(str(len(asked)), prompt_ids, params, lora_request=request)
        asked.append([name, prompt, generation])

    def step():
        for output in engine.step():
            if output.finished:
                said[int(output.request_id.split("-")[0])] = list(output.outputs[0].token_ids)

    for switch in range(SWITCHES):
        generation = 1 + switch % GENERATIONS
        serve_generation(engine, job["store"], generation)
        for _ in range(5):
            ask(generation)
        for _ in range(4):  # fewer than it takes them to end: the next ones come among them
            step()
    while engine.has_unfinished_requests():
        step()
    return asked, [said[i] for i in range(len(asked))]


@pytest.fixture(scope="module")
def generations(tmp_path_factory):
    """A store of three generations in which the same names have other numbers; folders of each
    generation's adapters, as exported."""
    folder = tmp_path_factory.mktemp("generations")
    exports = []
    for number in range(1, GENERATIONS + 1):
        adapters = folder / f"adapters-{number}"
        for source in sorted(SHIPPED.iterdir())[:6]:
            if not source.is_dir():
                continue
            # Of the second and third generation, the adapters say something else.
            write_short_adapter(source, adapters / source.name, (3.0, -5.0, 8.0)[number - 1])
        settings = Settings(rank=12, clusters=2, store_dtype="float32", seed=number)
        compress(read_adapters([adapters]), folder / "store", settings)
        store = Store.open(folder / "store")
        assert store.generation == number
        exports.append(
            {
                name: export_adapter(store, name, folder / f"e{number}" / name)
                for name in store.names
            }
        )
        store.close()
    return folder / "store", exports


def test_every_answer_is_of_the_generation_that_its_request_named(
    generations, short, prompts, short_reference, tmp_path
):
    store, exports = generations
    job = {
        "store": str(store),
        "model": str(short),
        "names": sorted(exports[0]),
        "prompts": prompts[:3],
    }
    asked, said = run(answers, job, os.environ)
    assert len(asked) == len(said) == 5 * SWITCHES
    folders = {
        f"{name}@{number}": folder
        for number, of_one in enumerate(exports, start=1)
        for name, folder in of_one.items()
    }
    distinct = {}
    for (name, prompt, generation), tokens in zip(asked, said, strict=True):
        distinct.setdefault((f"{name}@{generation}", tuple(prompt)), []).append(tokens)
    batch = [(name, list(prompt)) for name, prompt in distinct]
    expected = short_reference.answers(folders, batch, [each[0] for each in distinct.values()])
    wrong = [
        (key[0], tokens, right)
        for (key, answers), right in zip(distinct.items(), expected, strict=True)
        for tokens in answers
        if tokens != right
    ]
    assert not wrong, f"{len(wrong)} of {len(said)}: {wrong[:3]}"
    names = {key[0].split("@")[0] for key in distinct}
    assert any(
        len({json.dumps(distinct[key]) for key in distinct if key[0].startswith(f"{name}@")}) > 1
        for name in names
    ), "the generations say the same: this shows nothing"
