"""Modules are in work at once as far as there is memory for them."""

import threading
import time
from types import SimpleNamespace

import pytest
import torch

from vllm_jd.compressor.run import memory
from vllm_jd.compressor.run.memory import available_bytes, modules_at_once
from vllm_jd.compressor.run.parallel import parallel_map


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Sets what the machine and the container say of their memory."""
    monkeypatch.setattr(memory, "_MEMORY", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "_GROUP", tmp_path)

    def say(available=None, most=None, used=0):
        if available is not None:
            lines = f"MemTotal: 99999999 kB\nMemAvailable: {available // 1024} kB\n"
            (tmp_path / "meminfo").write_text(lines)
        if most is not None:
            (tmp_path / "memory.max").write_text(f"{most}\n")
            (tmp_path / "memory.current").write_text(f"{used}\n")

    return say


def test_the_tighter_limit_counts(machine):
    assert available_bytes() is None
    machine(available=8 << 30)
    assert available_bytes() == 8 << 30
    machine(most="max")
    assert available_bytes() == 8 << 30
    machine(most=4 << 30, used=1 << 30)
    assert available_bytes() == 3 << 30


def test_the_largest_module_says_how_many_fit(machine):
    # 64 adapters of rank 32: of 128 experts of 2048 x 768, and of a layer of 2048 x 2048.
    experts, plain = 64 * 32 * 128 * (2048 + 768) * 4, 64 * 32 * 4096 * 4
    collection = SimpleNamespace(
        shapes={"mlp.experts.up_proj": (2048, 768), "self_attn.q_proj": (2048, 2048)},
        experts={"mlp.experts.up_proj": 128},
        factor_bytes=experts + plain,
    )
    assert modules_at_once(collection) is None
    machine(available=100 << 30)
    assert modules_at_once(collection) == (100 << 30) // (4 * experts) == 9
    machine(available=1 << 30)
    assert modules_at_once(collection) == 1
    machine(available=100 << 30)
    collection.experts, collection.factor_bytes = {}, plain * 2
    assert modules_at_once(collection) > 500


@pytest.mark.parametrize(("at_once", "most", "each"), [(None, 4, 1), (2, 2, 2), (1, 1, 4)])
def test_no_more_items_are_in_work_than_told(at_once, most, each):
    working, seen, threads = set(), [], []
    lock = threading.Lock()

    def work(item):
        with lock:
            working.add(item)
            seen.append(len(working))
        threads.append(torch.get_num_threads())
        time.sleep(0.01)
        with lock:
            working.remove(item)
        return item * item

    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        assert list(parallel_map(work, range(12), at_once=at_once)) == [i * i for i in range(12)]
        assert torch.get_num_threads() == 4
    finally:
        torch.set_num_threads(before)
    assert max(seen) <= most and set(threads) == {each}
    assert most == 1 or max(seen) > 1
