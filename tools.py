"""Tools: what the model may call, how a call is written, and how it is run.

A language model can only write text.  A tool call is a piece of text with an agreed shape:

    <tool_call>{"name": "calculator", "arguments": {"expression": "17 * 23"}}</tool_call>

We read it (`parse_calls`), check it against the tool's JSON schema and run it (`execute`), and
give the answer back as text again (`format_result`):

    <tool_response>{"result": 391}</tool_response>

Three rules hold everywhere in this file.
  1. The model is not trusted.  It may write anything, so reading never raises and takes time
     linear in the length of the text; each mistake becomes a `CallError`, or a `Result` with a
     readable message that the model sees.  There is no `eval`: the calculator is a small parser.
  2. A tool is not trusted.  A tool of yours runs in a forked process, which is killed at the time
     limit.  This stops hangs and crashes.  It is NOT a wall against evil code: files, network and
     memory are open to it, and a tool that starts threads of torch in the child may hang there
     (and is then killed).  Results are cut to `max_chars`.
  3. Nobody forges a tag.  Inside our JSON each "<" is written \\u003c, so neither an argument nor
     a result can contain `</tool_response>` or `<|im_end|>`.

Prompts show tools as one-line signatures, a third of the tokens of JSON schemas.  This form is
not OpenAI's; `Tool.schema()` and `render_tools(tools, "json")` give theirs.

Run `python tools.py` to see the tools and some calls, right and wrong.
"""
import bisect
import contextlib
import difflib
import functools
import hashlib
import importlib
import inspect
import json
import math
import operator
import os
import re
import select
import signal
import sys
import textwrap
import threading
import time
import types
import typing
import unicodedata
import warnings
from collections import Counter
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Any, Callable

CORPORA = Path(__file__).parent / "configs" / "corpora"
CUT = "…[cut]"  # ends everything that was too long
MAX_CALL = 100_000  # characters in one call: a longer one is a runaway
MAX_ERRORS = 100  # parse errors kept per text; ten megabytes of tags would make a million
MAX_DEPTH = 50  # nesting, in JSON and in arithmetic
SURROGATE = re.compile("[\ud800-\udfff]")  # half a character: Python can hold but not print it


class UserError(ValueError):
    """A mistake of the user: one clear line that says what, where, and how to mend it."""


class ToolError(Exception):
    """Raise this inside a tool to give the model an error that it can read."""


def _nearest(name, names):
    """-> "; the nearest is 'x'", to mend a typing mistake."""
    found = difflib.get_close_matches(name[:100], list(names), n=1, cutoff=0)
    return f"; the nearest is {found[0]!r}" if found else "; there are none here"


# 1. a tool and its schema

# The last three are not JSON schema: BFCL and ToolBench write them.
TYPES = {"string": str, "integer": int, "number": (int, float), "boolean": bool, "array": list, "object": dict,
         "null": type(None), "dict": dict, "float": (int, float), "tuple": list}
HINTS = {str: "string", int: "integer", float: "number", bool: "boolean", list: "array", dict: "object"}


@dataclass(frozen=True)
class Tool:
    """One tool as the model sees it, and the Python function behind it."""
    name: str
    description: str
    parameters: dict  # JSON schema of one object: the arguments
    function: Callable | None = None  # None: can be shown to the model, not run
    isolated: bool = True  # run in a forked process under the time limit

    def __post_init__(self):
        if not isinstance(self.name, str) or not re.fullmatch(r'[^\s<>"(),]+', self.name):
            raise UserError(f"tool name {self.name!r}: must be one word without spaces, quotes, brackets or commas")
        if not isinstance(self.description, str) or not (self.function is None or callable(self.function)):
            raise UserError(f"tool {self.name}: description must be a string, and function callable or None")
        properties = self.parameters.get("properties", {}) if isinstance(self.parameters, dict) else None
        if (not isinstance(properties, dict) or not all(isinstance(field, dict) for field in properties.values())
                or not isinstance(self.parameters.get("required", []), list)):
            raise UserError(f"tool {self.name}: parameters must be a JSON schema: "
                            '{"type": "object", "properties": {"x": {"type": "string"}}, "required": ["x"]}')

    def schema(self) -> dict:
        """The OpenAI form."""
        inner = {"name": self.name, "description": self.description, "parameters": self.parameters}
        return {"type": "function", "function": inner}

    def signature(self) -> str:
        """One line: `name(p: type, q?: type = default) - first sentence`."""
        sentence = re.split(r"(?<=[.!?]) ", " ".join(self.description.split()), maxsplit=1)[0]
        return f"{self.name}({_fields(self.parameters)})" + (f" - {sentence}" if sentence else "")


