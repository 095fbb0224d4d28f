"""The roofline model: hand-computed cases, its formulas against simulation, its kernels against the
launch plan and vLLM's own tables. (That the plan's bytes are those which the kernels load and store
is tested with the kernels.)"""

import json
import random
import re
import statistics
import sys
from dataclasses import replace
from itertools import pairwise
from math import ceil, isclose, prod
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer import Typer
from typer.testing import CliRunner

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import kernel_traffic
import roofline
import roofline_report
from roofline import ALL, BATCHES, LLAMA, MISTRAL, QKV, SETTINGS, Batch, Gpu, Kernel, Layer, Setting

from vllm_jd.kernels.triton.plan import LayerShape, plan

GPU = Gpu()
QKV_OF_MISTRAL = Layer("qkv", 4096, (4096, 1024, 1024))


# --- who is in a batch ---


@pytest.mark.parametrize(
    ("draws", "shares", "expected"),
    [
        (1, [(7, 3)], 1),
        (0, [(7, 3)], 0),
        (2, [(2, 1)], 1.5),  # the second draw is the first one's twin half of the time
        (3, [(2, 1)], 1.75),
        (2, [(1, 3), (1, 1)], 1 + 2 * 3 / 4 * 1 / 4),  # two unequal clusters
        (10**6, [(25, 40)], 25),
    ],
)
def test_expected_distinct_by_hand(draws, shares, expected):
    assert isclose(roofline.expected_distinct(draws, shares), expected)


@pytest.mark.parametrize(
    ("adapters", "clusters", "draws"), [(1024, 25, 32), (128, 7, 8), (8, 1, 3)]
)
def test_expected_distinct_by_simulation(adapters, clusters, draws):
    rng = random.Random(0)
    batches = [rng.choices(range(adapters), k=draws) for _ in range(4000)]
    seen = statistics.mean(len(set(batch)) for batch in batches)
    assert isclose(seen, roofline.expected_distinct(draws, [(adapters, 1)]), rel_tol=0.02)
    seen = statistics.mean(len({a % clusters for a in batch}) for batch in batches)
    shares = roofline.cluster_shares(adapters, clusters)
    assert isclose(seen, roofline.expected_distinct(draws, shares), rel_tol=0.02)


@given(st.integers(1, 1024), st.integers(1, 30))
def test_clusters_are_as_even_as_they_can_be(adapters, clusters):
    shares = roofline.cluster_shares(adapters, clusters)
    assert sum(n for n, _ in shares) == clusters
    assert sum(n * members for n, members in shares) == adapters
    sizes = [members for n, members in shares if n]
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize(
    ("requests", "adapters", "slots"), [(256, 1024, 28), (32, 1024, 28), (16, 4, 2), (8, 64, 8)]
)
def test_requests_that_fit_into_the_slots_by_simulation(requests, adapters, slots):
    rng = random.Random(1)
    served, distinct = [], []
    for _ in range(3000):
        taken, count = set(), 0
        for adapter in rng.choices(range(adapters), k=requests):
            if adapter in taken or len(taken) < slots:
                taken.add(adapter)
                count += 1
        served.append(count)
        distinct.append(len(taken))
    expected = roofline.served_at_once(requests, adapters, slots)
    assert isclose(statistics.mean(served), expected[0], rel_tol=0.02)
    assert isclose(statistics.mean(distinct), expected[1], rel_tol=0.02)


@given(st.integers(1, 64), st.integers(1, 100))
def test_with_a_slot_for_each_adapter_everyone_is_served(requests, adapters):
    served, distinct = roofline.served_at_once(requests, adapters, adapters)
    assert isclose(served, requests)
    assert isclose(distinct, roofline.expected_distinct(requests, [(adapters, 1)]))


# --- the models ---


def test_weights_are_those_of_the_real_models():
    # Parameters of the models as published, without embedding and norms.
    norms = 2 * 4096 * 32 + 4096
    assert MISTRAL.weights() == 7_241_732_096 - 32000 * 4096 - norms
    norms = 2 * 8192 * 80 + 8192
    assert LLAMA.weights() == 70_553_706_496 - 128256 * 8192 - norms
    assert LLAMA.weights(8) * 8 == LLAMA.weights()


def test_tensor_parallel_cuts_outputs_but_inputs_of_o_and_down():
    cut = LLAMA.linear(8)
    assert cut["qkv"] == Layer("qkv", 8192, (1024, 128, 128))
    assert cut["o"] == Layer("o", 1024, (8192,))
    assert cut["gate_up"] == Layer("gate_up", 8192, (3584, 3584))
    assert cut["down"] == Layer("down", 3584, (8192,))


