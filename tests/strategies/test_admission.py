"""Sites that prove who they are: whom a server with a list admits, and whom it refuses by name."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import RecordDict

from clients import join
from fedllm.errors import RunFailedError
from fedllm.identity import new_key, public_text, sign
from fedllm.plan.run_plan import resolve
from fedllm.wire.joining import Proof, join_statement, read_question
from strategies.exchange.joining import rejoin
from strategies.grid.transport import Transport
from strategies.rounds import next_round

# The same in every process: they stand in the names of tests, which a parallel run compares.
KEYS = {node: Ed25519PrivateKey.from_private_bytes(bytes([node]) * 32) for node in (2, 3, 4, 5)}
NAMES = {2: "anna", 3: "ben", 4: "cleo", 5: "dora"}
STRANGER = Ed25519PrivateKey.from_private_bytes(bytes([9]) * 32)


@pytest.fixture
def sites(tmp_path: Path) -> Callable[..., dict[str, str]]:
    """Return a function (site -> further lines) -> the key that names a list of the four sites."""

    def write(lines: Mapping[str, str] | None = None) -> dict[str, str]:
        path = tmp_path / "sites.toml"
        path.write_text(
            "".join(
                f'[sites.{name}-site]\npublic-key = "{public_text(KEYS[node])}"\n'
                + (lines or {}).get(name, f'clients = ["{name}"]\n')
                for node, name in NAMES.items()
            )
        )
        return {"federation.sites": str(path)}

    return write


@pytest.fixture
def signing(monkeypatch: pytest.MonkeyPatch) -> dict[int, Any]:
    """Let every node sign with the key that stands here, or by the function; None makes no signature."""
    keys: dict[int, Any] = dict(KEYS)

    def prove(holder: Any, question: RecordDict, clients: Any) -> Proof | None:
        key = keys[clients[0].node_id]
        if key is None or not isinstance(key, Ed25519PrivateKey):
            return key and key(clients)
        plan = holder.plan
        signed = join_statement(read_question(question), plan.config.run.name, plan.digest, clients)
        return Proof(public_text(key), sign(key, signed))

    monkeypatch.setattr(join, "prove", prove)
    return keys


def test_sites_of_the_list_take_part(
    sites: Callable, signing: dict[int, Any], make_config: Callable, open_run: Callable
) -> None:
    run = open_run(make_config(sites()))
    assert {client.client_id: client.site for client in run.session.clients.values()} == {
        name: f"{name}-site" for name in NAMES.values()
    }
    signed, _ = next_round(run.session, run.state)
    signing.update(dict.fromkeys(signing))
    plain = open_run(make_config())
    assert next_round(plain.session, plain.state)[0].adapter.digest == signed.adapter.digest


@pytest.mark.parametrize(
    ("proof", "expected"),
    [
        (None, "node 3 did not join: its site has not signed"),
        (STRANGER, f"its site's key, {public_text(STRANGER)[:24]}..., is not in federation.sites"),
        (KEYS[2], "site anna-site may not speak for client ben"),
        (lambda clients: Proof(public_text(KEYS[3]), bytes(64)), "signature is not of this question"),
        (
            lambda clients: Proof(
                public_text(KEYS[3]), sign(KEYS[3], join_statement("0" * 32, "run", "d" * 64, clients))
            ),
            "signature is not of this question",
        ),
    ],
)
def test_anybody_else_is_refused_and_named(
    proof: Any,
    expected: str,
    sites: Callable,
    signing: dict[int, Any],
    make_config: Callable,
    open_run: Callable,
) -> None:
    signing[3] = proof
    run = open_run(make_config(sites()))
    assert list(run.session.clients) == ["anna", "cleo", "dora"]
    assert any(expected in line for line in run.notices), run.notices
    assert all("\n" not in line and len(line) < 300 for line in run.notices)


def test_without_a_list_any_site_may_join_but_no_false_signature(
    signing: dict[int, Any], make_config: Callable, open_run: Callable
) -> None:
    signing |= {2: None, 3: lambda clients: Proof(public_text(KEYS[3]), bytes(64)), 4: STRANGER}
    run = open_run(make_config())
    found = {client.client_id: client.site for client in run.session.clients.values()}
    assert found == {"anna": "", "cleo": public_text(STRANGER), "dora": public_text(KEYS[5])}


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ({"ben": "max-rows = 6\n"}, "client ben: site ben-site declares 7 rows, federation.sites admits 6"),
        ({"ben": "max-rows = 7\n"}, ""),
    ],
)
def test_a_site_declares_no_more_rows_than_admitted(
    lines: dict[str, str],
    expected: str,
    sites: Callable,
    signing: dict[int, Any],
    make_config: Callable,
    open_run: Callable,
) -> None:
    run = open_run(make_config({**sites(lines), "data.held-out-fraction": 0.0}))
    assert ("ben" in run.session.clients) is not expected
    assert expected in "\n".join(run.notices)


def test_all_nodes_of_a_site_share_its_limits(
    sites: Callable, signing: dict[int, Any], make_config: Callable, open_run: Callable
) -> None:
    signing |= {3: KEYS[2], 4: KEYS[2]}
    run = open_run(make_config(sites({"anna": "max-clients = 2\n"})))
    assert len(run.session.clients) == 3
    assert "dora" in run.session.clients
    assert any("federation.sites admits 2 clients of site anna-site" in line for line in run.notices)


def test_a_client_stays_with_the_site_that_declared_it(
    signing: dict[int, Any], make_config: Callable, open_run: Callable
) -> None:
    run = open_run(make_config())
    context = run.grid.contexts.pop(3)  # its node has gone, and another claims its client
    run.grid.contexts[3 + 90] = type(context)(
        run_id=1,
        node_id=93,
        node_config=context.node_config,
        state=context.state,
        run_config=context.run_config,
    )
    signing[93] = STRANGER
    rejoin(run.session)
    assert run.session.clients["ben"].node_id == 3
    assert run.notices[-1] == "client ben: another site declared it before, whose it stays"
    run.grid.contexts[94] = run.grid.contexts.pop(93)
    run.grid.contexts[94].node_id = 94
    signing[94] = KEYS[3]
    rejoin(run.session)
    assert run.session.clients["ben"].node_id == 94
    assert run.notices[-1] == "client ben is back"


def test_a_second_node_with_a_copied_key_gets_no_client_twice(
    sites: Callable, signing: dict[int, Any], make_config: Callable, open_run: Callable
) -> None:
    run = open_run(make_config(sites()))
    context = run.grid.contexts[3]
    run.grid.contexts[93] = type(context)(
        run_id=1,
        node_id=93,
        node_config=context.node_config,
        state=context.state,
        run_config=context.run_config,
    )
    signing[93] = KEYS[3]
    rejoin(run.session)
    assert run.session.clients["ben"].node_id == 3
    assert run.notices[-1] == "client ben: two nodes declare it; the second is left out"


def test_every_question_has_a_nonce_of_its_own(make_config: Callable, open_run: Callable) -> None:
    run = open_run(make_config())
    transport = Transport(run.grid)
    transport.ask_to_join()
    nonces = {*transport.nonces.values(), *run.session.transport.nonces.values()}
    assert len(nonces) == 8


def test_the_key_of_site_toml_signs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_config: Callable, open_run: Callable
) -> None:
    key = new_key(tmp_path / "site.key")
    (tmp_path / "site.toml").write_text('[site]\nkey = "site.key"\n')
    monkeypatch.setenv("FEDLLM_SITE", str(tmp_path / "site.toml"))
    run = open_run(make_config())
    assert {client.site for client in run.session.clients.values()} == {public_text(key)}
    (tmp_path / "site.key").chmod(0o644)
    with pytest.raises(RunFailedError, match=r"others may read the key; run `chmod 600"):
        open_run(make_config())


def test_a_list_that_cannot_be_read_stops_the_run_at_once(make_config: Callable, open_run: Callable) -> None:
    assert resolve(make_config({"federation.sites": "absent.toml"})).digest == resolve(make_config()).digest
    with pytest.raises(Exception, match=r"federation\.sites: absent\.toml: cannot be read"):
        open_run(make_config({"federation.sites": "absent.toml"}))
