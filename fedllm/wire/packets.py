"""One flat vector as one self-describing packet, and the Flower records that packets travel in.

    magic "FLLM" | version u8 | header length u32 | header JSON | payload | SHA-256 of all before

The header names layout, part, round and payload, so a packet that belongs to another run, round, rank or
factor is refused instead of reshaped. Payloads (bytes per value): `fp32` (4), `bf16` (2, round to nearest
even) and `int8` (1 + 2/64: blocks of 64 values, each with a bfloat16 scale). Lossy payloads are for deltas
only: an update is small next to the weights, so rounding the weights would lose it.
"""

import hashlib
import json
import math
import struct
from typing import Any, TypeAlias, TypeVar

import torch
from flwr.app import Array, ConfigRecord, MetricRecord, RecordDict

from fedllm.adapters.layout import AdapterLayout
from fedllm.adapters.parts import PARTS
from fedllm.errors import WireError

MAGIC = b"FLLM"
VERSION = 2
INT8_BLOCK = 64
PAYLOADS = ("fp32", "bf16", "int8")
# What a packet may hold: a part of an adapter, the base delta, a control variate or the change of one.
KINDS = (*PARTS, "base-delta", "control")
PACKET_TYPE = "fedllm.packet"
_PREFIX = struct.Struct("<4sBI")
_CHECKSUM = 32
_MAX_HEADER = 4096  # many times what `encode` writes: a bound for what is parsed
LARGEST_NUMBER = 2**53  # of a count from outside: up to here a float holds every whole number
T = TypeVar("T")
Bytes: TypeAlias = bytes | memoryview


def encode(
    vector: torch.Tensor, *, layout_digest: str, round_num: int, payload: str, part: str = "both"
) -> bytes:
    """Return the packet of a float32 `vector` [P], which is the named part of an adapter.

    Raises:
        WireError: the payload is unknown or the vector is not a flat float32 CPU tensor.
    """
    if payload not in PAYLOADS:
        raise WireError(f"unknown payload {payload!r}: expected one of {', '.join(PAYLOADS)}")
    if vector.ndim != 1 or vector.dtype != torch.float32 or vector.device.type != "cpu":
        raise WireError(f"only a flat float32 CPU vector travels, not {vector.dtype} of {vector.ndim} axes")
    header = {"layout": layout_digest, "part": part, "payload": payload, "round": round_num}
    text = json.dumps({**header, "size": vector.numel()}, sort_keys=True, separators=(",", ":")).encode()
    parts = (_PREFIX.pack(MAGIC, VERSION, len(text)), text, _ENCODERS[payload](vector.contiguous()))
    checksum = hashlib.sha256()
    for part_bytes in parts:
        checksum.update(part_bytes)
    return b"".join((*parts, checksum.digest()))  # joined once: a payload may be large


def decode(
    data: bytes, *, layout_digest: str, size: int, part: str = "both", round_num: int | None = None
) -> torch.Tensor:
    """Return the float32 vector [size] in `data`, a packet of this layout, part and (where given) round.

    Raises:
        WireError: anything differs from what `encode` writes for that layout, part, size and round.
    """
    # What costs most to read comes last: nothing is parsed before its length and checksum are known.
    if len(data) > max_packet_bytes(size):
        raise WireError(f"packet of {len(data)} bytes, at most {max_packet_bytes(size)} fit this adapter")
    if len(data) < _PREFIX.size + _CHECKSUM:
        raise WireError(f"packet of {len(data)} bytes is cut off")
    magic, version, header_length = _PREFIX.unpack_from(data)
    if magic != MAGIC or version != VERSION:
        raise WireError(f"not a fedllm packet of version {VERSION}")
    content = memoryview(data)[:-_CHECKSUM]  # no copy
    if hashlib.sha256(content).digest() != data[-_CHECKSUM:]:
        raise WireError("packet checksum does not match its content")
    header_end = _PREFIX.size + header_length
    if header_length > _MAX_HEADER or header_end > len(data) - _CHECKSUM:
        raise WireError("packet header is longer than the packet")
    header = _parse_header(data[_PREFIX.size : header_end])
    if header["layout"] != layout_digest:
        raise WireError("packet belongs to another adapter layout, rank or base model")
    if header["part"] != part:
        found = header["part"] if header["part"] in KINDS else "unknown"  # never the sender's own text
        raise WireError(f"packet holds part {found!r}, expected part {part!r}")
    if header["size"] != size:
        raise WireError(f"packet holds {header['size']} values, the layout needs {size}")
    if round_num is not None and header["round"] != round_num:
        raise WireError(f"packet is of round {header['round']}, this is round {round_num}")
    body = content[header_end:]
    payload = header["payload"]
    if payload not in PAYLOADS or len(body) != payload_bytes(size, payload):
        raise WireError(f"packet body of {len(body)} bytes does not fit its payload")
    return _DECODERS[payload](body, size)


def as_received(vector: torch.Tensor, payload: str) -> torch.Tensor:
    """Return a float32 `vector` [P] with the rounding that its receiver will see."""
    return _DECODERS[payload](_ENCODERS[payload](vector.contiguous()), vector.numel())


