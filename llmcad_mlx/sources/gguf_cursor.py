"""Numbers, texts and arrays read forward through a GGUF header, each checked against what can be there."""

from __future__ import annotations

import mmap
import struct

from gguf.constants import GGUFValueType

# Far above any real model; a header past them is hostile and would only fill the memory.
MAX_HEADER_BYTES = 1 << 26  # tokens, scores and merges of the largest vocabularies: 20 MB
MAX_ARRAY_ITEMS = 1 << 22  # over the whole header; 262,144 tokens with their merges: 1.3 million
MAX_NAME_BYTES = 1 << 10

Scalar = str | int | float | bool
Value = Scalar | list[Scalar]

_SCALAR_FORMATS = {
    GGUFValueType.UINT8: "B",
    GGUFValueType.INT8: "b",
    GGUFValueType.UINT16: "H",
    GGUFValueType.INT16: "h",
    GGUFValueType.UINT32: "I",
    GGUFValueType.INT32: "i",
    GGUFValueType.FLOAT32: "f",
    GGUFValueType.UINT64: "Q",
    GGUFValueType.INT64: "q",
    GGUFValueType.FLOAT64: "d",
    GGUFValueType.BOOL: "?",
}


class DamageError(Exception):
    """The header contradicts the file; the message says where."""


class Cursor:
    """Reads forward through the mapped file, never past its end or what a header may hold."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self._items_left = MAX_ARRAY_ITEMS
        self.at = 0
        self.size = len(data)

    def left(self) -> int:
        return min(self.size, MAX_HEADER_BYTES) - self.at

    def scalar(self, code: str) -> int | float | bool:
        size = struct.calcsize("<" + code)
        self._need(size, "a value")
        (value,) = struct.unpack_from("<" + code, self._data, self.at)
        self.at += size
        result: int | float | bool = value
        return result

    def integer(self, code: str) -> int:
        return int(self.scalar(code))

    def count(self, code: str, min_bytes: int, what: str) -> int:
        """A number of things that take at least `min_bytes` each: more than fit in the file is damage."""
        number = self.integer(code)
        if number * min_bytes > self.left():
            raise DamageError(f"{number} {what} cannot fit")
        return number

    def name(self) -> str:
        """The name of a field or tensor. Errors repeat it, so it may not be long."""
        start = self.at
        name = self.text()
        if self.at - start > MAX_NAME_BYTES:
            raise DamageError(f"a name at byte {start} takes {self.at - start} bytes")
        return name

    def text(self) -> str:
        length = self.count("Q", 1, "characters of text")
        raw = self._data[self.at : self.at + length]
        self.at += length
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            raise DamageError(f"text at byte {self.at - length} is not UTF-8") from None

    def value(self) -> Value:
        kind = self._value_type()
        if kind != GGUFValueType.ARRAY:
            return self._single(kind)
        item = self._value_type()
        if item == GGUFValueType.ARRAY:
            raise DamageError("it holds nested metadata arrays")
        return self._array(item)

    def _value_type(self) -> GGUFValueType:
        number = self.integer("I")
        try:
            return GGUFValueType(number)
        except ValueError:
            raise DamageError(f"metadata type {number} is unknown") from None

    def _single(self, kind: GGUFValueType) -> Scalar:
        return self.text() if kind == GGUFValueType.STRING else self.scalar(_SCALAR_FORMATS[kind])

    def _array(self, kind: GGUFValueType) -> list[Scalar]:
        if kind == GGUFValueType.STRING:
            return [self.text() for _ in range(self._items(8, "texts"))]
        code = _SCALAR_FORMATS[kind]
        size = struct.calcsize("<" + code)
        number = self._items(size, "values")
        values = list(struct.unpack_from(f"<{number}{code}", self._data, self.at))
        self.at += number * size
        return values

    def _items(self, min_bytes: int, what: str) -> int:
        number = self.count("Q", min_bytes, what)
        if number > self._items_left:
            raise DamageError(f"its metadata arrays hold more than {MAX_ARRAY_ITEMS} {what}")
        self._items_left -= number
        return number

    def _need(self, size: int, what: str) -> None:
        if size > self.left():
            raise DamageError(f"it ends where {what} is expected, at byte {self.at}")
