"""Requests: what a server asks of a node comes back as it was, or is refused by field."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from flwr.app import Array, RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto

from fedllm.adapters.base_delta import BaseDelta, no_base_delta
from fedllm.adapters.layout import AdapterLayout, AdapterState, LoraMatrix, initial_adapter
from fedllm.adapters.parts import other_part, part_size, whole_of
from fedllm.errors import LayoutError, NonFiniteError, NotHeldError, OtherConfigError, WireError
from fedllm.messages import EvaluateRequest, TrainRequest
from fedllm.wire import packets, refusals, requests
from fedllm.wire.requests import Holding, Sending

LAYOUT = AdapterLayout((LoraMatrix("a", 3, 5), LoraMatrix("b.c", 4, 2)), 2, 4.0, "f" * 64)
PLAN = "d" * 64
HEADER = 4 + 1 + 4 + 32  # of a packet, its JSON apart


def base_delta_of(ranks: tuple[int, int], seed: int = 0) -> BaseDelta:
    generator = torch.Generator().manual_seed(seed)
    pairs = tuple(
        (
            torch.randn(matrix.out_features, rank, generator=generator),
            torch.randn(rank, matrix.in_features, generator=generator),
        )
        for matrix, rank in zip(LAYOUT.matrices, ranks, strict=True)
    )
    return BaseDelta(LAYOUT, pairs)


def holding(seed: int = 0, base_delta: BaseDelta | None = None) -> Holding:
    """Return a node that makes the initial adapter of `seed` and has one base delta or none."""
    held = {base_delta.digest: base_delta} if base_delta is not None else {}
    return Holding(plan_digest=PLAN, initial=lambda: initial_adapter(LAYOUT, seed), base_delta=held.get)


def train_request(**changes: Any) -> TrainRequest:
    values: dict[str, Any] = {
        "round_num": 4,
        "drawn": {"a": 0, "b": 12},
        "ranks": {"a": 2, "b": 1},
        "adapter": initial_adapter(LAYOUT, 0),
        "base_delta": no_base_delta(LAYOUT),
        "plan_digest": PLAN,
        "clip": 0.5,
    }
    return TrainRequest(**{**values, **changes})


def evaluate_request(**changes: Any) -> EvaluateRequest:
    values: dict[str, Any] = {
        "round_num": 0,
        "drawn": {"a": 12},
        "adapter": initial_adapter(LAYOUT, 0),
        "base_delta": no_base_delta(LAYOUT),
        "plan_digest": PLAN,
    }
    return EvaluateRequest(**{**values, **changes})


def sent(request: TrainRequest, part: str = "both", base_delta: bool = True) -> RecordDict:
    return requests.write_train_request(request, Sending(part, base_delta))


def read(content: RecordDict, held: Holding | None = None) -> TrainRequest:
    return requests.read_train_request(content, LAYOUT, held or holding())


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"clip": 0.0, "base_delta": base_delta_of((3, 0))},
        {"ranks": {"a": 2, "b": 2}, "base_delta": base_delta_of((1, 4))},
    ],
)
def test_a_train_request_comes_back_as_it_was(changes: dict[str, Any]) -> None:
    request = train_request(**changes)
    content = sent(request)
    assert refusals.is_fedllm_request(content)
    got = read(recorddict_from_proto(recorddict_to_proto(content)))  # as Flower carries it
    assert got.adapter.digest == request.adapter.digest
    assert got.base_delta.digest == request.base_delta.digest
    for name in vars(request).keys() - {"adapter", "base_delta"}:
        assert getattr(got, name) == getattr(request, name)


def test_control_variates_travel_with_their_request() -> None:
    control = initial_adapter(LAYOUT, 1)
    content = sent(train_request(control=control, ranks={"a": 2, "b": 2}))
    got = read(content)
    assert got.control is not None
    assert got.control.digest == control.digest
    assert got.adapter.digest == train_request().adapter.digest
    assert read(sent(train_request())).control is None
    content["control"]["second"] = content["control"]["control"]
    with pytest.raises(WireError, match="exactly one"):
        read(content)
    bad = AdapterState(LAYOUT, torch.full((LAYOUT.size,), math.nan))
    with pytest.raises(NonFiniteError):
        read(sent(train_request(control=bad, ranks={"a": 2, "b": 2})))


def test_an_evaluate_request_comes_back_as_it_was() -> None:
    request = evaluate_request(base_delta=base_delta_of((2, 1)))
    content = requests.write_evaluate_request(request, Sending())
    assert refusals.is_fedllm_request(content)
    got = requests.read_evaluate_request(content, LAYOUT, holding())
    assert (got.round_num, got.drawn, got.plan_digest) == (0, {"a": 12}, PLAN)
    assert got.adapter.digest == request.adapter.digest
    assert got.base_delta.digest == request.base_delta.digest


@pytest.mark.parametrize("kind", ["train", "evaluate"])
def test_a_request_under_another_configuration_is_refused_first(kind: str) -> None:
    """Whatever else is wrong with it follows from that."""
    request = train_request() if kind == "train" else evaluate_request()
    write, read_back = (
        (requests.write_train_request, requests.read_train_request)
        if kind == "train"
        else (requests.write_evaluate_request, requests.read_evaluate_request)
    )
    content = write(request, Sending())
    content["request"]["plan"] = "e" * 64
    del content["adapter"], content["request"]["num-drawn"]
    with pytest.raises(OtherConfigError, match="another configuration"):
        read_back(content, LAYOUT, holding())


def test_a_request_carries_no_numbers_of_training() -> None:
    """Every node computes them from its own copy of the configuration."""
    common = {"round", "client-ids", "num-drawn", "plan", "part", "adapter", "base-delta"}
    assert set(sent(train_request())["request"]) == common | {"ranks", "clip", "evaluate"}
    written = requests.write_evaluate_request(evaluate_request(), Sending())
    assert set(written["request"]) == common


# --- parts of the adapter ----------------------------------------------------------------------------------


def half_initial(part: str) -> AdapterState:
    """Return an adapter that has learnt one part and has the initial adapter's other factor."""
    learnt = torch.linspace(-1, 1, part_size(LAYOUT, part))
    return AdapterState(LAYOUT, whole_of(LAYOUT, learnt, part, initial_adapter(LAYOUT, 0).vector))


