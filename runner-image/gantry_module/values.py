"""Values as JSON.

| Python | JSON |
|---|---|
| None, bool, int, float, str, list, dict | as they are; keys that are numbers or None become strings |
| nan, inf, -inf | "NaN", "Infinity", "-Infinity", as in the JSON form of protobuf |
| tuple, range, dict views, deque | list |
| set, frozenset | list, sorted where its items can be |
| bytes, bytearray, memoryview | base64 text |
| datetime, date, time | ISO 8601 text |
| timedelta | seconds |
| Decimal, Fraction, UUID, Path | text, exact |
| Enum | its value |
| dataclass, namedtuple | object of its fields; list |
| numpy array, scalar | nested lists, number; dates as text, missing ones null |
| pandas DataFrame | list of objects, one for each row; Series, Index: list; missing values null |

Anything else is refused with the name of its type.
"""

import base64
import collections
import dataclasses
import datetime
import decimal
import enum
import fractions
import json
import math
import pathlib
import sys
import uuid


class NotJson(Exception):
    """A value that JSON cannot hold."""

    def __init__(self, type_name: str, why: str):
        super().__init__(why)
        self.type_name = type_name


class TooLarge(Exception):
    """A value whose JSON is longer than a message may be."""


def name_of(kind: type) -> str:
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


def to_json(value, most: int) -> bytes:
    """The value as JSON of at most so many bytes."""
    refuse_long(value, most)
    try:
        try:
            text = json.dumps(value, default=lambda one: plain(one, most), allow_nan=False, separators=(",", ":"))
        except (ValueError, TypeError):
            # A number that JSON has no word for, or a key that is no text: looked at one by one.
            text = json.dumps(Walk(most).walk(value), allow_nan=False, separators=(",", ":"))
        # A lone half of a surrogate pair is escaped by json; nothing else is not ASCII.
        data = text.encode("ascii")
    except RecursionError:
        raise NotJson(name_of(type(value)), "the result is nested too deeply for JSON") from None
    except MemoryError:
        raise TooLarge("the result does not fit into the call's memory as JSON") from None
    if len(data) > most:
        raise TooLarge(f"the result is {len(data)} bytes as JSON; a reply holds {most}")
    return data


def refuse_long(value, most: int) -> None:
    """What is plainly too long is not turned into text first."""
    size = None
    if isinstance(value, (str, bytes, bytearray, list, tuple, set, frozenset, range, dict)):
        size = len(value)
    elif is_numpy(value) and hasattr(value, "size"):
        # A digit and a comma for each.
        size = 2 * int(value.size)
    if size is not None and size > most:
        raise TooLarge(f"the result, a {name_of(type(value))}, is at least {size} bytes as JSON; a reply holds {most}")


def is_numpy(value) -> bool:
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(value, (getattr(numpy, "ndarray", ()), getattr(numpy, "generic", ())))


def plain(value, most: int):
    """The same in types that json knows, one level of it."""
    refuse_long(value, most)
    if isinstance(value, (bytes, bytearray, memoryview)):
        return base64.b64encode(value).decode("ascii")
    if isinstance(value, (set, frozenset)):
        try:
            return sorted(value)
        except TypeError:
            return list(value)
    if isinstance(value, (datetime.datetime, datetime.date, datetime.time)):
        pandas = sys.modules.get("pandas")
        if pandas is not None and value is pandas.NaT:
            return None
        return value.isoformat()
    if isinstance(value, datetime.timedelta):
        return value.total_seconds()
    if isinstance(value, (decimal.Decimal, fractions.Fraction, uuid.UUID, pathlib.PurePath)):
        return str(value)
    if isinstance(value, enum.Enum):
        return value.value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, (range, collections.deque, type({}.keys()), type({}.values()), type({}.items()))):
        return list(value)
    if is_numpy(value):
        return of_numpy(value)
    return of_pandas(value)


def of_numpy(value):
    kind = value.dtype.kind
    if kind == "f" and value.dtype.itemsize > 8:
        # Wider than a float, which is all that JSON's readers know.
        return value.astype("float64").tolist()
    if kind in "biufSUOV":
        return value.tolist()
    if kind in "Mm":
        numpy = sys.modules["numpy"]
        if kind == "m":
            seconds = value / numpy.timedelta64(1, "s")
            return Walk.missing_as_null(seconds.tolist())
        texts = numpy.datetime_as_string(value).tolist()
        return Walk.missing_as_null(texts)
    raise NotJson(f"numpy.{value.dtype}", f"JSON has no form for numpy's {value.dtype}")


def of_pandas(value):
    pandas = sys.modules.get("pandas")
    if pandas is not None:
        missing = (type(pandas.NA), type(pandas.NaT))
        if isinstance(value, missing):
            return None
        if isinstance(value, pandas.DataFrame):
            rows = value.astype(object).where(value.notna(), None)
            return rows.to_dict(orient="records")
        if isinstance(value, (pandas.Series, pandas.Index)):
            return [None if lost else one for one, lost in zip(value.tolist(), value.isna().tolist())]
        if isinstance(value, pandas.api.extensions.ExtensionArray):
            return [None if lost else one for one, lost in zip(value.tolist(), value.isna().tolist())]
        if isinstance(value, (pandas.Period, pandas.Interval)):
            return str(value)
    iterates = hasattr(value, "__next__")
    hint = "; ask for a stream to get what it yields one by one" if iterates else ""
    kind = name_of(type(value))
    raise NotJson(kind, f"JSON cannot hold a value of type {kind}{hint}")


class Walk:
    """The slow way, for values that json alone refuses."""

    def __init__(self, most: int):
        self.most = most
        self.above = set()

    @staticmethod
    def missing_as_null(value):
        if isinstance(value, list):
            return [Walk.missing_as_null(one) for one in value]
        lost = value == "NaT" or (isinstance(value, float) and math.isnan(value))
        return None if lost else value

    def walk(self, value):
        if isinstance(value, float) and not math.isfinite(value):
            return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
        if value is None or isinstance(value, (str, int, float)):
            return value
        if id(value) in self.above:
            raise NotJson(name_of(type(value)), "the result holds itself, which JSON cannot")
        self.above.add(id(value))
        try:
            if isinstance(value, dict):
                return {self.key(key): self.walk(one) for key, one in value.items()}
            if isinstance(value, (list, tuple)):
                return [self.walk(one) for one in value]
            return self.walk(plain(value, self.most))
        finally:
            self.above.discard(id(value))

    def key(self, key):
        if isinstance(key, str):
            return key
        if isinstance(key, bool) or key is None:
            return json.dumps(key)
        if isinstance(key, (int, float)):
            return str(self.walk(key))
        key = plain(key, self.most)
        if isinstance(key, (str, int, float)):
            return str(key)
        kind = name_of(type(key))
        raise NotJson(kind, f"JSON cannot have a {kind} as the key of an object")
