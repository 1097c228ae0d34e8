"""Whether this machine's policy lets an adapter be loaded: signed by whom, and how old it may be."""

from pathlib import Path

from fedllm.errors import PolicyError
from fedllm.files import SIGNATURE
from fedllm.signing.statement import read_statement
from fedllm.site_policy import load_policy


def check_trusted(folder: Path) -> None:
    """Refuse an adapter's folder that [adapters] of site.toml does not admit.

    Raises:
        PolicyError: it is not signed, or older than the policy asks for.
        IntegrityError: an unknown key has signed it, or a file was changed since.
        ConfigError: site.toml cannot be read.
    """
    policy = load_policy()
    adapters = policy.adapters
    if not adapters.signers:
        return
    if not (folder / SIGNATURE).exists():
        raise PolicyError(
            f"{folder}: not signed, as [adapters] signers of {policy.file} asks; get a signed copy, or sign"
            " your own with `fedllm sign`"
        )
    statement = read_statement(folder, adapters.signers)
    least = adapters.min_versions.get(statement.name, 0)
    if statement.version < least:
        raise PolicyError(
            f"{folder}: version {statement.version} of {statement.name}, and [adapters] min-versions of"
            f" {policy.file} asks for {least} or later"
        )
