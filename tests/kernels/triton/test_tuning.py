"""Tables of configurations by GPU: what is read, what is chosen, what is refused."""

import json
from dataclasses import replace

import pytest

from vllm_jd.kernels.triton import backend, tuning
from vllm_jd.kernels.triton.plan import CONFIGS, DEFAULT, LayerShape, plan

QKV = LayerShape(4096, (4096, 1024, 1024), max_rank=16)
NARROW = next(config for config in CONFIGS if config.name == "narrow")
WIDE = replace(DEFAULT, name="wide, rows", row_tokens=128)


@pytest.fixture
def table(tmp_path, monkeypatch):
    """A function that writes the table of a device, and forgets those that were read."""
    monkeypatch.setattr(tuning, "FOLDER", tmp_path)
    tuning.read_table.cache_clear()

    def write(entries, device="NVIDIA H100 80GB HBM3", **more):
        path = tuning.table_path(device)
        path.write_text(json.dumps({"entries": entries, "microseconds": 3} | more))
        tuning.read_table.cache_clear()
        return path

    yield write
    tuning.read_table.cache_clear()


def test_what_was_measured_on_the_layer_with_the_next_larger_number_of_tokens(table):
    other = replace(QKV, d_in=8192)
    path = table([
        tuning.row(QKV, 256, NARROW), tuning.row(QKV, 32, WIDE), tuning.row(other, 1, NARROW),
    ])  # fmt: skip
    entries = tuning.of_layer(tuning.read_table(path), QKV)
    chosen = {n: tuning.choose(entries, n) for n in (1, 32, 33, 256, 257, 5000)}
    assert chosen == {1: WIDE, 32: WIDE, 33: NARROW, 256: NARROW, 257: NARROW, 5000: NARROW}
    assert tuning.choose(tuning.of_layer(tuning.read_table(path), other), 7) == NARROW


@pytest.mark.parametrize(
    "shape",
    [
        replace(QKV, widths=(4096, 1024)),
        replace(QKV, max_rank=17),
        replace(QKV, element_size=4),
    ],
)
def test_the_default_for_other_layers(table, shape):
    entries = tuning.read_table(table([tuning.row(QKV, 32, WIDE)]))
    assert tuning.choose(tuning.of_layer(entries, shape), 8) == DEFAULT
    # What changes no tile, fits: ranks of the same block, bases and cores in codes.
    for like in (replace(QKV, max_rank=9), replace(QKV, int8=True, core_bits=4, scales=True)):
        assert tuning.choose(tuning.of_layer(entries, like), 8) == WIDE


def test_no_table_is_no_fault(table, tmp_path):
    assert tuning.read_table(tuning.table_path("A GPU of tomorrow")) == ()
    assert tuning.choose((), 8) == DEFAULT


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("NVIDIA H100 80GB HBM3", "nvidia-h100-80gb-hbm3.json"),
        ("../../etc/passwd", "etc-passwd.json"),
        ("", "unknown.json"),
    ],
)
def test_a_device_is_a_file_of_the_folder(name, file):
    assert tuning.table_path(name) == tuning.FOLDER / file


def broken(change):
    row = tuning.row(QKV, 32, WIDE)
    change(row)
    return {"entries": [row]}


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("{", "JSONDecodeError"),
        ("[]", "TypeError"),
        ("{}", "KeyError: 'entries'"),
        (broken(lambda row: row.pop("widths")), "KeyError: 'widths'"),
        (broken(lambda row: row["config"].update(speed=9)), "speed"),
        (broken(lambda row: row["config"].pop("tile_k")), "tile_k"),
        (broken(lambda row: row["config"].update(tile_k=[1, 2, 3])), "ValueError"),
        (broken(lambda row: row["config"].update(stages="many")), "stages must be a whole number"),
    ],
)
def test_a_file_that_is_no_table_is_refused_by_its_name(table, content, why):
    path = table([])
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ValueError, match=f"{path} is no table of configurations") as refused:
        tuning.read_table(path)
    assert why in str(refused.value) and "--only tuned, or remove it" in str(refused.value)


def test_the_kernels_are_launched_as_the_table_says(table):
    shape = LayerShape(4096, (32,), max_rank=16)
    path = table([tuning.row(shape, 64, NARROW)])

    class Handle(backend._Handle):
        """Without kernels, which need a GPU or the interpreter."""

        def __init__(self, config, tuned):
            self.shape, self._config, self._tuned = shape, config, tuned

    tuned = tuning.of_layer(tuning.read_table(path), shape)
    assert Handle(None, tuned).plan(5) == plan(shape, 5, NARROW)
    assert Handle(None, ()).plan(5) == plan(shape, 5, DEFAULT)
    assert Handle(WIDE, tuned).plan(5) == plan(shape, 5, WIDE)


def test_what_ships_can_be_read():
    """Tables of the package, where there are any."""
    for path in tuning.FOLDER.glob("*.json"):
        assert tuning.read_table(path)
