"""A node answers for its clients with one weighted mean: the same round, in bytes that do not grow."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict

from clients import protect as protecting
from fedllm.adapters.layout import AdapterLayout
from fedllm.adapters.parts import part_size
from fedllm.errors import NonFiniteError
from fedllm.messages import ClientUpdate
from fedllm.runs.records import record_to_line
from fedllm.wire import packets
from strategies.rounds import next_round

NAMES = ("anna", "ben", "cleo", "dora")
SECRET = "xyzzy-private row of text"
OFFENDER = 2  # the node of anna and cleo, one of two
LINEAR = {"aggregation.read-out": "factor-mean", "wire.codec": "fp32", "federation.num-rounds": 9}
SUMMED = {**LINEAR, "wire.node-sum": True}

Tampering = Callable[[RecordDict, AdapterLayout], Any]


@pytest.mark.parametrize("train", ["both", "b", "alternate"])
@pytest.mark.parametrize("weighting", ["examples", "tokens", "uniform"])
@pytest.mark.parametrize("num_nodes", [1, 2])
def test_the_sum_gives_what_every_clients_own_delta_gives(
    train: str, weighting: str, num_nodes: int, make_config: Callable, open_run: Callable
) -> None:
    vectors, records = [], []
    for changes in (LINEAR, SUMMED):
        config = make_config({**changes, "aggregation.train": train, "aggregation.weighting": weighting})
        run = open_run(config, num_nodes=num_nodes)
        state = replace(run.state, round_num=1)  # next is round 2, in which `alternate` trains A
        state.adapter.vector.add_(0.01)  # where B is zero, A has no gradient
        state, record = next_round(run.session, state)
        vectors.append(state.adapter.vector)
        records.append(record)
    torch.testing.assert_close(vectors[1], vectors[0], rtol=1e-6, atol=1e-8)  # float32 has 6e-8
    single, summed = records
    assert summed.accepted == single.accepted == NAMES
    assert summed.weights == single.weights
    assert summed.training.losses == single.training.losses
    assert summed.training.num_tokens == single.training.num_tokens
    # No product of a client is known; but where one factor is common to all, the mean needs none.
    assert (summed.aggregation.rho, summed.aggregation.kept_energy) == (
        (None, None) if train == "both" else (0.0, 1.0)
    )
    assert single.aggregation.rho is not None


def test_bytes_up_do_not_grow_with_the_clients_of_a_node(make_config: Callable, open_run: Callable) -> None:
    sizes = {}
    for num_nodes in (1, 2, 4):
        run = open_run(make_config({**SUMMED, "aggregation.train": "b"}), num_nodes=num_nodes)
        _, record = next_round(run.session, run.state)
        assert record.accepted == NAMES
        sizes[num_nodes] = record.bytes_up / num_nodes
    layout = run.session.layout
    one = packets.encode(
        torch.zeros(part_size(layout, "b")),
        layout_digest=layout.digest,
        part="b",
        round_num=1,
        payload="fp32",
    )
    assert set(sizes.values()) == {len(one)}


def test_a_client_that_diverges_is_left_out_of_its_nodes_sum(
    make_config: Callable, open_run: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = protecting.protect

    def protect(result: Any, *rest: Any, **options: Any) -> ClientUpdate:
        if result.client_id == "cleo":
            raise NonFiniteError("client cleo: the loss is not finite")
        return honest(result, *rest, **options)

    monkeypatch.setattr(protecting, "protect", protect)
    vectors = []
    for changes in (LINEAR, SUMMED):
        run = open_run(make_config(changes), num_nodes=2)
        state, record = next_round(run.session, run.state)
        assert record.accepted == ("anna", "ben", "dora")
        assert record.lost == {"cleo": "client reports non-finite"}
        vectors.append(state.adapter.vector)
    torch.testing.assert_close(vectors[1], vectors[0], rtol=1e-5, atol=1e-7)


def test_a_node_with_a_client_of_lower_rank_sends_every_delta(
    make_config: Callable, open_run: Callable
) -> None:
    run = open_run(make_config(SUMMED), num_nodes=2, node_configs={3: {"max-rank": 1}})
    kinds = []
    run.grid.tamper = lambda reply: kinds.append(set(reply.content)) or [reply]
    _, record = next_round(run.session, run.state)
    assert record.accepted == NAMES
    assert [kind - {"clients", "metrics"} for kind in kinds] == [{"sum"}, {"updates"}]


def test_an_over_selected_cohort_closes_with_enough_members(
    make_config: Callable, open_run: Callable
) -> None:
    config = make_config({**SUMMED, "federation.cohort": 2, "federation.over-selection": 2.0})
    run = open_run(config, num_nodes=2)
    _, record = next_round(run.session, run.state)
    assert record.asked == NAMES
    assert record.accepted == ("anna", "cleo")


# --- hostile sums ------------------------------------------------------------------------------------------


def encoded(vector: torch.Tensor, layout: AdapterLayout, **changes: Any) -> Any:
    values = {"layout_digest": layout.digest, "round_num": 1, "payload": "fp32", **changes}
    return packets.to_array(packets.encode(vector, **values))


def one_value(value: float) -> Tampering:
    def tamper(content: RecordDict, layout: AdapterLayout) -> None:
        vector = torch.zeros(layout.size)
        vector[7] = value
        content["sum"]["sum"] = encoded(vector, layout)

    return tamper


def packet(**changes: Any) -> Tampering:
    def tamper(content: RecordDict, layout: AdapterLayout) -> None:
        content["sum"]["sum"] = encoded(torch.zeros(layout.size), layout, **changes)

    return tamper


def metric(name: str, values: list[float]) -> Tampering:
    def tamper(content: RecordDict, layout: AdapterLayout) -> None:
        content["metrics"][name] = values

    return tamper


def names(*ids: str) -> Tampering:
    def tamper(content: RecordDict, layout: AdapterLayout) -> None:
        columns = {name: [values[0]] * len(ids) for name, values in content["metrics"].items()}
        content["clients"] = ConfigRecord({"ids": list(ids), "codes": ["ok"] * len(ids)})
        content["metrics"] = MetricRecord(columns)

    return tamper


def as_updates(content: RecordDict, layout: AdapterLayout) -> None:
    content["updates"] = ArrayRecord(dict.fromkeys(("anna", "cleo"), content["sum"]["sum"]))
    del content["sum"]


HOSTILE: dict[str, tuple[Tampering, str]] = {
    "NaN": (one_value(math.nan), "NaN"),
    "infinity": (one_value(-math.inf), "NaN or infinite"),
    "largest float": (one_value(3e38), "at most"),
    "a step too far": (one_value(1.0), "at most"),
    "an earlier round": (packet(round_num=0), "round 0"),
    "another layout": (packet(layout_digest="0" * 64), "another adapter layout"),
    "another part": (packet(part="b"), "part 'b', expected part 'both'"),
    "weight NaN": (metric("weight", [1.0, math.nan]), "client cleo: the weight nan"),
    "weight infinite": (metric("weight", [math.inf, 5.0]), "client anna: the weight inf"),
    "weight zero": (metric("weight", [0.0, 5.0]), "client anna: the weight 0"),
    "weight negative": (metric("weight", [-1.0, 5.0]), "client anna: the weight -1"),
    "weight above what one declared": (metric("weight", [500.0, 5.0]), "client anna: the weight 500"),
    "loss NaN": (metric("train_loss", [1.0, math.nan]), "client cleo: the training loss"),
    "one weight": (metric("weight", [5.0]), "do not match"),
    "a client of another node": (names("anna", "ben"), "not asked"),
    "a stranger": (names("anna", "cleo", SECRET), "not asked"),
    "every delta instead": (as_updates, "not on the list"),
    "no sum": (lambda content, layout: content.pop("sum"), "does not match"),
    "nothing": (lambda content, layout: content.clear(), "client list"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_sum_costs_the_clients_of_its_node_alone(
    kind: str, make_config: Callable, open_run: Callable
) -> None:
    change, reason = HOSTILE[kind]
    layouts: list[AdapterLayout] = []

    def tamper(reply: Message) -> list[Message]:
        if reply.metadata.src_node_id == OFFENDER and reply.metadata.message_type == "train":
            change(reply.content, layouts[0])
        return [reply]

    run, without = (
        open_run(make_config(SUMMED), (), tamper, 2),
        open_run(make_config(SUMMED), [OFFENDER], None, 2),
    )
    layouts.append(run.session.layout)
    state, record = next_round(run.session, run.state)
    expected, _ = next_round(without.session, without.state)
    assert record.accepted == ("ben", "dora")
    assert set(record.lost) == {"anna", "cleo"}
    assert state.adapter.digest == expected.adapter.digest
    assert len(set(record.lost.values())) == 1
    assert reason in record.lost["anna"] or kind == "nothing"
    for told in (*record.lost.values(), record_to_line(record), *run.notices):
        assert "xyzzy" not in told
        assert "\n" not in told


def test_a_node_that_fails_a_client_in_its_sum_names_it(make_config: Callable, open_run: Callable) -> None:
    """One of its clients reports a failure: the sum is of the other, and stands."""

    def tamper(reply: Message) -> list[Message]:
        if reply.metadata.src_node_id == OFFENDER and reply.metadata.message_type == "train":
            content = reply.content
            content["clients"]["codes"] = ["ok", "failed"]
            for column in content["metrics"].values():
                column.pop()
        return [reply]

    run = open_run(make_config(SUMMED), (), tamper, 2)
    _, record = next_round(run.session, run.state)
    assert record.accepted == ("anna", "ben", "dora")
    assert record.lost == {"cleo": "client reports failed"}
