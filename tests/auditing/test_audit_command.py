"""`fedllm audit` on finished runs: what it finds, what its controls find, and what it says when it cannot."""

import importlib.util
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from fedllm.attacks.token_scores import whole
from fedllm.data.partition import Partition, save_partition
from fedllm.files import SIGNATURE, verify_manifest
from fedllm.runs.memorisation import MEMORISATION, read_memorisation
from scripts import cli
from scripts.auditing import membership
from scripts.auditing.control import overfit
from scripts.auditing.membership import extraction_report
from scripts.auditing.memorisation import near_duplicates_report
from scripts.auditing.opening import open_case
from scripts.auditing.table import REPORT

PLAIN: dict[str, object] = {}
OVERFITTED = {"train.local-steps": 120, "train.learning-rate": 3e-3, "lora.rank": 16, "lora.alpha": 32.0}
PRIVATE = {"privacy.epsilon": 8.0, "audit.canaries": 60}
SHORT = ("--prefix", "8", "--suffix", "8")


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Callable[..., str]:
    """Return a function (words, expected code) -> what the command printed, on stderr where it failed."""

    def run(*words: str, code: int = 0) -> str:
        monkeypatch.setattr(sys, "argv", ["fedllm", "audit", *words])
        monkeypatch.setenv("COLUMNS", "180")
        capsys.readouterr()  # what making the run has printed
        with pytest.raises(SystemExit) as ended:
            cli.main()
        captured = capsys.readouterr()
        assert ended.value.code == code, captured
        return captured.err if code else captured.out

    return run


@pytest.fixture
def refused(command: Callable[..., str]) -> Callable[..., str]:
    """Return a function (words) -> the one line with which the command refuses them."""

    def run(*words: str) -> str:
        lines = command(*words, code=2).strip().splitlines()
        assert len(lines) == 1, lines
        return lines[0]

    return run


