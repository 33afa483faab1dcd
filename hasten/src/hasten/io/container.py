"""One container for what is shared: a header (kind, format, digest, content) and perhaps tensors.

With tensors it is a safetensors file whose metadata has the header as JSON under `"hasten"`; without, a JSON file. The
digest is over the content and all tensors, and is checked whenever the file is read. It finds damage, not malice: who
changes a file on purpose can make a new digest, which is why the content is checked as well.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save

from hasten.errors import ConfigError, HastenError
from hasten.io.atomic import write_atomically
from hasten.io.documents import MIB, Limits, describe, open_regular, parse_json, read_bytes
from hasten.io.schema import as_path, conform, shown

__all__ = ["Kind", "digest_of", "read_record", "read_tensors", "write_record", "write_tensors"]

FORMAT = 2
KEY = "hasten"
HEADER = Limits(8 * MIB)
MOST_TENSORS = 10_000
MOST_DIMENSIONS = 8
DTYPES = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "<i1",
    "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "<u1", "BOOL": "|b1",
}  # fmt: skip

T = TypeVar("T")
Entry = tuple[str, np.dtype[Any], tuple[int, ...]]  # name, type and shape of a tensor
Tensors = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class Kind(Generic[T]):
    """A kind of file.

    Attributes:
        name: in the header.
        content: annotation that the header's content conforms to, such as a dataclass.
        error: class of the errors that a bad file raises.
        remedy: sentence that ends their messages.
        most: bytes of the largest file that is read.
    """

    name: str
    content: type[T]
    error: type[HastenError]
    remedy: str
    most: int = 64 * MIB


def digest_of(content: Any, tensors: Tensors | None = None) -> str:
    """Digest of a header's content (plain JSON values) and tensors, SHA-256 in hexadecimal digits."""
    digest = hashlib.sha256(json.dumps(content, sort_keys=True, allow_nan=False).encode())
    for name, array in sorted((tensors or {}).items()):
        digest.update(json.dumps([name, array.dtype.str, array.shape]).encode())
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def write_tensors(path: str | Path, kind: Kind[Any], tensors: Tensors, content: Mapping[str, Any]) -> Path:
    """Write tensors and the header's content, atomically; returns the path.

    Raises:
        ConfigError: if a value cannot be kept: a number that is not finite, or something that is no JSON.
        FileError: if the file cannot be written.
    """
    arrays = {name: np.asarray(array, order="C") for name, array in tensors.items()}  # keeps scalars scalars
    header = json.dumps(_header(kind, content, arrays))
    return write_atomically(path, save(arrays, metadata={KEY: header}))


def write_record(path: str | Path, kind: Kind[Any], content: Mapping[str, Any]) -> Path:
    """Write plain values as JSON, atomically; returns the path and raises as `write_tensors`."""
    return write_atomically(path, json.dumps(_header(kind, content), indent=1) + "\n")


def _header(kind: Kind[Any], content: Mapping[str, Any], arrays: Tensors | None = None) -> dict[str, Any]:
    try:
        plain = json.loads(json.dumps(content, allow_nan=False))  # as it will be read: tuples become lists
    except (TypeError, ValueError) as error:
        raise ConfigError(f"a {kind.name} cannot be kept: {error}; give finite numbers, text and lists") from error
    return {"kind": kind.name, "format": FORMAT, "digest": digest_of(plain, arrays), "content": plain}


def read_tensors(path: str | Path, kind: Kind[T]) -> tuple[dict[str, NDArray[Any]], T]:
    """Read what `write_tensors` wrote: the tensors, and the header's content.

    Raises:
        HastenError: of the kind's class, if the file is missing, too large, damaged, of another kind, or its header
            does not conform. No more memory is asked for than the file has bytes.
    """
    path = as_path(path)
    try:
        file, size = open_regular(path, kind.most)
        with file:
            metadata, entries = _entries(file, size)
            header = _checked_header(parse_json(metadata.get(KEY, "null"), HEADER), kind)
            tensors = {name: _read(file, dtype, shape) for name, dtype, shape in entries}
        return tensors, _content(header, kind, tensors)
    except FileNotFoundError as missing:
        raise kind.error(f"{path}: no such file. {kind.remedy}") from missing
    except (OSError, ValueError) as error:
        raise kind.error(f"{path}: no usable {kind.name} ({describe(error)}). {kind.remedy}") from error


