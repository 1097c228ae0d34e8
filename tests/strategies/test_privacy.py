"""The real round under a privacy plan: noise, sensitivity, broken variants, audit, ledger, budget, resume."""

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import NormalDist
from typing import Any

import pytest
import torch
from flwr.app import ArrayRecord, Message, RecordDict
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import clients.protect as protecting
import strategies.privacy as serving
import strategies.private_round as noising
from clients.client_app import app
from clients.protect import Protection, protect
from fedllm.adapters.layout import AdapterLayout, LoraMatrix
from fedllm.adapters.parts import part_of, part_size
from fedllm.config.run_config import RunConfig
from fedllm.engine.jobs import Result
from fedllm.errors import BudgetSpentError, CheckpointError, ConfigError
from fedllm.messages import ClientUpdate
from fedllm.plan.run_plan import fixed_keys, resolve
from fedllm.privacy.accounting import gaussian_epsilon
from fedllm.privacy.ledger import Ledger
from fedllm.privacy.noise import clipped
from fedllm.runs.checkpoint import ServerState, load_checkpoint
from fedllm.runs.folder import START
from fedllm.runs.records import RoundRecord, TrainingRecord
from fedllm.wire.refusals import write_error
from scripts.runtimes.local import local_grid
from strategies.cohort.plan_round import plan_round
from strategies.privacy import ServerPrivacy
from strategies.private_round import NoisedSum, release_sum
from strategies.rounds import aggregate, next_round, run_round
from strategies.run import run_federation
from strategies.session import Watch

