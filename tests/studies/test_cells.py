import math
from collections.abc import Sequence

import pytest

from fedllm.config.run_config import RunConfig
from fedllm.errors import ConfigError
from scripts.studies.cells import Budget, Study, budget_of, check_methods, do_study, methods_of
from scripts.studies.trials import Outcome, Trial


def config(**changes: object) -> RunConfig:
    keys = {name.replace("__", ".").replace("_", "-"): value for name, value in changes.items()}
    return RunConfig.from_flat({"federation.num-rounds": 4, "train.local-steps": 10, **keys})


def test_half_of_the_steps_are_at_home() -> None:
    assert budget_of(config()) == Budget(40, 20, 4, 2, 10)
    assert budget_of(config(federation__num_rounds=3)) == Budget(30, 20, 3, 1, 10)
    assert budget_of(config(federation__num_rounds=1)) == Budget(10, 5, 1, 1, 5)


def test_steps_at_home_come_on_top_where_a_recipe_has_them() -> None:
    home = config(personal__mode="finetune", personal__steps=20)
    assert budget_of(home) == Budget(60, 20, 6, 4, 10)


def test_a_cohort_spends_its_share_of_the_steps() -> None:
    some = config(federation__num_clients=8, federation__cohort=2, federation__num_rounds=8)
    assert budget_of(some) == Budget(20, 10, 8, 4, 10)


def test_only_what_a_recipe_does_is_compared() -> None:
    assert methods_of(config()) == ("base", "alone", "centralised", "one-shot", "federated", "home")
    assert "one-shot" not in methods_of(config(federation__num_rounds=1))
    assert "distilled" in methods_of(config(distill__when="last"))
    private = methods_of(config(privacy__epsilon=8))
    assert {"private", "private-home"} <= set(private)
    assert check_methods(["home", "alone"], config()) == ("alone", "home")


@pytest.mark.parametrize(("name", "told"), [("hone", "expected some of base"), ("private", "has none")])
def test_other_methods_are_refused_in_one_line(name: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        check_methods([name], config())


def test_each_method_takes_its_best_rate_to_other_seeds() -> None:
    best, asked = {"alone": 1e-2, "home": 1e-3}, []

    def do(trials: Sequence[Trial]) -> list[Outcome]:
        asked.append(
            [(trial.labels["method"], trial.labels["seed"], trial.labels["rate"]) for trial in trials]
        )
        return [
            Outcome(
                trial,
                {"choosing": abs(math.log(float(trial.labels["rate"]) / best[str(trial.labels["method"])]))},
            )
            for trial in trials
        ]

    done = do_study(Study("s", config(), ("alone", "home"), (1e-3, 1e-2), (5, 6)), do)
    assert asked[0] == [("alone", 5, 1e-3), ("alone", 5, 1e-2), ("home", 5, 1e-3), ("home", 5, 1e-2)]
    assert asked[1] == [("alone", 6, 1e-2), ("home", 6, 1e-3)]
    assert [(one.trial.labels["method"], one.trial.labels["seed"]) for one in done.outcomes] == [
        ("alone", 5),
        ("home", 5),
        ("alone", 6),
        ("home", 6),
    ]
    assert done.rates == best


def test_only_the_private_methods_have_the_recipes_privacy() -> None:
    trials: dict[str, Trial] = {}

    def do(given: Sequence[Trial]) -> list[Outcome]:
        trials.update({str(trial.labels["method"]): trial for trial in given})
        return [Outcome(trial, {"choosing": 1.0}) for trial in given]

    private = config(privacy__epsilon=8, distill__when="last", audit__canaries=3, model__num_threads=2)
    study = Study("s", private, methods_of(private), (1e-3,), (0,))
    do_study(study, do)
    configs = {name: RunConfig.from_flat({**study.flat, **trial.flat}) for name, trial in trials.items()}
    assert {name for name, each in configs.items() if each.privacy.epsilon != "off"} == {
        "private",
        "private-home",
    }
    assert {name for name, each in configs.items() if each.distill.when != "never"} == {"distilled"}
    assert not any(each.audit.canaries for each in configs.values())
    assert "model.num-threads" not in study.flat  # it changes no result