# --- kernels ---


def test_one_kernel_by_hand():
    kernel = Kernel("k", basis_bytes=3.35e6, core_bytes=3.35e6, tile_flops=989e3, programs=1000)
    assert isclose(kernel.seconds(GPU), 1e-6 + 2e-6)  # memory: 2 µs; cores: 1 ns; programs: 0.5 µs
    assert isclose(replace(kernel, rounds=5).seconds(GPU), 1e-6 + 3e-6)
    assert isclose(replace(kernel, tile_flops=989e7).seconds(GPU), 1e-6 + 10e-6)
    assert isclose(replace(kernel, programs=40_000).seconds(GPU), 1e-6 + 20e-6)
    assert isclose(replace(kernel, l2_bytes=5.5e7).seconds(GPU), 1e-6 + 10e-6)
    cost = roofline.total([kernel, replace(kernel, rounds=5)], 10, GPU)
    assert cost["launches"] == 20
    assert isclose(cost["seconds"], 10 * (3e-6 + 4e-6))
    assert isclose(sum(cost["seconds_by_bound"].values()), cost["seconds"])
    assert isclose(cost["hbm_bytes"], 20 * 6.7e6)


def test_our_bytes_by_hand():
    """One token of Mistral's q, k, v at rank 16."""
    shrink, expand = roofline.our_kernels(QKV_OF_MISTRAL, 1, 1, 1, 16)
    assert shrink.basis_bytes == 3 * 16 * 4096 * 2
    assert expand.basis_bytes == 16 * 6144 * 2
    assert shrink.core_bytes + expand.core_bytes == 3 * 16 * 16 * 2
    assert shrink.activation_bytes == 4096 * 2
    assert expand.activation_bytes == 2 * 6144 * 2
    assert shrink.flops + expand.flops == 2 * (3 * 16 * 4096 + 3 * 16 * 16 + 16 * 6144)
    assert shrink.rounds == 2 + 1 and expand.rounds == 2 + 1 + 1


def test_vllms_bytes_by_hand():
    """32 tokens with 10 adapters of rank 16 in 28 slots."""
    zero, shrink, expand = roofline.stock_kernels(QKV_OF_MISTRAL, 32, 10, 29)
    assert shrink.basis_bytes == 10 * 3 * 16 * 4096 * 2
    assert expand.basis_bytes == 10 * 16 * 6144 * 2
    assert shrink.activation_bytes == 32 * 4096 * 2
    assert expand.activation_bytes == 2 * 32 * 6144 * 2
    assert zero.scratch_bytes == 32 * 3 * 16 * 4
    assert shrink.programs == 64 * 1 * 1 * 3 * 29
    assert expand.programs == 1 * 64 * 3 * 29
    assert shrink.tile_flops == 10 * 3 * 2 * 32 * 16 * 4096
    assert shrink.flops == 2 * 32 * 3 * 16 * 4096


def random_tokens(shape, tokens, adapters, clusters, rng):
    """Tokens of uniform adapters, adapter a in cluster a % clusters, in the order of clusters."""
    picks = sorted((a % clusters, a) for a in rng.choices(range(adapters), k=tokens))
    whole = kernel_traffic.uniform_content(shape, adapters, adapters, adapters)
    rows = {part[0][0].core: part for part in whole}
    assert len(rows) == adapters

    def of(cluster, adapter):
        slices = rows[adapter * len(shape.widths)]
        return tuple(
            tuple(
                replace(row, v=(cluster * len(slices) + s) * 16, u=cluster * 16) for row in rows_of
            )
            for s, rows_of in enumerate(slices)
        )

    return [of(cluster, adapter) for cluster, adapter in picks]


