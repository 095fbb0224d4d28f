"""Step `model`: a step of a whole model, Figure 1 of the paper without the server around it.

Mistral-7B's architecture with random weights; adapters on q, k and v; decoding steps as captured
graphs, and a prefill. All systems in turn, so that the ratios hold. The base is transformers',
whose small kernels a server would fuse: so what the adapters add is also given in microseconds.
"""

from math import ceil
from typing import Any

import torch
from shapes import MISTRAL, slots_of_equal_memory

from gpu_steps import stock
from gpu_steps.layers import ADAPTERS, CLUSTERS, RANK, StockPools, draw, make_pools
from gpu_steps.mistral import Batch, Model, Ours, Stock
from gpu_steps.step import Call, Step, alternate, main, summary

BATCHES = (32, 1, 256, 8, 64, 128)  # the first ones tell most
PREFILL = (16, 128)  # prompts, tokens of each
LENGTH = 256  # of each sequence in a decoding step
ROUNDS = 15
SECONDS_OF_A_BATCH = 8  # about
LARGER_CORES = 30.0  # so that adapters change the logits by more than rounding to 16 bits does
LEAST_CHANGE = 0.05  # of the logits by adapters, relatively
MOST_ERROR = 0.2  # of that change: rounding; another adapter than the right one gives more than 1


class Adapted:
    """The model with the adapters of all systems.

    Args:
        step: says how large.
        adapters: resident in our pools.
        slots: of vLLM's, each a number of places; each has pools of its own.
    """

    def __init__(self, step: Step, adapters: int, slots: tuple[int, ...]) -> None:
        self.rank, self.clusters = (4, 3) if step.small else (RANK, CLUSTERS)
        dtype = torch.bfloat16 if step.on_gpu else torch.float16
        self.model = Model(step.device, dtype, small=step.small)
        layer, layers = self.model.layer, range(len(self.model.qkv))
        self.adapters = adapters
        self.pools = [
            make_pools(layer, adapters, self.rank, self.clusters, step.device, dtype)
            for _ in layers
        ]
        for part in self.pools:
            part.cores.mul_(LARGER_CORES)
        self.ops = stock.load(step.bundle)
        if self.ops is None:
            step.skip("vLLM's kernels", "no bundle with them (make gpu-first-bundle)")
        self.stock_pools = {
            n: [StockPools.random(layer, n, step.device, dtype) for _ in layers] for n in slots
        }

    def ours(self, tokens: int) -> Ours:
        """Our system for so many tokens."""
        return Ours(self.pools, tokens, self.clusters)

    def stock(self, slots: int, tokens: int) -> Stock:
        """vLLM's with so many slots."""
        return Stock(self.ops, self.stock_pools[slots], tokens)


def equal_slots(small: bool) -> int:
    """Slots of vLLM's that take the memory of our pools (the paper's App. F)."""
    if small:
        return 3
    shapes = [(MISTRAL.hidden, width) for width in (MISTRAL.hidden, MISTRAL.kv, MISTRAL.kv)]
    return ceil(slots_of_equal_memory(shapes, ADAPTERS, RANK, CLUSTERS))


@torch.inference_mode()
def run(step: Step) -> None:
    """Measure, the most telling first."""
    step.doing("random weights and adapters")
    slots = equal_slots(step.small)
    adapted = Adapted(step, 12 if step.small else ADAPTERS, (1, slots))
    adapted.model.merge(adapted.stock_pools[1])
    step.put(
        "setting",
        {
            "adapters": adapted.adapters,
            "rank": adapted.rank,
            "clusters": adapted.clusters,
            "equal_slots": slots,
            "length": LENGTH,
            "weight_bytes": adapted.model.weight_bytes,
            "vllm": stock.packed_version(step.bundle),
        },
    )
    step.doing("the logits are right")
    step.put("right", right(step, adapted))
    for sequences in (2,) if step.small else BATCHES:
        if step.enough(SECONDS_OF_A_BATCH, f"decode {sequences}"):
            length = 5 if step.small else LENGTH
            batch = Batch.decode(adapted.model, sequences, length)
            measure(step, adapted, f"decode {sequences}", batch, slots)
    prompts, length = (1, 3) if step.small else PREFILL
    if step.enough(SECONDS_OF_A_BATCH, f"prefill {prompts * length}"):
        batch = Batch.prefill(adapted.model, prompts, length)
        measure(step, adapted, f"prefill {prompts * length}", batch, slots)


