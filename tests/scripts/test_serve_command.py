"""What `fedllm serve` refuses, and its exit codes."""

import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from fedllm.files import locked
from fedllm.runs.folder import run_folder
from scripts import cli
from scripts.command_line import run_app
from scripts.deploying.certificates import new_credentials
from scripts.runtimes import serving
from scripts.runtimes.supervisor import GaveUpError

Serve = Callable[..., int]


@pytest.fixture
def serve(tmp_path: Path) -> Serve:
    """Return a function that serves a run with further words, and returns the exit code."""
    new_credentials(tmp_path / "credentials", [])

    def run(*words: str) -> int:
        places = ["--credentials", str(tmp_path / "credentials"), "--state", str(tmp_path / "server")]
        words = ("serve", "run.name=trial", "--out", str(tmp_path), *places, *words)
        return run_app(cli.app, words, name="fedllm")

    return run


@pytest.fixture
def supervised(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Let no process be started; return the configurations of the runs that are supervised."""
    found: list[Any] = []

    class Done:
        run_id = "7"

        def __init__(self, config: Any, link: Any, processes: Any, view: Any, **more: Any):
            found.append((config, more))
            self.folder = run_folder(config)

        def health(self) -> dict[str, Any]:
            return {"healthy": True, "restarts": 0}

        def run(self) -> None:
            if found[-1][0].run.name != "trial":
                raise GaveUpError("the SuperLink was killed by SIGKILL; started again 3 times")
            (self.folder / "result.json").write_text(json.dumps({"status": "completed", "rounds": 3}))
            for name in ("adapter", "checkpoints/round-00003"):
                (self.folder / name).mkdir(parents=True)

    monkeypatch.setattr(serving, "Supervisor", Done)
    monkeypatch.setattr(serving, "started", lambda processes: nullcontext())
    return found


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--log", "xml"], "--log xml: expected one of text, json"),
        (["--credentials", "nowhere"], "make one with fedllm keys server"),
        (["lora.rnk=3"], "lora.rank"),
    ],
)
def test_what_cannot_be_served_is_one_line(
    words: list[str], told: str, serve: Serve, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert serve(*words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert told in line
    assert not (tmp_path / "trial").exists()


def test_two_servers_share_no_state(serve: Serve, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "server").mkdir()
    with locked(tmp_path / "server" / ".lock"):
        assert serve() == 2
    assert "choose another --state" in capsys.readouterr().err


def test_a_complete_run_is_not_done_again(
    serve: Serve, supervised: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert serve() == 0
    assert "complete: " in capsys.readouterr().out
    assert supervised[0][0].run.resume, "a run of which there is a part goes on"
    assert serve() == 0
    assert "complete after 3 rounds" in capsys.readouterr().out
    assert len(supervised) == 1


def test_a_new_run_waits_for_sites_unless_told(serve: Serve, supervised: list[Any]) -> None:
    serve()
    assert supervised[0][1]["until_first_round"] == {"federation.join-deadline": 86_400.0}
    serve("run.name=other", "federation.join-deadline=5")
    assert supervised[1][1]["until_first_round"] == {}


def test_who_gives_up_may_be_started_again(
    serve: Serve, supervised: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert serve("run.name=unlucky", "--log", "json") == 75
    assert "started again 3 times" in capsys.readouterr().err


def test_an_earlier_sessions_run_is_stopped_first(
    serve: Serve, supervised: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []

    def start(processes: list[Any]) -> nullcontext[None]:
        order.extend(process.name for process in processes)
        return nullcontext()

    monkeypatch.setattr(serving, "started", start)
    monkeypatch.setattr(serving, "stop_unfinished", lambda link: order.append("stop"))
    assert serve() == 0
    assert order == ["SuperLink", "stop", "SuperExec"], "else it would be done beside the new one"
