"""What a base model declares of itself besides its weights: its licence and its languages.

An adapter is a derived work, so whoever publishes one has to say under which terms its base model stands.
"""

import re
from dataclasses import dataclass

from fedllm.models.files import EMBEDDED_HUB_ID, ModelFiles

_WORD = re.compile(r"[\w.+-]{1,60}")  # a licence or a language as the hub writes it


@dataclass(frozen=True)
class Declared:
    """The hub's identifiers, such as apache-2.0 and en; empty where the model does not say."""

    licence: str = ""
    languages: tuple[str, ...] = ()


def declared_by(files: ModelFiles) -> Declared:
    """Return what the README.md next to a base model's weights declares; nothing where there is none."""
    if files.public_name == EMBEDDED_HUB_ID:  # its package brings no README; its GGUF file says the same
        return Declared("apache-2.0", ("en",))
    from huggingface_hub import ModelCard
    from yaml import YAMLError

    try:
        data = ModelCard((files.folder / "README.md").read_text(), ignore_metadata_errors=True).data
    except (OSError, ValueError, TypeError, YAMLError):  # absent, or not in the hub's form
        return Declared()
    # A licence of the model's own is called "other" there, and has its name in a field beside it.
    licence = data.get("license_name") if data.license == "other" else data.license
    languages = data.language if isinstance(data.language, list) else [data.language]
    return Declared(_word(licence), tuple(filter(None, map(_word, languages))))


def _word(value: object) -> str:
    return value if isinstance(value, str) and _WORD.fullmatch(value) else ""
