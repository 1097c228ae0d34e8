"""Verdicts: what passes, what is written, and that damage is noticed."""

from pathlib import Path
from typing import Any

import pytest

from fedllm.errors import DataError, IntegrityError
from fedllm.originality.verdict import (
    GATES,
    Provenance,
    Screening,
    Verdict,
    digest_of,
    read_screening,
    write_screening,
)


def verdict(**gates: bool | None) -> Verdict:
    return Verdict(digest=digest_of((1, 2)), **{"overlap": True, **gates})


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


def test_a_screening_comes_back_as_it_was(tmp_path: Path) -> None:
    screening = Screening(provenance(), (verdict(), verdict(duplicate=False, membership=None)))
    write_screening(tmp_path / "synthetic.json", screening)
    assert read_screening(tmp_path / "synthetic.json") == screening
    assert [file.name for file in tmp_path.iterdir()] == ["synthetic.json"]


def test_every_damage_gives_one_line_that_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "synthetic.json"
    write_screening(path, Screening(provenance(), (verdict(overlap=False),)))
    text = path.read_text()
    damaged = [
        text.replace('"overlap": false', '"overlap": true'),
        text.replace("Apache-2.0", "MIT"),
        text[: len(text) // 2],
        "[]",
        "{}",
        "null",
        "",
    ]
    for content in damaged:
        path.write_text(content)
        with pytest.raises(IntegrityError, match=r"synthetic\.json: absent, damaged or changed") as caught:
            read_screening(path)
        assert "\n" not in str(caught.value)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(IntegrityError):
        read_screening(path)
    path.unlink()
    with pytest.raises(IntegrityError):
        read_screening(path)


def test_text_without_a_licence_is_refused() -> None:
    with pytest.raises(DataError, match="licence"):
        provenance(licence=" ")


def test_a_digest_is_of_the_tokens() -> None:
    assert digest_of((1, 2)) != digest_of((2, 1))
    assert digest_of((1, 2)) == digest_of([1, 2])
