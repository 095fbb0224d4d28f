"""The engine's process, with programs in its place: what is told when it ends, and that nothing of
it stays."""

import os
import sys
import time
from pathlib import Path

import pytest

from vllm_jd.evaluate import process
from vllm_jd.evaluate.errors import EvaluateError, UsageError
from vllm_jd.evaluate.questions import Answer, EngineSettings, Question

SETTINGS = EngineSettings("store", "0" * 64, "model", None, 64, 16, ["--seed", "1"])
READY = (
    'import json, os, subprocess, sys\nsettings = json.loads(input())\nprint("{}", flush=True)\n'
)


@pytest.fixture
def engine(tmp_path, monkeypatch):
    """Starts an engine which is this program."""

    def start(program):
        (tmp_path / "program.py").write_text(program)
        script = tmp_path / "python"
        script.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{tmp_path}/program.py"\n')
        script.chmod(0o755)
        monkeypatch.setattr(process.sys, "executable", str(script))
        return process.running_engine(SETTINGS, tmp_path, tmp_path / "log")

    return start


def test_answers_come_back_and_what_it_prints_goes_to_the_log(engine, tmp_path):
    program = READY + (
        "print('printed', settings['flags'], file=sys.stderr, flush=True)\n"
        "for line in sys.stdin:\n"
        "    batch = json.loads(line)\n"
        "    said = [{'said': str(q['asked']), 'loss': batch['max_new_tokens']}"
        " for q in batch['questions']]\n"
        "    print(json.dumps(said), flush=True)\n"
    )
    with engine(program) as running:
        questions = [Question([i], [i], [1], adapter="ä") for i in range(3)]
        assert running.ask(questions, 7) == [Answer(f"[{i}]", 7) for i in range(3)]
        assert running.ask(questions[:1], 8) == [Answer("[0]", 8)]
    assert "printed ['--seed', '1']" in (tmp_path / "log").read_text()


@pytest.mark.parametrize(
    ("program", "error", "match"),
    [
        (
            "import argparse\nargparse.ArgumentParser().parse_args(['--no-such', '3'])",
            UsageError,
            "vLLM does not take these flags: unrecognized arguments: --no-such 3",
        ),
        ("raise SystemExit('too little memory')", EvaluateError, "code 1.*\ntoo little memory"),
        (
            "import os\nopen(os.environ['VLLM_JD_FAULT_FILE'], 'w').write('rank 99')\nos._exit(1)",
            EvaluateError,
            "the engine ended: rank 99",
        ),
        (READY + "input()\nprint('half of a li', end='')", EvaluateError, "ended with code 0"),
        (READY + "os.kill(os.getpid(), 9)", EvaluateError, "ended with code -9"),
    ],
)
def test_its_end_is_told(engine, program, error, match):
    with pytest.raises(error, match=match), engine(program) as running:
        running.ask([Question([1], [1], [2])], 4)


def test_nothing_of_it_stays(engine, tmp_path):
    note = tmp_path / "pid"
    child = "child = subprocess.Popen(['sleep', '600'])\n"
    told = f"open({str(note)!r}, 'w').write(str(child.pid))\ninput()\n"
    with pytest.raises(KeyboardInterrupt), engine(READY + child + told):
        while not note.exists() or not note.read_text():
            time.sleep(0.01)
        raise KeyboardInterrupt
    pid = int(note.read_text())
    for _ in range(500):
        try:
            if Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z":
                return
        except OSError:
            return
        time.sleep(0.01)
    os.kill(pid, 9)
    pytest.fail("its child is still there")
