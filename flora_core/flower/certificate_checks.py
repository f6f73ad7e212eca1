"""Checks of certificates, keys, ports and the way to the server, before anything of a deployment starts.

Flower's own programs say much of this late, or with a traceback (flwr 1.41).
"""

from __future__ import annotations

import errno
import os
import socket
import ssl
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from .certificates import key_names

_SERVER = ("ca.crt", "server.crt", "server.key")
_ANEW = "make all anew with flora deploy and another --out"
_CONNECT_S = 10.0


def check_folder(folder: str | Path, hosts: Sequence[str], nodes: Sequence[str] = ()) -> list[str]:
    """List the faults of the server's files in a folder of ``make_keys``, with the remedy, a line each.

    Args:
        folder: Where they are.
        hosts: Names and addresses that the certificate must hold.
        nodes: Those whose keys must be there too.
    """
    files = key_names(nodes).values()
    paths = [Path(folder) / name for name in (*_SERVER, *(f"{file}.key" for file in files))]
    return check_files([*paths, *(Path(folder) / f"{file}.pub" for file in files)], hosts)


def check_files(paths: Sequence[str | Path], hosts: Sequence[str] = (), now: datetime | None = None) -> list[str]:
    """List the faults of certificates and private keys, with the remedy, a line each; empty if there are none.

    A certificate among them that is no CA's must be of the CA's making, name the hosts, and belong to the server's key.

    Args:
        paths: ``*.crt`` (PEM), ``*.key`` (the server's PEM, or a node's in OpenSSH's form) and ``*.pub``.
        hosts: Names and addresses that the server's certificate must hold.
        now: The time (this machine's, unless given).
    """
    problems: list[str] = []
    now, found = now or datetime.now(UTC), dict[str, Any]()
    for path in map(Path, paths):
        kind = path.suffix.removeprefix(".")
        try:
            data = path.read_bytes()
        except OSError as error:
            problems.append(f"{path}: {error.strerror}; copy it from the folder keys that flora deploy made")
            continue
        try:
            made = _READ.get(kind, _public)(data)
        except (ValueError, TypeError):
            problems.append(f"{path} holds no {_KINDS.get(kind, 'public key')}, or a damaged one; copy it again")
            continue
        if kind == "crt":
            found["ca" if _is_authority(made[0]) else "server"] = (path, made)
            problems += [text for one in made for text in _dates(path, one, now)][:1]
        elif kind == "key":
            problems += _privacy(path)
            found.setdefault("keys", []).append((path, made, data))
    return problems + _together(found, hosts)


def _certificates(data: bytes) -> Any:
    from cryptography import x509

    return x509.load_pem_x509_certificates(data)


def _private(data: bytes) -> Any:
    from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_ssh_private_key

    return load_ssh_private_key(data, None) if b"OPENSSH" in data else load_pem_private_key(data, None)


def _public(data: bytes) -> Any:
    from cryptography.hazmat.primitives.serialization import load_ssh_public_key

    return load_ssh_public_key(data)


_READ = {"crt": _certificates, "key": _private}
_KINDS = {"crt": "certificate", "key": "private key"}


def _is_authority(certificate: Any) -> bool:
    from cryptography import x509

    try:
        return certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except x509.ExtensionNotFound:
        return False


def _dates(path: Path, certificate: Any, now: datetime) -> list[str]:
    start, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    clock = f"UTC, and this machine's clock says {now:%Y-%m-%d %H:%M}"
    if now < start:
        return [f"{path} is not valid before {start:%Y-%m-%d %H:%M} {clock}: set the clock, or {_ANEW}"]
    if now > end:
        return [f"{path} expired on {end:%Y-%m-%d %H:%M} {clock}: {_ANEW}"]
    return []


def _privacy(path: Path) -> list[str]:
    mode = path.stat().st_mode & 0o777
    if os.name != "posix" or not mode & 0o077:
        return []
    return [f"{path} is a private key, and others than its owner may use the file (mode {mode:o}): chmod 600 {path}"]


def _together(found: dict[str, Any], hosts: Sequence[str]) -> list[str]:
    """List the files that do not belong together."""
    from cryptography.exceptions import InvalidSignature

    if "server" not in found:
        return []
    (path, (server, *_)), problems = found["server"], []
    for other, key, data in found.get("keys", ()):
        if b"OPENSSH" not in data and key.public_key() != server.public_key():
            problems.append(f"{other} is not the key of {path}; copy both from one folder, or {_ANEW}")
    if "ca" in found:
        authority, (issuer, *_) = found["ca"]
        try:
            server.verify_directly_issued_by(issuer)
        except (ValueError, TypeError, InvalidSignature):
            problems.append(f"{path} was not issued by {authority}; copy both from one folder, or {_ANEW}")
    lacking = [host for host in hosts if host not in _names(server)]
    if lacking:
        problems.append(
            f"{path} is for {', '.join(_names(server)) or 'no name'}, and not for {', '.join(lacking)}: {_ANEW}"
        )
    return problems


def _names(certificate: Any) -> list[str]:
    from cryptography import x509

    try:
        extension = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    except x509.ExtensionNotFound:
        return []
    return [str(name.value) for name in extension.value]


def check_port(host: str, port: int) -> list[str]:
    """Return whether this machine can listen there."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as one:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            one.bind((host, port))
        except OSError as error:
            used = error.errno == errno.EADDRINUSE
            why = "another program listens there: end it, or choose another --port" if used else error.strerror
            return [f"port {port} of {host} cannot be had: {why}"]
    return []


def check_server(host: str, port: int, authority: str | Path) -> tuple[list[str], list[str]]:
    """Return whether a server answers, with a certificate that the CA's vouches for.

    Returns:
        What is wrong; and what may still become right, for a server that is not there yet may come.
    """
    where = f"{host}:{port}"
    try:
        context = ssl.create_default_context(cafile=str(authority))
        with socket.create_connection((host, port), _CONNECT_S) as plain:
            context.wrap_socket(plain, server_hostname=host).close()
    except ssl.SSLCertVerificationError as error:
        text = f"the server at {where} shows a certificate that {authority} does not vouch for"
        return [f"{text} ({error.verify_message}): tell those who run it, or get their ca.crt"], []
    except ssl.SSLError as error:
        return [f"what answers at {where} does not speak TLS ({error.reason}): is the port right?"], []
    except OSError as error:
        return [], [f"no server answers at {where} yet ({error.strerror or error}); the node will try again"]
    return [], []