def _fields(schema):
    required = schema.get("required", [])
    fields = []
    for name, field in schema.get("properties", {}).items():
        default = field.get("default")
        shown = "" if default is None else f" = {json.dumps(default, ensure_ascii=False)}"
        fields.append(f"{name}{'' if name in required else '?'}: {_type(field)}{shown}")
    return ", ".join(fields)


def _type(schema):
    kind = schema.get("type", "any")
    if "enum" in schema:
        return " | ".join(json.dumps(value, ensure_ascii=False) for value in schema["enum"])
    if isinstance(kind, list):
        return " | ".join(kind)
    if TYPES.get(kind) is list and schema.get("items"):
        return f"{kind}<{_type(schema['items'])}>"
    if TYPES.get(kind) is dict and schema.get("properties"):
        return f"{kind}{{{_fields(schema)}}}"
    return str(kind)


def tool(function=None, *, isolated=True, name=None):
    """Make a Tool from type hints and docstring: `@tool`, or `@tool(name=...)`.

    Lines "name: text" under "Args:" describe the parameters.  What has a default, or is Optional,
    is not required.  A hint without a JSON type is a UserError; no hint at all means any value.
    """
    if function is None:
        return functools.partial(tool, isolated=isolated, name=name)
    name = name or function.__name__
    description, notes = _docstring(function)
    hints = typing.get_type_hints(function)
    schema = {"type": "object", "properties": {}, "required": []}
    nothing = {}  # Optional without a default: the function still wants to be given None
    for key, parameter in inspect.signature(function).parameters.items():
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise UserError(f"tool {name}: parameter {key} can not be given by name")
        field = _hint_schema(hints.get(key, Any), f"tool {name}: parameter {key}")
        if key in notes:
            field["description"] = notes[key]
        if parameter.default is not parameter.empty:
            field.update({} if parameter.default is None else {"default": parameter.default})
        elif type(None) in typing.get_args(hints.get(key)):
            nothing[key] = None
        else:
            schema["required"].append(key)
        schema["properties"][key] = field
    return Tool(name, description, schema, functools.partial(function, **nothing) if nothing else function, isolated)


def _hint_schema(hint, where):
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        inner = [part for part in inner if part is not type(None)]
        if len(inner) == 1:  # Optional[X]
            return _hint_schema(inner[0], where)
    elif origin is typing.Literal:
        kinds = {HINTS.get(type(value)) for value in inner}
        return {"type": kinds.pop(), "enum": list(inner)} if len(kinds) == 1 else {"enum": list(inner)}
    elif origin is list:
        return {"type": "array", "items": _hint_schema(inner[0], where)}
    elif hint is Any:
        return {}
    elif (origin or hint) in HINTS:
        return {"type": HINTS[origin or hint]}
    raise UserError(f"{where}: type {hint} has no JSON form; use str, int, float, bool, dict, list[...] or Literal")


def _docstring(function):
    """Google style -> (description, {parameter: text})."""
    parts = re.split(r"\n(Args|Returns|Raises|Yields|Examples?|Notes?):[ ]*\n", "\n" + (inspect.getdoc(function) or ""))
    notes, name = {}, None
    for line in parts[parts.index("Args") + 1].splitlines() if "Args" in parts[1::2] else []:
        if match := re.match(r" {1,4}(\w+)(?: *\([^)]*\))?: *(.*)", line):
            name = match[1]
            notes[name] = match[2]
        elif name and line.strip():  # the text goes on
            notes[name] = f"{notes[name]} {line.strip()}".strip()
    return parts[0].strip(), notes


def tool_from_schema(schema: dict, function=None) -> Tool:
    """Make a Tool from OpenAI's {"type": "function", "function": {...}} or from the inner dict.

    In the inner dict "function": "package.module:name" says where the Python function is.  It is
    imported, so take schemas with this key only from your own configs, never from a data set.
    """
    inner = schema.get("function") if isinstance(schema, dict) and isinstance(schema.get("function"), dict) else schema
    if not isinstance(inner, dict) or "name" not in inner:
        raise UserError(f"tool schema {schema!r:.80}: must be an object with name, description and parameters")
    function = function if function is not None else inner.get("function")
    if isinstance(function, str):
        module, _, attribute = function.partition(":")
        try:
            function = getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError, ValueError) as error:
            raise UserError(f"tool {inner['name']}: can not import {function!r} ({error}); "
                            'write "package.module:name"') from error
        function = function.function if isinstance(function, Tool) else function
    parameters = inner.get("parameters")
    parameters = {"type": "object", "properties": {}} if parameters is None else parameters
    return Tool(inner["name"], inner.get("description") or "", parameters, function)


