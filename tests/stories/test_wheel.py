"""The wheel, installed in an environment of its own, works from a folder that has our packages' names."""

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the programs of a new environment; what the wheel depends on is taken from this one."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    programs = folder / "bin"
    ours = sysconfig.get_path("purelib")
    (site,) = folder.glob("lib/python*/site-packages")
    command = [sys.executable, "-m", "pip", "--python", str(programs / "python"), "install", "--no-deps"]
    subprocess.run([*command, "--quiet", "--no-index", str(wheel)], check=True, env=_environment())
    # A plain path, after the wheel's own: an editable install of this checkout is not followed from there.
    (site / "dependencies.pth").write_text(ours + "\n")
    return programs


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """Return a folder with packages of its own that are named like ours and do not work."""
    for name in ("scripts", "clients", "strategies"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise ImportError('the wrong package')\n")
    return tmp_path


def _environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return {**kept, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def _run(folder: Path, *command: str) -> str:
    done = subprocess.run(
        command, cwd=folder, env=_environment(), capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_wheel_holds_what_a_user_runs(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    folders = {"/".join(name.split("/")[:2]) for name in names}
    assert {"scripts/cli.py", "scripts/commands", "scripts/recipes", "fedllm/__main__.py"} <= folders
    assert not folders & {"scripts/benchmarks", "scripts/experiments"}
    assert {"scripts/runtimes/pyproject.toml", "scripts/runtimes/LICENSE"} <= set(names)


@pytest.mark.parametrize("form", [("fedllm",), ("python", "-m", "fedllm")], ids=["program", "module"])
def test_wheel_says_its_version(form: tuple[str, ...], installed: Path, elsewhere: Path) -> None:
    program, *words = form
    told = _run(elsewhere, str(installed / program), *words, "--version")
    assert told == f"fedllm {version('fedllm')}\n"


def test_wheel_plans_a_run_next_to_the_users_packages(
    installed: Path, elsewhere: Path, tiny_run: list[str]
) -> None:
    told = _run(elsewhere, str(installed / "python"), "-m", "fedllm", "check", *tiny_run)
    assert "4 clients" in told


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("fedllm ev", "evaluate"),
        ("fedllm run key", "keyboard"),
        ("fedllm run train.local", "train.local-steps="),
    ],
)
def test_wheel_completes_words_in_a_shell(typed: str, offered: str, installed: Path, elsewhere: Path) -> None:
    words = {"COMP_WORDS": typed, "COMP_CWORD": str(len(typed.split()) - 1)}
    asked = {"_FEDLLM_COMPLETE": "complete_bash", **words}
    done = subprocess.run(
        [str(installed / "fedllm")],
        cwd=elsewhere,
        env={**_environment(), **asked},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.split() == [offered]
