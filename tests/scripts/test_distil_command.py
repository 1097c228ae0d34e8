"""`fedllm distil`: each kind of student learns from its teacher, and can be loaded again."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from fedllm.adapters.folder import load_adapter, save_adapter
from fedllm.adapters.layout import AdapterState, initial_adapter
from fedllm.config.keys import LoraConfig, ModelConfig
from fedllm.data.fields import Fields, to_example
from fedllm.models.base import layout_of, load_base
from fedllm.models.chat import encode
from scripts import cli
from scripts.benchmarks.models import byte_tokenizer

VERBS = ("Return", "Open", "Sort", "Raise", "Convert", "Read", "Count", "Close")
NOUNS = ("the list", "a file", "two numbers", "the string", "an error", "the value")
FEW = ("--steps", "12", "--learning-rate", "0.02", "--batch-size", "4", "--rank", "4", "--device", "cpu")


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty-eight questions with their answers."""
    file = tmp_path_factory.mktemp("text") / "rows.jsonl"
    rows = [
        {"prompt": f"def {verb.lower()}{place}({noun[-4:]})", "response": f"{verb} {noun} {place} times."}
        for place, (verb, noun) in enumerate((verb, noun) for verb in VERBS for noun in NOUNS)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture(scope="session")
def deep(
    text: Path, make_model_folder: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A Llama of five layers that has learnt the text."""
    tiny = make_model_folder()
    folder = tmp_path_factory.mktemp("deep")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny)
    tokenizer.save_pretrained(folder)
    config = transformers.AutoConfig.from_pretrained(tiny)
    config.num_hidden_layers = 5
    transformers.set_seed(3)
    model = transformers.LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    fields = Fields(prompt="prompt", response="response")
    examples = [to_example(json.loads(line), fields) for line in text.read_text().splitlines()]
    for example in 2 * examples:
        row = encode(example, tokenizer, 256)
        assert row is not None
        tokens = torch.tensor([row.tokens])
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def foreign(deep: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with a tokenizer of its own."""
    folder = tmp_path_factory.mktemp("foreign")
    tokenizer = byte_tokenizer([f"{verb} {noun}." for verb in VERBS for noun in NOUNS], 300)
    tokenizer.save_pretrained(folder)
    config = transformers.AutoConfig.from_pretrained(deep)
    config.num_hidden_layers, config.vocab_size = 2, len(tokenizer)
    transformers.set_seed(5)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def distil(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], text: Path) -> Callable:
    """Return a function (teacher, student, out, *words) -> exit code, stdout, stderr."""

    def run(teacher: Path, student: object, out: Path, *words: str) -> tuple[int, str, str]:
        given = ["--student", str(student), "--text", str(text), "--out", str(out), *FEW, *words]
        monkeypatch.setattr(sys, "argv", ["fedllm", "distil", str(teacher), *given])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        printed = capsys.readouterr()
        return int(ended.value.code or 0), printed.out, printed.err

    return run


def _report(answer: tuple[int, str, str]) -> dict[str, Any]:
    code, out, err = answer
    assert code == 0, err
    report: dict[str, Any] = json.loads(out)
    return report


def test_smaller_model_learns_an_adapter(
    distil: Callable, deep: Path, make_model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    report = _report(distil(deep, make_model_folder(), tmp_path / "student", "--json"))
    assert report["form"] == "same tokenizer"
    assert report["held_out"]["after"] < report["held_out"]["before"]
    adapter = load_adapter(tmp_path / "student").state  # checks the manifest
    assert adapter.layout.rank == 4
    assert float(adapter.vector.abs().max()) > 0


def test_student_is_corrected_on_its_own_texts(
    distil: Callable, deep: Path, make_model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    words = ("--json", "--max-tokens", "24")
    plain = _report(distil(deep, make_model_folder(), tmp_path / "plain", *words))
    corrected = _report(distil(deep, make_model_folder(), tmp_path / "more", *words, "--on-policy", "1"))
    assert corrected["held_out"]["after"] != plain["held_out"]["after"]
    assert corrected["held_out"]["before"] == plain["held_out"]["before"]


def test_model_with_another_tokenizer_learns_an_adapter(
    distil: Callable, deep: Path, foreign: Path, tmp_path: Path
) -> None:
    report = _report(distil(deep, foreign, tmp_path / "student", "--json"))
    assert (report["form"], report["unit"]) == ("other tokenizer", "nats per character")
    assert report["held_out"]["after"] < report["held_out"]["before"]
    assert load_adapter(tmp_path / "student").state.layout.rank == 4


def test_student_is_cut_from_its_teacher_and_loads(distil: Callable, deep: Path, tmp_path: Path) -> None:
    report = _report(distil(deep, "layers=3", tmp_path / "student", "--json"))
    assert len(report["layers"]) == 3
    assert report["layers"][0] == 0
    assert report["layers"][-2:] == [3, 4]
    assert report["held_out"]["after"] < report["held_out"]["before"]
    student = load_base(ModelConfig(name=str(tmp_path / "student"), device="cpu"))
    assert student.model.config.num_hidden_layers == 3
    assert "Distilled by fedllm" in (tmp_path / "student" / "README.md").read_text()


def test_adapter_of_the_teacher_is_what_it_teaches(
    distil: Callable, deep: Path, make_model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    base = load_base(ModelConfig(name=str(deep), device="cpu"))
    layout = layout_of(base.model, LoraConfig(rank=2), base.fingerprint)
    start = initial_adapter(layout, 0)
    run = tmp_path / "run"
    (run / "adapter").parent.mkdir()
    save_adapter(
        run / "adapter",
        AdapterState(layout, start.vector + 0.1),
        base_model="deep",
        revision="",
        target_modules=["q_proj"],
        card="",
    )
    (run / "config.toml").write_text(f'[model]\nname = "{deep}"\ndevice = "cpu"\n[lora]\nrank = 2\n')
    tuned, bare = (
        _report(distil(teacher, make_model_folder(), tmp_path / f"of-{teacher.name}", "--json"))
        for teacher in (run, deep)
    )
    assert tuned["held_out"]["teacher"] != bare["held_out"]["teacher"]
    assert tuned["held_out"]["before"] == bare["held_out"]["before"]
    assert tuned["held_out"]["after"] != bare["held_out"]["after"]


def test_person_reads_losses_and_the_folder(distil: Callable, deep: Path, tmp_path: Path) -> None:
    code, out, _ = distil(deep, "layers=4", tmp_path / "student")
    assert code == 0
    assert "held-out loss (nats per token): teacher " in out
    assert "student: " in out


@pytest.mark.parametrize(
    ("student", "words", "named"),
    [
        ("layers=two", (), "--student layers=two"),
        ("layers=5", (), "--student layers=5"),
        ("layers=1", (), "layers"),
        ("layers=3", ("--on-policy", "1"), "--on-policy"),
        ("no/such-folder/here", (), "no/such-folder/here"),
        ("layers=3", ("--text", "nowhere.jsonl"), "--text"),
        ("layers=3", ("--learning-rate", "0"), "learning rate"),
    ],
)
def test_what_cannot_be_distilled_is_one_line(
    student: str, words: tuple[str, ...], named: str, distil: Callable, deep: Path, tmp_path: Path
) -> None:
    code, _, err = distil(deep, student, tmp_path / "student", *words)
    assert code == 2
    (line,) = err.strip().splitlines()
    assert named in line
    assert not (tmp_path / "student").exists()


def test_other_tokenizer_has_no_on_policy_rounds(
    distil: Callable, deep: Path, foreign: Path, tmp_path: Path
) -> None:
    code, _, err = distil(deep, foreign, tmp_path / "student", "--on-policy", "2")
    assert code == 2
    assert "--on-policy" in err


def test_folder_that_holds_something_is_kept(distil: Callable, deep: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("all of it")
    code, _, err = distil(deep, "layers=3", tmp_path)
    assert code == 2
    assert "--out" in err
    assert (tmp_path / "thesis.txt").read_text() == "all of it"
