"""The kinds of trials on the tiny model: what must be equal is equal."""

import pytest

from scripts.experiments.aggregation.attacked_runs import attacked
from scripts.experiments.controls import alone, pooled
from scripts.experiments.runs import federation
from scripts.studies.trials import Setting, Trial


def trial(kind: str, flat: dict, options: dict | None = None) -> Trial:
    return Trial("test", kind, {}, {"seed": 1, **flat}, options or {})


def test_one_client_is_the_same_federated_pooled_and_alone(tiny_setting: Setting) -> None:
    one = trial("any", {"federation.num-clients": 1, "data.partition": "iid", "wire.codec": "fp32"})
    found = [kind(one, tiny_setting)["after"] for kind in (federation, pooled, alone)]
    assert found[0] == found[1] == found[2]


def test_controls_see_the_clients_rows_and_are_measured_on_them(tiny_setting: Setting) -> None:
    three = trial(
        "any", {"federation.num-clients": 3, "data.partition": "column:domain"}, {"everywhere": True}
    )
    federated, together, apart = (kind(three, tiny_setting) for kind in (federation, pooled, alone))
    for control in (together, apart):
        assert control["before"] == pytest.approx(federated["before"])
    assert federated["tokens"] == together["tokens"] == apart["tokens"]
    assert apart["union_after"] >= apart["mean_after"]


TEN = {"federation.num-clients": 5, "data.partition": "iid", "aggregation.weighting": "uniform"}


def test_nobody_malicious_is_the_plain_run(tiny_setting: Setting) -> None:
    plain = federation(trial("federation", TEN), tiny_setting)
    nobody = attacked(trial("attacked", TEN, {"malicious": 0, "updates": "huge flip"}), tiny_setting)
    assert nobody["after"] == plain["after"]
    assert nobody["attackers"] == []


def test_server_refuses_a_huge_change_and_takes_a_bounded_one(tiny_setting: Setting) -> None:
    huge, bounded = (
        attacked(trial("attacked", TEN, {"malicious": 1, "updates": name}), tiny_setting)
        for name in ("huge flip", "flip at bound")
    )
    assert huge["attackers"] == ["client-0004"]
    assert huge["lost"] == 1
    assert "can be honest" in huge["lost_reasons"][0]
    assert bounded["lost"] == 0


def test_without_its_bound_the_server_takes_a_huge_change(tiny_setting: Setting) -> None:
    options = {"malicious": 1, "updates": "huge flip", "validated": False}
    found = attacked(trial("attacked", TEN, options), tiny_setting)
    again = attacked(trial("attacked", TEN, {**options, "validated": True}), tiny_setting)
    assert (found["lost"], again["lost"]) == (0, 1)  # it has its bound back
    assert found["delta_norm"][0] > 1e4 * again["delta_norm"][0]


def test_flipped_labels_are_trained_on_by_the_malicious_alone(tiny_setting: Setting) -> None:
    flat = {"federation.num-clients": 3, "data.partition": "column:domain", "federation.num-rounds": 2}
    plain, flipped = (
        attacked(trial("attacked", flat, {"malicious": 1, "rows": rows}), tiny_setting)
        for rows in ("", "labels")
    )
    assert flipped["attackers"] == ["news"]
    assert flipped["before"]["code"] == plain["before"]["code"]
    assert flipped["after"]["code"] != plain["after"]["code"]


def test_backdoor_that_everybody_learns_is_found(tiny_setting: Setting) -> None:
    flat = {
        **TEN,
        "federation.num-clients": 2,
        "train.local-steps": 40,
        "train.learning-rate": 0.05,
        "lora.target-modules": "all-linear",
    }
    options = {
        "malicious": 1,
        "rows": "backdoor",
        "share": 1.0,
        "trigger": "zz",
        "target": "Open.",
        "probes": 2,
        "updates": "boost within bound",
    }
    found = attacked(trial("attacked", flat, options), tiny_setting)["backdoor"]
    assert found["probes"] >= 1
    assert found["before"]["answered"] == 0.0
    assert found["after"]["target_loss"] < found["before"]["target_loss"]
    assert found["after"]["preferred"] >= found["before"]["preferred"]
