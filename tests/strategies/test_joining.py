"""What a data holder may declare, and what becomes of one that declares nonsense."""

import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from flwr.app import ConfigRecord, Context, Error, Message, MetricRecord, RecordDict

from clients.client_app import app
from fedllm.errors import RunFailedError
from fedllm.messages import JoinedClient
from fedllm.plan.run_plan import resolve
from fedllm.wire.refusals import write_error
from scripts.runtimes.local import init, local_grid
from strategies.exchange import joining
from strategies.exchange.evaluation import evaluate
from strategies.exchange.joining import join_clients, rejoin, wait_for_nodes
from strategies.first_state import first_state
from strategies.grid.transport import Transport
from strategies.rounds import next_round
from strategies.session import Watch
from strategies.start import open_session
from tests.builders import Clock

OFFENDER, NODE = "ben", 3
SECRET = "xyzzy-private row of text"


def declaring(**fields: Any) -> Callable[[RecordDict], RecordDict]:
    """Return a change of some fields of the offender's declaration."""

    def change(content: RecordDict) -> RecordDict:
        for name, value in fields.items():
            content["metrics" if name.startswith("num") else "clients"][name] = value
        return content

    return change


def tampering(kind: str, change: Callable[[RecordDict], Any]) -> Callable[[Message], list[Message]]:
    def tamper(reply: Message) -> list[Message]:
        if reply.metadata.src_node_id == NODE and reply.metadata.message_type == kind:
            changed = change(reply.content)
            if isinstance(changed, Error):
                reply.__dict__["_content"], reply.__dict__["_error"] = None, changed
            else:
                reply.content = changed
        return [reply]

    return tamper


def with_note(content: RecordDict) -> RecordDict:
    content["note"] = ConfigRecord({"text": SECRET})
    return content


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (declaring(fingerprints=["0" * 64]), "client ben holds another base model (000000000000)"),
        (declaring(num_train=[0]), "client ben has no data"),
        (
            declaring(num_train=[0], causes=["rows-lost"]),
            "client ben has no data to train on (too many of its",
        ),
        (declaring(causes=[SECRET]), "node 3 did not join"),
        (declaring(ids=["anna"]), "client anna: two nodes declare it; the second is left out"),
        (declaring(ids=[]), "node 3 did not join"),
        (declaring(ids=[OFFENDER, OFFENDER]), "node 3 did not join"),
        (declaring(num_train=[-1]), "node 3 did not join"),
        (declaring(num_train=[1.5]), "node 3 did not join"),
        (declaring(fingerprints=[SECRET, SECRET]), "node 3 did not join"),
        (declaring(note=[SECRET]), "node 3 did not join"),
        (with_note, "node 3 did not join"),
        (lambda content: RecordDict(), "node 3 did not join"),
        (lambda content: RecordDict({"error": ConfigRecord({"code": SECRET})}), "client reports internal"),
        (
            lambda content: RecordDict({"error": ConfigRecord({"code": "bad-data"})}),
            "client reports bad-data",
        ),
        (lambda content: Error(2, SECRET), "node 3 did not join: client error"),
    ],
)
def test_who_does_not_join_properly_is_left_out_by_name(
    change: Callable[[RecordDict], Any], expected: str, make_config: Callable, open_run: Callable
) -> None:
    run = open_run(make_config(), tamper=tampering("query.join", change))
    assert list(run.session.clients) == ["anna", "cleo", "dora"]
    assert any(expected in line for line in run.notices), run.notices
    assert not any("xyzzy" in line or "\n" in line for line in run.notices)


def test_a_client_that_holds_another_base_model_changes_nothing(
    make_config: Callable, open_run: Callable
) -> None:
    absent = open_run(make_config(), absent=[NODE])
    other = open_run(make_config(), tamper=tampering("query.join", declaring(fingerprints=["0" * 64])))
    expected, _ = next_round(absent.session, absent.state)
    state, record = next_round(other.session, other.state)
    assert state.adapter.digest == expected.adapter.digest
    assert record.asked == ("anna", "cleo", "dora")


def test_a_weight_is_bound_by_what_was_declared(make_config: Callable, open_run: Callable) -> None:
    run = open_run(make_config(), tamper=tampering("query.join", declaring(num_train=[3])))
    _, record = next_round(run.session, run.state)
    assert record.lost == {OFFENDER: "the weight 6 is above the 3 declared at joining"}


