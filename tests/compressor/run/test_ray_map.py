"""Compression over a Ray cluster: here a local one of two CPUs. Skipped where Ray is missing."""

import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from vllm_jd.compressor import AdapterError, Settings, read_adapters
from vllm_jd.compressor.run import ray_map as ray_map_module
from vllm_jd.compressor.run.compress import compress
from vllm_jd.compressor.run.ray_map import ClusterError, ray_map

CPUS = 2
SETTINGS = Settings(rank=3, clusters=2)

# A driver in a process of its own; all of its modules but the first take a minute.
DRIVER = """
import sys, time
from pathlib import Path
from vllm_jd.compressor import Settings, read_adapters
from vllm_jd.compressor.run.compress import compress
from vllm_jd.compressor.run.ray_map import ray_map

class Slow:
    def __init__(self, collection):
        self.__dict__.update(vars(collection))
        self._collection = collection
    def factors(self, module):
        if module != next(iter(self.shapes)):
            time.sleep(60)
        return self._collection.factors(module)

collection = Slow(read_adapters([Path(sys.argv[1])]))
compress(collection, Path(sys.argv[2]), Settings(rank=3), module_map=ray_map(sys.argv[3]))
"""


@pytest.fixture(scope="module")
def cluster():
    """Address of a running cluster that this process is connected to."""
    ray = pytest.importorskip("ray")
    ray.init(num_cpus=CPUS, include_dashboard=False, log_to_driver=False)
    yield ray.get_runtime_context().gcs_address
    ray.shutdown()


@pytest.fixture
def idle(cluster):
    """Waits until no task runs; False if some still do after ten seconds."""
    import ray

    def idle():
        end = time.monotonic() + 10
        while time.monotonic() < end:
            if ray.available_resources().get("CPU") == CPUS:
                return True
            time.sleep(0.05)
        return False

    return idle


def payload(store):
    """The generation's files but for the manifest, which holds the time."""
    return {
        file.name: file.read_bytes()
        for file in store.folder.iterdir()
        if file.name != "manifest.json"
    }


@pytest.mark.parametrize(
    "settings",
    [SETTINGS, Settings(rank=4, clusters=3, max_adapter_error=0.3)],
)
def test_the_store_has_the_same_bytes_as_with_threads(tmp_path, write_adapters, cluster, settings):
    write_adapters(tmp_path / "in", 7, kind="real", ranks=(2, 4, 3))
    collection = read_adapters([tmp_path / "in"])
    with_threads = compress(collection, tmp_path / "threads", settings)
    with_ray = compress(collection, tmp_path / "ray", settings, module_map=ray_map())
    assert payload(with_ray) == payload(with_threads)


def test_a_warm_start_reads_its_store_on_the_workers(tmp_path, write_adapters, cluster):
    write_adapters(tmp_path / "in", 7, kind="real")
    collection = read_adapters([tmp_path / "in"])
    warm = compress(collection, tmp_path / "warm", Settings(rank=3, clusters=2, seed=5))
    with_threads = compress(collection, tmp_path / "threads", SETTINGS, warm=warm)
    with_ray = compress(collection, tmp_path / "ray", SETTINGS, warm=warm, module_map=ray_map())
    assert payload(with_ray) == payload(with_threads)


def test_results_come_in_order_and_only_some_are_handed_out(cluster):
    handed_out = []

    def items():
        for i in range(12):
            handed_out.append(i)
            yield str(i)

    def work(item):
        time.sleep(0.3 if item == "0" else 0)  # the first is last to be done
        return item

    found = []
    for result in ray_map()(work, items()):
        found.append(result)
        assert len(handed_out) <= len(found) + 2 * CPUS
    assert found == [str(i) for i in range(12)]


def test_workers_compute_with_one_thread(cluster):
    def threads(item):
        import torch

        return torch.get_num_threads()

    assert set(ray_map()(threads, "abcd")) == {1}


# --- stopped ---


