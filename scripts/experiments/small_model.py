"""A small language model made on the spot, for experiments with many runs: no network, a minute or two.

A Llama-shaped model of about a million parameters is trained on the docstrings of the packages that fedllm
needs anyway, and saved as an ordinary folder that `model.name` takes. Packages whose docstrings some clients
will hold are left out of it. A few documents are random letters of the world's scripts, so that text in
another than English is unlikely to the model but not unthinkable. The same versions of the packages and of
torch give the same model.

    python -m scripts.experiments small_model
"""

import ast
import hashlib
import json
import math
import random
import shutil
import sys
import tempfile
import unicodedata
import warnings
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from fedllm.data.demo_corpus import first_sentence
from fedllm.data.installed_packages import Package, installed_packages, source_files
from fedllm.errors import DataError, ModelError
from fedllm.files import cache_folder
from fedllm.models.files import quiet_transformers
from fedllm.seeds import derive_seed
from scripts.benchmarks.models import ASSISTANT, END, USER, byte_tokenizer

_MOST_BYTES_OF_FILE = 60_000  # longer ones are mostly tables
_HELD_OUT_EVERY = 20  # documents
_LETTER_DOCUMENTS, _LETTERS, _NEIGHBOURS = 600, 30, 500  # how many, of how many letters, from how near
_HELD_OUT_WINDOWS = 64
_CACHE_FORM = 1  # raise it where the same recipe no longer gives the same model


@dataclass(frozen=True)
class Recipe:
    """Everything that makes the model besides its text."""

    vocabulary: int = 2048
    width: int = 192
    inner: int = 512  # width of the feed-forward part
    layers: int = 2
    heads: int = 6
    steps: int = 900
    batch_size: int = 4  # windows of one step; few, for many steps teach more than large ones
    length: int = 160  # tokens of a window
    learning_rate: float = 3e-3
    chars_of_package: int = 30_000
    seed: int = 0


@dataclass(frozen=True)
class SmallModel:
    """The folder for `model.name`, and what its training gave; losses are nats per token."""

    folder: Path
    parameters: int
    trained_tokens: int
    held_out_loss: float
    uniform_loss: float  # of a model that knows nothing: log of the vocabulary


@dataclass(frozen=True)
class _Text:
    """The documents learnt from and those kept back."""

    train: tuple[str, ...]
    held_out: tuple[str, ...]

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of both parts."""
        whole = json.dumps([self.train, self.held_out]).encode()
        return hashlib.sha256(whole).hexdigest()


def small_model(recipe: Recipe, *, left_out: Collection[str] = ()) -> SmallModel:
    """Return the model of `recipe`, training it on first use on this machine.

    `left_out` names packages whose docstrings it must not have read.

    Raises:
        DataError: the installed packages have too few docstrings.
        ModelError: the model cache cannot be written.
    """
    text = _read_text(recipe, left_out)
    described = json.dumps([_CACHE_FORM, asdict(recipe), text.digest, torch.__version__])
    folder = cache_folder() / "experiments" / f"small-{hashlib.sha256(described.encode()).hexdigest()[:16]}"
    if not (folder / "training.json").is_file():
        _make(folder, recipe, text)
    return SmallModel(folder, **json.loads((folder / "training.json").read_text()))


def _make(folder: Path, recipe: Recipe, text: _Text) -> None:
    """Train and save the model aside, then rename: an interrupted run leaves nothing that looks finished."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        building = Path(tempfile.mkdtemp(prefix=".building-", dir=folder.parent))
    except OSError as error:
        raise ModelError(f"cannot write the model cache: {error.strerror}; set FEDLLM_CACHE") from None
    try:
        tokenizer = byte_tokenizer(text.train, recipe.vocabulary)
        tokenizer.save_pretrained(building)
        model, figures = _pretrain(recipe, _stream(tokenizer, text.train), _stream(tokenizer, text.held_out))
        with quiet_transformers():
            model.save_pretrained(building)
        (building / "training.json").write_text(json.dumps(figures) + "\n")
        with suppress(OSError):  # another process was first: its folder holds the same model
            building.rename(folder)
    finally:
        shutil.rmtree(building, ignore_errors=True)


# --- text ---------------------------------------------------------------------------------------------------


def _read_text(recipe: Recipe, left_out: Collection[str]) -> _Text:
    packages = [package for package in installed_packages() if package.name not in left_out]
    documents = [text for package in packages for text in _documents(package, recipe.chars_of_package)]
    documents = list(dict.fromkeys([*documents, *_letters(recipe.seed)]))
    train = tuple(text for index, text in enumerate(documents) if index % _HELD_OUT_EVERY)
    if sum(map(len, train)) < 100_000:
        raise DataError("the installed packages have too few docstrings; install fedllm's own dependencies")
    return _Text(train, tuple(documents[::_HELD_OUT_EVERY]))


