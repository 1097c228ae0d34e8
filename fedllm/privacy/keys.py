"""The secret of a run: 32 random bytes of this machine from which its noise and its coins are derived.

Noise that anyone can draw again hides nothing, so none of it comes from the run's public seed. The operating
system draws the secret once, and a file that only its owner can read keeps it: a resumed run reads it and
gives the same bits. Whoever reads the file can subtract the noise, so it must never be published.

Every use has a key of its own, named by what the noise is for *and by what it hides* (as RFC 6979 does for
signatures). The same sum gets the same noise again, so repeating a round reveals nothing new. Another sum
gets independent noise, so two attempts at a round cannot be subtracted from one another.
"""

import hashlib
import hmac
import secrets
from pathlib import Path

import numpy as np
import torch

from fedllm.errors import CheckpointError
from fedllm.files import make_private_folder, write_once
from fedllm.privacy.noise import SecretStream

NUM_BYTES = 32
_HASHED_AT_ONCE = 1 << 15  # words: as many as the cache holds


def new_secret() -> bytes:
    """Return a fresh secret."""
    return secrets.token_bytes(NUM_BYTES)


def kept_secret(path: Path) -> bytes:
    """Return the secret in `path`; on first use it is drawn and written with mode 0600.

    Raises:
        CheckpointError: the file cannot be read or written, or is no secret.
    """
    try:
        make_private_folder(path.parent)
        found = write_once(path, new_secret())
    except OSError as error:
        raise CheckpointError(
            f"the secret {path} cannot be kept: {error.strerror}; let this user read and write there"
        ) from None
    if len(found) != NUM_BYTES:
        raise CheckpointError(f"{path} is no secret of {NUM_BYTES} bytes; restore it, or start a new run")
    return found


def derived_key(secret: bytes, *names: str | int) -> bytes:
    """Return the 32-byte key of one use (HMAC-SHA256); uses that differ in any name have unrelated keys."""
    # Types and a separator that no name holds: ("a", 1), ("a", "1") and ("a1",) are three uses.
    text = "\x1f".join(f"{type(name).__name__}:{name}" for name in names)
    return hmac.new(secret, text.encode(), hashlib.sha256).digest()


def bits_digest(*vectors: torch.Tensor) -> str:
    """Return the SHA-256 (hex) of the bits of vectors, which names them in the key of their noise."""
    hasher = hashlib.sha256()
    for vector in vectors:
        hasher.update(vector.detach().cpu().contiguous().numpy().data)  # read in place, not copied
    return hasher.hexdigest()


def keyed_hash(key: bytes, vector: torch.Tensor) -> bytes:
    """Return 16 bytes that stand for the bits of a vector among those of its length, while `key` is secret.

    With the vector's 32-bit words x_i and 64-bit words k_i of the key's stream they are
    sum_i k_i x_i and sum_i k_(i+1) x_i mod 2^64: multilinear hashing (Lemire & Kaser 2014, arXiv 1202.4961)
    whose two keys overlap (Toeplitz; Krawczyk 1995). Two vectors that differ have one hash with probability
    at most 2^-66 over the key: let d_i be the difference of the last words that differ. It divides by 2^31
    at the most, so at most 2^31 of the 2^64 values of k_i make the first sums equal, whatever the keys before
    it; of k_(i+1) as many the second sums, whatever k_i. Unlike SHA-256 it is two products a word and adds up
    in any order, so a GPU computes it where the vector is (`fedllm.privacy.triton_noise`).
    """
    words = vector.detach().cpu().contiguous().view(torch.int32).numpy().view(np.uint32)
    stream = SecretStream(key)
    keys, sums = stream.integers(1), [0, 0]
    for begin in range(0, len(words), _HASHED_AT_ONCE):
        part = words[begin : begin + _HASHED_AT_ONCE].astype(np.uint64)
        keys = np.concatenate([keys[-1:], stream.integers(len(part))])
        sums[0] += int(np.dot(keys[:-1], part))
        sums[1] += int(np.dot(keys[1:], part))
    return b"".join((total % 2**64).to_bytes(8, "little") for total in sums)
