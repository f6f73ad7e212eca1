"""Download one file of a package index with the standard library, for environments without pip.

The index is the one that the environment names for uv or pip, or else PyPI. Its pages follow the simple repository API
(PEP 503 in HTML, PEP 691 in JSON).
"""

from __future__ import annotations

import base64
import configparser
import hashlib
import html
import json
import os
import re
import ssl
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.parse import unquote, urljoin, urlsplit, urlunsplit
from urllib.request import Request, urlopen

PYPI = "https://pypi.org/simple"
_INDEX_VARIABLES = ("UV_DEFAULT_INDEX", "UV_INDEX_URL", "PIP_INDEX_URL")
_CERTIFICATE_VARIABLES = ("SSL_CERT_FILE", "PIP_CERT", "REQUESTS_CA_BUNDLE")
_KINDS = "application/vnd.pypi.simple.v1+json, application/vnd.pypi.simple.v1+html;q=0.2, text/html;q=0.1"
_CHUNK_BYTES = 1 << 20
_TIMEOUT_S = 60

Progress = Callable[[str, int, int], None]


def download(project: str, file: str, sha256: str, folder: Path, progress: Progress | None = None) -> Path:
    """Download a file of a project into a folder.

    Args:
        project: The project's name on the index.
        file: The file's name, such as that of a wheel.
        sha256: What the file's bytes must hash to.
        folder: Where it is written; nothing is left there after an error.
        progress: Called with "download", bytes done and bytes in all.
    Returns:
        The path of the file.
    Raises:
        OSError: If the index cannot be reached or has no such file, or the disk is full.
        ValueError: If the bytes are others.
    """
    index, out = index_url(), folder / file
    page = f"{index.rstrip('/')}/{project}/"
    try:
        with _open(page, _KINDS) as answer:
            links = _links(answer.read().decode("utf-8"), answer.headers.get_content_type())
        if file not in links:
            raise OSError(f"{_shown(page)} has no file {file}")
        digest = _save(urljoin(page, links[file]), out, progress)
    except URLError as error:
        out.unlink(missing_ok=True)
        raise OSError(f"{_shown(page)}: {error.reason}") from error
    except BaseException:
        out.unlink(missing_ok=True)
        raise
    if digest != sha256:
        out.unlink()
        raise ValueError(f"{file} of {_shown(index)} must have sha256 {sha256}, got {digest}; use another index")
    return out


def index_url() -> str:
    """Return the address of the package index: that of uv's or pip's environment variables, pip's files, or PyPI's."""
    named = next((os.environ[name] for name in _INDEX_VARIABLES if os.environ.get(name)), None)
    # uv takes NAME=URL too.
    return re.sub(r"^\w+=(?=\w+:)", "", named or _configured("index-url") or PYPI)


def _configured(key: str) -> str | None:
    """Return a value of pip's configuration files; a later file wins."""
    found = None
    for path in _pip_files():
        parser = configparser.RawConfigParser()
        try:
            parser.read(path, encoding="utf-8")
        except (configparser.Error, UnicodeDecodeError):
            continue
        for section in ("global", "download"):
            found = parser.get(section, key, fallback=found)
    return found


def _pip_files() -> Iterator[Path]:
    """Yield the places of pip's configuration files on POSIX, in pip's order."""
    yield from (Path(folder) / "pip/pip.conf" for folder in os.environ.get("XDG_CONFIG_DIRS", "/etc/xdg").split(":"))
    yield Path("/etc/pip.conf")
    yield Path("~/.pip/pip.conf").expanduser()
    yield Path(os.environ.get("XDG_CONFIG_HOME") or "~/.config").expanduser() / "pip/pip.conf"
    yield Path(sys.prefix) / "pip.conf"
    if os.environ.get("PIP_CONFIG_FILE"):
        yield Path(os.environ["PIP_CONFIG_FILE"])


def _open(url: str, kinds: str = "*/*") -> Any:
    """Open an address; a user name and password in it become a header, as urllib wants them."""
    parts = urlsplit(url)
    login, at, host = parts.netloc.rpartition("@")
    request = Request(urlunsplit(parts._replace(netloc=host)), headers={"Accept": kinds, "User-Agent": "flora-core"})
    if at:
        # Kept from redirects, which may lead to another host.
        request.add_unredirected_header("Authorization", f"Basic {base64.b64encode(unquote(login).encode()).decode()}")
    return urlopen(request, timeout=_TIMEOUT_S, context=_context() if parts.scheme == "https" else None)


def _context() -> ssl.SSLContext:
    named = next((os.environ[name] for name in _CERTIFICATE_VARIABLES if os.environ.get(name)), _configured("cert"))
    return ssl.create_default_context(cafile=named)


def _links(text: str, kind: str) -> dict[str, str]:
    """Return file name -> address of a project's page."""
    if kind.endswith("json"):
        return {file["filename"]: file["url"] for file in json.loads(text)["files"]}
    found = (html.unescape(link) for link in re.findall(r"<a\b[^>]*?\bhref\s*=\s*[\"']([^\"']+)", text, re.I))
    return {unquote(urlsplit(link).path.rpartition("/")[2]): link.partition("#")[0] for link in found}


def _save(url: str, out: Path, progress: Progress | None) -> str:
    """Write what an address gives into a file; return its sha256."""
    digest, done = hashlib.sha256(), 0
    with _open(url) as answer, out.open("wb") as file:
        whole = int(answer.headers.get("Content-Length") or 0)
        while chunk := answer.read(_CHUNK_BYTES):
            file.write(chunk)
            digest.update(chunk)
            done += len(chunk)
            if progress is not None:
                progress("download", done, max(whole, done))
    return digest.hexdigest()


def _shown(url: str) -> str:
    """An address without the password in it."""
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))
