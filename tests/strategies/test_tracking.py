"""Figures of rounds at trackers: each once, whatever fails, and nothing that names anybody."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from clients.client_app import app
from fedllm.config.run_config import RunConfig
from fedllm.errors import MissingExtraError
from fedllm.runs.records import HomeRecord, PrivacyRecord, RoundRecord, TrainingRecord
from scripts.runtimes.local import local_grid
from strategies import trackers
from strategies.run import run_federation
from strategies.session import Watch
from strategies.trackers import OPENERS, RunToTrack, Tracker, tracker_names
from strategies.tracking import Follower, figures_of, told_keys


def record(number: int, **fields: Any) -> RoundRecord:
    """Return the record of a round with a training loss and a client of its own."""
    training = TrainingRecord(loss=3.0 - number, num_tokens=50, learning_rate=0.1)
    return RoundRecord(round_num=number, accepted=("anna",), seconds=2.0, training=training, **fields)


@dataclass
class Service:
    """A tracker in this process: the runs that were opened, what was sent, and how the run ended."""

    opened: list[RunToTrack] = field(default_factory=list)
    sent: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    ends: list[bool] = field(default_factory=list)
    is_down: bool = False

    def open(self, run: RunToTrack) -> Tracker:
        self.opened.append(run)
        return Tracker(run.known_as or "its-name", self._log, self.ends.append)

    def _log(self, step: int, figures: Mapping[str, float]) -> None:
        if self.is_down:
            raise ConnectionError("http://ann:secret@host is down")
        self.sent.append((step, dict(figures)))


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Service:
    """Put a tracker of this process in the place of mlflow."""
    service = Service()
    monkeypatch.setitem(OPENERS, "mlflow", service.open)
    return service


@pytest.fixture
def follow(tmp_path: Path) -> Callable[[], tuple[Follower, list[str]]]:
    """Return a function that makes the follower of a session, and the notices it gives."""

    def make() -> tuple[Follower, list[str]]:
        notices: list[str] = []
        run = RunToTrack("named", tmp_path, {})
        return Follower("mlflow", run, RunConfig(), notices.append), notices

    return make


def test_each_round_is_sent_once_and_late_losses_too(service: Service, follow: Callable) -> None:
    follower, notices = follow()
    first, second = record(1), record(2)
    follower.send([first])
    measured = replace(first, held_out={"anna": 1.0, "ben": 2.0})
    follower.send([measured, second])
    follower.close(True)
    assert [step for step, _ in service.sent] == [1, 1, 2]
    assert service.sent[1][1] == {"eval/loss": 1.5, "eval/worst": 2.0, "eval/deviation": 0.5}
    assert service.sent[2][1]["train/loss"] == 1.0
    assert (service.ends, notices, len(service.opened)) == ([True], [], 1)


def test_what_training_at_home_gave_is_sent_at_the_end(service: Service, follow: Callable) -> None:
    follower, _ = follow()
    follower.send([record(1)])
    home = HomeRecord(
        alone={"anna": 3.0, "ben": 1.0}, shared={"anna": 2.5, "ben": 2.5}, home={"anna": 2.0, "ben": 1.0}
    )
    follower.send([record(1, at_home=home)])
    assert service.sent[1] == (
        1,
        {"home/alone": 2.0, "home/shared": 2.5, "home/loss": 1.5, "home/gained": 0.5},
    )


def test_a_failing_tracker_is_named_once_and_catches_up(service: Service, follow: Callable) -> None:
    follower, notices = follow()
    service.is_down = True
    records = [record(number) for number in range(1, 9)]
    for number in range(1, 8):
        follower.send(records[:number])
    assert notices == [
        "track.to = mlflow: ConnectionError: http://host is down; the run goes on, and what is missing is"
        " sent later"
    ]
    assert follower.num_failures == 3  # of seven rounds: it is left alone for one, then for two
    service.is_down = False
    follower.close(False)
    assert [step for step, _ in service.sent] == list(range(1, 8))
    assert service.ends == [False]


def test_a_resumed_run_goes_on_where_the_tracker_is(service: Service, follow: Callable) -> None:
    follow()[0].send([record(1), record(2)])  # and then it is killed
    follower, _ = follow()
    follower.send([record(1), record(2), record(3)])
    assert [step for step, _ in service.sent] == [1, 2, 3]
    assert [run.known_as for run in service.opened] == ["", "its-name"]


def test_no_name_and_no_text_of_a_run_is_told() -> None:
    given = {"data.source": "/secret/rows.jsonl", "lora.client-ranks": "anna:4", "run.output": "/secret"}
    config = RunConfig.from_flat({**given, "run.purpose": "secret", "evaluation.prompts": "secret?"})
    told = json.dumps(told_keys(config))
    assert "secret" not in told
    assert "anna" not in told
    assert json.loads(told)["lora.rank"] == 8
    assert json.loads(told)["base model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    named = replace(record(1, held_out={"anna": 1.0}, lost={"ben": "why"}), asked=("anna", "ben"))
    assert not {"anna", "ben"} & {part for name in figures_of(named) for part in name.split("/")}


def test_a_private_round_tells_nothing_without_noise() -> None:
    spent = PrivacyRecord(epsilon=1.0, noise_multiplier=None, clip=float("nan"))
    assert figures_of(replace(record(1, privacy=spent), training=TrainingRecord())) == {
        "round/seconds": 2.0,
        "train/learning_rate": 0.0,
        "privacy/epsilon": 1.0,
    }


def test_an_absent_package_stops_a_run_before_it_joins(
    make_config: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    config = make_config({"track.to": "wandb", "run.output": str(tmp_path)})
    heard: list[str] = []
    with pytest.raises(MissingExtraError, match=r"track\.to = wandb .* pip install 'fedllm\[wandb\]'"):
        run_federation(config, local_grid(config, app), Watch(phase=lambda name, *_: heard.append(name)))
    assert heard == []


def test_each_tracker_is_named_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers, "find_spec", lambda name: pytest.__spec__)
    assert tracker_names(" mlflow, tensorboard,mlflow") == ["mlflow", "tensorboard"]
    assert tracker_names("") == []


def read_tensorboard(folder: Path) -> dict[int, float]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return {each.step: each.value for each in events.Scalars("eval/loss")}


def read_mlflow(folder: Path) -> dict[int, float]:
    from mlflow import MlflowClient

    client = MlflowClient()
    (experiment,) = client.search_experiments(filter_string="name = 'fedllm'")
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.status, run.data.params["lora.rank"]) == ("FINISHED", "2")
    return {each.step: each.value for each in client.get_metric_history(run.info.run_id, "eval/loss")}


def read_trackio(folder: Path) -> dict[int, float]:
    from trackio.sqlite_storage import SQLiteStorage

    name = json.loads((folder / "tracking.json").read_text())["trackio"]["known_as"]
    rows = SQLiteStorage.get_logs("fedllm", name)
    return {row["step"]: row["eval/loss"] for row in rows if "eval/loss" in row}


@pytest.mark.filterwarnings("ignore")  # of other people's packages
@pytest.mark.parametrize("name", ["tensorboard", "mlflow", "trackio", "wandb"])
def test_a_run_is_read_back_from_its_tracker(
    name: str, make_config: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    pytest.importorskip(name)  # reads them
    own = {"run.output": str(tmp_path), "run.name": "sent", "track.to": name, "federation.num-rounds": 1}
    notices: list[str] = []
    for rounds in (1, 2):  # the second goes on with the first
        flat = {**own, "federation.num-rounds": rounds, "run.resume": rounds == 2}
        config = make_config(flat)
        state = run_federation(config, local_grid(config, app), Watch(notice=notices.append))
    assert not [line for line in notices if "track.to" in line]
    folder = tmp_path / "sent"
    kept = json.loads((folder / "tracking.json").read_text())[name]
    assert kept["round"] == 2
    losses = {each.round_num: each.mean_held_out for each in state.records if each.held_out}
    readers = {"tensorboard": read_tensorboard, "mlflow": read_mlflow, "trackio": read_trackio}
    if name in readers:
        assert readers[name](folder) == pytest.approx(losses, rel=1e-6)
    else:
        assert list(folder.glob("wandb/offline-run-*/*.wandb"))
