"""A setting of tiny runs: the suite's tiny model and a few rows of three domains."""

from collections.abc import Callable
from pathlib import Path

import pytest

from scripts.experiments.corpus import Corpus, grouped, write_rows
from scripts.studies.trials import Setting

HERE = Path(__file__).parent
WORDS = ("sum", "list", "file", "value", "error", "string", "number", "line", "index", "key", "name", "order")

TINY_FLAT = {
    "model.device": "cpu",
    "lora.rank": 2,
    "lora.alpha": 4.0,
    "lora.target-modules": "q_proj,v_proj",
    "federation.join-deadline": 60.0,
    "federation.num-rounds": 1,
    "train.local-steps": 2,
    "train.batch-size": 2,
    "train.max-length": 64,
    "train.learning-rate": 0.01,
    "data.max-held-out": 2,
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent == HERE:
            item.add_marker("research")


@pytest.fixture(scope="session")
def tiny_corpus() -> Corpus:
    """Three domains of twelve rows; those of the third have one of two labels as their answer."""
    rows = []
    for place, domain in enumerate(("code", "math", "news")):
        for number in range(12):
            first, second = WORDS[number], WORDS[(5 * number + place + 1) % 12]
            label = ("World", "Sports")[number % 2] if domain == "news" else ""
            response = label or f"Return the {first} of a {second}."
            rows.append(
                {"prompt": f"{domain} {number}?", "response": response, "domain": domain, "label": label}
            )
    return Corpus("tiny", tuple(rows))


@pytest.fixture(scope="session")
def tiny_setting(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_corpus: Corpus,
    make_model_folder: Callable[..., Path],
) -> Setting:
    """The setting of every tiny trial."""
    file = write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", grouped(tiny_corpus, (2, 3)))
    return Setting(str(make_model_folder()), str(file), TINY_FLAT, tiny_corpus.digest)
