"""Overlap queries and their answers as Flower records: hashes to the nodes, counts back."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from fedllm.errors import WireError
from fedllm.originality.overlap import Overlap, OverlapRequest, Probe
from fedllm.wire.packets import list_field, packet_of, scalar_field, to_array
from fedllm.wire.replies import check_records

_NUMBERS = ("matched", "verbatim")


def write_overlap_request(request: OverlapRequest) -> RecordDict:
    """Return the message content of an overlap query: hashes of the server's own texts, 8 bytes each."""
    # One array for all texts: an array each would cost more in names than in hashes.
    columns = [hashes for probe in request.probes for hashes in (probe.shingles, probe.runs)]
    data = np.concatenate(columns).astype("<u8").tobytes()
    config: dict[str, Any] = {
        "round": request.round_num,
        "salt": request.salt,
        "num-hashes": [len(hashes) for hashes in columns],  # shingles and runs of each text in turn
    }
    return RecordDict({"request": ConfigRecord(config), "hashes": ArrayRecord({"hashes": to_array(data)})})


def read_overlap_request(content: RecordDict) -> OverlapRequest:
    """Return the overlap query in `content`.

    Raises:
        WireError: a field is missing or of the wrong kind, or the hashes do not match their numbers.
        DataError: it asks about more than a query may.
    """
    config = content.config_records.get("request", ConfigRecord())
    numbers, record = list_field(config, "num-hashes", int), content.array_records.get("hashes")
    if record is None or list(record) != ["hashes"] or len(numbers) % 2 or min(numbers) < 0:
        raise WireError("an overlap query carries the hashes of every text, and how many there are")
    data = packet_of(record["hashes"])
    if len(data) != 8 * sum(numbers):
        raise WireError("the hashes of an overlap query are not as many as it says")
    # The last sum is the end of the array, not a place to split at.
    hashes = np.split(np.frombuffer(data, "<u8").astype(np.uint64), np.cumsum(numbers)[:-1])
    return OverlapRequest(
        round_num=scalar_field(config, "round", int),
        salt=scalar_field(config, "salt", bytes),
        probes=tuple(map(Probe, hashes[0::2], hashes[1::2])),
    )


def write_overlaps(overlaps: Sequence[Overlap]) -> RecordDict:
    """Return the reply to an overlap query: two whole numbers per text, for the node as a whole."""
    columns = ([one.num_matched for one in overlaps], [int(one.verbatim) for one in overlaps])
    return RecordDict({"metrics": MetricRecord(dict(zip(_NUMBERS, columns, strict=True)))})


def read_overlaps(content: RecordDict, probes: Sequence[Probe]) -> tuple[Overlap, ...]:
    """Return a node's answer for each text it was asked about.

    Raises:
        WireError: the reply is malformed, reports an error or counts more than was asked.
    """
    check_records(content, metrics=MetricRecord)
    record = content.metric_records.get("metrics", MetricRecord())
    if set(record) != set(_NUMBERS):
        raise WireError("an overlap reply has other numbers than the shingles and runs that matched")
    matched, verbatim = (list_field(record, name, int) for name in _NUMBERS)
    if not len(matched) == len(verbatim) == len(probes) or not {*verbatim} <= {0, 1}:
        raise WireError("an overlap reply does not answer for every text once")
    if any(not 0 <= count <= len(one.shingles) for count, one in zip(matched, probes, strict=True)):
        raise WireError("an overlap reply counts more shingles than a text has")
    return tuple(
        Overlap(len(one.shingles), count, bool(found))
        for one, count, found in zip(probes, matched, verbatim, strict=True)
    )
