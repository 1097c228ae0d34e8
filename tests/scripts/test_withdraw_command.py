"""What a withdrawal marks in a registry: all that was made with the rows, and nothing else."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedllm.errors import ConfigError, IntegrityError
from fedllm.identity import public_text
from fedllm.registry.registry import Registry
from fedllm.runs.folder import START, WITHDRAWALS
from fedllm.runs.lineage import LINEAGE
from fedllm.runs.unlearning import Unlearning, write_unlearning
from fedllm.runs.withdrawals import read_withdrawals
from fedllm.withdrawal import read_withdrawal, sign_withdrawal
from scripts.commands.withdraw_command import mark_withdrawn, withdraw
from tests.registry.conftest import KEY, finished_run

SITE = Ed25519PrivateKey.from_private_bytes(bytes(range(1, 33)))
TIME = "2026-11-27T18:00:00+00:00"
BEN = sign_withdrawal(SITE, ["ben"], TIME)


@pytest.fixture
def add(tmp_path: Path) -> Callable[..., int]:
    """Return a function (clients, start, kind) that adds a run to the registry -> the version's number."""
    registry, number = Registry(tmp_path / "clinic"), 0

    def do(*clients: str, start: int = 0, kind: str = "", begins: Path | None = None) -> int:
        nonlocal number
        number += 1
        earlier = registry.version(start) if start else None
        begun = earlier.folder if earlier is not None and not kind else begins
        run = finished_run(tmp_path / f"run{number}", number, begun)
        lineage: dict[str, Any] = json.loads((run / LINEAGE).read_text())
        of_site = {"site": public_text(SITE), "commitment": "", "consent": ""}
        lineage["consent"]["clients"] = dict.fromkeys(clients, of_site)
        (run / LINEAGE).write_text(json.dumps(lineage))
        if kind and earlier is not None:
            write_unlearning(run, Unlearning(kind=kind, method="replay", parent=earlier.weights))
        assert (run / START).exists() == bool(begun)
        return registry.add(run, KEY).number

    return do


def marks(tmp_path: Path) -> dict[int, bool]:
    return {version.number: bool(version.mark) for version in Registry(tmp_path / "clinic").versions()}


def test_all_that_was_made_with_the_rows_is_marked(
    add: Callable, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other, with_ben = add("anna"), add("anna", "ben")
    child = add("anna", start=with_ben)
    grandchild = add("anna", start=child)
    exact, rough = add("anna", start=with_ben, kind="A"), add("anna", start=with_ben, kind="D")
    of_exact, of_other = add("anna", start=exact), add("anna", start=other)
    registry = Registry(tmp_path / "clinic")
    registry.promote(grandchild)
    (tmp_path / "ben.json").write_bytes(BEN)
    withdraw(registry.folder, tmp_path / "ben.json")
    marked = {number for number, is_marked in marks(tmp_path).items() if is_marked}
    assert marked == {with_ben, child, grandchild, rough}
    assert not marked & {other, exact, of_exact, of_other}
    assert (
        f"version {grandchild} is marked, never promoted; production still points" in capsys.readouterr().out
    )
    with pytest.raises(ConfigError, match="marked, never promoted"):
        registry.promote(child)
    lines = len(list(registry.entries()))
    withdraw(registry.folder, tmp_path / "ben.json")
    assert len(list(registry.entries())) == lines
    registry.verify()


def test_unlearning_another_client_frees_no_version(add: Callable, tmp_path: Path) -> None:
    registry, with_ben = Registry(tmp_path / "clinic"), add("ben")
    child = add("anna", "cleo", start=with_ben)
    exact = add("cleo", start=child, kind="A", begins=registry.version(with_ben).folder)
    mark_withdrawn(registry, [read_withdrawal(BEN)])
    assert marks(tmp_path) == {with_ben: True, child: True, exact: True}


def test_a_whole_site_takes_all_its_clients_along(add: Callable, tmp_path: Path) -> None:
    add("anna")
    stranger = Ed25519PrivateKey.generate()
    registry = Registry(tmp_path / "clinic")
    assert mark_withdrawn(registry, [read_withdrawal(sign_withdrawal(stranger, [], TIME))]) == []
    assert mark_withdrawn(registry, [read_withdrawal(BEN)]) == []
    (version,) = mark_withdrawn(registry, [read_withdrawal(sign_withdrawal(SITE, [], TIME))])
    assert "ben" not in version.mark


def test_records_come_from_a_file_or_a_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no withdrawal has reached"):
        withdraw(tmp_path, tmp_path)
    (tmp_path / WITHDRAWALS).mkdir()
    for name, record in (("a", BEN), ("b", sign_withdrawal(SITE, [], TIME))):
        (tmp_path / WITHDRAWALS / f"{name}.json").write_bytes(record)
    assert [one.clients for one in read_withdrawals(tmp_path)] == [("ben",), ()]
    false = tmp_path / "false.json"
    false.write_bytes(BEN.replace(b"ben", b"dan"))
    with pytest.raises(IntegrityError, match=r"false\.json: a withdrawal that the site's key"):
        read_withdrawals(false)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_withdrawals(tmp_path / "absent.json")
    with pytest.raises(ConfigError, match="no registry"):
        withdraw(tmp_path / "absent", false)