@pytest.fixture
def copied(finished: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """Return a function (name, overrides) -> a copy of a finished run that a test may damage."""

    def copy(name: str, overrides: dict | None = None) -> Path:
        folder = Path(shutil.copytree(finished(name, overrides), tmp_path / name))
        for name in (REPORT, MEMORISATION):  # of another test
            (folder / name).unlink(missing_ok=True)
        return folder

    return copy


def files_of(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_overfitted_run_and_positive_control_are_found_out(finished: Callable, command: Callable) -> None:
    report = json.loads(command(str(finished("overfitted", OVERFITTED)), *SHORT, "--json"))
    for found in report["membership"].values():
        assert found["run"]["area"] >= 0.9
        assert found["positive_control"]["area"] >= 0.9
        assert found["run"]["low"] <= found["run"]["caught"] <= found["run"]["high"]
    assert report["membership"]["loss-ratio"]["run"]["caught"] > 0.5


@pytest.mark.soak
def test_controls_without_a_signal_find_nothing(finished: Callable, command: Callable) -> None:
    report = json.loads(command(str(finished("overfitted", OVERFITTED)), *SHORT, "--json"))
    for found in report["membership"].values():
        for control in (found["held_out"], found["base"]):
            if control is not None:
                spread = membership.null_deviation(control["num_members"], control["num_others"])
                assert abs(control["area"] - 0.5) < 3 * spread
    assert report["membership"]["loss-ratio"]["base"] is None  # the ratio of the base to itself
    assert report["extraction"]["base"]["extracted"] == report["extraction"]["held_out"]["extracted"] == 0
    assert report["extraction"]["run"]["number"] > 0
    figures = read_memorisation(finished("overfitted", OVERFITTED))
    for name in ("extraction", "near_duplicates"):  # nearly given back is what is given back, at least
        assert figures[name] == report[name]["run"]["rate"]
        assert figures[name + "_held_out"] == figures[name + "_base"] == 0
        assert figures["near_duplicates"] >= figures["extraction"]


def test_what_an_adapter_writes_itself_is_given_back_and_nothing_else(
    finished: Callable, tmp_path: Path
) -> None:
    case = open_case(finished("plain", PLAIN), max_rows=8, scratch=tmp_path)
    beginnings = [row.tokens[:8] for row in case.members]
    written = [list(beginning) for beginning in beginnings]
    states = [case.adapter] * len(beginnings)
    for step in case.engine.stream(states, beginnings, 16, lambda logits_BV: logits_BV.argmax(dim=-1)):
        for place, token in step.items():
            written[place].append(token)
    own = replace(case, members=tuple(map(whole, map(tuple, written))))
    for measure in (extraction_report, near_duplicates_report):
        found = measure(own, overfit(case, 1), prefix=8, suffix=16)
        assert [found[kind]["rate"] for kind in ("run", "held_out")] == [1.0, 0.0]
        assert found["run"]["number"] == 8


@pytest.mark.soak
def test_private_run_keeps_its_claim_and_its_control_leaks(finished: Callable, command: Callable) -> None:
    folder = finished("private", PRIVATE)
    report = json.loads(command(str(folder), *SHORT, "--json"))
    claim = json.loads((folder / "privacy.json").read_text())
    group = report["canaries"]["repeats"]["1"]
    assert group["claimed"] == {"epsilon": claim["epsilon"], "delta": claim["delta"]}
    assert group["run"]["num_canaries"] == 120  # sixty of each client
    assert group["run"]["epsilon_lower_bound"] <= claim["epsilon"]
    assert group["run"]["mean_exposure"] <= group["run"]["largest_exposure"]
    control = report["canaries"]["positive_control"]
    assert control["num_right"] / control["num_guessed"] > 0.9
    assert control["epsilon_lower_bound"] > 1
    assert control["mean_exposure"] > group["run"]["mean_exposure"]


def test_a_claim_that_is_false_is_refuted(copied: Callable, command: Callable) -> None:
    folder = copied("learnt", {**OVERFITTED, "audit.canaries": 40})  # no noise at all
    said = {"unit": "example", "trust": "local", "epsilon": 0.1, "delta": 1e-6}
    (folder / "privacy.json").write_text(json.dumps(said))
    assert "refutes it" in command(str(folder))
    group = json.loads((folder / REPORT).read_text())["canaries"]["repeats"]["1"]
    assert group["run"]["epsilon_lower_bound"] > 0.1
    assert group["base"]["epsilon_lower_bound"] < 0.1  # a base model that has seen no canary refutes nothing


@pytest.mark.soak
def test_protected_message_tells_less_than_its_control(finished: Callable, command: Callable) -> None:
    for name, overrides in (("private", PRIVATE), ("plain", PLAIN)):
        inversion = json.loads(command(str(finished(name, overrides)), "--json"))["inversion"]
        assert inversion["positive_control"]["spanned"]["f1"] > 0.9
        for guess in ("closest", "spanned"):
            found = inversion["run"]["update"][guess]
            assert found["f1"] < inversion["positive_control"][guess]["f1"]


def test_one_table_says_it_all_and_the_same_stands_in_a_file(finished: Callable, command: Callable) -> None:
    folder = finished("private", PRIVATE)
    said = command(str(folder))
    for words in (
        "this run",
        "held-out",
        "base model",
        "positive control",
        "AUC, min-k++",
        "found at 1 % FPR",
        "50 tokens after the first 50",
        "none so long",
        "tokens read, closest",
        "epsilon x 1, at least",
        "does not refute it",
        "a lower bound is not a guarantee",
    ):
        assert words in said
    report = json.loads((folder / REPORT).read_text())
    assert report["claim"]["unit"] == "example"
    assert any("not a guarantee" in note for note in report["notes"])
    assert "not a guarantee" in json.loads((folder / "privacy.json").read_text())["audit"]
    assert "not a guarantee" in " ".join((folder / "adapter" / "README.md").read_text().split())


def test_an_audit_leaves_the_run_as_it_was(copied: Callable, command: Callable) -> None:
    folder = copied("private", PRIVATE)  # its secrets, its ledgers, its adapter
    before = files_of(folder)
    command(str(folder), "--json")
    after = files_of(folder)
    assert set(after) - set(before) == {folder / REPORT, folder / MEMORISATION}
    assert all(after[path] == content for path, content in before.items())


@pytest.mark.soak
def test_the_card_says_what_is_repeated_where_that_is_wanted(copied: Callable, command: Callable) -> None:
    folder = copied("overfitted", OVERFITTED)
    card = folder / "adapter" / "README.md"
    before = card.read_text()
    for _ in range(2):  # a second audit replaces the first
        command(str(folder), *SHORT, "--card", "--json")
    figures = read_memorisation(folder)
    row = f"| texts given back token for token | {figures['extraction']:.3g} | 0 | 0 |"
    assert card.read_text().startswith(before)
    assert card.read_text().count("## Memorisation") == card.read_text().count(row) == 1
    verify_manifest(folder / "adapter")


def test_a_signed_card_is_left_alone(copied: Callable, refused: Callable) -> None:
    folder = copied("plain", PLAIN)
    (folder / "adapter" / SIGNATURE).write_text("{}")
    before = files_of(folder)
    assert "audit before you sign" in refused(str(folder), "--card")
    assert files_of(folder) == before


def test_two_audits_of_a_run_without_secrets_agree(finished: Callable, command: Callable) -> None:
    folder = str(finished("plain", PLAIN))
    assert command(folder, "--json") == command(folder, "--json")


def test_run_that_adds_to_the_base_is_audited_with_all_of_it(finished: Callable, command: Callable) -> None:
    report = json.loads(command(str(finished("fedex", {"aggregation.preset": "fedex"})), "--json"))
    assert "skipped" not in report["inversion"]
    assert report["canaries"] == {"skipped": "the run planted none: fedllm run audit.canaries=100 does"}


def test_no_more_rows_than_asked_for(finished: Callable, command: Callable) -> None:
    report = json.loads(command(str(finished("plain", PLAIN)), "--rows", "3", "--json"))
    assert report["num_members"] == report["num_others"] == 3


@pytest.mark.research
@pytest.mark.parametrize("ending", ["png", "svg"])
def test_a_plot_is_drawn(ending: str, finished: Callable, command: Callable, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "deep" / f"audit.{ending}"
    command(str(finished("private", PRIVATE)), "--plot", str(path))
    assert path.stat().st_size > 5000


def test_plot_of_an_unknown_kind_is_refused_before_any_work(refused: Callable) -> None:
    assert "--plot 'x.foo'" in refused("nowhere", "--plot", "x.foo")


def test_a_plot_without_matplotlib_names_the_extra(
    finished: Callable, refused: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "fedllm[bench]" in refused(str(finished("plain", PLAIN)), "--plot", "x.png")


def test_a_folder_without_an_adapter(copied: Callable, refused: Callable, tmp_path: Path) -> None:
    folder = copied("plain", PLAIN)
    shutil.rmtree(folder / "adapter")
    assert "neither a run with a complete round nor an adapter folder" in refused(str(folder))
    assert "neither a run with a complete round nor an adapter folder" in refused(str(tmp_path / "nowhere"))


def test_an_adapter_without_its_run(copied: Callable, refused: Callable, tmp_path: Path) -> None:
    alone = Path(shutil.copytree(copied("plain", PLAIN) / "adapter", tmp_path / "alone"))
    assert "an adapter without its run" in refused(str(alone))


def test_rows_that_are_not_on_this_machine(copied: Callable, refused: Callable, tmp_path: Path) -> None:
    folder = copied("plain", PLAIN)
    recipe = folder / "config.toml"
    source = next(line for line in recipe.read_text().splitlines() if line.startswith("source ="))
    recipe.write_text(recipe.read_text().replace(source, f'source = "{tmp_path}/gone.jsonl"'))
    assert "gone.jsonl" in refused(str(folder))
    others = tmp_path / "others.jsonl"
    lines = [{"instruction": f"{n}?", "output": "yes", "client": name} for name in "cd" for n in range(4)]
    others.write_text("".join(json.dumps(line) + "\n" for line in lines))
    recipe.write_text(recipe.read_text().replace("gone.jsonl", "others.jsonl"))
    assert "keep their rows elsewhere" in refused(str(folder))


def test_rows_that_have_changed(copied: Callable, refused: Callable) -> None:
    folder = copied("plain", PLAIN)
    save_partition(folder / "partition.json", partition_of_nobody())
    assert "rows are no longer those of" in refused(str(folder))


def partition_of_nobody() -> Partition:
    from fedllm.data.partition import partition_rows

    return partition_rows([{"client": "anna"}, {"client": "ben"}], "column:client", num_clients=2, seed=0)


def test_another_base_model(
    copied: Callable,
    refused: Callable,
    make_model_folder: Callable[..., Path],
    capsys: pytest.CaptureFixture,
) -> None:
    folder = copied("plain", PLAIN)
    recipe = folder / "config.toml"
    recipe.write_text(recipe.read_text().replace(str(make_model_folder()), str(make_model_folder(seed=1))))
    capsys.readouterr()  # a model that is saved shows its progress
    assert "is not the one on this machine" in refused(str(folder))


def test_canaries_whose_secret_is_gone(copied: Callable, refused: Callable) -> None:
    folder = copied("private", PRIVATE)
    (secret,) = (folder / "private").glob("*-canary-secret")
    secret.unlink()
    assert "secret of the run's canaries is not there" in refused(str(folder))
    assert not secret.exists()  # a new one would have other coins


def test_a_run_without_held_out_rows(finished: Callable, refused: Callable) -> None:
    folder = finished("whole", {"data.held-out-fraction": 0.0})
    assert "data.held-out-fraction" in refused(str(folder))


def test_an_adapter_that_changes_nothing_by_itself(finished: Callable, refused: Callable) -> None:
    assert "local-b" in refused(str(finished("fedsa", {"aggregation.preset": "fedsa"})))


def test_a_damaged_configuration(copied: Callable, refused: Callable) -> None:
    folder = copied("plain", PLAIN)
    for damage in (b"seed = ", b"\xff"):
        (folder / "config.toml").write_bytes(damage)
        assert "or a damaged one (" in refused(str(folder))


def test_a_damaged_claim_is_not_taken_for_none(copied: Callable, refused: Callable) -> None:
    folder = copied("private", PRIVATE)
    for damage in ("{", "5", '{"unit": "example"}'):
        (folder / "privacy.json").write_text(damage)
        assert "privacy.json: damaged" in refused(str(folder))


def test_damaged_rounds(copied: Callable, refused: Callable) -> None:
    folder = copied("plain", PLAIN)
    (folder / "rounds.jsonl").write_text("{")
    assert "rounds.jsonl: damaged; a run that goes on writes it again" in refused(str(folder))


@pytest.fixture(autouse=True)
def _elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
