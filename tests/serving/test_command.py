"""`vllm-jd serve` before vLLM starts: the command it makes, and what it refuses."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

pytest.importorskip("vllm")

from vllm_jd.cli.app import app
from vllm_jd.compressor import Settings
from vllm_jd.compressor.run.compress import compress
from vllm_jd.plugin.config import PluginConfig
from vllm_jd.plugin.engine.capacity import capacity_of
from vllm_jd.plugin.engine.tables import Tables
from vllm_jd.serve import ServeError, engine_args, server_command, server_environment
from vllm_jd.store import Store, StoreError
from vllm_jd.store.fleet import DELETED, change_fleet, uploaded

CONFIG = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
}
OPTIONS = {
    "max_loras": 3,
    "max_cpu_loras": 5,
    "max_num_seqs": None,
    "store_base_model": None,
    "additional_config": None,
}


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "tiny"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


@pytest.fixture
def store(tmp_path, model):
    from benchmarks.synthetic import RandomCollection
    from vllm_jd.store import read_base_model

    collection = RandomCollection(model, 3, rank=2)
    return compress(
        collection, tmp_path / "store", Settings(rank=2), base_model=read_base_model(model)
    )


def flags_of(command):
    """Flag → value of a command line."""
    pairs = {}
    for flag, value in zip(command, [*command[1:], ""], strict=True):
        if flag.startswith("--"):
            pairs[flag] = None if value.startswith("--") else value
    return pairs


def test_the_command_has_the_stores_settings_and_the_users_flags(store, model):
    command = server_command(
        store.path,
        str(model),
        ["--port", "1", "--api-key=x"],
        **OPTIONS | {"max_num_seqs": 4000, "additional_config": '{"other": 1}'},
    )
    flags = flags_of(command)
    assert flags["--model"] == str(model)
    assert flags["--port"] == "1"
    assert "--api-key=x" in command
    assert int(flags["--max-loras"]) >= 4000, "it must not limit the compressed adapters of a step"
    assert flags["--max-num-seqs"] == "4000"
    config = json.loads(flags["--additional-config"])
    assert config["other"] == 1
    assert config["vllm_jd"] == {
        "store": str(store.path.absolute()),
        "generation": 1,
        "manifest_sha256": (store.path / "CURRENT").read_text().split()[1],
        "max_loras": 3,
        "max_cpu_loras": 5,
        "max_blend": 8,
        "max_queued_requests": 128,
        "follow_generations": True,
        "verified": True,
        "adapter_roots": [],
        "adapter_addresses": [],
        "allow_remote_adapters": False,
        "max_adapter_bytes": 4 << 30,
        "recompress": {"count": 32, "age": 900, "threads": 1, "device": "cpu", "originals": []},
    }


def test_slots_for_cores_reach_the_worker_and_must_do_for_every_sequence(store, model):
    options = OPTIONS | {"max_num_seqs": 2}
    command = server_command(store.path, str(model), [], **options, core_slots=2)
    config = PluginConfig(**json.loads(flags_of(command)["--additional-config"])["vllm_jd"])
    assert config.core_slots == 2
    assert slots(store, config, 2) == 2 + config.max_loras
    with pytest.raises(ServeError, match=r"--core-slots 1 and --max-num-seqs 2"):
        server_command(store.path, str(model), [], **options, core_slots=1)
    # With a slot for every adapter there is one for every sequence.
    server_command(store.path, str(model), [], **OPTIONS | {"max_num_seqs": 4000}, core_slots=3)


def slots(store, config, max_num_seqs):
    """What the engine and the worker make of it (`tests/plugin/test_tables.py` has the rest)."""
    found = capacity_of(
        store,
        Tables(store),
        config,
        max_num_seqs=max_num_seqs,
        max_lora_rank=16,
        in_codes=False,
    )
    return found.cores


def test_another_generation_is_not_said_to_be_verified(store, model, monkeypatch):
    """One that was published between the check and the command."""
    older = SimpleNamespace(generation=store.generation - 1)
    monkeypatch.setattr("vllm_jd.serve.server._check_store", lambda *args: (older, []))
    command = server_command(store.path, str(model), [], **OPTIONS)
    assert not json.loads(flags_of(command)["--additional-config"])["vllm_jd"]["verified"]


def test_other_plugins_stay_on(monkeypatch):
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    environment = server_environment()
    names = environment["VLLM_PLUGINS"].split(",")
    assert {"vllm_jd", "vllm_jd_fleet"} <= set(names)
    from importlib.metadata import entry_points

    others = {point.name for point in entry_points(group="vllm.general_plugins")}
    assert "lora_filesystem_resolver" in names
    # vLLM wants this one to be named by the user.
    assert others - set(names) == {"lora_hf_hub_resolver"}
    monkeypatch.setenv("VLLM_PLUGINS", "mine,lora_hf_hub_resolver")
    expected = "lora_hf_hub_resolver,mine,vllm_jd,vllm_jd_fleet"
    assert server_environment()["VLLM_PLUGINS"] == expected


def test_the_users_keep_alive_stays(monkeypatch):
    monkeypatch.setenv("VLLM_HTTP_TIMEOUT_KEEP_ALIVE", "7")
    assert server_environment()["VLLM_HTTP_TIMEOUT_KEEP_ALIVE"] == "7"


@pytest.mark.parametrize(
    ("group", "name"),
    [
        ("vllm.general_plugins", "vllm_jd"),
        ("vllm.endpoint_plugins", "vllm_jd"),
        ("vllm.endpoint_plugins", "vllm_jd_fleet"),
    ],
)
def test_a_plugin_that_is_not_registered_ends_the_command(store, model, monkeypatch, group, name):
    """As after an update of the sources alone: a server without it would lose uploads."""
    monkeypatch.setattr(
        "vllm_jd.serve.server.entry_points",
        lambda **asked: [] if asked == {"group": group, "name": name} else [name],
    )
    with pytest.raises(ServeError, match=f"'{name}' is not registered.*install the package"):
        server_command(store.path, str(model), [], **OPTIONS)


VARIABLE = "VLLM_ALLOW_RUNTIME_LORA_UPDATING"


def started(monkeypatch, store, model, *flags):
    """`vllm-jd serve` up to vLLM's start: its code, what it said, vLLM's command, environment."""
    seen = []

    class Process:
        def __init__(self, command, environment):
            seen.extend([command, environment])

        def wait(self):
            return 0

    monkeypatch.setattr("vllm_jd.serve.process.ServerProcess", Process)
    arguments = ["serve", str(store.path), "--model", str(model), *flags]
    result = CliRunner().invoke(app, arguments)
    return result.exit_code, result.output, *(seen or [None, None])


OPEN = ["address", "API key", "loading adapters at run time"]
"""What the start says of what is open (`test_the_start_says_what_is_open`)."""


def topics(said):
    """How each line begins."""
    return [line.split(":")[0] for line in said.splitlines()]


def settings(command):
    return json.loads(flags_of(command)["--additional-config"])["vllm_jd"]


def test_loading_at_run_time_is_off_unless_asked_for(store, model, monkeypatch):
    for said in (None, "0", "false"):
        monkeypatch.delenv(VARIABLE, raising=False)
        if said:
            monkeypatch.setenv(VARIABLE, said)
        code, output, command, environment = started(monkeypatch, store, model)
        assert code == 0, output
        assert environment[VARIABLE] == "0"
        assert "loading adapters at run time: off" in output
        assert settings(command)["adapter_roots"] == []
    monkeypatch.setenv(VARIABLE, "1")
    off = "--no-allow-runtime-lora-updating"
    assert started(monkeypatch, store, model, off)[3][VARIABLE] == "0"


@pytest.mark.parametrize("by_flag", [True, False])
def test_it_takes_the_folders_to_load_from(store, model, monkeypatch, tmp_path, by_flag):
    monkeypatch.delenv(VARIABLE, raising=False)
    flags = ["--allow-runtime-lora-updating"] if by_flag else []
    if not by_flag:
        monkeypatch.setenv(VARIABLE, "true")
    code, output, command, _ = started(monkeypatch, store, model, *flags)
    assert (code, command) == (1, None)
    assert "expected --adapter-root DIR" in output
    code, output, command, _ = started(
        monkeypatch, store, model, *flags, "--adapter-root", str(tmp_path / "nowhere")
    )
    assert (code, command) == (1, None)
    assert "no such folder" in output
    monkeypatch.chdir(tmp_path)
    roots = ["--adapter-root", ".", "--adapter-root", "/"]
    code, output, command, environment = started(monkeypatch, store, model, *flags, *roots)
    assert code == 0, output
    assert environment[VARIABLE] == "1"
    assert settings(command)["adapter_roots"] == [str(tmp_path), "/"]
    assert settings(command)["allow_remote_adapters"] is False
    code, output, command, _ = started(monkeypatch, store, model, *flags, "--allow-remote-adapters")
    assert code == 0, output
    assert settings(command)["allow_remote_adapters"] is True
    assert "run time: on, from the Hugging Face Hub" in output


@pytest.mark.parametrize("flags", [["--adapter-root", "/"], ["--allow-remote-adapters"]])
@pytest.mark.parametrize("off", ["flag", "variable"])
def test_where_to_load_from_without_loading_is_refused(store, model, monkeypatch, flags, off):
    monkeypatch.delenv(VARIABLE, raising=False)
    if off == "variable":
        monkeypatch.setenv(VARIABLE, "0")
    else:
        flags = [*flags, "--no-allow-runtime-lora-updating"]
    code, output, command, _ = started(monkeypatch, store, model, *flags)
    assert (code, command) == (1, None)
    assert f"{flags[0]} has no effect" in output


def test_the_hub_alone_does_not_turn_loading_on(store, model, monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    code, output, command, _ = started(monkeypatch, store, model, "--allow-remote-adapters")
    assert (code, command) == (1, None)
    assert "--allow-remote-adapters has no effect" in output


def test_a_place_to_load_from_turns_loading_on(store, model, monkeypatch, tmp_path):
    """`vllm-jd serve STORE --model BASE --adapter-root DIR` is all that it takes."""
    monkeypatch.delenv(VARIABLE, raising=False)
    addresses = ["s3://bucket/adapters", "hf://org"]
    roots = [flag for root in (str(tmp_path), *addresses) for flag in ("--adapter-root", root)]
    code, output, command, environment = started(monkeypatch, store, model, *roots)
    assert code == 0, output
    assert environment[VARIABLE] == "1"
    assert settings(command)["adapter_roots"] == [str(tmp_path)]
    assert settings(command)["adapter_addresses"] == addresses
    assert f"run time: on, from {tmp_path}, s3://bucket/adapters, hf://org and in" in output


@pytest.mark.parametrize(
    ("root", "said"),
    [
        ("ftp://host/x", "'ftp', expected one of hf://, s3://, gs://, az://"),
        ("file:///etc", "'file', expected one of"),
        ("s3://bucket/../x", "dots for parts"),
        ("s3://", "empty parts"),
        ("hf://datasets/org/name", "no name of a model repository"),
    ],
)
def test_other_addresses_are_refused(store, model, monkeypatch, root, said):
    code, output, command, _ = started(monkeypatch, store, model, "--adapter-root", root)
    assert (code, command) == (1, None)
    assert root in output and said in output


def test_a_folder_to_follow_and_a_size(store, model, monkeypatch, tmp_path):
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "d").mkdir()
    flags = ["--adapter-dir", "d", "--max-adapter-size", "2MB"]
    code, output, command, environment = started(monkeypatch, store, model, *flags)
    assert code == 0, output
    assert settings(command)["adapter_dir"] == str(tmp_path / "d")
    assert settings(command)["max_adapter_bytes"] == 2_000_000
    assert environment[VARIABLE] == "0"
    assert "loading adapters at run time: off; the folder d is followed" in output
    code, output, command, _ = started(monkeypatch, store, model, "--adapter-dir", "nowhere")
    assert (code, command) == (1, None)
    assert "--adapter-dir nowhere: no such folder" in output


def test_generations_are_followed_or_taken_when_asked(store, model, monkeypatch):
    code, output, command, _ = started(monkeypatch, store, model)
    assert code == 0 and PluginConfig(**settings(command)).follow_generations is True
    code, output, command, _ = started(monkeypatch, store, model, "--no-follow-generations")
    assert code == 0, output
    assert PluginConfig(**settings(command)).follow_generations is False
    flags = ["--no-follow-generations", "--api-server-count", "2"]
    code, output, command, _ = started(monkeypatch, store, model, *flags)
    assert (code, command) == (1, None)
    assert "--api-server-count" in output and "leave one of them out" in output


def test_a_name_of_an_upload_that_a_flag_takes_ends_the_command(store, model):
    change_fleet(store.path, lambda entries: entries.update(new=uploaded("a" * 64)))
    deleted = store.names[0]
    change_fleet(store.path, lambda entries: entries.update({deleted: DELETED}))
    with pytest.raises(ServeError, match="--lora-modules new: the store has an adapter"):
        server_command(store.path, str(model), ["--lora-modules", f"new={model}"], **OPTIONS)
    free = ["--lora-modules", f"{deleted}={model}"]
    assert server_command(store.path, str(model), free, **OPTIONS)[-2:] == free


@pytest.mark.parametrize(
    ("flags", "variables", "said"),
    [
        ([], {}, ["every interface, port 8000", "none asked for: whoever reaches"]),
        (
            ["--host", "127.0.0.1", "--port=1"],
            {},
            ["127.0.0.1, port 1", "none asked for\n"],
        ),
        (["--host=0.0.0.0"], {"VLLM_API_KEY": "s3cret"}, ["0.0.0.0", "asked for below /v1"]),
        (["--api_key", "s3cret"], {}, ["asked for below /v1"]),
        (["--uds", "/run/jd"], {}, ["the socket /run/jd", "none asked for\n"]),
        (["--config", "c.yaml"], {}, ["as --config says, port as", "API key: as --config says"]),
    ],
)
def test_the_start_says_what_is_open(store, model, monkeypatch, flags, variables, said):
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    code, output, command, _ = started(monkeypatch, store, model, *flags)
    assert code == 0, output
    assert command[-len(flags) :] == flags or not flags
    for text in said:
        assert text in output
    assert "s3cret" not in output


@pytest.mark.parametrize("flags", [["--scheduler_cls", "x"], ["--no-enable-lora"]])
def test_flags_that_contradict_are_refused(store, model, flags):
    with pytest.raises(ServeError, match=flags[0].replace("_", "-")):
        server_command(store.path, str(model), flags, **OPTIONS)


@pytest.mark.parametrize("text", ["{", "[]", '{"vllm_jd": {}}'])
def test_a_bad_additional_config_is_refused(store, model, text):
    with pytest.raises(ServeError, match="--additional-config"):
        server_command(store.path, str(model), [], **OPTIONS | {"additional_config": text})


def test_another_base_model_is_refused(store, model, tmp_path):
    other = tmp_path / "elsewhere" / "tiny"
    other.mkdir(parents=True)
    (other / "config.json").write_text(json.dumps(CONFIG | {"hidden_size": 128}))
    with pytest.raises(StoreError, match="hidden_size: store 64, served model 128"):
        server_command(store.path, str(other), [], **OPTIONS)
    renamed = model.rename(model.with_name("renamed"))
    with pytest.raises(StoreError, match="--store-base-model tiny"):
        server_command(store.path, str(renamed), [], **OPTIONS)
    server_command(store.path, str(renamed), [], **OPTIONS | {"store_base_model": "tiny"})


def store_of(write_adapter, folder, model, *modules, name="x"):
    """A store of one adapter of these modules (name, d_in, d_out) for `model`."""
    from vllm_jd.compressor import read_adapters
    from vllm_jd.store import read_base_model

    factors = {
        module: (torch.ones(d_out, 1), torch.ones(1, d_in)) for module, d_in, d_out in modules
    }
    write_adapter(folder / "in" / name, factors, base="tiny")
    collection = read_adapters([folder / "in"])
    return compress(
        collection, folder / "s", Settings(method="none"), base_model=read_base_model(model)
    )


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "OfSomeRemoteCode"])
@pytest.mark.parametrize(
    ("module", "why"),
    [
        (("model.visual.blocks.0.attn.qkv", 8, 24), "not of the language model"),
        (("model.layers.1.self_attn.q_proj", 64, 64), "1 layers"),
    ],
)
def test_modules_that_cannot_be_served_are_refused_before_the_model_is_loaded(
    tmp_path, write_adapter, model, architecture, module, why
):
    config = CONFIG | {"architectures": [architecture]}
    (model / "config.json").write_text(json.dumps(config))
    good = ("model.layers.0.self_attn.q_proj", 64, 64)
    store = store_of(write_adapter, tmp_path, model, good, module)
    result = CliRunner().invoke(app, ["serve", str(store.path), "--model", str(model)])
    assert result.exit_code == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"error: {store.path} cannot be served with {model}: {module[0]}: ")
    assert why in line


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (("model.layers.0.self_attn.k_proj", 64, 64), "64 → 64, which is 64 → 32 in LlamaForCau"),
        (("model.embed_tokens", 101, 64), "101 → 64, which is 100 → 64 in LlamaForCausalLM"),
    ],
)
def test_a_layer_of_another_width_is_refused_before_the_model_is_loaded(
    tmp_path, write_adapter, model, module, message
):
    config = CONFIG | {"architectures": ["LlamaForCausalLM"]}
    (model / "config.json").write_text(json.dumps(config))
    store = store_of(write_adapter, tmp_path, model, module)
    with pytest.raises(ServeError, match=message):
        server_command(store.path, str(model), [], **OPTIONS)


def test_modules_that_transformers_does_not_know_are_served_with_a_warning(
    tmp_path, write_adapter, model, monkeypatch
):
    """vLLM may have the layer under that name."""
    (model / "config.json").write_text(json.dumps(CONFIG | {"architectures": ["LlamaForCausalLM"]}))
    module = "model.layers.0.self_attn.W_pack"
    store = store_of(write_adapter, tmp_path, model, (module, 64, 64))
    monkeypatch.setattr("vllm_jd.serve.run_server", lambda *args: (0, None))
    result = CliRunner().invoke(app, ["serve", str(store.path), "--model", str(model)])
    assert result.exit_code == 0
    assert result.stderr.startswith(f"warning: the server may refuse the store: {module}: ")
    assert topics(result.stderr) == ["warning", *OPEN]


def test_names_used_twice_are_refused_before_the_model_is_loaded(tmp_path, store, model):
    first, second, _ = store.names
    for flags, flag in (
        (["--served-model-name", "x", first], "--served-model-name"),
        (["--lora-modules", f"{second}={model}"], "--lora-modules"),
    ):
        with pytest.raises(ServeError, match=flag) as caught:
            server_command(store.path, str(model), flags, **OPTIONS)
        assert "\n" not in str(caught.value)
        assert flags[-1].split("=")[0] in str(caught.value)
    free = ["--served-model-name", "x", "--lora-modules", f"new={model}"]
    assert server_command(store.path, str(model), free, **OPTIONS)[-4:] == free


@pytest.mark.parametrize("path", ["/not/a/real/path", "~/no-such-folder-of-ours"])
def test_a_module_from_a_folder_that_is_not_there_is_refused(store, model, path):
    """The first is what vLLM calls its warm-up adapters' path."""
    for item in (f"new={path}", json.dumps({"name": "new", "path": path})):
        with pytest.raises(ServeError, match=f"--lora-modules new: {path}: no such folder"):
            server_command(store.path, str(model), ["--lora-modules", item], **OPTIONS)


