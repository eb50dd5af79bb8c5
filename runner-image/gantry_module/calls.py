"""One call, in a worker: the name is looked up, the arguments are bound, what comes of it is a `Reply`."""

import importlib
import inspect
import json
import sys
import traceback
import types

from gantry_module import values

#: Kinds of failure, as module_service.proto numbers them.
METHOD_NOT_FOUND, METHOD_PRIVATE, METHOD_NOT_CALLABLE, ARGUMENTS_WRONG, RAISED = 1, 2, 3, 4, 5
RESULT_NOT_JSON, RESULT_TOO_LARGE, DEADLINE, CRASHED, OUT_OF_MEMORY = 6, 7, 8, 9, 10
BUSY, MODULE_NOT_FOUND, MODULE_BROKEN = 11, 12, 13

#: Longest texts of a failure and of a description; a reply stays readable, and bounded.
MAX_MESSAGE, MAX_TRACEBACK, MAX_DOC = 4 << 10, 16 << 10, 4 << 10

#: Most functions and names in a description.
MAX_FUNCTIONS = 2_000

#: Signatures that are kept: working one out takes longer than most calls.
MAX_SIGNATURES = 1_024

#: Deepest dotted name.
MAX_PARTS = 10

signatures = {}


class Failed(Exception):
    """A call that came to nothing, and why."""

    def __init__(self, kind: int, message: str, type_name: str = "", trace: str = ""):
        super().__init__(message)
        self.kind = kind
        self.type_name = type_name
        self.trace = trace

    def as_json(self) -> bytes:
        told = {
            "kind": self.kind,
            "type": self.type_name[:MAX_MESSAGE],
            "message": str(self)[:MAX_MESSAGE],
            "traceback": self.trace[-MAX_TRACEBACK:],
        }
        return json.dumps(told).encode()


def find(module, method: str):
    """What the dotted name names, if it may be called."""
    parts = method.split(".")
    if len(parts) > MAX_PARTS or not all(part.isidentifier() for part in parts):
        raise Failed(METHOD_NOT_FOUND, f"{method[:200]!r} is not a name of a function")
    private = next((part for part in parts if part.startswith("_")), None)
    if private:
        raise Failed(METHOD_PRIVATE, f"{private} is private: names that begin with an underscore are not called from outside")
    found, path = module, module.__name__
    for part in parts:
        found = step(found, path, part)
        path += f".{part}"
    return found


def step(found, path: str, part: str):
    try:
        return getattr(found, part)
    except AttributeError:
        pass
    if isinstance(found, types.ModuleType) and hasattr(found, "__path__"):
        # A part of a package that the package itself did not import.
        try:
            return importlib.import_module(f"{found.__name__}.{part}")
        except ModuleNotFoundError as error:
            if error.name != f"{found.__name__}.{part}":
                raise
    raise Failed(METHOD_NOT_FOUND, f"{path} has no {part}{similar(found, part)}")


def similar(found, part: str) -> str:
    import difflib

    names = [name for name in dir(found) if not name.startswith("_")]
    close = difflib.get_close_matches(part, names, 3)
    return f"; it has {', '.join(close)}" if close else ""


def signature_of(method: str, function):
    known = signatures.get(method)
    if known is not None and known[0] is function:
        return known[1]
    try:
        signature = inspect.signature(function)
    except (ValueError, TypeError):
        signature = None
    if len(signatures) >= MAX_SIGNATURES:
        signatures.clear()
    signatures[method] = (function, signature)
    return signature


def arguments(args: bytes, kwargs: bytes):
    def parsed(name, text, kind, words):
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise Failed(ARGUMENTS_WRONG, f"{name} is not JSON that can be read: {error or 'it is nested too deeply'}") from None
        if not isinstance(value, kind):
            raise Failed(ARGUMENTS_WRONG, f"{name} must be {words}, not {type(value).__name__}")
        return value

    return (
        parsed("args", args or b"[]", list, "a list"),
        parsed("kwargs", kwargs or b"{}", dict, "an object"),
    )


