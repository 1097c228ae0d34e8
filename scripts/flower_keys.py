"""Write every configuration key with its default into `[tool.flwr.app.config]` of pyproject.toml.

Flower accepts an override only for a key that stands there. Run `python -m scripts.flower_keys` after a
change of `fedllm/config/keys.py`.
"""

from pathlib import Path

import tomli_w

from fedllm.config.run_config import RunConfig

PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"
HEADER = "[tool.flwr.app.config]\n"


def keys_section() -> str:
    """Return the lines that belong under the header, one dotted key each."""
    lines = []
    for key, value in RunConfig().to_flat().items():
        text = tomli_w.dumps({"value": value}).partition("=")[2].strip()
        lines.append(f"{key} = {text}\n")
    return "".join(lines)


def with_keys(pyproject: str) -> str:
    """Return the text of pyproject.toml with the keys as they should be; they are its last section."""
    return pyproject[: pyproject.index(HEADER) + len(HEADER)] + keys_section()


if __name__ == "__main__":
    PYPROJECT.write_text(with_keys(PYPROJECT.read_text()))