def payload_bytes(size: int, payload: str) -> int:
    """Return the exact number of payload bytes of `size` values, without header and checksum."""
    blocks = -(-size // INT8_BLOCK)
    return {"fp32": 4 * size, "bf16": 2 * size, "int8": size + 2 * blocks}[payload]


def max_packet_bytes(size: int) -> int:
    """Return the most bytes that a packet of `size` values can have; a longer one is refused unread."""
    return payload_bytes(size, "fp32") + _PREFIX.size + _MAX_HEADER + _CHECKSUM


def _parse_header(text: bytes) -> dict[str, Any]:
    try:
        header = json.loads(text)
    except (ValueError, RecursionError):  # thousands of brackets exceed the parser's depth
        raise WireError("packet header is not JSON") from None
    wanted: dict[str, type] = {"layout": str, "part": str, "payload": str, "round": int, "size": int}
    # Types are compared, not instances: true is an int to Python.
    if not isinstance(header, dict) or {key: type(value) for key, value in header.items()} != wanted:
        raise WireError("packet header has other fields than layout, part, payload, round and size")
    if not all(0 <= header[key] < LARGEST_NUMBER for key in ("round", "size")):
        raise WireError(f"packet header has a number outside 0 to {LARGEST_NUMBER}")
    return header


def _encode_fp32(vector: torch.Tensor) -> bytes:
    return vector.numpy().astype("<f4", copy=False).tobytes()


def _decode_fp32(body: Bytes, size: int) -> torch.Tensor:
    return torch.frombuffer(bytearray(body), dtype=torch.float32)  # a copy: tensors need writable memory


def _encode_bf16(vector: torch.Tensor) -> bytes:
    return vector.bfloat16().view(torch.int16).numpy().astype("<i2", copy=False).tobytes()


def _decode_bf16(body: Bytes, size: int) -> torch.Tensor:
    return torch.frombuffer(bytearray(body), dtype=torch.bfloat16).float()


def _encode_int8(vector: torch.Tensor) -> bytes:
    """Quantise blocks of values to the nearest of 255 steps of the block's own scale."""
    padding = -vector.numel() % INT8_BLOCK
    blocks = torch.nn.functional.pad(vector, (0, padding)).view(-1, INT8_BLOCK)
    exact = blocks.abs().amax(dim=1) / 127
    scale = exact.bfloat16()
    above = torch.nextafter(scale, torch.full_like(scale, torch.inf))
    scale = torch.where(scale.float() < exact, above, scale)  # rounded up, so that no value is clipped
    step = torch.where(scale == 0, torch.ones_like(scale), scale).float()  # a block of zeros has no step
    values = (blocks / step[:, None]).round().clamp(-127, 127).to(torch.int8)
    scales = scale.view(torch.int16).numpy().astype("<i2", copy=False).tobytes()
    return scales + values.view(-1)[: vector.numel()].numpy().tobytes()


def _decode_int8(body: Bytes, size: int) -> torch.Tensor:
    blocks = -(-size // INT8_BLOCK)
    buffer = bytearray(body)
    scale = torch.frombuffer(buffer, dtype=torch.bfloat16, count=blocks).float()
    values = torch.frombuffer(buffer, dtype=torch.int8, offset=2 * blocks).float()
    return values * scale.repeat_interleave(INT8_BLOCK)[:size]


_ENCODERS = {"fp32": _encode_fp32, "bf16": _encode_bf16, "int8": _encode_int8}
_DECODERS = {"fp32": _decode_fp32, "bf16": _decode_bf16, "int8": _decode_int8}


# --- Flower records ----------------------------------------------------------------------------------------


def write_vector(
    vector: torch.Tensor, layout: AdapterLayout, part: str, round_num: int, payload: str
) -> Array:
    """Return the array of a packet: `encode` with the layout's digest; raises as it does."""
    packet = encode(vector, layout_digest=layout.digest, part=part, round_num=round_num, payload=payload)
    return to_array(packet)


def read_vector(array: Array, layout: AdapterLayout, part: str, round_num: int, size: int) -> torch.Tensor:
    """Return the vector [size] of the packet in an array; raises as `decode` and `packet_of`."""
    data = packet_of(array)
    return decode(data, layout_digest=layout.digest, part=part, size=size, round_num=round_num)


def to_array(packet: bytes) -> Array:
    """Return a packet as a Flower array."""
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
        WireError: it is missing or of another type, or no finite number.
    """
    value = record.get(key)
    if type(value) is not kind:
        raise WireError(f"field {key!r} is missing or not {kind.__name__}")
    if isinstance(value, float) and not math.isfinite(value):
        raise WireError(f"field {key!r} is no finite number")
    return value


def list_field(record: ConfigRecord | MetricRecord, key: str, kind: type[T]) -> list[T]:
    """Return the field `key`, a list of at least one value of exactly `kind`; raises as `scalar_field`."""
    value = record.get(key)
    if not isinstance(value, list) or not value or any(type(item) is not kind for item in value):
        raise WireError(f"field {key!r} is missing or not a list of {kind.__name__}")
    return list(value)  # type: ignore[arg-type]