def read_record(path: str | Path, kind: Kind[T]) -> T:
    """Read what `write_record` wrote; raises as `read_tensors`."""
    path = as_path(path)
    try:
        header = _checked_header(parse_json(read_bytes(path, kind.most), Limits(kind.most)), kind)
        return _content(header, kind, {})
    except FileNotFoundError as missing:
        raise kind.error(f"{path}: no such file. {kind.remedy}") from missing
    except (OSError, ValueError) as error:
        raise kind.error(f"{path}: no usable {kind.name} ({describe(error)}). {kind.remedy}") from error


def _checked_header(header: Any, kind: Kind[Any]) -> dict[str, Any]:
    """The header, if it is one of this kind and format."""
    if not isinstance(header, dict) or "kind" not in header:
        raise ValueError("it was not written by hasten, or by a version before 0.2")
    if header["kind"] != kind.name:
        raise ValueError(f"it holds another kind of thing: {shown(header['kind'])}")
    if header.get("format") != FORMAT:
        raise ValueError(f"its format is {shown(header.get('format'))}, expected {FORMAT}: another version wrote it")
    if set(header) != {"kind", "format", "digest", "content"}:
        raise ValueError("its header is incomplete")
    return header


def _content(header: dict[str, Any], kind: Kind[T], tensors: Tensors) -> T:
    if header["digest"] != digest_of(header["content"], tensors):
        raise ValueError("damaged: the content does not have the digest that it was written with")
    made: T = conform(header["content"], kind.content, "the header")
    return made


def _entries(file: BufferedReader, size: int) -> tuple[dict[str, Any], list[Entry]]:
    """Metadata of an open safetensors file, and its tensors in the order in which they lie.

    Raises:
        ValueError: if sizes and offsets do not add up to the file's size.
    """
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > min(HEADER.size, size - 8):
        raise ValueError("cut off, or no safetensors file")
    table = parse_json(file.read(length), HEADER)
    if not isinstance(table, dict) or len(table) > MOST_TENSORS:
        raise ValueError(f"expected a table of at most {MOST_TENSORS} tensors")
    metadata = table.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise ValueError("its metadata is no text")
    found = [(name, *_entry(name, entry)) for name, entry in table.items()]
    position = 0
    for name, dtype, shape, first, last in sorted(found, key=lambda entry: entry[3:]):
        if first != position or last - first != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"the place of {shown(name)} does not fit its shape")
        position = last
    if position != size - 8 - length:
        raise ValueError(f"it has {size} bytes, expected {8 + length + position}: cut off or damaged")
    return metadata, [entry[:3] for entry in sorted(found, key=lambda entry: entry[3:])]


def _entry(name: str, entry: Any) -> tuple[np.dtype[Any], tuple[int, ...], int, int]:
    try:
        dtype, shape = np.dtype(DTYPES[entry["dtype"]]), entry["shape"]
        first, last = entry["data_offsets"]
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"the entry of {shown(name)} is incomplete or of an unknown type") from None
    numbers = [*shape, first, last] if isinstance(shape, list) else [None]
    if not all(type(number) is int and number >= 0 for number in numbers) or len(shape) > MOST_DIMENSIONS:
        raise ValueError(f"the entry of {shown(name)} has an impossible shape or place")
    return dtype, tuple(shape), first, last


def _read(file: BufferedReader, dtype: np.dtype[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    array = np.empty(math.prod(shape), dtype)
    if array.size and file.readinto(array.view(np.uint8).data) != array.nbytes:
        raise ValueError("cut off while it was read")
    if dtype.kind == "b" and array.size and array.view(np.uint8).max() > 1:
        raise ValueError("a truth value is neither 0 nor 1")
    return array.reshape(shape)
