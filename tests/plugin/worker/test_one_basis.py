"""A basis that is paged in alone lies as it does where all are put at once, in every form."""

import numpy as np
import pytest
import torch

pytest.importorskip("vllm")

from vllm_jd.kernels import Int8Rows
from vllm_jd.plugin.engine.residency import SlotClass
from vllm_jd.plugin.worker.bases import CodedRows, PackedInt8, PackedRows, PlainRows, Spans, take
from vllm_jd.store.quantise import quantise

WIDTHS = {"v": 70, "u": 40, "scales": 40}  # no whole blocks: the ends are padded
RANKS = (3, 8, 16)
COUNT = 3  # of each rank


def memory(form):
    """All that a form holds, in bytes."""
    parts = [getattr(form, "packed", form.v), form.v, *form.u, *form.scales]
    for rows in (getattr(form, "v_int8", None), *getattr(form, "u_int8", ())):
        parts += [] if rows is None else [rows.codes, rows.steps]
    return [part.contiguous().view(-1).view(torch.uint8) for part in parts]


def make(form, count=2):
    """Forms of a layer with two slices, and who has which slot: (slots, first rows, ranks)."""
    own = [SlotClass(rank, i * COUNT, COUNT) for i, rank in enumerate(RANKS)]
    classes = {"v": own, "u": own, "scales": [SlotClass(1, 0, COUNT)]}
    like = {"dtype": torch.bfloat16, "device": torch.device("cpu")}
    return [
        form(WIDTHS["v"], [WIDTHS["u"]] * 2, classes, [True, True], **like) for _ in range(count)
    ]


@pytest.mark.parametrize("side", ["v", "u", "scales"])
@pytest.mark.parametrize("form", [PlainRows, CodedRows, PackedRows, PackedInt8])
def test_one_by_one_is_all_at_once(form, side):
    ranks = np.ones(COUNT, dtype=int) if side == "scales" else np.repeat(RANKS, COUNT)
    spans = Spans(np.arange(len(ranks)), np.cumsum(ranks) - ranks, ranks)
    whole, alone, other = make(form, 3)
    numbers = [torch.randn(int(ranks.sum()), WIDTHS[side]) for _ in range(2)]
    if form.in_8_bits and side != "scales":
        vectors = [Int8Rows(*quantise(each, "int8")) for each in numbers]
    else:
        vectors = [each.bfloat16() for each in numbers]
    for s in range(2):
        whole.put(side, s, spans, vectors[s])
    assert any(part.any() for part in memory(whole))
    # Both slices' bases of one slot are prepared together, as those of many layers are.
    for slot in reversed(range(len(ranks))):
        rank = int(ranks[slot])
        index = spans.starts[slot] + np.arange(rank)
        both = [take(each, index) for each in vectors]
        if isinstance(both[0], Int8Rows):
            parts = ([each.codes for each in both], [each.steps for each in both])
            both = Int8Rows(*map(torch.cat, parts))
        else:
            both = torch.cat(both)
        for s, basis in enumerate(other.prepared(side, both, rank)):
            alone.place(side, s, slot, basis)
    for first, second in zip(memory(whole), memory(alone), strict=True):
        assert torch.equal(first, second)
    assert not any(part.any() for part in memory(other)), "who prepares need not be who gets it"
