"""The throughput benchmark without its servers: workload, client, and what is made of the times."""

import asyncio
import json
import re
import sys
import threading
import time
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import load
import servers
import throughput
import throughput_figures
import verse
from synthetic import RandomCollection


@pytest.fixture(scope="module")
def tokenizer():
    """A token a word: fewer than any real one makes."""
    words = sorted({word for poem in verse.verses(2000, "words") for word in poem.split()})
    vocabulary = {word: i for i, word in enumerate([*words, "?"])}
    result = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    result.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return result


def requests_of(load_, tokenizer, **kwargs):
    options = {"shape": load.SONNET, "traffic": "uniform", "adapters": 8, "seed": "1"} | kwargs
    return load.make_requests(load_, tokenizer=tokenizer, **options)


# Verse


def test_verses_are_seeded():
    assert verse.verses(5, 1) == verse.verses(5, 1)
    assert not set(verse.verses(50, 1)) & set(verse.verses(50, 2))


def test_verses_are_about_as_long_as_sonnets():
    # Shakespeare's have 14 lines and about 105 to 130 words.
    poems = verse.verses(200, "length")
    assert {poem.count("\n") for poem in poems} == {13}
    words = [len(poem.split()) for poem in poems]
    assert 105 < np.mean(words) < 130
    assert min(words) > 80 and max(words) < 160


def test_verses_share_no_prefix():
    poems = verse.verses(2000, "prefixes")
    assert len({poem.split("\n")[0] for poem in poems}) == len(poems)
    # Two may begin with the same few words, but not with as many as one block of vLLM's prefix
    # cache holds: 16 tokens.
    words = sorted(poem.split()[:16] for poem in poems)
    assert all(one[:12] != other[:12] for one, other in pairwise(words))


def test_verses_have_every_word_filled_in():
    text = " ".join(verse.verses(300, "words"))
    assert "{" not in text and "}" not in text
    assert all(word in text for words in verse.WORDS.values() for word in words[:3])


def test_read_verses(tmp_path):
    file = tmp_path / "sonnets.txt"
    file.write_text("One\ntwo\n\n\n\nThree\r\nfour\r\n\r\nFive\n")
    assert verse.read_verses(file) == ["One\ntwo", "Three\nfour", "Five"]
    file.write_text("\n \n")
    with pytest.raises(ValueError, match="no text"):
        verse.read_verses(file)


# Workload


@pytest.mark.parametrize("rate", [0.5, 4, 80])
def test_poisson_arrivals(rate):
    times = load.poisson(rate, 20_000, np.random.default_rng(0))
    gaps = np.diff(times, prepend=0)
    assert (gaps >= 0).all()
    # Mean and standard deviation of an exponential are equal; 20,000 draws know them to 1 %.
    assert gaps.mean() == pytest.approx(1 / rate, rel=0.04)
    assert gaps.std() == pytest.approx(1 / rate, rel=0.06)
    # Memoryless: what came before says nothing of what comes next.
    assert abs(np.corrcoef(gaps[1:], gaps[:-1])[0, 1]) < 0.03
    assert (times == load.poisson(rate, 20_000, np.random.default_rng(0))).all()


def test_uniform_assignment():
    counts = np.bincount(load.assign("uniform", 16, 32_000, np.random.default_rng(0)))
    assert len(counts) == 16
    assert np.abs(counts - 2000).max() < 5 * np.sqrt(2000)


def test_zipf_assignment():
    counts = np.bincount(load.assign("zipf", 100, 100_000, np.random.default_rng(0)), minlength=100)
    expected = 100_000 / np.arange(1, 101) / sum(1 / k for k in range(1, 101))
    assert np.abs(counts - expected).max() < 5 * np.sqrt(expected.max())
    assert np.abs(counts[50:] - expected[50:]).max() < 5 * np.sqrt(expected[50])


def test_one_adapter_only():
    assert set(load.assign("one", 100, 50, np.random.default_rng(0)).tolist()) == {0}
    with pytest.raises(ValueError, match="choose from"):
        load.assign("two", 100, 50, np.random.default_rng(0))