def right(step: Step, adapted: Adapted) -> dict[str, Any]:
    """That no adapter changes no bit, and adapters what the plain torch path says."""
    sequences = 2 if step.small else 8
    batch = Batch.decode(adapted.model, sequences, 5 if step.small else LENGTH)
    ours = adapted.ours(sequences)
    ours.ask([-1] * sequences)
    batch.logits()  # the first call of a product may choose another algorithm than all after it
    base = batch.logits().clone()
    same = torch.equal(batch.logits(ours), base)
    again = torch.equal(batch.logits(), base)
    ours.ask([7 * n % adapted.adapters for n in range(sequences)])
    mine, wanted = batch.logits(ours).double(), batch.logits(ours.reference()).double()
    error = float((mine - wanted).norm() / wanted.norm())
    changed = float((wanted - base.double()).norm() / base.double().norm())
    if not again:
        step.skip("tokens without adapter", "the base model's own logits change from call to call")
    elif not same:
        step.fault("tokens without adapter", "their logits are not those of the base model")
    if not changed > LEAST_CHANGE:
        step.fault("logits", f"adapters change them by {changed:.3g} only: nothing was compared")
    elif not error < MOST_ERROR * changed:
        step.fault(
            "logits",
            f"{error:.3g} off the plain torch path, relatively; adapters change them by "
            f"{changed:.3g}",
        )
    return {
        "unchanged_without_adapter": same,
        "base_repeats": again,
        "error": error,
        "changed_by": changed,
    }


def measure(step: Step, adapted: Adapted, name: str, batch: Batch, slots: int) -> None:
    """All systems on one batch, in turn."""
    try:
        step.add("batches", {"batch": name, **times(step, adapted, batch, slots)})
    except Exception as error:  # one batch must not hide the others
        step.fault(name, error)
        if step.on_gpu:
            torch.cuda.synchronize()  # raises, and so ends the step, if the device is gone


def times(step: Step, adapted: Adapted, batch: Batch, slots: int) -> dict[str, Any]:
    """Microseconds of a step of each system."""
    tokens = batch.size
    uniform = draw(tokens, adapted.adapters, "cpu", clusters=adapted.clusters)[0].tolist()
    step.doing(f"graphs of {tokens} tokens")
    graphs: dict[str, Call] = {"base": batch.graph(), "merged": batch.graph(merged=True)}
    systems: list[Any] = []  # graphs read what they hold
    asked = {"ours": uniform, "ours, one adapter": [5] * tokens}
    for which, adapters in asked.items():
        systems.append(adapted.ours(tokens))
        systems[-1].ask(adapters)
        step.doing(f"{which}: graph of {tokens} tokens")
        graphs[which] = batch.graph(systems[-1])
    if adapted.ops is not None:
        adapted.ops.forget()
        of_slots = {"vLLM, one adapter": (1, [0] * tokens)}
        of_slots[f"vLLM, {slots} resident"] = (slots, [a % slots for a in uniform])
        for which, (n, adapters) in of_slots.items():
            systems.append(adapted.stock(n, tokens))
            systems[-1].ask(adapters)
            step.doing(f"{which}: graph of {tokens} tokens")
            graphs[which] = batch.graph(systems[-1])
    step.doing(f"replays of {tokens} tokens")
    taken = alternate(graphs, step.device, ROUNDS if step.on_gpu else 1)
    found = {which: summary(each) for which, each in taken.items()}
    base = found["base"]["median"]
    return {
        "tokens": tokens,
        "adapters": len(set(uniform)),
        "microseconds": found,
        "of_base": {which: base / each["median"] for which, each in found.items()},
        "added_microseconds": {which: each["median"] - base for which, each in found.items()},
        "base_weight_bytes_per_second": 1e6 * adapted.model.weight_bytes / base,
    }


if __name__ == "__main__":
    main("model", run)
