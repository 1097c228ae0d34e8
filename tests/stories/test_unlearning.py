"""A run forgets a client in each runtime, with the same bits, though the client is there and asks to join."""

import json
from pathlib import Path

import pytest

RUNTIMES = ("local", "simulation", "deployment")


@pytest.mark.soak
def test_a_run_forgets_a_client_alike_in_every_runtime(tiny_run, fedllm, tmp_path: Path) -> None:
    changes = ["federation.num-clients=3", "federation.cohort=1", "federation.num-rounds=4"]
    fedllm("run", *tiny_run, *changes, "run.name=whole", "--out", str(tmp_path))
    records = [json.loads(line) for line in (tmp_path / "whole" / "rounds.jsonl").read_text().splitlines()]
    client = records[2]["asked"][0]
    digests = set()
    for runtime in RUNTIMES:
        words = [str(tmp_path / "whole"), "--client", client, "--name", runtime, "--runtime", runtime]
        fedllm("unlearn", *words)
        result = json.loads((tmp_path / runtime / "result.json").read_text())
        assert result["status"] == "completed"
        lines = (tmp_path / runtime / "rounds.jsonl").read_text().splitlines()
        assert all(client not in json.loads(line)["asked"] for line in lines)
        digests.add(result["digest"])
    assert len(digests) == 1
