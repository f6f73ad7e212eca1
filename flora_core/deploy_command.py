"""`flora deploy`: certificates, keys and the commands that run a recipe between machines on Flower."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import Any

_EXAMPLES = """examples:
  flora deploy quickstart --out deploy --host 127.0.0.1                        a rehearsal on this machine
  flora deploy hospitals.yaml --out deploy --host fl.example.org --nodes a,b   two sites, each with its own data

It makes DIR/keys (a CA, the server's certificate, a key pair for each node), DIR/flower (the app and Flower's
configuration), and prints what to run where. docs/flower.md walks through it.
"""
# Flower looks for its configuration in $FLWR_HOME; the app is what examples/flower has.
_CONFIG = """[superlink]
default = "flora"

[superlink.flora]
address = "{host}:{port}"
root-certificates = "{ca}"
"""
_APP = """[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "flora-app"
version = "0.1.0"
description = "Federated LoRA fine-tuning with flora-core"
license = "Apache-2.0"
dependencies = ["flora-core[flower]"]

[tool.hatch.build.targets.wheel]
packages = ["flora_app"]

[tool.flwr.app]
publisher = "flora"

[tool.flwr.app.components]
serverapp = "flora_app.apps:server"
clientapp = "flora_app.apps:client"

# `--run-config 'recipe="/path/run.yaml" overrides="federation.rounds=5"'` changes these.
[tool.flwr.app.config]
recipe = "quickstart"
overrides = ""
min-nodes = 0 # as many as the recipe has clients
join-timeout = 600
round-timeout = 3600
"""
_SIDES = '''"""The two sides that Flower starts; all that they do is in ``flora_core.flower``."""

from flora_core.flower import client_app, server_app

server = server_app()
client = client_app()
'''


def add_parser(commands: Any) -> None:
    """Add the command's arguments."""
    parser = commands.add_parser(
        "deploy",
        help="keys and commands for a run between machines, on Flower",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("recipe", help="a YAML file, or the bare name of a packaged recipe")
    parser.add_argument("--out", required=True, metavar="DIR", help="new folder of keys, app and configuration")
    parser.add_argument("--host", required=True, help="name or address by which nodes reach the server")
    parser.add_argument("--port", type=int, default=9093, help="the server's port (9093 unless given)")
    parser.add_argument("--nodes", help="names of the clients, with commas; those of the recipe unless given")
    parser.add_argument("--days", type=int, default=365, help="how long the certificates are valid (365 unless given)")
    parser.set_defaults(command=deploy)


def deploy(options: argparse.Namespace) -> int:
    """Make the folder and print the commands."""
    from .keys import make_keys

    out, names = Path(options.out).resolve(), _names(options)
    make_keys(out / "keys", [options.host], names, options.days)
    write_app(out / "flower" / "app")
    config = _CONFIG.format(host=options.host, port=options.port, ca=out / "keys" / "ca.crt")
    (out / "flower" / "config.toml").write_text(config)
    print("\n".join(_steps(out, options, names)))
    return 0


def _names(options: argparse.Namespace) -> list[str]:
    if options.nodes:
        return options.nodes.split(",")
    from .build import build_clients
    from .recipes import load

    return [spec.name for spec in build_clients(load(options.recipe))[0]]


def write_app(folder: Path) -> Path:
    """Write the Flower app into a new folder."""
    from .files import atomic_dir

    with atomic_dir(folder) as new:
        (new / "flora_app").mkdir()
        (new / "pyproject.toml").write_text(_APP)
        (new / "flora_app" / "__init__.py").write_text('"""flora-core as a Flower app."""\n')
        (new / "flora_app" / "apps.py").write_text(_SIDES)
    return folder


def _steps(out: Path, options: argparse.Namespace, names: list[str]) -> list[str]:
    """What to run where, in order."""
    keys, recipe = out / "keys", options.recipe
    recipe = str(Path(recipe).resolve()) if Path(recipe).is_file() else recipe
    server = ["flower-superlink", "--host", _listen(options.host), "--port", str(options.port)]
    for kind, name in (("ca-certfile", "ca.crt"), ("certfile", "server.crt"), ("keyfile", "server.key")):
        server += [f"--ssl-{kind}", str(keys / name)]
    server += ["--enable-supernode-auth", "--database", str(out / "superlink.db")]
    server += ["--disable-runtime-dependency-installation"]
    node = ["flower-supernode", "--superlink", f"{options.host}:{options.port}", "--root-certificates", "ca.crt"]
    text = [
        "Everywhere: pip install 'flora-core[train,cli,flower]', and the same base model.",
        "",
        f"1. On {options.host}, the server:",
        f"   export FLWR_HOME={shlex.quote(str(out / 'flower'))}",
        f"   {shlex.join(server)}",
        f"2. There too, once: for key in {shlex.quote(str(keys))}/*.pub; do flwr supernode register $key flora; done",
        f"3. On each node, with its recipe, {keys / 'ca.crt'} and its own key (never another's):",
    ]
    for place, name in enumerate(names):
        config = f'recipe="{recipe}" client="{name}" folder="sites/{name}"'
        own = ["--auth-supernode-private-key", f"{name}.key", "--port", str(options.port + 1 + place)]
        text.append(f"   {again(shlex.join([*node, *own, '--node-config', config]))}")
    run = ["flwr", "run", str(out / "flower" / "app"), "flora", "--stream", "--run-config", f'recipe="{recipe}"']
    return [*text, "4. On the server, start the run (again, after a stop: it goes on):", f"   {shlex.join(run)}"]


def again(command: str) -> str:
    """A shell's line that starts a command again while it fails.

    A node that died is refused, and ends, until its last sign of life is a minute old: Flower counts it as connected.
    """
    return f"until {command}; do sleep 15; done"


def _listen(host: str) -> str:
    return host if host in ("127.0.0.1", "localhost") else "0.0.0.0"


__all__ = ["add_parser", "again", "deploy", "write_app"]
