#!/usr/bin/env python3
"""Have the clients that people use talk to a server, and check what they are answered.

    python scripts/clients.py                    all of them
    python scripts/clients.py --only litellm     one; again for each other one

A server with keys is started on a store of a hundred adapters: the shipped ones, each at five
strengths. Each client runs in an environment of its own below the cache folder (`--cache`), which
is made at the first run: Python ones with pip, others with npm. What users would write is in
`examples/clients`; docs/clients.md shows it.

The clients that ask one thing have to say the same as the openai client does, for a few
adapters; the load generators have to be answered without an error as often as they asked; lm-eval
has to find the result that is computed here. Prints a table in Markdown.

Exit code: 0 all is right; 1 something is not; 2 what was asked for does not exist.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer

from vllm_jd.compressor import Settings, read_adapters
from vllm_jd.compressor.run.compress import compress
from vllm_jd.demo.demo import QUESTIONS, free_port, shipped_adapters
from vllm_jd.demo.smollm2 import ensure_smollm2
from vllm_jd.serve import running
from vllm_jd.serve.tenants.keys import add_key
from vllm_jd.store import read_base_model

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples" / "clients"
STRENGTHS = (0.6, 0.8, 1.0, 1.2, 1.4)
ASKED = 3  # adapters that each client that asks one thing is run with
LOAD_REQUESTS = 200
LIMIT = 1800  # seconds for one client
_UNKNOWN = 404


class Wrong(Exception):
    """A client was not answered as it should be; the message says how."""


@dataclass(frozen=True)
class Server:
    """A running server.

    Attributes:
        url: of it, without `/v1`.
        key: that may use all adapters.
        admin: that may do everything.
        model: folder of the base model, which has the tokenizer.
        adapters: their names.
    """

    url: str
    key: str
    admin: str
    model: Path
    adapters: list[str]

    def get(self, path: str) -> Any:
        """What the server says of itself."""
        headers = {"Authorization": f"Bearer {self.admin}"}
        return httpx.get(self.url + path, headers=headers, timeout=60).raise_for_status().json()

    def complete(self, **body: Any) -> dict[str, Any]:
        """The first choice of a completion."""
        headers = {"Authorization": f"Bearer {self.key}"}
        body = {"temperature": 0, **body}
        reply = httpx.post(f"{self.url}/v1/completions", json=body, headers=headers, timeout=60)
        return reply.raise_for_status().json()["choices"][0]


@dataclass(frozen=True)
class Place:
    """Where a client runs.

    Attributes:
        home: folder of its environment.
        out: an empty folder for what it writes.
        log: file for what it says.
    """

    home: Path
    out: Path
    log: Path

    def run(self, *command: str | Path, **environment: str) -> str:
        """Run a client in the repository's root; what it prints on stdout.

        Raises:
            Wrong: it has failed, or has not ended in time.
        """
        paths = f"{self.home / 'bin'}:{os.environ['PATH']}"
        # Nothing is looked for elsewhere: the model is a folder, the task's data a file.
        offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "PATH": paths}
        offline["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"
        try:
            done = subprocess.run(
                [str(word) for word in command],
                cwd=ROOT,
                env=os.environ | offline | {"PYTHONPATH": ""} | environment,
                capture_output=True,
                text=True,
                timeout=LIMIT,
            )
        except subprocess.TimeoutExpired:
            raise Wrong(f"{command[0]} has not ended after {LIMIT} s") from None
        self.log.write_text(f"{done.stdout}\n{done.stderr}")
        if done.returncode:
            end = "\n".join((done.stdout + done.stderr).splitlines()[-15:])
            raise Wrong(f"{command[0]} ended with code {done.returncode}, see {self.log}:\n{end}")
        return done.stdout


@dataclass(frozen=True)
class Client:
    """A client: what its environment needs, and how it is tried.

    Attributes:
        packages: to install; the first one's version is told.
        try_it: runs it; says what was done.
        npm: whether they are npm's, rather than pip's.
    """

    packages: tuple[str, ...]
    try_it: Callable[[Server, Place], str]
    npm: bool = False


# ---------------------------------------------------------------- clients that ask one thing


def says_the_same(example: str) -> Callable[[Server, Place], str]:
    """How to try a client whose example prints its answers."""

    def try_it(server: Server, place: Place) -> str:
        script = EXAMPLES / example
        command = [place.home / "bin" / "python", script]
        if script.suffix == ".mjs":  # which looks for packages where it lies
            command = ["node", Path(shutil.copy(script, place.home))]
        for question in QUESTIONS[:ASKED]:
            asked = [f"{server.url}/v1", server.key, question.adapter, question.prompt]
            printed = place.run(*command, *asked)
            found = json.loads(printed.splitlines()[-1])
            expected = reference(*asked, models=len(server.adapters) + 1)
            for what, said in found.items():
                if said != expected[what]:
                    raise Wrong(
                        f"{question.adapter}, {what}: found {said!r}, the openai client says "
                        f"{expected[what]!r}"
                    )
        return f"{', '.join(found)}: as the openai client, {ASKED} adapters"

    return try_it


def reference(url: str, key: str, model: str, prompt: str, models: int) -> dict[str, Any]:
    """What the openai client is answered, as `examples/clients/openai_client.py` prints it."""
    import openai

    client = openai.OpenAI(base_url=url, api_key=key)
    options = {"model": model, "max_tokens": 12, "temperature": 0}
    messages = [{"role": "user", "content": prompt}]
    chat = client.chat.completions.create(messages=messages, **options).choices[0].message.content
    completion = client.completions.create(prompt=prompt, **options).choices[0].text
    if not completion or not chat:
        raise Wrong(f"{model} says nothing: this shows nothing")
    return {
        "completion": completion,
        "chat": chat,
        "streamed": chat,
        "unknown": _UNKNOWN,
        "models": models,
    }


# ---------------------------------------------------------------- load generators


def try_aiperf(server: Server, place: Place) -> str:
    """A hundred adapters, drawn at random."""
    since = time.time()
    command = ["aiperf", "profile", "--model", ",".join(server.adapters)]
    command += ["--model-selection-strategy", "random", "--url", server.url]
    command += ["--endpoint-type", "chat", "--streaming", "--api-key", server.key]
    command += ["--tokenizer", server.model, "--isl", "32", "--osl", "8"]
    command += ["--extra-inputs", "ignore_eos:true"]  # an empty answer counts as an error
    command += ["--concurrency", "8", "--request-count", str(LOAD_REQUESTS)]
    command += ["--random-seed", "1", "--ui", "simple", "--output-artifact-dir", place.out]
    place.run(*command, HF_HUB_OFFLINE="")  # offline it takes no folder for a tokenizer
    (report,) = place.out.rglob("profile_export_aiperf.json")
    found = json.loads(report.read_text())
    count = int(found["request_count"]["avg"])
    failed = int((found.get("error_request_count") or {"avg": 0})["avg"])
    if count != LOAD_REQUESTS or failed:
        raise Wrong(f"found {count} requests and {failed} errors, expected {LOAD_REQUESTS} and 0")
    asked = adapters_asked(server, since)
    if asked < 60:  # of 200 draws from 100, 87 are expected
        raise Wrong(f"{asked} adapters were asked for, of {len(server.adapters)}")
    return f"{count} requests, 0 errors, {asked} adapters at random"


def try_guidellm(server: Server, place: Place) -> str:
    """One adapter."""
    report = place.out / "report.json"
    backend = {
        "kind": "openai_http",
        "target": server.url,
        "model": server.adapters[0],
        "api_key": server.key,
        "request_format": "/v1/completions",
    }
    data = {"kind": "synthetic_text", "prompt_tokens": "32", "output_tokens": "8"}
    options = {
        "--backend": backend,
        "--profile": {"kind": "concurrent", "streams": "4"},
        "--constraint": {"kind": "max_requests", "count": str(LOAD_REQUESTS // 4)},
        "--data": data,
        "--tokenizer": {"kind": "hf_auto", "model": str(server.model)},
        "--output": {"kind": "json", "path": str(report)},
    }
    words = [
        word
        for flag, fields in options.items()
        for word in (flag, ",".join(f"{name}={value}" for name, value in fields.items()))
    ]
    place.run("guidellm", "run", *words, "--disable-progress")
    (benchmark,) = json.loads(report.read_text())["benchmarks"]
    totals = benchmark["metrics"]["request_totals"]
    if totals["successful"] != LOAD_REQUESTS // 4 or totals["errored"]:
        raise Wrong(f"found {totals}, expected {LOAD_REQUESTS // 4} successful ones")
    return f"{totals['successful']} requests, 0 errors"


def adapters_asked(server: Server, since: float) -> int:
    """How many adapters were asked for since then (seconds since 1970)."""
    listed = server.get("/v1/adapters?limit=1000")["data"]
    return sum(1 for entry in listed if (entry["last_used"] or 0) >= since)


# ---------------------------------------------------------------- lm-eval


def try_lm_eval(server: Server, place: Place) -> str:
    """A task that generates, and one that compares log-probabilities."""
    adapter = "antonym"
    arguments = {
        "model": adapter,
        "base_url": f"{server.url}/v1/completions",
        "tokenizer": str(server.model),
        "num_concurrent": "4",
    }
    tasks = ("vllm_jd_antonyms", "vllm_jd_antonyms_choice")
    told = ",".join(f"{name}={value}" for name, value in arguments.items())
    command = ["lm-eval", "run", "--model", "local-completions", "--model_args", told]
    command += ["--tasks", *tasks, "--include_path", EXAMPLES, "--output_path", place.out]
    place.run(*command, OPENAI_API_KEY=server.key)
    (report,) = place.out.rglob("results_*.json")
    results = json.loads(report.read_text())["results"]
    found = (results[tasks[0]]["exact_match,none"], results[tasks[1]]["acc,none"])
    expected = antonyms_right(server, adapter)
    if any(abs(a - b) > 1e-9 for a, b in zip(found, expected, strict=True)):
        raise Wrong(f"found exact match and accuracy {found}, expected {expected}")
    return f"exact match {found[0]:.2f}, accuracy {found[1]:.2f}: as computed here"


def antonyms_right(server: Server, adapter: str) -> tuple[float, float]:
    """Shares of the words whose antonym is generated, and is likelier than another word."""
    lines = (EXAMPLES / "antonyms.jsonl").read_text().splitlines()
    generated = likelier = 0
    for each in map(json.loads, lines):
        prompt = f"Input: {each['word']}\nOutput:"
        choice = server.complete(model=adapter, prompt=prompt, max_tokens=8, stop=["\n"])
        generated += choice["text"].strip() == each["antonym"]

        def likelihood(word: str, prompt: str = prompt) -> float:
            body = {"prompt": f"{prompt} {word}", "max_tokens": 1, "echo": True, "logprobs": 1}
            logprobs = server.complete(model=adapter, **body)["logprobs"]
            answer = [
                value
                for value, offset in zip(
                    logprobs["token_logprobs"], logprobs["text_offset"], strict=True
                )
                if len(prompt) <= offset < len(body["prompt"])
            ]
            return sum(answer)

        likelier += likelihood(each["antonym"]) > likelihood(each["other"])
    return generated / len(lines), likelier / len(lines)


# ---------------------------------------------------------------- all of it


CLIENTS = {
    "openai (Python)": Client(("openai",), says_the_same("openai_client.py")),
    "openai (npm)": Client(("openai",), says_the_same("openai_client.mjs"), npm=True),
    "@ai-sdk/openai-compatible": Client(
        ("@ai-sdk/openai-compatible", "ai"), says_the_same("ai_sdk.mjs"), npm=True
    ),
    "langchain-openai": Client(("langchain-openai",), says_the_same("langchain_client.py")),
    "litellm": Client(("litellm!=1.107.0",), says_the_same("litellm_client.py")),
    "aiperf": Client(("aiperf",), try_aiperf),
    "guidellm": Client(("guidellm",), try_guidellm),
    "lm-eval": Client(("lm_eval[api]", "transformers"), try_lm_eval),
}


def main(
    only: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help=f"Of these: {', '.join(CLIENTS)}. Default: all."),
    ] = None,
    cache: Annotated[
        Path, typer.Option(help="Folder for the clients' environments, some GB; they stay.")
    ] = Path.home() / ".cache" / "vllm-jd" / "clients",
    python: Annotated[
        str, typer.Option(help="For the clients' environments; aiperf wants 3.11 or later.")
    ] = sys.executable,
) -> None:
    """Have the clients that people use talk to a server, and check what they are answered."""
    names = only or list(CLIENTS)
    for name in names:
        if name not in CLIENTS:
            raise typer.BadParameter(f"found {name!r}, expected one of {', '.join(CLIENTS)}")
    cache.mkdir(parents=True, exist_ok=True)
    rows, wrong = [], 0
    with tempfile.TemporaryDirectory(prefix="vllm-jd-clients-") as folder:
        places, unmade = {}, {}
        for name in names:
            try:
                places[name] = prepare(name, cache, Path(folder), python)
            except Wrong as error:
                unmade[name] = error
        with serving(Path(folder), cache / "server.log") as server:
            for name in names:
                start = time.monotonic()
                try:
                    if name in unmade:
                        raise unmade[name]
                    said = CLIENTS[name].try_it(server, places[name])
                except Wrong as error:
                    wrong += 1
                    said = f"**wrong**: {error}"
                version = version_of(name, cache)
                rows.append((name, version, said, f"{time.monotonic() - start:.0f} s"))
                print(*rows[-1], sep="  ", file=sys.stderr, flush=True)
    print(f"{date.today():%d %B %Y}:\n\n| client | version | what came of it | took |")
    print("|---|---|---|---|")
    for row in rows:
        print("|", " | ".join(" ".join(cell.split()) for cell in row), "|")
    raise typer.Exit(int(wrong > 0))


def prepare(name: str, cache: Path, folder: Path, python: str) -> Place:
    """A client's environment, made if it is not there.

    Raises:
        Wrong: it cannot be made.
    """
    client, home = CLIENTS[name], home_of(name, cache)
    place = Place(home, folder / home.name, cache / f"{home.name}.log")
    place.out.mkdir()
    ready = home / ".ready"
    if ready.exists():
        return place
    print(f"making {home}", file=sys.stderr, flush=True)
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir()
    if client.npm:
        if shutil.which("npm") is None:
            raise Wrong("found no npm; expected Node.js 20 or later")
        (home / "package.json").write_text('{"private": true}\n')
        place.run("npm", "install", "--silent", "--prefix", home, *client.packages)
    else:
        place.run(python, "-m", "venv", home)
        place.run(home / "bin" / "python", "-m", "pip", "install", "-q", *client.packages)
    ready.touch()
    return place


def home_of(name: str, cache: Path) -> Path:
    """Folder of a client's environment."""
    return cache / "".join(c if c.isalnum() else "-" for c in name).strip("-")


