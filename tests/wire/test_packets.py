import hashlib
import json
import struct
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedllm.errors import WireError
from fedllm.wire import packets

LAYOUT = "a" * 64
SIZES = [1, 2, 63, 64, 65, 200]
FIXED_BYTES = 4 + 1 + 4 + 32  # magic, version, header length, checksum
laws = settings(deadline=None, max_examples=60)
sizes = st.integers(1, 200)
seeds = st.integers(0, 2**31)
payloads = st.sampled_from(packets.PAYLOADS)
header_values = {"layout": LAYOUT, "part": "both", "payload": "fp32", "round": 3, "size": 2}


def random_vector(size: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)) * scale


def encode(vector: torch.Tensor, payload: str = "fp32", round_num: int = 3) -> bytes:
    return packets.encode(vector, layout_digest=LAYOUT, round_num=round_num, payload=payload)


def decode(data: bytes, size: int, layout: str = LAYOUT, round_num: int | None = 3) -> torch.Tensor:
    return packets.decode(data, layout_digest=layout, size=size, round_num=round_num)


def sealed(header: bytes, body: bytes, prefix: bytes = b"FLLM\x02", length: int | None = None) -> bytes:
    """Return a packet of any content whose checksum is right."""
    data = prefix + struct.pack("<I", len(header) if length is None else length) + header + body
    return data + hashlib.sha256(data).digest()


@laws
@given(sizes, seeds, st.floats(1e-30, 1e30))
def test_fp32_comes_back_bit_for_bit(size: int, seed: int, scale: float) -> None:
    vector = random_vector(size, seed, scale)
    assert torch.equal(decode(encode(vector), size), vector)


@laws
@given(sizes, seeds, st.floats(1e-30, 1e30))
def test_bf16_comes_back_rounded_to_the_nearest_bfloat16(size: int, seed: int, scale: float) -> None:
    vector = random_vector(size, seed, scale)
    rounded = decode(encode(vector, "bf16"), size)
    assert rounded.dtype == torch.float32
    assert torch.equal(rounded, vector.bfloat16().float())
    assert bool(((rounded - vector).abs() <= vector.abs() * 2.0**-8).all())


@laws
@given(sizes, seeds, st.floats(1e-20, 1e20), st.integers(0, 63))
def test_int8_errs_by_at_most_half_a_step_of_its_block(
    size: int, seed: int, scale: float, outlier: int
) -> None:
    vector = random_vector(size, seed, scale)
    vector[outlier % size] *= 1000
    decoded = decode(encode(vector, "int8"), size)
    for begin in range(0, size, packets.INT8_BLOCK):
        block, got = vector[begin : begin + packets.INT8_BLOCK], decoded[begin : begin + packets.INT8_BLOCK]
        # the step is max|x| / 127, rounded up to 8 significant bits
        step = float(block.abs().max()) / 127 * (1 + 2.0**-7)
        assert float((got - block).abs().max()) <= step / 2 * (1 + 1e-5)


@pytest.mark.parametrize("largest", [1.0, 1.003, 3e-5, 127.3, 8.7e12])
@pytest.mark.parametrize("sign", [1, -1])
def test_int8_never_clips_the_largest_value_of_a_block(largest: float, sign: int) -> None:
    vector = torch.full((64,), 0.0)
    vector[5] = sign * largest
    decoded = decode(encode(vector, "int8"), 64)
    assert float(decoded[5]) == pytest.approx(sign * largest, rel=0.5 / 126)
    assert int(decoded.count_nonzero()) == 1


@pytest.mark.parametrize("payload", packets.PAYLOADS)
def test_zeros_come_back_as_zeros(payload: str) -> None:
    assert torch.equal(decode(encode(torch.zeros(130), payload), 130), torch.zeros(130))


@pytest.mark.parametrize(
    ("payload", "size", "expected"),
    [("fp32", 200, 800), ("bf16", 200, 400), ("int8", 200, 208), ("int8", 64, 66), ("int8", 65, 69)],
)
def test_payload_sizes_are_exact(payload: str, size: int, expected: int) -> None:
    assert packets.payload_bytes(size, payload) == expected
    header = {**header_values, "payload": payload, "size": size}
    text = json.dumps(header, sort_keys=True, separators=(",", ":"))
    packet = encode(random_vector(size), payload)
    assert len(packet) == expected + len(text) + FIXED_BYTES
    assert len(packet) <= packets.max_packet_bytes(size) == 4 * size + 4096 + FIXED_BYTES


