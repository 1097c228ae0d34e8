"""Verdicts: what passes, and what is written."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from fedllm.errors import DataError
from fedllm.originality.verdict import (
    GATES,
    Provenance,
    Screening,
    Verdict,
    tokens_digest,
    write_screening,
)


def verdict(**gates: bool | None) -> Verdict:
    return Verdict(digest=tokens_digest((1, 2)), **{"overlap": True, **gates})


def provenance(**changes: Any) -> Provenance:
    values: dict[str, Any] = {
        "run": "letters",
        "round_num": 3,
        "model": "smollm2-135m-instruct",
        "fingerprint": "f" * 64,
        "source": "client adapters",
        "adapters": ("a" * 64, "b" * 64),
        "seed": 0,
        "temperature": 1.0,
        "licence": "Apache-2.0",
    }
    return Provenance(**{**values, **changes})


@pytest.mark.parametrize("gate", GATES)
def test_one_gate_is_enough_to_refuse(gate: str) -> None:
    assert verdict(**dict.fromkeys(GATES, True)).passed
    assert not verdict(**{**dict.fromkeys(GATES, True), gate: False}).passed


def test_only_the_overlap_must_have_been_checked() -> None:
    assert verdict().passed
    assert not verdict(overlap=None, duplicate=True, membership=True).passed


def test_pass_rates_are_of_the_texts_that_a_gate_checked() -> None:
    verdicts = (verdict(duplicate=True), verdict(duplicate=False), verdict(overlap=False), verdict())
    rates = Screening(provenance(), verdicts).pass_rates
    assert rates == {"overlap": 0.75, "duplicate": 0.5, "membership": None, "all": 0.5}


def test_a_screening_is_written_whole_with_its_checksum(tmp_path: Path) -> None:
    screening = Screening(provenance(), (verdict(), verdict(duplicate=False, membership=None)))
    write_screening(tmp_path / "synthetic.json", screening)
    assert [file.name for file in tmp_path.iterdir()] == ["synthetic.json"]
    content = json.loads((tmp_path / "synthetic.json").read_text())
    checksum = content.pop("sha256")
    assert checksum == hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    assert (content["num_texts"], content["num_passed"]) == (2, 1)
    assert content["pass_rates"] == dict(screening.pass_rates)
    given = {**content["provenance"], "adapters": tuple(content["provenance"]["adapters"])}
    assert Screening(Provenance(**given), tuple(Verdict(**one) for one in content["verdicts"])) == screening


def test_text_without_a_licence_is_refused() -> None:
    with pytest.raises(DataError, match="licence"):
        provenance(licence=" ")


def test_a_digest_is_of_the_tokens() -> None:
    assert tokens_digest((1, 2)) != tokens_digest((2, 1))
    assert tokens_digest((1, 2)) == tokens_digest([1, 2])
