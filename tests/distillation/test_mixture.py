"""The prediction of an ensemble, against distributions that are written down as tables."""

from itertools import product

import pytest
import torch

from fedllm.distillation.teacher import Mixing, mix

EXACT = {"rtol": 0, "atol": 1e-12}
VOCABULARY, LENGTH = 3, 4


def tables(number: int, seed: int, hole: bool = False) -> list[dict[tuple[int, ...], torch.Tensor]]:
    """Return clients as tables: history -> probabilities of the next token, some of them 0 with `hole`."""
    generator = torch.Generator().manual_seed(seed)
    clients = []
    for _ in range(number):
        table = {}
        for length in range(LENGTH):
            for history in product(range(VOCABULARY), repeat=length):
                probs = torch.rand(VOCABULARY, generator=generator, dtype=torch.float64) + 0.01
                if hole:
                    probs = probs * (torch.rand(VOCABULARY, generator=generator) > 0.3)
                    probs[int(torch.randint(VOCABULARY, (1,), generator=generator))] += 0.1
                table[history] = probs / probs.sum()
        clients.append(table)
    return clients


def joint(table: dict[tuple[int, ...], torch.Tensor], text: tuple[int, ...]) -> float:
    """Return the probability of a text's beginning."""
    probability = 1.0
    for place, token in enumerate(text):
        probability *= float(table[text[:place]][token])
    return probability


def pooled_probs(
    clients: list[dict[tuple[int, ...], torch.Tensor]], priors: torch.Tensor, history: tuple[int, ...]
) -> torch.Tensor:
    """Return the next-token probabilities of the pooled text by their definition, a ratio of joint ones."""
    together = [
        sum(
            float(prior) * joint(table, (*history, token))
            for prior, table in zip(priors, clients, strict=True)
        )
        for token in range(VOCABULARY)
    ]
    return torch.tensor(together, dtype=torch.float64) / sum(together)


def all_logits(clients: list[dict[tuple[int, ...], torch.Tensor]], text: tuple[int, ...]) -> torch.Tensor:
    """Return every client's logits [K, T, V] along a text; any constant may be added to those of a token."""
    probs = [[table[text[:place]] for place in range(len(text))] for table in clients]
    return torch.stack([torch.stack(row) for row in probs]).log() + 1.7


def posterior(
    log_probs: torch.Tensor, log_priors: torch.Tensor, temper: float = 1.0, floor: float = 0.0
) -> torch.Tensor:
    """Return the weights [T, K] along a row of its own."""
    nothing = torch.zeros(len(log_priors), dtype=torch.float64)
    return Mixing("posterior", log_priors, temper, floor).weights(log_probs, nothing)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("split", [0, 1, 3])
def test_the_posterior_mixture_is_the_model_of_the_pooled_text(seed: int, split: int) -> None:
    clients, priors = tables(4, seed), torch.tensor([0.1, 0.4, 0.2, 0.3], dtype=torch.float64)
    mixing = Mixing("posterior", priors.log())
    for text in product(range(VOCABULARY), repeat=LENGTH):
        logits, tokens = all_logits(clients, text), torch.tensor(text)
        evidence = torch.zeros(4, dtype=torch.float64)
        found = []
        for part in (slice(0, split), slice(split, LENGTH)):
            if part.stop > part.start:
                mixed = mix(logits[:, part].clone(), tokens[part], mixing, evidence)
                evidence = mixed.evidence_K
                found.append(mixed)
        probs = torch.cat([mixed.probs_TV for mixed in found])
        expected = torch.stack([pooled_probs(clients, priors, text[:place]) for place in range(LENGTH)])
        torch.testing.assert_close(probs, expected, **EXACT)
        said = torch.cat([mixed.log_probs_T for mixed in found])
        pooled = sum(float(p) * joint(table, text) for p, table in zip(priors, clients, strict=True))
        assert float(said.sum().exp()) == pytest.approx(pooled, rel=1e-12)


def whole_row_log_probs(
    clients: list[dict[tuple[int, ...], torch.Tensor]], text: tuple[int, ...]
) -> torch.Tensor:
    """Return what every client gives a whole text [K]."""
    return torch.tensor([joint(table, text) for table in clients], dtype=torch.float64).log()


@pytest.mark.parametrize("hole", [False, True])
def test_on_text_of_the_mixture_hindsight_teaches_the_same_on_average(hole: bool) -> None:
    """Mean over all texts, by their pooled chance, of what is taught after a history: the pooled model."""
    clients, priors = tables(3, 4, hole), torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    mixing = Mixing("posterior", priors.log(), hindsight=True)
    taught: dict[tuple[int, ...], torch.Tensor] = {}
    chances: dict[tuple[int, ...], float] = {}
    for text in product(range(VOCABULARY), repeat=LENGTH):
        chance = sum(float(p) * joint(table, text) for p, table in zip(priors, clients, strict=True))
        evidence = whole_row_log_probs(clients, text)
        if not chance:
            continue
        logits = all_logits(clients, text).clamp(min=-1e30)  # the engine's are finite
        mixed = mix(logits, torch.tensor(text), mixing, evidence)
        for place in range(LENGTH):
            history = text[:place]
            taught[history] = taught.get(history, 0) + chance * mixed.probs_TV[place]
            chances[history] = chances.get(history, 0.0) + chance
    for history, summed in taught.items():
        expected = pooled_probs(clients, priors, history)
        torch.testing.assert_close(summed / chances[history], expected, rtol=0, atol=1e-9)


