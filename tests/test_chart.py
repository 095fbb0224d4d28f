"""The Helm chart: rendered by Helm's own code, and what comes of it checked against Kubernetes'
schemas, our command lines, images, metrics and alerts."""

import json
import re

import pytest
import typer
import yaml

from tests.test_deploy import (
    CHART,
    DEPLOY,
    LEAST,
    ROOT,
    alerts,
    compose,
    container,
    environment,
    last,
    our_metrics,
    prometheus,
    rendered,
    selectors,
    vllms_metrics,
)
from vllm_jd import __version__
from vllm_jd.cli.app import app
from vllm_jd.serve.tenants.keys import add_key
from vllm_jd.serve.tenants.metrics import waiting_gauge

KEYS = {"apiKey": {"secret": ""}, "apiKeys": {"secret": "my-keys"}}
MONITORED = {"serviceMonitor": {"enabled": True}, "prometheusRule": {"enabled": True}}
EVERYTHING = KEYS | {
    "replicas": 3,
    "store": {"size": "50Gi", "storageClass": "nfs"},
    "uploads": {"enabled": True, "roots": ["s3://bucket/adapters", "hf://org"]},
    "followGenerations": False,
    "hfToken": {"secret": "my-token"},
    "extraArgs": ["--max-model-len", "8192"],
    "extraEnv": [{"name": "VLLM_LOGGING_LEVEL", "value": "DEBUG"}],
    "extraVolumes": [{"name": "model", "emptyDir": {}}],
    "extraVolumeMounts": [{"name": "model", "mountPath": "/model"}],
    "imagePullSecrets": [{"name": "pull"}],
    "cache": {"existingClaim": "my-cache"},
    "autoscaling": {"kind": "hpa"},
    "podAnnotations": {"a": "b"},
    "podLabels": {"c": "d"},
    "nodeSelector": {"gpu": "h100"},
    "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists"}],
    "affinity": {"nodeAffinity": {}},
    "service": {"type": "LoadBalancer"},
}
SETS = {
    "least": {},
    "uploads": {"uploads": {"enabled": True}},
    "keys": KEYS,
    "everything": EVERYTHING,
    "keda": {"autoscaling": {"kind": "keda"}, "monitoring": MONITORED},
}
CUSTOM = {"ScaledObject", "ServiceMonitor", "PrometheusRule"}
"""Of which there are no schemas here."""


def helm():
    return pytest.importorskip("helm_python")


def test_helm_lint_has_no_complaint():
    found = helm().lint(CHART, values=LEAST, strict=True)
    assert not found["errors"]
    assert [each for each in found["messages"] if "icon" not in each["error"]] == []
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert chart["version"] == chart["appVersion"] == __version__