@pytest.mark.parametrize("part", ["a", "b"])
def test_one_factor_travels_and_the_seed_gives_the_other(part: str) -> None:
    adapter = half_initial(part)
    content = sent(train_request(adapter=adapter), part)
    assert read(content).adapter.digest == adapter.digest
    body = packets.packet_bytes(content) - HEADER
    assert 4 * part_size(LAYOUT, part) < body < 4 * part_size(LAYOUT, part) + 200
    assert packets.packet_bytes(content) < packets.packet_bytes(sent(train_request(adapter=adapter)))


@pytest.mark.parametrize("part", ["a", "b"])
def test_a_node_whose_factor_has_other_bits_says_so(part: str) -> None:
    adapter = AdapterState(LAYOUT, half_initial(part).vector.clone())
    first = LAYOUT.views(adapter.vector)
    for spec, view in first:
        if other_part(part).upper() in spec.name.rpartition("lora_")[2]:
            view[0, 0] = torch.nextafter(view[0, 0], torch.tensor(2.0))
            break
    with pytest.raises(NotHeldError):
        read(sent(train_request(adapter=adapter), part))
    assert read(sent(train_request(adapter=adapter))).adapter.digest == adapter.digest


def test_a_whole_adapter_that_has_not_its_digest_is_refused() -> None:
    content = sent(train_request())
    content["request"]["adapter"] = "0" * 64
    with pytest.raises(WireError, match="digest"):
        read(content)


@pytest.mark.parametrize("part", ["none", "base-delta", "ab", "", "A"])
def test_a_part_that_does_not_exist_is_refused(part: str) -> None:
    content = sent(train_request())
    content["request"]["part"] = part
    with pytest.raises(WireError, match="'part'"):
        read(content)


@pytest.mark.parametrize(("written", "said"), [("a", "b"), ("b", "both"), ("both", "a")])
def test_packet_of_another_part_is_refused(written: str, said: str) -> None:
    content = sent(train_request(), written)
    content["request"]["part"] = said
    with pytest.raises(WireError, match=f"part '{written}', expected part '{said}'"):
        read(content)


# --- base delta --------------------------------------------------------------------------------------------


def test_a_base_delta_that_is_held_is_only_named() -> None:
    base_delta = base_delta_of((3, 1))
    request = train_request(base_delta=base_delta)
    whole, named = sent(request), sent(request, base_delta=False)
    assert "base-delta" not in named
    assert packets.packet_bytes(named) == packets.packet_bytes(sent(train_request()))
    assert packets.packet_bytes(whole) - packets.packet_bytes(named) >= 4 * base_delta.size
    assert read(named, holding(base_delta=base_delta)).base_delta is base_delta
    for held in (holding(), holding(base_delta=base_delta_of((3, 1), seed=1))):
        with pytest.raises(NotHeldError, match="base delta"):
            read(named, held)


def test_no_base_delta_takes_no_bytes() -> None:
    content = sent(train_request())
    assert "base-delta" not in content
    assert content["request"]["base-delta"] == ""
    assert read(content).base_delta.size == 0


def _other_digest(content: RecordDict) -> None:
    content["request"]["base-delta"] = "0" * 64


def _other_ranks(content: RecordDict) -> None:
    content["request"]["base-delta-ranks"] = [1, 3]


def _ranks_of_the_same_size(content: RecordDict) -> None:
    content["request"]["base-delta-ranks"] = [0, 4]  # 4 * 6 = 3 * 8 values


def _too_few_ranks(content: RecordDict) -> None:
    content["request"]["base-delta-ranks"] = [3]


