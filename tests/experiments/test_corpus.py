import json
from collections import Counter
from pathlib import Path

import pytest

from scripts.experiments.corpus import DOMAINS, Corpus, grouped, left_out_packages, read_corpus


def write_domains(folder: Path) -> None:
    for domain in DOMAINS:
        constant = domain != "general"
        rows = [
            {
                "instruction": "Answer the question." if constant else f"Answer question {number}.",
                "input": f"{domain} {'x' * number}" if constant else "",
                "output": "yes",
                "label": "yes" if domain == "news" else None,
                "domain": domain,
            }
            for number in range(6)
        ]
        (folder / f"{domain}.train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_the_shortest_rows_of_every_domain_are_taken(tmp_path: Path) -> None:
    write_domains(tmp_path)
    corpus = read_corpus(tmp_path, 2, keep_instructions=False, notice=pytest.fail)
    assert Counter(row["domain"] for row in corpus.rows) == dict.fromkeys(DOMAINS, 2)
    prompts = [row["prompt"] for row in corpus.rows]
    assert "code " in prompts  # the sentence every question begins with is gone
    assert "Answer question 0." in prompts
    assert {row["label"] for row in corpus.rows} == {"", "yes"}
    kept = read_corpus(tmp_path, 2, keep_instructions=True, notice=pytest.fail)
    assert "Answer the question.\n\ncode " in [row["prompt"] for row in kept.rows]
    assert kept.digest != corpus.digest
    assert left_out_packages(corpus) == frozenset()


def test_packages_are_the_clients_where_domains_are_absent(tmp_path: Path) -> None:
    notices: list[str] = []
    corpus = read_corpus(tmp_path, 3, keep_instructions=False, notice=notices.append)
    assert len(notices) == 1
    assert "code.train.jsonl" in notices[0]
    assert set(Counter(row["domain"] for row in corpus.rows).values()) == {3}
    assert len(corpus.domains) == 7
    assert left_out_packages(corpus) == set(corpus.domains)


def test_groups_are_neighbouring_domains_or_equal_parts_of_them(tiny_corpus: Corpus) -> None:
    rows = grouped(tiny_corpus, (2, 3, 6))
    assert Counter(row["group-2"] for row in rows) == {"group-00": 24, "group-01": 12}
    assert len({(row["domain"], row["group-3"]) for row in rows}) == 3
    assert set(Counter(row["group-6"] for row in rows).values()) == {6}
    assert all(row["group-6"].startswith(row["domain"]) for row in rows)
    with pytest.raises(ValueError, match="no multiple of 3 domains"):
        grouped(tiny_corpus, (4,))
