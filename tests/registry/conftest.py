"""Finished runs and a registry with two versions, the second in production; no model is needed for either."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedllm.adapters.folder import save_adapter
from fedllm.adapters.layout import initial_adapter
from fedllm.registry.registry import Registry
from fedllm.runs.lineage import LINEAGE, START
from tests.builders import small_layout

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
PASSED = {"better": {"value": 0.2, "limit": 0.1, "passed": True}}


def finished_run(folder: Path, seed: int, start: Path | None = None) -> Path:
    """Write what a statement needs of a run; `start` is the adapter that it began from."""
    names = {"base_model": "org/base", "revision": "", "target_modules": ["a", "c"], "card": "# A card\n"}
    save_adapter(folder / "adapter", initial_adapter(small_layout(), seed), **names)  # type: ignore[arg-type]
    (folder / "config.toml").write_text(f"seed = {seed}\n")
    (folder / "environment.json").write_text(json.dumps({"fedllm": "1"}))
    (folder / "result.json").write_text(json.dumps({"status": "completed"}))
    clients = {"anna": {"site": "", "commitment": f"{seed:064x}", "consent": ""}}
    lineage = {
        "run": {"name": folder.name, "plan": "ab" * 32},
        "base": {"name": "org/base", "revision": "", "digest": "cd" * 32},
        "app": {"source": "ef" * 32, "bundle": ""},
        "num_clients": 1,
        "consent": {"purpose": "letters", "clients": clients},
    }
    (folder / LINEAGE).write_text(json.dumps(lineage))
    if start is not None:
        (folder / START).mkdir()
        for file in start.iterdir():
            (folder / START / file.name).write_bytes(file.read_bytes())
    return folder


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three finished runs that differ in their weights."""
    folder = tmp_path_factory.mktemp("runs")
    return [finished_run(folder / f"run{seed}", seed) for seed in range(3)]


@pytest.fixture
def make_registry(tmp_path: Path, runs: list[Path]) -> Callable[[], Registry]:
    """Return a function that makes the registry "clinic" of two versions, each promoted in its turn."""

    def make() -> Registry:
        registry = Registry(tmp_path / "clinic")
        for run in runs[:2]:
            registry.promote(registry.add(run, KEY, PASSED).number)
        return registry

    return make


@pytest.fixture
def registry(make_registry: Callable[[], Registry]) -> Registry:
    """Return such a registry."""
    return make_registry()