@pytest.mark.parametrize("tokens", [1, 8, 32, 200])
def test_expected_kernels_are_the_mean_of_the_plans_traffic_over_random_batches(tokens):
    adapters, clusters, rank = 60, 7, 16
    layer = Layer("small", 256, (256, 64, 64))
    shape = LayerShape(layer.d_in, layer.d_out, max_rank=rank)
    made = plan(shape, tokens)
    rng = random.Random(tokens)
    batches = [
        kernel_traffic.traffic(made, random_tokens(shape, tokens, adapters, clusters, rng))
        for _ in range(30)
    ]
    kernels = roofline.our_kernels(
        layer,
        tokens,
        roofline.expected_distinct(tokens, [(adapters, 1)]),
        roofline.expected_distinct(tokens, roofline.cluster_shares(adapters, clusters)),
        rank,
    )
    assert [k.name for k in kernels] == [one.kernel for one in made.launches]
    for i, (kernel, one) in enumerate(zip(kernels, made.launches, strict=True)):

        def mean(of, i=i):
            return statistics.mean(of(batch[i]) for batch in batches)

        assert kernel.programs == prod(one.grid)
        bases = mean(lambda t: t.distinct.get("v", 0) + t.distinct.get("u", 0))
        assert isclose(kernel.basis_bytes, bases, rel_tol=0.05)
        assert isclose(kernel.core_bytes, mean(lambda t: t.distinct.get("cores", 0)), rel_tol=0.05)
        y = mean(lambda t: t.stored.get("y", 0))
        moved = mean(lambda t: t.distinct.get("x", 0) + t.distinct.get("y", 0))
        assert isclose(kernel.activation_bytes, moved + y)
        assert isclose(kernel.flops, mean(lambda t: t.flops))
        # Clusters do not always straddle the ends of tiles: the model has a little more.
        loaded = mean(lambda t: t.loaded_bytes + t.stored_bytes)
        assert 0.97 * loaded <= kernel.l2_bytes <= 1.3 * loaded
        executed = mean(lambda t: t.executed)
        assert 0.97 * executed <= kernel.tile_flops <= 1.3 * executed


def test_vllms_tiles_and_grids_are_vllms():
    utils = pytest.importorskip("vllm.lora.ops.triton_ops.utils")
    shape = {"max_loras": 29, "hidden_size": 4096, "rank": 16}
    for tokens in (1, 127, 128, 2048):
        found = utils.get_lora_op_configs("shrink", batch=tokens, num_slices=3, **shape)
        tiles = roofline.stock_shrink_tiles(tokens)
        assert {key: found[key] for key in tiles} == tiles
        assert found["num_stages"] == roofline.STOCK_STAGES
    for slices, key in ((3, "block_n"), (1, "block_n_of_one_slice")):
        found = utils.get_lora_op_configs(
            "expand", batch=32, num_slices=slices, add_inputs=True, **shape
        )
        assert found["block_n"] == roofline.STOCK_EXPAND[key]
        for name in ("block_m", "block_k"):
            assert found[name] == roofline.STOCK_EXPAND[name]


@pytest.mark.parametrize("slots", [1, 5, 8, 28, 1024])
def test_rows_of_vllms_grid(slots):
    get_captured = pytest.importorskip("vllm.lora.utils").get_captured_lora_counts
    assert roofline.grid_rows(slots, 1, specialised=False) == get_captured(slots, False)[0]
    counts = get_captured(slots, True)
    for active in range(1, slots + 1):
        expected = next(count for count in counts if count >= active)
        assert roofline.grid_rows(slots, active, specialised=True) == expected


# --- the table ---


def cell(batch, adapters=1024, setting=SETTINGS[0], gpu=GPU):
    return roofline.cell(setting, batch, adapters, gpu)


def test_a_cell_by_hand():
    """Mistral-7B, q, k, v, one request."""
    c = cell(BATCHES[0])
    assert (c["rank"], c["clusters"]) == (16, 25)
    assert isclose(c["distinct_adapters"], 1) and isclose(c["distinct_clusters"], 1)
    assert isclose(c["base_seconds"], 2 * MISTRAL.weights() / 3.35e12)
    ours = c["ours"]
    assert ours["launches"] == 32 * len(ours["kernels_per_layer"])
    assert ours["basis_bytes"] == 32 * 2 * 16 * (3 * 4096 + 6144)
    assert isclose(ours["share"], ours["seconds"] / (ours["seconds"] + c["base_seconds"]))
    assert isclose(ours["rate"], 1 - ours["share"])
    stock = c["stock_all_resident"]
    assert stock["slots"] == 1024 and stock["launches"] == 32 * 3
    assert stock["slot_bytes"] == 1024 * 32 * 2 * 16 * (4096 * 3 + 6144)
    assert stock["load_seconds"] == 0


