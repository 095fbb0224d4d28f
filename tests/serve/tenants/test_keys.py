"""The file of keys: its commands, its globs, and a server that follows it."""

import hashlib
import json
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from vllm_jd.cli.app import app
from vllm_jd.serve.tenants import ring
from vllm_jd.serve.tenants.keys import Key, KeyFileError, add_key, read_keys, remove_key
from vllm_jd.serve.tenants.ring import KeyRing, caller_of


def run(*words):
    return CliRunner().invoke(app, ["keys", *map(str, words)])


def test_a_key_is_made_listed_and_removed(tmp_path):
    file = tmp_path / "keys.json"
    made = run(
        "add", file, "acme-1", "--tenant", "acme", "--right", "use", "--right", "upload",
        "--adapters", "team/*", "--max-requests", 8, "--tokens-per-minute", 6000,
        "--max-adapters", 5, "--max-bytes", "2MB",
    )  # fmt: skip
    assert made.exit_code == 0, made.output
    text = made.stdout.strip()
    assert text.startswith("sk-jd-") and len(text) >= 6 + 43
    assert "keep it" in made.stderr
    assert text not in file.read_text() and file.stat().st_mode & 0o077 == 0
    (key,) = json.loads(file.read_text())["keys"]
    assert key["sha256"] == hashlib.sha256(text.encode()).hexdigest()
    other = json.loads(run("add", file, "ops", "--right", "admin", "--json").stdout)
    assert other["key"] != text and other["rights"] == ["admin"]
    listed = json.loads(run("list", file, "--json").stdout)
    assert [each["name"] for each in listed] == ["acme-1", "ops"]
    limits = {"requests": 8, "tokens_per_minute": 6000, "adapters": 5, "bytes": 2_000_000}
    assert listed[0]["limits"] == limits
    assert listed[0]["adapters"] == ["team/*"] and "sha256" not in listed[0]
    shown = run("list", file).stdout
    assert "acme-1" in shown and "team/*" in shown and key["sha256"][:8] not in shown
    assert run("remove", file, "acme-1").exit_code == 0
    assert [each.name for each in read_keys(file).keys] == ["ops"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["add", "{file}", "ops"], "found a key 'ops' already"),
        (["add", "{file}", "a b"], "name"),
        (["add", "{file}", "x", "--right", "root"], "'use', 'upload', 'metrics' or 'admin'"),
        (["add", "{file}", "x", "--right", "admin", "--tenant", "t"], "expected no tenant"),
        (["add", "{file}", "x", "--right", "upload"], "expected a tenant"),
        (["add", "{file}", "x", "--tenant", "a/b"], "tenant"),
        (["add", "{file}", "x", "--adapters", ""], "found an empty glob"),
        (["add", "{broken}", "x"], "broken.json: "),
        (["add", "{none}/k.json", "x"], "there is no folder"),
        (["remove", "{file}", "nobody"], "found no key 'nobody'; there are: ops"),
        (["remove", "{none}", "ops"], "expected a file of keys"),
        (["list", "{none}"], "expected a file of keys"),
        (["list", "{broken}"], "broken.json: "),
    ],
)
def test_mistakes_are_told(tmp_path, words, told):
    file, broken = tmp_path / "keys.json", tmp_path / "broken.json"
    add_key(file, name="ops", rights=["admin"])
    broken.write_text('{"format": 1, "keys": [{"name": "x"}]}')
    before = file.read_bytes()
    result = run(*(each.format(file=file, broken=broken, none=tmp_path / "none") for each in words))
    assert result.exit_code == 1, result.output
    assert told in " ".join(result.stderr.split()) and "Traceback" not in result.stderr
    assert file.read_bytes() == before


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "JSON"),
        ("[]", "an object"),
        ('{"format": 2, "keys": []}', "format"),
        ('{"format": 1, "keys": [], "more": 1}', "more"),
        ('{"format": 1, "keys": [{"name": "a", "sha256": "00"}]}', "sha256"),
        ("x" * 10_000, "JSON"),
        (
            '{"format": 1, "keys": [{"name": "a", "sha256": "%s", "rights": []}]}' % ("0" * 64),
            "rig",
        ),
    ],
)
def test_a_broken_file_says_where(tmp_path, text, told):
    file = tmp_path / "keys.json"
    file.write_text(text)
    with pytest.raises(KeyFileError, match=told) as caught:
        read_keys(file)
    assert str(file) in str(caught.value) and len(str(caught.value)) < 500