@pytest.mark.parametrize("stopped", [signal.SIGKILL, signal.SIGINT])
def test_a_stop_ends_the_tasks_and_only_the_rest_is_computed_afterwards(
    tmp_path, write_adapters, cluster, idle, stopped
):
    write_adapters(tmp_path / "in", 5, kind="real")
    out = tmp_path / "out"
    arguments = [tmp_path / "in", out, cluster]
    with subprocess.Popen(
        [sys.executable, "-c", DRIVER, *map(str, arguments)], stderr=subprocess.PIPE, text=True
    ) as driver:
        while driver.poll() is None and not list(out.glob(".compress/*/module-*.safetensors")):
            time.sleep(0.02)
        driver.send_signal(stopped)
        errors = driver.communicate(timeout=40)[1]
    assert driver.returncode == -stopped, errors
    assert stopped == signal.SIGKILL or "KeyboardInterrupt" in errors
    assert len(list(out.glob(".compress/*/module-*.safetensors"))) == 1
    assert not (out / "CURRENT").exists()
    assert idle()

    asked = []

    def counted(function, items):
        return ray_map()(function, (asked.append(item) or item for item in items))

    collection = read_adapters([tmp_path / "in"])
    resumed = compress(collection, out, Settings(rank=3), module_map=counted)
    assert asked == list(collection.shapes)[1:]
    undisturbed = compress(collection, tmp_path / "threads", Settings(rank=3))
    assert payload(resumed) == payload(undisturbed)


# --- what goes wrong ---


def test_a_changed_adapter_is_an_adapter_error_that_names_the_machine(
    tmp_path, write_adapters, cluster
):
    first, second = write_adapters(tmp_path / "in", 2)
    collection = read_adapters([tmp_path / "in"])
    os.utime(second / "adapter_model.safetensors", ns=(1, 1))
    with pytest.raises(AdapterError, match="changed while it was being read") as caught:
        compress(collection, tmp_path / "out", Settings(rank=2), module_map=ray_map())
    (fault,) = caught.value.faults
    assert str(second) in fault
    assert str(first) not in fault
    assert socket.gethostname() in fault
    assert "file system" not in fault


def test_adapters_that_are_not_on_the_cluster_are_named(tmp_path, write_adapters, cluster):
    (folder,) = write_adapters(tmp_path / "in", 1)
    collection = read_adapters([tmp_path / "in"])
    folder.rename(tmp_path / "elsewhere")
    with pytest.raises(AdapterError, match=r"file system that all of them share") as caught:
        compress(collection, tmp_path / "out", Settings(rank=2), module_map=ray_map())
    assert str(folder) in caught.value.faults[0]
    assert socket.gethostname() in caught.value.faults[0]


def test_an_error_of_the_function_keeps_its_type(cluster):
    def work(item):
        if item == "b":
            raise ZeroDivisionError("of module b")
        return item

    results = ray_map()(work, "abcdefgh")
    assert next(results) == "a"
    with pytest.raises(ZeroDivisionError, match="of module b"):
        next(results)


def test_a_machine_with_another_version_is_refused(cluster, monkeypatch):
    monkeypatch.setattr(ray_map_module, "__version__", "0.0.7")
    with pytest.raises(ClusterError, match=r"this machine 0\.0\.7; install the same version"):
        list(ray_map()(str, "ab"))


def test_a_machine_that_lacks_a_package_is_named(cluster):
    def work(item):
        import no_such_package  # noqa: F401

    with pytest.raises(ClusterError, match="no_such_package'; install vllm-jd"):
        list(ray_map()(work, "ab"))


def test_a_worker_that_dies_again_and_again_is_a_cluster_error(cluster):
    def work(item):
        os._exit(1)

    with pytest.raises(ClusterError, match="q_proj: a machine of the Ray cluster did not finish"):
        list(ray_map()(work, ["q_proj"]))


def test_without_a_cluster_the_error_says_how_to_start_one(tmp_path):
    pytest.importorskip("ray")
    code = """
import sys
from vllm_jd.compressor.run.ray_map import ClusterError, ray_map
try:
    ray_map(sys.argv[1])
except ClusterError as error:
    print(error)
"""
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    found = subprocess.run(
        # Not `auto`: the cluster of the tests above runs on this machine.
        [sys.executable, "-c", code, "nowhere"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "no Ray cluster answers at 'nowhere'" in found.stdout, found.stderr
    assert "ray start --head" in found.stdout


def test_without_ray_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)  # as if it were not installed
    with pytest.raises(ClusterError, match=r"pip install 'vllm-jd\[ray\]'"):
        ray_map()
