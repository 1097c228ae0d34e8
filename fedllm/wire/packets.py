"""Packets inside Flower arrays, and fields of Flower records read by type."""

from typing import TypeVar

from flwr.app import Array, ConfigRecord, MetricRecord, RecordDict

from fedllm.errors import WireError

PACKET_TYPE = "fedllm.packet"

T = TypeVar("T")


def to_array(packet: bytes) -> Array:
    """Return a packet as the Flower array it travels in."""
    return Array(dtype="uint8", shape=(len(packet),), stype=PACKET_TYPE, data=packet)


def packet_of(array: Array) -> bytes:
    """Return the packet inside an array.

    Raises:
        WireError: the array says it is something else.
    """
    if array.stype != PACKET_TYPE or array.dtype != "uint8":
        raise WireError("an array is not a packet")  # its type is the sender's own text
    return array.data


def packet_bytes(content: RecordDict) -> int:
    """Return the exact number of packet bytes in a message's content."""
    return sum(len(array.data) for record in content.array_records.values() for array in record.values())


def scalar_field(record: ConfigRecord, key: str, kind: type[T]) -> T:
    """Return the field `key`, whose type must be exactly `kind`.

    Raises:
        WireError: it is missing or of another type.
    """
    value = record.get(key)
    if type(value) is not kind:
        raise WireError(f"field {key!r} is missing or not {kind.__name__}")
    return value


def list_field(record: ConfigRecord | MetricRecord, key: str, kind: type[T]) -> list[T]:
    """Return the field `key`, a list of at least one value of exactly `kind`; raises as `scalar_field`."""
    value = record.get(key)
    if not isinstance(value, list) or not value or any(type(item) is not kind for item in value):
        raise WireError(f"field {key!r} is missing or not a list of {kind.__name__}")
    return list(value)  # type: ignore[arg-type]
