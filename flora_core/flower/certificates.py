"""Certificates and keys for a deployment on Flower: a CA, the server's certificate, and a key pair for each node.

Needs the package ``cryptography``, which Flower brings.
"""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from ..common import atomic_dir, check_number, folder_names, require

LOOPBACK = ("127.0.0.1", "::1")


def make_keys(folder: str | Path, hosts: Sequence[str], nodes: Sequence[str], days: int = 365) -> Path:
    """Make a folder with ``ca.crt``, ``server.crt``, ``server.key`` and each node's ``NODE.key`` and ``NODE.pub``.

    The CA's own key is not kept: another server certificate means making all of them anew. Private keys can be
    read by their owner alone.

    Args:
        folder: Where; it must not exist, or be empty.
        hosts: Names and addresses by which nodes reach the server; 127.0.0.1 and ::1 are added, for there the
            SuperLink's own processes ask it.
        nodes: Names of the nodes; their files have names that every system keeps (``files.folder_names``).
        days: How long the certificates are valid.
    Returns:
        The folder.
    Raises:
        ValueError: For no hosts, or names that are no host's.
        FileExistsError: If the folder holds anything.
    """
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

    check_number("days", days, 1, whole=True)
    require(len(hosts) > 0, "hosts must name at least one name or address of the server, such as 127.0.0.1")
    strange = [host for host in hosts if not _is_host(host)]
    text = "names like fl.example.org (other scripts as xn--...) or addresses like 10.0.0.7"
    require(not strange, f"hosts must be {text}, got {', '.join(map(repr, strange))}")
    now, curve = datetime.now(UTC), ec.SECP384R1()

    def signed(name: str, key: Any, issuer: Any, issuer_key: Any, *extensions: tuple[Any, bool]) -> Any:
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        made = x509.CertificateBuilder().subject_name(subject).issuer_name(issuer or subject)
        made = made.public_key(key.public_key()).serial_number(x509.random_serial_number())
        made = made.not_valid_before(now - timedelta(minutes=5)).not_valid_after(now + timedelta(days=days))
        for extension, critical in extensions:
            made = made.add_extension(extension, critical)
        return made.sign(issuer_key, _digest())

    ca_key, server_key = ec.generate_private_key(curve), ec.generate_private_key(curve)
    authority = x509.BasicConstraints(ca=True, path_length=0)
    usage = _ca_usage(x509)
    owner = x509.SubjectKeyIdentifier.from_public_key(ca_key.public_key())
    ca = signed("flora CA", ca_key, None, ca_key, (authority, True), (usage, True), (owner, False))
    serving = [
        (x509.BasicConstraints(ca=False, path_length=None), True),
        (x509.SubjectAlternativeName([_alternative(x509, host) for host in dict.fromkeys([*hosts, *LOOPBACK])]), False),
        (x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), False),
        (x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(owner), False),
    ]
    server = signed(hosts[0], server_key, ca.subject, ca_key, *serving)
    with atomic_dir(folder) as new:
        _write(new / "ca.crt", _pem(ca))
        _write(new / "server.crt", _pem(server) + _pem(ca))
        _write(new / "server.key", _private(server_key, "PKCS8"), 0o600)
        for node in key_names(nodes).values():
            key = ec.generate_private_key(curve)
            _write(new / f"{node}.key", _private(key, "OpenSSH"), 0o600)
            _write(new / f"{node}.pub", _public(key))
    return Path(folder)


def key_names(nodes: Sequence[str]) -> dict[str, str]:
    """Name the key files of each node, without their suffix."""
    return folder_names(nodes, taken=("ca", "server"))


def _is_host(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return (
            re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?(\.[A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?)*", host)
            is not None
        )
    return True


def _digest() -> Any:
    from cryptography.hazmat.primitives import hashes

    return hashes.SHA384()


def _ca_usage(x509: Any) -> Any:
    names = "digital_signature content_commitment key_encipherment data_encipherment key_agreement encipher_only"
    never = dict.fromkeys([*names.split(), "decipher_only"], False)
    return x509.KeyUsage(**never, key_cert_sign=True, crl_sign=True)


def _alternative(x509: Any, host: str) -> Any:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _pem(certificate: Any) -> bytes:
    from cryptography.hazmat.primitives.serialization import Encoding

    return certificate.public_bytes(Encoding.PEM)


def _private(key: Any, form: str) -> bytes:
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    return key.private_bytes(Encoding.PEM, getattr(PrivateFormat, form), NoEncryption())


def _public(key: Any) -> bytes:
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    return key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)


def _write(path: Path, data: bytes, mode: int = 0o644) -> None:
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with open(handle, "wb") as file:
        file.write(data)
