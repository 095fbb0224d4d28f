"""`vllm-jd serve` driven over HTTP by the openai client, against PEFT and stock vLLM in float32."""

import argparse
import asyncio
import http.client
import importlib.util
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.forked import run
from tests.serving.conftest import MAX_MODEL_LEN, NEW_TOKENS, SHIPPED
from tests.serving.engine import run_stock
from tests.serving.receiver import receiving
from tests.test_deploy import operators_metrics
from vllm_jd.demo.demo import free_port
from vllm_jd.serve import running

pytestmark = pytest.mark.slow

EXAMPLES = Path(__file__).parents[2] / "examples" / "clients"
FLAGS = ["--dtype", "float32", "--max-model-len", str(MAX_MODEL_LEN), "--enforce-eager"]


class Server:
    """A running `vllm-jd serve`, and clients for it."""

    def __init__(self, process, url, base):
        self.process = process
        self.url = url
        self.base = base
        self.client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        # A client for each request would cost more than the request.
        self.http = httpx.Client(base_url=url, timeout=60)

    def tokens(self, requests):
        """Token ids for (model, prompt) pairs, all sent at once."""

        async def every():
            url = f"{self.url}/v1"
            async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:
                asked = [
                    client.completions.create(
                        model=model,
                        prompt=prompt,
                        max_tokens=NEW_TOKENS,
                        temperature=0,
                        extra_body={"ignore_eos": True, "return_token_ids": True},
                    )
                    for model, prompt in requests
                ]
                completions = await asyncio.gather(*asked)
            return [completion.choices[0].token_ids for completion in completions]

        return asyncio.run(every())

    def load(self, name, folder, **options):
        body = {"lora_name": name, "lora_path": str(folder), **options}
        return httpx.post(f"{self.url}/v1/load_lora_adapter", json=body, timeout=60)

    def unload(self, name):
        return httpx.post(f"{self.url}/v1/unload_lora_adapter", json={"lora_name": name})


@contextmanager
def serving(path, model, log, *flags, environment=None):
    port = free_port()
    command = [
        sys.executable,
        "-m",
        "vllm_jd.cli.app",
        "serve",
        str(path),
        "--model",
        str(model),
    ]
    command += ["--port", str(port), "--host", "127.0.0.1", "--max-num-seqs", "32", *FLAGS, *flags]
    with running(command, os.environ | (environment or {}), log) as process:
        url = f"http://127.0.0.1:{port}"
        process.wait_ready(f"{url}/health", 300)
        yield Server(process, url, str(model))


@pytest.fixture(scope="module")
def spans():
    """What the shared server tells of its requests."""
    with receiving() as receiver:
        yield receiver


@pytest.fixture(scope="module")
def server(lossless_store, model, shipped, tmp_path_factory, spans):
    log = tmp_path_factory.mktemp("log") / "server.log"
    # A copy: what is loaded stays in the store.
    path = shutil.copytree(lossless_store.path, log.with_name("store"))
    plain = f"plain={SHIPPED / shipped[8]}"
    flags = ["--max-loras", "2", "--allow-runtime-lora-updating"]
    flags += ["--adapter-root", str(SHIPPED), "--adapter-root", str(tmp_path_factory.getbasetemp())]
    flags += ["--logging-config.formatter", "json", *spans.flags, "--lora-modules", plain]
    with serving(path, model, log, *flags, environment=spans.environment) as started:
        yield started


def test_a_mixed_batch_says_what_peft_says(server, sources, prompts, peft_reference, shipped):
    folders = {**sources, "plain": SHIPPED / shipped[8], server.base: None}
    requests = [(name, prompt) for prompt in prompts for name in folders]
    found = server.tokens(requests)
    expected = peft_reference.answers(folders, requests, found)
    assert found == expected
    said = {tuple(tokens) for tokens in expected}
    assert len(said) > len(folders), "the adapters should not all say the same"


def test_a_mixed_batch_says_what_stock_vllm_says(server, sources, prompts, model):
    requests = [(name, prompts[i % len(prompts)]) for i, name in enumerate(sources)]
    assert server.tokens(requests) == run_stock(model, requests, sources)


