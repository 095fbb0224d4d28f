"""Servers, several on one store, which can be killed and started again, and a tiny model for them.

They are what `vllm-jd serve` starts, but for the process that they are in: it is forked off one
that has imported vLLM, and so are vLLM's own. To import it takes several times as long as all else.
"""

import os
import runpy
import signal
import sys
import time
from contextlib import suppress

import httpx

from tests import forked
from tests.tiny_llama import write_tiny_llama
from vllm_jd.demo.demo import free_port
from vllm_jd.serve.server import server_command, server_environment

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "TORCH_COMPILE_DISABLE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}
FLAGS = ["--host", "127.0.0.1", "--dtype", "float32", "--max-model-len", "128", "--enforce-eager"]


def make_tiny_model(folder):
    """A Llama of two layers with random weights, whose words are w0 … w319."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    write_tiny_llama(folder, layers=2)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(320)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0").save_pretrained(folder)


class Replica:
    """One server.

    Args:
        store: the store's folder.
        model: the model's.
        log: a file for what it says.
        flags: more of vLLM's.
        options: of `server_command`.
    """

    def __init__(self, store, model, log, *flags, **options):
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = log
        settings = {
            "max_loras": 4,
            "max_cpu_loras": 64,
            "max_num_seqs": 8,
            "store_base_model": None,
            "additional_config": None,
            "allow_runtime_lora_updating": True,
            "adapter_roots": [str(store)],
        }
        flags = ["--port", str(self.port), *FLAGS, *flags]
        command = server_command(store, str(model), flags, **settings | options)
        self._arguments = command[command.index("-m") + 1 :]
        self._process = None

    @property
    def pid(self):
        """Of its first process, the one that answers."""
        return self._process.pid

    def start(self):
        """Start it; `wait` until it answers."""
        environment = os.environ | server_environment(allow_runtime_lora_updating=True)
        job = self._arguments, str(self.log)
        self._process = forked.start(_serve, job, environment | ENVIRONMENT)

    def wait(self, seconds=120):
        end = time.monotonic() + seconds
        while True:
            with suppress(httpx.HTTPError):
                if httpx.get(f"{self.url}/health", timeout=5).status_code == 200:
                    return
            alive = self._process.is_alive() and time.monotonic() < end
            assert alive, f"it does not answer:\n{self.log.read_text()[-4000:]}"
            time.sleep(0.1)

    def kill(self):
        """All of its processes, at once."""
        if self._process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.join()


def _serve(job):
    from vllm.utils import system_utils

    arguments, log = job
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for number in (1, 2):
        os.dup2(output, number)
    get_context = system_utils.multiprocessing.get_context
    # On CPU vLLM would have each of its processes import everything again.
    system_utils.multiprocessing.get_context = lambda method=None: get_context("fork")
    sys.argv = arguments
    runpy.run_module(arguments[0], run_name="__main__")
