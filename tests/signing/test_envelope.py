from pathlib import Path

import pytest

from fedllm.errors import IntegrityError
from fedllm.identity import new_key, public_text
from fedllm.signing.envelope import open_envelope, sign_envelope


def test_a_payload_is_signed_for_its_type_alone(tmp_path: Path) -> None:
    key = new_key(tmp_path / "key")
    content, trusted = sign_envelope(key, "text/plain", b"a payload"), {public_text(key)}
    assert open_envelope(content, trusted, "text/plain") == (b"a payload", public_text(key))
    with pytest.raises(IntegrityError, match="'text/plain', expected 'text/html'"):
        open_envelope(content, trusted, "text/html")
    with pytest.raises(IntegrityError, match="changed since"):
        open_envelope(content.replace(b"text/plain", b"text/html"), trusted, "text/html")
