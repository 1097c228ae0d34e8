"""What a server asks of a node: values to Flower records and back.

A request has an adapter, a `request` record of named values and, where the base model has one, a base delta.
How clients train is in no request: server and nodes resolve the same configuration, so only its digest
travels, and a node that was given another one refuses. What a node holds or can make itself may be left out;
the request names its digest all the same, and a node that has other bits says so (`NotHeldError`) in place of
training on them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from fedllm.adapters.base_delta import BaseDelta, flat_size, from_flat, no_base_delta, to_flat
from fedllm.adapters.layout import AdapterLayout, AdapterState
from fedllm.adapters.parts import PARTS, part_of, part_size, whole_of
from fedllm.errors import NotHeldError, OtherConfigError, WireError
from fedllm.messages import EvaluateRequest, TrainRequest
from fedllm.wire.packets import list_field, read_vector, scalar_field, write_vector


@dataclass(frozen=True)
class Sending:
    """What of a request travels: which part of the adapter, and whether the base delta itself."""

    part: str = "both"
    base_delta: bool = True


@dataclass(frozen=True)
class Holding:
    """What a node has already: its plan, the adapter it makes from the run's seed, base deltas by digest."""

    plan_digest: str
    initial: Callable[[], AdapterState]
    base_delta: Callable[[str], BaseDelta | None]


# --- written by the server ---------------------------------------------------------------------------------


def write_train_request(request: TrainRequest, sending: Sending) -> RecordDict:
    """Return the message content of a train request; adapter, base delta and control travel as float32."""
    ranks = [request.ranks[client_id] for client_id in request.drawn]
    content = _write(request, sending, {"ranks": ranks, "clip": request.clip, "evaluate": request.evaluate})
    if request.control is not None:
        control = request.control
        array = _array(control.vector, control.layout, request.round_num, "control")
        content["control"] = ArrayRecord({"control": array})
    return content


def write_evaluate_request(request: EvaluateRequest, sending: Sending) -> RecordDict:
    """Return the message content of an evaluate request."""
    return _write(request, sending, {})


def _write(request: TrainRequest | EvaluateRequest, sending: Sending, values: dict[str, Any]) -> RecordDict:
    adapter, base_delta = request.adapter, request.base_delta
    sent = part_of(adapter.layout, adapter.vector, sending.part)
    config: dict[str, Any] = {
        "round": request.round_num,
        "client-ids": list(request.drawn),
        "part": sending.part,
        "adapter": adapter.digest,  # of the whole, whatever part travels
        "base-delta": base_delta.digest,
        "num-drawn": list(request.drawn.values()),
        "plan": request.plan_digest,
        **values,
    }
    arrays = {"adapter": _array(sent, adapter.layout, request.round_num, sending.part)}
    if base_delta.digest and sending.base_delta:
        flat, config["base-delta-ranks"] = to_flat(base_delta)
        arrays["base-delta"] = _array(flat, base_delta.layout, request.round_num, "base-delta")
    records = {name: ArrayRecord({name: array}) for name, array in arrays.items()}
    return RecordDict({**records, "request": ConfigRecord(config)})


def _array(vector: torch.Tensor, layout: AdapterLayout, round_num: int, part: str) -> Array:
    # Unrounded: every client must start from the server's bits, which the digest vouches for.
    return write_vector(vector, layout, part, round_num, "fp32")


# --- read by a client --------------------------------------------------------------------------------------


def read_train_request(content: RecordDict, layout: AdapterLayout, holding: Holding) -> TrainRequest:
    """Return the request in `content`; what it leaves out is taken from `holding`.

    Raises:
        OtherConfigError: the server's configuration is not the one that this node was given.
        WireError: a field is missing or of the wrong kind, or the adapter or base delta is not of `layout`.
        NotHeldError: what it leaves out is not held here, or has other bits.
        LayoutError: its fields contradict each other.
        NonFiniteError: the adapter or the base delta holds NaN or infinity.
    """
    config = content.config_records["request"]
    return TrainRequest(
        **_read_common(content, layout, holding),
        ranks=_by_client(config, "ranks"),
        control=_read_control(content, layout),
        clip=scalar_field(config, "clip", float),
        evaluate=scalar_field(config, "evaluate", bool),
    )


