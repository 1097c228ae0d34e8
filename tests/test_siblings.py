"""Our own packages are found by where they lie, and a program around them keeps its own of the same names."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def told_by(code: str, folder: Path) -> str:
    """Return what a program prints that runs in `folder`, and finds its packages there first."""
    environment = {**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_import_alone_loads_nothing_heavy(tmp_path: Path) -> None:
    code = "import sys, fedllm; print({'torch', 'flwr', 'scripts', 'fedllm.api'} & set(sys.modules))"
    assert told_by(code, tmp_path) == "set()\n"


def test_a_program_keeps_packages_of_the_same_names(tmp_path: Path) -> None:
    for name in ("scripts", "clients"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(f"OWNER = 'mine, {name}'\n")
        (tmp_path / name / "later.py").write_text("WORD = 'later'\n")
    code = """if True:
    import sys, scripts
    from fedllm.siblings import own_packages
    def ours():
        with own_packages():
            import scripts.terminal
            return scripts.terminal
    first = ours()
    import clients, scripts.later
    print(scripts.OWNER, clients.OWNER, scripts.later.WORD, "strategies" in sys.modules)
    print(ours() is first, first.__file__)
    """
    here = ROOT / "scripts" / "terminal.py"
    assert told_by(code, tmp_path) == f"mine, scripts mine, clients later False\nTrue {here}\n"


def test_where_no_other_has_the_names_they_stay_imported(tmp_path: Path) -> None:
    code = """if True:
    import sys
    from fedllm.siblings import own_packages
    with own_packages():
        import scripts
    print(sys.modules["scripts"] is scripts)
    """
    assert told_by(code, tmp_path) == "True\n"