def _documents(package: Package, most_chars: int) -> Iterator[str]:
    """Yield docstrings of a package: whole, and some of them as a question and its answer."""
    num_chars = 0
    for file in source_files(package):
        for name, docstring in _docstrings(file):
            yield docstring + END
            sentence = first_sentence(docstring)
            if sentence:
                yield f"{USER}What does {name} do?{END}{ASSISTANT}{sentence}{END}"
            num_chars += len(docstring)
            if num_chars > most_chars:
                return


def _letters(seed: int) -> Iterator[str]:
    """Yield documents of random letters, each from one neighbourhood of the Unicode table."""
    letters = [chr(code) for code in range(0x80, 0xE000) if unicodedata.category(chr(code)).startswith("L")]
    generator = random.Random(derive_seed(seed, "letters"))
    for _ in range(_LETTER_DOCUMENTS):
        begin = generator.randrange(len(letters) - _NEIGHBOURS)
        yield "".join(generator.choices(letters[begin : begin + _NEIGHBOURS], k=_LETTERS)) + END


def _docstrings(file: Path) -> list[tuple[str, str]]:
    """Return the (name, docstring) pairs of a file that can be parsed, in plain ASCII of some length."""
    try:
        if file.stat().st_size > _MOST_BYTES_OF_FILE:
            return []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # other people's invalid escapes
            module = ast.parse(file.read_bytes())
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
        return []
    found = []
    for node in ast.walk(module):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            docstring = ast.get_docstring(node) or ""
            if docstring.isascii() and len(docstring) >= 40:
                found.append((node.name, docstring))
    return found


def _stream(tokenizer: Any, documents: Sequence[str]) -> torch.Tensor:
    """Return the tokens [N] of all documents, one after the other."""
    rows = tokenizer(list(documents), add_special_tokens=False)["input_ids"]
    return torch.tensor([token for row in rows for token in row])


# --- training -----------------------------------------------------------------------------------------------


def _pretrain(
    recipe: Recipe, train_N: torch.Tensor, held_out_N: torch.Tensor
) -> tuple[Any, dict[str, float]]:
    """Return the trained model and the figures of `SmallModel`; on one thread, so that its bits repeat."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            model = _untrained(recipe)
            _train(model, recipe, train_N)
        figures = {
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "trained_tokens": recipe.steps * recipe.batch_size * recipe.length,
            "held_out_loss": _held_out_loss(model, recipe, held_out_N),
            "uniform_loss": math.log(recipe.vocabulary),
        }
    finally:
        torch.set_num_threads(num_threads)
    return model, figures


def _untrained(recipe: Recipe) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=recipe.vocabulary,
        hidden_size=recipe.width,
        intermediate_size=recipe.inner,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.heads,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=1,
    )
    return LlamaForCausalLM(config)


def _train(model: Any, recipe: Recipe, train_N: torch.Tensor) -> None:
    """Train on random windows of the stream: AdamW, a short warm-up, then a cosine to a tenth."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.95), weight_decay=0.1
    )
    warm_up = max(1, recipe.steps // 20)
    offsets_T = torch.arange(recipe.length)
    for step in range(recipe.steps):
        cosine = 0.55 + 0.45 * math.cos(math.pi * step / recipe.steps)
        optimizer.param_groups[0]["lr"] = recipe.learning_rate * min((step + 1) / warm_up, cosine)
        begin_B = torch.randint(len(train_N) - recipe.length, (recipe.batch_size,))
        windows_BT = train_N[begin_B[:, None] + offsets_T]
        model(input_ids=windows_BT, labels=windows_BT).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


@torch.inference_mode()
def _held_out_loss(model: Any, recipe: Recipe, held_out_N: torch.Tensor) -> float:
    """Return the mean loss over windows spread evenly through the documents kept back."""
    count = min(_HELD_OUT_WINDOWS, len(held_out_N) // recipe.length)
    begin = [index * (len(held_out_N) - recipe.length) // count for index in range(count)]
    windows = torch.stack([held_out_N[place : place + recipe.length] for place in begin])
    return float(model(input_ids=windows, labels=windows).loss)


@dataclass(frozen=True, kw_only=True)
class Options:
    """What can be asked for."""

    steps: Annotated[int, typer.Option(min=1, help="Of its training.")] = Recipe.steps


def main(options: Options) -> None:
    """Make the model and say where it is."""
    made = small_model(Recipe(steps=options.steps))
    sys.stdout.write(
        f"{made.folder}: {made.parameters:,} parameters, {made.trained_tokens:,} tokens,"
        f" held-out loss {made.held_out_loss:.3f} (knowing nothing: {made.uniform_loss:.3f})\n"
    )
