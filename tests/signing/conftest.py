from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedllm.identity import new_key


@pytest.fixture
def key(tmp_path: Path) -> Ed25519PrivateKey:
    """Return the key of whoever signs."""
    return new_key(tmp_path / "key")
