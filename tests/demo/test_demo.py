"""The demo's own store: made once, and made again when something of it is another."""

import json
from dataclasses import replace
from io import StringIO

from rich.console import Console

from vllm_jd.compressor import Settings, read_adapters
from vllm_jd.compressor.run.compress import compress
from vllm_jd.demo import demo


def test_a_second_demo_takes_the_store_of_the_first(tmp_path, write_adapters):
    source = tmp_path / "adapters"
    write_adapters(source, 3, config={"base": "tiny"})
    model = tmp_path / "tiny"
    model.mkdir()
    (model / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": 24}))
    said = StringIO()

    def generation():
        return demo._compress(Console(file=said), tmp_path / "store", model, source).generation

    assert generation() == 1
    assert generation() == 1
    assert "already there" in said.getvalue()
    write_adapters(source, 4, config={"base": "tiny"})
    assert generation() == 2
    compress(read_adapters([source]), tmp_path / "store", replace(Settings(), rank=2))
    assert generation() == 4
