import numpy as np
import pytest

from fedllm.errors import SecureError
from fedllm.secure.homomorphic import DEGREE, CipherSum, KeyPair, decrypt, encrypt, new_keys

pytest.importorskip("tenseal", reason="pip install 'fedllm[he]'")
BITS, SIZE = 24, DEGREE + 5  # two ciphertexts, one of them short


@pytest.fixture(scope="module")
def keys() -> KeyPair:
    return new_keys()


def _words(seed: int, size: int = SIZE, below: int = 2**BITS) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, below, size).astype(np.uint32)


def _summed(keys: KeyPair, vectors: list[np.ndarray], size: int = SIZE) -> np.ndarray:
    total = CipherSum(size)
    for number, words in enumerate(vectors):
        total.add(encrypt(keys.public, words, BITS), f"party {number}")
    return decrypt(keys.secret, total.content(), size, BITS)


@pytest.mark.parametrize("number", [1, 2, 5])
def test_decrypted_sum_has_the_bits_of_the_ring_sum(keys: KeyPair, number: int) -> None:
    vectors = [_words(seed) for seed in range(number)]
    plain = sum(vectors[1:], start=vectors[0].copy()) % np.uint32(2**BITS)
    assert np.array_equal(_summed(keys, vectors), plain)


@pytest.mark.parametrize("word", [0, 2**23, 2**24 - 1])  # the least, the most and -1
def test_63_parties_of_any_words_do_not_overflow(keys: KeyPair, word: int) -> None:
    words = np.full(3, word, np.uint32)
    content, total = encrypt(keys.public, words, BITS), CipherSum(3)
    for _ in range(63):
        total.add(content, "party")
    assert (decrypt(keys.secret, total.content(), 3, BITS) == 63 * word % 2**BITS).all()


def test_8192_parties_of_a_full_ring_do_not_overflow(keys: KeyPair) -> None:
    num_parties, largest = 8192, 2 ** (BITS - 1) // 8192 - 1  # the most that each may add to the sum
    total, words = CipherSum(DEGREE), np.full(DEGREE, largest, np.uint32)
    for number in range(128):
        total.add(encrypt(keys.public, words, BITS), f"party {number}")
    for _ in range(6):  # doubled, so that its noise is eight times that of 8,192 different ciphertexts
        total.add(total.content(), "all")
    assert (decrypt(keys.secret, total.content(), DEGREE, BITS) == num_parties * largest).all()


def test_one_vector_has_another_ciphertext_each_time(keys: KeyPair) -> None:
    assert encrypt(keys.public, _words(1), BITS) != encrypt(keys.public, _words(1), BITS)


def test_nobody_but_the_key_holder_can_decrypt(keys: KeyPair) -> None:
    content = encrypt(keys.public, _words(1), BITS)
    with pytest.raises(SecureError, match="key"):
        decrypt(keys.public, content, SIZE, BITS)
    other = decrypt(new_keys().secret, content, SIZE, BITS)
    assert (other == _words(1)).mean() < 0.01


def test_a_secret_key_is_refused_as_a_public_one(keys: KeyPair) -> None:
    for key in (keys.secret, b"", keys.public[: len(keys.public) // 2], b"\x00" * 100):
        with pytest.raises(SecureError, match="key"):
            encrypt(key, _words(1), BITS)


def test_a_key_of_weaker_parameters_is_refused(keys: KeyPair) -> None:
    import tenseal

    weak = tenseal.context(tenseal.SCHEME_TYPE.BFV, 2 * DEGREE, 1032193)
    with pytest.raises(SecureError, match="other parameters"):
        encrypt(weak.serialize(save_secret_key=False), _words(1), BITS)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda content: content[:-1],
        lambda content: content + b"\x00",
        lambda content: b"",
        lambda content: content[:200] + bytes(1000) + content[1200:],
        lambda content: b"\xff\xff\xff\xff" + content[4:],
    ],
)
def test_a_bad_ciphertext_is_refused_and_leaves_the_sum(keys: KeyPair, spoil) -> None:  # type: ignore[no-untyped-def]
    content, total = encrypt(keys.public, _words(1), BITS), CipherSum(SIZE)
    total.add(content, "ann")
    with pytest.raises(SecureError, match="bob"):
        total.add(spoil(content), "bob")
    assert np.array_equal(decrypt(keys.secret, total.content(), SIZE, BITS), _words(1))


def test_a_ciphertext_of_another_size_is_refused(keys: KeyPair) -> None:
    with pytest.raises(SecureError, match="bob"):
        CipherSum(SIZE).add(encrypt(keys.public, _words(1, SIZE + 1), BITS), "bob")


def test_what_parties_and_server_hold_has_no_secret_key(keys: KeyPair) -> None:
    import tenseal

    assert not tenseal.context_from(keys.public).has_secret_key()
    assert keys.secret not in keys.public


def test_a_value_takes_less_than_four_times_float32(keys: KeyPair) -> None:
    content = encrypt(keys.public, _words(1, 4 * DEGREE), BITS)
    assert len(content) <= 4 * 4 * 4 * DEGREE
