"""Bytes for values: MessagePack for frozen values that hold numpy arrays. Decoding never runs code.

What an attacker gains who sends hostile bytes: a `ProtocolError`. Types are checked field by field, arrays are
limited to the kinds below, and an array's bytes must match its shape exactly.
"""

from typing import Any, TypeVar, get_origin

import msgspec
import numpy as np

from cohortium.core.errors import ProtocolError

T = TypeVar("T")

Data = bytes | memoryview
"""Bytes of a message, which may lie in memory that was made for it; nobody changes them."""

_KINDS = ("<f8", "<f4", "|u1", "<u2", "<u4", "<u8", "<i8", "|b1")
MAX_MESSAGE_BYTES = 1 << 31
"""Longest message that a decoder accepts, in bytes."""


class _Array(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    kind: str
    shape: tuple[int, ...]
    data: bytes


def _from_array(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        if value.dtype.str not in _KINDS:
            raise TypeError(f"arrays of type {value.dtype} do not travel")
        return _Array(value.dtype.str, value.shape, np.ascontiguousarray(value).data)  # type: ignore[arg-type]
    raise TypeError(f"values of type {type(value).__name__} do not travel")


def _to_array(kind: type, value: Any) -> Any:
    if (get_origin(kind) or kind) is not np.ndarray:
        raise TypeError(f"values of type {kind} do not travel")
    array = msgspec.convert(value, _Array)
    if array.kind not in _KINDS or any(size < 0 for size in array.shape) or len(array.shape) > 8:
        raise ValueError("an array of an unknown kind or shape")
    count = 1
    for size in array.shape:
        count *= size
    if count * np.dtype(array.kind).itemsize != len(array.data):
        raise ValueError("an array whose bytes do not match its shape")
    return np.frombuffer(array.data, dtype=array.kind).reshape(array.shape)


_encoder = msgspec.msgpack.Encoder(enc_hook=_from_array, order="deterministic")
_decoders: dict[Any, "msgspec.msgpack.Decoder[Any]"] = {}


def encode(value: object) -> bytes:
    """Returns the value's bytes; equal values give equal bytes."""
    return _encoder.encode(value)


def decode(data: Data, kind: type[T], limit: int = MAX_MESSAGE_BYTES) -> T:
    """Returns the value of type `kind` that `data` holds, if it is at most `limit` bytes. Arrays come back read-only.

    Raises:
        ProtocolError: the bytes are too long or do not hold such a value.
    """
    if len(data) > limit:
        raise ProtocolError(f"a message of {len(data)} bytes was refused: {limit} is the most here")
    decoder = _decoders.get(kind)
    if decoder is None:
        decoder = _decoders[kind] = msgspec.msgpack.Decoder(kind, dec_hook=_to_array)
    try:
        return decoder.decode(data)  # type: ignore[no-any-return]
    except (msgspec.MsgspecError, ValueError, TypeError, RecursionError) as error:
        raise ProtocolError(f"a malformed message was refused: {error}") from None
