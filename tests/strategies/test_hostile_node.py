"""One node that calls itself many clients of many rows, beside three honest ones, over a real federation."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from flwr.app import Message, MetricRecord

from fedllm.plan.run_plan import resolve
from fedllm.wire.joining import write_joined
from strategies.exchange.joining import join_clients, rejoin
from strategies.grid.transport import Transport
from strategies.rounds import next_round

NODE = 3  # whose honest client is ben
HONEST = {"anna", "cleo", "dora"}


def declaring(number: int, rows: int = 10**15) -> Callable[[Message], list[Message]]:
    """Return a change of the hostile node's answer: clients of early names and many rows."""

    def tamper(reply: Message) -> list[Message]:
        if reply.metadata.src_node_id == NODE and reply.metadata.message_type == "query.join":
            metrics, names = reply.content["metrics"], [f"0-{place:04d}" for place in range(number)]
            fingerprint = reply.content["clients"]["fingerprints"][0]
            reply.content["clients"].update(
                ids=names, fingerprints=number * [fingerprint], causes=number * [""]
            )
            assert isinstance(metrics, MetricRecord)
            metrics.update(num_train=number * [rows], num_held_out=number * [0], max_rank=number * [0])
        return [reply]

    return tamper


def outside(run: Any) -> Any:
    """Let the run's grid be one of separate machines, where a node is a site."""
    run.grid.set_run(replace(run.grid.run, primary_task_type=""))
    return run.session


def test_five_thousand_clients_of_one_node_end_nothing(make_config: Callable, open_run: Callable) -> None:
    run = open_run(make_config(), tamper=declaring(5000))
    assert set(run.session.clients) == HONEST
    assert any(
        "node 3 did not join: it declares 5,000 clients, federation.num-clients is 4" in line
        for line in run.notices
    )
    _, record = next_round(outside(run), run.state)
    assert set(record.accepted) == HONEST


@pytest.mark.parametrize("absent", [(), (2, 4)])
def test_honest_clients_have_their_places(
    absent: tuple[int, ...], make_config: Callable, open_run: Callable
) -> None:
    """Whether they come first or last: the second client of a node gives way to the first of another."""
    full = open_run(make_config())
    run = open_run(make_config(), absent=absent, tamper=declaring(4))
    for node in absent:
        run.grid.contexts[node] = full.grid.contexts[node]
    rejoin(run.session)
    assert set(run.session.clients) == {*HONEST, "0-0000"}
    assert any("no place; sites have federation.num-clients = 4 in turn" in line for line in run.notices)
    assert sum(map(len, run.notices)) < 1500
    _, record = next_round(outside(run), run.state)
    assert set(record.accepted) == HONEST
    assert set(record.lost) == {"0-0000"}


def test_a_large_federation_of_few_is_not_one_node(make_config: Callable, open_run: Callable) -> None:
    """Three honest nodes and one that fills up the other 97 places: it has three, and half of a cohort."""
    run = open_run(make_config())
    session, plan = outside(run), resolve(make_config({"federation.num-clients": 100}))
    run.grid.tamper = declaring(97)
    joined = join_clients(Transport(run.grid), plan, session.layout, run.notices.append)
    assert set(joined) == {*HONEST, "0-0000", "0-0001", "0-0002"}


@pytest.mark.parametrize(("rule", "most"), [("none", 10.0), ("geometric-median", 1.0)])
def test_a_lie_about_rows_weighs_a_multiple_of_the_median(
    rule: str, most: float, make_config: Callable, open_run: Callable
) -> None:
    def lie(reply: Message) -> list[Message]:
        if reply.metadata.src_node_id == NODE and "metrics" in reply.content:
            if reply.metadata.message_type == "query.join":
                reply.content["metrics"]["num_train"] = [10**15]
            elif reply.metadata.message_type == "train":
                reply.content["metrics"]["weight"] = [1e15]
        return [reply]

    overrides = {"aggregation.robust": rule, "data.held-out-fraction": 0.0}
    run = open_run(make_config(overrides), tamper=lie)
    _, record = next_round(outside(run), run.state)
    assert record.lost == {}
    weights = dict(record.weights)
    if rule == "none":
        assert weights == {"anna": 5.0, "ben": 90.0, "cleo": 9.0, "dora": 11.0}
    else:  # nobody weighs more than the median site
        assert weights == {"anna": 5.0, "ben": 9.0, "cleo": 9.0, "dora": 9.0}


def test_a_simulation_weighs_rows_as_they_are(make_config: Callable, open_run: Callable) -> None:
    """There a node is a worker of one machine, and its clients are nobody's but the run's."""
    run = open_run(make_config({"data.held-out-fraction": 0.0}), num_nodes=1)
    _, record = next_round(run.session, run.state)
    assert dict(record.weights) == {"anna": 5.0, "ben": 7.0, "cleo": 9.0, "dora": 11.0}


def test_an_answer_of_nobody_is_no_client(make_config: Callable, open_run: Callable) -> None:
    def nobody(reply: Message) -> list[Message]:
        if reply.metadata.src_node_id == NODE and reply.metadata.message_type == "query.join":
            reply.content = write_joined([])
        return [reply]

    assert set(open_run(make_config(), tamper=nobody).session.clients) == HONEST
