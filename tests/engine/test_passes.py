"""What others build on the engine's passes: states, continuations, objectives and the losses of steps."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import pytest
import torch

from fedllm.adapters.layout import AdapterState
from fedllm.data.fields import Turn
from fedllm.engine.generate import end_tokens
from fedllm.engine.head import CrossEntropy
from fedllm.engine.jobs import EvaluationJob
from fedllm.models.chat import IGNORED, Encoded, chat_text

KINDS = ["llama", "gpt2", "gemma3", "gemma2"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_states_give_the_losses_that_adapters_are_evaluated_to(
    kind: str, make_engine: Callable, make_rows: Callable
) -> None:
    engine, rows = make_engine(kind), make_rows([12, 3, 20, 7])
    vectors = [0.2 * torch.randn(engine.layout.size) for _ in range(3)]
    states = engine.read(engine.layout, vectors, rows)
    tokens = torch.tensor([label for row in rows for label in row.labels[1:] if label != IGNORED])
    assert states.shape[:2] == (3, len(tokens))
    logits = engine.passes.head.logits(states)
    found = -logits.log_softmax(dim=2).gather(2, tokens.expand(3, -1)[..., None])[..., 0].mean(dim=1)
    measured = engine.evaluate([EvaluationJob("a", vector, rows) for vector in vectors])
    expected = torch.tensor([each.loss for each in measured], dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    assert float((expected[0] - expected[1]).abs()) > 1e-4


def test_the_likeliest_continuations_are_the_greedy_answers(make_engine: Callable) -> None:
    engine = make_engine("llama", "float32")
    states = [AdapterState(engine.layout, 0.5 * torch.randn(engine.layout.size)) for _ in range(2)]
    prompts = ["Return the sum of two numbers.", "Open a file.", "Sort the list in place and return it."]
    owners = [states[0], states[1], states[0]]
    tokenizer = engine.base.tokenizer
    texts = [chat_text(tokenizer, [Turn("user", prompt)], prompt_answer=True) for prompt in prompts]
    beginnings = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    continued = engine.continue_rows(
        engine.layout,
        [state.vector for state in owners],
        beginnings,
        12,
        lambda _rows, _step, logits: logits.argmax(dim=1),
    )
    answers = [tokenizer.decode(tokens, skip_special_tokens=True).strip() for tokens in continued]
    assert answers == engine.generate(owners, prompts, 12)
    for tokens in continued:
        assert not end_tokens(engine.base) & set(tokens[:-1])


@dataclass(frozen=True)
class Shifted:
    """Asks for the token after the one that is learnt, so that a job with it is another job."""

    def criterion(self, rows: Sequence[Encoded], device: torch.device) -> CrossEntropy:
        tokens = [(label + 1) % 300 for row in rows for label in row.labels[1:] if label != IGNORED]
        return CrossEntropy(torch.tensor(tokens, device=device))


def test_objective_is_asked_for_learnt_tokens_in_order(make_engine: Callable, make_job: Callable) -> None:
    engine = make_engine("llama")
    job = make_job(engine.layout)
    shifted = tuple(
        tuple(
            replace(
                row, labels=tuple(label if label == IGNORED else (label + 1) % 300 for label in row.labels)
            )
            for row in batch
        )
        for batch in job.batches
    )
    (expected,) = engine.train([replace(job, batches=shifted)])
    (found,) = engine.train([replace(job, objective=Shifted())])
    torch.testing.assert_close(found.delta, expected.delta, rtol=0, atol=1e-12)
    assert found.losses == pytest.approx(expected.losses)


def test_a_results_loss_is_the_mean_of_its_steps(make_engine: Callable, make_job: Callable) -> None:
    engine = make_engine("llama", "float32")
    long, short = make_job(engine.layout, "a", 0, steps=5), make_job(engine.layout, "b", 1, steps=2)
    for job, result in zip((short, long), engine.train([short, long]), strict=True):
        assert len(result.losses) == job.training.steps
        assert result.loss == pytest.approx(sum(result.losses) / len(result.losses))
