"""`memorisation.json` of a run: what its adapter was found to repeat of its training text, with two controls.

`fedllm audit` measures it; the card, the signed statement and the gates of a registry read this one file. Of
each figure there are up to three, NAME, NAME_held_out and NAME_base: on rows that were trained on, on rows
that were not, and the first under the base model alone. Common phrases are repeated by any model, so a figure
means something only next to its controls.

    extraction        share of texts whose ending greedy decoding gives back token for token
    near_duplicates   share of texts whose ending it nearly repeats (`fedllm.originality.duplicates`)
    canary_exposure   bits by which planted canaries rank above those that stayed out
"""

import json
from collections.abc import Mapping
from pathlib import Path

from fedllm.errors import ConfigError
from fedllm.files import write_file
from fedllm.runs.folder import RESULT

MEMORISATION = "memorisation.json"


def write_memorisation(folder: Path, adapter: str, figures: Mapping[str, float]) -> None:
    """Keep the figures of an adapter, named by its digest, in the folder of its run. Raises OSError."""
    content = {"adapter": adapter, "figures": dict(figures)}
    write_file(folder / MEMORISATION, json.dumps(content, indent=1, allow_nan=False) + "\n")


def read_memorisation(folder: Path) -> dict[str, float]:
    """Return the figures of a run's adapter; {} where it was not audited since it was published.

    Raises:
        ConfigError: the file is damaged.
    """
    file = folder / MEMORISATION
    try:
        found = json.loads(file.read_text())
        published = json.loads((folder / RESULT).read_text())["digest"]
        figures = {str(name): float(value) for name, value in found["figures"].items()}
        return figures if found["adapter"] == published else {}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{file}: damaged ({type(error).__name__}); audit the run again") from None
