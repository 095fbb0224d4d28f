"""What `benchmarks/fleet.py` does before it starts a server, and how long it waits for one."""

import asyncio
import sys
from pathlib import Path

import pytest
import typer

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import fleet


def test_the_work_folder_is_made_anew(tmp_path):
    """What a run has left is deleted; a folder with anything else is not touched."""
    work = tmp_path / "work"
    fleet.empty(work)
    assert list(work.iterdir()) == []
    (work / "store" / "generations").mkdir(parents=True)
    (work / "server.log").write_text("old")
    fleet.empty(work)
    assert list(work.iterdir()) == []
    (work / "store").mkdir()
    (work / "thesis.tex").write_text("mine")
    with pytest.raises(typer.BadParameter, match=r"holds 'thesis\.tex', which no run has left"):
        fleet.empty(work)
    assert {path.name for path in work.iterdir()} == {"store", "thesis.tex"}


class Server(fleet.Measured):
    """A server that says these things of its last recompression, one after the other."""

    def __init__(self, *said):
        self.said, self.seconds = list(said), {}

    async def post(self, path):
        """Nothing is asked of anybody."""

    async def last(self):
        return self.said.pop(0) if len(self.said) > 1 else self.said[0]


def recompression(state, *, started_at=2, compressed=0):
    return {"state": state, "started_at": started_at, "compressed": compressed}


DONE = recompression("done", started_at=1, compressed=64)


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ([DONE], "no recompression has started"),
        ([DONE, recompression("running")], "has not ended"),
        ([DONE, recompression("running"), recompression("failed")], "compressed no upload"),
        ([{}, recompression("done")], "compressed no upload"),
    ],
)
def test_a_recompression_is_not_waited_for_for_ever(said, told, monkeypatch):
    monkeypatch.setattr(fleet, "START_LIMIT", 0.1)
    monkeypatch.setattr(fleet, "RECOMPRESS_LIMIT", 0.2)
    with pytest.raises(fleet.Stuck, match=told):
        asyncio.run(Server(*said).recompress())


def test_a_recompression_is_timed_from_its_start_to_its_end():
    """One that ended before it was seen running counts, and the one before it does not."""
    done = recompression("done", compressed=64)
    server = Server(DONE, DONE, done)
    windows = asyncio.run(server.recompress())
    assert len(windows) == 1
    assert server.seconds["recompression"] == [pytest.approx(windows[0][1] - windows[0][0])]