def test_too_few_usable_clients_stop_the_run_with_one_line(make_config: Callable, open_run: Callable) -> None:
    config = make_config({"federation.min-clients": 4})
    with pytest.raises(RunFailedError, match="3 usable clients joined within") as caught:
        open_run(config, absent=[NODE])
    assert "\n" not in str(caught.value)


def test_a_node_that_comes_late_takes_part_from_then_on(make_config: Callable, open_run: Callable) -> None:
    run, late = open_run(make_config(), absent=[NODE]), open_run(make_config())
    state, record = next_round(run.session, run.state)
    assert record.asked == ("anna", "cleo", "dora")
    run.grid.contexts[NODE] = late.grid.contexts[NODE]
    for _ in range(2):
        state, record = next_round(run.session, state)
        assert record.accepted == ("anna", "ben", "cleo", "dora")
    assert run.notices[-1] == "client ben joined"


def test_a_client_whose_node_restarted_under_another_id_is_back(
    make_config: Callable, open_run: Callable
) -> None:
    run = open_run(make_config())
    state, _ = next_round(run.session, run.state)
    context = run.grid.contexts.pop(NODE)
    run.grid.contexts[77] = replace_node(context, 77)
    for _ in range(2):
        state, record = next_round(run.session, state)
        assert record.accepted == ("anna", "ben", "cleo", "dora")
    assert state.num_drawn["ben"] == 12
    assert run.notices == ["client ben is back"]


def replace_node(context: Any, node_id: int) -> Any:
    return Context(
        run_id=1,
        node_id=node_id,
        node_config=context.node_config,
        state=RecordDict(),
        run_config=context.run_config,
    )


class Nodes:
    """The nodes of a run's grid: some are silent for now, some appear only once others are asked."""

    def __init__(self, run: Any, monkeypatch: pytest.MonkeyPatch):
        self.run, self.silent, self.late = run, set[int](), set[int]()
        self.push, self.pull, self.ids = run.grid.push_messages, run.grid.pull_messages, run.grid.get_node_ids
        for name in ("push_messages", "pull_messages", "get_node_ids"):
            monkeypatch.setattr(run.grid, name, getattr(self, name))

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        self.late = set()
        return self.push(messages)

    def pull_messages(self, ids: Iterable[str]) -> Iterable[Message]:
        waiting = self.run.grid._waiting
        return self.pull(
            [i for i in ids if i in waiting and waiting[i].metadata.dst_node_id not in self.silent]
        )

    def get_node_ids(self) -> list[int]:
        return [node for node in self.ids() if node not in self.late]

    def join(self, config: Any) -> dict[str, JoinedClient]:
        """Have the nodes join the run anew."""
        transport = Transport(self.run.grid, poll_seconds=0.01)
        object.__setattr__(self.run.session, "transport", transport)
        joined = join_clients(transport, resolve(config), self.run.session.layout, self.run.notices.append)
        object.__setattr__(self.run.session, "clients", joined)
        return joined