def test_same_moments_and_prompts_whatever_the_adapters(tokenizer):
    poisson = load.Load(20, rate=3)
    few = requests_of(poisson, tokenizer, adapters=2)
    many = requests_of(poisson, tokenizer, adapters=1000, traffic="zipf")
    assert [(r.due, r.prompt) for r in few] == [(r.due, r.prompt) for r in many]
    assert {r.adapter for r in few} == {0, 1}
    other = requests_of(poisson, tokenizer, seed="2")
    assert not {r.due for r in few} & {r.due for r in other}
    assert [r.due for r in few] == sorted(r.due for r in few)


def test_fewer_requests_are_the_first_of_more(tokenizer):
    # So that slow systems, which get fewer, get the same ones.
    more = requests_of(load.Load(20, rate=3), tokenizer)
    fewer = requests_of(load.Load(5, rate=3), tokenizer)
    assert [(r.due, r.prompt) for r in fewer] == [(r.due, r.prompt) for r in more[:5]]


@pytest.mark.parametrize("shape", [load.DECODE, load.PREFILL])
def test_prompts_of_so_many_tokens(shape, tokenizer):
    made = requests_of(load.Load(12, 4), tokenizer, shape=shape)
    assert {len(request.prompt) for request in made} == {shape.prompt_tokens}
    assert len({tuple(request.prompt) for request in made}) == 12
    assert {(request.due, request.new_tokens) for request in made} == {(0.0, shape.new_tokens)}


def test_prompts_of_a_file(tokenizer):
    made = requests_of(load.Load(100, 4), tokenizer, poems=["a", "b"])
    assert {request.prompt for request in made} == {"a", "b"}


# Memory


def test_equal_memory_is_the_paper_formula():
    for n, (r, c) in servers.FIGURE_1.items():
        d = 4096
        stored = 2.0 * d * r * c + n * (r**2 + (1 if c > 1 else 0))
        expected = stored / (2.0 * d * 16)
        assert servers.slots_of_equal_memory([(d, d)], n, r, c) == pytest.approx(expected)
        # Any number of equal modules changes nothing.
        assert servers.slots_of_equal_memory([(d, d)] * 3, n, r, c) == pytest.approx(expected)


def test_equal_memory_of_the_paper_settings():
    # App. F lists these (rounded up; it has 10 for 256 and 26 for 512, where its formula says
    # 10.5 and 26.004).
    listed = {4: 2, 8: 2, 16: 3, 32: 5, 64: 6, 128: 8, 256: 11, 512: 27, 1024: 28}
    for n, slots in listed.items():
        assert (
            np.ceil(servers.slots_of_equal_memory([(4096, 4096)], n, *servers.FIGURE_1[n])) == slots
        )


def test_equal_memory_of_narrow_layers():
    # Keys and values are narrower, their cores are not.
    shapes = [(576, 576), (576, 192), (576, 192)]
    assert servers.slots_of_equal_memory(shapes, 1024, 16, 25) == pytest.approx(
        (25 * 16 * 2688 + 3 * 1024 * 257) / (16 * 2688)
    )


# Summaries


def record(due, chunks, adapter=0, prompt=100, error=None):
    chunks = list(chunks)
    return load.Record(adapter, due, chunks, prompt, len(chunks), error)


def run_of(records, system="base", number=1, wave=1, load_=None, traffic="none"):
    load_ = load_ or load.Load(len(records), 4)
    return load.Run(system, number, wave, load.SONNET, load_, traffic, records)


times = st.floats(0, 100, allow_nan=False)


