"""Runs between machines, on Flower's network."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..lazy import face

if TYPE_CHECKING:
    from .certificate_checks import check_files, check_folder, check_port, check_server
    from .certificates import key_names, make_keys
    from .link import FloraStrategy, FlowerLink, run_server, serve, server_app
    from .messages import pack, unpack
    from .node import client_app

__getattr__, __dir__, __all__ = face(__name__, __file__)