def _negative_rank(content: RecordDict) -> None:
    content["request"]["base-delta-ranks"] = [3, -1]


def _huge_rank(content: RecordDict) -> None:
    content["request"]["base-delta-ranks"] = [3, 2**62]


def _no_ranks(content: RecordDict) -> None:
    del content["request"]["base-delta-ranks"]


def _adapter_as_base_delta(content: RecordDict) -> None:
    content["base-delta"]["base-delta"] = content["adapter"]["adapter"]


def _second_packet(content: RecordDict) -> None:
    content["base-delta"]["more"] = content["base-delta"]["base-delta"]


def _changed_value(content: RecordDict) -> None:
    vector = torch.ones(24)
    data = packets.encode(vector, layout_digest=LAYOUT.digest, round_num=4, payload="fp32", part="base-delta")
    content["base-delta"]["base-delta"] = packets.to_array(data)


def _another_run(content: RecordDict) -> None:
    data = packets.encode(
        torch.ones(24), layout_digest="0" * 64, round_num=4, payload="fp32", part="base-delta"
    )
    content["base-delta"]["base-delta"] = packets.to_array(data)


def _flipped_bit(content: RecordDict) -> None:
    data = bytearray(content["base-delta"]["base-delta"].data)
    data[200] ^= 1
    content["base-delta"]["base-delta"] = Array(
        dtype="uint8", shape=(len(data),), stype=packets.PACKET_TYPE, data=bytes(data)
    )


@pytest.mark.parametrize(
    "damage",
    [
        _other_digest, _other_ranks, _ranks_of_the_same_size, _too_few_ranks, _negative_rank, _huge_rank,
        _no_ranks, _adapter_as_base_delta, _second_packet, _changed_value, _another_run, _flipped_bit,
    ],
)  # fmt: skip
def test_base_delta_other_than_the_named_one_is_refused(
    damage: Callable[[RecordDict], None],
) -> None:
    content = sent(train_request(base_delta=base_delta_of((3, 0))))
    assert read(content).base_delta.size == 24
    damage(content)
    with pytest.raises(WireError) as caught:
        read(content, holding(base_delta=base_delta_of((3, 0))))
    assert "\n" not in str(caught.value)


def test_a_base_delta_that_is_not_finite_is_refused() -> None:
    (b_ON, a_NI), second = base_delta_of((3, 1)).factors
    base_delta = BaseDelta(LAYOUT, ((b_ON * math.inf, a_NI), second))
    with pytest.raises(NonFiniteError):
        read(sent(train_request(base_delta=base_delta)))


# --- fields ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", list(sent(train_request())["request"]))
@pytest.mark.parametrize("value", [None, "text", 1.5, True, [1.5], []])
def test_missing_or_mistyped_field_is_refused(key: str, value: Any) -> None:
    content = sent(train_request())
    before = content["request"].pop(key)
    if type(value) is type(before) and not isinstance(value, list):
        value = None
    if value is not None:
        content["request"][key] = value
    with pytest.raises(WireError, match=key):
        read(content)


@pytest.mark.parametrize("clip", [math.nan, math.inf])
def test_a_clip_that_is_no_number_is_refused(clip: float) -> None:
    with pytest.raises(WireError, match="'clip' is no finite number"):
        read(sent(train_request(clip=clip)))


def test_a_request_whose_adapter_is_not_this_runs_is_refused() -> None:
    content = sent(train_request())
    other = AdapterLayout(LAYOUT.matrices, 2, 8.0, LAYOUT.fingerprint)
    with pytest.raises(WireError):
        requests.read_train_request(content, other, holding())
    content["request"]["round"] = 5
    with pytest.raises(WireError, match="round 4"):
        read(content)
    content["request"]["round"] = 4
    content["adapter"]["second"] = content["adapter"]["adapter"]
    with pytest.raises(WireError, match="exactly one"):
        read(content)


def test_a_request_whose_adapter_is_not_finite_is_refused() -> None:
    state = AdapterState(LAYOUT, torch.full((LAYOUT.size,), math.nan))
    with pytest.raises(NonFiniteError):
        read(sent(train_request(adapter=state)))


@pytest.mark.parametrize(
    "changes",
    [
        {"drawn": {"a": 0}},
        {"ranks": {"a": 2}},
        {"ranks": {"a": 2, "b": 0}},
        {"ranks": {"a": 3, "b": 2}},
        {"control": initial_adapter(LAYOUT, 1)},  # and ranks that differ
    ],
)
def test_a_request_that_contradicts_itself_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(LayoutError):
        train_request(**changes)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("ranks", [2, 9]),
        ("ranks", [2, 2, 2]),
        ("client-ids", ["a", "a"]),
        ("num-drawn", [0]),
        ("num-drawn", [0, -1]),
    ],
)
def test_lists_that_do_not_fit_the_clients_are_refused(key: str, value: Any) -> None:
    content = sent(train_request())
    content["request"][key] = value
    with pytest.raises((LayoutError, WireError), match="client"):
        read(content)