def test_a_connection_is_kept_for_longer_than_clients_keep_it(server):
    """OpenAI's keeps it for 5 s: a server that ends it then may do so as a request comes."""
    address = httpx.URL(server.url)
    connection = http.client.HTTPConnection(address.host, address.port, timeout=60)
    connection.request("GET", "/v1/store")
    connection.getresponse().read()
    own = connection.sock.getsockname()
    time.sleep(8)
    connection.request("GET", "/v1/store")
    assert connection.getresponse().status == 200
    assert connection.sock.getsockname() == own
    connection.close()


def test_several_adapters_in_one_request(server, sources, prompts, peft_reference, shipped):
    """In completions as PEFT has them; with a name, and in chat, the same; mistakes get OpenAI's
    error objects."""
    a, b, *_ = sources
    folders = ((sources[a], -0.3), (sources[b], 0.7), (SHIPPED / shipped[8], 1.0))
    parts = [{"name": name, "weight": weight} for name, weight in ((a, -0.3), (b, 0.7))]
    adapters = [*parts, {"name": "plain", "weight": 1.0}]
    settings = {"prompt": prompts[0], "max_tokens": NEW_TOKENS, "temperature": 0}
    extra = {"ignore_eos": True, "return_token_ids": True}

    def said(model, **more):
        answer = server.client.completions.create(model=model, **settings, extra_body=extra | more)
        assert answer.model == model
        return answer.choices[0].token_ids

    found = said(a, adapters=adapters)
    assert found == peft_reference.greedy(folders, prompts[0], guess=found)
    assert found != said(a)
    body = {"blend": {part["name"]: part["weight"] for part in adapters}}
    assert httpx.put(f"{server.url}/v1/adapters/ab", json=body).status_code == 201
    assert said("ab") == found
    assert "ab" in {model.id for model in server.client.models.list()}

    def chat(model, **more):
        messages = [{"role": "user", "content": "Say something."}]
        answer = server.client.chat.completions.create(
            model=model, messages=messages, max_tokens=8, temperature=0, extra_body=more
        )
        return answer.choices[0].message.content

    assert chat(server.base, adapters=adapters) == chat("ab")
    for wrong, code, told in (
        ({"adapters": [{"name": "nobody", "weight": 1}]}, 404, "nobody"),
        ({"adapters": [{"name": a, "weight": 1e9}]}, 400, "at most 100"),
        ({"adapters": parts, "blend": {"way": "ties"}}, 400, "density"),
        ({"adapters": adapters, "blend": {"way": "ties", "density": 0.5}}, 400, "one cluster"),
    ):
        with pytest.raises(openai.APIStatusError) as refused:
            said(a, **wrong)
        assert refused.value.status_code == code and told in refused.value.body["message"]
    assert said("ab") == found
    assert httpx.delete(f"{server.url}/v1/adapters/ab").status_code == 200


def test_streaming_says_the_same(server, sources):
    name = next(iter(sources))
    settings = {"model": name, "prompt": "Input: hello\nOutput:", "max_tokens": 8, "temperature": 0}
    whole = server.client.completions.create(**settings).choices[0].text
    pieces = [
        part.choices[0].text for part in server.client.completions.create(**settings, stream=True)
    ]
    assert "".join(pieces) == whole
    assert len(pieces) > 1


def test_chat_takes_an_adapters_name(server, sources):
    messages = [{"role": "user", "content": "Name a colour."}]
    settings = {"messages": messages, "max_tokens": 6, "temperature": 0}
    name = next(iter(sources))
    whole = server.client.chat.completions.create(model=name, **settings)
    assert whole.model == name
    stream = server.client.chat.completions.create(model=name, **settings, stream=True)
    text = "".join(part.choices[0].delta.content or "" for part in stream if part.choices)
    assert text == whole.choices[0].message.content


@pytest.mark.parametrize("name", ["nobody", "../etc/passwd"])
def test_an_unknown_name_gets_openais_404(server, name):
    with pytest.raises(openai.NotFoundError) as caught:
        server.client.completions.create(model=name, prompt="x", max_tokens=1)
    assert caught.value.body["type"] == "NotFoundError"
    assert caught.value.body["param"] == "model"
    assert name in caught.value.body["message"]
    with pytest.raises(openai.NotFoundError):
        server.client.chat.completions.create(
            model=name, messages=[{"role": "user", "content": "x"}], max_tokens=1
        )


