import json
from pathlib import Path

import pytest

from scripts.experiments.corpus import Corpus
from scripts.experiments.joining import QUICK, Options, Part, goals_of, rows_by_part, study_of
from scripts.studies.cells import budget_of


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two institutes and two speakers."""
    rows = {
        "medical.train.jsonl": [
            {"instruction": "Answer.", "input": "Why?", "output": "So.", "client": name} for name in "ab"
        ],
        "shakespeare.train.jsonl": [{"text": "Now", "client": name} for name in "cd"],
    }
    for name, of_file in rows.items():
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in of_file))
    return tmp_path


def test_each_part_has_its_own_clients(folder: Path, tiny_corpus: Corpus) -> None:
    found = dict(rows_by_part(Options(data=folder), tiny_corpus))
    clients = {name: sorted({row["client"] for row in rows}) for name, rows in found.items()}
    assert clients == {"domains": ["code", "math", "news"], "institutes": ["a", "b"], "speakers": ["c", "d"]}
    assert found["institutes"][0] == {"prompt": "Why?", "response": "So.", "client": "a"}
    assert list(dict(rows_by_part(Options(data=folder, parts="speakers"), tiny_corpus))) == ["speakers"]
    assert list(dict(rows_by_part(Options(data=folder / "absent"), tiny_corpus))) == ["domains"]


def test_a_part_is_a_study_of_its_numbers(tmp_path: Path) -> None:
    rows = [{"text": "Now", "client": name} for name in "abc"]
    study = study_of("speakers", Part(8, 10, 20, 4, 64), rows, "model", QUICK, tmp_path)
    assert budget_of(study.config).steps == 100
    assert study.config.federation.num_clients == 3
    few = study_of("speakers", Part(8, 10, 20, 4, 64, clients=2), rows, "model", QUICK, tmp_path)
    assert few.config.federation.num_clients == 2


def test_goals_are_on_those_who_gain_and_on_the_text_of_others() -> None:
    methods = {
        "home": {"gained_over_alone": 0.95, "at_equal_tokens": {"gained_over_alone": 0.8}},
        "federated": {"others": {"no_worse_than_alone": 1.0}},
    }
    goals = goals_of({"domains": {"summary": methods}})
    assert {name: goal.met for name, goal in goals.items()} == {
        "domains_gained_at_own_best": True,
        "domains_gained_at_equal_tokens": False,
        "domains_shared_no_worse_on_others": True,
    }