@given(st.lists(st.tuples(times, st.lists(times, min_size=1, max_size=6)), min_size=1, max_size=20))
@settings(max_examples=60, deadline=None)
def test_summary_against_numpy(drawn):
    records = [record(due, due + 0.1 + np.sort(np.array(gaps))) for due, gaps in drawn]
    found = load.summarise([run_of(records)])
    ttft = np.array([r.chunks[0] - r.due for r in records])
    gaps = np.concatenate([np.diff(r.chunks) for r in records])
    for q in (50, 95, 99):
        assert found["ttft_seconds"][f"p{q}"] == pytest.approx(np.quantile(ttft, q / 100))
        if len(gaps):
            assert found["inter_token_seconds"][f"p{q}"] == pytest.approx(
                np.quantile(gaps, q / 100)
            )
    if not len(gaps):
        assert found["inter_token_seconds"] is None
    seconds = max(r.end for r in records)
    assert found["requests_per_second"] == pytest.approx(len(records) / seconds)
    output = sum(len(r.chunks) for r in records)
    assert found["output_tokens_per_second"] == pytest.approx(output / seconds)
    assert found["total_tokens_per_second"] == pytest.approx(
        (output + 100 * len(records)) / seconds
    )
    assert found["requests"] == len(records) and found["errors"] == 0


def test_rates_are_medians_over_runs():
    runs = [run_of([record(0, [seconds])]) for seconds in (1, 2, 10)]
    assert load.summarise(runs)["requests_per_second"] == 0.5


def test_arrivals_are_those_that_came():
    records = [record(due, [due + 5]) for due in (0.5, 1.0, 4.0)]
    found = load.summarise([run_of(records, load_=load.Load(3, rate=2.0))])
    assert found["offered_requests_per_second"] == 2
    assert found["arrivals_per_second"] == pytest.approx(3 / 4)
    assert found["requests_per_second"] == pytest.approx(3 / 9)


def test_failed_requests_count_as_such_only():
    runs = [run_of([record(0, [2, 4]), record(0, [9], error="HTTP 500: no")])]
    found = load.summarise(runs)
    assert (found["requests"], found["errors"], found["first_error"]) == (2, 1, "HTTP 500: no")
    assert found["requests_per_second"] == 0.25
    assert found["ttft_seconds"]["p99"] == 2
    none = load.summarise([run_of([record(0, [], error="HTTP 500: no")])])
    assert none["requests_per_second"] == 0 and none["ttft_seconds"] is None


def test_distinct_adapters_in_flight():
    # 0 ··· 1 ··· 2 ··· 3 ··· 4: adapters {0}, {0, 1}, {0, 1}, {0}
    records = [record(0, [3], adapter=0), record(1, [2, 3], adapter=1), record(2, [4], adapter=0)]
    mean, most = load.distinct_in_flight(records)
    assert most == 2
    assert mean == pytest.approx((1 + 2 + 2 + 1) / 4)
    assert load.distinct_in_flight([]) == (0.0, 0)


def test_ratios_are_taken_within_wave_and_round():
    def at(rate):
        return [record(0, [1 / rate])]

    runs = [
        run_of(at(10), "base", 1, 1), run_of(at(8), "jd-4", 1, 1, traffic="uniform"),
        run_of(at(20), "base", 2, 1), run_of(at(18), "jd-4", 2, 1, traffic="uniform"),
        run_of(at(5), "base", 1, 2), run_of(at(1), "stock-4", 1, 2, traffic="uniform"),
        run_of(at(9), "base-eager", 1, 0),
    ]  # fmt: skip
    rows = {row["system"]: row for row in throughput.rows(runs, "base")}
    assert rows["base"]["ratio_of_each_round"] == [1, 1, 1]
    assert rows["jd-4"]["ratio_of_each_round"] == pytest.approx([0.8, 0.9])
    assert rows["jd-4"]["ratio_to_base"] == pytest.approx(0.85)
    assert rows["stock-4"]["ratio_to_base"] == pytest.approx(0.2)
    assert rows["base-eager"]["ratio_to_base"] is None
    assert all(row["ratio_to_base"] is None for row in throughput.rows(runs, None))


def test_records_keep_everything():
    assert record(1.5, [2.0, 2.25], adapter=3).row() == [3, 1500.0, 100, 2, [500.0, 750.0]]
    assert record(0, [], error="no").row()[-1] == "no"


# Client


