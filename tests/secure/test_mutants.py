"""Mistakes that would give a vector away or spoil the sum, each caught by a law."""

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from fedllm.secure import masking, parties
from fedllm.secure.agreement import add_mask
from tests.secure.secret_sums import secret_sum
from tests.secure.test_masking import opened_seeds


def mutant(module: ModuleType, folder: Path, *changes: tuple[str, str]) -> ModuleType:
    text = Path(str(module.__file__)).read_text()
    for right, wrong in changes:
        assert text.count(right) == 1, right
        text = text.replace(right, wrong)
    file = folder / "mutant.py"
    file.write_text(text)
    spec = importlib.util.spec_from_file_location(f"mutant_{folder.name}", file)
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, made.__name__, made)  # dataclasses look it up
        spec.loader.exec_module(made)
    return made


def sum_is_plain(code: ModuleType) -> bool:
    found = secret_sum(3, code=code)
    answered = found.exchange.names[:2]
    return np.array_equal(found.unmasked(answered, answered), found.plain_sum(answered))


def late_vector_is_hidden(code: ModuleType) -> bool:
    """A party counted as lost, whose masks with all others were opened, answers after all."""
    found = secret_sum(3, code=code)
    late, answered = found.exchange.names[2], found.exchange.names[:2]
    words = found.words(late)
    for dealer in answered:
        add_mask(words, opened_seeds(found, dealer, answered)[2], 1)
    return not np.array_equal(words % 2**24, found.vectors[late])


def answered_vector_is_hidden(code: ModuleType) -> bool:
    """All that is opened of a party that answered is taken off its words."""
    found = secret_sum(3, code=code)
    words = found.words("site-0")
    for seed in opened_seeds(found, "site-0", found.exchange.names):
        add_mask(words, seed, -1)  # site-0 is first, so it added all its masks
    return not np.array_equal(words % 2**24, found.vectors["site-0"])


def attempts_have_own_labels(code: ModuleType) -> bool:
    return code.label_of("run", "plan", 1, 0, bytes(16)) != code.label_of("run", "plan", 1, 1, bytes(16))


MASKING_LAWS = (sum_is_plain, late_vector_is_hidden, answered_vector_is_hidden)
SIGN = ("return 1 if place <= other else -1", "return 1")
NO_OWN_MASK = (
    ("for other, seed in enumerate(seeds)])", "for other, seed in enumerate(seeds) if other != place])"),
    ("        if is_open[other]\n", "        if is_open[other] and exchange.names[other] != dealer\n"),
)
BOTH_OPENED = ("rows += [piece if is_open[place] else hashes[place] for", "rows += [piece for")


@pytest.mark.parametrize("law", MASKING_LAWS)
def test_the_code_keeps_every_law(law: Callable[[ModuleType], bool]) -> None:
    assert law(masking)


@pytest.mark.parametrize(
    ("changes", "law"),
    [
        ((SIGN,), sum_is_plain),
        (NO_OWN_MASK, late_vector_is_hidden),
        ((BOTH_OPENED,), answered_vector_is_hidden),
    ],
    ids=["wrong sign", "own mask missing", "unmasked twice"],
)
def test_a_mutant_breaks_its_law(
    tmp_path: Path, changes: tuple[tuple[str, str], ...], law: Callable[[ModuleType], bool]
) -> None:
    assert not law(mutant(masking, tmp_path, *changes))


def test_a_label_without_its_attempt_is_caught(tmp_path: Path) -> None:
    assert attempts_have_own_labels(parties)
    assert not attempts_have_own_labels(mutant(parties, tmp_path, ('"attempt": attempt', '"attempt": 0')))
