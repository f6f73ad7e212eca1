"""`flora deploy` makes keys and commands, and says before anything starts what is wrong with certificates and ports."""

from __future__ import annotations

import datetime as dt
import os
import shlex
import shutil
import socket
import ssl
import threading
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

pytest.importorskip("cryptography", reason="cryptography is not installed: pip install '.[flower]'")

from flora_core.cli.main import main
from flora_core.flower.certificate_checks import check_files, check_folder, check_server
from flora_core.flower.certificates import make_keys

HOST = "fl.example.org"


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """Keys of a server and of two nodes."""
    return make_keys(tmp_path_factory.mktemp("made") / "keys", [HOST], ["a", "b"], days=30)


@pytest.fixture
def keys(made, tmp_path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(made, tmp_path / "keys"))


def test_keys_and_certificates(keys, tmp_path):
    ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(keys / "server.crt", keys / "server.key")
    ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(keys / "ca.crt")
    assert {path.name for path in keys.glob("*.key") if path.stat().st_mode & 0o77} == set()
    assert (keys / "a.pub").read_text().startswith("ecdsa-sha2-nistp384 ")
    with pytest.raises(FileExistsError):
        make_keys(keys, ["127.0.0.1"], ["client-0"])
    with pytest.raises(ValueError, match="hosts must name"):
        make_keys(tmp_path / "none", [], ["client-0"])
    with pytest.raises(ValueError, match=r"hosts must be names like fl\.example\.org .*, got 'foo bar', 'b\xfccher'"):
        make_keys(tmp_path / "none", ["foo bar", "b\xfccher", "10.0.0.7", "::1", HOST], ["client-0"])


def test_the_superlinks_own_processes_may_ask_it_on_loopback(keys):
    """Flower's SuperLink on 0.0.0.0 starts its server app with 127.0.0.1 as the address."""
    assert check_folder(keys, [HOST, "127.0.0.1", "::1"], ["a", "b"]) == []


def day(number: int) -> dt.datetime:
    """So many days from now."""
    return dt.datetime.now(dt.UTC) + dt.timedelta(days=number)


@pytest.mark.parametrize(("number", "words"), [(31, "expired on"), (-1, "is not valid before")])
def test_a_time_at_which_certificates_are_not_valid(keys, number, words):
    assert check_files([keys / "ca.crt", keys / "a.key"], now=day(1)) == []
    problems = check_files([keys / "ca.crt", keys / "server.crt", keys / "a.key"], now=day(number))
    assert len(problems) == 2
    for name, text in zip(("ca.crt", "server.crt"), problems, strict=True):
        assert f"{name} {words} " in text
        assert "this machine's clock says" in text
        assert "make all anew with flora deploy" in text


