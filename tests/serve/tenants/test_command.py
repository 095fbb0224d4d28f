"""What `vllm-jd serve` says of keys before it starts anything."""

import pytest

from vllm_jd.serve.exposure import exposure
from vllm_jd.serve.server import ServeError, _check_keys
from vllm_jd.serve.tenants.keys import add_key


@pytest.mark.parametrize(
    ("queued", "args", "environment", "told"),
    [
        (None, ["--api-key", "sk-x"], {}, "found --api-keys and --api-key, which is one key"),
        (None, ["--api_key=sk-x"], {}, "and --api-key,"),
        (None, [], {"VLLM_API_KEY": "sk-x"}, "and VLLM_API_KEY,"),
        (None, [], {"VLLM_ENABLE_RESPONSES_API_STORE": "1"}, "stored responses have no tenant"),
    ],
)
def test_what_knows_no_keys_is_refused_beside_them(tmp_path, queued, args, environment, told):
    file = tmp_path / "keys.json"
    add_key(file, name="a")
    _check_keys(file, queued, [], {"VLLM_API_KEY": "", "VLLM_ENABLE_RESPONSES_API_STORE": "0"})
    with pytest.raises(ServeError, match=told):
        _check_keys(file, queued, args, environment)


def test_a_file_has_to_be_there_and_a_queue_needs_one(tmp_path):
    _check_keys(None, None, ["--api-key", "sk-x"], {"VLLM_API_KEY": "sk-x"})
    with pytest.raises(ServeError, match=r"needs --api-keys FILE.*--max-num-queued-reqs"):
        _check_keys(None, 5, [], {})
    with pytest.raises(ServeError, match=r"--api-keys .*none\.json: cannot be read.*keys add"):
        _check_keys(tmp_path / "none.json", None, [], {})


def test_the_start_says_what_is_asked_for(tmp_path):
    lines = exposure([], {}, updating=False, api_keys=tmp_path / "k.json")
    assert lines[1] == f"API key: one of {tmp_path}/k.json asked for, but for {OPEN}"


OPEN = "/dashboard, /health, /ping, /version"