def test_slots_of_equal_memory_are_the_throughput_benchmarks():
    assert cell(BATCHES[2])["stock_equal_memory"]["slots"] == 28  # PAPER, App. F


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.name)
def test_more_requests_never_take_fewer_bytes(setting):
    cells = [cell(batch, setting=setting) for batch in BATCHES[:-1]]
    for system in roofline.SYSTEMS:
        if system == "stock_equal_memory":
            continue
        for less, more in pairwise(cells):
            assert less[system]["hbm_bytes"] < more[system]["hbm_bytes"]
            assert less[system]["flops"] < more[system]["flops"]
    for c in cells:
        assert 0 < c["ours"]["share"] < 1
        assert c["stock_equal_memory"]["requests"] <= c["requests"]
        assert c["stock_specialised"]["seconds"] <= c["stock_all_resident"]["seconds"]


def test_a_slower_machine_is_slower():
    c = cell(BATCHES[5])
    for name in ("launch_seconds", "round_seconds", "program_seconds"):
        slower = cell(BATCHES[5], gpu=replace(GPU, **{name: 50 * getattr(GPU, name)}))
        assert slower["ours"]["seconds"] > c["ours"]["seconds"], name
        assert slower["base_seconds"] == c["base_seconds"]
    slower = cell(BATCHES[5], gpu=replace(GPU, bytes_per_second=1e11))
    assert slower["base_seconds"] > c["base_seconds"]


def test_more_adapters_than_the_batch_can_ask_for_cost_only_their_clusters():
    """Same rank and clusters: 1,024 adapters need no more bases than 512."""
    few, many = cell(BATCHES[5], 512), cell(BATCHES[5], 1024)
    assert isclose(few["ours"]["basis_bytes"], many["ours"]["basis_bytes"], rel_tol=1e-3)
    assert many["ours"]["core_bytes"] > few["ours"]["core_bytes"]


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(SETTINGS), st.sampled_from([1, 3, 17, 100, 300]), st.sampled_from([4, 64, 1024])
)
def test_every_number_is_sound(setting, requests, adapters):
    c = cell(Batch("decode", requests, requests), adapters, setting)
    for system in roofline.SYSTEMS:
        found = c[system]
        assert isclose(sum(found["seconds_by_bound"].values()), found["seconds"])
        assert 0 < found["rate"] <= 1
        assert found["seconds"] >= found["launches"] * GPU.launch_seconds
        assert found["seconds"] >= found["hbm_bytes"] / GPU.bytes_per_second


def test_names_of_settings_differ():
    assert len({setting.name for setting in SETTINGS}) == len(SETTINGS) == 6
    assert {setting.targets for setting in SETTINGS} == {QKV, ALL}
    assert [layer.name for layer in Setting(LLAMA, 8, ALL).adapted()] == list(ALL)


# --- the command ---


def test_the_command_writes_table_json_and_figure(tmp_path, monkeypatch):
    for module in (roofline, roofline_report):
        batches = (BATCHES[0], BATCHES[5], Batch("prefill", 512, 4))
        monkeypatch.setattr(module, "BATCHES", batches)
        monkeypatch.setattr(module, "FIGURE_1", {4: (16, 1), 1024: (16, 25)})
    app = Typer()
    app.command()(roofline_report.main)
    out = tmp_path / "folder" / "model.json"
    result = CliRunner().invoke(app, ["--out", str(out)])
    assert result.exit_code == 0, result.output
    assert "MODEL, NOT A MEASUREMENT" in result.output
    content = json.loads(out.read_text())
    assert content["what"] == "a model, not a measurement"
    assert len(content["cells"]) == len(SETTINGS) * 2 * 3
    one = content["cells"][0]
    exact = cell(BATCHES[0], 4)
    assert isclose(one["ours"]["seconds"], exact["ours"]["seconds"], rel_tol=1e-4)
    assert out.with_suffix(".png").stat().st_size > 20_000
    text = out.with_suffix(".md").read_text()
    assert text.startswith("## Roofline (a model, not a measurement)")
    for setting in SETTINGS:
        assert f"**{setting.name}**" in text
    # One row of the table is what the JSON says.
    last = next(c for c in content["cells"] if c["adapters"] == 1024 and c["requests"] == 256)
    assert f"| {1e3 * last['ours']['seconds']:.2f} |" in text
    for prediction in content["predictions"]:
        assert prediction["low"] < prediction["model"] < prediction["high"]
        assert re.search(rf"\| {re.escape(prediction['what'])} \|", text)
    assumed, *others = content["sensitivity"]
    for row in others:
        assert row.keys() == assumed.keys()
        assert row != {**assumed, "guess": row["guess"]}, "this guess changes nothing"
    assert [row["adapters"] for row in content["figure1"]] == [4, 1024]
    for row in content["figure1"]:
        assert row["ours"] < row["base"] and ceil(row["stock_equal_memory"]) > 0
