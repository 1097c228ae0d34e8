"""Which rows a run may learn from: SPDX expressions against a list, and rows that are only counted."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedllm.config.keys import DataConfig
from fedllm.config.run_config import RunConfig
from fedllm.data.installed_packages import Package, installed_packages, licence_of
from fedllm.data.licences import is_licensed, parse_licences, permits
from fedllm.data.shards import OwnSplit, load_shards, load_split_rows
from fedllm.errors import ConfigError, DataError, NoDataError
from fedllm.plan.run_plan import resolve
from tests.data.builders import SECRET, line, write

ALLOWED = parse_licences("mit, Apache-2.0")


@pytest.mark.parametrize(
    ("expression", "is_met"),
    [
        ("MIT", True),
        ("apache-2.0", True),
        ("GPL-3.0-only", False),
        ("MIT OR GPL-3.0-only", True),
        ("MIT AND GPL-3.0-only", False),
        ("GPL-3.0-only AND MIT OR Apache-2.0", True),
        ("GPL-3.0-only AND (MIT OR Apache-2.0)", False),
        ("Apache-2.0 AND (MIT OR (GPL-2.0-only AND ISC))", True),
        ("Apache-2.0 WITH LLVM-exception", False),
        ("do as you like", False),
        ("", False),
    ],
)
def test_an_expression_is_met_by_what_is_allowed(expression: str, is_met: bool) -> None:
    assert permits(expression, ALLOWED) == is_met


@pytest.mark.parametrize("row", [{"License": "MIT"}, {"licence": "MIT", "license": None}])
def test_a_row_names_its_licence_in_either_spelling(row: dict[str, Any]) -> None:
    assert is_licensed(row, ALLOWED)
    assert not is_licensed({"text": "MIT"}, ALLOWED)
    assert not is_licensed({**row, "LICENCE": "GPL-3.0-only"}, ALLOWED)
    assert is_licensed({"text": "MIT"}, parse_licences(""))


@pytest.mark.parametrize("text", ["mine", "MIT OR Apache-2.0", "(MIT)"])
def test_a_list_of_other_than_licences_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"data\.licences"):
        resolve(RunConfig.from_flat({"data.licences": text}))


def rows(number: int) -> str:
    """Return the lines of rows of which every second is MIT's, and the others nobody's or the GPL's."""
    kinds = ("MIT", "GPL-3.0-only", "MIT", "")
    return "".join(
        line(text=f"{SECRET} {place}", client="c", licence=kinds[place % 4]) for place in range(number)
    )


def test_refused_rows_are_counted_and_are_no_bad_rows(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    source = write(tmp_path / "a.jsonl", rows(20))
    data = DataConfig(source=source, licences="MIT", on_bad_row="stop")
    shards = load_shards(data, num_clients=1, seed=0)
    texts = {example.text for client in shards.clients for example in (*client.train, *client.held_out)}
    assert texts == {f"{SECRET} {place}" for place in range(0, 20, 2)}
    assert shards.bad == ()
    assert "10 of 20 rows are not used" in caplog.text
    assert SECRET not in caplog.text


def test_rows_of_no_allowed_licence_at_all_are_no_data(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", rows(8))
    with pytest.raises(NoDataError, match=r"data\.licences allows none") as caught:
        load_shards(DataConfig(source=source, licences="ISC"), num_clients=1, seed=0)
    assert SECRET not in str(caught.value)


def test_under_a_budget_the_number_declared_does_not_tell_licences(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", rows(20))
    split = OwnSplit(lambda places: set(list(places)[:4]), hides=True)
    declared = [
        load_split_rows(source, DataConfig(licences=allowed), client_id="c", seed=0, split=split).client
        for allowed in ("", "MIT", "ISC")
    ]
    assert [client.num_public for client in declared] == [16, 16, 16]
    assert [len(client.train) for client in declared] == [16, 8, 0]


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ("License-Expression: MIT AND ISC\nLicense: BSD", "MIT AND ISC"),
        ("License: BSD-3-Clause\nClassifier: License :: OSI Approved :: BSD License", "BSD-3-Clause"),
        ("License: Apache License, Version 2.0", "Apache-2.0"),
        ("License: Apache License, Version 1.1", ""),
        ("License: MIT, GPL-3.0-only\nClassifier: License :: OSI Approved :: MIT License", ""),
        ("License: UNKNOWN\nClassifier: License :: OSI Approved :: ISC License (ISCL)", "ISC"),
        ("Classifier: License :: A :: MIT License\nClassifier: License :: A :: Apache Software License", ""),
        ("License: BSD", ""),
        ("Name: none", ""),
    ],
)
def test_a_package_has_the_licence_that_its_metadata_says_plainly(
    metadata: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "example_of_licences-1.dist-info").mkdir()
    (tmp_path / "example_of_licences-1.dist-info" / "METADATA").write_text(metadata + "\n")
    monkeypatch.syspath_prepend(tmp_path)
    package = Package("example", tmp_path, distribution="example-of-licences")
    assert licence_of(package) == expected


def test_installed_packages_say_their_licence() -> None:
    found = {package.name: licence_of(package) for package in installed_packages()}
    expected = {"transformers": "Apache-2.0", "flwr": "Apache-2.0", "typer": "MIT", "python": "Python-2.0"}
    assert {name: found[name] for name in expected} == expected
    assert permits(found["torch"], parse_licences("MIT")) is False, "torch has parts under others"


def test_the_corpus_is_read_from_allowed_packages_alone(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The folder of test_demo_corpus.py: to parse the packages anew takes seconds.
    monkeypatch.setenv("FEDLLM_CACHE", str(tmp_path_factory.getbasetemp() / "docstrings"))
    data = DataConfig(licences="Apache-2.0")
    shards = load_shards(data, num_clients=2, seed=0)
    packages = {package.name: package for package in installed_packages()}
    assert {licence_of(packages[client.client_id]) for client in shards.clients} == {"Apache-2.0"}
    with pytest.raises(DataError, match=r"and a licence of data\.licences, 2 wanted"):
        load_shards(replace(data, licences="0BSD"), num_clients=2, seed=0)
