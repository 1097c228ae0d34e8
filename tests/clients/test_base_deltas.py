"""What a machine remembers of the base delta."""

from pathlib import Path

import pytest
import torch

from clients.base_deltas import NUM_KEPT, BaseDeltaStore
from fedllm.adapters.base_delta import BaseDelta, no_base_delta
from fedllm.adapters.layout import AdapterLayout, LoraMatrix

LAYOUT = AdapterLayout((LoraMatrix("a", 3, 5), LoraMatrix("b.c", 4, 2)), 2, 4.0, "f" * 64)


def base_delta_of(seed: int) -> BaseDelta:
    generator = torch.Generator().manual_seed(seed)
    ranks = (3, 0)
    return BaseDelta(
        LAYOUT,
        tuple(
            (torch.randn(m.out_features, n, generator=generator), torch.randn(n, m.in_features))
            for m, n in zip(LAYOUT.matrices, ranks, strict=True)
        ),
    )


def test_base_delta_is_held_by_digest_across_processes(tmp_path: Path) -> None:
    first, base_delta = BaseDeltaStore(tmp_path), base_delta_of(0)
    assert first.held(base_delta.digest, LAYOUT) is None
    assert first.keep(base_delta) is base_delta
    assert first.held(base_delta.digest, LAYOUT) is base_delta
    later = BaseDeltaStore(tmp_path).held(base_delta.digest, LAYOUT)
    assert later is not None
    assert later.digest == base_delta.digest
    assert first.held("0" * 64, LAYOUT) is None
    assert first.held(base_delta.digest, LAYOUT) is base_delta


def test_the_resident_object_stands_for_equal_ones(tmp_path: Path) -> None:
    store, base_delta = BaseDeltaStore(tmp_path), base_delta_of(0)
    store.keep(base_delta)
    copied = BaseDelta(LAYOUT, tuple((b_ON.clone(), a_NI.clone()) for b_ON, a_NI in base_delta.factors))
    assert store.keep(copied) is base_delta


def test_only_the_newest_files_stay(tmp_path: Path) -> None:
    store = BaseDeltaStore(tmp_path)
    base_deltas = [base_delta_of(seed) for seed in range(5)]
    for base_delta in base_deltas:
        store.keep(base_delta)
    assert len(list(tmp_path.iterdir())) == NUM_KEPT
    assert BaseDeltaStore(tmp_path).held(base_deltas[-1].digest, LAYOUT) is not None


def test_a_damaged_or_foreign_file_counts_as_absent(tmp_path: Path) -> None:
    base_delta, other = base_delta_of(0), base_delta_of(1)
    BaseDeltaStore(tmp_path).keep(base_delta)
    (file,) = tmp_path.iterdir()
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(bytes(data))
    assert BaseDeltaStore(tmp_path).held(base_delta.digest, LAYOUT) is None
    file.write_bytes(b"nothing")
    assert BaseDeltaStore(tmp_path).held(base_delta.digest, LAYOUT) is None
    BaseDeltaStore(tmp_path).keep(other)
    (tmp_path / f"{other.digest}.safetensors").replace(file)
    assert BaseDeltaStore(tmp_path).held(base_delta.digest, LAYOUT) is None


@pytest.mark.parametrize("digest", ["../secret", "", "x" * 64, "0" * 63, "/etc/passwd"])
def test_a_digest_that_is_none_opens_no_file(digest: str, tmp_path: Path) -> None:
    (tmp_path / "secret.safetensors").write_bytes(b"{}")
    assert BaseDeltaStore(tmp_path / "base-deltas").held(digest, LAYOUT) is None


def test_no_base_delta_is_not_written(tmp_path: Path) -> None:
    store, none = BaseDeltaStore(tmp_path / "base-deltas"), no_base_delta(LAYOUT)
    assert store.keep(none) is none
    assert not (tmp_path / "base-deltas").exists()


def test_unwritable_folder_only_costs_the_next_process(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    store, base_delta = BaseDeltaStore(tmp_path / "file" / "base-deltas"), base_delta_of(0)
    assert store.keep(base_delta) is base_delta
    assert store.held(base_delta.digest, LAYOUT) is base_delta
