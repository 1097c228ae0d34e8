"""What Flower ships to every node is exactly the three rooms, and nothing that lies beside them."""

import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

from fedllm.config.run_config import RunConfig
from scripts.runtimes.processes import flower_environment

ROOT = Path(__file__).parents[2]


def test_bundle_holds_exactly_the_allowed_files(tmp_path):
    program = str(Path(sys.executable).with_name("flwr"))
    done = subprocess.run(
        [program, "build", "--app", str(ROOT)],
        cwd=tmp_path,
        env=flower_environment(tmp_path / "home"),
        capture_output=True,
        text=True,
        check=False,
    )
    bundles = list(tmp_path.glob("*.fab"))
    assert len(bundles) == 1, done.stdout + done.stderr
    with zipfile.ZipFile(bundles[0]) as bundle:
        found = {name for name in bundle.namelist() if not name.startswith(".info")}
    rooms = ("fedllm", "clients", "strategies")
    wanted = {path.relative_to(ROOT).as_posix() for room in rooms for path in (ROOT / room).rglob("*.py")}
    assert found == wanted | {"pyproject.toml", "LICENSE"}


def test_flower_keys_are_the_config_tree():
    nested = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"]
    flat = {}
    for key, value in nested.items():
        if isinstance(value, dict):
            flat.update({f"{key}.{leaf}": item for leaf, item in value.items()})
        else:
            flat[key] = value
    assert RunConfig.from_flat(flat) == RunConfig()
