"""The benchmark of the wire computes errors as defined, on deltas that an engine trained."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from clients.process import Process
from fedllm.adapters.algebra import Product, inner, squared_norm
from fedllm.adapters.shapes import stack_factors
from fedllm.config.run_config import RunConfig
from fedllm.wire import packets
from scripts.benchmarks import wire
from scripts.benchmarks.deltas import (
    Case,
    case_figures,
    error_in_half_steps,
    largest_error,
    packed,
    product_errors,
    relative_error,
    train_case,
    unpacked,
)
from scripts.benchmarks.models import save_tiny_model, write_rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wire")
    save_tiny_model(folder / "model")
    write_rows(folder / "rows.jsonl", 3, 8)
    return folder


@pytest.fixture(scope="module")
def case(folder) -> Case:
    """Three clients of unequal weight after three steps."""
    config = RunConfig.from_flat(
        {
            "model.name": str(folder / "model"),
            "model.device": "cpu",
            "data.source": str(folder / "rows.jsonl"),
            "federation.num-clients": 3,
            "train.batch-size": 2,
            "lora.rank": 2,
        }
    )
    return train_case(Process().open(config.to_flat(), {"server-paths": True}), steps=3)


def _received(case: Case, payload: str) -> list[torch.Tensor]:
    return [unpacked(packed(delta, case.layout, payload), case.layout) for delta in case.deltas]


def test_errors_are_those_of_their_definitions():
    exact, got = torch.tensor([3.0, -4.0, 0.0]), torch.tensor([3.0, -4.5, 1.2])
    assert relative_error(exact, got) == pytest.approx(1.3 / 5)
    assert largest_error(exact, got) == pytest.approx(1.2 / 4)
    assert error_in_half_steps(exact, got) == pytest.approx(1.2 / (4 / 127 * (1 + 2**-7) / 2))


def test_half_steps_are_those_of_each_block():
    exact = torch.zeros(3 * packets.INT8_BLOCK)
    exact[0], exact[packets.INT8_BLOCK] = 1.0, 100.0
    got = exact.clone()
    got[packets.INT8_BLOCK + 1] = 0.1  # a quarter of a half step there, and 25 in the first block
    assert error_in_half_steps(exact, got) == pytest.approx(0.1 / (100 / 127 * (1 + 2**-7) / 2))


@pytest.mark.parametrize("payload", packets.PAYLOADS)
def test_a_real_delta_keeps_the_promises_of_its_payload(case, payload):
    for delta, got in zip(case.deltas, _received(case, payload), strict=True):
        assert float(delta.norm()) > 0
        if payload == "fp32":
            assert torch.equal(got, delta)
        elif payload == "bf16":
            assert relative_error(delta, got) <= 2.0**-8
        else:
            assert error_in_half_steps(delta, got) <= 1.0
            assert error_in_half_steps(delta, 0.97 * delta) > 1.0  # a scale off by 3 % is noticed


def test_error_of_the_mean_product_is_that_of_factored_algebra(case):
    received = _received(case, "int8")
    total = sum(case.weights)

    def mean(deltas: list[torch.Tensor]) -> list[Product]:
        """Return the mean product of every matrix, the clients' factors side by side."""
        adapters = [case.start.vector + delta for delta in deltas]
        shares = torch.tensor(case.weights, dtype=torch.float64) / total
        stacks = [stack_factors(case.layout, adapters, (i,)) for i in range(len(case.layout.matrices))]
        return [Product((b * shares[:, None]).flatten(2), a.flatten(1, 2)) for a, b in stacks]

    def squared_distance(first: Product, second: Product) -> float:
        return float(squared_norm(first) - 2 * inner(first, second) + squared_norm(second))

    exact = mean(list(case.deltas))
    start = mean([torch.zeros_like(delta) for delta in case.deltas])
    error = sum(map(squared_distance, mean(received), exact))
    change = sum(map(squared_distance, exact, start))
    found = product_errors(case, {"int8": received, "fp32": _received(case, "fp32")})
    assert found["fp32"] == 0.0
    assert found["int8"] == pytest.approx(math.sqrt(error / change), rel=1e-4)


def test_a_case_reports_every_payload(case):
    figures = case_figures(case)
    assert set(figures["payloads"]) == set(packets.PAYLOADS)
    losses = {payload: found["held_out_loss"] for payload, found in figures["payloads"].items()}
    assert losses["fp32"] < figures["held_out_loss_before"]
    assert losses["int8"] == pytest.approx(losses["fp32"], abs=1e-2)
    assert figures["payloads"]["fp32"]["relative_error"].max == 0.0


def test_sizes_are_exact(case):
    sizes, number = wire.sizes(case.start), case.layout.size
    beside = sizes["fp32"] - 4 * number
    assert sizes["bf16"] - 2 * number == beside == sizes["int8"] - number - 2 * math.ceil(number / 64) + 0
    assert min(sizes["safetensors"], sizes["Flower ArrayRecord"]) > 4 * number


@pytest.mark.soak
def test_the_benchmark_prints_one_object(capsys, folder, tmp_path):
    kept = tmp_path / "figures.json"
    model, source = str(folder / "model"), str(folder / "rows.jsonl")
    small = wire.Options(model=model, source=source, clients=2, repetitions=1, steps="1,2")
    wire.main(replace(small, quick=True, json=True, output=kept))
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result == json.loads(kept.read_text())
    assert set(result["figures"]["deltas"]) == {"q, v, 1 steps", "all linear, 1 steps"}
    assert set(result["goals"]) == {
        "bf16_bytes_vs_fp32",
        "int8_bytes_vs_fp32",
        "bf16_relative_error",
        "int8_error_in_half_steps",
    }
    assert result["goals"]["bf16_relative_error"]["met"] is True