def load_tools(items=None) -> dict:
    """{name: Tool} from names of built-ins, Tool objects and schemas; None: the three built-ins."""
    if items is not None and not isinstance(items, (list, tuple)):
        raise UserError(f"tools: must be a list of names, Tool objects or schemas, not {items!r:.80}")
    tools = {}
    for item in BUILTIN if items is None else items:
        if isinstance(item, str):
            if item not in BUILTIN:
                raise UserError(f"tools: unknown tool {item!r}{_nearest(item, BUILTIN)}")
            item = BUILTIN[item]
        elif not isinstance(item, Tool):
            item = tool_from_schema(item)
            built_in = BUILTIN.get(item.name)
            if item.function is None and built_in and item.parameters.get("properties", {}).keys() == built_in.parameters["properties"].keys():
                item = replace(item, function=built_in.function, isolated=False)  # a built-in in other words still runs
        if item.name in tools:
            raise UserError(f"tools: {item.name!r} is there twice; give each tool its own name")
        tools[item.name] = item
    return tools


def render_tools(tools, style="signature") -> str:
    """The text that tells the model about its tools, one a line."""
    if style not in ("signature", "json"):
        raise UserError(f"tool style {style!r}: must be 'signature' or 'json'")
    tools = tools.values() if isinstance(tools, dict) else tools
    return "\n".join(tool.signature() if style == "signature" else _dumps(tool.schema()) for tool in tools)


# 2. the grammar of a call

@dataclass
class Call:
    name: str
    arguments: dict


@dataclass
class CallError:
    position: int  # character offset in the text
    reason: str
    text: str  # the offending piece, cut to 200 characters


