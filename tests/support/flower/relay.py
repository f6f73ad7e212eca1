"""A TCP relay that stands between a node and its server and counts the bytes, as they are on the wire."""

from __future__ import annotations

import contextlib
import socket
import threading


class Relay:
    """Pass every connection to ``port`` of this machine on; ``up`` and ``down`` count what clients sent and were sent.

    Args:
        target: The server's port.
    """

    def __init__(self, target: int):
        self.target, self.up, self.down = target, 0, 0
        self.server = socket.create_server(("127.0.0.1", 0))
        self.port: int = self.server.getsockname()[1]
        self._counting = threading.Lock()
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self.server.accept()
                try:
                    far = socket.create_connection(("127.0.0.1", self.target))
                except OSError:
                    near.close()
                    continue
                threading.Thread(target=self._join, args=(near, far), daemon=True).start()

    def _join(self, near: socket.socket, far: socket.socket) -> None:
        """Pass both ways until one side ends; then close both."""
        with near, far:
            down = threading.Thread(target=self._pass, args=(far, near, "down"), daemon=True)
            down.start()
            self._pass(near, far, "up")
            down.join()

    def _pass(self, source: socket.socket, sink: socket.socket, way: str) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                with self._counting:
                    setattr(self, way, getattr(self, way) + len(data))
                sink.sendall(data)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Take no more connections."""
        with contextlib.suppress(OSError):
            self.server.shutdown(socket.SHUT_RDWR)
        self.server.close()


__all__ = ["Relay"]