def test_a_node_that_hangs_holds_up_no_other(
    make_config: Callable, open_run: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config({"federation.min-clients": 3})
    nodes = Nodes(open_run(config), monkeypatch)
    nodes.silent, nodes.late = {NODE}, {2, 4, 5}  # it is the first, and the only one, to be asked
    assert list(nodes.join(config)) == ["anna", "cleo", "dora"]
    assert "node 3 has not answered yet; its clients take part once it does" in nodes.run.notices


def test_nodes_that_hang_are_the_cause_where_too_few_are_left(
    make_config: Callable, open_run: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes = Nodes(open_run(make_config()), monkeypatch)
    nodes.silent = {NODE}
    with pytest.raises(RunFailedError, match=r"3 usable clients.*node 3: no answer within 0\.4 s$"):
        nodes.join(make_config({"federation.min-clients": 4}))


def test_an_answer_after_the_wait_counts_from_the_next_round_on(
    make_config: Callable, open_run: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config()
    nodes = Nodes(open_run(config), monkeypatch)
    nodes.silent = {NODE}
    nodes.join(config)
    state, record = next_round(nodes.run.session, nodes.run.state)
    assert record.asked == ("anna", "cleo", "dora")
    nodes.silent.clear()
    _, record = next_round(nodes.run.session, state)
    assert record.accepted == ("anna", "ben", "cleo", "dora")


def test_a_new_node_that_hangs_holds_one_round_for_a_short_time(
    make_config: Callable, open_run: Callable, monkeypatch: pytest.MonkeyPatch, clock: Clock
) -> None:
    nodes, full = Nodes(open_run(make_config(), absent=[NODE]), monkeypatch), open_run(make_config())
    session = nodes.run.session
    object.__setattr__(session, "plan", resolve(make_config({"federation.join-deadline": 30.0})))
    nodes.run.grid.contexts[NODE] = full.grid.contexts[NODE]
    nodes.silent = {NODE}
    waits = []
    for _ in range(2):
        began = clock.now
        rejoin(session)
        waits.append(clock.now - began)
    assert waits == [pytest.approx(joining.REJOIN_SECONDS, abs=2 * session.transport.poll_seconds), 0]
    assert "ben" not in session.clients
    nodes.silent.clear()
    rejoin(session)
    assert session.clients["ben"].node_id == NODE


def test_clients_that_join_meanwhile_end_the_wait(
    make_config: Callable, open_run: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config({"federation.min-clients": 3})
    nodes = Nodes(open_run(config), monkeypatch)
    nodes.silent = {NODE}
    nodes.join(config)
    del nodes.run.grid.contexts[5]
    nodes.silent.clear()
    wait_for_nodes(nodes.run.session)
    assert set(nodes.run.session.clients) == {"anna", "ben", "cleo", "dora"}


@pytest.mark.parametrize(("code", "is_asked_again"), [("out-of-memory", True), ("bad-data", False)])
def test_a_node_is_asked_again_where_its_error_may_pass(
    code: str,
    is_asked_again: bool,
    make_config: Callable,
    open_run: Callable,
    clock: Clock,
) -> None:
    left = [1]

    def fail_once(content: RecordDict) -> RecordDict:
        left[0] -= 1
        return content if left[0] < 0 else RecordDict({"error": ConfigRecord({"code": code})})

    run = open_run(make_config(), tamper=tampering("query.join", fail_once))
    rejoin(run.session)
    assert left == [0], "not at once"
    clock.sleep(joining.AGAIN_SECONDS)
    rejoin(run.session)
    assert ("ben" in run.session.clients) is is_asked_again


def refusing(code: str, nodes: Iterable[int]) -> Callable[[Message], list[Message]]:
    def tamper(reply: Message) -> list[Message]:
        if reply.metadata.src_node_id in set(nodes) and reply.metadata.message_type == "query.join":
            reply.content = write_error(code)
        return [reply]

    return tamper


@pytest.mark.parametrize("code", ["bad-model", "bad-data", "bad-config", "missing-package", "no-data"])
def test_refusals_of_all_nodes_end_the_wait_with_the_cause(
    code: str, make_config: Callable, open_run: Callable, clock: Clock
) -> None:
    began = clock.now
    config = make_config({"federation.join-deadline": 600.0})
    with pytest.raises(RunFailedError, match=rf"0 usable clients.*node 2, node 3, node 4 .*{code}") as caught:
        open_run(config, tamper=refusing(code, range(10)))
    assert "\n" not in str(caught.value)
    assert clock.now - began < 1


def test_the_wait_ends_with_what_a_node_of_this_process_says(
    make_config: Callable, tmp_path: Path, clock: Clock
) -> None:
    began = clock.now
    absent = {"data.source": str(tmp_path / "absent.jsonl"), "federation.join-deadline": 600.0}
    config = make_config(absent)
    with pytest.raises(RunFailedError, match=r"node 2: .*absent\.jsonl: no such file"):
        init(config)
    assert clock.now - began < 1


def test_clients_without_rows_end_the_wait_with_what_to_look_at(
    make_config: Callable, open_run: Callable
) -> None:
    with pytest.raises(RunFailedError, match=r"0 usable clients.*client anna.*train\.max-length"):
        open_run(make_config({"train.max-length": 8}))


@pytest.mark.parametrize(("refused", "waits"), [((2, 3, 4, 5), False), ((2, 3), True)])
def test_elsewhere_a_wait_ends_when_as_many_as_expected_refused(
    refused: tuple[int, ...],
    waits: bool,
    make_config: Callable,
    open_run: Callable,
    clock: Clock,
) -> None:
    run = open_run(make_config())
    for node in {2, 3, 4, 5} - set(refused):
        del run.grid.contexts[node]
    run.grid.set_run(replace(run.grid.run, primary_task_type=""))  # a SuperLink: more nodes may connect
    run.grid.tamper = refusing("bad-data", refused)
    said: list[float] = []
    began = clock.now
    config = make_config({"federation.join-deadline": 600.0})
    with pytest.raises(RunFailedError, match="bad-data"):
        join_clients(
            Transport(run.grid),
            resolve(config),
            run.session.layout,
            lambda line: said.append(clock.now),
        )
    assert said[0] - began < 1
    assert clock.now - began == pytest.approx(600 if waits else 0, abs=1)


def test_a_node_that_refused_and_was_restarted_counts_once(make_config: Callable, open_run: Callable) -> None:
    """Its new id and its old one do not stand for two nodes: another may still connect."""
    run = open_run(make_config())
    for node in (3, 4, 5):
        del run.grid.contexts[node]
    run.grid.set_run(replace(run.grid.run, primary_task_type=""))
    transport = Transport(run.grid, asked={2: math.inf}, refused={9: "bad-model", 2: "bad-model"})
    assert not transport.have_all_answered(2, 0)
    assert transport.have_all_answered(1, 0)


def test_those_that_joined_go_on_when_all_others_have_refused(
    make_config: Callable, open_run: Callable, clock: Clock
) -> None:
    began = clock.now
    config = make_config({"federation.join-deadline": 600.0})
    run = open_run(config, tamper=refusing("bad-data", [NODE]))
    assert list(run.session.clients) == ["anna", "cleo", "dora"]
    assert clock.now - began < 1


def test_an_unforeseen_error_is_asked_about_once_more(
    make_config: Callable, open_run: Callable, clock: Clock
) -> None:
    asked: list[int] = []

    def count(content: RecordDict) -> RecordDict:
        asked.append(1)
        return write_error("internal")

    run = open_run(make_config(), tamper=tampering("query.join", count))
    for _ in range(3):
        clock.sleep(joining.AGAIN_SECONDS)
        rejoin(run.session)
    assert len(asked) == 2
    assert sum("internal" in line for line in run.notices) == 1


@pytest.mark.parametrize("number", [2**53, 10**3800], ids=["just too many", "3,800 digits"])
def test_a_declared_number_beyond_all_bounds_is_refused(
    number: int, make_config: Callable, open_run: Callable
) -> None:
    run = open_run(make_config(), tamper=tampering("query.join", declaring(num_train=[number])))
    assert "ben" not in run.session.clients
    assert max(map(len, run.notices)) < 300


def losing(**fields: Any) -> Callable[[RecordDict], RecordDict]:
    def change(content: RecordDict) -> RecordDict:
        for name, value in fields.items():
            content["metrics"][name] = value
        return content

    return change


def as_stranger(content: RecordDict) -> RecordDict:
    content["clients"]["ids"] = [SECRET]
    return content


def as_failed_stranger(content: RecordDict) -> RecordDict:
    return RecordDict({"clients": ConfigRecord({"ids": [SECRET], "codes": ["failed"]})})


def as_another(content: RecordDict) -> RecordDict:
    content["clients"]["ids"] = ["anna"]
    content["metrics"]["loss"] = [0.001]
    return content


@pytest.mark.parametrize(
    "change",
    [
        losing(loss=[float("nan")]),
        losing(loss=[-1.0]),
        losing(personal_loss=[float("nan")]),
        losing(personal_loss=[-1.0]),
        losing(num_tokens=[0.0]),
        losing(loss=[0.1, 0.2]),
        as_stranger,
        as_failed_stranger,
        as_another,
        with_note,
        lambda content: RecordDict({"metrics": MetricRecord({"loss": [0.1]})}),
        lambda content: RecordDict(),
        lambda content: Error(2, SECRET),
    ],
)
def test_an_unsound_evaluation_is_noticed_and_left_out(
    change: Callable[[RecordDict], Any], make_config: Callable, open_run: Callable
) -> None:
    honest = open_run(make_config())
    run = open_run(make_config(), tamper=tampering("evaluate", change))
    expected = dict(evaluate(honest.session, honest.state).shared)
    losses = evaluate(run.session, run.state).shared
    assert expected.pop(OFFENDER) > 0
    assert losses == expected
    assert run.notices
    assert not any("xyzzy" in line or "\n" in line for line in run.notices)


def test_every_phase_is_heard_with_its_numbers(make_config: Callable) -> None:
    heard: list[tuple[str, int, int]] = []
    config = make_config({"federation.num-rounds": 1})
    watch = Watch(phase=lambda *phase: heard.append(phase))
    session = open_session(resolve(config), local_grid(config, app, num_nodes=4), watch)
    next_round(session, first_state(session))
    assert [name for name, done, _ in heard if done == 0] == [
        "joining",
        "evaluating",
        "training",
        "evaluating",
    ]
    for name in ("joining", "evaluating"):
        assert [(done, number) for each, done, number in heard if each == name][-1] == (4, 4)
