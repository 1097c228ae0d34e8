"""Values to Flower records and back: the one file of fedllm that knows Flower.

Everything a message may carry is spelled out here. A reply has three records and no free text:
`updates` (client id -> one packet), `metrics` (parallel lists of named numbers), `clients` (ids and codes).
Reading is strict: a reply of any other form raises `WireError`, a single bad client in a good reply becomes
a `ClientFailure` of that client alone.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from tokenize import TokenError
from typing import Any, TypeVar

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from fedllm.adapters.layout import AdapterLayout, AdapterState
from fedllm.errors import CLIENT_ERROR_CODES, WireError
from fedllm.types import (
    EVALUATION_METRICS,
    UPDATE_METRICS,
    ClientEvaluation,
    ClientFailure,
    ClientUpdate,
    EvaluateRequest,
    JoinedClient,
    LocalTraining,
    TrainRequest,
)
from fedllm.wire import codec

PACKET_TYPE = "fedllm.packet"
_OK = "ok"
_RESULT_RECORDS: dict[str, type] = {"clients": ConfigRecord, "metrics": MetricRecord}
_TRAINING_FIELDS: dict[str, type] = {
    "steps": int,
    "batch_size": int,
    "learning_rate": float,
    "weight_decay": float,
    "clip_norm": float,
    "dropout": float,
    "proximal": float,
    "proximal_space": str,
}

T = TypeVar("T")


# --- packets ---------------------------------------------------------------------------------------------


def _to_array(packet: bytes) -> Array:
    return Array(dtype="uint8", shape=(len(packet),), stype=PACKET_TYPE, data=packet)


def _packet_of(array: Array) -> bytes:
    if array.stype != PACKET_TYPE or array.dtype != "uint8":
        raise WireError("an array is not a packet")  # its type is the sender's own text
    return array.data


def packet_bytes(content: RecordDict) -> int:
    """Return the exact number of packet bytes in a message's content."""
    return sum(len(array.data) for record in content.array_records.values() for array in record.values())


# --- requests, written by the server -----------------------------------------------------------------------


def write_train_request(request: TrainRequest) -> RecordDict:
    """Return the message content of a train request; the adapter travels as float32, and so does c."""
    training = request.training
    states = {"adapter": request.adapter, **({"control": request.control} if request.control else {})}
    return RecordDict(
        {
            **{name: _write_adapter(state, request.round_num) for name, state in states.items()},
            "request": ConfigRecord(
                {
                    "round": request.round_num,
                    "client-ids": list(request.client_ids),
                    "num-drawn": list(request.num_drawn),
                    "codec": request.codec,
                    "weighting": request.weighting,
                    "seed": request.seed,
                    **{f"train.{name}": getattr(training, name) for name in _TRAINING_FIELDS},
                }
            ),
        }
    )


def write_evaluate_request(request: EvaluateRequest) -> RecordDict:
    """Return the message content of an evaluate request."""
    return RecordDict(
        {
            "adapter": _write_adapter(request.adapter, request.round_num),
            "request": ConfigRecord(
                {
                    "round": request.round_num,
                    "client-ids": list(request.client_ids),
                    "num-drawn": list(request.num_drawn or [0] * len(request.client_ids)),
                }
            ),
        }
    )


def _write_adapter(state: AdapterState, round_num: int) -> ArrayRecord:
    packet = codec.encode(
        state.vector, layout_digest=state.layout.digest, round_num=round_num, payload="fp32"
    )
    return ArrayRecord({"adapter": _to_array(packet)})


# --- requests, read by a client ----------------------------------------------------------------------------


def is_fedllm_request(content: RecordDict) -> bool:
    """Return whether a message was written by `write_train_request` or `write_evaluate_request`.

    Anything else is taken as a request of a stock Flower strategy, whose arrays are named PEFT tensors.
    """
    return "request" in content.config_records and "adapter" in content.array_records