@contextmanager
def stub_server(app):
    """`app` on a port of its own; yields its URL."""
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def stub():
    """Answers as vLLM does, by name of the model: `fast`, `slow`, and several that fail."""
    app = FastAPI()
    app.state.now = app.state.most = 0
    app.state.seen = []

    @app.post("/v1/completions")
    async def complete(request: Request):
        body = await request.json()
        model = body["model"]
        app.state.seen.append(body)
        if model == "unknown":
            return JSONResponse({"error": {"message": "no such model"}}, 404)

        async def stream():
            app.state.now += 1
            app.state.most = max(app.state.most, app.state.now)
            first, between = (0.2, 0.05) if model == "slow" else (0.02, 0.01)
            count = body["max_tokens"] - (model == "short")
            await asyncio.sleep(first)
            while model == "crowd" and app.state.most < 120:
                await asyncio.sleep(0.01)
            for i in range(count):
                yield data({"choices": [{"text": f" {i}"}]})
                if model == "breaks":
                    yield data({"error": {"message": "engine died"}})
                    break
                await asyncio.sleep(between)
            app.state.now -= 1
            if model == "garbled":
                yield 'data: {"choices": [\n\n'
            usage = {"prompt_tokens": 7, "completion_tokens": count}
            yield data({"choices": [], "usage": usage})
            yield "data: [DONE]\n\n"

        return StreamingResponse(stream(), media_type="text/event-stream")

    def data(event):
        return f"data: {json.dumps(event)}\n\n"

    with stub_server(app) as url:
        yield app, url


def send(stub, names, requests, concurrency=None):
    app, url = stub
    app.state.most = 0
    return asyncio.run(load.send(url, names, requests, concurrency=concurrency, timeout=20))


def test_client_takes_times_in_order(stub):
    requests = [load.Request(0.05 * i, i % 2, f"poem {i}", 5) for i in range(6)]
    records = send(stub, ["fast", "slow"], requests)
    for asked, got in zip(requests, records, strict=True):
        assert got.error is None
        assert (got.adapter, got.due) == (asked.adapter, asked.due)
        assert (got.prompt_tokens, got.output_tokens, len(got.chunks)) == (7, 5, 5)
        assert got.due < got.chunks[0]
        assert got.chunks == sorted(got.chunks) and got.end == got.chunks[-1]
        first, between = (0.2, 0.05) if asked.adapter else (0.02, 0.01)
        # Never sooner than the server sent it (loosely: its clock is another one's sleep).
        assert got.chunks[0] - got.due > 0.9 * first
        assert got.end - got.chunks[0] > 0.9 * 4 * between
    found = load.summarise([run_of(records)])
    assert found["ttft_seconds"]["p99"] > 0.18
    assert found["inter_token_seconds"]["p50"] > 0.009


def test_client_asks_as_vllm_wants_it(stub):
    send(stub, ["fast"], [load.Request(0, 0, [1, 2, 3], 2)])
    body = stub[0].state.seen[-1]
    assert body["prompt"] == [1, 2, 3] and body["model"] == "fast" and body["max_tokens"] == 2
    assert body["stream"] and body["ignore_eos"] and body["stream_options"]["include_usage"]


def test_closed_loop_keeps_its_concurrency(stub):
    records = send(stub, ["fast"], [load.Request(0, 0, "x", 3) for _ in range(12)], concurrency=3)
    assert stub[0].state.most == 3
    assert len(records) == 12 and all(r.error is None for r in records)
    # The fourth is sent when one of the first three has been answered.
    ends = sorted(r.end for r in records)
    assert sorted(r.due for r in records)[3] >= ends[0]


def test_open_loop_waits_for_nobody(stub):
    # No answer before there are 120 requests: more than aiohttp would send at once by itself.
    records = send(stub, ["crowd"], [load.Request(0.0, 0, "x", 3) for _ in range(120)])
    assert stub[0].state.most == 120
    assert all(r.error is None for r in records)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("unknown", "HTTP 404.*no such model"),
        ("breaks", "in the stream.*engine died"),
        ("short", "2 tokens in 2 pieces came, 3 were asked for"),
        ("garbled", "JSONDecodeError"),
    ],
)
def test_errors_are_counted(stub, model, message):
    requests = [load.Request(0, i % 2, "x", 3) for i in range(4)]
    records = send(stub, ["fast", model], requests, concurrency=2)
    assert [r.error is None for r in records] == [True, False, True, False]
    found = load.summarise([run_of(records)])
    assert (found["requests"], found["errors"]) == (4, 2)
    assert re.search(message, found["first_error"])