def test_however_a_store_is_spelled_its_requests_name_one_path(tmp_path, store, monkeypatch):
    from vllm_jd.plugin.api.requests import adapter_request, store_path

    (tmp_path / "link").symlink_to(store.path)
    (tmp_path / "x").mkdir()
    monkeypatch.chdir(tmp_path)
    name = store.names[0]
    spellings = [tmp_path / "x" / ".." / store.path.name, tmp_path / "link", Path(store.path.name)]
    for spelled in (store.path, *spellings):
        served = engine_args(spelled)["additional_config"]["vllm_jd"]["store"]
        assert served == str(store.path.resolve())
        asked = adapter_request(Store.open(spelled), name).lora_path
        assert asked == store_path(served, store.generation)


def test_the_reason_why_a_process_refused_is_the_last_line(tmp_path, store, model, monkeypatch):
    """Of a server that loads for long and says much: a child that fails as a worker would."""
    script = tmp_path / "server.py"
    script.write_text(
        "from vllm_jd.plugin.faults import faults_told\n"
        "print('loading')\n"
        "with faults_told():\n"
        "    raise ValueError('found this,\\n  expected that')\n"
    )
    command = [sys.executable, str(script)]
    monkeypatch.setattr("vllm_jd.serve.server_command", lambda *args, **options: command)
    result = CliRunner().invoke(app, ["serve", str(store.path), "--model", str(model)])
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1] == "error: found this, expected that"
    script.write_text("raise SystemExit(3)")
    result = CliRunner().invoke(app, ["serve", str(store.path), "--model", str(model)])
    assert (result.exit_code, topics(result.stderr)) == (3, OPEN)