def invoke(module, method: str, args: bytes, kwargs: bytes):
    """Calls it: the result, and whether the list itself was passed."""
    positional, named = arguments(args, kwargs)
    function = find(module, method)
    if not callable(function):
        kind = values.name_of(type(function))
        raise Failed(METHOD_NOT_CALLABLE, f"{module.__name__}.{method} is a value of type {kind}, not a function", kind)
    signature = signature_of(method, function)
    if signature is None:
        return invoke_unknown(module, method, function, positional, named)
    try:
        signature.bind(*positional, **named)
    except TypeError as error:
        if not named and positional and binds(signature, positional):
            return function(positional), True
        raise Failed(
            ARGUMENTS_WRONG, f"the arguments do not fit {method}{signature}: {error}", "TypeError"
        ) from None
    return function(*positional, **named), False


def binds(signature, positional) -> bool:
    try:
        signature.bind(positional)
    except TypeError:
        return False
    return True


def invoke_unknown(module, method, function, positional, named):
    """A function in C that does not tell its parameters: only calling it shows whether they fit."""
    try:
        return function(*positional, **named), False
    except TypeError as error:
        # Raised by the function itself, not by Python code below it.
        inside = error.__traceback__ is not None and error.__traceback__.tb_next is not None
        if inside or named or not positional:
            raise
        try:
            return function(positional), True
        except TypeError:
            raise error from None


def awaited(result):
    """A coroutine function's result is what it returns."""
    if not inspect.iscoroutine(result):
        return result
    import asyncio

    return asyncio.run(result)


def told(error: BaseException) -> Failed:
    """What an exception of the module's own code is to the caller."""
    if isinstance(error, Failed):
        return error
    if isinstance(error, values.NotJson):
        return Failed(RESULT_NOT_JSON, str(error), error.type_name)
    if isinstance(error, values.TooLarge):
        return Failed(RESULT_TOO_LARGE, str(error))
    kind = values.name_of(type(error))
    try:
        message = str(error)
    except Exception:
        message = "its message cannot be read"
    if isinstance(error, MemoryError):
        return Failed(OUT_OF_MEMORY, message or "it asked for more memory than a call may use", kind, trace_of(error))
    return Failed(RAISED, message, kind, trace_of(error))


def trace_of(error: BaseException) -> str:
    """The traceback, without the frames of this package at its beginning."""
    trace = error.__traceback__
    while trace is not None and trace.tb_frame.f_globals.get("__package__") == "gantry_module":
        trace = trace.tb_next
    try:
        return "".join(traceback.format_exception(type(error), error, trace))
    except Exception:
        return ""


def describe(module, namespace: str) -> dict:
    """What can be called, as Description has it."""
    found = find(module, namespace) if namespace else module
    listed = getattr(found, "__all__", None)
    listed = listed if isinstance(listed, (list, tuple)) else []
    names = sorted({name for name in listed or dir(found) if isinstance(name, str) and not name.startswith("_")})
    functions, namespaces = [], []
    for name in names:
        try:
            one = getattr(found, name)
        except Exception:
            continue
        if isinstance(one, types.ModuleType):
            # What a module imported for its own use is no part of it.
            if one.__name__.startswith(module.__name__ + ".") or name in listed:
                namespaces.append(name)
        elif callable(one):
            functions.append((name, one))
    return {
        "module": module.__name__,
        "version": version_of(module),
        "doc": doc_of(found),
        "functions": [
            {
                "name": name,
                "signature": signature_text(one),
                "doc": doc_of(one),
                "is_class": isinstance(one, type),
            }
            for name, one in functions[:MAX_FUNCTIONS]
        ],
        "namespaces": namespaces[:MAX_FUNCTIONS],
        "truncated": len(functions) > MAX_FUNCTIONS,
    }


def signature_text(one) -> str:
    try:
        return str(inspect.signature(one))[:MAX_MESSAGE]
    except Exception:
        return ""


def doc_of(one) -> str:
    try:
        return (inspect.getdoc(one) or "")[:MAX_DOC]
    except Exception:
        return ""


def version_of(module) -> str:
    version = getattr(module, "__version__", None)
    if isinstance(version, str):
        return version[:100]
    top = module.__name__.partition(".")[0]
    if top in sys.stdlib_module_names:
        return "Python " + sys.version.split()[0]
    return ""
