"""`flora deploy`: certificates, keys and the commands that run a recipe between machines on Flower."""

from __future__ import annotations

import argparse
import logging
import shlex
import shutil
from pathlib import Path
from typing import Any

from ..common import atomic_write_bytes, check_name, require
from ..flower import key_names

_log = logging.getLogger(__name__)
# A server here is a rehearsal.
_HERE = ("127.0.0.1", "localhost", "::1")
# What Python leaves beside the app where it was run.
_NOT_OURS = shutil.ignore_patterns("__pycache__", "*.pyc")

_EXAMPLES = """examples:
  flora deploy quickstart --out deploy --host 127.0.0.1                        a rehearsal on this machine
  flora deploy hospitals.yaml --out deploy --host fl.example.org --nodes a,b   two sites, each with its own data

It makes DIR/keys (a CA, the server's certificate, a key pair for each node), DIR/flower (the app and Flower's
configuration), and prints what to run where; a DIR with keys is checked, and used as it is. docs/flower.md walks
through it. The printed commands begin with a check:

  flora deploy --check deploy/keys --host fl.example.org --port 9093    the server's files and port
  flora deploy --check ca.crt a.key --superlink fl.example.org:9093     a node's, and the way to the server
"""
# Flower looks for its configuration in $FLWR_HOME.
_CONFIG = """[superlink]
default = "flora"

[superlink.flora]
address = "{address}"
root-certificates = "{ca}"
"""


