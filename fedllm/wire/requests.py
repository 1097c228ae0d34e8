"""What a server asks of a node: values to Flower records and back."""

from dataclasses import fields
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, RecordDict

from fedllm.adapters.layout import AdapterLayout, AdapterState
from fedllm.errors import WireError
from fedllm.types import EvaluateRequest, LocalTraining, TrainRequest
from fedllm.wire import codec
from fedllm.wire.packets import list_field, packet_of, scalar_field, to_array

_TRAINING_FIELDS: dict[str, Any] = {item.name: item.type for item in fields(LocalTraining)}


def write_train_request(request: TrainRequest) -> RecordDict:
    """Return the message content of a train request; the adapter travels as float32."""
    training = request.training
    return RecordDict(
        {
            "adapter": _write_adapter(request.adapter, request.round_num),
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
                }
            ),
        }
    )


def _write_adapter(state: AdapterState, round_num: int) -> ArrayRecord:
    packet = codec.encode(
        state.vector, layout_digest=state.layout.digest, round_num=round_num, payload="fp32"
    )
    return ArrayRecord({"adapter": to_array(packet)})


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
    round_num = scalar_field(config, "round", int)
    training: dict[str, Any] = {
        name: scalar_field(config, f"train.{name}", kind) for name, kind in _TRAINING_FIELDS.items()
    }
    return TrainRequest(
        round_num=round_num,
        client_ids=tuple(list_field(config, "client-ids", str)),
        num_drawn=tuple(list_field(config, "num-drawn", int)),
        adapter=_read_adapter(content, layout, round_num),
        training=LocalTraining(**training),
        codec=scalar_field(config, "codec", str),
        weighting=scalar_field(config, "weighting", str),
        seed=scalar_field(config, "seed", int),
    )


def read_evaluate_request(content: RecordDict, layout: AdapterLayout) -> EvaluateRequest:
    """Return the request in `content`; raises as `read_train_request`."""
    config = content.config_records["request"]
    round_num = scalar_field(config, "round", int)
    return EvaluateRequest(
        round_num=round_num,
        client_ids=tuple(list_field(config, "client-ids", str)),
        adapter=_read_adapter(content, layout, round_num),
    )


def _read_adapter(content: RecordDict, layout: AdapterLayout, round_num: int) -> AdapterState:
    record = content.array_records["adapter"]
    if list(record) != ["adapter"]:
        raise WireError("a request carries exactly one adapter")
    packet = codec.decode(
        packet_of(record["adapter"]), layout_digest=layout.digest, size=layout.size, round_num=round_num
    )
    return AdapterState(layout, packet.vector).checked_finite()
