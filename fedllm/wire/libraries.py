"""The libraries that a server and its nodes compute with: a node of another major version does not join.

The server names its versions in the question to join; of the node's own only the verdict leaves, as a code.
"""

from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

from fedllm.errors import OtherVersionError

LIBRARIES = ("torch", "transformers")


def library_versions() -> dict[str, str]:
    """Return the version of each library on this machine."""
    return {name: version(name) for name in LIBRARIES}


def check_libraries(theirs: Mapping[str, Any]) -> None:
    """Refuse a server that names another major version of a library; what it does not name is not compared.

    Raises:
        OtherVersionError: naming both versions.
    """
    for name in LIBRARIES:
        ours, other = version(name), str(theirs.get(name, ""))[:32]
        if other and other.partition(".")[0] != ours.partition(".")[0]:
            raise OtherVersionError(
                f"this machine has {name} {ours}, and the server {other!r}: install the same major version"
            )
