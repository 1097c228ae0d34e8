"""Keys that two parties agree on, what is derived from them, and boxes that only one other party opens.

X25519 (RFC 7748), HKDF-SHA256 (RFC 5869), ChaCha20-Poly1305 (RFC 8439), and AES-128 in counter mode (NIST SP
800-38A) for streams, all of `cryptography`.
"""

import hashlib
from collections.abc import Sequence

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.ciphers.algorithms import AES128
from cryptography.hazmat.primitives.ciphers.modes import CTR
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fedllm.errors import SecureError

KEY_BYTES = 32
SEED_BYTES = 16
BOX_BYTES = 12 + 16  # what a box holds besides its content: nonce and tag
_CHUNK = 1 << 15  # words masked at once: as many as the cache holds
_ZEROS = bytes(4 * _CHUNK)


class Stream:
    """The keystream of a 16-byte seed. Every draw moves it on, so the order of draws matters."""

    def __init__(self, seed: bytes):
        self._cipher = Cipher(AES128(seed), CTR(bytes(16))).encryptor()

    def bytes(self, number: int) -> bytes:
        """Return the next `number` bytes."""
        return self._cipher.update(bytes(number))

    def words(self, number: int) -> np.ndarray:
        """Return the next words [number] (uint32)."""
        return np.frombuffer(self.bytes(4 * number), "<u4")


def secret_stream(machine_secret: bytes, *names: str | int | bytes) -> Stream:
    """Return the stream that a machine's secret gives for one use: the same again after a restart."""
    return Stream(derived(machine_secret, *names, length=SEED_BYTES))


def new_key() -> bytes:
    """Return a fresh private key [32 bytes]."""
    return X25519PrivateKey.generate().private_bytes_raw()


def public_of(private: bytes) -> bytes:
    """Return the public half [32 bytes] of a private key."""
    return X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()


def agreed(private: bytes, public: bytes) -> bytes:
    """Return the secret [32 bytes] that the owners of both keys alone can compute.

    Raises:
        SecureError: the public key is of another length, or one of the few whose secret everybody knows.
    """
    try:
        return X25519PrivateKey.from_private_bytes(private).exchange(
            X25519PublicKey.from_public_bytes(public)
        )
    except ValueError:
        raise SecureError("a public key is not one of X25519") from None


def derived(secret: bytes, *names: str | int | bytes, length: int = KEY_BYTES) -> bytes:
    """Return the key of one use; uses that differ in any name have unrelated keys."""
    tagged = [
        (type(name).__name__, name if isinstance(name, bytes) else str(name).encode()) for name in names
    ]
    # The length before each, so that no two lists of names are the same bytes.
    info = b"".join(f"{kind}:{len(name)}:".encode() + name for kind, name in tagged)
    return HKDF(SHA256(), length, salt=None, info=info).derive(secret)


def add_masks(words: np.ndarray, masks: Sequence[tuple[bytes, int]]) -> None:
    """Add the keystream of each seed to words [n] (uint32) in place, or with a sign of -1 subtract it."""
    streams = [
        (Cipher(AES128(seed), CTR(bytes(16))).encryptor(), np.add if sign > 0 else np.subtract)
        for seed, sign in masks
    ]
    buffer = bytearray(len(_ZEROS) + 15)  # the room that `update_into` asks for
    keystream = np.frombuffer(buffer, "<u4", _CHUNK)
    for begin in range(0, len(words), _CHUNK):  # all masks of a chunk at once, while it is in the cache
        part = words[begin : begin + _CHUNK]
        for encryptor, combine in streams:
            encryptor.update_into(_ZEROS, buffer)
            combine(part, keystream[: len(part)], out=part)


def add_mask(words: np.ndarray, seed: bytes, sign: int) -> None:
    """Add one mask, as `add_masks`."""
    add_masks(words, [(seed, sign)])


def mask_words(seed: bytes, size: int) -> np.ndarray:
    """Return the mask [size] (uint32) of a seed."""
    words = np.zeros(size, np.uint32)
    add_mask(words, seed, 1)
    return words


def seal(key: bytes, data: bytes, about: bytes = b"") -> bytes:
    """Return a box with `data` that only `key` opens, and only where `about` is the same.

    The nonce follows from key and data: the same data gives the same box again, and no two data share a
    nonce.
    """
    nonce = derived(key, "nonce", hashlib.sha256(data).digest(), about, length=12)
    return nonce + ChaCha20Poly1305(derived(key, "box")).encrypt(nonce, data, about)


def open_box(key: bytes, box: bytes, about: bytes = b"", sender: str = "") -> bytes:
    """Return what a box holds.

    Raises:
        SecureError: the box of party `sender` was made with another key or `about`, or was altered.
    """
    try:
        return ChaCha20Poly1305(derived(key, "box")).decrypt(box[:12], box[12:], about)
    except (InvalidTag, ValueError):
        raise SecureError(f"the box of {sender or 'a party'} does not open", sender) from None