def version_of(name: str, cache: Path) -> str:
    """Of a client's package, as it is installed; "": it is not."""
    client, home = CLIENTS[name], home_of(name, cache)
    package = client.packages[0].partition("[")[0].partition("!")[0]
    if client.npm:
        file = home / "node_modules" / package / "package.json"
        return json.loads(file.read_text())["version"] if file.exists() else ""
    ask = f"from importlib.metadata import version; print(version({package!r}))"
    done = subprocess.run([home / "bin" / "python", "-c", ask], capture_output=True, text=True)
    return done.stdout.strip()


@contextmanager
def serving(folder: Path, log: Path) -> Iterator[Server]:
    """A server on a store of a hundred adapters, with keys."""
    model, keys = ensure_smollm2(), folder / "keys.json"
    with shipped_adapters() as shipped:
        adapters = at_strengths(shipped, folder / "adapters")
    settings = Settings(rank=16, clusters=5, iterations=3)
    collection = read_adapters([folder / "adapters"])
    compress(collection, folder / "store", settings, base_model=read_base_model(model)).close()
    key, admin = add_key(keys, name="key")[0], add_key(keys, name="admin", rights=["admin"])[0]
    port = free_port()
    command = [sys.executable, "-m", "vllm_jd.cli.app", "serve", str(folder / "store")]
    command += ["--model", str(model), "--host", "127.0.0.1", "--port", str(port)]
    command += ["--api-keys", str(keys), "--max-model-len", "512", "--max-num-seqs", "8"]
    # float32: what is said must not depend on who else is in the batch.
    command += ["--dtype", "float32", "--enforce-eager", "--disable-uvicorn-access-log"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    url = f"http://127.0.0.1:{port}"
    with running(command, environment, log) as process:
        process.wait_ready(f"{url}/health", 600)
        yield Server(url, key, admin, model, adapters)


def at_strengths(shipped: Path, folder: Path) -> list[str]:
    """Write the shipped adapters, each at every strength; their names. At 1.0 they keep theirs."""
    names = []
    for source in sorted(each for each in shipped.iterdir() if each.is_dir()):
        for strength in STRENGTHS:
            name = source.name if strength == 1 else f"{source.name}-{strength:g}"
            target = folder / name
            target.mkdir(parents=True)
            shutil.copy(source / "adapter_model.safetensors", target)
            config = json.loads((source / "adapter_config.json").read_text())
            config["lora_alpha"] *= strength
            (target / "adapter_config.json").write_text(json.dumps(config))
            names.append(name)
    return names


if __name__ == "__main__":
    typer.run(main)
