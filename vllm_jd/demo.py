"""The whole path on one machine: real model, real adapters, compress, serve, ask, compare."""

import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path

from rich.console import Console
from rich.table import Table

from vllm_jd.compressor import Settings, compress, read_adapters
from vllm_jd.compressor.summary import Sizes, sizes
from vllm_jd.serve import running, server_command, server_environment
from vllm_jd.smollm2 import ensure_smollm2
from vllm_jd.store import Store, read_base_model

_BASE = "the base model"
_TIMEOUT = 300
_MAX_TOKENS = 24


@dataclass(frozen=True)
class Question:
    """One prompt for one adapter."""

    adapter: str
    prompt: str


QUESTIONS = (Question("antonym", "Input: generous\nOutput:"),)


@dataclass(frozen=True)
class Answer:
    """What was said to one prompt. `same`: compressed and uncompressed adapter agree."""

    adapter: str
    prompt: str
    compressed: str
    uncompressed: str
    base: str

    @property
    def same(self) -> bool:
        """Whether the compressed adapter said the same, word for word."""
        return self.compressed == self.uncompressed


@contextmanager
def shipped_adapters() -> Iterator[Path]:
    """The folder of real adapters that comes with the package."""
    with as_file(files("vllm_jd") / "data" / "adapters") as folder:
        yield folder


def run_demo(console: Console, log: Path) -> tuple[Sizes, list[Answer]]:
    """Compress the shipped adapters, serve the store, ask every question, print the answers.

    Args:
        console: where the story is told.
        log: file for the server's output.

    Returns:
        Sizes before and after, and the answers.

    Raises:
        ServerFailed, ServeError, StoreError, AdapterError, BaseModelError: see their classes.
    """
    console.rule("1. the base model")
    model = ensure_smollm2(echo=lambda line: console.print(line, markup=False))
    console.print(f"{model.name} in {model}")
    with (
        tempfile.TemporaryDirectory(prefix="vllm-jd-demo-") as folder,
        shipped_adapters() as source,
    ):
        console.rule("2. compress")
        with console.status("compressing …") as status:
            store = compress(
                read_adapters([source]),
                Path(folder) / "store",
                Settings(rank=16),
                base_model=read_base_model(model),
                on_progress=lambda what, done, total: status.update(f"{what} {done}/{total}"),
            )
        size = sizes(store)
        _print_sizes(console, store, size)
        console.rule("3. serve, and ask with the openai client")
        with _serving(console, store, model, source, log) as url:
            answers = _ask_all(url, model)
    _print_answers(console, answers)
    return size, answers


@contextmanager
def _serving(console: Console, store: Store, model: Path, source: Path, log: Path) -> Iterator[str]:
    """The store's adapters, and those of the questions uncompressed beside them."""
    port = free_port()
    asked = sorted({question.adapter for question in QUESTIONS})
    modules = [f"{_uncompressed(name)}={source / name}" for name in asked]
    flags = ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", model.name]
    flags += ["--max-model-len", "512", "--enforce-eager", "--lora-modules", *modules]
    command = server_command(
        store.path,
        str(model),
        flags,
        max_loras=len(asked),
        max_cpu_loras=len(asked),
        max_num_seqs=32,
        store_base_model=None,
        additional_config=None,
    )
    environment = server_environment() | {"HF_HUB_OFFLINE": "1"}
    environment.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    console.print("$ vllm-jd serve STORE --model", model.name, markup=False, highlight=False)
    with running(command, environment, log) as server:
        with console.status("") as status:
            seconds = server.wait_ready(
                f"http://127.0.0.1:{port}/health",
                _TIMEOUT,
                lambda passed: status.update(f"vLLM is starting … {passed:.0f} s"),
            )
        console.print(f"up after {seconds:.0f} s, all {len(store)} adapters resident")
        yield f"http://127.0.0.1:{port}/v1"


def _ask_all(url: str, model: Path) -> list[Answer]:
    from openai import OpenAI

    client = OpenAI(base_url=url, api_key="none", max_retries=0)

    def ask(name: str, prompt: str) -> str:
        completion = client.completions.create(
            model=name, prompt=prompt, max_tokens=_MAX_TOKENS, temperature=0
        )
        return completion.choices[0].text

    return [
        Answer(
            adapter=question.adapter,
            prompt=question.prompt,
            compressed=ask(question.adapter, question.prompt),
            uncompressed=ask(_uncompressed(question.adapter), question.prompt),
            base=ask(model.name, question.prompt),
        )
        for question in QUESTIONS
    ]


def _uncompressed(name: str) -> str:
    return f"{name}-uncompressed"


def free_port() -> int:
    """A TCP port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _print_sizes(console: Console, store: Store, size: Sizes) -> None:
    error = float(store.error[store.cluster >= 0].mean())
    console.print(
        f"{len(store)} adapters on {len(store.manifest.modules)} modules: "
        f"{size.adapter_bytes / 1e6:.1f} MB → {size.store_bytes / 1e6:.1f} MB "
        f"({size.parameter_saved_ratio:.0%} of the parameters saved), "
        f"mean relative squared error {error:.3f}"
    )


def _print_answers(console: Console, answers: list[Answer]) -> None:
    console.rule("4. what they said (greedy)")
    table = Table(show_lines=True)
    table.add_column("adapter", style="bold")
    table.add_column("prompt")
    table.add_column("compressed")
    table.add_column("uncompressed")
    table.add_column(_BASE, style="dim")
    for answer in answers:
        table.add_row(
            answer.adapter,
            _one_line(answer.prompt),
            _one_line(answer.compressed),
            "[green]the same[/]" if answer.same else _one_line(answer.uncompressed),
            _one_line(answer.base),
        )
    console.print(table)
    same = sum(answer.same for answer in answers)
    console.print(
        f"{same} of {len(answers)} compressed adapters answered word for word as the uncompressed."
    )


def _one_line(text: str) -> str:
    from rich.markup import escape

    return escape(" ⏎ ".join(text.strip().splitlines()))
