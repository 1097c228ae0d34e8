"""Agreed keys, streams and boxes: the vectors of their standards, and what must differ does."""

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from fedllm.errors import SecureError
from fedllm.secure.agreement import (
    BOX_BYTES,
    Stream,
    add_mask,
    agreed,
    derived,
    mask_words,
    new_key,
    open_box,
    public_of,
    seal,
    secret_stream,
)


def test_keys_agree_as_in_rfc_7748_section_6_1() -> None:
    alice = bytes.fromhex("77076d0a7318a57d3c16c17251b26645df4c2f87ebc0992ab177fba51db92c2a")
    bob = bytes.fromhex("5dab087e624a8a4b79e17f8b83800ee66f3bb1292618b6fd1c2f8b27ff88e0eb")
    assert public_of(alice).hex() == "8520f0098930a754748b7ddcb43ef75a0dbf3a0d26381af4eba4a98eaa9b4e6a"
    assert public_of(bob).hex() == "de9edb7d7b7dc1b4d35b61c2ece435373f8343c85b78674dadfc7e146f882b4f"
    common = "4a5d9d5ba4ce2de1728e3bf480350f25e07e21c947d19e3376f09b3c1e161742"
    assert agreed(alice, public_of(bob)).hex() == agreed(bob, public_of(alice)).hex() == common


def test_derived_keys_are_those_of_rfc_5869_case_3() -> None:
    expected = "8da4e775a563c18f715f802a063c5a31b8a11f5c5ee1879ec3454e5f3c738d2d9d201395faa4b61a96c8"
    assert derived(b"\x0b" * 22, length=42).hex() == expected


def test_masks_are_the_blocks_of_aes_128() -> None:
    """Of a zero key at the counts 0 and 1, as in test case 1 of the GCM specification (NIST SP 800-38D)."""
    blocks = "66e94bd4ef8a2c3b884cfa59ca342b2e58e2fccefa7e3061367f1d57a4e7455a"
    assert mask_words(bytes(16), 8).astype("<u4").tobytes().hex() == blocks
    assert Stream(bytes(16)).bytes(32).hex() == blocks


def test_boxes_are_sealed_as_in_rfc_8439_section_2_8_2() -> None:
    text = (
        b"Ladies and Gentlemen of the class of '99: If I could offer you only one tip for the future, "
        b"sunscreen would be it."
    )
    nonce, about = bytes.fromhex("070000004041424344454647"), bytes.fromhex("50515253c0c1c2c3c4c5c6c7")
    sealed = ChaCha20Poly1305(bytes(range(0x80, 0xA0))).encrypt(nonce, text, about)
    assert sealed[:16].hex() == "d31a8d34648e60db7b86afbc53ef7ec2"
    assert sealed[-16:].hex() == "1ae10b594f09e26a7e902ecbd0600691"


def test_both_sides_agree_and_others_do_not() -> None:
    one, two, three = new_key(), new_key(), new_key()
    assert agreed(one, public_of(two)) == agreed(two, public_of(one)) != agreed(three, public_of(one))


@pytest.mark.parametrize("public", [bytes(32), b"\x01" + bytes(31), b"short"])
def test_a_public_key_that_everybody_knows_is_refused(public: bytes) -> None:
    with pytest.raises(SecureError, match="not one of X25519"):
        agreed(new_key(), public)


def test_keys_differ_by_every_name_and_its_kind() -> None:
    names = [("a",), ("a", "b"), ("ab",), (b"a",), ("a", 1), ("a", "1"), ("a", "1:b"), ("a", "1", "b"), ()]
    assert len({derived(b"secret", *each) for each in names}) == len(names)


def test_a_mask_that_is_added_and_taken_off_leaves_nothing() -> None:
    size = (1 << 15) + 3  # more than is masked at once
    words = np.arange(size, dtype=np.uint32)
    add_mask(words, b"s" * 16, 1)
    assert np.array_equal(words - np.arange(size, dtype=np.uint32), mask_words(b"s" * 16, size))
    assert np.array_equal(mask_words(b"s" * 16, size), Stream(b"s" * 16).words(size))
    add_mask(words, b"s" * 16, -1)
    assert np.array_equal(words, np.arange(size, dtype=np.uint32))


def test_a_machine_draws_the_same_again_for_one_use() -> None:
    assert secret_stream(b"m", "rounding", b"l").bytes(8) == secret_stream(b"m", "rounding", b"l").bytes(8)
    assert secret_stream(b"m", "rounding", b"l").bytes(8) != secret_stream(b"m", "masking", b"l").bytes(8)


def test_a_box_opens_with_its_key_and_subject_alone() -> None:
    box = seal(b"k" * 32, b"content", b"about")
    assert len(box) == BOX_BYTES + 7
    assert open_box(b"k" * 32, box, b"about") == b"content"
    wrong = [(b"x" * 32, box, b"about"), (b"k" * 32, box, b"other"), (b"k" * 32, box[:-1] + b"x", b"about")]
    for key, damaged, about in [*wrong, (b"k" * 32, b"", b"about")]:
        with pytest.raises(SecureError, match="the box of site-1 does not open") as caught:
            open_box(key, damaged, about, sender="site-1")
        assert caught.value.party == "site-1"


def test_boxes_of_other_content_have_other_nonces() -> None:
    boxes = [seal(b"k" * 32, content) for content in (b"one", b"two", b"one")]
    assert boxes[0] == boxes[2]
    assert boxes[0][:12] != boxes[1][:12]
