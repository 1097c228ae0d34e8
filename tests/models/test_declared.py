"""What a base model's own card says of its licence and languages."""

from pathlib import Path

import pytest

from fedllm.models.declared import Declared, declared_by
from fedllm.models.files import EMBEDDED_HUB_ID, ModelFiles


@pytest.mark.parametrize(
    ("head", "declared"),
    [
        ("license: mit\nlanguage: [en, ko]", Declared("mit", ("en", "ko"))),
        ("language: en", Declared("", ("en",))),
        ("license: other\nlicense_name: llama3.2", Declared("llama3.2")),
        ("license: [mit]\nlanguage: [3, 'e\\n# n']", Declared()),  # not in the hub's form
        ("license: ]", Declared()),
        ("- a\n- b", Declared()),
    ],
)
def test_licence_and_languages_are_read_from_the_card(head: str, declared: Declared, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(f"---\n{head}\n---\n# A model\n")
    assert declared_by(ModelFiles(tmp_path, "org/model")) == declared


def test_a_model_without_a_card_declares_nothing(tmp_path: Path) -> None:
    assert declared_by(ModelFiles(tmp_path, "org/model")) == Declared()


def test_the_embedded_model_is_free_and_english() -> None:
    assert declared_by(ModelFiles(Path("absent"), EMBEDDED_HUB_ID)) == Declared("apache-2.0", ("en",))
