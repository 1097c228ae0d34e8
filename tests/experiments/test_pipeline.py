from typing import Any

from scripts.experiments.corpus import Corpus
from scripts.experiments.pipeline import QUICK, SENTENCE, goals_of, moments_of, rows_at


def test_rows_come_and_keep_their_place(tiny_corpus: Corpus) -> None:
    counts, faulty = [], []
    for moment in moments_of(QUICK):
        found = rows_at(tiny_corpus, moment, 4)
        counts.append({len(rows) for rows in found.values()})
        faulty.append(sorted(site for site, rows in found.items() if rows[0]["response"] == SENTENCE))
    assert counts == [{4}, {8}, {8}, {12}, {12}]
    assert faulty == [[], [], [], ["code", "math", "news"], []]
    first, *_, last = moments_of(QUICK)
    before, after = (rows_at(tiny_corpus, moment, 4)["math"] for moment in (first, last))
    assert after[:4] == before


def look(moment: str, *events: str) -> dict[str, Any]:
    return {"moment": moment, "events": list(events)}


def test_the_goals_name_what_did_not_happen() -> None:
    story = [
        look("arrival 1", "added", "promoted"),
        look("arrival 2, rate too large", "kept"),
        look("rate mended"),
        look("arrival 3, faulty", "drift", "added", "promoted"),
        look("answers repaired", "drift", "rolled-back"),
    ]
    assert all(goal.met for goal in goals_of(story).values())
    story[2:] = [look("rate mended", "drift"), story[3], look("answers repaired", "drift", "promoted")]
    missed = sorted(name for name, goal in goals_of(story).items() if not goal.met)
    assert missed == ["alarms_without_a_cause", "rolled_back"]
