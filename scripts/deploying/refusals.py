"""Why a SuperNode has ended, in one line: what Flower prints of it fills ten and names no cure."""

import re

_CAUSES = (
    (
        r"\[code: 2004\]",
        "the SuperLink admits no such node: its key is not registered there (`fedllm keys admit`), or another"
        " node with this key lives, or was killed less than a minute ago",
    ),
    (r"\[code: 2001\]", "the SuperLink wants a node's key: `fedllm keys node` makes one"),
    (
        r"certificate verify failed: (unable to get (local )?issuer|self[- ]signed)",
        "the server's certificate is not signed by the authority that this node trusts; another server"
        " answers there, or root-certificates is the file of another federation",
    ),
    (
        r"certificate verify failed: certificate has expired",
        "the server's certificate has expired; who runs the server renews it by `fedllm keys server`",
    ),
    (r"certificate verify failed: certificate is not yet valid", "this machine's clock is behind"),
    (
        r"certificate verify failed: (Hostname|IP address) mismatch",
        "the server's certificate does not hold the address by which this node reaches it;"
        " `fedllm keys server` makes one that does",
    ),
    (
        # Flower says nothing else of a signature that the SuperLink does not believe.
        r"(?s)\A(?!.*SuperNode ID:).*terminated gracefully",
        "the SuperLink does not believe this node's signature: the clocks of both machines must agree within"
        " five minutes",
    ),
    (r"[Aa]ddress already in use", "its port is taken; another node of this machine runs already"),
    (r"WRONG_VERSION_NUMBER|record layer failure", "the server speaks no TLS on that port"),
    (
        r"Name or service not known|Temporary failure in name resolution",
        "the server's name is not known here",
    ),
)


def why_a_node_ended(log: str) -> str:
    """Return in one line what a SuperNode's output says of its last end; else its last error, else ""."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", log).rpartition("Starting Flower SuperNode")[2]
    for pattern, cause in _CAUSES:
        if re.search(pattern, plain):
            return cause
    errors = re.findall(r"ERROR\s*:\s*(.+)", plain)
    return errors[-1].strip()[:200] if errors else ""
