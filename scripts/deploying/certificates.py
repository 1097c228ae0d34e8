"""An authority of one's own, the server certificate it signs, and the keys that Flower's processes want.

A federation has few members who know each other, so each site is given the authority's certificate by hand
and trusts no other: no public authority can vouch for a false server.
"""

import ipaddress
import re
import secrets
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_ssh_public_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedllm.errors import ConfigError
from fedllm.files import write_bytes

_LIFE_OF_AUTHORITY = timedelta(days=3650)
LIFE_OF_CERTIFICATE = timedelta(days=397)  # as long as browsers accept one
_SKEW = timedelta(days=1)  # a clock that is behind must not find a new certificate not yet valid
_HOST = re.compile(r"[A-Za-z0-9_*.-]{1,253}")
_HERE = ("localhost", "127.0.0.1")  # the proxy and Flower's own processes reach the SuperLink by these


@dataclass(frozen=True)
class Credentials:
    """The files of a hardened SuperLink, all in one folder of mode 0700."""

    folder: Path

    @property
    def authority(self) -> Path:
        """The authority's certificate: what every node and every `flwr` trusts; no secret."""
        return self.folder / "ca.crt"

    @property
    def authority_key(self) -> Path:
        """Whoever has it can pretend to be the server: move it off the server."""
        return self.folder / "ca.key"

    @property
    def certificate(self) -> Path:
        """The server's certificate, with its names."""
        return self.folder / "server.crt"

    @property
    def key(self) -> Path:
        """The server's TLS key."""
        return self.folder / "server.key"

    @property
    def superexec_secret(self) -> Path:
        """What a SuperExec proves itself with, else any process could ask the SuperLink for its ServerApp."""
        return self.folder / "superexec.secret"


def new_credentials(folder: Path, names: Sequence[str], life: timedelta = LIFE_OF_CERTIFICATE) -> Credentials:
    """Make a server certificate for DNS names or IP addresses; authority and secret where there are none.

    Run again it renews the certificate: nodes go on trusting the same authority.

    Raises:
        ConfigError: a name is none, or the authority's certificate is there without its key.
    """
    made, sans = Credentials(folder), [_san(name) for name in dict.fromkeys([*names, *_HERE])]
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    if not made.authority.exists():
        _make_authority(made)
    if not made.authority_key.exists():
        raise ConfigError(
            f"{made.authority} is there without {made.authority_key.name}: bring the key back to renew, or"
            " choose an empty folder"
        )
    authority = x509.load_pem_x509_certificate(made.authority.read_bytes())
    authority_key = load_pem_private_key(made.authority_key.read_bytes(), None)
    assert isinstance(authority_key, ec.EllipticCurvePrivateKey)
    key = ec.generate_private_key(ec.SECP256R1())
    builder = (
        _certificate("fedllm server", authority.subject, key.public_key(), life)
        .add_extension(x509.SubjectAlternativeName(sans), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key()), critical=False
        )
    )
    signed = builder.sign(authority_key, hashes.SHA256())
    write_bytes(made.key, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    made.certificate.write_bytes(signed.public_bytes(Encoding.PEM))
    if not made.superexec_secret.exists():
        write_bytes(made.superexec_secret, secrets.token_hex(32).encode())
    return made


def new_node_key(path: Path) -> Path:
    """Make the key with which a SuperNode proves itself to the SuperLink; return the public half, `PATH.pub`.

    Raises:
        ConfigError: there is one already.
    """
    if path.exists():
        raise ConfigError(f"{path} exists: a node's key is never overwritten")
    key = ec.generate_private_key(ec.SECP384R1())  # Flower takes no other kind than these curves
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    public = path.with_name(path.name + ".pub")  # first: where it is alone, another key is made
    public.write_bytes(key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH) + b"\n")
    write_bytes(path, key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))
    return public


def read_public_key(path: Path) -> bytes:
    """Return the public half of a node's key as Flower sends it (PEM).

    Raises:
        ConfigError: the file cannot be read or holds no elliptic-curve key.
    """
    try:
        key = load_ssh_public_key(path.read_bytes())
    except (OSError, ValueError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise ConfigError(f"{path}: expected the .pub file of a key that `fedllm keys node` made")
    return key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def _make_authority(made: Credentials) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"fedllm federation {secrets.token_hex(4)}")])
    usage = x509.KeyUsage(
        key_cert_sign=True,
        crl_sign=True,
        digital_signature=False,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )
    builder = (
        _certificate(name, name, key.public_key(), _LIFE_OF_AUTHORITY)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )
    write_bytes(made.authority_key, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    made.authority.write_bytes(builder.sign(key, hashes.SHA256()).public_bytes(Encoding.PEM))


def _certificate(
    subject: x509.Name | str, issuer: x509.Name, key: ec.EllipticCurvePublicKey, life: timedelta
) -> x509.CertificateBuilder:
    """Return the fields that both certificates have; a negative `life` makes one that has expired."""
    now = datetime.now(UTC)
    named = (
        x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, subject)]) if isinstance(subject, str) else subject
    )
    return (
        x509.CertificateBuilder()
        .subject_name(named)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _SKEW)
        .not_valid_after(now + life)
    )


def _san(name: str) -> x509.GeneralName:
    with suppress(ValueError):
        return x509.IPAddress(ipaddress.ip_address(name))
    if not _HOST.fullmatch(name):
        raise ConfigError(f"{name!r}: expected a DNS name in ASCII or an address, without a port")
    return x509.DNSName(name)