def test_no_server_at_all():
    (record_,) = asyncio.run(
        load.send("http://127.0.0.1:9", ["x"], [load.Request(0, 0, "x", 3)], concurrency=1)
    )
    assert "Connect" in record_.error


# Systems


def test_merged_model_is_the_sum(tmp_path):
    model = tmp_path / "tiny"
    model.mkdir()
    config = {"hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1}
    config |= {"num_hidden_layers": 2, "intermediate_size": 32}
    (model / "config.json").write_text(json.dumps(config))
    (model / "tokenizer.json").write_text("{}")
    collection = RandomCollection(model, 1, rank=4, scale=0.5, seed=3)
    weights = {
        f"{module}.weight": torch.randn(d_out, d_in).bfloat16()
        for module, (d_in, d_out) in collection.shapes.items()
    }
    weights["lm_head.weight"] = torch.randn(3, 16).bfloat16()
    split = sorted(weights)
    for i, keys in enumerate((split[:4], split[4:])):  # as shards
        save_file({key: weights[key] for key in keys}, model / f"model-{i}.safetensors")

    servers.write_merged(model, collection, tmp_path / "merged")

    assert {f.name for f in (tmp_path / "merged").iterdir()} == {f.name for f in model.iterdir()}
    merged = {
        key: tensor
        for file in (tmp_path / "merged").glob("*.safetensors")
        for key, tensor in load_file(file).items()
    }
    assert merged.keys() == weights.keys()
    assert torch.equal(merged["lm_head.weight"], weights["lm_head.weight"])
    collection.write_peft(0, tmp_path / "peft")
    adapter = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    for module in collection.shapes:
        prefix = f"base_model.model.{module}"
        a, b = (adapter[f"{prefix}.lora_{x}.weight"].double() for x in "AB")
        expected = weights[f"{module}.weight"].double() + b @ a
        # Rounding: of the sum to bfloat16, and of the adapter's file.
        torch.testing.assert_close(
            merged[f"{module}.weight"].double(), expected, rtol=2**-8, atol=0.02
        )
        assert not torch.equal(merged[f"{module}.weight"], weights[f"{module}.weight"])


def test_merging_needs_all_weights(tmp_path):
    model = tmp_path / "tiny"
    model.mkdir()
    config = {"hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1}
    config |= {"num_hidden_layers": 1, "intermediate_size": 32}
    (model / "config.json").write_text(json.dumps(config))
    save_file({"lm_head.weight": torch.ones(2, 2)}, model / "model.safetensors")
    with pytest.raises(ValueError, match=r"k_proj, nor of 2 others"):
        servers.write_merged(model, RandomCollection(model, 1, rank=2), tmp_path / "merged")


def test_suites_name_systems_that_exist():
    for suite in throughput.SUITES.values():
        assert set(suite.stock_adapters) <= servers.FIGURE_1.keys()
        assert all(n in servers.FIGURE_1 or n > servers.LARGEST for n in suite.adapters)
        assert set(suite.traffics) <= set(load.TRAFFICS)
        assert suite.alive > len({"base"} & set(suite.kinds))
        # vLLM's queue must not stand in for the client's.
        assert max(suite.concurrencies) <= suite.max_num_seqs


@pytest.mark.parametrize(
    ("asked", "chosen"),
    [
        (None, ["base", "base-eager", "jd-1024"]),
        ("base", ["base"]),
        ("jd,base-eager", ["base-eager", "jd-1024"]),
        ("jd-1024", ["jd-1024"]),
    ],
)
def test_choosing_systems(asked, chosen):
    assert throughput._choose(throughput.SUITES["cells"], asked) == chosen


# Figures


def test_figures(tmp_path):
    jd = {"uniform": 0.9, "one": 0.95}
    runs = []
    for concurrency in (1, 8):
        at = load.Load(2, concurrency)
        runs.append(run_of([record(0, [0.2])] * 2, "base", load_=at))
        runs += [
            run_of([record(0, [0.2 / part])] * 2, system, load_=at, traffic=traffic)
            for system in ("jd-4", "jd-1024", "stock-4", "stock-1024")
            for traffic, part in jd.items()
        ]
    for rate in (1.0, 5.0):
        at = load.Load(2, rate=rate)
        runs.append(run_of([record(0.1, [0.2])] * 2, "base", load_=at))
        runs.append(run_of([record(0.1, [0.3])] * 2, "jd-1024", load_=at, traffic="uniform"))
    systems = [
        {"name": name, "kind": servers.kind_of(name), "adapters": int(n or 0)}
        for name, _, n in (
            word.partition("-") for word in ("base", "jd-4", "jd-1024", "stock-4", "stock-1024")
        )
    ]
    for system in systems:
        system["name"] += f"-{system['adapters']}" if system["adapters"] else ""
    content = {
        "model": "tiny", "machine": "this one", "base": "base", "systems": systems,
        "rows": throughput.rows(runs, "base"),
    }  # fmt: skip
    drawn = throughput_figures.draw(content, tmp_path / "x.json")
    assert [file.name for file in drawn] == ["x-figure1.png", "x-figure4.png", "x-cells.png"]
    assert all(file.stat().st_size > 5000 for file in drawn)
    content["rows"] = []
    assert throughput_figures.draw(content, tmp_path / "y.json") == []


def test_a_large_store_shares_the_small_ones_bases_and_has_cores_of_its_own(
    tmp_path, write_adapters
):
    from large_store import write_large_store

    from vllm_jd.compressor import Settings, read_adapters
    from vllm_jd.compressor.run.compress import compress
    from vllm_jd.store import Store

    write_adapters(tmp_path / "adapters", 5, kind="random")
    collection = read_adapters([tmp_path / "adapters"])
    small = compress(collection, tmp_path / "small", Settings(rank=3, clusters=2))
    write_large_store(small, tmp_path / "large", 23)
    large = Store.open(tmp_path / "large")
    assert len(large) == 23
    module = small.manifest.modules[0]
    bases = large.bases(module.name)
    assert torch.equal(bases.u, small.bases(module.name).u)
    assert len(large.cores(0, 23).unique(dim=0)) == 23
    for i in (0, 22):
        b, a = large.factors(large.names[i])[module.name]
        line = bases.rows[int(small.chosen[i % 5, 0, 0])].tolist()
        u, v = (
            rows[start : start + 3].double()
            for rows, start in ((bases.u, line[1]), (bases.v, line[0]))
        )
        core = large.cores(i, i + 1)[0, module.core_offset :][:9].double().view(3, 3)
        torch.testing.assert_close(b.double() @ a.double(), u.T @ core @ v, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("suite", "store_dtype", "message"),
    [
        ("cpu", "int3", "--store-dtype is int3; choose from bfloat16, int8, int4"),
        ("paging", "int8", "--store-dtype int8: stores of more than 1024 are bfloat16 only"),
    ],
)
def test_a_store_dtype_that_cannot_be(suite, store_dtype, message, tmp_path, capfd):
    with pytest.raises(typer.Exit) as stopped:
        throughput.main(tmp_path / "out.json", suite=suite, store_dtype=store_dtype)
    assert stopped.value.exit_code == 1
    assert message in capfd.readouterr().err


def test_a_quantised_store_has_a_folder_of_its_own(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(
        servers, "compress", lambda collection, path, settings, **_: made.append((path, settings))
    )
    monkeypatch.setattr(servers.Store, "open", lambda path: path)
    monkeypatch.setattr(servers, "RandomCollection", lambda *args, **options: None)
    monkeypatch.setattr(servers, "read_base_model", lambda model: None)
    for store_dtype in ("bfloat16", "int8"):
        site = servers.Site(
            model=Path("/models/tiny"),
            work=tmp_path,
            flags=(),
            max_num_seqs=8,
            cuda=False,
            eager=True,
            store_dtype=store_dtype,
            say=print,
        )
        servers._store(site, 4)
    assert [settings.store_dtype for _, settings in made] == ["bfloat16", "int8"]
    assert [path.name for path, _ in made] == ["tiny-4-r16-c1", "tiny-4-r16-c1-int8"]
