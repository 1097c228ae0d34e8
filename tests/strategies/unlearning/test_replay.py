"""Class A: a run that forgets a client has the bits of one that never had it."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from clients.forgotten import forget_rows
from fedllm.data.fields import Example
from fedllm.data.shards import load_one_client
from fedllm.errors import ConfigError
from fedllm.runs.checkpoint import ServerState, newest_round
from fedllm.runs.folder import read_left_out
from fedllm.runs.lineage import noted_clients
from fedllm.runs.records import RoundRecord, record_to_dict
from fedllm.runs.unlearning import read_unlearning
from strategies.session import SILENT, Watch
from strategies.unlearning.guarantee import Guarantee, guarantee_of
from strategies.unlearning.replay import begin_replay, replayed_config
from tests.strategies.conftest import NAMES
from tests.strategies.unlearning.conftest import done


@pytest.fixture
def retrained(rows_file: Path, config_of: Callable, tmp_path: Path) -> Callable[..., ServerState]:
    """Return a function that does a run of a data set in which a client never was."""

    def do(gone: str, **flat: Any) -> ServerState:
        file = tmp_path / f"without-{gone}.jsonl"
        lines = rows_file.read_text().splitlines(keepends=True)
        file.write_text("".join(line for line in lines if json.loads(line)["client"] != gone))
        three = {"data.source": str(file), "federation.num-clients": 3}
        return done(config_of(f"never-{gone}", **three, **flat))

    return do


def numbers_of(record: RoundRecord) -> dict[str, Any]:
    """Return a record without what a clock or a packet's length says."""
    plain = replace(record, seconds=0, bytes_down=0, bytes_up=0, deadline=0)
    return record_to_dict(replace(plain, training=replace(record.training, seconds={})))


def forgotten(folder: Path, gone: str, watch: Watch = SILENT) -> tuple[Guarantee, ServerState]:
    guarantee = guarantee_of(folder, gone)
    begin_replay(folder, gone, guarantee, f"without-{gone}")
    return guarantee, done(replayed_config(folder, f"without-{gone}"), watch)


def test_who_trained_in_the_kept_rounds_stays_in_the_lineage(config_of: Callable, tmp_path: Path) -> None:
    state = done(config_of("whole"))
    folder, turns = tmp_path / "whole", [record.asked[0] for record in state.records if record.round_num]
    last = max(set(turns), key=turns.index)  # whose first turn comes after all others'
    begun = begin_replay(folder, last, guarantee_of(folder, last), "without")
    assert set(noted_clients(begun)) == set(turns[: turns.index(last)])
    assert noted_clients(begun).items() <= noted_clients(folder).items()


@pytest.mark.parametrize(
    ("seed", "gone"),
    [
        (0, "anna"),
        (1, "cleo"),
        (2, "dora"),
        *(pytest.param(seed, name, marks=pytest.mark.soak) for seed in range(3) for name in NAMES),
    ],
)
def test_a_run_that_forgets_a_client_is_one_that_never_had_it(
    seed: int, gone: str, config_of: Callable, retrained: Callable, tmp_path: Path
) -> None:
    done(config_of("whole", seed=seed))
    guarantee, state = forgotten(tmp_path / "whole", gone)
    never = retrained(gone, seed=seed)
    assert guarantee.kind == "A"
    assert state.adapter.digest == never.adapter.digest
    assert list(map(numbers_of, state.records)) == list(map(numbers_of, never.records))
    assert gone not in (tmp_path / f"without-{gone}" / "rounds.jsonl").read_text()


def test_only_the_rounds_from_its_first_turn_on_are_done_again(
    config_of: Callable, retrained: Callable, tmp_path: Path
) -> None:
    whole = done(config_of("whole"))
    turns = {name: [r.round_num for r in whole.records if name in r.asked] for name in NAMES}
    gone = max((name for name in NAMES if turns[name]), key=lambda name: turns[name][0])
    heard: list[int] = []
    guarantee, state = forgotten(
        tmp_path / "whole", gone, Watch(record=lambda record: heard.append(record.round_num))
    )
    assert guarantee.first_round == turns[gone][0] > 1
    assert heard == list(range(guarantee.first_round, 7))
    assert state.adapter.digest == retrained(gone).adapter.digest
    unlearnt = read_unlearning(tmp_path / f"without-{gone}")
    assert unlearnt is not None
    assert (unlearnt.kind, unlearnt.rounds) == ("A", guarantee.num_again)