def read_evaluate_request(content: RecordDict, layout: AdapterLayout, holding: Holding) -> EvaluateRequest:
    """Return the request in `content`; raises as `read_train_request`."""
    return EvaluateRequest(**_read_common(content, layout, holding))


def _read_common(content: RecordDict, layout: AdapterLayout, holding: Holding) -> dict[str, Any]:
    config = content.config_records["request"]
    # Before anything else: under another configuration every other difference is only a consequence.
    if scalar_field(config, "plan", str) != holding.plan_digest:
        raise OtherConfigError(
            "the server runs another configuration than this node was given; start both from one run"
        )
    return {
        "round_num": scalar_field(config, "round", int),
        "drawn": _by_client(config, "num-drawn"),
        "plan_digest": holding.plan_digest,
        "adapter": _read_adapter(content, layout, holding),
        "base_delta": _read_base_delta(content, layout, holding),
    }


def _by_client(config: ConfigRecord, name: str) -> dict[str, int]:
    """Return {client: its number} from two lists of a request."""
    client_ids, numbers = list_field(config, "client-ids", str), list_field(config, name, int)
    # Before any client is charged for an answer that such a request could not get.
    if not len(client_ids) == len(set(client_ids)) == len(numbers) or any(n < 0 for n in numbers):
        raise WireError(f"field {name!r} or 'client-ids' is not one entry, from 0, for every client")
    return dict(zip(client_ids, numbers, strict=True))


def _read_adapter(content: RecordDict, layout: AdapterLayout, holding: Holding) -> AdapterState:
    config = content.config_records["request"]
    part, digest = scalar_field(config, "part", str), scalar_field(config, "adapter", str)
    if part not in PARTS:
        raise WireError("field 'part' is none of " + ", ".join(PARTS))
    sent = _read_packet(content, "adapter", layout, part, part_size(layout, part))
    rest = None if part == "both" else holding.initial().vector
    state = AdapterState(layout, whole_of(layout, sent, part, rest)).checked_finite()
    if state.digest == digest:  # the sent part and this machine's own make the server's adapter
        return state
    if part == "both":
        raise WireError("the adapter has not the digest that its request names")
    raise NotHeldError(
        "the factor that the request leaves out has other bits here; it is sent whole next time"
    )


def _read_base_delta(content: RecordDict, layout: AdapterLayout, holding: Holding) -> BaseDelta:
    config = content.config_records["request"]
    digest = scalar_field(config, "base-delta", str)
    if not digest:  # the base model as it was published
        return no_base_delta(layout)
    if "base-delta" not in content.array_records:
        held = holding.base_delta(digest)
        if held is None:
            raise NotHeldError("the base delta that the request names is not held here; it is sent next time")
        return held
    ranks = list_field(config, "base-delta-ranks", int)  # it grows with the rounds, so no layout tells them
    if len(ranks) != len(layout.matrices) or min(ranks) < 0:
        raise WireError("field 'base-delta-ranks' does not give a rank to every matrix")
    flat = _read_packet(content, "base-delta", layout, "base-delta", flat_size(layout, ranks))
    base_delta = from_flat(layout, flat, ranks).checked_finite()
    if base_delta.digest != digest:
        raise WireError("the base delta has not the digest that its request names")
    return base_delta


def _read_control(content: RecordDict, layout: AdapterLayout) -> AdapterState | None:
    if "control" not in content.array_records:
        return None
    vector = _read_packet(content, "control", layout, "control", layout.size)
    return AdapterState(layout, vector).checked_finite()


def _read_packet(content: RecordDict, name: str, layout: AdapterLayout, part: str, size: int) -> torch.Tensor:
    record = content.array_records[name]
    if list(record) != [name]:  # what is not read is not taken either
        raise WireError(f"a request carries exactly one {name}")
    round_num = scalar_field(content.config_records["request"], "round", int)
    return read_vector(record[name], layout, part, round_num, size)
