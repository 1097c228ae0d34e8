"""A private run from the command line."""

import json

import pytest


@pytest.mark.soak
@pytest.mark.slow
def test_a_budget_alone_makes_a_private_run_with_a_statement(tiny_run, fedllm, tmp_path):
    words = [*tiny_run, "--out", str(tmp_path), "privacy.epsilon=8", "run.name=private"]
    folder = tmp_path / "private"
    failed = fedllm("run", *words, "model.device=cuda:99", "federation.max-retries=0", check=False)
    assert failed.returncode != 0
    assert list(folder.rglob("privacy-ledger.json")) == [], "a device that is missing spends no privacy"

    done = fedllm("run", *words)  # a name that nothing was released under is free, and so is its budget
    assert "epsilon 8 at delta 1e-05 for one row of one data holder" in done.stdout
    statement = json.loads((folder / "privacy.json").read_text())
    assert statement["releases_of_a_unit"] == 2 * 2  # rounds, steps
    assert 7.9 < statement["epsilon"] <= 8  # all of it, for both rounds
    assert statement["unit"] == "example"
    records = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    assert [record["training"]["losses"] for record in records] == [{}, {}, {}]
    assert f"epsilon {records[-1]['privacy']['epsilon']:.2f}/8" in done.stdout
    assert records[-1]["held_out"]
    assert "differentially private" in (folder / "adapter" / "README.md").read_text()
    result = json.loads((folder / "result.json").read_text())
    assert result["privacy"]["epsilon"] == statement["epsilon"]
    assert result["rounds"] == 2
    secrets = [path.read_bytes() for path in folder.rglob("noise-secret")]
    assert len(secrets) == 2  # the server's and the clients'
    for path in folder.rglob("*"):
        if path.is_file() and "private" not in path.relative_to(folder).parts:
            assert not any(secret in path.read_bytes() for secret in secrets)


@pytest.mark.slow
def test_plan_says_what_noise_costs_and_few_clients_get_nothing(tiny_run, fedllm):
    words = [
        *tiny_run,
        "distill.when=never",
        "privacy.unit=client",
        "federation.num-rounds=20",
        "privacy.delta=1e-3",
    ]
    done = json.loads(fedllm("privacy", *words, "--noise", "4", "--json").stdout)
    assert done["epsilon"] == pytest.approx(3.6051, abs=1e-4)
    assert "buys nothing with 4 clients a round" in done["verdict"]
    assert {row["rounds"] for row in done["table"]} >= {5, 20, 80}
    assert all(row["noise_multiplier"] == 4 for row in done["table"])