def test_models_are_listed_and_paged(server, sources):
    listed = [card.id for card in server.client.models.list()]
    assert listed[0] == server.base
    assert set(listed) >= {*sources, "plain"}
    paged, after = [], None
    while True:
        params = {"limit": 3} | ({"after": after} if after else {})
        page = httpx.get(f"{server.url}/v1/models", params=params).json()
        assert len(page["data"]) <= 3
        paged += [card["id"] for card in page["data"]]
        after = page["last_id"]
        if not page["has_more"]:
            break
    assert paged == listed
    name = next(iter(sources))
    card = server.client.models.retrieve(name)
    assert (card.id, card.parent) == (name, server.base)
    with pytest.raises(openai.NotFoundError):
        server.client.models.retrieve("nobody")
    for query in ("after=nobody", "limit=0", "limit=x"):
        reply = httpx.get(f"{server.url}/v1/models?{query}")
        assert reply.status_code in (400, 404)
        assert "message" in reply.json()["error"]


def test_metrics_tell_of_the_store_and_of_who_was_asked_for(server, lossless_store, prompts):
    asked = [(lossless_store.names[0], prompts[0])] * 2 + [("plain", prompts[0])]
    before = scrape(server)
    server.tokens([*asked, (server.base, prompts[0])])
    after = scrape(server)
    assert after["vllm_jd:store_adapters"] == {(): len(lossless_store)}
    assert after["vllm_jd:store_generation"] == {(): lossless_store.generation}
    assert after["vllm_jd:store_bytes"] == {(): lossless_store.stored_bytes}
    requests = "vllm_jd:adapter_requests_total"
    grown = {kind: n - before[requests][kind] for kind, n in after[requests].items()}
    assert grown == {("store",): 2, ("uncompressed",): 1, ("blend",): 0, ("base",): 1}
    assert len(after["vllm:lora_requests_info"]) == 1, "vLLM's lists of adapters pile up"
    after = eventually_whole(server, len(lossless_store))
    cores = ("vllm_jd:slot_hits_total", ("core",))
    assert after[cores[0]][cores[1]] >= 2 and after["vllm_jd:slots"][("core", "free")] >= 1
    assert after["vllm_jd:bases"][("paged",)] == 0 == after["vllm_jd:draining"][("generation",)]
    assert after["vllm_jd:adapters"][("compressed",)] == len(lossless_store)
    loaded = {labels[0]: labels[1:] for labels in after["vllm:lora_adapter_loaded"]}
    assert {name: loaded[name] for name in lossless_store.names} == dict.fromkeys(
        lossless_store.names, ("gpu", "false")
    )
    assert loaded["plain"][0] in ("gpu", "cpu")
    (labels,) = after["vllm:lora_requests_info"]
    assert {*lossless_store.names} <= set(",".join(labels).split(",")), "a router sees them all"
    told = httpx.get(f"{server.url}/v1/store").json()
    assert told["engine"]["whole"] and told["engine"]["cores"]["all"] == len(lossless_store)
    assert "<title>vllm-jd</title>" in httpx.get(f"{server.url}/dashboard").text
    # These are of servers with keys (test_tenants.py).
    of_keys = {"vllm_jd:door_waiting", "vllm_jd:requests_refused_total"}
    missing = operators_metrics() - after.keys()
    assert missing == of_keys, "the dashboard asks for what is not there"


