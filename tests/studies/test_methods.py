"""The methods of a study on a tiny model: what must be equal is equal."""

import math
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from fedllm.errors import DivergedError, NoDataError
from scripts.recipe_arguments import config_of
from scripts.studies.held_out import losses, losses_on_others, open_clients
from scripts.studies.methods import alone, base, centralised, federated
from scripts.studies.trials import Setting, Trial

WEIGHTS = "model.safetensors"


def setting(recipe: Path) -> Setting:
    config = config_of([str(recipe)])
    return Setting(config.model.name, config.data.source, config.to_flat(), "digest")


def trial(options: dict | None = None, **flat: object) -> Trial:
    keys = {name.replace("__", ".").replace("_", "-"): value for name, value in flat.items()}
    return Trial("test", "any", {}, keys, options or {})


def test_one_client_is_the_same_pooled_alone_and_federated(tiny_recipe: Path) -> None:
    one = {"federation__num_clients": 1, "data__partition": "iid", "federation__num_rounds": 1}
    one |= {"wire__codec": "fp32", "train__learning_rate": 0.03}
    found = [
        method(trial({"steps": 2}, **one), setting(tiny_recipe)) for method in (alone, centralised, federated)
    ]
    assert found[0]["last"] == found[1]["last"] == found[2]["last"]
    assert found[0]["others"] == {}  # there are none


def test_all_methods_see_as_many_tokens_of_the_same_clients(tiny_recipe: Path) -> None:
    shared = setting(tiny_recipe)
    apart, pooled = (method(trial({"steps": 4}), shared) for method in (alone, centralised))
    joined = federated(trial(), shared)
    home = federated(trial({"home": 2, "home_rates": "0.01"}, federation__num_rounds=1), shared)
    assert apart["tokens"] == pooled["tokens"] == joined["tokens"] == home["tokens"]
    assert home["bytes_up"] * 2 == joined["bytes_up"]
    for figures in (apart, pooled, joined, home):
        assert set(figures["clients"]) == set(figures["others"]) == {"code", "math", "news"}


def test_no_method_is_worse_than_base_where_it_chooses(tiny_recipe: Path) -> None:
    shared = setting(tiny_recipe)
    before = base(trial(), shared)
    for method in (alone, centralised):  # at a rate at which steps harm
        figures = method(trial({"steps": 2}, train__learning_rate=100.0), shared)
        assert figures["choosing"] <= before["choosing"]
        assert figures["last"] != figures["clients"]


def test_the_others_text_is_that_of_all_but_oneself(tiny_recipe: Path) -> None:
    clients = open_clients(config_of([str(tiny_recipe)]))
    start = clients.holder.initial.vector
    own = losses(clients.engine, dict.fromkeys(clients.sample, start), clients.sample)
    others = losses_on_others(clients, dict.fromkeys(clients.sample, start))
    assert others["code"] == pytest.approx((own["math"] + own["news"]) / 2)


def test_clients_that_hold_nothing_out_are_refused(tiny_recipe: Path) -> None:
    with pytest.raises(NoDataError, match=r"raise data\.held-out-fraction"):
        open_clients(config_of([str(tiny_recipe), "data.held-out-fraction=0"]))


def test_a_model_without_a_finite_loss_is_no_result(tiny_recipe: Path, tmp_path: Path) -> None:
    shared = setting(tiny_recipe)
    broken = shutil.copytree(shared.model, tmp_path / "broken")
    weights = {name: value.fill_(math.nan) for name, value in load_file(broken / WEIGHTS).items()}
    save_file(weights, broken / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(DivergedError, match="no finite number"):
        base(trial(model__name=str(broken)), shared)


def test_steps_are_those_of_a_client_on_average(tiny_recipe: Path) -> None:
    some = trial({"home": 1, "home_rates": "0.01,0.001"}, federation__num_rounds=3, federation__cohort=1)
    assert 2 <= federated(some, setting(tiny_recipe))["steps"] <= 3  # of the rounds two, at home one at most