def add_parser(commands: Any) -> None:
    """Add the command's arguments."""
    parser = commands.add_parser(
        "deploy",
        help="keys and commands for a run between machines, on Flower",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("recipe", nargs="?", help="a YAML file, or the bare name of a packaged recipe")
    parser.add_argument("--out", metavar="DIR", help="folder of keys, app and configuration")
    parser.add_argument("--host", help="name or address by which nodes reach the server")
    parser.add_argument(
        "--port", type=int, help="the server's port, 9093 unless given; the nodes' here are those after it"
    )
    parser.add_argument("--nodes", help="names of the clients, with commas; those of the recipe unless given")
    parser.add_argument("--days", type=int, default=365, help="how long the certificates are valid (365 unless given)")
    parser.add_argument("--check", nargs="+", metavar="PATH", help="check certificates, keys, and --port; make nothing")
    parser.add_argument("--superlink", metavar="HOST:PORT", help="with --check: the server that a node is to reach")
    parser.set_defaults(command=deploy, extras=("train", "cli", "flower"))


def deploy(options: argparse.Namespace) -> int:
    """Make the folder and print the commands, or check what is there."""
    if options.check:
        return _check(options)
    for name, given in (("a recipe", options.recipe), ("--out DIR", options.out), ("--host HOST", options.host)):
        require(bool(given), f"flora deploy needs {name}: flora deploy --help shows examples")
    require(
        options.superlink is None,
        "--superlink is for flora deploy --check, and tells it where the server is; here --host does",
    )
    options.port = options.port or 9093
    out, names = Path(options.out).resolve(), _names(options)
    last = options.port + len(names)
    require(options.port > 0 and last < 65536, f"--port must leave {len(names)} ports above it, got {options.port}")
    _make(out, options, names)
    print("\n".join(_steps(out, options, names)))
    return 0


def _make(out: Path, options: argparse.Namespace, names: list[str]) -> None:
    """Make keys, app and configuration; what is there is checked, and stays."""
    from ..flower import check_folder, make_keys

    if (out / "keys" / "ca.crt").exists():
        _refuse(check_folder(out / "keys", [options.host], names))
    else:
        make_keys(out / "keys", [options.host], names, options.days)
    if not (out / "flower" / "app").exists():
        write_app(out / "flower" / "app")
    config = _CONFIG.format(address=_address(options.host, options.port), ca=out / "keys" / "ca.crt")
    atomic_write_bytes(out / "flower" / "config.toml", config.encode())


def _check(options: argparse.Namespace) -> int:
    """Check files, the port and the way to the server."""
    from ..flower import check_files, check_folder, check_port, check_server

    folders, files = [], []
    for path in map(Path, options.check):
        (folders if path.is_dir() else files).append(path)
    hosts = [options.host] if options.host else []
    problems, notes = check_files(files, hosts), list[str]()
    for folder in folders:
        problems += check_folder(folder, hosts)
    if options.port:
        problems += check_port("127.0.0.1" if options.superlink else _listen(options.host or ""), options.port)
    if options.superlink and not problems:
        host, _, port = options.superlink.rpartition(":")
        require(bool(host) and port.isdigit(), f"--superlink must be HOST:PORT, got {options.superlink!r}")
        authority = next((path for path in files if path.suffix == ".crt"), None)
        require(authority is not None, "--check with --superlink needs the server's ca.crt among its files")
        problems, notes = check_server(host.strip("[]"), int(port), str(authority))
    for text in notes:
        _log.warning(text)
    _refuse(problems)
    return 0


def _refuse(problems: list[str]) -> None:
    require(not problems, "; ".join(problems))


def _names(options: argparse.Namespace) -> list[str]:
    if options.nodes:
        return [check_name(name) for name in options.nodes.split(",")]
    from ..data import split_names
    from ..runs import load_recipe

    return split_names(load_recipe(options.recipe))


def write_app(folder: Path) -> Path:
    """Copy the Flower app (``examples/flower``) into a new folder."""
    from ..common import atomic_dir, packaged

    with atomic_dir(folder) as new:
        shutil.copytree(packaged("flower_app", "examples/flower"), new, dirs_exist_ok=True, ignore=_NOT_OURS)
    return folder


def _steps(out: Path, options: argparse.Namespace, names: list[str]) -> list[str]:
    """List the commands of each machine, in order; a rehearsal's run in any folder."""
    keys, recipe, here = out / "keys", options.recipe, options.host in _HERE
    file = str(Path(recipe).resolve()) if Path(recipe).is_file() else recipe
    home = f"FLWR_HOME={shlex.quote(str(out / 'flower'))}"
    listen = ["--host", _listen(options.host), "--port", str(options.port)]
    server = ["flower-superlink", *listen]
    for kind, name in (("ca-certfile", "ca.crt"), ("certfile", "server.crt"), ("keyfile", "server.key")):
        server += [f"--ssl-{kind}", str(keys / name)]
    server += ["--enable-supernode-auth", "--database", str(out / "superlink.db")]
    server += ["--disable-runtime-dependency-installation"]
    check = ["flora", "deploy", "--check", str(keys), "--host", options.host, "--port", str(options.port)]
    run = ["flwr", "run", str(out / "flower" / "app"), "flora", "--stream", "--run-config", f'recipe="{file}"']
    where = "Here, each node in a terminal of its own" if here else "On each node, in a folder of its own"
    has = "" if here else f", with its recipe, {keys / 'ca.crt'} and its own key (never another's)"
    return [
        "On every machine: this release of flora-core with the extras train, cli and flower, and the same base model",
        "(in a checkout: pip install '.[train,cli,flower]').",
        "",
        f"1. On {options.host}, the server:",
        f"   {shlex.join(check)} && {home} {shlex.join(server)}",
        "2. There too, in a second terminal, once:",
        f"   for key in {shlex.quote(str(keys))}/*.pub; do {home} flwr supernode register $key flora; done",
        f"3. {where}{has}:",
        *(f"   {line}" for line in _nodes(out, options, names, file if here else Path(file).name, here)),
        "4. In the server's second terminal, start the run (again, after a stop: it goes on):",
        f"   {home} {shlex.join(run)}",
    ]


def _nodes(out: Path, options: argparse.Namespace, names: list[str], recipe: str, here: bool) -> list[str]:
    """One line for each node; on another host paths begin in the node's folder."""
    keys, sites = (f"{out}/keys/", f"{out}/sites/") if here else ("", "")
    reach, lines = _address(options.host, options.port), []
    for place, (name, file) in enumerate(key_names(names).items(), start=1):
        # Flower reads the configuration between quotes.
        require('"' not in name, f"client {name!r}: a name in a node's configuration has no quotes; rename the client")
        ca, key, port = f"{keys}ca.crt", f"{keys}{file}.key", str(options.port + (place if here else 1))
        check = ["flora", "deploy", "--check", ca, key, "--superlink", reach, "--port", port]
        node = ["flower-supernode", "--superlink", reach, "--root-certificates", ca]
        node += ["--auth-supernode-private-key", key, "--port", port]
        node += ["--node-config", f'recipe="{recipe}" client="{name}" folder="{sites}{file}"']
        lines.append(f"{shlex.join(check)} && {again(shlex.join(node))}")
    return lines


def again(command: str) -> str:
    """A shell's line that starts a command again while it fails.

    A node that died is refused, and ends, until its last sign of life is a minute old: Flower counts it as connected.
    """
    return f"until {command}; do sleep 15; done"


def _listen(host: str) -> str:
    return host if host in _HERE else "::" if ":" in host else "0.0.0.0"


def _address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
