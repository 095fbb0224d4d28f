"""The report: its numbers are the summary's, it holds on odd stores, and it is one page alone."""

import base64
import re
import shutil
import sys
import warnings
from html.parser import HTMLParser

import numpy as np
import pytest
import torch

from vllm_jd.compressor import AdapterError, Settings, read_adapters
from vllm_jd.compressor.algebra.bounds import bounds, spectrum
from vllm_jd.compressor.methods.registry import METHODS
from vllm_jd.compressor.report import report_data
from vllm_jd.compressor.report.report import ReportError, write_report
from vllm_jd.compressor.report.report_data import (
    adapter_map,
    byte_parts,
    cluster_numbers,
    collect,
    places,
    shared_clusters,
)
from vllm_jd.compressor.report.summary import rank_text, store_summary
from vllm_jd.compressor.run.compress import compress
from vllm_jd.row import RANK

ALL = {"modules", "adapters", "clusters", "map", "spectra", "bounds", "bytes"}
WITHOUT_JD = {"modules", "adapters", "spectra", "bytes"}


class Page(HTMLParser):
    """What a browser makes of the page: its tags, the tiles, the tables, and its text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.text, self.inside = [], [], "", None
        self.tiles, self.rows, self.tables = {}, [], {}
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += [(tag, key, value) for key, value in attributes]
        self.inside = tag
        if tag == "tr":
            self.rows.append([])

    def handle_data(self, data):
        self.text += data
        tag = self.inside
        if tag == "dt":
            self.key = data
        elif tag == "dd":
            self.tiles[self.key] = data
        elif tag == "caption":
            self.rows = self.tables[data] = []
        elif tag in ("td", "th"):
            self.rows[-1].append(data)

    def handle_endtag(self, tag):
        self.inside = None

    @property
    def images(self):
        return [value for tag, key, value in self.attributes if (tag, key) == ("img", "src")]


def stored(tmp_path, folders, **settings):
    return compress(read_adapters(folders), tmp_path / "store", Settings(**settings))


def made(tmp_path, folders, **settings):
    """A store, and the report on it: (store, files, page)."""
    store = stored(tmp_path, folders, **settings)
    extra = collect(read_adapters(folders), store)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of matplotlib: a layout that failed, a missing glyph
        files = write_report(store, tmp_path / "page.html", extra=extra)
    return store, files, Page(files[0].read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def plain(tmp_path_factory, write_adapters):
    folder = tmp_path_factory.mktemp("plain")
    return made(folder, write_adapters(folder / "in", 6, kind="real"), rank=4, clusters=2)


@pytest.fixture
def undrawn(monkeypatch):
    """Figures are made, but not drawn, which takes a second a report."""
    from vllm_jd.compressor.report import figures

    monkeypatch.setattr(figures, "png", lambda figure: b"")


def figures_of(files):
    return {file.stem for file in files[1:]}


def test_numbers_are_those_of_the_summary(tmp_path, write_adapters, undrawn):
    folders = write_adapters(tmp_path / "in", 14, kind="real", ranks=(2, 5, 3))
    limits = {"store_dtype": "int8", "max_adapter_error": 0.1}
    store, _, page = made(tmp_path, folders, rank=4, clusters=3, **limits)
    summary = store_summary(store)
    sizes = summary["sizes"]
    assert 0 < summary["uncompressed"] < 14
    assert page.tiles["adapters"] == "14"
    assert page.tiles["modules"] == "4"
    before, after = (
        float(size) * {"kB": 1e3, "MB": 1e6}[unit]
        for size, unit in re.findall(r"([\d.]+) (kB|MB)", page.tiles["bytes"])
    )
    assert before == pytest.approx(sizes["adapter_bytes"], rel=0.05)
    assert after == pytest.approx(sizes["store_bytes"], rel=0.05)
    saved = float(page.tiles["parameters saved"].rstrip("%")) / 100
    assert saved == pytest.approx(sizes["parameter_saved_ratio"], abs=5e-4)
    assert float(page.tiles["mean error"]) == pytest.approx(summary["error"], rel=1e-3)
    exact = float(page.tiles["before quantisation"])
    assert exact == pytest.approx(summary["exact_error"], rel=1e-3)
    assert page.tiles["kept uncompressed"] == str(summary["uncompressed"])
    count = len(summary["clusters"])
    least, most = min(summary["clusters"]), max(summary["clusters"])
    assert page.tiles["clusters"] == f"{count} (of {least} to {most})"
    for title, what, most in (("Worst adapters", "adapters", 10), ("Worst modules", "modules", 5)):
        worst = sorted(summary[what], key=lambda line: -line["error"])[:most]
        shown = page.tables[title][1:]
        assert [row[0] for row in shown] == [line["name"] for line in worst]
        for row, line in zip(shown, worst, strict=True):
            assert float(row[2]) == pytest.approx(line["error"], rel=5e-3)


def test_without_the_sources(plain, tmp_path):
    """The page says what is missing; figures of an earlier report go."""
    store, files, page = plain
    assert figures_of(files) == ALL
    shutil.copytree(files[0].with_name("page-figures"), tmp_path / "page-figures")
    bare = write_report(store, tmp_path / "page.html")
    assert figures_of(bare) == ALL - {"spectra", "bounds"}
    assert {file.stem for file in (tmp_path / "page-figures").iterdir()} == figures_of(bare)
    page = Page(bare[0].read_text(encoding="utf-8"))
    assert page.tiles["before quantisation"] == "not quantised"
    assert page.text.count("vllm-jd report STORE --out HTML --adapters ADAPTERS") == 1
    assert "Spectra of the sources, Error against what a JD could reach: Needs" in page.text
    for file in bare[1:]:  # the same figure, the same bytes
        assert (
            file.read_bytes() == files[0].with_name("page-figures").joinpath(file.name).read_bytes()
        )


@pytest.mark.parametrize(
    ("n", "expected", "settings"),
    [
        (8, ALL, {"rank": 4, "clusters": 3}),
        (8, ALL, {"rank": 3, "store_dtype": "int4"}),
        (1, ALL - {"map"}, {"rank": 4}),
        (2, ALL - {"map"}, {"rank": 30, "clusters": 2}),
        (8, ALL - {"map", "bounds"}, {"rank": 1, "max_adapter_error": 0.0}),
        (3, WITHOUT_JD, {"method": "svd", "rank": 2}),
        (1, WITHOUT_JD, {"method": "none"}),
    ],
)
def test_odd_stores_have_their_figures(tmp_path, write_adapters, n, expected, settings):
    folders = write_adapters(tmp_path / "in", n, kind="real", ranks=(3, 2))
    _, files, page = made(tmp_path, folders, **settings)
    assert figures_of(files) == expected
    assert len(page.images) == len(expected)
    assert page.tags.count("figure") == len(expected)  # no empty panels
    assert (page.text.count("Not drawn") == 1) == (expected != ALL)
    for file, image in zip(files[1:], page.images, strict=True):
        content = base64.b64decode(image.removeprefix("data:image/png;base64,"))
        assert content.startswith(b"\x89PNG")
        assert content == file.read_bytes()


@pytest.mark.parametrize("method", list(METHODS))
def test_every_method_has_a_report(tmp_path, write_adapters, undrawn, method):
    folders = write_adapters(tmp_path / "in", 6, kind="real")
    settings = Settings(method).adapted(rank=3, clusters=2, matrices=2, steps=5)
    store, files, page = made(tmp_path, folders, **settings.as_dict())
    assert figures_of(files) >= WITHOUT_JD
    assert ("map" in figures_of(files)) == (store.manifest.core_row > 0)
    assert page.tiles["adapters"] == "6"


def test_ranks_are_those_of_the_rows(tmp_path, write_adapters, undrawn):
    """JD, SVD, and adapters as they are: what `inspect` and the page say."""
    folders = write_adapters(tmp_path / "in", 8, kind="real", ranks=(2, 4))
    cases = {
        "3": {"rank": 3},
        "3, own 2–4": {"rank": 3, "max_adapter_error": 0.0},
        "own 1": {"method": "svd", "rank": 1},
        "own 2–4": {"method": "none"},
    }
    for i, (text, settings) in enumerate(cases.items()):
        store, _, page = made(tmp_path / str(i), folders, **settings)
        modules = store_summary(store)["modules"]
        assert rank_text(modules) == text
        assert {row[1] for row in page.tables["Worst modules"][1:]} == {text}
        for module in modules:
            column = store.module_index(module["name"])
            chosen = store.chosen[:, column].flatten().long()
            used = store.rows(module["name"])[chosen[chosen >= 0], RANK]
            assert module["rank"] == (3 if text[0] == "3" else int(used.max()))
            assert set(module["own_ranks"]) <= set(used.tolist())


def test_adapters_of_zeros_and_missing_modules(tmp_path, write_adapter, make_factors):
    adapters = make_factors(4, kind="real")
    adapters[0] = {m: (torch.zeros_like(b), a) for m, (b, a) in adapters[0].items()}
    for module in list(adapters[1])[1:]:
        del adapters[1][module]
    folders = [write_adapter(tmp_path / "in" / str(i), f) for i, f in enumerate(adapters)]
    _, files, page = made(tmp_path, folders, rank=2, clusters=2)
    assert figures_of(files) == ALL
    assert "nan" not in page.text


def test_one_page_that_needs_nothing_else(plain):
    _, files, page = plain
    text = files[0].read_text(encoding="utf-8")
    assert "http://" not in text and "https://" not in text and "url(" not in text
    assert not {"script", "link", "iframe", "object", "a"} & set(page.tags)
    assert len(page.images) == 7
    assert all(image.startswith("data:image/png;base64,") for image in page.images)
    assert len(text) < 1_000_000


def test_names_are_data(tmp_path, write_adapter, make_factors):
    names = ["<script>alert(1)", '"><img src=x onerror=y>', "$\\frac{$ {0} %s", "漢字 & 😀 &amp;"]
    folders = [
        write_adapter(tmp_path / "in" / name, factors, base='org/<b onclick="x">')
        for name, factors in zip(names, make_factors(4), strict=True)
    ]
    *_, page = made(tmp_path, folders, rank=2)
    assert {row[0] for row in page.tables["Worst adapters"][1:]} == set(names)
    assert not {"script", "b onclick"} & set(page.tags)
    assert not [key for _, key, _ in page.attributes if key.startswith("on")]
    assert len(page.images) == 7
    assert 'base model org/<b onclick="x">' in page.text


def test_spectra_and_bounds_are_of_the_sources(tmp_path, write_adapters):
    folders = write_adapters(tmp_path / "in", 9, kind="real", ranks=(2, 5, 3))
    settings = {"rank": 3, "clusters": 2, "store_dtype": "float32", "iterations": 50}
    store = stored(tmp_path, folders, **settings)
    collection = read_adapters(folders)
    extra = collect(collection, store)
    assert list(extra.spectra) == list(extra.bounds) == list(collection.shapes)
    for i, module in enumerate(collection.shapes):
        factors = collection.factors(module)
        assert torch.equal(extra.spectra[module], spectrum(factors, 5))
        assignment = store.chosen[:, i, 0].long()
        assert extra.bounds[module].bounds == bounds(factors, assignment, 2, 3)
        found = extra.bounds[module]
        assert (found.whole, found.adapters) == (True, 9)
        assert found.reached == pytest.approx(float(store.error[:, i].double().mean()))
        lower = max(found.bounds.error_at_least, found.bounds.error_at_least_one_sided)
        assert lower - 1e-9 <= found.reached <= 1


def test_bounds_leave_out_the_adapters_that_were_kept(tmp_path, write_adapters):
    folders = write_adapters(tmp_path / "in", 14, kind="real", ranks=(2, 5, 3))
    limits = {"rank": 4, "max_adapter_error": 0.25}
    store = stored(tmp_path, folders, **limits)
    extra = collect(read_adapters(folders), store)
    summary = store_summary(store)
    kept = torch.tensor([adapter["uncompressed"] for adapter in summary["adapters"]])
    assert 0 < int(kept.sum()) < 14
    for module, found in extra.bounds.items():
        column = store.module_index(module)
        assert found.adapters == 14 - int(kept.sum())
        assert found.reached == pytest.approx(float(store.error[~kept, column].double().mean()))


def test_time_is_bounded(tmp_path, write_adapters, monkeypatch, undrawn):
    """Of too much, evenly spaced modules of every kind; then evenly spaced adapters."""
    shapes = {f"model.layers.{i}.self_attn.{k}_proj": (16, 16) for i in range(6) for k in "qkv"}
    folders = write_adapters(tmp_path / "in", 12, shapes=shapes, kind="real")
    collection = read_adapters(folders)
    store = compress(collection, tmp_path / "store", Settings(rank=2))
    monkeypatch.setattr(report_data, "_READ_BYTES", collection.factor_bytes // 2)
    found = collect(collection, store)
    chosen = places(found.spectra)
    assert sorted(chosen) == [(f"{k}_proj", layer) for k in "kqv" for layer in (1, 3, 5)]
    monkeypatch.setattr(report_data, "_OPERATIONS", 1)
    found = collect(collection, store)
    assert sorted(kind for kind, _ in places(found.bounds)) == ["k_proj", "q_proj", "v_proj"]
    assert all(not b.whole and 1 <= b.adapters < 12 for b in found.bounds.values())
    files = write_report(store, tmp_path / "page.html", extra=found)
    assert figures_of(files) == ALL
    text = Page(files[0].read_text(encoding="utf-8")).text
    assert "9 of 18 modules" in text and "3 of 18 modules" in text
    assert "JD without loss" not in text  # which only all adapters could tell


def test_other_adapters_than_the_stores_are_refused(tmp_path, write_adapters):
    folders = write_adapters(tmp_path / "in", 4)
    store = stored(tmp_path, folders, rank=2)
    with pytest.raises(AdapterError, match=r"adapter-003: in the store .*, not among"):
        collect(read_adapters(folders[:3]), store)
    changed = write_adapters(tmp_path / "other", 5, seed=1)
    with pytest.raises(AdapterError) as caught:
        collect(read_adapters([*folders[1:], changed[0], changed[4]]), store)
    assert "adapter-000: changed since" in str(caught.value)
    assert "adapter-004: not in the store" in str(caught.value)


def test_the_map_is_a_pca_of_what_is_stored(tmp_path, write_adapters):
    """Against dense deltas in float64: these modules are narrow enough to be seen whole."""
    folders = write_adapters(tmp_path / "in", 9, kind="real", ranks=(2, 5, 3))
    settings = {"rank": 3, "clusters": 2, "store_dtype": "float32"}
    store = stored(tmp_path, folders, **settings)
    rows = []
    for name in store.names:
        deltas = [(b.double() @ a.double()).flatten() for b, a in store.factors(name).values()]
        rows.append(torch.cat([delta / delta.norm() for delta in deltas]))
    x = torch.stack(rows)
    x -= x.mean(0)
    u, s, _ = torch.linalg.svd(x, full_matrices=False)
    found = adapter_map(store, shared_clusters(store))
    expected = (u * s)[:, :2].numpy()
    for k in (0, 1):
        sign = np.sign(expected[:, k] @ found.points[:, k])
        assert found.points[:, k] == pytest.approx(sign * expected[:, k], abs=1e-4)
    assert found.share == pytest.approx((s**2 / (s**2).sum())[:2].numpy(), rel=1e-4)
    assert found.cluster.tolist() == store.chosen[:, 0, 0].tolist()


def test_cluster_numbers(tmp_path, write_adapters):
    folders = write_adapters(tmp_path / "in", 9, kind="real")
    settings = {"rank": 3, "clusters": 3}
    store = stored(tmp_path, folders, **settings)
    found = cluster_numbers(store, shared_clusters(store))
    assert found.sizes.shape == (4, 3)
    for column in range(4):
        for c in range(3):
            own = store.chosen[:, column, 0] == c
            assert found.sizes[column, c] == int(own.sum())
            if own.any():
                mean = float(store.error[own, column].double().mean())
                assert found.errors[column, c] == pytest.approx(mean)
            else:
                assert np.isnan(found.errors[column, c])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "int4"])
def test_bytes_by_what_they_hold(tmp_path, write_adapters, tiny_shapes, dtype):
    """Against the tensors of the files."""
    from safetensors.torch import load_file

    folders = write_adapters(tmp_path / "in", 6, kind="real")
    settings = {"rank": 3, "clusters": 2, "max_adapter_error": 0.1}
    store = stored(tmp_path, folders, store_dtype=dtype, **settings)
    parts = byte_parts(store)
    assert sum(parts.values()) == store.stored_bytes
    assert all(count > 0 for count in parts.values())
    shared = private = 0
    for file in store.manifest.basis_shards:
        for key, tensor in load_file(store.folder / file).items():
            if ".U" in key or ".V" in key:
                shared += tensor[: 2 * 3].nbytes
                private += tensor[2 * 3 :].nbytes
    cores = sum(
        tensor.nbytes
        for shard in store.manifest.core_shards
        for tensor in load_file(store.folder / shard.file).values()
    )
    assert parts["shared bases"] == shared
    assert parts["private vectors"] == private
    assert parts["cores"] == cores


def test_kinds_and_layers_of_module_names():
    llama = ["model.layers.0.self_attn.q_proj", "model.layers.10.mlp.up_proj", "lm_head"]
    assert places(llama) == [("q_proj", 0), ("up_proj", 10), ("lm_head", None)]
    crossed = ["decoder.block.1.attn.q", "decoder.block.1.cross.q", "decoder.block.1.mlp.w"]
    assert places(crossed) == [("attn.q", 1), ("cross.q", 1), ("w", 1)]
    towers = ["text.layers.0.attn.q", "vision.layers.0.attn.q"]
    assert places(towers) == [("text.layers.*.attn.q", 0), ("vision.layers.*.attn.q", 0)]
    experts = [f"model.layers.0.mlp.experts.{i}.w1" for i in range(3)]
    assert places(experts) == [(f"mlp.experts.{i}.w1", 0) for i in range(3)]


def test_many_adapters_make_no_larger_page(tmp_path):
    """20,000 adapters straight into figures: points are left out, not errors."""
    from vllm_jd.compressor.report import figures

    errors = np.linspace(0, 1, 20_000)
    many = figures.error_by_adapter(errors, [str(i) for i in range(20_000)])
    lines = many.axes[0].get_lines()
    assert max(len(line.get_xdata()) for line in lines) <= 1000
    assert max(float(np.max(line.get_ydata())) for line in lines) == 1.0
    assert "19999" in " ".join(text.get_text() for text in many.axes[0].texts)


def test_matplotlib_missing(tmp_path, write_adapters, monkeypatch):
    folders = write_adapters(tmp_path / "in", 2)
    store = stored(tmp_path, folders, rank=2)
    monkeypatch.delitem(sys.modules, "vllm_jd.compressor.report.figures", raising=False)
    monkeypatch.delattr("vllm_jd.compressor.report.figures", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ReportError, match=r"pip install 'vllm-jd\[report\]'"):
        write_report(store, tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


def test_places_that_cannot_be_written(tmp_path, write_adapters, undrawn):
    folders = write_adapters(tmp_path / "in", 2)
    store = stored(tmp_path, folders, rank=2)
    with pytest.raises(ReportError, match=r"report\.pdf: expected a file name that ends in .html"):
        write_report(store, tmp_path / "report.pdf")
    (tmp_path / "file").write_text("")
    with pytest.raises(ReportError, match="cannot be written"):
        write_report(store, tmp_path / "file" / "page.html")
    deep = write_report(store, tmp_path / "new" / "folder" / "page.html")
    assert all(file.is_file() for file in deep)
