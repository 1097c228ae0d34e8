"""Sums of encrypted ring vectors: BFV (Brakerski 2012; Fan & Vercauteren 2012), by TenSEAL, an extra.

BFV adds whole numbers exactly, so the sum that the key holder decrypts has the bits of the plain ring sum.
One data holder makes the keys of a run and keeps the secret one; all others encrypt with the public one; the
server adds without any. Two limits, which a run must state:

- Server and key holder together read every vector, and the key holder cannot tell a sum from one party's
  vector. A server that has anything else decrypted than the sum, reads it.
- The sum is exact while its words, taken as signed numbers, add up to less than `PLAIN_MODULUS / 2`: whatever
  they are for up to 63 parties of 24 bits, and for any number of parties whose honest sum fits the ring.

The ring of ciphertexts has degree 4,096 and moduli of 96 bits together, below the 109 bits that give 128 bits
of security (homomorphicencryption.org 2018). Fresh noise has a deviation of about 15; the sum of 8,192
ciphertexts is decrypted rightly up to 2^17, some 90 of its deviations.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np

from fedllm.errors import MissingExtraError, SecureError

DEGREE = 4096  # values of one ciphertext
PLAIN_MODULUS = 1_073_692_673  # the largest prime below 2^30 that is 1 mod 2 * DEGREE, as slots need
_MODULUS_BITS = [48, 48]  # 48 for data, and TenSEAL's key switching needs another
_MOST_BYTES = 2 * DEGREE * 8 + 1024  # of one ciphertext, uncompressed
_USUAL_BYTES = 56_200  # as it is compressed
_LENGTH_BYTES = 4  # before each ciphertext


@dataclass(frozen=True)
class KeyPair:
    """The keys of one run: `public` for all parties, `secret` for the key holder alone."""

    public: bytes
    secret: bytes = field(repr=False)

    def to_bytes(self) -> bytes:
        """Return both keys, as `from_bytes` reads them."""
        return len(self.public).to_bytes(_LENGTH_BYTES, "little") + self.public + self.secret

    @classmethod
    def from_bytes(cls, content: bytes) -> "KeyPair":
        """Return the keys that `to_bytes` wrote."""
        ends = _LENGTH_BYTES + int.from_bytes(content[:_LENGTH_BYTES], "little")
        return cls(public=content[_LENGTH_BYTES:ends], secret=content[ends:])


def key_digest(public: bytes) -> bytes:
    """Return the 32 bytes that stand for a public key among the keys of a run."""
    return hashlib.sha256(public).digest()


def check_installed() -> None:
    """Refuse to start without TenSEAL.

    Raises:
        MissingExtraError: it is not installed.
    """
    _tenseal()


def new_keys() -> KeyPair:
    """Return fresh keys.

    Raises:
        MissingExtraError: TenSEAL is not installed.
    """
    context = _new_context()
    return KeyPair(public=_kept(context, public=True), secret=_kept(context, secret=True))


def encrypt(public: bytes, words: np.ndarray, bits: int) -> bytes:
    """Return the ciphertext of ring words [N], of which the low `bits` count: about 14 bytes a value.

    Raises:
        SecureError: the key is none, or holds the secret too.
        MissingExtraError: TenSEAL is not installed.
    """
    context = _read_context(public)
    if not context.has_public_key() or context.is_private():
        raise SecureError("what the key holder gave as its public key is none")
    values = _signed(words, bits)
    chunks = (values[begin : begin + DEGREE] for begin in range(0, len(values), DEGREE))
    return _joined(_tenseal().bfv_vector(context, chunk.tolist()) for chunk in chunks)


def encrypted_bytes(size: int) -> int:
    """Return about how many bytes the ciphertext of a vector of `size` values has."""
    return -(-size // DEGREE) * _USUAL_BYTES


class CipherSum:
    """The sum of encrypted vectors of `size` values, at a server that holds no key. It changes with `add`."""

    def __init__(self, size: int):
        self._size = size
        self._context = _read_context(_parameters())
        self._sums: list[Any] = []

    def add(self, content: bytes, party: str) -> None:
        """Add the ciphertext of one more party; one that is refused leaves the sum as it was.

        Raises:
            SecureError: it is no ciphertext of a vector of this size.
        """
        vectors = _split(self._context, content, self._size, party)
        try:
            self._sums = [a + b for a, b in zip(self._sums, vectors, strict=True)] if self._sums else vectors
        except (RuntimeError, ValueError):  # as where the two would cancel
            raise SecureError(f"{party}: its ciphertext cannot be added to the others") from None

    def content(self) -> bytes:
        """Return the ciphertext of the sum, for the key holder."""
        return _joined(self._sums)


def decrypt(secret: bytes, content: bytes, size: int, bits: int) -> np.ndarray:
    """Return the ring words [size] of a summed ciphertext.

    Raises:
        SecureError: it is no ciphertext of a vector of this size, or the key is none.
        MissingExtraError: TenSEAL is not installed.
    """
    context = _read_context(secret)
    if not context.is_private():
        raise SecureError("the key to decrypt with is none")
    vectors = _split(context, content, size, "the server")
    values = np.concatenate([np.array(vector.decrypt(), dtype=np.int64) for vector in vectors])
    words: np.ndarray = (values % 2**bits).astype(np.uint32)
    return words


def _signed(words: np.ndarray, bits: int) -> np.ndarray:
    """Return ring words as the signed numbers nearest to 0 that they stand for."""
    unused = 32 - bits
    signed: np.ndarray = (words << np.uint32(unused)).view(np.int32) >> unused
    return signed


def _joined(vectors: Iterable[Any]) -> bytes:
    """Return ciphertexts as bytes, each after its length: compressed, they differ in length."""
    parts = []
    for vector in vectors:
        content = vector.serialize()
        parts += [len(content).to_bytes(_LENGTH_BYTES, "little"), content]
    return b"".join(parts)


def _split(context: Any, content: bytes, size: int, party: str) -> list[Any]:
    """Return the ciphertexts that `_joined` wrote, checked."""
    vectors, begin, view = [], 0, memoryview(content)
    for done in range(0, size, DEGREE):
        length = int.from_bytes(view[begin : begin + _LENGTH_BYTES], "little")
        begin += _LENGTH_BYTES
        if not 0 < length <= min(_MOST_BYTES, len(view) - begin):
            raise SecureError(f"{party}: its ciphertext is cut, or has a part of another length")
        vector = _read_vector(context, bytes(view[begin : begin + length]))
        if vector is None or vector.size() != min(DEGREE, size - done):
            raise SecureError(f"{party}: part of its ciphertext cannot be read, or is of another size")
        vectors.append(vector)
        begin += length
    if begin != len(view):
        raise SecureError(f"{party}: its ciphertext is longer than its vector")
    return vectors


def _read_vector(context: Any, content: bytes) -> Any:
    try:
        return _tenseal().bfv_vector_from(context, content)
    except (RuntimeError, ValueError):
        return None


def _new_context() -> Any:
    tenseal = _tenseal()
    scheme = tenseal.SCHEME_TYPE.BFV
    return tenseal.context(scheme, DEGREE, PLAIN_MODULUS, _MODULUS_BITS, n_threads=1)


def _kept(context: Any, *, public: bool = False, secret: bool = False) -> bytes:
    keys = {"save_public_key": public, "save_secret_key": secret}
    content: bytes = context.serialize(**keys, save_galois_keys=False, save_relin_keys=False)
    return content


def _read_context(content: bytes) -> Any:
    """Return a context with its keys, of our parameters and no other.

    Raises:
        SecureError: it has others, or cannot be read.
    """
    try:
        context = _tenseal().context_from(content, n_threads=1)
        # Weaker parameters would be a key that hides nothing.
        is_ours = _kept(context) == _parameters()
    except (RuntimeError, ValueError):
        is_ours = False
    if not is_ours:
        raise SecureError("a key for encryption is damaged, or of other parameters")
    return context


@cache
def _parameters() -> bytes:
    return _kept(_new_context())


def _tenseal() -> Any:
    try:
        import tenseal
    except ImportError:
        raise MissingExtraError("secure.method = 'he' needs `pip install 'fedllm[he]'`") from None
    return tenseal
