"""What a node answers: values to Flower records and back.

A reply has at most these records, and no free text:

    clients   ids, and for each "ok" or a code of `CLIENT_ERROR_CODES`
    metrics   named numbers, one column per name, one row per client that is "ok"
    updates   client id -> packet of its delta
    controls  client id -> packet of the change of its control variate, where those are used
    sum       one packet in place of `updates`, from a node that was asked for the sum of its clients
    error     nothing but a code: there is no answer

Reading is strict: a reply of any other form raises `WireError`. A bad packet of one client in a good reply is
a `ClientFailure` of that client alone.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import starmap
from typing import Any, TypeAlias, TypeVar

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from fedllm.adapters.layout import AdapterLayout, at_rank
from fedllm.adapters.parts import part_of, part_size, whole_of
from fedllm.errors import CLIENT_ERROR_CODES, WireError
from fedllm.messages import (
    EVALUATION_METRICS,
    HOME_METRICS,
    UPDATE_METRICS,
    ClientAtHome,
    ClientEvaluation,
    ClientFailure,
    ClientUpdate,
)
from fedllm.wire.packets import LARGEST_NUMBER, list_field, read_vector, write_vector
from fedllm.wire.refusals import read_error

_OK = "ok"  # no error code is called so
# They travel as floats, as all metrics do.
_COUNTS = frozenset({"num_tokens", "num_truncated", "num_rows", "steps"})
_HELD_OUT = "held_out_"  # begins the names of evaluation metrics next to those of an update
_HELD_OUT_METRICS = tuple(_HELD_OUT + name for name in EVALUATION_METRICS)
_FEW = 8  # how many more clients than were asked a reply may name: enough to be told who strays

T = TypeVar("T")
Update: TypeAlias = ClientUpdate | ClientFailure
Evaluation: TypeAlias = ClientEvaluation | ClientFailure
Adapted: TypeAlias = ClientAtHome | ClientFailure
Columns: TypeAlias = Mapping[str, list[Any]]

# --- written by a client -----------------------------------------------------------------------------------


def write_updates(
    results: Sequence[Update],
    *,
    layout: AdapterLayout,
    part: str,
    payload: str,
    with_held_out: bool = False,
) -> RecordDict:
    """Return the reply to a train request: one packet for each client that has an update.

    One part of each delta travels, at the client's own rank; `layout` is the run's. `with_held_out` adds the
    held-out loss of each client, where the request has asked for it.
    """
    updates = [result for result in results if isinstance(result, ClientUpdate)]
    deltas = {
        update.client_id: _write_delta(
            update.delta, at_rank(layout, update.rank), part, update.round_num, payload
        )
        for update in updates
    }
    controls = {
        update.client_id: write_vector(update.control_delta, layout, "control", update.round_num, payload)
        for update in updates
        if update.control_delta is not None
    }
    content = _write_results(results, UPDATE_METRICS, updates=deltas, controls=controls)
    return _add_held_out(content, updates) if with_held_out else content


def write_sum(
    results: Sequence[Update],
    mean_P: torch.Tensor,
    *,
    layout: AdapterLayout,
    part: str,
    payload: str,
    with_held_out: bool = False,
) -> RecordDict:
    """Return the reply of a node that was asked for the sum of its clients: one packet of one part.

    The packet holds the weighted mean of their deltas, which with the weights is their sum. `mean_P` is not
    read where no client has an update. `with_held_out` is as in `write_updates`.
    """
    updates = [result for result in results if isinstance(result, ClientUpdate)]
    packets = {"sum": _write_delta(mean_P, layout, part, updates[0].round_num, payload)} if updates else {}
    content = _write_results(results, UPDATE_METRICS, sum=packets)
    return _add_held_out(content, updates) if with_held_out else content


def write_evaluations(results: Sequence[Evaluation]) -> RecordDict:
    """Return the reply to an evaluate request; without a personal adapter both its losses are the same."""
    filled = [_filled(result) if isinstance(result, ClientEvaluation) else result for result in results]
    return _write_results(filled, EVALUATION_METRICS)


def write_at_home(results: Sequence[Adapted]) -> RecordDict:
    """Return the reply of clients that were asked to train on at home."""
    return _write_results(results, HOME_METRICS)


def _filled(evaluation: ClientEvaluation) -> ClientEvaluation:
    if evaluation.personal_loss is not None:
        return evaluation
    return replace(evaluation, personal_loss=evaluation.loss)


def _add_held_out(content: RecordDict, updates: Sequence[ClientUpdate]) -> RecordDict:
    """Return an updates reply with the evaluation of each of its clients, of 0 rows where there is none."""
    losses = [_filled(one.held_out) if one.held_out else None for one in updates]
    if updates:
        for name in EVALUATION_METRICS:
            column = [float(getattr(loss, name)) if loss else 0.0 for loss in losses]
            content.metric_records["metrics"][_HELD_OUT + name] = column
    return content


def _write_delta(
    delta_P: torch.Tensor, layout: AdapterLayout, part: str, round_num: int, payload: str
) -> Array:
    return write_vector(part_of(layout, delta_P, part), layout, part, round_num, payload)


def _write_results(
    results: Sequence[ClientUpdate | ClientEvaluation | ClientAtHome | ClientFailure],
    metrics: Sequence[str],
    **packets: Mapping[str, Array],
) -> RecordDict:
    failed = {result.client_id: result.code for result in results if isinstance(result, ClientFailure)}
    content = write_codes(failed, [result.client_id for result in results])
    done = [result for result in results if not isinstance(result, ClientFailure)]
    if done:
        content["metrics"] = MetricRecord(
            {name: [float(getattr(result, name)) for result in done] for name in metrics}
        )
    for name, arrays in packets.items():
        if arrays:
            content[name] = ArrayRecord(dict(arrays))
    return content


def write_codes(failed: Mapping[str, str], clients: Sequence[str]) -> RecordDict:
    """Return a reply that says of each client that it is "ok", or by its code why not."""
    if not clients:
        return RecordDict()
    codes = [failed.get(client, _OK) for client in clients]
    return RecordDict({"clients": ConfigRecord({"ids": list(clients), "codes": codes})})


# --- read by the server ------------------------------------------------------------------------------------


def read_updates(
    content: RecordDict,
    *,
    layout: AdapterLayout,
    ranks: Mapping[str, int],
    part: str,
    round_num: int,
    with_controls: bool = False,
    with_held_out: bool = False,
) -> Iterator[Update]:
    """Return what a reply to a train request says about each of its clients; a packet is read when it is due.

    `ranks` has the clients that were asked, each with the rank it was asked to train at; `part` is the part
    of its delta that every client was asked for. `with_controls` wants the change of a control variate from
    every client, else none is allowed; `with_held_out` likewise wants the evaluation of each.

    Raises:
        WireError: the reply as a whole is malformed. A client with a bad packet is a failure instead.
    """
    names = ("updates", "controls") if with_controls else ("updates",)
    columns = UPDATE_METRICS + _HELD_OUT_METRICS * with_held_out
    codes, metrics = _read_results(content, columns, names, most=len(ranks))
    packets = {name: content.array_records.get(name, ArrayRecord()) for name in names}
    if any(set(record) != set(metrics) for record in packets.values()):
        raise WireError("the packets do not match the clients that report an update")

    def read(client_id: str, code: str) -> Update:
        if code != _OK:
            return _reported(client_id, code)
        try:
            # Who answers without having been asked is dropped by the caller, so its rank does not matter.
            own_layout = at_rank(layout, ranks.get(client_id, layout.rank))
            delta = _read_delta(packets["updates"][client_id], own_layout, part, round_num)
            control_delta = None
            if with_controls:
                control = packets["controls"][client_id]
                control_delta = read_vector(control, layout, "control", round_num, layout.size)
        except WireError as error:
            return _bad_packet(client_id, error)
        return ClientUpdate(
            client_id=client_id,
            round_num=round_num,
            rank=own_layout.rank,
            delta=delta,
            control_delta=control_delta,
            **_with_held_out(client_id, metrics[client_id]),
        )

    return starmap(read, codes.items())  # one at a time: a node may host more clients than fit into memory


def read_sum(
    content: RecordDict,
    *,
    layout: AdapterLayout,
    part: str,
    round_num: int,
    most: int,
    with_held_out: bool = False,
) -> list[Update]:
    """Return what the reply of a node that was asked for its sum says: one update with members, and failures.

    `most` is the number of clients that were asked.

    Raises:
        WireError: the reply as a whole is malformed. If only the packet is bad, all its clients fail.
    """
    columns = UPDATE_METRICS + _HELD_OUT_METRICS * with_held_out
    codes, metrics = _read_results(content, columns, ("sum",), most=most)
    failures = [_reported(client_id, code) for client_id, code in codes.items() if code != _OK]
    record = content.array_records.get("sum", ArrayRecord())
    if list(record) != (["sum"] if metrics else []):
        raise WireError("the sum does not match the clients that report an update")
    if not metrics:
        return [*failures]
    try:
        delta = _read_delta(record["sum"], layout, part, round_num)
    except WireError as error:
        return [*(_bad_packet(client_id, error) for client_id in metrics), *failures]
    common: dict[str, Any] = {"round_num": round_num, "rank": layout.rank}
    members = tuple(  # their own deltas never left the node
        ClientUpdate(client_id=client_id, delta=delta[:0], **common, **_with_held_out(client_id, numbers))
        for client_id, numbers in metrics.items()
    )
    total = ClientUpdate(
        client_id=members[0].client_id,
        delta=delta,
        weight=sum(member.weight for member in members),
        num_tokens=sum(member.num_tokens for member in members),
        train_loss=0.0,  # each member has its own
        members=members,
        **common,
    )
    return [total, *failures]


def read_evaluations(content: RecordDict, *, most: int) -> list[Evaluation]:
    """Return what a reply to an evaluate request says about each client, `most` of whom were asked.

    Raises as `read_updates`.
    """
    codes, metrics = _read_results(content, EVALUATION_METRICS, most=most)
    return [
        ClientEvaluation(client_id=client_id, **metrics[client_id])
        if code == _OK
        else _reported(client_id, code)
        for client_id, code in codes.items()
    ]


def read_at_home(content: RecordDict, *, most: int) -> list[Adapted]:
    """Return what a reply says of each client that trained on at home; otherwise as `read_evaluations`."""
    codes, metrics = _read_results(content, HOME_METRICS, most=most)
    return [
        ClientAtHome(client_id=client_id, **metrics[client_id]) if code == _OK else _reported(client_id, code)
        for client_id, code in codes.items()
    ]


# --- the allow-list ----------------------------------------------------------------------------------------


def check_records(content: RecordDict, **allowed: type) -> None:
    """Return where a reply reports no error and has no records but those allowed, of their kinds.

    Raises:
        WireError: it does or has; the message quotes nothing of the reply.
    """
    code = read_error(content)
    if code is not None:
        raise WireError(f"client reports {code}")
    # The type counts too: text in a ConfigRecord could hide under the name of a record of numbers.
    if any(type(record) is not allowed.get(name) for name, record in content.items()):
        raise WireError("the reply carries records that are not on the list")


def _read_results(
    content: RecordDict, metric_names: Sequence[str], packets: Sequence[str] = (), *, most: int
) -> tuple[dict[str, str], dict[str, dict[str, Any]]]:
    """Return (client -> code, client that is "ok" -> its metrics) of a reply to `most` clients."""
    texts, columns = read_tables(
        content, ("ids", "codes"), metric_names, float, **dict.fromkeys(packets, ArrayRecord)
    )
    codes = _codes(texts, most)
    counts = {
        name: list(map(_count, column))
        for name, column in columns.items()
        if name.removeprefix(_HELD_OUT) in _COUNTS
    }
    done = [client_id for client_id, code in codes.items() if code == _OK]
    return codes, number_rows(done, {**columns, **counts})


def read_codes(
    content: RecordDict, *, most: int, **others: type
) -> tuple[list[str], dict[str, ClientFailure]]:
    """Return the clients that are "ok" and the others as failures, of a reply without numbers to `most`.

    `others` are further records that may come. Raises as `read_tables`.
    """
    texts, _ = read_tables(content, ("ids", "codes"), (), float, **others)
    codes = _codes(texts, most)
    failed = {client: _reported(client, code) for client, code in codes.items() if code != _OK}
    return [client for client in codes if client not in failed], failed


def _codes(texts: Mapping[str, list[str]], most: int) -> dict[str, str]:
    if len(texts["ids"]) > most + _FEW:
        raise WireError(f"the reply names {len(texts['ids']):,} clients, {most:,} were asked")
    codes = dict(zip(texts["ids"], texts["codes"], strict=True))
    if not set(codes.values()) <= CLIENT_ERROR_CODES | {_OK}:
        raise WireError("the reply carries a code that is not on the list")
    return codes


def read_tables(
    content: RecordDict,
    text_names: Sequence[str],
    number_names: Sequence[str],
    kind: type[T],
    **others: type,
) -> tuple[dict[str, list[str]], dict[str, list[T]]]:
    """Return the columns of the clients' texts and of their numbers, each with exactly the names given.

    Numbers may be absent altogether, where no client has any. `others` are further records that may come.
    """
    check_records(content, clients=ConfigRecord, metrics=MetricRecord, **others)
    clients = content.config_records.get("clients", ConfigRecord())
    numbers = content.metric_records.get("metrics", MetricRecord())
    if set(clients) != set(text_names) or (numbers and set(numbers) != set(number_names)):
        raise WireError("the reply's client list or metrics have other columns than those on the list")
    texts = {name: list_field(clients, name, str) for name in text_names}
    ids = texts["ids"]
    if len(set(ids)) != len(ids) or any(len(column) != len(ids) for column in texts.values()):
        raise WireError("the reply's client list names a client twice or has lists of different lengths")
    return texts, {name: list_field(numbers, name, kind) for name in numbers}


def _with_held_out(client_id: str, numbers: Mapping[str, Any]) -> dict[str, Any]:
    """Return the numbers of an update, those of its evaluation as one value where it is of any row."""
    values = {name: number for name, number in numbers.items() if not name.startswith(_HELD_OUT)}
    measured = {name.removeprefix(_HELD_OUT): numbers[name] for name in numbers.keys() - values.keys()}
    if measured.get("num_rows"):
        values["held_out"] = ClientEvaluation(client_id=client_id, **measured)
    return values


def number_rows(ids: Sequence[str], columns: Columns) -> dict[str, dict[str, Any]]:
    """Return client -> its numbers, from columns that must have one number for each client."""
    if bool(ids) != bool(columns) or any(len(column) != len(ids) for column in columns.values()):
        raise WireError("the reply's metrics do not match its clients")
    return {
        client_id: {name: column[place] for name, column in columns.items()}
        for place, client_id in enumerate(ids)
    }


def _read_delta(array: Array, layout: AdapterLayout, part: str, round_num: int) -> torch.Tensor:
    """Return the whole delta [P] of `layout` from a packet of one of its parts."""
    vector = read_vector(array, layout, part, round_num, part_size(layout, part))
    return whole_of(layout, vector, part)


def _reported(client_id: str, code: str) -> ClientFailure:
    return ClientFailure(client_id=client_id, code=code, reason=f"client reports {code}", sent_nothing=True)


def _bad_packet(client_id: str, error: WireError) -> ClientFailure:
    return ClientFailure(client_id=client_id, code=error.code, reason=str(error))


def _count(value: float) -> int:
    """Return a reported count; anything that is not a plausible count is 0."""
    return int(value) if 0 <= value < LARGEST_NUMBER else 0
