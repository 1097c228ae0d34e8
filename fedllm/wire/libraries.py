"""The libraries that a server and its nodes compute with: a node of another major version does not join.

The server names its versions in the question to join; of the node's own only the verdict leaves, as a code.
"""

from importlib.metadata import version

from flwr.app import ConfigRecord, RecordDict

from fedllm.errors import OtherVersionError

LIBRARIES = ("torch", "transformers")


def library_versions() -> ConfigRecord:
    """Return the version of each library on this machine."""
    return ConfigRecord({name: version(name) for name in LIBRARIES})


def check_libraries(question: RecordDict) -> None:
    """Refuse a server with another major version of a library; what it does not name is not compared.

    Raises:
        OtherVersionError: naming both versions.
    """
    theirs = question.config_records.get("libraries", ConfigRecord())
    for name in LIBRARIES:
        ours, other = version(name), str(theirs.get(name, ""))[:32]
        if other and other.partition(".")[0] != ours.partition(".")[0]:
            raise OtherVersionError(
                f"this machine has {name} {ours}, and the server {other!r}: install the same major version"
            )
