"""What a node tells of its private text: counts over all of its clients, once a round, in few bytes."""

from collections.abc import Callable

import pytest
from flwr.app import Message, MetricRecord
from flwr.common.serde import message_to_proto

from clients import originality
from clients.answering import make_client_app
from clients.data_holder import DataHolder
from clients.originality import check_limit
from clients.process import Process
from fedllm.errors import QueryLimitError
from fedllm.originality.overlap import OverlapRequest, probe
from fedllm.wire import overlaps, refusals
from scripts.runtimes.local import LocalGrid, local_grid, node_config_of

SALT = bytes(range(16))
CANARY = "kq7Zr0vXw3-ünïcode"
FRESH = tuple(range(5, 120))


@pytest.fixture
def node(write_rows: Callable, make_config: Callable) -> tuple[LocalGrid, DataHolder]:
    """A grid of one node with two clients, and what the node holds."""
    config = make_config(write_rows("rows.jsonl", {"anna": 6, "ben": 5}, secret=CANARY))
    process = Process()
    grid = local_grid(config, make_client_app(process))
    return grid, process.open(config.to_flat(), node_config_of(config))


def ask(grid: LocalGrid, texts: list[tuple[int, ...]], round_num: int = 1) -> Message:
    request = OverlapRequest(round_num, SALT, tuple(probe(text, SALT) for text in texts))
    content = overlaps.write_overlap_request(request)
    (node_id,) = grid.get_node_ids()
    (reply,) = grid.send_and_receive([grid.create_message(content, "query.overlap", node_id, group_id="1")])
    return reply


def test_a_copy_of_any_client_is_found_and_fresh_text_is_not(node: tuple[LocalGrid, DataHolder]) -> None:
    grid, holder = node
    copies = [client.train[0].tokens for client in holder.clients.values()]
    copies += [client.held_out[0].tokens for client in holder.clients.values() if client.held_out]
    texts = [*copies, FRESH]
    probes = [probe(text, SALT) for text in texts]
    *found, fresh = overlaps.read_overlaps(ask(grid, texts).content, probes)
    assert all(one.num_matched == one.num_shingles > 0 and not one.is_original for one in found)
    assert (fresh.num_matched, fresh.is_original) == (0, True)


def test_the_reply_is_two_numbers_a_text_and_no_text(node: tuple[LocalGrid, DataHolder]) -> None:
    grid, holder = node
    texts = [row.tokens for client in holder.clients.values() for row in client.train]
    reply = ask(grid, texts)
    assert set(reply.content) == {"metrics"}
    assert isinstance(reply.content["metrics"], MetricRecord)
    data = message_to_proto(reply).SerializeToString()
    for private in (CANARY, "anna", "ben", "Return", "rows.jsonl"):
        assert private.encode() not in data
    assert len(data) < 20 * len(texts) + 500


def test_a_node_answers_once_a_round(node: tuple[LocalGrid, DataHolder]) -> None:
    grid, holder = node

    def code(round_num: int) -> str | None:
        return refusals.read_error(ask(grid, [FRESH], round_num).content)

    last = holder.plan.config.federation.num_rounds
    assert [code(number) for number in (2, 2, 1, 3, last + 1)] == [
        None,
        "query-limit",
        "query-limit",
        None,
        "query-limit",
    ]


def test_the_limit_is_counted_before_the_answer_is_made(
    node: tuple[LocalGrid, DataHolder], monkeypatch: pytest.MonkeyPatch
) -> None:
    grid, _ = node
    with monkeypatch.context() as patch:
        patch.setattr(originality, "overlaps", lambda *_: (_ for _ in ()).throw(ValueError(CANARY)))
        assert refusals.read_error(ask(grid, [FRESH]).content) == "internal"
    assert refusals.read_error(ask(grid, [FRESH]).content) == "query-limit"


@pytest.mark.parametrize(
    ("asked", "last", "allowed"), [(1, 0, True), (1, 1, False), (5, 2, True), (6, 0, False)]
)
def test_only_a_later_round_of_the_run_may_ask(asked: int, last: int, allowed: bool) -> None:
    request = OverlapRequest(asked, SALT, (probe(FRESH, SALT),))
    if allowed:
        check_limit(request, last, 5)
    else:
        with pytest.raises(QueryLimitError, match="one may be asked in each round"):
            check_limit(request, last, 5)
