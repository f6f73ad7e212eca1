"""The two sides that Flower starts; all that they do is in ``flora_core.flower``."""

from flora_core.flower import client_app, server_app

server = server_app()
client = client_app()