def test_with_hindsight_an_answer_of_one_token_has_its_teacher() -> None:
    log_probs = torch.tensor([[0.9, 0.1]], dtype=torch.float64).log()  # T = 1, K = 2
    priors = torch.tensor([0.25, 0.75], dtype=torch.float64)
    back, whole = Mixing("posterior", priors.log()), Mixing("posterior", priors.log(), hindsight=True)
    nothing, evidence = torch.zeros(2, dtype=torch.float64), log_probs.sum(dim=0)
    torch.testing.assert_close(back.weights(log_probs, nothing)[0], priors, **EXACT)
    expected = torch.tensor([0.225, 0.075], dtype=torch.float64) / 0.3
    torch.testing.assert_close(whole.weights(log_probs, evidence)[0], expected, **EXACT)


def test_the_uniform_mixture_is_not_the_pooled_model() -> None:
    clients, priors = tables(2, 0), torch.full((2,), 0.5, dtype=torch.float64)
    text = (0, 1, 2, 0)
    mixed = mix(
        all_logits(clients, text),
        torch.tensor(text),
        Mixing("uniform", priors.log()),
        torch.zeros(2).double(),
    )
    assert float((mixed.probs_TV[3] - pooled_probs(clients, priors, text[:3])).abs().max()) > 1e-2
    torch.testing.assert_close(mixed.probs_TV[0], pooled_probs(clients, priors, ()), **EXACT)


def test_a_text_that_a_client_never_writes_takes_its_weight() -> None:
    clients, priors = tables(3, 5, hole=True), torch.ones(3, dtype=torch.float64)
    for text in product(range(VOCABULARY), repeat=LENGTH):
        chances = torch.tensor([[joint(table, text[:t]) for table in clients] for t in range(LENGTH)])
        log_probs = torch.stack(
            [torch.stack([table[text[:t]][text[t]] for table in clients]) for t in range(LENGTH)]
        ).log()
        weights = posterior(log_probs, priors.log())
        possible = chances.sum(dim=1) > 0
        expected = (chances / chances.sum(dim=1, keepdim=True)).double()
        expected[~possible] = 1 / 3  # impossible to all: the priors decide
        torch.testing.assert_close(weights, expected, rtol=0, atol=1e-6)
        assert bool((weights[(chances == 0) & possible[:, None]] == 0).all())


def test_weights_begin_with_the_priors_and_sum_to_one() -> None:
    log_probs = -10 * torch.rand(9, 3, dtype=torch.float64)
    priors = torch.tensor([1.0, 2.0, 5.0])
    weights = posterior(log_probs, priors.log())
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(9, dtype=torch.float64), **EXACT)
    torch.testing.assert_close(weights[0], priors.double() / 8, rtol=0, atol=1e-7)
    further = Mixing("posterior", priors.log()).weights(log_probs[5:], log_probs[:5].sum(dim=0))
    torch.testing.assert_close(weights[5:], further, **EXACT)


def test_a_weight_looks_at_no_token_that_it_helps_to_predict() -> None:
    log_probs = -10 * torch.rand(8, 3, dtype=torch.float64)
    changed = log_probs.clone()
    changed[5] -= torch.tensor([0.0, 3.0, 1.0], dtype=torch.float64)
    before, after = (posterior(values, torch.zeros(3)) for values in (log_probs, changed))
    assert torch.equal(before[:6], after[:6])
    assert not torch.allclose(before[6:], after[6:])


def test_equal_clients_keep_their_priors() -> None:
    log_probs = (-10 * torch.rand(40, 1, dtype=torch.float64)).expand(-1, 5)
    weights = posterior(log_probs, torch.zeros(5))
    torch.testing.assert_close(weights, torch.full((40, 5), 0.2, dtype=torch.float64), **EXACT)


def test_temper_scales_the_evidence_and_floor_deals_out_a_share() -> None:
    log_probs = -10 * torch.rand(7, 3, dtype=torch.float64)
    log_priors = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64).log()
    evidence = torch.cat([torch.zeros(1, 3), log_probs.cumsum(dim=0)[:-1]])
    for temper in (0.0, 0.3, 1.0, 2.0):
        expected = torch.softmax(log_priors + temper * evidence, dim=1)
        torch.testing.assert_close(posterior(log_probs, log_priors, temper), expected, **EXACT)
    floored = posterior(log_probs, log_priors, 1.0, 0.3)
    torch.testing.assert_close(floored, 0.7 * torch.softmax(log_priors + evidence, dim=1) + 0.1, **EXACT)


@pytest.mark.parametrize("kind", ["posterior", "uniform", "logit-mean"])
def test_a_teacher_left_out_is_as_one_that_was_never_there(kind: str) -> None:
    logits = torch.randn(3, 5, 11, dtype=torch.float64)
    tokens = torch.randint(11, (5,))
    log_priors = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64).log()
    all_three = Mixing(kind, log_priors, floor=0.1).without(torch.tensor([False, True, False]))
    kept = Mixing(kind, log_priors[[0, 2]], floor=0.1)
    found = mix(logits.clone(), tokens, all_three, torch.zeros(3, dtype=torch.float64))
    expected = mix(logits[[0, 2]].clone(), tokens, kept, torch.zeros(2, dtype=torch.float64))
    torch.testing.assert_close(found.probs_TV, expected.probs_TV, **EXACT)
    torch.testing.assert_close(found.log_probs_T, expected.log_probs_T, **EXACT)
    assert bool((found.weights_TK[:, 1] == 0).all())
