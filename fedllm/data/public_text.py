"""The public texts that a distillation step trains on: anybody may read them."""

from dataclasses import dataclass

from fedllm.data.fields import Example


@dataclass(frozen=True)
class PublicText:
    """One public text, with the document it is from and the domain whose loss it counts in."""

    example: Example
    document: str
    domain: str