@pytest.mark.parametrize("name", SETS)
def test_what_is_rendered_is_valid_and_fits_together(name):
    validate = pytest.importorskip("kubernetes_validate").validate
    objects = rendered(**SETS[name])
    for kind, document in objects.items():
        assert document["metadata"]["name"].startswith("demo-vllm-jd")
        if kind not in CUSTOM:
            validate(document, "1.31", strict=True)
    pod, server = container(objects)
    deployment = objects["Deployment"]["spec"]
    labels = deployment["template"]["metadata"]["labels"]
    chosen = [
        deployment["selector"]["matchLabels"],
        objects["Service"]["spec"]["selector"],
        objects["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"],
        pod["topologySpreadConstraints"][0]["labelSelector"]["matchLabels"],
    ]
    assert all(each.items() <= labels.items() for each in chosen)
    assert objects["PodDisruptionBudget"]["spec"]["maxUnavailable"] == 1
    assert objects["Service"]["spec"]["ports"][0]["targetPort"] == server["ports"][0]["name"]
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    mounts = {mount["mountPath"]: mount for mount in server["volumeMounts"]}
    assert len(mounts) == len(server["volumeMounts"])
    assert {mount["name"] for mount in mounts.values()} == set(volumes)
    claim = volumes["store"]["persistentVolumeClaim"]["claimName"]
    if "PersistentVolumeClaim" in objects:
        made = objects["PersistentVolumeClaim"]
        assert claim == made["metadata"]["name"] == "demo-vllm-jd-store"
        assert made["spec"]["accessModes"] == ["ReadWriteMany"]
        assert made["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep"
    else:
        assert claim == "my-store"


def test_the_pod_may_write_where_the_image_writes_and_nowhere_else():
    pod, server = container()
    user, group = last("Dockerfile", "USER").split(":")
    context = pod["securityContext"]
    assert context["runAsNonRoot"] is True
    assert (context["runAsUser"], context["runAsGroup"]) == (int(user), int(group))
    assert context["fsGroup"] == int(group)
    inside = server["securityContext"]
    assert inside["readOnlyRootFilesystem"] is True
    assert inside["allowPrivilegeEscalation"] is False
    assert inside["capabilities"] == {"drop": ["ALL"]}
    assert pod["automountServiceAccountToken"] is False
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    mounts = {mount["mountPath"]: mount for mount in server["volumeMounts"]}
    assert set(mounts) == {"/store", "/home/serve", "/home/serve/.cache", "/tmp", "/dev/shm"}
    assert mounts["/store"]["readOnly"] is True
    assert volumes["store"]["persistentVolumeClaim"]["readOnly"] is True
    assert volumes[mounts["/dev/shm"]["name"]]["emptyDir"]["medium"] == "Memory"
    assert environment("Dockerfile")["HOME"] in mounts
    assert server["image"] == compose()["services"]["vllm-jd"]["image"]
    assert server["resources"]["limits"]["nvidia.com/gpu"] == "1"


@pytest.mark.parametrize("name", SETS)
def test_the_servers_flags_exist(name):
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    command, *words = container(rendered(**SETS[name]))[1]["args"]
    context = typer.main.get_command(app).commands[command].make_context(command, list(words))
    given = ["--model", context.params["model"], *context.args]
    flags = make_arg_parser(FlexibleArgumentParser()).parse_args(given)
    assert (flags.host, flags.port, flags.shutdown_timeout) == ("0.0.0.0", 8000, 60)
    assert context.params["model"] == "BASE"
    asked = SETS[name]
    uploads = asked.get("uploads", {"enabled": False})
    assert bool(context.params["allow_runtime_lora_updating"]) is uploads["enabled"]
    roots = uploads.get("roots", ["/nothing"] if uploads["enabled"] else [])
    assert [*context.params["adapter_root"]] == roots
    assert context.params["follow_generations"] is asked.get("followGenerations", True)
    keys = context.params["api_keys"]
    assert str(keys) == ("/keys/keys.json" if "apiKeys" in asked else "None")
    if name == "everything":
        assert flags.max_model_len == 8192


def test_who_may_write_the_store():
    for enabled in (False, True):
        pod, server = container(rendered(uploads={"enabled": enabled}))
        (mount,) = [each for each in server["volumeMounts"] if each["mountPath"] == "/store"]
        (volume,) = [each for each in pod["volumes"] if each["name"] == "store"]
        assert mount["readOnly"] is volume["persistentVolumeClaim"]["readOnly"] is not enabled


def test_a_file_of_keys_takes_the_place_of_the_key(tmp_path):
    pod, server = container(rendered(**KEYS))
    assert "VLLM_API_KEY" not in str(server["env"])
    (volume,) = [each for each in pod["volumes"] if each["name"] == "keys"]
    (mount,) = [each for each in server["volumeMounts"] if each["name"] == "keys"]
    assert volume["secret"]["secretName"] == "my-keys"
    assert (mount["mountPath"], mount["readOnly"]) == ("/keys", True)
    assert "subPath" not in mount, "a secret that changes would not be followed"
    add_key(tmp_path / "keys.json", name="ops", rights=["admin"])
    assert volume["secret"]["items"] == [{"key": "keys.json", "path": "keys.json"}]


def test_probes_ask_what_the_server_answers_and_a_stop_waits_for_requests():
    from vllm.entrypoints.serve.instrumentator.health import router

    pod, server = container(rendered(startupSeconds=600, drainSeconds=120))
    probes = [server[f"{kind}Probe"] for kind in ("startup", "readiness", "liveness")]
    paths = {probe["httpGet"]["path"] for probe in probes}
    assert paths == {"/health"} <= {route.path for route in router.routes}
    assert {probe["httpGet"]["port"] for probe in probes} == {server["ports"][0]["name"]}
    assert (
        server["startupProbe"]["failureThreshold"] * server["startupProbe"]["periodSeconds"] == 600
    )
    _, seconds = server["lifecycle"]["preStop"]["exec"]["command"]
    assert int(seconds) > 2 * server["readinessProbe"]["periodSeconds"] - 1
    assert pod["terminationGracePeriodSeconds"] == 120 + int(seconds) + 30


@pytest.mark.parametrize("keys", [False, True])
@pytest.mark.parametrize("kind", ["hpa", "keda"])
def test_an_autoscaler_asks_for_the_queue(kind, keys):
    values = KEYS if keys else {}
    objects = rendered(autoscaling={"kind": kind, "waiting": 7, "calm": 60}, **values)
    assert "replicas" not in objects["Deployment"]["spec"], "or each upgrade would reset it"
    metric = "vllm_jd:door_waiting" if keys else "vllm:num_requests_waiting"
    assert metric in {*vllms_metrics(), *our_metrics(), waiting_gauge()._name}
    if kind == "hpa":
        scaler = objects["HorizontalPodAutoscaler"]["spec"]
        (asked,) = scaler["metrics"]
        assert asked["pods"]["metric"]["name"] == metric
        assert asked["pods"]["target"] == {"type": "AverageValue", "averageValue": "7"}
        behavior = scaler["behavior"]
    else:
        scaler = objects["ScaledObject"]["spec"]
        (trigger,) = scaler["triggers"]
        ((name, labels),) = selectors(trigger["metadata"]["query"])[0]
        assert (name, labels) == (metric, {"namespace", "service"})
        assert trigger["metadata"]["threshold"] == "7"
        behavior = scaler["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]
    assert scaler["scaleTargetRef"]["name"] == objects["Deployment"]["metadata"]["name"]
    assert behavior["scaleDown"]["stabilizationWindowSeconds"] == 60
    assert rendered().keys() & {"HorizontalPodAutoscaler", "ScaledObject"} == set()


def test_the_monitor_and_the_alerts_are_those_of_prometheus_files():
    objects = rendered(monitoring=MONITORED)
    (endpoint,) = objects["ServiceMonitor"]["spec"]["endpoints"]
    (job,) = prometheus()["scrape_configs"]
    service = objects["Service"]
    chosen = objects["ServiceMonitor"]["spec"]["selector"]["matchLabels"]
    assert chosen.items() <= service["metadata"]["labels"].items()
    assert endpoint["port"] == service["spec"]["ports"][0]["name"]
    assert endpoint["path"] == job["metrics_path"]
    label = objects["ServiceMonitor"]["spec"]["jobLabel"]
    assert service["metadata"]["labels"][label] == job["job_name"]
    both = zip(endpoint["metricRelabelings"], job["metric_relabel_configs"], strict=True)
    for here, there in both:
        assert here == {"sourceLabels": there.pop("source_labels"), **there}
    (group,) = objects["PrometheusRule"]["spec"]["groups"]
    assert group["rules"] == alerts()
    token = {"secret": "scrape", "key": "token"}
    monitoring = {"serviceMonitor": {"enabled": True, "token": token}}
    (endpoint,) = rendered(monitoring=monitoring, **KEYS)["ServiceMonitor"]["spec"]["endpoints"]
    assert endpoint["authorization"]["credentials"] == {"name": "scrape", "key": "token"}


BAD = [
    ({"model": ""}, "found no model"),
    ({"store": {}}, "found no store"),
    ({"store": {"existingClaim": "a", "size": "1Gi"}}, "expected one of them"),
    ({"store": {"size": "much"}}, "/store/size"),
    ({"store": {"size": "1Gi", "accessModes": ["Many"]}}, "/store/accessModes/0"),
    ({"apiKey": {"secret": ""}}, "found no key"),
    ({"apiKeys": {"secret": "b"}}, "expected one of them"),
    ({"replicas": 0}, "/replicas"),
    ({"replica": 2}, "'replica' not allowed"),
    ({"extraArgs": [8192]}, "/extraArgs/0"),
    ({"autoscaling": {"kind": "vpa"}}, "/autoscaling/kind"),
    ({"autoscaling": {"kind": "hpa", "minReplicas": 9}}, "minReplicas 9 and maxReplicas 8"),
    ({"autoscaling": {"keda": {"prometheus": "prometheus:9090"}}}, "/autoscaling/keda/prometheus"),
    (KEYS | {"monitoring": {"serviceMonitor": {"enabled": True}}}, "right `metrics`"),
]


@pytest.mark.parametrize(("values", "said"), BAD)
def test_values_that_cannot_be_are_refused_with_what_was_expected(values, said):
    with pytest.raises(helm().HelmError, match=re.escape(said)):
        rendered(**values)


def test_the_schema_knows_every_value():
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    schema = json.loads((CHART / "values.schema.json").read_text())

    def compare(value, schema, where):
        if "$ref" in schema or "properties" not in schema:
            return
        known = schema["properties"].keys() - {"global"}
        assert value.keys() == known, where
        assert schema["additionalProperties"] is False or not where
        for name in known:
            compare(value[name], schema["properties"][name], f"{where}/{name}")

    compare(values, schema, "")


def test_the_notes_say_what_to_do_next():
    with helm().Chart.load(CHART) as chart:
        values = LEAST | {"store": {"size": "1Gi"}, "autoscaling": {"kind": "hpa"}}
        made = chart.render(values, name="demo", namespace="prod")
    notes = made["vllm-jd/templates/NOTES.txt"]
    assert "service/demo-vllm-jd 8000:8000" in notes and "demo-vllm-jd-store" in notes
    rules = yaml.safe_load(notes[notes.index("rules:") :])
    (query,) = rules["rules"]
    for metric in ("vllm:num_requests_waiting", "vllm_jd:door_waiting"):
        assert metric in query["seriesQuery"]


def test_the_documents_show_the_chart():
    text = (ROOT / "docs" / "deploy.md").read_text()
    assert str(CHART.relative_to(ROOT)) in text
    for match in re.finditer(r"--set ([\w.]+)=", text):
        value = yaml.safe_load((CHART / "values.yaml").read_text())
        for part in match[1].split("."):
            assert part in value, f"docs/deploy.md: no value {match[1]}"
            value = value[part]
    assert (DEPLOY / "prometheus-rules.yml").samefile(CHART / "prometheus-rules.yml")