def _dumps(value):
    """JSON that can be printed anywhere and holds no tag."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    return SURROGATE.sub("\ufffd", text).replace("<", "\\u003c")


def format_call(call: Call) -> str:
    return f"<tool_call>{_dumps({'name': call.name, 'arguments': call.arguments})}</tool_call>"


def parse_calls(text) -> tuple:
    """-> (calls, errors) of a text by the model.  Never raises; linear time.

    Text between calls is free.  Kindly taken: arguments as a string that holds a JSON object, no
    arguments, a comma too many before } or ].  A tag inside a tag is an error; reading goes on
    with the inner one, so one call that was left open does not swallow the next.
    """
    calls, errors = [], []
    if not isinstance(text, str):
        return [], [CallError(0, f"not text but {type(text).__name__}", "")]

    def refuse(start, end, reason):
        if len(errors) < MAX_ERRORS:
            errors.append(CallError(start, reason, SURROGATE.sub("\ufffd", text[start:min(end, start + 200)])))

    opened = None  # the <tool_call> that waits for its end
    for tag in re.finditer(r"<(/?)tool_call>", text):
        if not tag[1]:
            if opened:
                refuse(opened.start(), tag.start(), "another <tool_call> begins before </tool_call>")
            opened = tag
        elif not opened:
            refuse(tag.start(), tag.end(), "</tool_call> without <tool_call>")
        else:
            try:
                calls.append(_read_call(text, opened.end(), tag.start()))
            except (ValueError, RecursionError) as error:
                refuse(opened.start(), tag.end(), str(error))
            opened = None
    if opened:
        refuse(opened.start(), len(text), "<tool_call> without </tool_call>")
    return calls, errors


def _read_call(text, start, end):
    if end - start > MAX_CALL:
        raise ValueError(f"the call is longer than {MAX_CALL} characters")
    data = _loads(text[start:end])
    if not isinstance(data, dict):
        raise ValueError("the call is not a JSON object")
    if unknown := set(data) - {"name", "arguments"}:
        raise ValueError(f"unexpected key {min(unknown)!r:.80}: a call has name and arguments")
    name, arguments = data.get("name"), data.get("arguments", {})
    if not isinstance(name, str) or not name.strip():
        raise ValueError("the call has no name" if name in (None, "") else "the name is not a word")
    arguments = _loads(arguments) if isinstance(arguments, str) else arguments
    if not isinstance(arguments, dict):
        raise ValueError("the arguments are not a JSON object")
    return Call(name, arguments)


def _loads(text):
    """Strict JSON, but for trailing commas; raises ValueError."""
    def pairs(items):
        if len(items) != len(dict(items)):
            raise ValueError("the same key twice in one object")
        return dict(items)

    def constant(name):
        raise ValueError(f"not JSON: {name}")

    load = functools.partial(json.loads, object_pairs_hook=pairs, parse_constant=constant)
    try:
        return _clean(load(text))
    except json.JSONDecodeError as error:
        # A string is matched whole and kept; so only a comma outside of strings goes.
        repaired = re.sub(r'("(?:[^"\\]|\\.)*(?:"|\\?\Z))|,(?=\s*[}\]])', r"\1", text, flags=re.DOTALL)
        if repaired == text:
            raise ValueError(f"not JSON: {error}") from error
        return _clean(load(repaired))
    except RecursionError as error:
        raise ValueError(f"nested deeper than {MAX_DEPTH}") from error


def _clean(value, depth=0):
    """The same JSON value, printable, finite and not too deep for those who walk through it."""
    if depth > MAX_DEPTH:
        raise ValueError(f"nested deeper than {MAX_DEPTH}")
    if isinstance(value, str):
        return SURROGATE.sub("\ufffd", value)
    if isinstance(value, list):
        return [_clean(item, depth + 1) for item in value]
    if isinstance(value, dict):
        return {_clean(key): _clean(item, depth + 1) for key, item in value.items()}
    if isinstance(value, float) and not math.isfinite(value):  # 1e999
        raise ValueError("a number is too large")
    return value


# 3. running a call

@dataclass
class Result:
    name: str
    ok: bool
    value: Any = None
    error_type: str = ""
    message: str = ""
    max_chars: int = 1000

    def text(self) -> str:
        """{"result": ...} or {"error": ...}, valid JSON of at most `max_chars` characters.

        (An impossible cap, under 25 or so, still gives the bare marker.)
        """
        key, value = ("result", _plain(self.value, self.max_chars)) if self.ok else ("error", str(self.message))
        whole = _dumps({key: value})
        if len(whole) <= self.max_chars:
            return whole
        inner = value if isinstance(value, str) else _dumps(value)
        # Escapes make text grow, so search for the longest start that still fits.
        length = bisect.bisect_right(range(self.max_chars), self.max_chars,
                                     key=lambda length: len(_dumps({key: inner[:length] + CUT})))
        return _dumps({key: inner[:max(length - 1, 0)] + CUT})


def format_result(result: Result) -> str:
    return f"<tool_response>{result.text()}</tool_response>"


def execute(call, tools, timeout=5.0, max_chars=1000) -> Result:
    """Check and run one call.  Never raises (Ctrl-C excepted): each failure is a Result.

    error_type: unknown_tool, unknown_argument, missing_argument, wrong_type, not_executable,
    timeout, crashed, bad_result, or tool_error for a ToolError of the tool itself.
    """
    name = call.name if isinstance(call, Call) and isinstance(call.name, str) else ""
    if name not in tools:
        return _failed(name, "unknown_tool", f"unknown tool {name[:100]!r}{_nearest(name, tools)}", max_chars)
    tool = tools[name]
    try:
        if tool.function is None:
            return _failed(name, "not_executable", f"{name} can be shown but not run: it has no function", max_chars)
        if problem := next(_check(call.arguments, {"type": "object", "properties": {}, **tool.parameters}, ""), None):
            return _failed(name, *problem, max_chars)
        if not tool.isolated:
            return _run(tool, call.arguments, max_chars)
        return (_run_in_child if hasattr(os, "fork") else _run_in_thread)(tool, call.arguments, timeout, max_chars)
    except Exception as error:  # a broken schema, no more processes, an exception that can not be printed
        return _failed(name, "crashed", f"{name} could not be run: {type(error).__name__}", max_chars)


def _failed(name, error_type, message, max_chars):
    message = SURROGATE.sub("\ufffd", message)
    return Result(name, False, None, error_type, message if len(message) <= max_chars else message[:max_chars] + CUT,
                  max_chars)


def _check(value, schema, where):
    """Yield (error type, message) for each way in which `value` breaks `schema`.  No coercion."""
    label = f"argument {where!r}" if where else "the arguments"
    kinds = schema.get("type", [])
    kinds = [kinds] if isinstance(kinds, str) else kinds
    classes = [TYPES.get(kind, object) for kind in kinds]  # an unknown type name: anything goes
    # In Python True is an int; in JSON it is not.
    fits = [isinstance(value, kind) and (not isinstance(value, bool) or kind in (bool, object)) for kind in classes]
    if kinds and not any(fits):
        yield "wrong_type", f"{label} must be {_type(schema)}, not {_brief(value)}"
        return
    if "enum" in schema and not any(value == one and isinstance(value, bool) == isinstance(one, bool)
                                    for one in schema["enum"]):
        yield "wrong_type", f"{label} must be {_type(schema)}, not {_brief(value)}"
    if isinstance(value, list) and isinstance(schema.get("items"), dict):
        for index, item in enumerate(value):
            yield from _check(item, schema["items"], f"{where}[{index}]")
    if isinstance(value, dict) and "properties" in schema:
        properties, prefix = schema["properties"], where + "." if where else ""
        for key in value:
            if key not in properties and not schema.get("additionalProperties"):
                yield "unknown_argument", f"unknown argument {prefix + key[:100]!r}{_nearest(key, properties)}"
        for key in schema.get("required", []):
            if key not in value:
                yield "missing_argument", f"missing argument {prefix + key!r}"
        for key in properties:
            if key in value:
                yield from _check(value[key], properties[key], prefix + key)


def _brief(value):
    return textwrap.shorten(_dumps(value), 60, placeholder="…")


def _run(tool, arguments, max_chars):
    try:
        value = tool.function(**arguments)
    except ToolError as error:
        return _failed(tool.name, "tool_error", str(error), max_chars)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # SystemExit too
        return _failed(tool.name, "crashed", f"{type(error).__name__}: {error}", max_chars)
    try:
        return Result(tool.name, True, _plain(value, max_chars), max_chars=max_chars)
    except Exception as error:
        return _failed(tool.name, "bad_result", f"the result can not be written: {type(error).__name__}", max_chars)


def _plain(value, max_chars):
    """`value` as JSON holds it, else its str(); as a cut string where it is too long."""
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
        plain = _clean(json.loads(text), 1)
    except (TypeError, ValueError, RecursionError):
        plain = text = _clean(str(value))
    if len(text) <= max_chars:
        return plain
    return _clean(plain if isinstance(plain, str) else text)[:max_chars] + CUT


FORKING = threading.Lock()


def _run_in_child(tool, arguments, timeout, max_chars):
    """Run in a forked process; its result comes back as one line of JSON through a pipe."""
    deadline = time.monotonic() + timeout
    # The lock keeps our pipe out of a child that another thread forks: it would hold it open.
    with FORKING, warnings.catch_warnings():
        # Python 3.12 warns of fork beside threads (torch has some); our child touches no lock of theirs.
        warnings.simplefilter("ignore", DeprecationWarning)
        reader, writer = os.pipe()
        pid = os.fork()
        if pid:
            os.close(writer)
    if pid == 0:
        _child(tool, arguments, timeout, max_chars, writer)
    received, timed_out, status = b"", False, 0
    poller = select.poll()
    poller.register(reader, select.POLLIN)
    try:
        while not received.endswith(b"\n") and len(received) < 1000 + 13 * max_chars:
            left = deadline - time.monotonic()
            if timed_out := left <= 0 or not poller.poll(left * 1000):
                break
            chunk = os.read(reader, 1 << 16)
            if not chunk:
                break
            received += chunk
    finally:
        os.close(reader)
        for kill in (os.killpg, os.kill):  # the group, and the child if it had no time to make one
            with contextlib.suppress(OSError):
                kill(pid, signal.SIGKILL)
        with contextlib.suppress(OSError):
            status = os.waitpid(pid, 0)[1]
    if timed_out:
        return _failed(tool.name, "timeout", f"no answer within {timeout:g} seconds", max_chars)
    if not received:
        code = os.waitstatus_to_exitcode(status)
        return _failed(tool.name, "crashed", f"{tool.name} ended without a result (exit code {code})", max_chars)
    try:
        ok, value, error_type, message = _loads(received.decode())
    except (ValueError, TypeError):
        return _failed(tool.name, "bad_result", f"{tool.name} sent something unreadable", max_chars)
    return Result(tool.name, ok is True, value, str(error_type), str(message), max_chars)


def _child(tool, arguments, timeout, max_chars, writer):
    """The life of the forked process; it never returns."""
    try:
        os.setpgid(0, 0)  # a group of its own, so that its children die with it
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(int(min(timeout, 86_400)) + 2)  # should the parent die first
        null = os.open(os.devnull, os.O_RDWR)
        for descriptor in (0, 1, 2):
            os.dup2(null, descriptor)
        sys.stdout = sys.stderr = open(os.devnull, "w")
        result = _run(tool, arguments, max_chars)
        line = json.dumps([result.ok, result.value, result.error_type, result.message]).encode() + b"\n"
        with open(writer, "wb") as pipe:
            pipe.write(line)
    finally:
        os._exit(1)  # not sys.exit: nothing of the parent's may be flushed or cleaned up twice


def _run_in_thread(tool, arguments, timeout, max_chars):
    """Where there is no fork (Windows).  A thread can not be killed: a hanging tool hangs on."""
    results = []
    thread = threading.Thread(target=lambda: results.append(_run(tool, arguments, max_chars)), daemon=True)
    thread.start()
    thread.join(timeout)
    return results[0] if results else _failed(tool.name, "timeout", f"no answer within {timeout:g} seconds", max_chars)


# 4. calculator

MAX_EXPRESSION = 1000  # characters
MAX_BITS = 3000  # of an exact number: 900 digits
SPELLING = str.maketrans({"×": "*", "·": "*", "⋅": "*", "÷": "/", "−": "-", "–": "-", "^": "**", "²": "**2", "³": "**3",
                          "$": "", "€": "", "£": ""})
NUMBER = r"(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d{1,3}(?!\d))?"
OTHER = r"|[a-z_]+|\*\*|//|\S)"
PLAIN = re.compile(rf"\s*({NUMBER}{OTHER}", re.ASCII | re.IGNORECASE)
GROUPED = re.compile(rf"\s*(\d{{1,3}}(?:,\d{{3}})+(?![\d,])(?:\.\d*)?|{NUMBER}{OTHER}", re.ASCII | re.IGNORECASE)


def calculate(expression: str) -> int | float:
    """Evaluate arithmetic: + - * / // % ** and parentheses, sqrt abs min max round.

    Numbers are kept as exact fractions as long as possible, so 0.1 + 0.2 is 0.3 and 6 / 2 is 3.
    Spellings: 1,234 (inside a function's parentheses a comma separates: min(1,234) is 1);
    $ and € are dropped, "=" or "= ?" at the end too; "3 x 4"; "15% of 200".
    `%` before a number, a name or "(" is modulo, else percent: 17 % 5 is 2, 15% is 0.15.
    Percent is only a number: 200 + 10% is 200.1.
    """
    if not isinstance(expression, str):
        raise ToolError("the expression must be text")
    if len(expression) > MAX_EXPRESSION:
        raise ToolError(f"the expression is longer than {MAX_EXPRESSION} characters")
    tokens = _tokens(expression.translate(SPELLING).rstrip("=? \t\n"))[::-1]  # a stack: the next is the last
    try:
        value = _evaluate(tokens, 0, 0)
        if tokens:
            raise ToolError(f"unexpected {tokens[-1]!r}")
        return _rounded(value)
    except ZeroDivisionError:
        raise ToolError("division by zero") from None
    except (OverflowError, RecursionError):
        raise ToolError("a number is too large") from None


def _tokens(text):
    tokens, calls, position = [], [], 0  # calls: is each open parenthesis that of a function?
    while match := (PLAIN if calls[-1:] == [True] else GROUPED).match(text, position):
        token, position = match[1].lower(), match.end()
        if token == "(":
            calls.append(tokens[-1:] != [] and tokens[-1] in FUNCTIONS)
        elif token == ")":
            del calls[-1:]
        tokens.append(token)
    return tokens


def _evaluate(tokens, binding, depth):
    """Precedence climbing: one operand, then all operators that bind at least as tightly."""
    if depth > MAX_DEPTH:
        raise ToolError(f"nested deeper than {MAX_DEPTH}")
    if not tokens:
        raise ToolError("the expression ends too early")
    token = tokens.pop()
    if token in ("+", "-"):  # a sign binds less than ** and more than *: -2 ** 2 is -4
        value = _evaluate(tokens, 3, depth + 1) * (-1 if token == "-" else 1)
    elif token == "(":
        value = _evaluate(tokens, 0, depth + 1)
        _expect(tokens, ")")
    elif token in FUNCTIONS:
        _expect(tokens, "(")
        arguments = [_evaluate(tokens, 0, depth + 1)]
        while tokens[-1:] == [","]:
            tokens.pop()
            arguments.append(_evaluate(tokens, 0, depth + 1))
        _expect(tokens, ")")
        least, most, function = FUNCTIONS[token]
        if not least <= len(arguments) <= most:
            raise ToolError(f"{token} does not take {len(arguments)} arguments")
        value = function(*arguments)
    elif re.match(r"\.?[0-9]", token):
        value = Fraction(token.replace(",", ""))
    else:
        raise ToolError(f"unknown name {token[:50]!r}" if token[0].isalpha() else f"unexpected {token!r}")
    value = _bounded(value)
    while tokens[-1:] == ["%"] and not re.match(r"\.?[0-9]|\(|(?!(x|of)$)[a-z]", "".join(tokens[-2:-1])):
        tokens.pop()
        value = _bounded(value / 100)
    while tokens and tokens[-1] in OPERATORS and OPERATORS[tokens[-1]][0] >= binding:
        level, function = OPERATORS[tokens.pop()]
        value = _bounded(function(value, _evaluate(tokens, level + (level != 4), depth + 1)))
    return value


def _expect(tokens, wanted):
    if tokens[-1:] != [wanted]:
        raise ToolError(f"expected {wanted!r}, found {tokens[-1]!r}" if tokens else f"missing {wanted!r}")
    tokens.pop()


def _bits(value):
    return max(value.numerator.bit_length(), value.denominator.bit_length())


def _bounded(value):
    """An integer may not grow without end; a long fraction becomes a float."""
    if isinstance(value, complex):
        raise ToolError("the result is not a real number")
    if not isinstance(value, float) and _bits(value) > MAX_BITS:
        if value.denominator == 1:
            raise OverflowError
        value = float(value)
    if isinstance(value, float) and not math.isfinite(value):
        raise OverflowError
    return value


def _power(base, exponent):
    exact = not isinstance(base, float) and not isinstance(exponent, float) and exponent.denominator == 1
    if exact and _bits(base) * abs(exponent) <= MAX_BITS:
        return Fraction(base) ** int(exponent)
    return float(base) ** float(exponent)  # overflows at once for 9 ** 9 ** 9


def _sqrt(value):
    if value < 0:
        raise ToolError("square root of a negative number")
    roots = [math.isqrt(part) for part in value.as_integer_ratio()]
    exact = Fraction(*roots)
    return exact if exact * exact == value else math.sqrt(value)


def _round(value, digits=0):
    if digits != int(digits) or abs(digits) > 100:
        raise ToolError("round takes a whole number of digits, at most 100")
    return round(value, int(digits))


def _rounded(value):
    """Whole numbers as int; exact decimals as they are; else 10 digits, at least 2 after the point."""
    if not isinstance(value, float) and value.denominator == 1:
        return int(value)
    number = float(value)
    if isinstance(value, Fraction) and Fraction(repr(number)) == value:
        return number
    number = float(f"{number:.{max(10, len(str(int(abs(number)))) + 2)}g}")
    return int(number) if number.is_integer() and abs(number) < 1e15 else number


FUNCTIONS = {"sqrt": (1, 1, _sqrt), "abs": (1, 1, abs), "round": (1, 2, _round),
             "min": (1, 1000, lambda *values: min(values)), "max": (1, 1000, lambda *values: max(values))}
OPERATORS = {"+": (1, operator.add), "-": (1, operator.sub), "*": (2, operator.mul), "x": (2, operator.mul),
             "of": (2, operator.mul), "/": (2, operator.truediv), "//": (2, operator.floordiv), "%": (2, operator.mod),
             "**": (4, _power)}


# 5. weather: a stand-in for a web service, the same answer each time

CONDITIONS = ("sunny", "partly cloudy", "cloudy", "light rain", "heavy rain", "windy", "foggy", "clear")
LETTERS = str.maketrans({"ł": "l", "ø": "o", "đ": "d", "ð": "d", "ı": "i", "æ": "ae", "œ": "oe", "þ": "th",
                         "'": "", "’": ""})


def _normal(text):
    """Lower case without accents and punctuation: "São  Paulo" -> "sao paulo"."""
    letters = unicodedata.normalize("NFKD", text.casefold())
    letters = "".join(letter for letter in letters if not unicodedata.combining(letter)).translate(LETTERS)
    return re.sub(r"[\W_]+", " ", letters).strip()


@functools.lru_cache(maxsize=8)
def _cities(path):
    try:
        cities = json.loads(Path(path).read_text(encoding="utf-8"))["cities"]
        return {_normal(city["name"]): city["name"] for city in reversed(cities)}  # of two, the first one stays
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: no list of cities ({type(error).__name__}: {error}); "
                        'it needs {"cities": [{"name": ...}]}') from error


def weather(city: str, unit: str = "celsius", path=None) -> dict:
    """The weather in a known city; case, accents and a ", Country" at the end do not matter."""
    cities = _cities(str(path or os.environ.get("TOOLPLAY_CITIES") or CORPORA / "cities.json"))
    if unit not in ("celsius", "fahrenheit"):
        raise ToolError(f"unknown unit: {unit}")
    key = next((key for key in (_normal(city), _normal(city.split(",")[0])) if key in cities), None)
    if key is None:
        raise ToolError(f"unknown city: {city[:100]}")
    digest = hashlib.sha256(key.encode()).digest()  # not hash(): that one changes from run to run
    celsius = digest[0] % 41 - 5
    condition = "light snow" if celsius < 1 and digest[1] % 2 else CONDITIONS[digest[2] % len(CONDITIONS)]
    temperature = round(celsius * 9 / 5 + 32) if unit == "fahrenheit" else celsius
    return {"city": cities[key], "temperature": temperature, "unit": unit, "condition": condition}


# 6. search: BM25 over a small text file

STOP_WORDS = frozenset("""a about an and any are as at be been by can could did do does for from give had has have how i
    in is it its me my of on or please should show so some tell that the their them there these they this to up us
    was we were what when where which who whom whose why will with would you your""".split())
MIN_SCORE = 0.1


def _terms(text):
    """Words that carry meaning, in the singular: "The cities of bees" -> ["city", "bee"]."""
    words = [word for word in _normal(text).split() if word not in STOP_WORDS]
    return [re.sub(r"(?<=\w\w[^sui])s$", "", re.sub(r"(?<=\w\w)ies$", "y", word)) for word in words]


@functools.lru_cache(maxsize=8)
def _index(path):
    """-> (pages, counts of terms in each page, number of pages that hold each term)."""
    pages, number = [], 0
    try:
        for number, line in enumerate(Path(path).read_text(encoding="utf-8").split("\n"), 1):
            page = json.loads(line) if line.strip() else {"comment": ""}
            if "title" in page or "comment" not in page:
                pages.append({"title": str(page["title"]), "text": str(page["text"])})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}, line {number}: no page ({type(error).__name__}: {error}); "
                        'it needs {"title": ..., "text": ...}') from error
    counts = [Counter(_terms(f"{page['title']} {page['text']}")) for page in pages]
    return pages, counts, Counter(term for count in counts for term in count)


def search(query: str, path=None) -> list:
    """At most two pages, best first, by BM25 (Robertson and Zaragoza 2009, k1 = 1.5, b = 0.75)."""
    if not query.strip():
        raise ToolError("the query is empty")
    pages, counts, holders = _index(str(path or os.environ.get("TOOLPLAY_SEARCH") or CORPORA / "search.jsonl"))
    terms = [term for term in dict.fromkeys(_terms(query)) if term in holders]
    rarity = {term: math.log(1 + (len(pages) - holders[term] + 0.5) / (holders[term] + 0.5)) for term in terms}
    mean = sum(count.total() for count in counts) / max(len(pages), 1)
    scores = []
    for count in counts:
        norm = 1.5 * (0.25 + 0.75 * count.total() / max(mean, 1))
        scores.append(sum(rarity[term] * count[term] * 2.5 / (count[term] + norm) for term in terms))
    best = sorted(range(len(pages)), key=lambda page: -scores[page])[:2]  # sorted() keeps the order of ties
    return [{"title": pages[page]["title"], "text": textwrap.shorten(pages[page]["text"], 200, placeholder="…")}
            for page in best if scores[page] > MIN_SCORE]


def _parameters(required, **properties):
    return {"type": "object", "properties": properties, "required": [required]}


BUILTIN = {tool.name: tool for tool in (
    Tool("calculator", "Evaluate an arithmetic expression.", _parameters("expression", expression={
        "type": "string", "description": "such as 12 * (3 + 4)"}), calculate, isolated=False),
    Tool("weather", "Get the current weather in a city.", _parameters("city", city={"type": "string"}, unit={
        "type": "string", "enum": ["celsius", "fahrenheit"]}), weather, isolated=False),
    Tool("search", "Search the web.", _parameters("query", query={"type": "string"}), search, isolated=False))}


def main():
    tools = load_tools()
    print(render_tools(tools))
    examples = [("calculator", {"expression": "15% of 1,240"}), ("weather", {"city": "krakow, Poland"}),
                ("search", {"query": "how do bees make honey"}), ("calculator", {"expression": "9 ** 9 ** 9"}),
                ("wether", {"city": "Paris"}), ("calculator", {"expression": 12})]
    for text in [format_call(Call(*example)) for example in examples] + ['<tool_call>{"name": "calculator"']:
        calls, errors = parse_calls(text)
        print(f"\n{text}")
        for call in calls:
            print(f"  {format_result(execute(call, tools))}")
        for error in errors:
            print(f"  at {error.position}: {error.reason}")


if __name__ == "__main__":
    main()
