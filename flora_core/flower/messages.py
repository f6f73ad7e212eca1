"""Messages between the two sides on Flower: JSON values as one text, tensors as safetensors buffers.

A buffer keeps bfloat16, which Flower's own arrays do not. Tensors that many messages have in common are one record of
all of them: Flower keeps and stores equal records once.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict

from ..common import require
from ..federation import Tensors
from ..version import __version__

_ORDER, _PAYLOAD, _SHARED = "order", "payload", "shared"
# Counts up when a message's form or meaning changes, whatever the package's version.
PROTOCOL = 1
# What reading a message of somebody else may raise.
BROKEN = (ValueError, KeyError, TypeError, AttributeError)


class NodeError(ValueError):
    """A node's own reason why it did not do what it was asked for."""


def record(tensors: Tensors) -> ArrayRecord | None:
    """Tensors of any dtype as one record; None for none."""
    from safetensors.torch import save

    if not tensors:
        return None
    data = save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
    return ArrayRecord({"tensors": Array("uint8", (len(data),), "safetensors", data)})


def pack(order: Mapping[str, Any], tensors: Tensors | None = None, shared: ArrayRecord | None = None) -> RecordDict:
    """Make a message's content.

    Args:
        order: JSON values; the version of this package is put beside them.
        tensors: What is for this message alone.
        shared: A ``record`` that other messages carry too.
    """
    text = json.dumps({**order, "version": __version__, "protocol": PROTOCOL})
    content = RecordDict({_ORDER: ConfigRecord({"json": text})})
    for name, part in ((_PAYLOAD, record(tensors or {})), (_SHARED, shared)):
        if part is not None:
            content[name] = part
    return content


def unpack(content: RecordDict, limit_bytes: int | None = None) -> tuple[dict[str, Any], Tensors]:
    """Read what ``pack`` made.

    Args:
        content: A message's content.
        limit_bytes: Refuse more than so many bytes of tensors, before they are read.
    Raises:
        ValueError: If it is not what ``pack`` makes, larger, or of a version that does not fit (``_check_version``).
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    parts: Any = content
    try:
        order, buffers = json.loads(str(parts[_ORDER]["json"])), _buffers(parts)
        _check_version(order.pop("version", "an unknown version"), order.pop("protocol", None))
        size = sum(map(len, buffers))
        fits = limit_bytes is None or size <= limit_bytes
        require(fits, f"its payload has {size} bytes, and its configuration announced at most {limit_bytes}")
        return order, {name: tensor for data in buffers for name, tensor in load(data).items()}
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError, SafetensorError) as error:
        raise ValueError(f"its message is damaged, or no message of this program ({error})") from None


def _check_version(other: Any, protocol: Any) -> None:
    """Refuse another protocol, major or minor version; what else may differ is warned of (``Parties``)."""
    series = __version__.split(".")[:2]
    require(
        protocol == PROTOCOL and str(other).split(".")[:2] == series,
        f"its flora-core is {other} (protocol {protocol}), and this side's {__version__} (protocol {PROTOCOL}): "
        f"install the same {'.'.join(series)} on both sides",
    )


def _buffers(content: Any) -> list[bytes]:
    return [content[name]["tensors"].data for name in (_SHARED, _PAYLOAD) if name in content]


def size_of(content: Any) -> int:
    """Bytes of a message's content, a ``RecordDict``, without what Flower wraps around it."""
    return sum(map(len, _buffers(content))) + len(str(content[_ORDER]["json"]))


def read(reply: Message, limit_bytes: int | None = None) -> tuple[dict[str, Any], Tensors]:
    """A reply's content; ``NodeError`` with the node's own reason, or ``ValueError`` if it cannot be read."""
    if reply.has_error():
        raise ValueError(f"its node failed: {reply.error.reason or f'code {reply.error.code}'}")
    order, tensors = unpack(reply.content, limit_bytes)
    if "error" in order:
        raise NodeError(f"its node says: {order['error']}")
    return order, tensors
