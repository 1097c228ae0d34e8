"""A text that anybody may read, as a distillation step uses it."""

from dataclasses import dataclass

from fedllm.data.fields import Example


@dataclass(frozen=True)
class PublicText:
    """One public text: the document it belongs to, and the domain it counts in."""

    example: Example
    document: str
    domain: str