@pytest.mark.parametrize("payload", packets.PAYLOADS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_survive_to_be_refused(payload: str, value: float) -> None:
    vector = random_vector(130)
    vector[70] = value
    decoded = decode(encode(vector, payload), 130)
    assert not bool(torch.isfinite(decoded[70]))
    assert bool(torch.isfinite(decoded[:64]).all())


@pytest.mark.parametrize(
    ("vector", "payload"),
    [
        (torch.zeros(3), "zip"),
        (torch.zeros(3, dtype=torch.float64), "fp32"),
        (torch.zeros(3, 1), "bf16"),
    ],
)
def test_only_flat_float32_vectors_and_known_payloads_encode(vector: torch.Tensor, payload: str) -> None:
    with pytest.raises(WireError):
        encode(vector, payload)


@pytest.mark.parametrize(
    ("layout", "size", "round_num"), [("b" * 64, 8, 3), (LAYOUT, 9, 3), (LAYOUT, 7, 3), (LAYOUT, 8, 4)]
)
def test_a_packet_of_another_layout_size_or_round_is_refused(layout: str, size: int, round_num: int) -> None:
    vector = random_vector(8)
    with pytest.raises(WireError):
        decode(encode(vector), size, layout, round_num)
    assert torch.equal(decode(encode(vector), 8, round_num=None), vector)  # of any round


@pytest.mark.parametrize("prefix", [b"FLLN\x01", b"FLLM\x01", b"FLLM\x00", b"\x00\x00\x00\x00\x01"])
def test_another_magic_or_version_is_refused(prefix: bytes) -> None:
    header = json.dumps(header_values).encode()
    assert decode(sealed(header, bytes(8)), 2).tolist() == [0, 0]
    with pytest.raises(WireError):
        decode(sealed(header, bytes(8), prefix), 2)


@pytest.mark.parametrize("payload", packets.PAYLOADS)
def test_a_packet_cut_at_any_length_is_refused(payload: str) -> None:
    packet = encode(random_vector(8), payload)
    for length in range(len(packet)):
        with pytest.raises(WireError):
            decode(packet[:length], 8)


@laws
@given(payloads, seeds, st.data())
def test_a_single_changed_byte_is_refused(payload: str, seed: int, data: st.DataObject) -> None:
    packet = bytearray(encode(random_vector(70, seed), payload))
    position = data.draw(st.integers(0, len(packet) - 1))
    packet[position] ^= data.draw(st.integers(1, 255))
    with pytest.raises(WireError):
        decode(bytes(packet), 70)


@laws
@given(st.one_of(st.binary(max_size=300), st.binary(max_size=300).map(lambda rest: b"FLLM\x02" + rest)))
def test_arbitrary_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(WireError):
        decode(data, 8)


@laws
@given(st.binary(max_size=200), st.binary(max_size=64), st.integers(0, 2**32 - 1) | st.none())
def test_arbitrary_headers_and_bodies_are_refused(header: bytes, body: bytes, length: int | None) -> None:
    with pytest.raises(WireError):
        decode(sealed(header, body, length=length), 2)


def test_bytes_after_a_packet_are_refused() -> None:
    packet = encode(random_vector(8))
    for extra in (b"\0", bytes(5000)):
        with pytest.raises(WireError):
            decode(packet + extra, 8)


def changed(**values: Any) -> dict[str, Any]:
    return {key: value for key, value in {**header_values, **values}.items() if value is not None}


@pytest.mark.parametrize(
    "header",
    [
        *(changed(**{key: None}) for key in header_values),
        changed(note="text"),
        changed(round="3"),
        changed(round=3.0),
        changed(round=True),
        changed(size="2"),
        changed(size=2.0),
        changed(size=-2),
        changed(size=3),
        changed(part=7),
        changed(part="a"),
        changed(part="base-delta"),
        changed(part="xyzzy"),
        changed(layout=7),
        changed(layout=[LAYOUT]),
        changed(payload=1),
        changed(payload=["fp32"]),
        changed(payload="bf16"),
        changed(payload="pickle"),
        [],
        None,
        "fp32",
    ],
)
def test_a_header_with_other_fields_is_refused(header: Any) -> None:
    with pytest.raises(WireError):
        decode(sealed(json.dumps(header).encode(), bytes(8)), 2)


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"[" * 4000,  # deeper than the JSON reader goes
        b'{"round":' * 400,
        b'{"layout":"a","part":"both","payload":"fp32","round":' + b"9" * 3900 + b',"size":2}',
        json.dumps(header_values).encode() + b" " * 4096,
    ],
)
def test_a_header_that_is_no_small_json_object_is_refused(header: bytes) -> None:
    with pytest.raises(WireError):
        decode(sealed(header, bytes(8)), 2000)


@pytest.mark.parametrize("payload", packets.PAYLOADS)
@pytest.mark.parametrize("size", [1, 63, 64, 65, 1000])
def test_what_will_be_read_is_known_to_the_sender(payload: str, size: int) -> None:
    vector = torch.randn(size, generator=torch.Generator().manual_seed(size))
    packet = packets.encode(vector, layout_digest="d" * 64, round_num=1, payload=payload)
    read = packets.decode(packet, layout_digest="d" * 64, size=size)
    assert torch.equal(packets.as_received(vector, payload), read)