def test_a_damaged_store_ends_the_command_with_a_message(store, model):
    file = next(store.folder.glob("cores-*"))
    damaged = bytearray(file.read_bytes())
    damaged[-1] ^= 1
    file.write_bytes(damaged)
    result = subprocess.run(
        [sys.executable, "-m", "vllm_jd.cli.app", "serve", str(store.path), "--model", str(model)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 1
    assert str(file) in result.stderr
    assert "sha256" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_server_keeps_to_the_generation_it_was_started_on(store, model):
    config = PluginConfig(**engine_args(store.path)["additional_config"]["vllm_jd"])
    from benchmarks.synthetic import RandomCollection

    compress(RandomCollection(model, 2, rank=2), store.path, Settings(rank=2))
    assert Store.open(store.path).generation == 2
    for verify in (True, False):
        opened = config.open_store(verify=verify)
        assert (opened.generation, len(opened)) == (1, 3)


def test_flags_before_the_store_get_a_hint(store, model):
    arguments = ["serve", "--port", "8000", str(store.path), "--model", str(model)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1
    assert "no such store; STORE comes first" in result.output


def test_engine_args_suit_vllms_own(store, model):
    from vllm import EngineArgs

    args = EngineArgs(model=str(model), **engine_args(store.path, max_num_seqs=7))
    assert args.max_num_seqs == 7
    assert args.additional_config["vllm_jd"]["store"] == str(store.path.resolve())
