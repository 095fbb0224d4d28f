"""The reason of a refusal reaches the command that started the server."""

import pytest

from vllm_jd.plugin.faults import FAULT_FILE, faults_told, read_fault


def refuse(error):
    with pytest.raises(type(error)), faults_told():
        raise error


def test_the_first_reason_is_kept_on_one_line(tmp_path, monkeypatch):
    file = tmp_path / "fault"
    monkeypatch.setenv(FAULT_FILE, str(file))
    with faults_told():
        pass
    assert read_fault(file) is None
    refuse(ValueError("found x\n  expected y"))
    refuse(ValueError("the engine core failed"))
    assert read_fault(file) == "found x expected y"


def test_an_error_without_words_gives_its_kind(tmp_path, monkeypatch):
    monkeypatch.setenv(FAULT_FILE, str(tmp_path / "fault"))
    refuse(MemoryError())
    assert read_fault(tmp_path / "fault") == "MemoryError"


def test_nobody_asked_or_no_place_to_write(tmp_path, monkeypatch):
    monkeypatch.delenv(FAULT_FILE, raising=False)
    refuse(ValueError("x"))
    monkeypatch.setenv(FAULT_FILE, str(tmp_path / "gone" / "fault"))
    refuse(ValueError("x"))
    assert read_fault(tmp_path / "gone" / "fault") is None


def test_both_parts_of_the_start_of_a_worker_tell(tmp_path, monkeypatch):
    pytest.importorskip("vllm")
    from vllm_jd.plugin import install
    from vllm_jd.plugin.worker import manager

    class Refusing:
        def __init__(self, *args, config):
            if config.store == "/first":
                raise ValueError("when it is made")

        def create_lora_manager(self, model, vllm_config):
            raise ValueError(f"when {model} is wrapped")

    class Config:
        def __init__(self, store):
            self.additional_config = {"vllm_jd": {"store": store}}

    monkeypatch.setattr(manager, "ResidentLoRAManager", Refusing)
    make = install._manager_maker(None)
    monkeypatch.setenv(FAULT_FILE, str(tmp_path / "one"))
    with pytest.raises(ValueError, match="made"):
        make(Config("/first"), "cpu", {})
    assert read_fault(tmp_path / "one") == "when it is made"
    monkeypatch.setenv(FAULT_FILE, str(tmp_path / "two"))
    with pytest.raises(ValueError, match="wrapped"):
        make(Config("/second"), "cpu", {}).create_lora_manager("it", None)
    assert read_fault(tmp_path / "two") == "when it is wrapped"
