"""A basis that is paged in alone lies as it does where all are put at once, in every form."""

import numpy as np
import pytest
import torch

pytest.importorskip("vllm")

from vllm_jd.kernels import Int8Rows
from vllm_jd.plugin.engine.residency import SlotClass
from vllm_jd.plugin.worker.bases import CodedRows, PackedInt8, PackedRows, PlainRows, Spans
from vllm_jd.store.quantise import quantise

WIDTHS = {"v": 70, "u": 40}  # no whole blocks: the ends are padded
RANKS = (3, 8, 16)
COUNT = 3  # of each rank


def memory(form):
    """All that a form holds, in bytes."""
    parts = [getattr(form, "packed", form.v), form.v, *form.u]
    for rows in (getattr(form, "v_int8", None), *getattr(form, "u_int8", ())):
        parts += [] if rows is None else [rows.codes, rows.steps]
    return [part.contiguous().view(-1).view(torch.uint8) for part in parts]


@pytest.mark.parametrize("side", ["v", "u"])
@pytest.mark.parametrize("form", [PlainRows, CodedRows, PackedRows, PackedInt8])
def test_one_by_one_is_all_at_once(form, side):
    own = [SlotClass(rank, i * COUNT, COUNT) for i, rank in enumerate(RANKS)]
    classes = {"v": own, "u": own, "scales": ()}
    ranks = np.repeat(RANKS, COUNT)
    numbers = torch.randn(int(ranks.sum()), WIDTHS[side])
    codes, steps = quantise(numbers, "int8")
    vectors = Int8Rows(codes, steps) if form.in_8_bits else numbers.bfloat16()
    like = {"dtype": torch.bfloat16, "device": torch.device("cpu")}
    whole, alone = (form(WIDTHS["v"], [WIDTHS["u"]], classes, [True], **like) for _ in range(2))
    spans = Spans(np.arange(len(ranks)), np.cumsum(ranks) - ranks, ranks)
    whole.put(side, 0, spans, vectors)
    for i in reversed(range(len(ranks))):
        first, last = int(spans.starts[i]), int(spans.starts[i] + ranks[i])
        some = Int8Rows(codes[first:last], steps[first:last]) if form.in_8_bits else None
        one = Spans(spans.slots[i : i + 1], np.zeros(1, dtype=np.int64), ranks[i : i + 1])
        alone.put(side, 0, one, vectors[first:last] if some is None else some)
    assert any(part.any() for part in memory(whole))
    for first, second in zip(memory(whole), memory(alone), strict=True):
        assert torch.equal(first, second)