def test_files_that_are_missing_damaged_open_to_others_or_of_another_folder(keys, tmp_path):
    (keys / "a.key").unlink()
    (keys / "b.key").chmod(0o640)
    (keys / "a.pub").write_text("nothing")
    other = make_keys(tmp_path / "other", ["10.0.0.7"], [])
    shutil.copy(other / "server.key", keys / "server.key")
    missing, open_to_all, damaged, key, name = check_folder(keys, ["10.0.0.7"], ["a", "b"])
    assert f"{keys / 'a.key'}: No such file or directory; copy it from" in missing
    assert (
        f"b.key is a private key, and others than its owner may use the file (mode 640): chmod 600 {keys}"
        in open_to_all
    )
    assert "a.pub holds no public key, or a damaged one" in damaged
    assert "server.key is not the key of" in key
    assert f"server.crt is for {HOST}, 127.0.0.1, ::1, and not for 10.0.0.7: make all anew" in name
    shutil.copy(other / "ca.crt", keys / "ca.crt")
    assert any("server.crt was not issued by" in text for text in check_folder(keys, []))
    (keys / "server.crt").write_bytes(b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")
    assert any("server.crt holds no certificate, or a damaged one" in text for text in check_folder(keys, []))


@contextmanager
def serving(keys: Path | None) -> Iterator[int]:
    """A server on loopback that shakes hands once, with TLS if there are keys; its port."""
    server = socket.create_server(("127.0.0.1", 0))
    server.settimeout(20)

    def answer() -> None:
        with server.accept()[0] as one:
            if keys is None:
                one.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
                return
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(keys / "server.crt", keys / "server.key")
            try:
                context.wrap_socket(one, server_side=True).close()
            except OSError:
                return

    thread = threading.Thread(target=answer, daemon=True)
    thread.start()
    try:
        yield server.getsockname()[1]
    finally:
        thread.join(20)
        server.close()


def test_the_way_to_the_server(keys, tmp_path, made):
    other = make_keys(tmp_path / "other", ["10.0.0.7"], [])
    with serving(keys) as port:
        assert check_server("127.0.0.1", port, keys / "ca.crt") == ([], [])
    with serving(keys) as port:
        ((text,), _) = check_server("127.0.0.1", port, other / "ca.crt")
        assert f"the server at 127.0.0.1:{port} shows a certificate that {other / 'ca.crt'} does not vouch for" in text
        assert "self-signed certificate" in text
    with serving(None) as port:
        ((text,), _) = check_server("127.0.0.1", port, keys / "ca.crt")
        assert "does not speak TLS" in text
    problems, (note,) = check_server("127.0.0.1", port, keys / "ca.crt")
    assert problems == []
    assert f"no server answers at 127.0.0.1:{port} yet (Connection refused); the node will try again" in note


def flora(words: str) -> int:
    return main(["deploy", *shlex.split(words)])


def test_the_printed_checks_tell_each_side(keys, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        used = taken.getsockname()[1]
        assert flora(f"--check {keys} --host {HOST} --port {used}") == 2
        error = capsys.readouterr().err
        assert f"port {used} of 0.0.0.0 cannot be had: another program listens there" in error
    assert flora(f"--check {keys} --host {HOST} --port {used}") == 0
    assert flora(f"--check {keys} --host 10.0.0.7") == 2
    assert "and not for 10.0.0.7" in capsys.readouterr().err
    node = f"--check {keys}/ca.crt {keys}/a.key --superlink"
    with serving(keys) as port:
        assert flora(f"{node} 127.0.0.1:{port}") == 0
    assert flora(f"{node} 127.0.0.1:{port}") == 0
    assert "the node will try again" in capsys.readouterr().err
    assert flora(f"{node} 127.0.0.1") == 2
    assert "--superlink must be HOST:PORT, got '127.0.0.1'" in capsys.readouterr().err
    assert flora(f"--check {keys}/a.key --superlink 127.0.0.1:{port}") == 2
    assert "needs the server's ca.crt" in capsys.readouterr().err
    os.chmod(keys / "a.key", 0o644)
    assert flora(f"{node} 127.0.0.1:{port}") == 2
    assert "chmod 600" in capsys.readouterr().err


def test_deploy_makes_keys_app_and_commands_and_checks_those_that_are_there(tmp_path, capsys):
    words = f"quickstart --out {tmp_path / 'd'} --nodes a,b --host"
    assert flora(f"{words} 127.0.0.1") == 0
    told = capsys.readouterr().out
    home, keys = f"FLWR_HOME={tmp_path}/d/flower", f"{tmp_path}/d/keys"
    for word in (
        f"flora deploy --check {keys} --host 127.0.0.1 --port 9093 && {home} flower-superlink --host 127.0.0.1",
        f"{home} flwr supernode register",
        f"flora deploy --check {keys}/ca.crt {keys}/b.key --superlink 127.0.0.1:9093 --port 9095 && until flower-",
        f'client="b" folder="{tmp_path}/d/sites/b"',
        f"{home} flwr run",
    ):
        assert word in told
    assert flora(f"{words} 127.0.0.1") == 0
    assert capsys.readouterr().out == told
    app, ready = tmp_path / "d" / "flower" / "app", Path(__file__).parents[2] / "examples" / "flower"
    for name in ("flora_app/__init__.py", "flora_app/apps.py"):
        assert (app / name).read_text() == (ready / name).read_text()
    assert tomllib.loads((app / "pyproject.toml").read_text()) == tomllib.loads((ready / "pyproject.toml").read_text())
    (tmp_path / "d" / "keys" / "b.pub").unlink()
    assert flora(f"{words} {HOST}") == 2
    error = capsys.readouterr().err
    assert "b.pub: No such file" in error
    assert f"not for {HOST}" in error


def test_on_other_hosts_paths_begin_in_the_nodes_own_folder(tmp_path, capsys):
    (tmp_path / "sites.yaml").write_text("{}")
    assert flora(f"{tmp_path}/sites.yaml --out {tmp_path / 'd'} --nodes a,b --host fd00::7 --port 9200") == 0
    told = capsys.readouterr().out
    assert "flower-superlink --host :: --port 9200" in told
    assert "flora deploy --check ca.crt b.key --superlink '[fd00::7]:9200' --port 9201 && until" in told
    assert 'recipe="sites.yaml" client="b" folder="b"' in told
    assert f'recipe="{tmp_path}/sites.yaml"' in told
    assert 'address = "[fd00::7]:9200"' in (tmp_path / "d" / "flower" / "config.toml").read_text()


@pytest.mark.parametrize(
    ("words", "error"),
    [
        ("quickstart --out {0} --host 'a b' --nodes a", "hosts must be names like"),
        ("quickstart --out {0} --host x --nodes a --port 65535", "--port must leave 1 ports above it, got 65535"),
        ("quickstart --out {0} --host x --nodes a,", "a client's name must be text of one line, got ''"),
        ("quickstart --out {0}", "needs --host HOST: flora deploy --help"),
        ("--out {0} --host x", "needs a recipe"),
        ("quickstart --out {0} --host x --superlink x:1", "--superlink is for flora deploy --check"),
        ("--check {0}/none.crt", "none.crt: No such file or directory"),
    ],
)
def test_deploy_says_what_is_wrong(words, error, tmp_path, capsys):
    assert flora(words.format(tmp_path)) == 2
    assert error in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
