"""ULD: a teacher whose tokenizer is another one."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from fedllm.adapters.layout import initial_adapter
from fedllm.distillation.other_tokenizer import Pair, PairedTargets, SortedDistance, pair_text
from fedllm.distillation.student import StudentTraining, distil
from fedllm.distillation.teacher import Teacher, teach
from fedllm.engine.engine import Engine
from fedllm.errors import NoDataError
from fedllm.models.chat import Encoded

TEXTS = [
    "Return the sum of two numbers.",
    "Open a file and read its lines.",
    "Convert naïve strings to lower case letters.",
]


@pytest.fixture(scope="module")
def bytes_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A tokenizer that knows single bytes alone, with a start token of its own."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({"<s>": 0, **{c: n + 1 for n, c in enumerate(alphabet)}}, []))
    core.add_special_tokens(["<s>"])
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    folder: Path = tmp_path_factory.mktemp("bytes")
    PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<s>").save_pretrained(folder)
    return PreTrainedTokenizerFast.from_pretrained(folder)


@pytest.mark.parametrize("text", TEXTS)
def test_partners_are_predicted_after_the_very_same_text(
    text: str, load_tiny: Callable, bytes_tokenizer: Any
) -> None:
    tokenizer = load_tiny("llama", "float32").tokenizer
    pair = pair_text(text, tokenizer, bytes_tokenizer, 200)
    assert pair is not None
    assert len(pair.partners) == pair.student.num_supervised
    paired = 0
    for place, partner in enumerate(pair.partners):
        if partner >= 0:
            mine = tokenizer.decode(pair.student.tokens[: place + 1])
            theirs = bytes_tokenizer.decode(pair.teacher.tokens[: partner + 1], skip_special_tokens=True)
            assert mine == theirs
            assert "\ufffd" not in mine, "nothing is paired inside a character"
            paired += 1
    # A byte tokenizer has a boundary wherever the other one has, characters of two bytes apart.
    assert paired >= len(pair.partners) - 2


def test_no_token_is_paired_inside_a_character(bytes_tokenizer: Any) -> None:
    pair = pair_text("a\u00ef\u4e2db", bytes_tokenizer, bytes_tokenizer, 200)  # of 1, 2, 3 and 1 bytes
    assert pair is not None
    assert pair.partners == (0, 1, -1, 3, -1, -1, 6)
    cut = pair_text("a\u00ef\u4e2db", bytes_tokenizer, bytes_tokenizer, 6)
    assert cut is not None
    assert cut.partners == (0, 1, -1, 3, -1), "the last token kept ends inside a character"


def test_a_text_of_nothing_has_no_pair(load_tiny: Callable, bytes_tokenizer: Any) -> None:
    assert pair_text("", load_tiny("llama", "float32").tokenizer, bytes_tokenizer, 9) is None
    with pytest.raises(NoDataError):
        PairedTargets({}, None)  # type: ignore[arg-type]


def defined(logits: torch.Tensor, theirs: torch.Tensor, tokens: torch.Tensor, weight: float) -> torch.Tensor:
    """Return the paper's loss: cross-entropy and the distance of sorted probabilities, padded with zeros."""
    mine = logits.softmax(dim=1).sort(dim=1, descending=True).values
    theirs = theirs.sort(dim=1, descending=True).values
    size = max(mine.shape[1], theirs.shape[1])
    padded = [torch.nn.functional.pad(probs, (0, size - probs.shape[1])) for probs in (mine, theirs)]
    return cross_entropy(logits, tokens, reduction="none") + weight * (padded[0] - padded[1]).abs().sum(dim=1)


@pytest.mark.parametrize("their_size", [11, 30, 47])
def test_with_all_ranks_kept_it_is_the_papers_loss_and_gradient(their_size: int) -> None:
    logits = torch.randn(5, 30, dtype=torch.float64, requires_grad=True)
    theirs = torch.randn(5, their_size, dtype=torch.float64).softmax(dim=1)
    tokens = torch.randint(30, (5,))
    expected = defined(logits, theirs, tokens, 1.5)
    expected.sum().backward()
    kept = theirs.sort(dim=1, descending=True).values
    weights = torch.full((5,), 1.5, dtype=torch.float64)
    criterion = SortedDistance(tokens, kept, torch.zeros(5, 1, dtype=torch.float64), weights)
    losses, gradient = criterion(slice(0, 5), logits.detach().clone(), True)
    torch.testing.assert_close(losses, expected.detach(), rtol=0, atol=1e-12)
    torch.testing.assert_close(gradient, logits.grad, rtol=0, atol=1e-12)


def test_fewer_ranks_bound_it_below_and_no_partner_adds_none() -> None:
    logits = torch.randn(6, 30, dtype=torch.float64)
    theirs = torch.randn(6, 30, dtype=torch.float64).softmax(dim=1).sort(dim=1, descending=True).values
    tokens = torch.randint(30, (6,))
    weights = torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0, 0.0], dtype=torch.float64)
    last = torch.zeros(6, dtype=torch.float64)
    for number in (1, 5, 30):
        tail = theirs[:, number:].sum(dim=1, keepdim=True)
        losses, _ = SortedDistance(tokens, theirs[:, :number], tail, weights)(
            slice(0, 6), logits.clone(), False
        )
        assert bool((losses >= last - 1e-12).all())
        last = losses
    torch.testing.assert_close(last[:4], defined(logits, theirs, tokens, 1.0)[:4], rtol=0, atol=1e-12)
    alone = cross_entropy(logits, tokens, reduction="none")
    torch.testing.assert_close(last[4:], alone[4:], rtol=0, atol=1e-12)


def test_a_student_learns_from_a_teacher_of_another_vocabulary(
    make_engine: Callable, bytes_tokenizer: Any
) -> None:
    engine = make_engine("llama", "float32")
    large = make_engine("gpt2", "float32").base
    base = replace(large, tokenizer=bytes_tokenizer, fingerprint="b" * 64)
    layout = replace(make_engine("gpt2", "float32").layout, fingerprint="b" * 64)
    pairs = [pair_text(text, engine.base.tokenizer, bytes_tokenizer, 40) for text in TEXTS]
    found: list[Pair] = [pair for pair in pairs if pair is not None]
    teacher = Teacher((initial_adapter(layout, 0).vector,), layout, torch.ones(1))
    targets = teach(Engine(base, layout, token_budget=512), teacher, [p.teacher for p in found], top_k=16)
    training = StudentTraining(steps=30, batch_size=3, learning_rate=1e-2, seed=0)
    results = {}
    for weight in (0.0, 1.5):
        objective = PairedTargets({pair.student: pair for pair in found}, targets, weight)
        start = initial_adapter(engine.layout, 0)
        results[weight] = distil(engine, start, objective, training)
        assert results[weight].losses[-1] < results[weight].losses[0]

    def distance(weight: float) -> float:
        rows: list[Encoded] = [pair.student for pair in found]
        criterion = PairedTargets({p.student: p for p in found}, targets, 1.0).criterion(
            rows, torch.device("cpu")
        )
        states = engine.read(engine.layout, [results[weight].adapter.vector], rows)[0]
        logits = engine.passes.head.logits(states)
        whole = slice(0, len(logits))
        apart = criterion(whole, logits.clone(), False)[0]
        return float((apart - cross_entropy(logits, criterion.targets_N, reduction="none")).mean())

    assert distance(1.5) < distance(0.0)