CLIENT = {
    "privacy.epsilon": 1e5,
    "privacy.unit": "client",
    "privacy.noise-multiplier": 2.0,
    "privacy.clip": 0.5,
    "wire.codec": "fp32",
}
LOCAL = {**CLIENT, "privacy.trust": "local"}
EXAMPLE = {"privacy.epsilon": 1e5, "privacy.noise-multiplier": 1.0, "wire.codec": "fp32"}
LAYOUT = AdapterLayout((LoraMatrix("m.a", 5, 7), LoraMatrix("m.b", 3, 4)), rank=2, alpha=4.0, fingerprint="f")
NOWHERE = settings(
    deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def privacy_of(secret: bytes = bytes(32), **changes: Any) -> ServerPrivacy:
    """Return the server's half of a plan; with a known secret, so that no test fails by chance."""
    flat = {**CLIENT, "federation.num-clients": 4, **changes}
    found = serving.open_privacy(resolve(RunConfig.from_flat(flat)).privacy)
    assert found is not None
    return replace(found, secret=secret)


def update_of(delta: torch.Tensor, client: str = "anna", weight: float = 1.0) -> ClientUpdate:
    return ClientUpdate(
        client_id=client, round_num=1, rank=2, delta=delta, weight=weight, num_tokens=0, train_loss=0.0
    )


# --- the noise of the real path --------------------------------------------------------------------------


@pytest.fixture
def released(make_config: Callable, open_run: Callable) -> Callable[[int], torch.Tensor]:
    """Return a function (number) -> what as many rounds of zero updates add to B, [number, values]."""
    run = open_run(make_config(CLIENT))
    session = replace(run.session, privacy=privacy_of())
    first = plan_round(session, run.state, 1)
    layout = session.layout

    def release(number: int) -> torch.Tensor:
        changes = []
        for round_num in range(1, number + 1):
            plan = replace(first, round_num=round_num)
            answers = [update_of(torch.zeros(layout.size), client) for client in plan.asked]
            after, _ = aggregate(session, run.state, plan, answers)
            changes.append(part_of(layout, after.adapter.vector - run.state.adapter.vector, "b"))
            assert not part_of(layout, after.adapter.vector - run.state.adapter.vector, "a").any()
        return torch.stack(changes).double()

    return release


def check_noise(changes: torch.Tensor, deviation: float) -> None:
    """Assert that values are independent N(0, deviation^2), all at 99.9 %."""
    standard = changes / deviation
    number, z = standard.numel(), 3.3
    assert abs(float(standard.square().mean()) - 1) < z * math.sqrt(2 / number)
    assert abs(float(standard.mean())) < z / math.sqrt(number)
    assert abs(float((standard**4).mean()) - 3) < z * math.sqrt(96 / number)
    for first, second in ((standard[1:], standard[:-1]), (standard[:, 1:], standard[:, :-1])):
        assert abs(float((first * second).mean())) < z / math.sqrt(first.numel())


def test_rounds_of_zero_updates_are_the_noise_that_is_claimed(released: Callable) -> None:
    changes = released(1000)
    check_noise(changes, 2.0 * 0.5 / 4)
    per_value = changes.square().mean(dim=0) / (2.0 * 0.5 / 4) ** 2
    assert float((per_value - 1).abs().max()) < 5 * math.sqrt(2 / 1000)  # no value has less


def test_a_local_update_is_clipped_and_then_noised_in_full() -> None:
    deltas = []
    for number in range(300):
        result = Result("anna", torch.full((LAYOUT.size,), 0.3), 1.0, 1, 1, 0.1)
        noised = Protection(
            layout=LAYOUT, part="both", weighting="uniform", with_numbers=False,
            clip=0.5, deviation=2.0 * 0.5, key=bytes(32),
        )  # fmt: skip
        deltas.append(protect(result, (), 1, number, noised).delta)
    expected = clipped(torch.full((LAYOUT.size,), 0.3), 0.5)
    check_noise(torch.stack(deltas).double() - expected, 2.0 * 0.5)


# --- sensitivity -----------------------------------------------------------------------------------------

odd_weights = st.sampled_from([1.0, 0.25, 0.0, -2.0, 7.0, 1e30, math.nan, math.inf])
nasty = st.sampled_from([0.0, 1.0, -3.0, 1e-30, 1e30, -1e30, math.nan, math.inf, -math.inf])


def check_sensitivity(updates: list[ClientUpdate], clip: float, part: str = "b") -> None:
    """Assert that no client moves the sum by more than its clip, and the count by more than 1/2."""

    def total(present: list[ClientUpdate]) -> NoisedSum:
        noised = NoisedSum(LAYOUT, part, clip)
        for update in present:
            noised.add(update)
        return noised

    whole = total(updates)
    assert bool(torch.isfinite(whole.sum_Q).all())
    for missing in range(len(updates)):
        without = total(updates[:missing] + updates[missing + 1 :])
        assert float((whole.sum_Q - without.sum_Q).norm()) <= clip * (1 + 1e-12)
        assert abs(whole.balance - without.balance) <= 0.5


@NOWHERE
@given(
    rows=st.lists(st.lists(nasty, min_size=LAYOUT.size, max_size=LAYOUT.size), min_size=1, max_size=4),
    weights=st.lists(odd_weights, min_size=4, max_size=4),
    clip=st.floats(0.01, 10),
)  # fmt: skip
def test_no_client_moves_the_sum_by_more_than_the_clip(
    rows: list[list[float]], weights: list[float], clip: float
) -> None:
    updates = [update_of(torch.tensor(row), f"c{number}", weights[number]) for number, row in enumerate(rows)]
    check_sensitivity(updates, clip, "both")


def test_the_denominator_is_fixed_whoever_is_missing() -> None:
    privacy = privacy_of(**{"privacy.noise-multiplier": 1e-6})
    noised = NoisedSum(LAYOUT, "both", 0.5)
    noised.add(update_of(torch.full((LAYOUT.size,), 9.0)))
    delta = release_sum(privacy, _plan(), noised).update.delta
    assert float(delta.norm()) == pytest.approx(0.5 / 4, rel=1e-4)


def _plan(round_num: int = 1, attempt: int = 1) -> Any:
    class Plan:
        pass

    plan = Plan()
    plan.round_num, plan.attempt = round_num, attempt  # type: ignore[attr-defined]
    return plan


# --- broken on purpose: each is caught by a check that the real code passes ------------------------------


def loud() -> list[ClientUpdate]:
    return [update_of(torch.full((LAYOUT.size,), 5.0), name) for name in ("anna", "ben")]


def test_no_noise_is_caught(released: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    check_noise(released(60), 0.25)
    monkeypatch.setattr(noising, "gaussian", lambda stream, size, deviation: torch.zeros(size).double())
    with pytest.raises(AssertionError):
        check_noise(released(60), 0.25)


def test_noise_divided_by_the_root_of_the_cohort_is_caught(
    released: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = noising.gaussian
    monkeypatch.setattr(noising, "gaussian", lambda stream, size, d: real(stream, size, d / math.sqrt(4)))
    with pytest.raises(AssertionError):
        check_noise(released(60), 0.25)


def test_noise_before_the_clip_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    real = protecting._protected_delta

    def noise_first(result: Result, protection: Protection, round_num: int) -> torch.Tensor:
        wide = real(result, replace(protection, clip=1e9), round_num)
        return clipped(wide, protection.clip)

    monkeypatch.setattr(protecting, "_protected_delta", noise_first)
    with pytest.raises(AssertionError):
        test_a_local_update_is_clipped_and_then_noised_in_full()


def test_weights_by_size_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    heavy = [replace(update, weight=100.0) for update in loud()]
    check_sensitivity(heavy, 0.5)
    monkeypatch.setattr(noising, "bounded_weight", lambda weight: weight)
    with pytest.raises(AssertionError):
        check_sensitivity(heavy, 0.5)


def test_clipping_tensor_by_tensor_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    check_sensitivity(loud(), 0.5)
    half = part_size(LAYOUT, "b") // 2
    by_tensor = lambda v, clip: torch.cat([clipped(v[:half], clip), clipped(v[half:], clip)])  # noqa: E731
    monkeypatch.setattr(noising, "clipped", by_tensor)
    with pytest.raises(AssertionError):
        check_sensitivity(loud(), 0.5)


# --- audit of the mechanism ------------------------------------------------------------------------------


def lower_epsilon(present: torch.Tensor, absent: torch.Tensor, delta: float) -> float:
    """Return a 95 % lower bound on epsilon from a test at the middle of both worlds.

    Clopper-Pearson bounds on both error rates give the least mu of a Gaussian trade-off that explains them
    (Nasr et al. 2023, arXiv 2302.07956), and that mu an epsilon.
    """
    beta = pytest.importorskip("scipy.stats").beta
    threshold = (present.mean() + absent.mean()) / 2
    number = len(present)

    def upper(errors: int) -> float:
        return float(beta.ppf(1 - 0.025, errors + 1, number - errors))

    normal = NormalDist()
    false_positive = upper(int((absent > threshold).sum()))
    false_negative = upper(int((present <= threshold).sum()))
    mu = normal.inv_cdf(1 - false_positive) - normal.inv_cdf(false_negative)
    return gaussian_epsilon(max(mu, 0.0), delta)


def canary_rounds(privacy: ServerPrivacy, number: int, *, is_present: bool) -> torch.Tensor:
    """Return how far rounds go along the canary's direction: as loud as it can be, or missing."""
    size = part_size(LAYOUT, "both")
    direction = torch.ones(size) / math.sqrt(size)
    found = []
    for round_num in range(number):
        noised = NoisedSum(LAYOUT, "both", 0.5)
        noised.add(update_of(torch.zeros(LAYOUT.size), "ben"))
        if is_present:
            noised.add(update_of(direction * 1e6))
        delta = release_sum(privacy, _plan(round_num), noised).update.delta
        found.append(float(delta @ direction))
    return torch.tensor(found)


def test_an_attack_finds_nearly_all_that_is_claimed_and_no_more() -> None:
    privacy = privacy_of(**{"privacy.noise-multiplier": 1.0})
    worlds = [canary_rounds(privacy, 4000, is_present=present) for present in (True, False)]
    claim = gaussian_epsilon(1.0, 1e-5)
    found = lower_epsilon(worlds[0], worlds[1], 1e-5)
    assert 0.7 * claim <= found <= claim


def test_the_attack_exceeds_the_claim_where_noise_is_too_little() -> None:
    privacy = privacy_of(**{"privacy.noise-multiplier": 0.5})  # half of what the claim below assumes
    worlds = [canary_rounds(privacy, 1000, is_present=present) for present in (True, False)]
    assert lower_epsilon(worlds[0], worlds[1], 1e-5) > gaussian_epsilon(1.0, 1e-5)


# --- noise is bound to what it hides ---------------------------------------------------------------------


def test_only_the_same_sum_and_attempt_get_the_same_noise() -> None:
    privacy = privacy_of()

    def noise(delta: float, attempt: int = 1, secret: bytes = bytes(32)) -> torch.Tensor:
        noised = NoisedSum(LAYOUT, "both", 0.5)
        noised.add(update_of(torch.full((LAYOUT.size,), delta)))
        release = release_sum(replace(privacy, secret=secret), _plan(1, attempt), noised)
        return release.update.delta.double() * 4 - noised.sum_Q

    first = noise(0.01)
    assert torch.equal(first, noise(0.01))
    for other in (noise(0.02), noise(0.01, attempt=2), noise(0.01, secret=bytes(range(32)))):
        assert float((other - first).abs().max()) > 0.1


# --- rounds ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flat", [CLIENT, LOCAL, EXAMPLE, {**CLIENT, "privacy.weight-cap": 8.0}])
def test_rounds_are_charged_and_numbers_withheld(
    flat: dict[str, Any], make_config: Callable, open_run: Callable, tmp_path: Path
) -> None:
    run = open_run(make_config({**flat, "run.output": str(tmp_path)}))
    state, spent = run.state, 0.0
    for _ in range(2):
        state, record = next_round(run.session, state)
        assert record.privacy is not None
        assert record.privacy.epsilon > spent
        spent = record.privacy.epsilon
        assert record.training == TrainingRecord(learning_rate=record.training.learning_rate, trained="b")
        assert record.privacy.noise_multiplier == flat["privacy.noise-multiplier"]
        assert record.privacy.clip == flat.get("privacy.clip", 1.0)
    assert bool(torch.isfinite(state.adapter.vector).all())
    assert len(state.ledger.entries) == 2
    weights = dict(sorted(record.weights.items()))
    if "privacy.weight-cap" in flat:
        assert weights == {"anna": 0.5, "ben": 0.75, "cleo": 1.0, "dora": 1.0}


def test_coins_charge_everybody_and_release_noise_for_nobody(
    make_config: Callable, open_run: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("dp_accounting", reason="the extra dp is not installed")
    flat = {**CLIENT, "federation.selection": "poisson", "federation.cohort": 1}
    run = open_run(make_config(flat))
    monkeypatch.setattr("strategies.cohort.plan_round.choose_clients", lambda *args, **kwargs: ())
    state, record = run_round(run.session, run.state)
    assert record.asked == ()
    assert state.adapter.digest != run.state.adapter.digest  # silence would say that nobody was drawn
    (entry,) = state.ledger.entries
    assert {name: charge.rate for name, charge in entry.charges.items()} == {"federation": 0.25}


def test_coins_come_from_the_secret_and_not_from_the_seed() -> None:
    poisson = {"federation.selection": "poisson", "federation.cohort": 2}
    seeds = {serving.cohort_seed(privacy_of(bytes([n]) * 32, **poisson), 0) for n in range(5)}
    assert len(seeds) == 5
    assert serving.cohort_seed(privacy_of(), 7) == 7
    assert serving.cohort_seed(None, 7) == 7


def test_an_adaptive_clip_follows_the_norms(make_config: Callable, open_run: Callable) -> None:
    few = {**CLIENT, "privacy.clip": "adaptive"}
    with pytest.raises(ConfigError, match=r"at least 21 clients a round"):
        open_run(make_config(few))
    quiet = {
        **few,
        "privacy.noise-multiplier": 0.3,
        "privacy.clip": "adaptive:1e-3",
        "federation.num-rounds": 9,
    }
    run = open_run(make_config(quiet))
    state, clips = run.state, []
    for _ in range(4):
        state, record = next_round(run.session, state)
        clips.append(record.privacy.clip)
    assert clips[0] == 1e-3
    assert clips[-1] > clips[0]  # all are clipped, so it grows, whatever the noise on the count
    assert state.clip != clips[-1]


@pytest.mark.parametrize(("flat", "charged"), [(LOCAL, [1, 2]), (CLIENT, [2])])
def test_a_repeated_attempt_is_charged_where_updates_are_out(
    flat: dict[str, Any], charged: list[int], make_config: Callable, open_run: Callable
) -> None:
    """Of a sum that the server never noised nothing is out; clients that noise have sent what they sent."""
    left = [1]

    def tamper(reply: Any) -> list[Any]:
        if reply.metadata.message_type == "train" and left[0]:
            left[0] -= 1
            reply.content = RecordDict()
        return [reply]

    run = open_run(make_config({**flat, "federation.min-clients": 4}), tamper=tamper)
    state, record = next_round(run.session, run.state)
    assert record.attempt == 2
    assert [entry.attempt for entry in state.ledger.entries] == charged
    assert {sums[0].count for sums in state.ledger.accounts.values()} == {len(charged)}


@pytest.mark.parametrize(
    ("flat", "content", "charged"),
    [
        (LOCAL, write_error("bad-model"), "ben cleo dora"),
        (EXAMPLE, write_error("out-of-memory"), "ben cleo dora"),
        (CLIENT, write_error("bad-model"), "ben cleo dora"),
        (LOCAL, RecordDict(), "anna ben cleo dora"),
        (EXAMPLE, RecordDict({"updates": ArrayRecord()}), "anna ben cleo dora"),
    ],
)
def test_who_reports_that_it_has_no_update_is_not_charged(
    flat: dict[str, Any], content: RecordDict, charged: str, make_config: Callable, open_run: Callable
) -> None:
    """An answer that is lost, or that cannot be read, may have been an update."""

    def tamper(reply: Any) -> list[Any]:
        if reply.metadata.message_type == "train" and reply.metadata.src_node_id == node:
            reply.content = content
        return [reply]

    run = open_run(make_config(flat), tamper=tamper)
    node = run.session.clients["anna"].node_id
    state, record = next_round(run.session, run.state)
    assert set(record.lost) == {"anna"}
    assert sorted(state.ledger.accounts) == charged.split()


@pytest.mark.parametrize("flat", [LOCAL, EXAMPLE, CLIENT])
def test_a_run_that_trains_nowhere_spends_nothing(
    flat: dict[str, Any], make_config: Callable, open_run: Callable, tmp_path: Path
) -> None:
    run = open_run(make_config({**flat, "model.device": "cuda:99", "federation.max-retries": 0}))
    privacy = serving.open_privacy(run.session.plan.privacy, tmp_path / "server")
    state, record = run_round(replace(run.session, privacy=privacy), run.state)
    assert not record.applied
    assert set(record.unsent) == set(record.asked) == {"anna", "ben", "cleo", "dora"}
    assert state.ledger == Ledger()
    assert [path.name for path in (tmp_path / "server").iterdir()] == ["noise-secret"]


def test_zero_updates_and_lost_clients_never_end_a_run(make_config: Callable, open_run: Callable) -> None:
    run = open_run(make_config({**CLIENT, "train.learning-rate": 1e-30}), absent=[3])
    state, record = next_round(run.session, run.state)
    assert record.applied
    assert bool(torch.isfinite(state.adapter.vector).all())


# --- budget, journal, resume -----------------------------------------------------------------------------


def four_rounds(flat: dict[str, Any], make_config: Callable, output: Path) -> RunConfig:
    return make_config(
        {
            **flat,
            "run.output": str(output),
            "federation.num-rounds": 4,
            "train.token-budget": 1,
            "evaluation.prompts": "",
        }
    )


def test_a_run_from_another_adapter_speaks_for_what_it_added(make_config: Callable, tmp_path: Path) -> None:
    plain = make_config({"run.output": str(tmp_path), "run.name": "first", "federation.num-rounds": 1})
    run_federation(plain, local_grid(plain, app))
    flat = {**CLIENT, "privacy.epsilon": 8.0, "run.name": "second"}
    config = four_rounds(flat, make_config, tmp_path).override({"federation.num-rounds": 1})
    shutil.copytree(tmp_path / "first" / "adapter", tmp_path / "second" / START)
    run_federation(config, local_grid(config, app))
    statement = json.loads((tmp_path / "second" / "privacy.json").read_text())
    assert statement["began_from"] == json.loads((tmp_path / "first" / "result.json").read_text())["digest"]
    assert "own epsilon and this one add up" in statement["does_not_cover"][0]
    card = (tmp_path / "second" / "adapter" / "README.md").read_text()
    assert "What this run added to the adapter it began from is (" in card


def test_a_run_ends_before_its_budget_and_keeps_its_result(make_config: Callable, tmp_path: Path) -> None:
    two = gaussian_epsilon(math.sqrt(2) / 2.0, 1e-5)
    flat = {**CLIENT, "privacy.epsilon": two * 1.01, "privacy.metrics": "held-out"}
    config = four_rounds(flat, make_config, tmp_path)
    notices: list[str] = []
    state = run_federation(config, local_grid(config, app), Watch(notice=notices.append))
    assert state.round_num == 2
    folder = tmp_path / "run"
    result = json.loads((folder / "result.json").read_text())
    assert (result["status"], result["rounds"]) == ("completed", 2)
    assert result["stopped"].startswith("the privacy budget is spent: epsilon")
    assert sum("budget is spent" in line for line in notices) == 1
    assert result["held_out"]["after"]["clients"]
    statement = json.loads((folder / "privacy.json").read_text())
    assert two <= statement["epsilon"] <= two + 1e-4
    card = (folder / "adapter" / "README.md").read_text()
    assert f"This adapter is ({statement['epsilon']:g}, 1e-05)-differentially private" in card
    assert statement["began_from"] == ""
    assert "No differential privacy" not in card
    published = [path for path in (folder / "adapter").rglob("*") if path.is_file()]
    secret = (folder / "private" / "server" / "noise-secret").read_bytes()
    assert all(secret not in path.read_bytes() for path in published)


class Killed(BaseException):
    """A process that is gone."""


@pytest.mark.parametrize("flat", [CLIENT, LOCAL, pytest.param(EXAMPLE, marks=pytest.mark.soak)])
def test_a_killed_private_run_goes_on_with_the_same_ledger(
    flat: dict[str, Any], make_config: Callable, tmp_path: Path
) -> None:
    whole = four_rounds(flat, make_config, tmp_path / "whole")
    expected = run_federation(whole, local_grid(whole, app))
    config = four_rounds(flat, make_config, tmp_path / "killed")
    for secret in (tmp_path / "whole" / "run" / "private").rglob("noise-secret"):  # or both draw their own
        copy = tmp_path / "killed" / secret.relative_to(tmp_path / "whole")
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(secret.read_bytes())

    def kill(record: RoundRecord) -> None:
        if record.round_num == 3:  # released and in the journal, not in a checkpoint
            raise Killed

    with pytest.raises(Killed):
        run_federation(config, local_grid(config, app), Watch(record=kill))
    layout = expected.adapter.layout
    saved, _ = load_checkpoint(tmp_path / "killed" / "run" / "checkpoints", fixed_keys(config), layout)
    assert saved.round_num == 2
    assert len(saved.ledger.entries) == 2
    resumed = config.override({"run.resume": True})
    state = run_federation(resumed, local_grid(resumed, app))
    assert torch.equal(state.adapter.vector, expected.adapter.vector)
    assert state.ledger == expected.ledger
    assert [r.privacy for r in state.records] == [r.privacy for r in expected.records]


def test_a_release_that_differs_after_a_resume_is_charged_again(
    make_config: Callable, open_run: Callable, tmp_path: Path
) -> None:
    config = make_config({**CLIENT, "run.output": str(tmp_path)})
    run = open_run(config)
    journal = tmp_path / "server"
    privacy = serving.open_privacy(resolve(config).privacy, journal)
    session = replace(run.session, privacy=privacy)
    next_round(session, run.state)  # and then the process is gone, and a client with it
    fewer = open_run(config, absent=[3])
    again = replace(fewer.session, privacy=serving.open_privacy(resolve(config).privacy, journal))
    state = serving.with_journal(again.privacy, fewer.state)
    assert len(state.ledger.entries) == 1
    state, _ = next_round(again, state)
    assert [entry.name[:2] for entry in state.ledger.entries] == [(1, 1), (1, 1)]
    assert state.ledger.charges_of("anna")[0].count == 2
    (journal / "privacy-ledger.json").write_text("[{}]")
    with pytest.raises(CheckpointError, match="is damaged"):
        serving.with_journal(again.privacy, fewer.state)


def test_a_repeated_round_charges_each_client_once(
    make_config: Callable, open_run: Callable, tmp_path: Path
) -> None:
    config = make_config({**LOCAL, "federation.cohort": 3, "run.output": str(tmp_path)})
    journal, run = tmp_path / "server", open_run(config)
    session = replace(run.session, privacy=serving.open_privacy(resolve(config).privacy, journal))
    _, first = next_round(session, run.state)  # and then the process is gone, and a client with it
    others = open_run(config, absent=[run.session.clients[first.asked[0]].node_id])
    again = replace(others.session, privacy=serving.open_privacy(resolve(config).privacy, journal))
    state, second = next_round(again, serving.with_journal(again.privacy, others.state))
    assert set(first.asked) != set(second.asked)
    everybody = {*first.asked, *second.asked}
    assert {name: state.ledger.charges_of(name)[0].count for name in everybody} == dict.fromkeys(everybody, 1)
    assert serving.with_journal(again.privacy, others.state).ledger == state.ledger


@pytest.mark.parametrize("flat", [LOCAL, EXAMPLE])
def test_a_round_done_again_with_other_bits_is_charged_again(
    flat: dict[str, Any], make_config: Callable, open_run: Callable, tmp_path: Path
) -> None:
    """As on another device; the journal knows what came before the process was gone."""
    config, journal = make_config({**flat, "run.output": str(tmp_path)}), tmp_path / "server"
    run = open_run(config)
    session = replace(run.session, privacy=serving.open_privacy(resolve(config).privacy, journal))
    next_round(session, run.state)
    weight = run.holder(2).engine.base.model.get_input_embeddings().weight
    kept = weight.detach().clone()
    counts = []
    try:
        for share in (1.0, 1.01, 1.01):
            weight.copy_(kept * share)
            state, _ = next_round(session, serving.with_journal(session.privacy, run.state))
            counts.append(
                {
                    sum(charge.count for charge in sums) // session.privacy.plan.steps
                    for sums in state.ledger.accounts.values()
                }
            )
    finally:
        weight.copy_(kept)
    assert counts == [{1}, {2}, {2}]


def test_rows_of_one_draw_answered_twice_are_sampled_once(make_config: Callable, open_run: Callable) -> None:
    """A second attempt asks with the same coins; of another answer to it no amplification may be claimed."""
    config = make_config({**EXAMPLE, "federation.min-clients": 4, "federation.max-retries": 1})
    run = open_run(config)
    embedding = run.holder(2).engine.base.model.get_input_embeddings().weight
    kept, asked = embedding.detach().clone(), []

    def tamper(reply: Message) -> list[Message]:
        if reply.metadata.message_type == "train":
            asked.append(reply.metadata.src_node_id)
            if len(asked) == 4:  # the last answer of the first attempt is unreadable, so there is a second
                reply.content = RecordDict()
                embedding.copy_(kept * 1.01)
        return [reply]

    run.grid.tamper = tamper
    privacy = serving.open_privacy(resolve(config).privacy, None)
    try:
        state, record = next_round(replace(run.session, privacy=privacy), run.state)
    finally:
        embedding.copy_(kept)
    assert record.attempt == 2
    rates = {
        account: {charge.rate for charge in charges} for account, charges in state.ledger.accounts.items()
    }
    assert sum(1.0 in found for found in rates.values()) == 3  # those of whom both answers came
    assert all(min(found) < 1 for found in rates.values())


def test_a_failed_last_attempt_is_in_the_ledger(
    make_config: Callable, open_run: Callable, tmp_path: Path
) -> None:
    """The last attempt in the budget gets too few answers; those that came were released all the same."""
    two = gaussian_epsilon(math.sqrt(2) / 1.0, 1e-5)  # local: opposite updates are two clips apart
    flat = {**LOCAL, "privacy.epsilon": two * 1.01, "federation.min-clients": 4}
    config = four_rounds(flat, make_config, tmp_path)

    def tamper(reply: Any) -> list[Any]:
        if reply.metadata.message_type == "train" and seen and seen[-1].round_num == 1:
            reply.content = RecordDict()
        return [reply]

    seen: list[RoundRecord] = []
    state = run_federation(config, open_run(config, tamper=tamper).grid, Watch(record=seen.append))
    assert state.round_num == 1
    assert {sums[0].count for sums in state.ledger.accounts.values()} == {2}
    statement = json.loads((tmp_path / "run" / "privacy.json").read_text())
    assert two <= statement["epsilon"] <= two + 1e-4


def test_a_second_release_of_a_round_does_not_exceed_the_budget(
    make_config: Callable, open_run: Callable, tmp_path: Path
) -> None:
    one = gaussian_epsilon(0.5, 1e-5)
    config = make_config({**CLIENT, "privacy.epsilon": one * 1.01, "run.output": str(tmp_path)})
    run, fewer = open_run(config), open_run(config, absent=[3])
    session = replace(run.session, privacy=serving.open_privacy(resolve(config).privacy, tmp_path / "server"))
    next_round(session, run.state)
    again = replace(fewer.session, privacy=serving.open_privacy(resolve(config).privacy, tmp_path / "server"))
    state = serving.with_journal(again.privacy, fewer.state)
    with pytest.raises(BudgetSpentError, match="not released again"):
        next_round(again, state)


def test_clients_at_their_limit_are_not_asked_again(make_config: Callable, open_run: Callable) -> None:
    flat = {**CLIENT, "privacy.max-participations": 1, "federation.cohort": 2}
    run = open_run(make_config(flat))
    state, first = next_round(run.session, run.state)
    state, second = next_round(run.session, state)
    assert set(first.asked) | set(second.asked) == {"anna", "ben", "cleo", "dora"}
    with pytest.raises(BudgetSpentError, match="the adapter of round 2 is the result"):
        next_round(run.session, state)


def test_withheld_losses_are_not_asked_for(make_config: Callable, open_run: Callable) -> None:
    from strategies.exchange.evaluation import evaluate

    run = open_run(make_config(CLIENT))
    assert evaluate(run.session, run.state).shared == {}
    open_one = open_run(make_config({**CLIENT, "privacy.metrics": "held-out"}))
    assert len(evaluate(open_one.session, open_one.state).shared) == 4


def test_without_a_plan_there_is_no_ledger(make_config: Callable, open_run: Callable) -> None:
    run = open_run(make_config())
    state, record = next_round(run.session, run.state)
    assert run.session.privacy is None
    assert state.ledger == Ledger()
    assert record.privacy is None
    assert isinstance(state, ServerState)
