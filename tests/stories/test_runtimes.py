"""The same app in three runtimes gives the same adapter, bit for bit."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from fedllm.plan.run_plan import resolve
from scripts.console import Console
from scripts.recipe_arguments import config_of
from scripts.run_view import RunView
from scripts.runtimes.flower import run_with_flower
from scripts.runtimes.local import init, step
from tests.stories.conftest import DISTILLED

INJECTED = Path(__file__).with_name("injected")


def _digest(folder: Path) -> str:
    result = json.loads((folder / "result.json").read_text())
    assert result["status"] == "completed"
    return result["digest"]


def _step(folder: Path) -> dict[str, Any]:
    """Return what the last round's distillation did, but for its time; {} where there was none."""
    record = json.loads((folder / "rounds.jsonl").read_text().splitlines()[-1])
    return {key: value for key, value in (record["distillation"] or {}).items() if key != "seconds"}


def test_python_steps_equal_the_command(tiny_run, fedllm, tmp_path):
    fedllm("run", *tiny_run, "run.name=whole", "--out", str(tmp_path))
    config = config_of(tiny_run)
    state = init(config, num_nodes=2)
    before = state
    for _ in range(config.federation.num_rounds):
        state, record = step(state)
    assert state.adapter.digest == _digest(tmp_path / "whole") == record.adapter
    assert before.server.round_num == 0, "a step does not change the state it starts from"


HOME = ("personal.mode=finetune", "data.held-out-fraction=0.3")
FFA = ("aggregation.train=b", "aggregation.read-out=factor-mean", "lora.client-ranks=4,2")


# A deployment equals it too, though one of its programs is killed: test_kills.py. That test, and the one of
# two GPUs below, have the default aggregation.
@pytest.mark.slow
def test_a_simulation_equals_the_local_runtime(tiny_run, fedllm, tmp_path):
    words = [*tiny_run, *DISTILLED, *FFA, *HOME, "federation.num-clients=2", "--out", str(tmp_path)]
    fedllm("run", *words, "run.name=local")
    fedllm("run", *words, "run.name=simulation", "--runtime", "simulation")
    assert _digest(tmp_path / "simulation") == _digest(tmp_path / "local")
    steps = [_step(tmp_path / name) for name in ("local", "simulation")]
    assert steps[0] == steps[1]
    assert steps[0]["texts"], "texts were written and asked about"
    results = [json.loads((tmp_path / name / "result.json").read_text()) for name in ("local", "simulation")]
    assert results[0]["at_home"] == results[1]["at_home"]
    fedllm("compare", str(tmp_path / "local"), str(tmp_path / "simulation"), "--assert-equal")


@pytest.mark.soak
def test_two_gpus_are_two_workers_and_the_same_bits(tiny_run, monkeypatch, tmp_path):
    changes = ["model.device=auto", "federation.num-clients=2", f"run.output={tmp_path}", "run.name=two"]
    config = config_of(tiny_run, changes)
    state = init(config, num_nodes=2)
    for _ in range(config.federation.num_rounds):
        state, _ = step(state)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)  # Ray is told so; the workers find none
    run_with_flower(config, RunView(Console(quiet=True), resolve(config)), is_simulation=True)
    assert _digest(tmp_path / "two") == state.adapter.digest


@pytest.mark.slow
@pytest.mark.gpu
def test_simulation_trains_and_distils_on_one_gpu(tiny_run, fedllm, tmp_path):
    words = [*tiny_run, "model.device=cuda", "distill.when=last", "distill.num-texts=8", "distill.steps=2"]
    fedllm("run", *words, "run.name=gpu", "--out", str(tmp_path), "--runtime", "simulation")
    assert _digest(tmp_path / "gpu")
    assert _step(tmp_path / "gpu").get("texts"), "the server's base model fits next to the worker's"


def _kept(folder: Path) -> dict[str, bytes]:
    """Return what the clients of a run keep for themselves, by client and state."""
    private = folder / "private"  # below it a folder for the run
    kept = {file.relative_to(private): file.read_bytes() for file in private.rglob("*.safetensors")}
    return {"/".join(file.parts[1:]): content for file, content in kept.items()}


@pytest.mark.soak
def test_a_failed_simulation_is_one_line(tiny_run, fedllm, tmp_path):
    words = [*tiny_run, "train.learning-rate=1e30", "federation.max-retries=0", "run.name=wild"]
    words.append("federation.num-clients=2")
    done = fedllm("run", *words, "--out", str(tmp_path), "--runtime", "simulation", check=False)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("fedllm: round 1 diverged")
    assert "train.learning-rate" in line


@pytest.mark.soak
def test_kept_vectors_are_the_same_at_a_site_service(tiny_run, fedllm, tmp_path):
    words = [*tiny_run, "federation.num-clients=2", "--out", str(tmp_path), "personal.mode=ditto"]
    words += ["train.control-variates=true", "aggregation.read-out=factor-mean"]
    words += ["federation.selection=power-of-choice"]
    fedllm("run", *words, "run.name=local")
    fedllm("run", *words, "run.name=deployment", "--runtime", "deployment")
    assert _digest(tmp_path / "deployment") == _digest(tmp_path / "local")
    names = ("deployment", "local")
    results = [json.loads((tmp_path / name / "result.json").read_text()) for name in names]
    assert results[0]["held_out"] == results[1]["held_out"]
    kept = [_kept(tmp_path / name) for name in names]
    assert len(kept[0]) == 4
    assert kept[0] == kept[1]


@pytest.mark.soak
@pytest.mark.parametrize("method", ["masks", "shares", "he"])
def test_secret_sums_are_the_same_in_three_runtimes(method, tiny_run, fedllm, tmp_path, monkeypatch):
    if method == "he":
        pytest.importorskip("tenseal")
    monkeypatch.setenv("PYTHONPATH", f"{INJECTED}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.setenv("FEDLLM_TEST_ALIKE", "1")
    words = [*tiny_run, f"secure.method={method}", "federation.num-clients=3", "run.name=secret"]
    runtimes = ("local", "simulation", "deployment")
    for runtime in runtimes:
        fedllm("run", *words, "--out", str(tmp_path / runtime), "--runtime", runtime)
    digests = {_digest(tmp_path / runtime / "secret") for runtime in runtimes}
    assert len(digests) == 1
    for runtime in runtimes:
        lines = (tmp_path / runtime / "secret" / "rounds.jsonl").read_text().splitlines()
        assert json.loads(lines[-1])["secure"]["answered"] == 3
        assert not list((tmp_path / runtime).rglob("*.masked")), "keys and ledgers end with the run"
