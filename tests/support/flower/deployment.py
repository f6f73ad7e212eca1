"""A real SuperLink and real SuperNodes on loopback, with TLS and node authentication, for a tiny federation."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from flora_core.cli.deploy import again
from flora_core.flower.certificates import make_keys
from tests.support.federations import make_clients, make_model, make_records, make_tokenizer

ROOT = Path(__file__).resolve().parents[3]


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


def write_recipe(folder: Path, ranks: Sequence[int], rounds: int, hidden: int = 16, **train: Any) -> Path:
    """A recipe with its model and data in ``folder``; every client trains alone (token_budget of one token)."""
    specs = make_clients(ranks)
    make_model(hidden=max(hidden, *ranks)).save_pretrained(folder / "model")
    make_tokenizer().save_pretrained(folder / "model")
    for name, records in (*((spec.name, spec.data) for spec in specs), ("test", make_records("b held out", 6))):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    paths = {spec.name: str(folder / f"{spec.name}.jsonl") for spec in specs}
    recipe = {
        "model": str(folder / "model"),
        "target_modules": ["q_proj", "v_proj"],
        "data": {"path": paths, "test": str(folder / "test.jsonl")},
        "clients": {"ranks": list(ranks), "count": None},
        "train": {"lr": 1e-2, "batch_size": 2, "max_length": 32, "token_budget": 1, **train},
        "federation": {"rounds": rounds},
        "device": "cpu",
        "out": str(folder / "out"),
    }
    # JSON is YAML.
    (folder / "run.yaml").write_text(json.dumps(recipe))
    return folder / "run.yaml"


class Deployment:
    """One SuperLink, its nodes, and the app that runs on them; everything lies in ``folder``."""

    def __init__(self, folder: Path, recipe: Path, nodes: Sequence[str]):
        self.folder, self.recipe, self.names = folder, recipe, list(nodes)
        self.port, *ports = _free_ports(1 + len(nodes) + 2)
        self.ports = dict(zip([*nodes, "stranger", "keyless"], ports, strict=True))
        self.keys = make_keys(folder / "keys", ["127.0.0.1"], [*nodes, "stranger"])
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        (folder / "home").mkdir()
        (folder / "home" / "config.toml").write_text(
            f'[superlink]\ndefault = "rehearsal"\n\n[superlink.rehearsal]\naddress = "127.0.0.1:{self.port}"\n'
            f'root-certificates = "{self.keys / "ca.crt"}"\n'
        )
        paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
        own = {"FLWR_HOME": str(folder / "home"), "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
        quiet = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "OMP_WAIT_POLICY": "PASSIVE"}
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        self.environment = {**os.environ, **own, **quiet, "PATH": path}

    def start(self, name: str, *words: str, **environment: str) -> None:
        """Start a process of its own group, whose output goes to ``name.log``."""
        values = {**self.environment, **environment}
        with open(self.folder / f"{name}.log", "ab") as log:
            self.running[name] = subprocess.Popen(
                words, stdout=log, stderr=log, cwd=self.folder, env=values, start_new_session=True
            )

    def start_link(self) -> None:
        """Start the SuperLink, with its database on disk, and wait until it answers."""
        files = [f"--ssl-{kind}={self.keys / name}" for kind, name in _CERTIFICATES.items()]
        kept = f"--database={self.folder / 'link.db'}"
        port = ["--port", str(self.port), "--disable-runtime-dependency-installation"]
        before = self.log("link").count("Uvicorn running")
        self.start("link", "flower-superlink", *files, "--enable-supernode-auth", kept, *port)
        self.wait_for("link", "Uvicorn running", times=before + 1)

    def register(self) -> None:
        """Tell the SuperLink whose keys are known."""
        for name in self.names:
            words = ["flwr", "supernode", "register", str(self.keys / f"{name}.pub"), "rehearsal"]
            done = subprocess.run(
                words, env=self.environment, cwd=self.folder, capture_output=True, text=True, timeout=60
            )
            assert "registered successfully" in done.stdout, done.stdout + done.stderr

    def start_node(
        self,
        name: str,
        client: str | None = None,
        with_key: bool = True,
        until_taken: bool = False,
        port: int | None = None,
        **environment: str,
    ) -> None:
        """Start a SuperNode that answers for a client.

        Args:
            name: Its key and its log.
            client: Whom it answers for; its name unless given.
            with_key: Whether it shows its key.
            until_taken: Start it again while the SuperLink refuses it, with the line that ``flora deploy`` prints.
            port: Where it finds the SuperLink, if not at its own port.
            environment: Variables of its own.
        """
        config = {"recipe": self.recipe, "client": client or name, "folder": self.folder / "sites" / name}
        words = ["--root-certificates", str(self.keys / "ca.crt"), "--superlink", f"127.0.0.1:{port or self.port}"]
        words += ["--port", str(self.ports[name]), "--node-config", " ".join(f'{k}="{v}"' for k, v in config.items())]
        words += ["--auth-supernode-private-key", str(self.keys / f"{name}.key")] if with_key else []
        node = ["flower-supernode", *words]
        self.start(name, *(["sh", "-c", again(shlex.join(node))] if until_taken else node), **environment)

    def processes(self, name: str, word: str = "") -> list[psutil.Process]:
        """A process and all that it started, those alone whose command has a word in it."""
        found = []
        with contextlib.suppress(psutil.NoSuchProcess):
            first = psutil.Process(self.running[name].pid)
            for one in (first, *first.children(recursive=True)):
                # One that ended and was not waited for has no command.
                with contextlib.suppress(psutil.NoSuchProcess):
                    found += [one] if word in " ".join(one.cmdline()) else []
        return found

    def kill(self, name: str) -> None:
        """Kill a process and all that it started."""
        for process in self.processes(name):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.running.pop(name).wait()

    def stop(self, name: str, word: str = "") -> list[psutil.Process]:
        """Stop a process and all that it started with SIGSTOP; returns those that were, once there is one."""
        deadline = time.monotonic() + 60
        while not (found := self.processes(name, word)):
            assert time.monotonic() < deadline, f"{name} started no {word}"
            time.sleep(0.02)
        for process in found:
            process.suspend()
        return found

    def log(self, name: str) -> str:
        """Output of a process."""
        path = self.folder / f"{name}.log"
        return path.read_text(errors="replace") if path.is_file() else ""

    def wait_for(self, name: str, text: str, seconds: float = 240.0, times: int = 1) -> None:
        """Wait until a process has printed a text so many times."""
        deadline = time.monotonic() + seconds
        while len(re.findall(text, self.log(name))) < times:
            assert time.monotonic() < deadline, (
                f"{name} did not print {text!r} in {seconds} s:\n{self.log(name)[-3000:]}"
            )
            time.sleep(0.2)

    def events(self, kind: str) -> list[dict[str, Any]]:
        """The events of a kind that the server has written down so far."""
        path = self.folder / "out" / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
        events = [json.loads(line) for line in lines if line.endswith("\n")]
        return [event for event in events if event["event"] == kind]

    def wait_for_round(self, number: int, kind: str = "round_start", seconds: float = 500.0) -> None:
        """Wait until a round starts, or ends."""
        deadline = time.monotonic() + seconds
        while all(event["round"] != number for event in self.events(kind)):
            assert time.monotonic() < deadline, f"no {kind} {number} in {seconds} s:\n{self.log('run')[-3000:]}"
            time.sleep(0.1)

    def submit(self, app: Path = ROOT / "examples" / "flower", **config: Any) -> None:
        """Start the app; its log goes to ``run.log``."""
        values = {"recipe": str(self.recipe), **{name.replace("_", "-"): value for name, value in config.items()}}
        words = " ".join(f"{name}={json.dumps(value)}" for name, value in values.items())
        self.start("run", "flwr", "run", str(app), "rehearsal", "--stream", "--run-config", words)


_CERTIFICATES = {"ca-certfile": "ca.crt", "certfile": "server.crt", "keyfile": "server.key"}


@contextmanager
def deployed(folder: Path, recipe: Path, nodes: Sequence[str]) -> Iterator[Deployment]:
    """A deployment whose SuperLink runs and knows the nodes' keys; nothing is left running."""
    deployment = Deployment(folder, recipe, nodes)
    try:
        deployment.start_link()
        deployment.register()
        yield deployment
    finally:
        for name in list(deployment.running):
            deployment.kill(name)


__all__ = ["Deployment", "deployed", "write_recipe"]
