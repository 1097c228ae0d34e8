"""A federation's own authority, its certificates and keys: who may read them, and what renews."""

from pathlib import Path

import pytest
from cryptography import x509

from fedllm.errors import ConfigError
from scripts.deploying.certificates import new_credentials, new_node_key, read_public_key


def names_of(certificate: Path) -> set[str]:
    found = x509.load_pem_x509_certificate(certificate.read_bytes())
    held = found.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return {str(name) for kind in (x509.DNSName, x509.IPAddress) for name in held.get_values_for_type(kind)}


def test_keys_are_readable_by_their_owner_alone(tmp_path):
    made = new_credentials(tmp_path / "server", ["fed.example.org"])
    new_node_key(tmp_path / "node" / "a")
    private = [made.authority_key, made.key, made.superexec_secret, tmp_path / "node" / "a"]
    assert {file.stat().st_mode & 0o777 for file in private} == {0o600}
    assert {folder.stat().st_mode & 0o777 for folder in (made.folder, tmp_path / "node")} == {0o700}


def test_certificate_holds_its_names_and_is_signed_by_the_authority(tmp_path):
    made = new_credentials(tmp_path, ["fed.example.org", "10.1.2.3"])
    assert names_of(made.certificate) == {"fed.example.org", "10.1.2.3", "localhost", "127.0.0.1"}
    authority, server = (
        x509.load_pem_x509_certificate(file.read_bytes()) for file in (made.authority, made.certificate)
    )
    server.verify_directly_issued_by(authority)


def test_renewal_keeps_what_nodes_and_superexec_know(tmp_path):
    made = new_credentials(tmp_path, ["old.example.org"])
    before = [file.read_bytes() for file in (made.authority, made.superexec_secret)]
    new_credentials(tmp_path, ["new.example.org"])
    assert [file.read_bytes() for file in (made.authority, made.superexec_secret)] == before
    assert "new.example.org" in names_of(made.certificate)


def test_authority_without_its_key_is_one_line(tmp_path):
    new_credentials(tmp_path, []).authority_key.unlink()
    with pytest.raises(ConfigError, match="bring the key back"):
        new_credentials(tmp_path, [])


def test_node_key_is_never_overwritten(tmp_path):
    public = new_node_key(tmp_path / "a")
    assert read_public_key(public).startswith(b"-----BEGIN PUBLIC KEY")
    with pytest.raises(ConfigError, match="never overwritten"):
        new_node_key(tmp_path / "a")


def test_file_that_holds_no_node_key_is_one_line(tmp_path):
    new_credentials(tmp_path, [])
    for file in (tmp_path / "ca.crt", tmp_path / "absent"):
        with pytest.raises(ConfigError, match="fedllm keys node"):
            read_public_key(file)


@pytest.mark.parametrize("name", ["fed.example.org:8443", "münchen.example", "a b", ""])
def test_what_is_no_name_of_a_server_is_refused(name, tmp_path):
    with pytest.raises(ConfigError, match="without a port"):
        new_credentials(tmp_path / "server", [name])
    assert not (tmp_path / "server").exists()
