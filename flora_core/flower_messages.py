"""What travels between the two sides on Flower: JSON values as one text, tensors as safetensors buffers.

A buffer keeps bfloat16, which Flower's own arrays do not. Tensors that many messages have in common are one record of
all of them: Flower keeps and stores equal records once.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict

from . import __version__
from .checks import require
from .site import Tensors

_ORDER, _PAYLOAD, _SHARED = "order", "payload", "shared"
# What reading a message of somebody else may raise.
BROKEN = (ValueError, KeyError, TypeError, AttributeError)


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
    content = RecordDict({_ORDER: ConfigRecord({"json": json.dumps({**order, "version": __version__})})})
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
        ValueError: If it is not what ``pack`` makes, larger, or made by another version.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    parts: Any = content
    try:
        order, buffers = json.loads(str(parts[_ORDER]["json"])), _buffers(parts)
        size, other = sum(map(len, buffers)), order.pop("version", "an unknown version")
        text = f"its flora-core is {other}, and this side's {__version__}: install the same version on both sides"
        require(other == __version__, text)
        fits = limit_bytes is None or size <= limit_bytes
        require(fits, f"its payload has {size} bytes, and its configuration announced at most {limit_bytes}")
        return order, {name: tensor for data in buffers for name, tensor in load(data).items()}
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError, SafetensorError) as error:
        raise ValueError(f"its message is damaged, or no message of this program ({error})") from None


def _buffers(content: Any) -> list[bytes]:
    return [content[name]["tensors"].data for name in (_SHARED, _PAYLOAD) if name in content]


def size_of(content: Any) -> int:
    """Bytes of a message's content, a ``RecordDict``, without what Flower wraps around it."""
    return sum(map(len, _buffers(content))) + len(str(content[_ORDER]["json"]))


def read(reply: Message, limit_bytes: int | None = None) -> tuple[dict[str, Any], Tensors]:
    """A reply's content; ``ValueError`` with the node's own reason if it failed."""
    if reply.has_error():
        raise ValueError(f"its node failed: {reply.error.reason or f'code {reply.error.code}'}")
    order, tensors = unpack(reply.content, limit_bytes)
    require("error" not in order, f"its node says: {order.get('error')}")
    return order, tensors


__all__ = ["BROKEN", "pack", "read", "record", "size_of", "unpack"]
