"""What a machine remembers of the base drift."""

from pathlib import Path

import pytest
import torch

from clients.drifts import NUM_KEPT, DriftStore, drift_store
from fedllm.adapters.drift import Drift, no_drift
from fedllm.adapters.layout import AdapterLayout, LoraMatrix

LAYOUT = AdapterLayout((LoraMatrix("a", 3, 5), LoraMatrix("b.c", 4, 2)), 2, 4.0, "f" * 64)


def drift_of(seed: int) -> Drift:
    generator = torch.Generator().manual_seed(seed)
    ranks = (3, 0)
    return Drift(
        LAYOUT,
        tuple(
            (torch.randn(m.out_features, n, generator=generator), torch.randn(n, m.in_features))
            for m, n in zip(LAYOUT.matrices, ranks, strict=True)
        ),
    )


def test_a_drift_is_held_by_its_digest_in_this_process_and_the_next(tmp_path: Path) -> None:
    first, drift = DriftStore(tmp_path), drift_of(0)
    assert first.held(drift.digest, LAYOUT) is None
    assert first.keep(drift) is drift
    assert first.held(drift.digest, LAYOUT) is drift
    later = DriftStore(tmp_path).held(drift.digest, LAYOUT)
    assert later is not None
    assert later.digest == drift.digest
    assert first.held("0" * 64, LAYOUT) is None
    assert first.held(drift.digest, LAYOUT) is drift


def test_the_resident_object_stands_for_equal_ones(tmp_path: Path) -> None:
    store, drift = DriftStore(tmp_path), drift_of(0)
    store.keep(drift)
    copied = Drift(LAYOUT, tuple((b_ON.clone(), a_NI.clone()) for b_ON, a_NI in drift.factors))
    assert store.keep(copied) is drift


def test_only_the_newest_files_stay(tmp_path: Path) -> None:
    store = DriftStore(tmp_path)
    drifts = [drift_of(seed) for seed in range(5)]
    for drift in drifts:
        store.keep(drift)
    assert len(list(tmp_path.iterdir())) == NUM_KEPT
    assert DriftStore(tmp_path).held(drifts[-1].digest, LAYOUT) is not None


def test_a_damaged_or_foreign_file_counts_as_absent(tmp_path: Path) -> None:
    drift, other = drift_of(0), drift_of(1)
    DriftStore(tmp_path).keep(drift)
    (file,) = tmp_path.iterdir()
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(bytes(data))
    assert DriftStore(tmp_path).held(drift.digest, LAYOUT) is None
    file.write_bytes(b"nothing")
    assert DriftStore(tmp_path).held(drift.digest, LAYOUT) is None
    DriftStore(tmp_path).keep(other)
    (tmp_path / f"{other.digest}.safetensors").replace(file)
    assert DriftStore(tmp_path).held(drift.digest, LAYOUT) is None


@pytest.mark.parametrize("digest", ["../secret", "", "x" * 64, "0" * 63, "/etc/passwd"])
def test_a_digest_that_is_none_opens_no_file(digest: str, tmp_path: Path) -> None:
    (tmp_path / "secret.safetensors").write_bytes(b"{}")
    assert DriftStore(tmp_path / "drifts").held(digest, LAYOUT) is None


def test_no_drift_is_not_written(tmp_path: Path) -> None:
    store, none = DriftStore(tmp_path / "drifts"), no_drift(LAYOUT)
    assert store.keep(none) is none
    assert not (tmp_path / "drifts").exists()


def test_a_folder_that_cannot_be_written_only_costs_the_next_process(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    store, drift = DriftStore(tmp_path / "file" / "drifts"), drift_of(0)
    assert store.keep(drift) is drift
    assert store.held(drift.digest, LAYOUT) is drift


def test_the_store_of_a_process_is_in_its_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDLLM_CACHE", str(tmp_path))
    assert drift_store().folder == tmp_path / "drifts"
    assert drift_store() is drift_store()
