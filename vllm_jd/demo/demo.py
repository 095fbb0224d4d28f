"""The whole path on one machine: real model, real adapters, compress, serve, ask, compare."""

import shlex
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.resources import as_file, files
from itertools import groupby
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from vllm_jd.compressor import Settings, read_adapters
from vllm_jd.compressor.report.summary import Sizes, sizes
from vllm_jd.compressor.run.compress import compress
from vllm_jd.demo.smollm2 import ensure_smollm2
from vllm_jd.serve import running, server_command, server_environment
from vllm_jd.store import Store, StoreError, read_base_model

_TIMEOUT = 300
_MAX_TOKENS = 24


@dataclass(frozen=True)
class Question:
    """One prompt for one adapter."""

    adapter: str
    prompt: str


def _question(adapter: str, text: str) -> Question:
    return Question(adapter, f"Input: {text}\nOutput:")


_LETTER = "Maria handed the gardener a letter"
_PLANT = "What part of a plant takes in water from the soil?"

QUESTIONS = (
    _question("dative-shift", _LETTER),
    _question("named-entities", _LETTER),
    _question("yes-no-question", _LETTER),
    _question("science-answer", _PLANT),
    _question("science-wrong-answer", _PLANT),
    _question("fact-to-question", "Fact: Copper wire carries electric current."),
    _question("hypernym", "violin"),
    _question("antonym", "expensive"),
    _question("fluent-question", "What is the tallest no wait the deepest lake in the world?"),
)
"""In the form that the shipped adapters were trained on."""


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


def run_demo(console: Console, path: Path, log: Path) -> tuple[Sizes, list[Answer]]:
    """Compress the shipped adapters, serve the store, ask every question, print the answers.

    Args:
        console: where the story is told.
        path: the store to write; it stays.
        log: file for the server's output.

    Returns:
        Sizes before and after, and the answers.

    Raises:
        ServerFailed, ServeError, StoreError, AdapterError, BaseModelError: see their classes.
    """
    console.rule("1. the base model")
    model = ensure_smollm2(echo=lambda line: console.print(line, markup=False))
    console.print(f"{model.name} in {model}")
    with shipped_adapters() as source:
        console.rule("2. compress")
        compressing = shlex.join(["vllm-jd", "compress", str(source), "--out", str(path)])
        console.print(f"$ {compressing}", markup=False, soft_wrap=True)
        store = _compress(console, path, model, source)
        size = sizes(store)
        _print_sizes(console, store, size)
        console.rule("3. serve, and ask with the openai client")
        command = shlex.join(["vllm-jd", "serve", str(path), "--model", str(model)])
        console.print(f"$ {command}", markup=False, soft_wrap=True)
        with _serving(console, store, model, source, log) as url:
            answers = _ask_all(url, model)
    _print_answers(console, answers)
    console.print("The server is stopped and the store stays. To ask on your own:")
    console.print(f"  {command}", markup=False, soft_wrap=True)
    return size, answers


def _compress(console: Console, path: Path, model: Path, source: Path) -> Store:
    """The store of the shipped adapters; that of an earlier demo if it is the same."""
    collection = read_adapters([source])
    settings = Settings()
    with suppress(StoreError):
        store = Store.open(path)
        found = [bytes(digest.tolist()).hex() for digest in store.source_sha256]
        same = (store.manifest.method, store.manifest.settings) == (
            settings.method,
            settings.recorded(),
        )
        if same and store.names == collection.names and found == collection.source_sha256:
            console.print("already there, from an earlier demo")
            return store
    with console.status("compressing …") as status:
        return compress(
            collection,
            path,
            settings,
            base_model=read_base_model(model),
            on_progress=lambda what, done, total: status.update(f"{what} {done}/{total}"),
        )


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
    error = float(store.error[store.present].mean())
    console.print(
        f"{len(store)} adapters on {len(store.manifest.modules)} modules: "
        f"{size.adapter_bytes / 1e6:.1f} MB → {size.store_bytes / 1e6:.1f} MB "
        f"({size.parameter_saved_ratio:.0%} of the parameters saved), "
        f"mean relative squared error {error:.3f}"
    )


def _print_answers(console: Console, answers: list[Answer]) -> None:
    console.rule("4. what they said (greedy)")
    for prompt, same_prompt in groupby(answers, key=lambda answer: answer.prompt):
        console.print(f"\n[bold]{_one_line(prompt)}")
        table = Table.grid(padding=(0, 2))
        table.add_column(style="cyan", no_wrap=True)
        table.add_column()
        table.add_column(style="green")
        base = ""
        for answer in same_prompt:
            differs = f"[red]uncompressed: {_one_line(answer.uncompressed)}"
            table.add_row(
                f"  {answer.adapter}",
                _one_line(answer.compressed),
                "as uncompressed" if answer.same else differs,
            )
            base = answer.base
        table.add_row("  [dim]the base model", f"[dim]{_one_line(base) or '(nothing)'}", "")
        console.print(table)
    same = sum(answer.same for answer in answers)
    console.print(
        f"\n{same} of {len(answers)} compressed adapters said word for word what the uncompressed "
        "adapter said."
    )


def _one_line(text: str, most: int = 100) -> str:
    line = " ".join(text.split())
    return escape(line if len(line) <= most else f"{line[:most]}…")