def test_spans_and_log_lines_say_which_adapter_a_request_had(server, lossless_store, spans):
    name = lossless_store.names[0]
    for model in (name, "plain"):
        reply = httpx.post(
            f"{server.url}/v1/completions",
            json={"model": model, "prompt": "x", "max_tokens": 2},
            headers={"X-Request-Id": f"asked-for-{model}"},
            timeout=60,
        )
        assert reply.status_code == 200 and f"asked-for-{model}" in reply.json()["id"]

    def its_spans(model):
        return [
            {key: value for key, value in attributes.items() if key.startswith("vllm_jd.")}
            for span, attributes in list(spans.spans)
            if span == "llm_request" and f"asked-for-{model}" in attributes["gen_ai.request.id"]
        ]

    for _ in range(100):
        if its_spans(name) and its_spans("plain"):
            break
        time.sleep(0.1)
    (compressed,) = its_spans(name)
    assert compressed == {
        "vllm_jd.kind": "store",
        "vllm_jd.adapter": name,
        "vllm_jd.generation": lossless_store.generation,
        "vllm_jd.clusters": [0],
    }
    assert its_spans("plain") == [{"vllm_jd.kind": "uncompressed", "vllm_jd.adapter": "plain"}]
    lines = [line for line in server.process.log.read_text().splitlines() if line.startswith("{")]
    access = [each for each in map(json.loads, lines) if each["name"] == "uvicorn.access"]
    asked = {each["request_id"]: each.get("adapter") for each in access}
    assert asked[f"asked-for-{name}"] == name and asked["asked-for-plain"] == "plain"


def eventually_whole(server, adapters):
    """The metrics, once they say that all of a store is resident."""
    for _ in range(100):
        found = scrape(server)
        if found.get("vllm_jd:cores", {}).get(("resident",)) == adapters:
            return found
        time.sleep(0.1)
    raise AssertionError("not all adapters are resident")


def scrape(server):
    """`/metrics`: name → label values (but for the model's and the engine's) → value."""
    found = {}
    for family in text_string_to_metric_families(httpx.get(f"{server.url}/metrics/").text):
        for sample in family.samples:
            labels = {k: v for k, v in sample.labels.items() if k not in ("model_name", "engine")}
            found.setdefault(sample.name, {})[tuple(labels.values())] = sample.value
    return found


def test_uncompressed_adapters_come_and_go(server, prompts, shipped, peft_reference):
    """More of them at once than the server has places for (--max-loras 2)."""
    late = {f"late-{name}": SHIPPED / name for name in shipped[9:14]}
    for name, folder in late.items():
        assert server.load(name, folder).status_code == 200
    requests = [(name, prompt) for prompt in prompts for name in late]
    found = server.tokens(requests)
    assert found == peft_reference.answers(late, requests, found)
    name = next(iter(late))
    assert server.load(name, late[name]).status_code == 400, "it is loaded already"
    assert server.unload(name).status_code == 200
    with pytest.raises(openai.NotFoundError):
        server.client.completions.create(model=name, prompt="x", max_tokens=1)
    assert server.unload(name).status_code == 404


def test_an_adapter_can_be_replaced_in_place(server, prompts, shipped, peft_reference):
    first, second = SHIPPED / shipped[14], SHIPPED / shipped[15]
    assert server.load("mine", first).status_code == 200
    assert server.tokens([("mine", prompts[0])]) == [peft_reference.greedy(first, prompts[0])]
    assert server.load("mine", second, load_inplace=True).status_code == 200
    assert server.tokens([("mine", prompts[0])]) == [peft_reference.greedy(second, prompts[0])]


def test_bad_uploads_get_an_error_and_harm_nobody(server, sources, prompts, tmp_path):
    name = next(iter(sources))
    before = server.tokens([(name, prompts[0])])
    (tmp_path / "adapter_config.json").write_text("{")
    broken = server.load("broken", tmp_path)
    assert broken.status_code >= 400
    assert "message" in broken.json()["error"]
    missing = server.load("missing", tmp_path / "nowhere")
    assert missing.status_code == 404
    warm_up = server.load("missing", "/not/a/real/path")  # what vLLM's warm-up calls its own
    assert warm_up.status_code == 403  # as any folder outside of the roots
    taken = server.load(name, sources[name])
    assert taken.status_code == 400
    assert name in taken.json()["error"]["message"]
    assert server.tokens([(name, prompts[0])]) == before


