"""Step `tuned`: the fixed list of configurations on each layer, and the best as a table.

The file that it writes is the table: copied to `vllm_jd/kernels/triton/tuned/`, under the name that
stands in it, it is what the kernels are launched with on such a GPU from then on.
"""

from dataclasses import replace
from typing import Any

import torch
from shapes import Layer

from gpu_steps.layers import candidates, draw, make_pools, our_call
from gpu_steps.limit import between, copies, layers, net, settings
from gpu_steps.step import Call, Flush, Step, alternate, main, recorded
from vllm_jd.kernels.triton import backend, tuning
from vllm_jd.kernels.triton.plan import DEFAULT, Config, LayerShape, plan

TOKENS = (32, 64, 128, 256, 8, 1, 2048)  # the first ones gain most
ROUNDS = 12
SECONDS_OF_A_CELL = 6.0  # about, with compiling
WORTH = 0.97  # another configuration than the default must take at most so much of its time


def run(step: Step) -> None:
    """Time them, and write the best of each so far."""
    dtype = torch.bfloat16
    flush = Flush(step.device)
    step.put("file", tuning.table_path(step.content["device"]["name"]).name)
    step.put("entries", [])
    for tokens in (2,) if step.small else TOKENS:
        for model, layer in layers(step):
            what = f"{model} {layer.name}, {tokens} tokens"
            if not step.enough(0 if step.small else SECONDS_OF_A_CELL, what):
                continue
            try:
                tune(step, model, layer, tokens, dtype, flush)
            except Exception as error:  # one shape must not hide the others
                step.fault(what, error)
                if step.on_gpu:
                    torch.cuda.synchronize()  # raises, and so ends the step, if the device is gone
    # The table is read from the file that was written: what cannot be read is found out here.
    tuning.read_table.cache_clear()
    read = tuning.read_table(step.out)
    if len(read) != len(step.content["entries"]):
        step.fault("the table", f"{len(read)} of {len(step.content['entries'])} entries were read")


def distinct(shape: LayerShape, tokens: int) -> dict[str, Config]:
    """Those of the fixed list that launch different things for so many tokens."""
    found: dict[Any, tuple[str, Config]] = {}
    for name, config in candidates(tokens).items():
        one = plan(shape, tokens, config)
        found.setdefault((one.launches, one.split_width), (name, config))
    return dict(found.values())


def tune(
    step: Step, model: str, layer: Layer, tokens: int, dtype: torch.dtype, flush: Flush
) -> None:
    """Time all on one shape."""
    adapters, rank, clusters = settings(step)
    slots, order = draw(tokens, adapters, step.device, clusters=clusters)
    pools = [
        make_pools(layer, adapters, rank, clusters, step.device, dtype) for _ in range(copies(step))
    ]
    shape = backend.prepare(pools[0], rank, DEFAULT)
    graphs: dict[str, Call] = {"empty": recorded([flush] * copies(step), step.device)}
    kept, configs, failed = [], distinct(shape, tokens), {}
    for name, config in configs.items():
        # The same numbers with launches of their own.
        made = [our_call(layer, tokens, replace(p), config, slots, order) for p in pools]
        try:
            graphs[name] = recorded(between(flush, [call for call, *_ in made]), step.device)
        except Exception as error:  # one that does not launch must not hide the others
            failed[name] = f"{type(error).__name__}: {error}"[:200]
            continue
        kept.append(made)
    found = net(alternate(graphs, step.device, ROUNDS if step.on_gpu else 1), copies(step))
    times = {name: each["median"] for name, each in found.items()}
    best = min(times, key=times.__getitem__)
    if DEFAULT.name in times and times[best] > WORTH * times[DEFAULT.name]:
        best = DEFAULT.name
    step.add(
        "entries",
        {
            **tuning.row(shape, tokens, configs[best]),
            "model": model,
            "layer": layer.name,
            "best": best,
            "microseconds": found,
            "failed": failed,
        },
    )


if __name__ == "__main__":
    main("tuned", run)
