"""Who may know whom, and what no code here may do."""

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
PACKAGES = ("fedllm", "clients", "strategies", "scripts")
FILES = [file for package in PACKAGES for file in sorted((ROOT / package).rglob("*.py"))]
FLOWER = ("flwr", "ray")
# Where values become Flower records.
RECORDS = (
    *(
        "digests",
        "encrypted",
        "joining",
        "leaving",
        "masks",
        "overlaps",
        "packets",
        "refusals",
        "replies",
        "shared",
        "requests",
    ),
    "stock",
)
FORBIDDEN = {
    "fedllm": ("clients", "strategies", "scripts", *FLOWER),
    "clients": ("strategies", "scripts"),
    "strategies": ("clients", "scripts"),
    "scripts": (),
}


def imports_of(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            yield str(node.module)


@pytest.mark.parametrize("package", PACKAGES)
def test_no_package_imports_what_it_may_not_know(package: str) -> None:
    for file in (ROOT / package).rglob("*.py"):
        found = {name.partition(".")[0] for name in imports_of(file)} & set(FORBIDDEN[package])
        is_record = file.parent == ROOT / "fedllm" / "wire" and file.stem in RECORDS
        allowed = {"flwr"} if is_record else set()
        assert found <= allowed, f"{file} imports {found - allowed}"


def test_the_import_contracts_of_pyproject_hold() -> None:
    lint = str(Path(sys.executable).with_name("lint-imports"))
    done = subprocess.run([lint, "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 broken" in done.stdout


def test_what_the_wheel_imports_is_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [each for extra in project["optional-dependencies"].values() for each in extra]
    named_otherwise = {"mlflow"}  # mlflow-skinny
    declared = named_otherwise | {
        Requirement(each).name.replace("-", "_") for each in [*project["dependencies"], *extras]
    }
    ours = [file for file in FILES if not {"benchmarks", "experiments"} & set(file.parts)]
    found = {name.partition(".")[0] for file in ours for name in imports_of(file)}
    other_names = {"yaml"} if "pyyaml" in declared else set()
    assert found - sys.stdlib_module_names - set(PACKAGES) - other_names <= declared


def test_nothing_unpickles_or_trusts_remote_code_by_itself() -> None:
    assert len(FILES) > 50
    for file in FILES:
        names = set(imports_of(file))
        assert not names & {"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}, file
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                assert ast.unparse(node.func) not in {"torch.load", "pickle.load", "np.load", "numpy.load"}, (
                    file
                )
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in {"eval", "exec"}, file
            if isinstance(node, ast.keyword):
                constant = node.value.value if isinstance(node.value, ast.Constant) else None
                assert node.arg not in {"trust_remote_code", "allow_pickle"} or constant in (None, False), (
                    file
                )
            if isinstance(node, ast.Dict):
                pairs = dict(zip(map(_constant, node.keys), map(_constant, node.values), strict=True))
                assert pairs.get("trust_remote_code") is not True, file


def _constant(node: ast.AST | None) -> object:
    return node.value if isinstance(node, ast.Constant) else None


def test_models_come_from_safetensors_or_gguf_only() -> None:
    calls = [
        ast.unparse(node)
        for file in (ROOT / "fedllm").rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "AutoModelForCausalLM.from_pretrained"
    ]
    assert len(calls) == 2
    assert ["use_safetensors=True" in call for call in calls].count(True) == 1


def test_broad_excepts_stand_in_six_places() -> None:
    broad = [
        file.relative_to(ROOT).as_posix()
        for file in FILES
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.ExceptHandler)
        and (node.type is None or ast.unparse(node.type) in {"Exception", "BaseException"})
    ]
    # A node answers for whatever happens; the tokenizers library raises Exception itself for a damaged file,
    # and what is none where it panics. A kernel that is tried may fail in any way that its compiler, the
    # driver or the model's code finds: then the slower way is taken. A tracker's package may raise anything.
    assert sorted(broad) == [
        "clients/answering.py",
        "fedllm/engine/decoder_probe.py",
        "fedllm/engine/device_trial.py",
        "fedllm/models/base.py",
        "fedllm/models/panics.py",
        "strategies/tracking.py",
    ]
