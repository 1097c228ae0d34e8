"""Overlap queries and their replies come back as they were, or are refused by field."""

from collections.abc import Callable

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto

from fedllm.errors import DataError, WireError
from fedllm.originality.overlap import Overlap, OverlapRequest, Probe, probe
from fedllm.wire import overlaps, packets, refusals

SALT = bytes(range(16))
TEXTS = [tuple(range(60)), tuple(range(100, 110)), (1, 2, 3)]
PROBES = tuple(probe(text, SALT) for text in TEXTS)
ANSWERS = (Overlap(48, 7, True), Overlap(3, 0, False), Overlap(0, 0, False))


def query() -> RecordDict:
    return overlaps.write_overlap_request(OverlapRequest(3, SALT, PROBES))


def test_a_query_comes_back_as_it_was() -> None:
    got = overlaps.read_overlap_request(recorddict_from_proto(recorddict_to_proto(query())))
    assert (got.round_num, got.salt, len(got.probes)) == (3, SALT, 3)
    for mine, theirs in zip(PROBES, got.probes, strict=True):
        assert np.array_equal(mine.shingles, theirs.shingles)
        assert np.array_equal(mine.runs, theirs.runs)
    assert packets.packet_bytes(query()) == 8 * (48 + 11 + 3)


def test_a_query_holds_hashes_and_no_token() -> None:
    data = recorddict_to_proto(query()).SerializeToString()
    for text in TEXTS[:2]:
        for dtype in ("<u4", "<i8", "<u2"):
            assert np.array(text[:8], dtype).tobytes() not in data


def _without_hashes(content: RecordDict) -> None:
    del content["hashes"]


def _two_arrays(content: RecordDict) -> None:
    content["hashes"]["more"] = content["hashes"]["hashes"]


def _short(content: RecordDict) -> None:
    content["hashes"] = ArrayRecord({"hashes": packets.to_array(bytes(8))})


def _odd(content: RecordDict) -> None:
    content["request"]["num-hashes"] = [62]


def _negative(content: RecordDict) -> None:
    content["request"]["num-hashes"] = [-1, 63]


def _no_request(content: RecordDict) -> None:
    del content["request"]


def _no_salt(content: RecordDict) -> None:
    content["request"]["salt"] = "0" * 16


def _no_round(content: RecordDict) -> None:
    content["request"]["round"] = 1.0


@pytest.mark.parametrize(
    "damage", [_without_hashes, _two_arrays, _short, _odd, _negative, _no_request, _no_salt, _no_round]
)
def test_a_malformed_query_is_refused(damage: Callable[[RecordDict], None]) -> None:
    content = query()
    damage(content)
    with pytest.raises(WireError):
        overlaps.read_overlap_request(content)


def test_a_query_beyond_its_bounds_is_refused_when_read() -> None:
    content = query()
    content["request"]["salt"] = b"short"
    with pytest.raises(DataError, match="16 bytes"):
        overlaps.read_overlap_request(content)


def reply() -> RecordDict:
    return overlaps.write_overlaps(ANSWERS)


def test_a_reply_comes_back_as_it_was_and_has_two_numbers_a_text() -> None:
    content = recorddict_from_proto(recorddict_to_proto(reply()))
    assert overlaps.read_overlaps(content, PROBES) == ANSWERS
    assert list(content) == ["metrics"]
    assert dict(content["metrics"]) == {"matched": [7, 0, 0], "verbatim": [1, 0, 0]}


@pytest.mark.parametrize(
    "metrics",
    [
        {"matched": [7, 0, 0]},
        {"matched": [7, 0, 0], "verbatim": [1, 0, 0], "more": [0, 0, 0]},
        {"matched": [7, 0], "verbatim": [1, 0, 0]},
        {"matched": [7, 0, 0], "verbatim": [2, 0, 0]},
        {"matched": [7, 0, 1], "verbatim": [1, 0, 0]},  # more than the text has
        {"matched": [-1, 0, 0], "verbatim": [1, 0, 0]},
        {"matched": [7.0, 0.0, 0.0], "verbatim": [1, 0, 0]},
    ],
)
def test_a_malformed_reply_is_refused(metrics: dict) -> None:
    with pytest.raises(WireError):
        overlaps.read_overlaps(RecordDict({"metrics": MetricRecord(metrics)}), PROBES)


def test_a_reply_with_text_or_an_error_is_refused() -> None:
    content = reply()
    content["note"] = ConfigRecord({"text": "private"})
    with pytest.raises(WireError, match="not on the list"):
        overlaps.read_overlaps(content, PROBES)
    with pytest.raises(WireError, match="client reports query-limit"):
        overlaps.read_overlaps(refusals.write_error("query-limit"), PROBES)


def test_a_probe_may_have_nothing_to_ask() -> None:
    nothing = np.empty(0, np.uint64)
    content = overlaps.write_overlap_request(OverlapRequest(1, SALT, (Probe(nothing, nothing),)))
    assert len(overlaps.read_overlap_request(content).probes[0].shingles) == 0