def test_two_of_one_name_or_hash_are_refused(tmp_path):
    file = tmp_path / "keys.json"
    add_key(file, name="a")
    keys = json.loads(file.read_text())["keys"]
    for change in ({"name": "b"}, {"sha256": "1" * 64}):
        file.write_text(json.dumps({"format": 1, "keys": [keys[0], keys[0] | change]}))
        with pytest.raises(KeyFileError, match="twice"):
            read_keys(file)


def means(glob, name):
    key = Key(name="k", sha256="0" * 64, adapters=["<nothing>", glob])
    return caller_of(key).sees(name)


@pytest.mark.parametrize(
    ("glob", "yes", "no"),
    [
        ("*", ["a", "ü 雪", "a.b"], ["a/b", "/", "acme/x"]),
        ("team/*", ["team/a"], ["team/a/b", "team", "a", "teams/a"]),
        ("**", ["a", "a/b/c", "a\nb"], []),
        ("t?am", ["team"], ["t/am", "tam"]),
        ("a[1]+.x", ["a[1]+.x"], ["a1x", "a1+.x"]),
    ],
)
def test_globs(glob, yes, no):
    assert [name for name in yes if not means(glob, name)] == []
    assert [name for name in no if means(glob, name)] == []


@given(st.text(alphabet=st.characters(exclude_characters="*?"), min_size=1), st.text())
def test_a_glob_without_stars_means_itself(glob, name):
    assert means(glob, glob)
    assert means(glob, name) == (name in (glob, "<nothing>"))


@given(st.text(max_size=9), st.text(alphabet="ab/*?", min_size=1, max_size=9))
def test_a_star_never_crosses_a_name_space(space, glob):
    if "**" not in glob and "/" not in glob:
        assert not means(glob, f"{space}/x")


class TestRing:
    @pytest.fixture(autouse=True)
    def at_once(self, monkeypatch):
        monkeypatch.setattr(ring, "_LOOK_SECONDS", 0)

    def test_it_follows_the_file(self, tmp_path):
        file = tmp_path / "keys.json"
        first, _ = add_key(file, name="a")
        seen = []
        found = KeyRing(file, seen.append)
        assert found.find(first)[0].name == "a" and found.find("sk-x") is None
        second, key = add_key(file, name="b", tenant="t")
        assert found.find(second)[1].space == "t" and found.groups == 2
        remove_key(file, "a")
        assert found.find(first) is None and seen[-1] == {key.sha256}

    @pytest.mark.parametrize("broken", ["{", "", None])
    def test_a_broken_file_changes_nothing_and_is_told(self, tmp_path, broken, caplog):
        file = tmp_path / "keys.json"
        text, _ = add_key(file, name="a")
        good = file.read_text()
        found = KeyRing(file)
        if broken is None:
            file.unlink()
        else:
            file.write_text(broken)
        for _ in range(3):
            assert found.find(text)[0].name == "a"
        assert str(file) in found.fault
        assert sum("stay as they were" in each.message for each in caplog.records) == 1
        file.write_text(good)
        os.utime(file, ns=(1, 1))
        assert found.find(text) and found.fault is None

    def test_a_link_is_followed_to_another_file(self, tmp_path):
        """As Kubernetes changes what it mounts."""
        old, _ = add_key(tmp_path / "1.json", name="a")
        new, _ = add_key(tmp_path / "2.json", name="a")
        link = tmp_path / "keys.json"
        link.symlink_to("1.json")
        found = KeyRing(link)
        assert found.find(old)
        (tmp_path / "next").symlink_to("2.json")
        (tmp_path / "next").rename(link)
        assert found.find(new) and not found.find(old)

    def test_at_the_start_it_has_to_be_whole(self, tmp_path):
        with pytest.raises(KeyFileError):
            KeyRing(tmp_path / "none.json")

    @given(st.text())
    def test_no_text_but_the_keys_own_is_one(self, text):
        import tempfile
        from pathlib import Path

        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "keys.json"
            own, key = add_key(file, name="a")
            found = KeyRing(file)
            assert found.find(own) and found.find(text) is None
            assert found.find(key.sha256) is None
