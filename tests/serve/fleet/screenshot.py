"""Make docs/dashboard.png: `python -m tests.serve.fleet.screenshot docs/dashboard.png`.

A real page on a real store of synthetic adapters; what the engine says, and the load, are made up.
"""

import os
import random
import shutil
import sys
import tempfile
import threading
import time
from pathlib import Path

from prometheus_client import Counter, Gauge
from vllm.lora.request import LoRARequest

from tests.conftest import _make_factors, _write_adapter
from tests.serve.fleet.browser import browser
from tests.serve.fleet.test_dashboard import listening
from vllm_jd.compressor import Settings, read_adapters
from vllm_jd.compressor.change.progress import recording
from vllm_jd.compressor.run.compress import compress
from vllm_jd.plugin.api.metrics import count_requests
from vllm_jd.serve.fleet import observed
from vllm_jd.store.blend import of_mapping
from vllm_jd.store.fleet import blended, change_fleet, uploaded

ADAPTERS, SECONDS = 1200, 100


def main(out):
    os.environ["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "1"
    observed._EVERY = 0.5
    folder = Path(tempfile.mkdtemp())
    try:
        show(make_store(folder), out)
    finally:
        shutil.rmtree(folder)


def make_store(folder):
    rng = random.Random(1)
    made = _make_factors(ADAPTERS, kind="real", ranks=(4, 8))
    folders = [
        _write_adapter(
            folder / "adapters" / f"customer-{rng.choice('abcdefgh')}{i:04d}",
            factors,
            base="meta-llama/Llama-3.1-8B-Instruct",
        )
        for i, factors in enumerate(made)
    ]
    store = compress(read_adapters(folders), folder / "store", Settings(rank=6, clusters=24))
    entries = {f"upload-{i}": uploaded(f"{i}" * 64, pinned=False) for i in range(9)}
    weights = dict(zip(store.names[:2], (0.7, 0.3), strict=True))
    entries["support-and-legal"] = blended(of_mapping(weights), pinned=False)
    change_fleet(store.path, lambda fleet: fleet.update(entries))
    return store


def show(store, out):
    with listening(store.path) as (url, engine, _), recording(store.path, refit=False) as recorder:
        recorder.on_progress("projecting", 5, 9)
        engine.measures |= {
            "slots": {
                "basis": (30, 18, 0),
                "core": (37, 1172, 7),
                "upload": (4, 2, 10),
                "blend": (2, 5, 57),
            },
            "bases": (48, 48),
            "cores": (ADAPTERS, ADAPTERS),
            "hits": {"basis": 400, "core": 220, "upload": 30, "blend": 9},
            "misses": {"basis": 0, "core": 0, "upload": 1, "blend": 0},
        }
        rng = random.Random(3)
        engine.told = {
            name: (True, True, rng.choice([0, 0, 0, 1, 2]), time.time() - rng.randint(0, 4000))
            for name in store.names
        }
        count_requests(engine)
        over = threading.Event()
        threading.Thread(target=load, args=(engine, over), daemon=True).start()
        with browser() as chromium:
            page = chromium.new_page(viewport={"width": 1220, "height": 1000})
            page.goto(f"{url}/dashboard")
            time.sleep(SECONDS)
            place = {"x": 0, "y": 0, "width": 1220, "height": 1120}
            page.screenshot(path=out, clip=place, full_page=True)
        over.set()


def load(engine, over):
    """Requests, in waves, and what vLLM would say of them."""
    rng, level = random.Random(2), 40.0
    label = ["model_name"]
    running = Gauge("vllm:num_requests_running", "", label).labels("base")
    waiting = Gauge("vllm:num_requests_waiting", "", label).labels("base")
    tokens = Counter("vllm:generation_tokens", "", label).labels("base")
    cache = Gauge("vllm:kv_cache_usage_perc", "", label).labels("base")
    paths = [None] + ["/upload"] * 1 + ["vllm-jd:/store@1"] * 18
    while not over.wait(0.5):
        level = min(80.0, max(10.0, level + rng.uniform(-9, 9)))
        for _ in range(int(level / 2)):
            path = rng.choice(paths)
            engine.generate("", "", "", lora_request=path and LoRARequest("a", 1, path))
        tokens.inc(level * 60)
        running.set(int(level * 0.8))
        waiting.set(int(level / 20))
        cache.set(0.3 + level / 400)


if __name__ == "__main__":
    main(sys.argv[1])
