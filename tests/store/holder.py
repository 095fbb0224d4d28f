"""Started by tests: open a store's live generation and keep it open until standard input ends."""

import sys

from vllm_jd.store import Store

with Store.open(sys.argv[1]) as store:
    print(store.generation, flush=True)
    sys.stdin.read()
    print(float(store.cores(0, len(store)).double().sum()), flush=True)