def read_train_request(content: RecordDict, layout: AdapterLayout) -> TrainRequest:
    """Return the request in `content`.

    Raises:
        WireError: a field is missing or of the wrong kind, or the adapter is not of `layout`.
    """
    config = content.config_records["request"]
    round_num = _scalar(config, "round", int)
    training: dict[str, Any] = {
        name: _scalar(config, f"train.{name}", kind) for name, kind in _TRAINING_FIELDS.items()
    }
    return TrainRequest(
        round_num=round_num,
        client_ids=tuple(_list(config, "client-ids", str)),
        num_drawn=tuple(_list(config, "num-drawn", int)),
        adapter=_read_adapter(content, layout, round_num),
        training=LocalTraining(**training),
        codec=_scalar(config, "codec", str),
        weighting=_scalar(config, "weighting", str),
        seed=_scalar(config, "seed", int),
        control=_read_adapter(content, layout, round_num, "control") if "control" in content else None,
    )


def read_evaluate_request(content: RecordDict, layout: AdapterLayout) -> EvaluateRequest:
    """Return the request in `content`; raises as `read_train_request`."""
    config = content.config_records["request"]
    round_num = _scalar(config, "round", int)
    return EvaluateRequest(
        round_num=round_num,
        client_ids=tuple(_list(config, "client-ids", str)),
        num_drawn=tuple(_list(config, "num-drawn", int)),
        adapter=_read_adapter(content, layout, round_num),
    )


def _read_adapter(
    content: RecordDict, layout: AdapterLayout, round_num: int, name: str = "adapter"
) -> AdapterState:
    record = content.array_records.get(name, ArrayRecord())
    if list(record) != ["adapter"]:
        raise WireError("a request carries exactly one adapter")
    packet = codec.decode(
        _packet_of(record["adapter"]), layout_digest=layout.digest, size=layout.size, round_num=round_num
    )
    return AdapterState(layout, packet.vector).checked_finite()


def _scalar(record: ConfigRecord, key: str, kind: type[T]) -> T:
    value = record.get(key)
    if type(value) is not kind:
        raise WireError(f"field {key!r} is missing or not {kind.__name__}")
    return value


def _list(record: ConfigRecord | MetricRecord, key: str, kind: type[T]) -> list[T]:
    value = record.get(key)
    if not isinstance(value, list) or not value or any(type(item) is not kind for item in value):
        raise WireError(f"field {key!r} is missing or not a list of {kind.__name__}")
    return list(value)  # type: ignore[arg-type]


# --- replies, written by a client ---------------------------------------------------------------------------


def write_updates(
    results: Sequence[ClientUpdate | ClientFailure], *, layout: AdapterLayout, payload: str
) -> RecordDict:
    """Return the reply to a train request: one packet per client that has an update.

    Where clients have control variates, the packets of their changes are a record of their own.
    """

    def packet(vector: torch.Tensor, update: ClientUpdate) -> Array:
        return _to_array(
            codec.encode(vector, layout_digest=layout.digest, round_num=update.round_num, payload=payload)
        )

    updates = [result for result in results if isinstance(result, ClientUpdate)]
    packets = {update.client_id: packet(update.delta, update) for update in updates}
    content = _write_results(results, updates, UPDATE_METRICS, ArrayRecord(packets))
    changes = {u.client_id: packet(u.control_delta, u) for u in updates if u.control_delta is not None}
    if changes:
        content["controls"] = ArrayRecord(changes)
    return content


def write_evaluations(results: Sequence[ClientEvaluation | ClientFailure]) -> RecordDict:
    """Return the reply to an evaluate request; without a personal adapter both its losses are the same."""
    done = [
        replace(result, personal_loss=result.loss if result.personal_loss is None else result.personal_loss)
        for result in results
        if isinstance(result, ClientEvaluation)
    ]
    return _write_results(results, done, EVALUATION_METRICS)


