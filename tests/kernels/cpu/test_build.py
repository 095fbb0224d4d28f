"""Building the CPU kernel: once, of all its files, with Python's numbers; and what if it fails."""

import ctypes
import logging
import os
import platform
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from tests.kernels.test_kernels import DTYPES, assert_close, decoded, make_case, needs_compiler
from vllm_jd import kernels, row
from vllm_jd.kernels import PACKED, cpu
from vllm_jd.kernels.cpu import build, layout


@pytest.fixture
def fresh_library():
    """Forget which kernel was loaded, before and after."""
    build.loaded_library.cache_clear()
    yield
    build.loaded_library.cache_clear()


def write_compiler(path, body):
    path.write_text(f'#!/bin/sh\n[ "$1" = --version ] && {{ echo fake 1.0; exit; }}\n{body}\n')
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize("fault", ["no compiler", "wrong CXX", "compiler fails", "no cache folder"])
def test_falls_back_with_one_warning(monkeypatch, tmp_path, caplog, fresh_library, fault):
    monkeypatch.delenv("VLLM_JD_KERNEL", raising=False)
    monkeypatch.setenv("VLLM_JD_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("CXX", raising=False)
    if fault == "no compiler":
        monkeypatch.setenv("PATH", str(tmp_path))
        expected = "apt-get install g++"
    elif fault == "wrong CXX":
        monkeypatch.setenv("CXX", "g++-1")
        expected = "CXX=g++-1 was not found"
    elif fault == "compiler fails":
        compiler = write_compiler(tmp_path / "c++", "echo no such flag >&2; exit 1")
        monkeypatch.setenv("CXX", compiler)
        expected = "no such flag"
    else:
        monkeypatch.setenv("CXX", write_compiler(tmp_path / "c++", ""))
        (tmp_path / "cache").write_text("a file")
        expected = "VLLM_JD_CACHE"
    case = make_case()
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert_close(case.run(), case)
    assert kernels.backend_name("cpu") == "reference"
    assert len(caplog.records) == 1 and expected in caplog.text
    monkeypatch.setenv("VLLM_JD_KERNEL", "cpu")
    with pytest.raises(RuntimeError, match="could not be built"):
        case.run()


@needs_compiler
def test_two_processes_build_at_once(tmp_path):
    """Each sees a whole library, and one stays, though both write slowly."""
    write = f'out=$(eval echo \\${{$#}}); head -c 9999 "{build.build()}" > "$out"; sleep 1'
    write += f'; cat "{build.build()}" > "$out"'
    compiler = write_compiler(tmp_path / "slow-c++", write)
    environment = os.environ | {"CXX": compiler, "VLLM_JD_CACHE": str(tmp_path / "cache")}
    command = [
        sys.executable,
        "-c",
        "from vllm_jd.kernels.cpu import backend as cpu; print(cpu.isa())",
    ]
    processes = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    assert [p.communicate()[0].strip() for p in processes] == [cpu.isa()] * 2
    assert len(list((tmp_path / "cache" / "kernels").iterdir())) == 1


@needs_compiler
@pytest.mark.skipif(platform.machine() != "x86_64", reason="x86-64 instruction sets")
def test_other_instruction_sets(monkeypatch):
    """What the kernel is on older machines, as far as this one can run it."""
    sets = {"x86-64": "portable", "x86-64-v3": "avx2", "x86-64-v4": "avx512"}
    needs = {"x86-64": "sse2", "x86-64-v3": "avx2", "x86-64-v4": "avx512f"}
    features = build.cpu_features().split()
    sets = {name: isa for name, isa in sets.items() if needs[name] in features}

    def built(name):
        flags = ["-O0", *(f for f in build.FLAGS if f not in ("-O3", "-march=native"))]
        return build.build((*flags, f"-march={name}"))

    with ThreadPoolExecutor() as pool:
        paths = list(pool.map(built, sets))
    for path, isa in zip(paths, sets.values(), strict=True):
        library = build.load(path)
        monkeypatch.setattr(cpu, "loaded_library", lambda library=library: library)
        assert cpu.isa() == isa
        for dtype in DTYPES:
            for seed in range(4):
                shape = {"n_tokens": 45, "d_in": 100, "d_out": (300, 33), "depth": 2}
                case = make_case(seed, dtype=dtype, strided=True, int8=seed % 2 == 1, **shape)
                together = case.run()
                assert torch.equal(together, decoded(case).run())
                assert_close(together, case)
                assert torch.equal(case.run([7])[0], together[7])


@pytest.fixture
def empty_files(monkeypatch, tmp_path):
    """A compiler that makes empty files, and a cache of the test's own."""
    compiler = write_compiler(tmp_path / "c++", ': > "$(eval echo \\${$#})"')
    monkeypatch.setenv("CXX", compiler)
    monkeypatch.setenv("VLLM_JD_CACHE", str(tmp_path / "cache"))


def test_a_change_of_any_file_is_another_kernel(tmp_path, empty_files):
    sources = tmp_path / "sources"
    shutil.copytree(build.SOURCES, sources)
    built = {build.build()}
    assert build.build(sources=sources) in built, "where the files lie does not matter"
    files = sorted(sources.iterdir())
    assert len(files) > 10
    for file in files:
        file.write_text(file.read_text() + "\n")
        found = build.build(sources=sources)
        assert found not in built, file.name
        built.add(found)
    files[0].rename(files[0].with_name("other.h"))
    assert build.build(sources=sources) not in built


@pytest.mark.parametrize(
    ("module", "name", "value"),
    [
        (row, "BLOCK", 64),
        (row, "CORE_FULL", 3),
        (row, "ROW_FIELDS", row.ROW_FIELDS[::-1]),
        (build, "PACKED", 1 << 29),
        *((layout, name, 4) for name in ("UNIT", "GROUP", "V_COLUMNS", "SIDE", "LANES")),
        (layout, "MAX_INT8_RANK", 256),
    ],
)
def test_other_numbers_are_another_kernel(monkeypatch, empty_files, module, name, value):
    before = build.build()
    monkeypatch.setattr(module, name, value)
    assert build.build() != before


@needs_compiler
def test_the_kernel_has_the_numbers_of_python(tmp_path):
    numbers = {
        "kVStart": row.V_START,
        "kUStart": row.U_START,
        "kRank": row.RANK,
        "kCoreKind": row.CORE_KIND,
        "kScaleRow": row.SCALE_ROW,
        "kCoreSlot": row.CORE_SLOT,
        "kCoreOffset": row.CORE_OFFSET,
        "kFields": len(row.ROW_FIELDS),
        "kCoreNone": row.CORE_NONE,
        "kCoreFull": row.CORE_FULL,
        "kCoreDiagonal": row.CORE_DIAGONAL,
        "kStepBlock": row.BLOCK,
        "kPacked": PACKED,
        "kUnit": layout.UNIT,
        "kGroup": layout.GROUP,
        "kVColumns": layout.V_COLUMNS,
        "kSide": layout.SIDE,
        "kLanes": layout.LANES,
        "kMaxInt8Rank": layout.MAX_INT8_RANK,
    }
    text = f'#include "constants.h"\nextern "C" int numbers[] = {{{", ".join(numbers)}}};\n'
    (tmp_path / "kernel.cpp").write_text(text)
    library = ctypes.CDLL(str(build.build(("-shared", "-fPIC"), sources=tmp_path)))
    found = (ctypes.c_int * len(numbers)).in_dll(library, "numbers")
    assert dict(zip(numbers, found, strict=True)) == numbers
    # No file has any of them for itself.
    for file in build.SOURCES.iterdir():
        for name in numbers:
            assert f"{name} = " not in file.read_text(), f"{file.name} has its own {name}"


@needs_compiler
@pytest.mark.parametrize(
    ("module", "name", "value"), [(row, "BLOCK", 64), (layout, "LANES", 8), (layout, "SIDE", 32)]
)
def test_numbers_that_the_code_was_not_written_for_do_not_compile(
    monkeypatch, tmp_path, module, name, value
):
    if module is layout and cpu.isa() != "avx512_bf16":
        pytest.skip("code with packed bases is for processors that have AVX512-BF16")
    monkeypatch.setenv("VLLM_JD_CACHE", str(tmp_path))
    monkeypatch.setattr(module, name, value)
    with pytest.raises(build.BuildError, match="written for"):
        build.build(("-fsyntax-only", "-march=native", "-std=c++17"))
