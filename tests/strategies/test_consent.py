"""What sites consent to: signed at the site, checked by the server, and told in lineage and statement."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from flwr.app import Message

from clients.client_app import app
from fedllm.errors import RunFailedError
from fedllm.identity import new_key, public_text, verify
from fedllm.plan.run_plan import resolve
from fedllm.runs.lineage import LINEAGE, noted_clients, statement_of_run
from fedllm.runs.memorisation import write_memorisation
from fedllm.runs.records import RoundRecord
from fedllm.wire.joining import consent_statement
from scripts.runtimes.local import local_grid
from strategies.lineage import consents_of
from strategies.run import run_federation
from strategies.session import Watch
from tests.strategies.conftest import NAMES


@pytest.fixture
def site_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Let all nodes be those of one site with a key of its own; return the public half."""
    (tmp_path / "site.toml").write_text('[site]\nkey = "site.key"\nstate-path = "state"\n')
    monkeypatch.setenv("FEDLLM_SITE", str(tmp_path / "site.toml"))
    return public_text(new_key(tmp_path / "site.key"))


def test_a_site_with_a_key_consents_to_a_purpose_and_to_its_rows(
    site_key: str, make_config: Callable, open_run: Callable
) -> None:
    config = make_config({"run.purpose": "letters"})
    run = open_run(config)
    told = consents_of(resolve(config), run.session.clients)
    assert list(told) == list(NAMES)
    for client in run.session.clients.values():
        signed = consent_statement("run", resolve(config).digest, "letters", client)
        assert verify(site_key, signed, client.consent)
        assert told[client.client_id] == {
            "site": site_key,
            "commitment": client.commitment,
            "consent": hashlib.sha256(signed + client.consent).hexdigest(),
        }
    again = open_run(config).session.clients
    other = open_run(make_config({"run.purpose": "letters", "run.name": "other"})).session.clients
    commitments = [{one.commitment for one in some.values()} for some in (run.session.clients, again, other)]
    assert commitments[0] == commitments[1]
    assert len(commitments[0] | commitments[2]) == 8, "no two of clients or runs can be linked"


@pytest.mark.parametrize("name", ["commitments", "signatures"])
def test_a_consent_to_something_else_is_refused(
    name: str, site_key: str, make_config: Callable, open_run: Callable
) -> None:
    def tamper(reply: Message) -> list[Message]:
        if reply.metadata.src_node_id == 3:
            (value,) = reply.content["consent"][name]
            other = "0" * 64 if isinstance(value, str) else bytes(64)
            reply.content["consent"][name] = [other]
        return [reply]

    run = open_run(make_config(), tamper=tamper)
    assert list(run.session.clients) == ["anna", "cleo", "dora"]
    assert any("its site's consent is not to this run" in line for line in run.notices), run.notices


def test_without_a_key_nothing_is_signed_and_no_record_sent(
    make_config: Callable, open_run: Callable
) -> None:
    records: list[set[str]] = []

    def tamper(reply: Message) -> list[Message]:
        records.append({*reply.content})
        return [reply]

    config = make_config()
    run = open_run(config, tamper=tamper)
    assert records[:4] == [{"clients", "metrics"}] * 4
    told = consents_of(resolve(config), run.session.clients)
    assert all(client == {"site": "", "commitment": "", "consent": ""} for client in told.values())


def test_who_left_before_a_resume_took_part_all_the_same(
    site_key: str, make_config: Callable, tmp_path: Path
) -> None:
    config = make_config({"run.output": str(tmp_path), "federation.num-rounds": 2})

    def stop(record: RoundRecord) -> None:
        if record.round_num == 1:
            raise RunFailedError("as at a kill")

    with pytest.raises(RunFailedError):
        run_federation(config, local_grid(config, app, num_nodes=4), Watch(record=stop))
    first = noted_clients(tmp_path / "run")
    assert list(first) == list(NAMES)
    assert {client["site"] for client in first.values()} == {site_key}
    again = config.override({"run.resume": True, "federation.min-clients": 3})
    grid = local_grid(again, app, num_nodes=4)
    grid.contexts.pop(3)  # ben's node
    run_federation(again, grid)
    assert noted_clients(tmp_path / "run")["ben"] == first["ben"]
    assert first["ben"]["commitment"] in statement_of_run(tmp_path / "run").clients["commitments"]


def test_lineage_names_clients_and_the_statement_does_not(
    site_key: str, make_config: Callable, tmp_path: Path
) -> None:
    keys = {"run.purpose": "letters", "run.output": str(tmp_path), "federation.num-rounds": 1}
    config = make_config({**keys, "data.licences": ""})
    state = run_federation(config, local_grid(config, app, num_nodes=4))
    folder = tmp_path / "run"
    write_memorisation(folder, state.adapter.digest, {"extraction": 0.25})
    clients = json.loads((folder / LINEAGE).read_text())["consent"]["clients"]
    assert {client["site"] for client in clients.values()} == {site_key}
    said = statement_of_run(folder)
    assert said.consent == {
        "purpose": "letters",
        "consents": sorted(client["consent"] for client in clients.values()),
    }
    assert said.clients["commitments"] == sorted(client["commitment"] for client in clients.values())
    assert said.memorisation == {"extraction": 0.25}
    assert not any(name in str(said) for name in (*NAMES, site_key))
    assert "Their purpose, as the data holders were told: letters." in " ".join(
        (folder / "adapter" / "README.md").read_text().split()
    )