def test_a_run_killed_while_it_forgets_gives_the_same_bits(
    config_of: Callable, retrained: Callable, tmp_path: Path
) -> None:
    done(config_of("whole"))

    def killed(record: RoundRecord) -> None:
        if record.round_num == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        forgotten(tmp_path / "whole", "ben", Watch(record=killed))
    assert newest_round(tmp_path / "without-ben" / "checkpoints") == 4
    _, state = forgotten(tmp_path / "whole", "ben")
    assert state.adapter.digest == retrained("ben").adapter.digest


@pytest.mark.soak
def test_a_run_can_forget_one_client_after_another(config_of: Callable, tmp_path: Path) -> None:
    done(config_of("whole"))
    digests = []
    for first, second in (("anna", "dora"), ("dora", "anna")):
        forgotten(tmp_path / "whole", first)
        _, both = forgotten(tmp_path / f"without-{first}", second)
        assert read_left_out(tmp_path / f"without-{second}") == {"anna", "dora"}
        assert {name for record in both.records for name in record.asked} <= {"ben", "cleo"}
        digests.append(both.adapter.digest)
        for name in ("anna", "dora"):
            shutil.rmtree(tmp_path / f"without-{name}")
    assert digests[0] == digests[1]


def test_a_folder_that_holds_something_else_is_left_alone(config_of: Callable, tmp_path: Path) -> None:
    done(config_of("whole"))
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="taken: holds something already"):
        begin_replay(tmp_path / "whole", "ben", guarantee_of(tmp_path / "whole", "ben"), "taken")
    assert [path.name for path in (tmp_path / "taken").iterdir()] == ["notes.txt"]


def test_a_run_that_forgets_another_client_is_not_taken_for_it(config_of: Callable, tmp_path: Path) -> None:
    everybody = {"federation.cohort": 4, "federation.num-rounds": 1}  # so that all have one first turn
    done(config_of("whole", **everybody))
    folder = tmp_path / "whole"
    guarantees = {name: guarantee_of(folder, name) for name in ("anna", "ben")}
    assert guarantees["anna"] == guarantees["ben"]
    begin_replay(folder, "anna", guarantees["anna"], "again")
    with pytest.raises(ConfigError, match="again: holds something already"):
        begin_replay(folder, "ben", guarantees["ben"], "again")
    assert read_left_out(tmp_path / "again") == {"anna"}
    begin_replay(folder, "ben", guarantees["ben"], "rows", rows=True, examples=[Example(text="one")])
    for examples in ([Example(text="two")], []):
        with pytest.raises(ConfigError, match="rows: holds something already"):
            begin_replay(folder, "ben", guarantees["ben"], "rows", rows=True, examples=examples)


@pytest.fixture
def two_texts(rows_file: Path, tmp_path: Path) -> tuple[Path, Path]:
    """Write the rows twice: most of ben's say one thing or another."""
    lines = [json.loads(line) for line in rows_file.read_text().splitlines()]
    changed = [number for number, row in enumerate(lines) if row["client"] == "ben"][:-2]
    files = []
    for version, text in enumerate(("Return the key.", "Return the wide open line of a file.")):
        for number in changed:
            lines[number] = {**lines[number], "output": text}
        for name, rows in (("rows", lines), ("forget", [lines[number] for number in changed])):
            file = tmp_path / f"{name}-{version}.jsonl"
            file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        files.append(tmp_path / f"rows-{version}.jsonl")
    return files[0], files[1]


def test_nothing_is_left_of_what_forgotten_rows_said(
    two_texts: tuple[Path, Path], config_of: Callable, tmp_path: Path
) -> None:
    whole, again = [], []
    for number, file in enumerate(two_texts):
        config = config_of(f"whole-{number}", **{"data.source": str(file), "federation.cohort": 2})
        whole.append(done(config).adapter.digest)
        folder = tmp_path / f"whole-{number}"
        guarantee = guarantee_of(folder, "ben", rows=True)
        begin_replay(folder, "ben", guarantee, f"without-{number}", rows=True)
        data = replace(config.data, held_out_fraction=0.0)
        rows = load_one_client(tmp_path / f"forget-{number}.jsonl", data, client_id="ben", seed=0)
        forget_rows(tmp_path / f"without-{number}" / "private", rows.client.train)
        again.append(done(replayed_config(folder, f"without-{number}")))
    assert whole[0] != whole[1]
    assert again[0].adapter.digest == again[1].adapter.digest
    assert any("ben" in record.accepted for record in again[0].records)