def write_error(code: str) -> RecordDict:
    """Return a reply that says only why there is none: a code of `CLIENT_ERROR_CODES`."""
    return RecordDict({"error": ConfigRecord({"code": code if code in CLIENT_ERROR_CODES else "internal"})})


def _write_results(
    results: Iterable[ClientUpdate | ClientEvaluation | ClientFailure],
    done: Sequence[ClientUpdate | ClientEvaluation],
    metrics: Sequence[str],
    arrays: ArrayRecord | None = None,
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
    if arrays:
        content["updates"] = arrays
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
                {
                    "num_train": [client.num_train for client in clients],
                    "num_held_out": [client.num_held_out for client in clients],
                }
            ),
        }
    )


# --- replies, read by the server ----------------------------------------------------------------------------


def read_updates(
    content: RecordDict, *, layout: AdapterLayout, round_num: int, with_controls: bool = False
) -> list[ClientUpdate | ClientFailure]:
    """Return what a reply to a train request says of each of its clients.

    `with_controls` wants the change of a control variate from every client, else none is allowed.

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
            results.append(ClientFailure(client_id=client_id, code=code, reason=f"client reports {code}"))
            continue
        try:
            decoded = {
                name: codec.decode(
                    _packet_of(record[client_id]),
                    layout_digest=layout.digest,
                    size=layout.size,
                    round_num=round_num,
                )
                for name, record in packets.items()
            }
        except WireError as error:
            results.append(ClientFailure(client_id=client_id, code=error.code, reason=str(error)))
            continue
        numbers = metrics[client_id]
        results.append(
            ClientUpdate(
                client_id=client_id,
                round_num=decoded["updates"].round_num,
                delta=decoded["updates"].vector,
                weight=numbers["weight"],
                num_tokens=_count(numbers["num_tokens"]),
                train_loss=numbers["train_loss"],
                num_truncated=_count(numbers["num_truncated"]),
                seconds=numbers["seconds"],
                control_delta=decoded["controls"].vector if with_controls else None,
            )
        )
    return results


def read_evaluations(content: RecordDict) -> list[ClientEvaluation | ClientFailure]:
    """Return what a reply to an evaluate request says of each client; raises as `read_updates`."""
    codes, metrics = _read_results(content, _RESULT_RECORDS, EVALUATION_METRICS)
    results: list[ClientEvaluation | ClientFailure] = []
    for client_id, code in codes.items():
        if code != _OK:
            results.append(ClientFailure(client_id=client_id, code=code, reason=f"client reports {code}"))
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
    _refuse_error(content)
    _check_records(content, _RESULT_RECORDS)
    record = content.config_records.get("clients", ConfigRecord())
    sizes = content.metric_records.get("metrics", MetricRecord())
    if set(record) != {"ids", "fingerprints"} or set(sizes) != {"num_train", "num_held_out"}:
        raise WireError("a join reply has other fields than ids, fingerprints and sizes")
    ids, fingerprints = _list(record, "ids", str), _list(record, "fingerprints", str)
    num_train, num_held_out = _list(sizes, "num_train", int), _list(sizes, "num_held_out", int)
    if not len(ids) == len(fingerprints) == len(num_train) == len(num_held_out) == len(set(ids)):
        raise WireError("the lists of a join reply differ in length or name a client twice")
    if min(num_train) < 0 or min(num_held_out) < 0:
        raise WireError("a join reply declares a negative number of rows")
    return [
        JoinedClient(
            client_id=client_id, node_id=node_id, num_train=train, num_held_out=held, fingerprint=fingerprint
        )
        for client_id, train, held, fingerprint in zip(
            ids, num_train, num_held_out, fingerprints, strict=True
        )
    ]


def read_error(content: RecordDict) -> str | None:
    """Return the code of an error reply, "internal" for a code outside the list, None for other replies."""
    if "error" not in content.config_records:
        return None
    code = content.config_records["error"].get("code")
    return code if isinstance(code, str) and code in CLIENT_ERROR_CODES else "internal"


def _refuse_error(content: RecordDict) -> None:
    code = read_error(content)
    if code is not None:
        raise WireError(f"client reports {code}")


def _count(value: float) -> int:
    """Return a reported count; anything that is not a plausible count is 0 and refused by validation."""
    return int(value) if 0 <= value < 2**53 else 0


def _check_records(content: RecordDict, allowed: Mapping[str, type]) -> None:
    if any(type(record) is not allowed.get(name) for name, record in content.items()):
        raise WireError("the reply carries records that are not on the list")


def _read_results(
    content: RecordDict, allowed: Mapping[str, type], metric_names: Sequence[str]
) -> tuple[dict[str, str], dict[str, dict[str, float]]]:
    """Return (client -> code, client -> metrics) of a reply, checked against the allow-list."""
    _refuse_error(content)
    _check_records(content, allowed)
    record = content.config_records.get("clients", ConfigRecord())
    ids, codes = _list(record, "ids", str), _list(record, "codes", str)
    if set(record) != {"ids", "codes"} or len(ids) != len(codes) or len(set(ids)) != len(ids):
        raise WireError("the reply's client list is malformed")
    if not set(codes) <= CLIENT_ERROR_CODES | {_OK}:
        raise WireError("the reply carries a code that is not on the list")
    done = [client for client, code in zip(ids, codes, strict=True) if code == _OK]
    columns = content.metric_records.get("metrics", MetricRecord())
    if set(columns) != (set(metric_names) if done else set()):
        raise WireError("the reply's metrics are not exactly those on the list")
    values = {name: _list(columns, name, float) for name in columns}
    if any(len(column) != len(done) for column in values.values()):
        raise WireError("the reply's metrics do not match its clients")
    metrics = {
        client: {name: column[index] for name, column in values.items()} for index, client in enumerate(done)
    }
    return dict(zip(ids, codes, strict=True)), metrics


# --- the plain codec: named PEFT tensors, for stock Flower strategies ---------------------------------------


def write_plain(state: AdapterState) -> ArrayRecord:
    """Return named PEFT tensors in float32, one array each, as stock Flower strategies average them."""
    return ArrayRecord({name: Array(tensor.numpy()) for name, tensor in state.tensors().items()})


def read_plain(record: ArrayRecord, layout: AdapterLayout) -> AdapterState:
    """Return the adapter in named tensors.

    Raises:
        WireError: a name is missing, renamed or extra, or a shape or dtype differs from the layout.
    """
    expected = {spec.name: spec for spec in layout.tensors}
    strange = next(iter(expected.keys() ^ set(record)), None)
    if strange is not None:
        word = "missing" if strange in expected else "unexpected"
        raise WireError(f"{word} tensor {strange[:120]!r}")
    vector = torch.empty(layout.size)
    for spec, view in layout.views(vector):
        values = _numpy_of(record[spec.name], spec.name)
        # Flower's adaptive strategies (FedAdam and its kin) answer in float64
        if values.dtype not in (np.float32, np.float64) or values.shape != spec.shape:
            raise WireError(
                f"tensor {spec.name!r} is {values.dtype} {values.shape}, expected float32 {spec.shape}"
            )
        view.copy_(torch.from_numpy(values.astype(np.float32)))
    return AdapterState(layout, vector).checked_finite()


def _numpy_of(array: Array, name: str) -> "np.ndarray[Any, Any]":
    """Return the values of an array as its bytes have them; what it declares beside them is not trusted."""
    if array.data.startswith(b"\x93NUMPY"):  # numpy.load opens zip files too
        try:
            return array.numpy()
        except (TypeError, ValueError, EOFError, SyntaxError, TokenError):
            pass
    raise WireError(f"tensor {name!r} is not a NumPy array")
