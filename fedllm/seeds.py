"""One run seed becomes many independent, named streams.

A stream is named by what it is for, so adding a consumer never shifts the numbers of another, and a client
draws the same numbers whichever process, node or order it is trained in.
"""

import hashlib


def derive_seed(seed: int, *names: str | int) -> int:
    """Return a 63-bit seed for the stream `names` of run `seed`.

    >>> derive_seed(0, "cohort", 1) == derive_seed(0, "cohort", 1)
    True
    >>> derive_seed(0, "cohort", 1) == derive_seed(0, "cohort", 2)
    False
    """
    # Types count, so that the client "1" and round 1 are two streams; the separator occurs in no name.
    text = "\x1f".join([str(seed), *(f"{type(name).__name__}:{name}" for name in names)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1  # fits a signed integer
