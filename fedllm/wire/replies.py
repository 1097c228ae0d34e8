"""What a node answers: values to Flower records and back.

A reply has three records and no free text: `updates` (client id -> one packet), `metrics` (parallel lists of
named numbers), `clients` (ids and codes). A node that was asked for the sum of its clients has `sum`, one
packet, in place of `updates`; where clients have control variates, `controls` has a packet for each. Reading
is strict: a reply of any other form raises `WireError`, a single bad client in a good reply becomes a
`ClientFailure` of that client alone.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from fedllm.adapters.layout import AdapterLayout, at_rank
from fedllm.adapters.parts import part_of, part_size, whole_of
from fedllm.data.partition import CLIENT_ID
from fedllm.errors import CLIENT_ERROR_CODES, WireError
from fedllm.messages import (
    EVALUATION_METRICS,
    UPDATE_METRICS,
    ClientEvaluation,
    ClientFailure,
    ClientUpdate,
    JoinedClient,
)
from fedllm.wire import packets
from fedllm.wire.packets import list_field, packet_of, to_array

_OK = "ok"
_FINGERPRINT = re.compile(r"[0-9a-f]{64}")
_JOIN_NUMBERS = ("num_train", "num_held_out", "max_rank")
_RESULT_RECORDS: dict[str, type] = {"clients": ConfigRecord, "metrics": MetricRecord}


def write_updates(
    results: Sequence[ClientUpdate | ClientFailure], *, layout: AdapterLayout, part: str, payload: str
) -> RecordDict:
    """Return the reply to a train request: one packet per client that has an update.

    Of every delta one part travels, at the client's own rank; `layout` is the run's.
    """
    updates = [result for result in results if isinstance(result, ClientUpdate)]
    packets = {
        update.client_id: _write_delta(
            update.delta, at_rank(layout, update.rank), part, update.round_num, payload
        )
        for update in updates
    }
    arrays = {"updates": ArrayRecord(packets)} if packets else {}
    changes = {
        update.client_id: _packet(update.control_delta, layout, "control", update.round_num, payload)
        for update in updates
        if update.control_delta is not None
    }
    if changes:
        arrays["controls"] = ArrayRecord(changes)
    return _write_results(results, updates, UPDATE_METRICS, arrays)


def write_sum(
    results: Sequence[ClientUpdate | ClientFailure],
    mean_P: torch.Tensor,
    *,
    layout: AdapterLayout,
    part: str,
    payload: str,
) -> RecordDict:
    """Return the reply of a node that was asked for the sum of its clients: one packet of one part.

    The packet holds the weighted mean of their deltas, which with the weights is their sum; the reply is
    otherwise that of `write_updates`. `mean_P` is not read where no client has an update.
    """
    updates = [result for result in results if isinstance(result, ClientUpdate)]
    if not updates:
        return _write_results(results, updates, UPDATE_METRICS, {})
    array = _write_delta(mean_P, layout, part, updates[0].round_num, payload)
    return _write_results(results, updates, UPDATE_METRICS, {"sum": ArrayRecord({"sum": array})})


def _write_delta(
    delta_P: torch.Tensor, layout: AdapterLayout, part: str, round_num: int, payload: str
) -> Array:
    return _packet(part_of(layout, delta_P, part), layout, part, round_num, payload)


def _packet(vector: torch.Tensor, layout: AdapterLayout, part: str, round_num: int, payload: str) -> Array:
    return to_array(
        packets.encode(vector, layout_digest=layout.digest, part=part, round_num=round_num, payload=payload)
    )


def write_evaluations(results: Sequence[ClientEvaluation | ClientFailure]) -> RecordDict:
    """Return the reply to an evaluate request; without a personal adapter both its losses are the same."""
    done = [
        replace(result, personal_loss=result.loss if result.personal_loss is None else result.personal_loss)
        for result in results
        if isinstance(result, ClientEvaluation)
    ]
    return _write_results(results, done, EVALUATION_METRICS, {})


def write_error(code: str) -> RecordDict:
    """Return a reply that says only why there is none: a code of `CLIENT_ERROR_CODES`."""
    return RecordDict({"error": ConfigRecord({"code": code if code in CLIENT_ERROR_CODES else "internal"})})


def _write_results(
    results: Iterable[ClientUpdate | ClientEvaluation | ClientFailure],
    done: Sequence[ClientUpdate | ClientEvaluation],
    metrics: Sequence[str],
    arrays: Mapping[str, ArrayRecord],
) -> RecordDict:
    codes = {r.client_id: r.code if isinstance(r, ClientFailure) else _OK for r in results}
    content = RecordDict(
        {"clients": ConfigRecord({"ids": list(codes), "codes": list(codes.values())})} if codes else {}
    )
    if done:
        columns: dict[str, int | float | list[int] | list[float]] = {
            name: [float(getattr(result, name)) for result in done] for name in metrics
        }
        content["metrics"] = MetricRecord(columns)
    for name, record in arrays.items():
        content[name] = record
    return content


def write_joined(clients: Sequence[JoinedClient]) -> RecordDict:
    """Return the reply to the join query: the clients of this node and the sizes they declare."""
    if not clients:
        return write_error("no-data")
    return RecordDict(
        {
            "clients": ConfigRecord(
                {
                    "ids": [client.client_id for client in clients],
                    "fingerprints": [client.fingerprint for client in clients],
                }
            ),
            "metrics": MetricRecord(
                {name: [getattr(client, name) for client in clients] for name in _JOIN_NUMBERS}
            ),
        }
    )


def read_updates(
    content: RecordDict,
    *,
    layout: AdapterLayout,
    ranks: Mapping[str, int],
    part: str,
    round_num: int,
    with_controls: bool = False,
) -> list[ClientUpdate | ClientFailure]:
    """Return what a reply to a train request says of each of its clients.

    `ranks` has the clients that were asked, each with the rank it was asked to train at; `part` is what of
    its delta every client was to return. `with_controls` wants the change of a control variate from every
    client, else none is allowed.

    Raises:
        WireError: the reply as a whole is malformed. A client whose own packet is bad is a failure instead.
    """
    names = ("updates", "controls") if with_controls else ("updates",)
    allowed = {**_RESULT_RECORDS, **dict.fromkeys(names, ArrayRecord)}
    codes, metrics = _read_results(content, allowed, UPDATE_METRICS)
    packets = {name: content.array_records.get(name, ArrayRecord()) for name in names}
    done = {client for client, code in codes.items() if code == _OK}
    if any(set(record) != done for record in packets.values()):
        raise WireError("the packets do not match the clients that report an update")
    results: list[ClientUpdate | ClientFailure] = []
    for client_id, code in codes.items():
        if code != _OK:
            results.append(_reported(client_id, code))
            continue
        try:
            client_layout = at_rank(layout, ranks.get(client_id, layout.rank))
            delta = _read_delta(packets["updates"][client_id], client_layout, part, round_num)
            control = None
            if with_controls:
                control = _vector(packets["controls"][client_id], layout, "control", layout.size, round_num)
        except WireError as error:
            results.append(ClientFailure(client_id=client_id, code=error.code, reason=str(error)))
            continue
        update = _update(client_id, metrics[client_id], client_layout.rank, round_num, delta)
        results.append(replace(update, control_delta=control))
    return results


def read_sum(
    content: RecordDict, *, layout: AdapterLayout, part: str, round_num: int
) -> list[ClientUpdate | ClientFailure]:
    """Return what the reply of a node that was asked for its sum says: one update with members, and failures.

    Raises:
        WireError: the reply as a whole is malformed. If only the packet is bad, all its clients fail.
    """
    codes, metrics = _read_results(content, {**_RESULT_RECORDS, "sum": ArrayRecord}, UPDATE_METRICS)
    failures = [_reported(client_id, code) for client_id, code in codes.items() if code != _OK]
    record = content.array_records.get("sum", ArrayRecord())
    if list(record) != (["sum"] if metrics else []):
        raise WireError("the sum does not match the clients that report an update")
    if not metrics:
        return [*failures]
    try:
        delta = _read_delta(record["sum"], layout, part, round_num)
    except WireError as error:
        lost = [ClientFailure(client_id=name, code=error.code, reason=str(error)) for name in metrics]
        return [*lost, *failures]
    members = tuple(
        _update(client_id, numbers, layout.rank, round_num, delta[:0])
        for client_id, numbers in metrics.items()
    )
    total = ClientUpdate(
        client_id=members[0].client_id,
        round_num=round_num,
        rank=layout.rank,
        delta=delta,
        weight=sum(member.weight for member in members),
        num_tokens=sum(member.num_tokens for member in members),
        train_loss=0.0,
        members=members,
    )
    return [total, *failures]


def _read_delta(array: Array, layout: AdapterLayout, part: str, round_num: int) -> torch.Tensor:
    """Return the whole delta [P] of `layout` in a packet of one of its parts."""
    vector = _vector(array, layout, part, part_size(layout, part), round_num)
    return whole_of(layout, vector, part)


def _vector(array: Array, layout: AdapterLayout, part: str, size: int, round_num: int) -> torch.Tensor:
    packet = packets.decode(
        packet_of(array), layout_digest=layout.digest, part=part, size=size, round_num=round_num
    )
    return packet.vector


def _reported(client_id: str, code: str) -> ClientFailure:
    return ClientFailure(client_id=client_id, code=code, reason=f"client reports {code}")


def _update(
    client_id: str, numbers: Mapping[str, float], rank: int, round_num: int, delta: torch.Tensor
) -> ClientUpdate:
    return ClientUpdate(
        client_id=client_id,
        round_num=round_num,
        rank=rank,
        delta=delta,
        weight=numbers["weight"],
        num_tokens=_count(numbers["num_tokens"]),
        train_loss=numbers["train_loss"],
        num_truncated=_count(numbers["num_truncated"]),
        seconds=numbers["seconds"],
    )


def read_evaluations(content: RecordDict) -> list[ClientEvaluation | ClientFailure]:
    """Return what a reply to an evaluate request says of each client; raises as `read_updates`."""
    codes, metrics = _read_results(content, _RESULT_RECORDS, EVALUATION_METRICS)
    results: list[ClientEvaluation | ClientFailure] = []
    for client_id, code in codes.items():
        if code != _OK:
            results.append(_reported(client_id, code))
            continue
        numbers = metrics[client_id]
        results.append(
            ClientEvaluation(
                client_id=client_id,
                loss=numbers["loss"],
                personal_loss=numbers["personal_loss"],
                num_tokens=_count(numbers["num_tokens"]),
                num_rows=_count(numbers["num_rows"]),
            )
        )
    return results


def read_joined(content: RecordDict, node_id: int) -> list[JoinedClient]:
    """Return the clients a node declares; a node without data declares none.

    Raises:
        WireError: the reply is malformed or reports an error other than "no data".
    """
    if read_error(content) == "no-data":
        return []
    refuse_error(content)
    check_records(content, _RESULT_RECORDS)
    record = content.config_records.get("clients", ConfigRecord())
    sizes = content.metric_records.get("metrics", MetricRecord())
    if set(record) != {"ids", "fingerprints"} or set(sizes) != set(_JOIN_NUMBERS):
        raise WireError("a join reply has other fields than ids, fingerprints and sizes")
    ids, fingerprints = list_field(record, "ids", str), list_field(record, "fingerprints", str)
    columns = [list_field(sizes, name, int) for name in _JOIN_NUMBERS]
    lengths = {len(ids), len(set(ids)), len(fingerprints), *(len(column) for column in columns)}
    if len(lengths) > 1:
        raise WireError("the lists of a join reply differ in length or name a client twice")
    if any(number < 0 for column in columns for number in column):
        raise WireError("a join reply declares a negative number")
    if not all(CLIENT_ID.fullmatch(client_id) for client_id in ids):  # they are printed and written to files
        raise WireError("a join reply names a client by other than 1 to 64 letters, digits, '.', '_' and '-'")
    if not all(_FINGERPRINT.fullmatch(fingerprint) for fingerprint in fingerprints):
        raise WireError("a join reply has a fingerprint that is not 64 hexadecimal digits")
    return [
        JoinedClient(
            client_id=client_id,
            node_id=node_id,
            fingerprint=fingerprint,
            **dict(zip(_JOIN_NUMBERS, numbers, strict=True)),
        )
        for client_id, fingerprint, *numbers in zip(ids, fingerprints, *columns, strict=True)
    ]


def read_error(content: RecordDict) -> str | None:
    """Return the code of an error reply, "internal" for a code outside the list, None for other replies."""
    if "error" not in content.config_records:
        return None
    code = content.config_records["error"].get("code")
    return code if isinstance(code, str) and code in CLIENT_ERROR_CODES else "internal"


def refuse_error(content: RecordDict) -> None:
    """Return where a reply reports no error; raises WireError with its code."""
    code = read_error(content)
    if code is not None:
        raise WireError(f"client reports {code}")


def _count(value: float) -> int:
    """Return a reported count; anything that is not a plausible count is 0."""
    return int(value) if 0 <= value < 2**53 else 0


def check_records(content: RecordDict, allowed: Mapping[str, type]) -> None:
    """Return where a reply has no records but those allowed; raises WireError else."""
    if any(type(record) is not allowed.get(name) for name, record in content.items()):
        raise WireError("the reply carries records that are not on the list")


def _read_results(
    content: RecordDict, allowed: Mapping[str, type], metric_names: Sequence[str]
) -> tuple[dict[str, str], dict[str, dict[str, float]]]:
    """Return (client -> code, client -> metrics) of a reply, checked against the allow-list."""
    refuse_error(content)
    check_records(content, allowed)
    record = content.config_records.get("clients", ConfigRecord())
    ids, codes = list_field(record, "ids", str), list_field(record, "codes", str)
    if set(record) != {"ids", "codes"} or len(ids) != len(codes) or len(set(ids)) != len(ids):
        raise WireError("the reply's client list is malformed")
    if not set(codes) <= CLIENT_ERROR_CODES | {_OK}:
        raise WireError("the reply carries a code that is not on the list")
    done = [client for client, code in zip(ids, codes, strict=True) if code == _OK]
    columns = content.metric_records.get("metrics", MetricRecord())
    if set(columns) != (set(metric_names) if done else set()):
        raise WireError("the reply's metrics are not exactly those on the list")
    values = {name: list_field(columns, name, float) for name in columns}
    if any(len(column) != len(done) for column in values.values()):
        raise WireError("the reply's metrics do not match its clients")
    metrics = {
        client: {name: column[index] for name, column in values.items()} for index, client in enumerate(done)
    }
    return dict(zip(ids, codes, strict=True)), metrics