def test_adapters_come_from_the_named_folders_only(server, sources, prompts, shipped, tmp_path):
    name = next(iter(sources))
    before = server.tokens([(name, prompts[0])])
    elsewhere = tempfile.mkdtemp()
    shutil.copytree(SHIPPED / shipped[10], f"{elsewhere}/adapter")
    (tmp_path / "link").symlink_to(f"{elsewhere}/adapter")
    for path in ("/etc", f"{elsewhere}/adapter", tmp_path / "link", "org/adapter"):
        for options in ({}, {"load_inplace": True}):
            refused = server.load("elsewhere", path, **options)
            assert refused.status_code == 403
            error = refused.json()["error"]
            assert (error["type"], error["param"]) == ("PermissionDeniedError", "lora_path")
            assert str(path) in error["message"] and str(SHIPPED) in error["message"]
    # vLLM's routes for SageMaker end in the same place.
    body = {"name": "elsewhere", "src": f"{elsewhere}/adapter"}
    assert httpx.post(f"{server.url}/adapters", json=body).status_code == 403
    shutil.rmtree(elsewhere)
    with pytest.raises(openai.NotFoundError):
        server.client.completions.create(model="elsewhere", prompt="x", max_tokens=1)
    assert server.tokens([(name, prompts[0])]) == before
    said = server.process.log.read_text()
    assert "address: 127.0.0.1, port" in said
    assert "API key: none asked for\n" in said
    assert f"loading adapters at run time: on, from {SHIPPED}, " in said


def bench(words):
    """`vllm bench serve`, in a process that has imported it; what it prints."""
    from vllm.benchmarks import serve

    parser = argparse.ArgumentParser()
    serve.add_cli_args(parser)
    said = io.StringIO()
    with redirect_stdout(said):
        serve.main(parser.parse_args(words))
    return said.getvalue()


def test_vllm_bench_serve_can_drive_it(server, model, sources):
    """As the README shows it."""
    words = ["--base-url", server.url, "--model", str(model), "--dataset-name", "random"]
    words += ["--random-input-len", "16", "--random-output-len", "4", "--num-prompts", "16"]
    said = run(bench, [*words, "--lora-modules", *sources], os.environ)
    assert "Successful requests:                     16" in said


@pytest.mark.parametrize(
    ("example", "package"),
    [
        ("openai_client.py", "openai"),
        ("langchain_client.py", "langchain_openai"),
        ("litellm_client.py", "litellm"),
    ],
)
def test_clients_that_people_use_are_told_the_same(server, sources, example, package):
    """As docs/clients.md shows them; `scripts/clients.py` tries more of them."""
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"no {package} here")
    name, prompt = next(iter(sources)), "Input: bright\nOutput:"
    asked = [f"{server.url}/v1", "none", name, prompt]
    done = subprocess.run(
        [sys.executable, EXAMPLES / example, *asked],
        env=os.environ | {"LITELLM_LOCAL_MODEL_COST_MAP": "True"},  # which it would download
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    options = {"model": name, "max_tokens": 12, "temperature": 0}
    chat = server.client.chat.completions.create(
        messages=[{"role": "user", "content": prompt}], **options
    )
    said = chat.choices[0].message.content
    completion = server.client.completions.create(prompt=prompt, **options).choices[0].text
    expected = {"completion": completion, "chat": said, "streamed": said, "unknown": 404}
    assert said and completion
    if package == "openai":
        expected["models"] = len(list(server.client.models.list()))
    assert found == expected


def test_ctrl_c_lets_running_requests_finish_and_leaves_nothing(server, sources):
    """Last in this file: it ends the server."""
    answer = []

    def ask():
        completion = server.client.completions.create(
            model=next(iter(sources)),
            prompt="Input: a long story\nOutput:",
            max_tokens=40,
            temperature=0,
            extra_body={"ignore_eos": True},
        )
        answer.append(completion.usage.completion_tokens)

    asking = threading.Thread(target=ask)
    asking.start()
    running_now = re.compile(r"^vllm:num_requests_running\{.*\} 1\.0", re.MULTILINE)
    while asking.is_alive() and not running_now.search(httpx.get(f"{server.url}/metrics").text):
        time.sleep(0.02)
    os.kill(server.process.pid, signal.SIGINT)
    asking.join(60)
    assert answer == [40]
    assert server.process.wait() == 0
    port = server.url.rsplit(":", 1)[1]
    left = subprocess.run(["pgrep", "-fa", f"--port {port}"], capture_output=True, text=True)
    assert left.stdout == ""
