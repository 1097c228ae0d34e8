"""Families of models, tried one by one: what the engine computes, and what PEFT makes of the adapter.

docs/models.md lists them: `python -m tests.models.test_architectures` writes the table again.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel

from fedllm.adapters.folder import save_adapter
from fedllm.adapters.layout import AdapterState
from fedllm.adapters.peft_reading import names_for_peft
from fedllm.attacks.token_scores import no_adapter, score, whole
from fedllm.config.keys import LoraConfig
from fedllm.engine.engine import Engine
from fedllm.engine.jobs import Job
from fedllm.errors import ModelError
from fedllm.messages import LocalTraining
from fedllm.models.base import BaseModel, is_linear, layout_of
from fedllm.models.chat import Encoded
from tests.builders import random_texts
from tests.models.families import FAMILIES, tiny_model

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
BEGIN, END = (
    "<!-- families: written by tests/models/test_architectures.py -->\n",
    "<!-- end of families -->\n",
)
ROUNDING: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}
LENGTHS = (9, 14, 6)
TRAINING = LocalTraining(steps=1, batch_size=2, learning_rate=1e-2, weight_decay=0.0, clip_norm=0.0)


@dataclass(frozen=True)
class Finding:
    """What is written of a family."""

    model: str  # its class
    rows: str
    adapters: str


def rows_of(seed: int) -> list[Encoded]:
    """Return rows of random tokens, all learnt, of the same lengths for any seed."""
    return [whole([token % 90 + 5 for token in text]) for text in random_texts(LENGTHS, seed)]


def own_log_probs(model: Any, row: Encoded) -> torch.Tensor:
    """Return the log-probabilities of a row's tokens after the first by the model's own forward."""
    tokens = torch.tensor([row.tokens])
    with torch.no_grad():
        logits = model(input_ids=tokens).logits[0, :-1].double()
    return logits.log_softmax(dim=1).gather(1, tokens[0, 1:, None])[:, 0]


def together(engine: Engine, vector: torch.Tensor, rows: Sequence[Encoded]) -> list[torch.Tensor]:
    """Return the log-probabilities of all tokens of every row, as the engine feeds them."""
    (scores,) = score(engine, [vector], rows)
    return [each.log_probs for each in scores]


def check_rows(engine: Engine, vector: torch.Tensor) -> None:
    """Assert that a row is computed as transformers does it, and that nothing of a neighbour is in it."""
    rows, others = rows_of(1), rows_of(2)
    base = together(engine, no_adapter(engine), rows)
    for row, found in zip(rows, base, strict=True):
        torch.testing.assert_close(found, own_log_probs(engine.base.model, row), **ROUNDING)
    adapted = together(engine, vector, rows)
    assert max(float((a - b).abs().max()) for a, b in zip(adapted, base, strict=True)) > 1e-2
    for place, row in enumerate(rows):
        (alone,) = together(engine, vector, [row])
        elsewhere = together(engine, vector, [*others[:place], row, *others[place + 1 :]])[place]
        torch.testing.assert_close(adapted[place], alone, **ROUNDING)
        torch.testing.assert_close(elsewhere, adapted[place], rtol=1e-6, atol=1e-6)


def check_clients(engine: Engine, vector: torch.Tensor) -> None:
    """Assert that what a client trains and writes is its own, whoever is at work next to it."""
    rows = rows_of(3)
    jobs = [
        Job(name, scale * vector, (tuple(batch),), TRAINING)
        for name, scale, batch in (("a", 1.0, rows[:2]), ("b", 0.5, rows[2:]))
    ]
    for result, job in zip(engine.train(jobs), jobs, strict=True):
        (alone,) = engine.train([job])
        assert float(result.delta.abs().max()) > 1e-3
        # Adam's first step is the sign of a gradient: only where that is nearly zero can rounding turn it.
        assert float((result.delta - alone.delta).abs().gt(1e-3).double().mean()) < 0.01
        assert result.loss == pytest.approx(alone.loss, rel=1e-5)
    beginnings = [row.tokens for row in rows[:2]]

    def written(which: Sequence[Sequence[int]]) -> list[tuple[int, ...]]:
        vectors = [vector] * len(which)
        return engine.continue_rows(engine.layout, vectors, which, 4, lambda *given: given[-1].argmax(1))

    assert written(beginnings) == [only for beginning in beginnings for only in written([beginning])]


def check_published(engine: Engine, vector: torch.Tensor) -> None:
    """Assert that PEFT, which reads the adapter from its folder, computes what the engine does."""
    model, layout = engine.base.model, engine.layout
    expected = together(engine, vector, rows_of(1))
    names = names_for_peft(model, [matrix.module for matrix in layout.matrices])
    assert names is not None
    with TemporaryDirectory() as place:
        folder = Path(place) / "adapter"
        state = AdapterState(layout, vector)
        save_adapter(folder, state, base_model="", revision="", target_modules=names, card="")
        read = PeftModel.from_pretrained(model, str(folder))
    for row, found in zip(rows_of(1), expected, strict=True):
        torch.testing.assert_close(own_log_probs(read, row), found, **ROUNDING)


@cache
def finding(family: str) -> Finding:
    """Return what is found of a family, after all that must hold of it."""
    model = tiny_model(family)
    kind = type(model).__name__
    tokenizer = SimpleNamespace(eos_token_id=0)
    base = BaseModel(model, tokenizer, None, "f" * 64, torch.device("cpu"), torch.float32)  # type: ignore[arg-type]
    try:
        layout = layout_of(model, LoraConfig(rank=2, alpha=4.0), base.fingerprint)
        engine = Engine(base, layout)
    except ModelError as error:  # "KIND is not causal: why"
        return Finding(kind, "refused: " + str(error).partition(" is ")[2].partition(":")[0], "")
    linear = {_kind(name) for name, module in model.base_model.named_modules() if is_linear(module)}
    vector = 0.1 * torch.randn(layout.size, generator=torch.Generator().manual_seed(0))
    check_rows(engine, vector)
    check_clients(engine, vector)
    check_published(engine, vector)
    left_out = sorted(linear - {_kind(matrix.module) for matrix in layout.matrices} - {"lm_head"})
    rows = "share a pass" if engine.is_ragged else "one by one"
    return Finding(kind, rows, "all but " + ", ".join(left_out) if left_out else "all linear layers")


def _kind(name: str) -> str:
    return name.rpartition(".")[2]


def line_of(family: str) -> str:
    """Return the line of a family in the table."""
    found = finding(family)
    return f"| {family} | `{found.model}` | {found.rows} | {found.adapters} |"


def table() -> str:
    """Return the table of all families."""
    head = "| family | model of transformers | rows of a step | adapters |\n|---|---|---|---|\n"
    return head + "\n".join(map(line_of, FAMILIES)) + "\n"


# One of each kind; the others are tried by the soak.
ALWAYS = {
    "llama",
    "qwen2",
    "qwen3",
    "gemma3_text",
    "mistral",
    "mixtral",
    "phi3",
    "gpt2",
    "gpt_oss",
    "mamba",
    "bert",
}


@pytest.mark.parametrize(
    "family",
    [pytest.param(name, marks=[pytest.mark.soak] * (name not in ALWAYS)) for name in FAMILIES],
)
@pytest.mark.filterwarnings("ignore")  # PEFT's and transformers' own, about what some families lack
def test_family_is_as_the_models_page_says(family: str) -> None:
    assert line_of(family) in PAGE.read_text().splitlines()


def test_models_page_lists_these_families_and_no_other() -> None:
    listed = PAGE.read_text().partition(BEGIN)[2].partition(END)[0].splitlines()[2:]
    assert [line.split(" | ")[0].removeprefix("| ") for line in listed] == list(FAMILIES)


if __name__ == "__main__":
    before, _, rest = PAGE.read_text().partition(BEGIN)
    PAGE.write_text(before + BEGIN + table() + END + rest.partition(END)[2])
