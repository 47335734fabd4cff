"""Tools: what the model may call, how a call is written, and how it is run.

A language model can only write text.  A tool call is a piece of text with an agreed form:

    <tool_call>{"name": "calculator", "arguments": {"expression": "17 * 23"}}</tool_call>

We parse this text (`parse_calls`), check the call against the tool's JSON schema and run it
(`execute`), and return the result to the model as text (`format_result`):

    <tool_response>{"result": 391}</tool_response>

Three rules hold everywhere in this file.
  1. The model is not trusted.  It may write anything, so parsing never raises and takes time
     linear in the length of the text.  Each mistake becomes a `CallError`, or a `Result` with a
     readable message that the model sees.  There is no `eval`: the calculator walks a syntax tree.
  2. Tools are not trusted.  A custom tool runs in a forked process, which is killed at the time
     limit.  The process stops hangs and crashes.  It is NOT a sandbox against malicious code: the
     tool has access to files, network and memory, and what it starts in a session of its own lives
     on.  A tool that starts torch threads in the child process may hang there (and is then killed).
     Results are cut to `max_chars`.
  3. Nobody can forge a tag.  Inside our JSON each "<" is written \\u003c, so neither an argument
     nor a result can contain `</tool_response>` or `<|im_end|>`.

Prompts show tools as one-line signatures, which take a third of the tokens of JSON schemas.
Signatures are not OpenAI's format; `Tool.schema()` and `render_tools(tools, "json")` return it.

`weather` and `search` read configs/corpora/cities.json and search.jsonl beside this file, or the files that
TOOLPLAY_CITIES and TOOLPLAY_SEARCH name; all else works if this file is copied alone.

Run `python tools.py` to see the tools and some calls, right and wrong.
"""
import ast
import contextlib
import difflib
import functools
import hashlib
import inspect
import itertools
import json
import math
import operator
import os
import pkgutil
import re
import signal
import socket
import sys
import textwrap
import threading
import time
import types
import typing
import unicodedata
import urllib.parse
from collections import Counter
from collections.abc import AsyncIterator, Hashable, Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

CORPORA = Path(__file__).parent / "configs" / "corpora"
CUT = "…[cut]"  # the end of every text that was cut
MAX_CALL = 100_000  # characters in one call; a longer text is runaway output
MAX_ERRORS = 100  # parse errors kept per text; ten megabytes of tags would cause a million errors
MAX_DEPTH = 50  # nesting levels in JSON
ANYTHING = {}  # the schema that any value fits
SURROGATE = re.compile("[\ud800-\udfff]")  # half a character: Python can store it but not print it


class UserError(ValueError):
    """A mistake of the user. The message is one clear line: what is wrong, where, and how to fix it."""


class ToolError(Exception):
    """Raise this inside a tool to give the model an error that it can read."""


def _nearest(name, names):
    """-> "; the nearest is 'x'", a hint for a typing mistake; "" if no name is near."""
    return "".join(f"; the nearest is {found!r}"
                   for found in difflib.get_close_matches(name[:100], list(names), n=1, cutoff=0.5))


# 1. a tool and its schema

# The names from "dict" on are not JSON schema, but BFCL, ToolBench and people write them.
TYPES = {"string": [str], "integer": [int], "number": [int, float], "boolean": [bool], "array": [list],
         "object": [dict], "null": [type(None)],
         "dict": [dict], "float": [int, float], "tuple": [list], "str": [str], "int": [int], "double": [int, float],
         "bool": [bool], "list": [list]}
JSON_TYPES = {kind for kinds in TYPES.values() for kind in kinds}
HINTS = {str: {"type": "string"}, int: {"type": "integer"}, float: {"type": "number"}, bool: {"type": "boolean"},
         list: {"type": "array"}, dict: {"type": "object"}, type(None): {"type": "null"}, typing.Any: {}}
UNIONS = typing.Union, types.UnionType  # Optional[int], int | str


@dataclass(frozen=True)
class Tool:
    """One tool as the model sees it, and the Python function that it runs."""
    name: str
    description: str
    parameters: dict  # JSON schema of one object: the arguments
    function: typing.Callable | None = None  # None: the tool can be shown to the model but not run
    isolated: bool = True  # run in a forked process under the time limit
    own: dict | None = None  # of a reworded tool: the parameters that its function was made for; a call must fit both

    def __post_init__(self):
        for _, problem in _problems(vars(self), FORM):
            raise UserError(f"tool {self.name!r}: {problem}")
        if not re.fullmatch(r'[^\s<>"(),]+', self.name) or not self.name.isprintable():
            raise UserError(f"tool {self.name!r}: the name must be one word without quotes, brackets or commas")
        if self.function is not None and not callable(self.function):
            raise UserError(f"tool {self.name!r}: {self.function!r:.60} cannot be called; name a function")
        if any(is_late(self.function) for is_late in (inspect.iscoroutinefunction, inspect.isasyncgenfunction,
                                                      inspect.isgeneratorfunction)):
            raise UserError(f"tool {self.name}: it is async or a generator; "
                            "wrap it in a plain function that returns the value (asyncio.run, list)")
        try:  # a schema is invalid if it cannot be written, or if checking an empty call against it fails
            self.signature(), _dumps(self.schema()), _problems({}, self.parameters)
        except Exception as error:
            raise UserError(f"tool {self.name!r}: parameters: "
                            f"not a JSON schema that can be used ({type(error).__name__}: {error})") from None

    def __call__(self, *args, **kwargs):
        """A decorated function can still be called directly: in this process, without checks."""
        return self.function(*args, **kwargs)

    def schema(self) -> dict:
        """The tool in OpenAI's format."""
        return {"type": "function", "function": {key: getattr(self, key)
                                                 for key in ("name", "description", "parameters")}}

    def signature(self, style="signature") -> str:
        """The tool in one line: `name(p: type, q?: type = default) - first sentence`. Style "described" adds the
        parameters' descriptions ("signature" adds only those of parameters called arg1, param2 ...). Style "call" adds
        them too, and has the form of a call of the tool: `{"name": "name", "arguments": {"p": type, "q": type? =
        default}}`.

        A name has other tokens after a space than after a quote (" pickup", "_branch" and "pick", "up", "_branch"). In
        the form of a call, the model sees exactly the tokens that it has to write.
        """
        sentence = re.split(r"(?<=[.!?])(?<!\be\.g\.)(?<!\bi\.e\.)(?<!\b[A-Z]\.) ",
                            " ".join(self.description.split()), maxsplit=1)[0]
        fields = _fields(self.parameters, style, self.parameters)
        line = (f'{{"name": {_dumps(self.name)}, "arguments": {{{fields}}}}}' if style == "call"
                else f"{self.name}({fields})") + (f" - {sentence}" if sentence else "")
        return SURROGATE.sub("\ufffd", re.sub(r"<(?=\||/?tool_)", r"\\u003c", re.sub(r"(?<!\s)\s*\n\s*", " ", line)))


# The JSON schema of a tool. The tool's parameters are themselves a JSON schema.
FORM = {"additionalProperties": True, "properties": {"name": {"type": "string"}, "description": {"type": "string"},
                                                     "parameters": {
    "type": "object", "additionalProperties": True, "properties": {"required": {"type": "array"}, "properties": {
        "type": "object", "additionalProperties": {"type": "object"}}}}}}


COMBINED = ("allOf", "anyOf", "oneOf")


def _resolved(schema, root):
    """The schema with its $ref replaced by the schema that the $ref names: "#" is the root, "#/$defs/Unit" a place in
    the root. References to other documents are not followed."""
    for _ in range(100):
        if not isinstance(ref := schema.get("$ref"), str) or ref != "#" and not ref.startswith("#/"):
            return schema
        beside, schema = {key: schema[key] for key in schema if key != "$ref"}, root
        try:
            for key in urllib.parse.unquote(ref).split("/")[1:]:
                schema = schema[int(key) if isinstance(schema, list) else key.replace("~1", "/").replace("~0", "~")]
            schema = {**schema, **beside}
        except (KeyError, IndexError, TypeError, ValueError):
            raise ValueError(f"$ref {ref!r} names no schema") from None
    raise ValueError("a $ref leads in a circle")


def _parts(schema, root, words=COMBINED, seen=None):
    """A schema and the schemas that it combines, in one list; the schema itself comes first. `seen`: ids of the parts
    so far. Each counts once: a schema may be its own part, or be reached on 2^n ways."""
    seen, schema = set() if seen is None else seen, _resolved(schema, root)
    parts = [schema]
    for item in (item for word in words for item in schema.get(word, [])):
        if isinstance(item, dict) and id(item) not in seen:
            seen.add(id(item))
            parts += _parts(item, root, words, seen)
    return parts


def _properties(schema, root, part=False):
    """-> ({name: schema} of the properties that a schema or its parts name; whether other properties are allowed, or
    the schema of other properties).

    A schema that names no property allows any property. So does a `part` of a combined schema, because the other names
    may belong to another part.
    """
    parts, named = _parts(schema, root), {}
    for inner in parts:
        named |= {**inner.get("properties", {}), **named}  # of two properties with one name, the first counts
    closed = named or "properties" in parts[0]
    # patternProperties: the patterns are not read, so any name is allowed
    return named, "patternProperties" in parts[0] or parts[0].get("additionalProperties", part or not closed)


def _required(schema, root, named=(), others=True):
    """The names that a schema or its allOf parts require. A "required" that is not a list (draft 3 had true and false)
    requires nothing. If `others` is False, only `named` ones: nobody can give another."""
    lists = [part["required"] for part in _parts(schema, root, ("allOf",)) if isinstance(part.get("required"), list)]
    return [name for names in lists for name in names
            if isinstance(name, str) and (others is not False or name in named)]


def _whole(parameters):
    """A tool's parameters as the schema of an object with these arguments and no others."""
    return {**({"type": "object"} if {"$ref", *COMBINED} & set(parameters) else {"type": "object", "properties": {}}),
            **parameters}


def without_missing(arguments, schema, unknown=False):
    """Arguments without each null that stands for a missing argument: the argument may be left out and cannot be null.
    `unknown`: also without a null for an argument that the schema does not allow."""
    (named, others), required = _properties(schema, schema), _required(schema, schema)

    def fits(key):
        if key in named:
            return not _problems(None, named[key], root=schema)
        return not unknown or others is True or others is not False and not _problems(None, others, root=schema)
    return {key: value for key, value in arguments.items() if value is not None or key in required or fits(key)}


# Parameters with such a name say nothing without their description.
MEANINGLESS = re.compile(r"(arg|argument|param|parameter|input|value|field|var)_?\d*|[a-z]\d+|p", re.IGNORECASE)


def _fields(schema, style, root, path=("#",)):
    """The properties of a schema, in one line. `path`: the references that led here."""
    return _joined(", ", _each_field(schema, style, root, path))


def _each_field(schema, style, root, path):
    required = _required(schema, root)
    for name, field in _properties(schema, root)[0].items():
        whole = _resolved(field, root)
        default = "" if whole.get("default") is None else f" = {_dumps(whole['default'])}"
        about = " ".join(str(whole.get("description") or "").split())
        if style == "signature" and not MEANINGLESS.fullmatch(name):
            about = ""
        mark, kind = "" if name in required else "?", _type(field, style, root, path)
        yield ((f"{_dumps(name)}: {kind}{mark}" if style == "call" else f"{name}{mark}: {kind}") + default
               + (f" ({about})" if about else ""))


def _joined(sign, texts):
    """The texts in one line. ValueError if it gets too long: a few references to each other can stand for 10^9
    words."""
    line, room = [], MAX_CALL
    for text in texts:
        line.append(text)
        if (room := room - len(text) - len(sign)) < 0:
            raise ValueError(f"written in one line, it has more than {MAX_CALL} characters")
    return sign.join(line)


def _type(schema, style, root, path=("#",)):
    """A schema in a few words. A schema may contain itself, so a schema that is already on the path, or that lies deep
    inside, becomes "any"."""
    if schema.get("$ref") in path or len(path) > 9:
        return "any"
    path = (*path, schema.get("$ref", ""))
    schema = _resolved(schema, root)
    if "enum" in schema:
        return " | ".join(map(_dumps, schema["enum"]))
    if "const" in schema:
        return _dumps(schema["const"])
    for word, sign in (("anyOf", " | "), ("oneOf", " | "), ("allOf", " & ")):
        if schema.get(word) and "properties" not in schema:
            return _joined(sign, (_type(part, style, root, path) for part in schema[word]))
    kind = schema.get("type", "any")
    kind = kind if isinstance(kind, str) else " | ".join(kind)
    items = (f"<{_type(schema['items'], style, root, path)}>"
             if isinstance(schema.get("items"), dict) and schema["items"] else "")
    if not schema.get("properties"):
        return f"{kind}{items}"
    return (("" if style == "call" and kind == "object" else f"{kind}{items}")
            + f"{{{_fields(schema, style, root, path)}}}")


def _types(schema):
    """The Python types that a schema's "type" allows; None allows any type ("type" is missing or unknown)."""
    kinds = schema.get("type") or []
    kinds = [str(kind).lower() for kind in ([kinds] if isinstance(kinds, str) else kinds)]
    return {t for kind in kinds for t in TYPES[kind]} if kinds and set(kinds) <= set(TYPES) else None


def _problems(value, schema, where="", root=None, part=False, known=None):
    """[(error type, message)] for the ways in which `value` breaks `schema`, at most ten.  Values are not converted.

    `part`: whether `schema` is part of a combined schema (allOf, anyOf, oneOf), see `_properties`.  `known`: results so
    far, so that no schema is checked twice at one place. Without it, a schema of alternatives that contains itself
    would be checked 2^depth times.
    """
    root, known = schema if root is None else root, {} if known is None else known
    key = (where, id(value), id(schema), part)
    if key not in known:
        known[key] = [("wrong_type", "a schema that is its own alternative fits nothing")]  # until the check ends
        known[key] = list(itertools.islice(_new_problems(value, schema, where, root, part, known), 10))
    return known[key]


def _new_problems(value, schema, where, root, part, known):
    schema = _resolved(schema, root)
    label, prefix = (f"argument {where!r}", where + ".") if where else ("the arguments", "")
    check = lambda inner: _problems(value, inner, where, root, True, known)  # noqa: E731
    allowed = _types(schema)
    if value is None and schema.get("nullable") is True:
        return
    # type(), not isinstance(): in Python True is an int, in JSON it is not.
    if (allowed is not None and type(value) not in allowed
            or "enum" in schema and not any(_same(value, x) for x in schema["enum"])
            or "const" in schema and not _same(value, schema["const"])
            or any(schema.get(word) and all(map(check, schema[word])) for word in ("anyOf", "oneOf"))):
        yield "wrong_type", f"{label} must be {_type(schema, 'signature', root)}, not {_shown(value)}"
        return
    if (schema.get("uniqueItems") is True and isinstance(value, list)
            and any(_same(a, b) for a, b in itertools.combinations(value[:1000], 2))):
        yield "wrong_type", f"{label}: no item may stand there twice"
    for word, (bounded, fits) in BOUNDS.items():
        if type(schema.get(word)) in (int, float) and type(value) in bounded and (
                not fits(value, schema[word])
                # draft 4: {"minimum": 0, "exclusiveMinimum": true}
                or value == schema[word] and schema.get(f"exclusive{word.capitalize()}") is True):
            yield "wrong_type", f"{label}: {word} is {schema[word]}, not {_shown(value)}"
    for inner in schema.get("allOf", []):
        yield from check(inner)
    if isinstance(value, list) and isinstance(schema.get("items"), dict):
        for index, item in enumerate(value):
            yield from _problems(item, schema["items"], f"{where}[{index}]", root, False, known)
    elif isinstance(value, dict):
        named, others = _properties(schema, root, part)
        for key, item in value.items():
            inner = schema.get("properties", {}).get(key, key in named or others)
            if inner is False:
                yield "unknown_argument", f"unknown argument {prefix + key[:100]!r}{_nearest(key, named)}"
            elif inner is not True:
                yield from _problems(item, inner, prefix + key, root, False, known)
        for key in _required(schema, root, named, others):
            if key not in value:
                yield "missing_argument", f"missing argument {prefix + key!r}"


BOUNDS = {"minimum": ((int, float), operator.ge), "maximum": ((int, float), operator.le),
          "exclusiveMinimum": ((int, float), operator.gt), "exclusiveMaximum": ((int, float), operator.lt),
          # in decimals: 0.3 is three times 0.1
          "multipleOf": ((int, float), lambda v, b: not b or Fraction(str(v)) % Fraction(str(b)) == 0),
          "minLength": ((str,), lambda v, b: len(v) >= b), "maxLength": ((str,), lambda v, b: len(v) <= b),
          "minItems": ((list,), lambda v, b: len(v) >= b), "maxItems": ((list,), lambda v, b: len(v) <= b)}


def _same(a, b):
    """Whether two JSON values are equal. 1 equals 1.0 but not true."""
    if type(a) is type(b) is list:
        return len(a) == len(b) and all(map(_same, a, b))
    if type(a) is type(b) is dict:
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    return a == b and isinstance(a, bool) == isinstance(b, bool)  # in Python True == 1


def _shown(value):
    try:
        return _dumps(value)[:60]
    except (TypeError, ValueError, RecursionError):  # bytes, a set, NaN
        return f"{value!r:.60}"


def tool(function=None, *, isolated=True, name=None):
    """Make a Tool from a function's type hints and docstring: `@tool`, or `@tool(name=...)`.

    Lines "name: text" under "Args:" describe the parameters.  A parameter that has a default or is
    Optional is not required.  A hint without a JSON type is a UserError; no hint means any value.
    """
    if function is None:
        return functools.partial(tool, isolated=isolated, name=name)
    name = name or getattr(function, "__name__", "tool")
    if (inspect.isclass(function) or isinstance(function, Tool) or not callable(function)
            or not hasattr(function, "__annotations__")):
        raise UserError(f"tool {name}: {function!r:.60} is no plain function; write one that calls it, "
                        "with type hints and a docstring")
    description, notes = _docstring(function)
    try:
        # extras: the text in Annotated[int, "how many"]
        hints, said = typing.get_type_hints(function), typing.get_type_hints(function, include_extras=True)
        parameters = inspect.signature(function).parameters
    except (NameError, SyntaxError, AttributeError, TypeError, ValueError) as error:
        raise UserError(f"tool {name}: {error}, in a type hint") from None
    if next(iter(parameters), "") in ("self", "cls"):
        raise UserError(f"tool {name}: it is a method; a tool is a plain function, which may call one")
    properties, required, left_out = {}, [], []
    for key, parameter in parameters.items():
        where, hint, default = f"tool {name}: parameter {key}", hints.get(key, typing.Any), parameter.default
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise UserError(f"{where}: arguments come by name; * and / have no JSON form")
        # an Optional argument may be left out; a given value has one of the other types
        if optional := typing.get_origin(hint) in UNIONS and type(None) in typing.get_args(hint):
            hint = typing.Union[tuple(part for part in typing.get_args(hint) if part is not type(None))]
        described = {"description": text for text in getattr(said.get(key), "__metadata__", ())
                     if isinstance(text, str)}
        properties[key] = {**_hint_schema(hint, where), **described, **notes.get(key, {})}
        if default is parameter.empty and optional:
            left_out.append(key)
        elif default is parameter.empty:
            required.append(key)
        elif default is not None:
            try:
                _dumps(default)
            except (TypeError, ValueError):
                raise UserError(f"{where}: its default {default!r:.60} has no JSON form") from None
            properties[key] |= {"default": default} | ({"nullable": True} if optional else {})

    def filled(*args, **given):
        return function(*args, **dict.fromkeys(set(left_out).difference([*parameters][:len(args)])) | given)
    made = Tool(name, description, {"type": "object", "properties": properties, "required": required}, function,
                isolated)
    return replace(made, function=filled) if left_out else made


def _hint_schema(hint, where):
    kind, inner = typing.get_origin(hint) or hint, typing.get_args(hint)
    if kind in UNIONS:
        return {"anyOf": [_hint_schema(part, where) for part in inner]}
    if kind is typing.Literal:
        return {**(HINTS.get(type(inner[0]), {}) if len(set(map(type, inner))) == 1 else {}), "enum": list(inner)}
    if not isinstance(kind, Hashable) or kind not in HINTS:  # [str] is no valid hint
        raise UserError(f"{where}: type {hint} has no JSON form; use str, int, float, bool, dict, list[...] or Literal")
    if kind in (list, dict) and inner:  # list[X], dict[str, X]
        return {**HINTS[kind], "items" if kind is list else "additionalProperties": _hint_schema(inner[-1], where)}
    return {**HINTS[kind]}


SECTIONS = ("Args|Arguments|Parameters|Other Parameters|Returns?|Raises|Yields|Examples?|Notes?|Warnings?|References|"
            "See Also|Attributes|Todo")


def _docstring(function):
    """A docstring in Google's, NumPy's or reST's style -> (description, {parameter: {"description": text}})."""
    # rewrite NumPy's headings as Google's
    text = re.sub(rf"^({SECTIONS})\n-{{3,}}$", r"\1:", (inspect.getdoc(function) or "").expandtabs(4),
                  flags=re.MULTILINE)
    text, *fields = re.split(r"^:(?=\w)", text, flags=re.MULTILINE)  # reST's ":param city: where"
    notes = [found.groups() for field in fields if (found := re.match(r"param (?:\S+ )?(\w+):(.*)", field, re.DOTALL))]
    description, *sections = re.split(rf"^({SECTIONS}): *$", text, flags=re.MULTILINE)
    for title, lines in zip(sections[::2], sections[1::2]):
        if title.startswith(("Arg", "Param", "Other")):
            # A line with the indent of the first line begins a parameter: "name (type): text", or "name : type" with
            # the text below it ("name : text" if there is none). Lines with more indent continue the text.
            lines = lines.strip("\n")
            if lines[:1] == " ":  # Google's style: the parameters end where a line is at the margin again
                lines = textwrap.dedent(re.match(r"(?: .*(?:\n|$)|\n)*", lines)[0])
            notes += [(name, more if numpy and more.strip() else f"{same} {more}")
                      for name, numpy, same, more in re.findall(r"^(\w+)(?:( :)| *\([^)]*\):|:|$)(.*)((?:\n(?: .*)?)*)",
                                                                lines, re.MULTILINE)]
    return description.strip(), {name: {"description": " ".join(text.split())} for name, text in notes}


def tool_from_schema(schema: dict, function=None) -> Tool:
    """Make a Tool from OpenAI's {"type": "function", "function": {...}} or from the inner dict.

    In the inner dict, "function": "package.module:name" names the Python function.  The function is
    imported, so accept schemas with this key only from your own configs, never from a data set.
    """
    inner = schema["function"] if isinstance(schema, dict) and isinstance(schema.get("function"), dict) else schema
    if not isinstance(inner, dict) or "name" not in inner:
        raise UserError(f"tool schema {schema!r:.80}: must be an object with name, description and parameters")
    where, function = f"tool {inner['name']}", inner.get("function") if function is None else function
    parameters, description = inner.get("parameters"), inner.get("description") or ""
    apart = isinstance(function, str) and parameters is not None  # the schema was not made from the function
    if isinstance(function, str):
        if unknown := sorted(set(inner) - {"name", "description", "parameters", "function", "type", "strict"}):
            raise UserError(f"{where}: unknown key {unknown[0]!r}; it may have name, description, "
                            "parameters and function")
        path, function = function, import_by_name(function, where)
        if not callable(function):
            raise UserError(f"{where}: {path!r} is {function!r:.60}, which cannot be called; name a function")
        if parameters is None:  # then the function defines the parameters
            function = function if isinstance(function, Tool) else tool(function)
            parameters, description = function.parameters, description or function.description
    elif "parameters" not in inner:
        for key, value in inner.items():
            if isinstance(value, dict) and difflib.get_close_matches(
                    key, ["parameters", "input_schema", "inputSchema"], 1):
                raise UserError(f'{where}: its parameters stand under {key!r}; the key is "parameters"')
    if (isinstance(parameters, dict) and parameters and all(isinstance(x, dict) for x in parameters.values())
            and parameters.keys().isdisjoint({"properties", "items", "additionalProperties", "patternProperties",
                                             "$defs", "definitions"})):
        raise UserError(f'{where}: its parameters must stand under "properties", as in a JSON schema')
    isolated = function.isolated if isinstance(function, Tool) else True
    function = getattr(function, "function", function)  # a Tool's own function
    made = Tool(inner["name"], description, without_nulls(parameters) or {"type": "object", "properties": {}}, function,
                isolated)
    return _with_defaults(made, where) if apart else made


def _with_defaults(made, where):
    """A tool whose function and schema were given apart: the schema's defaults stand in where the function has none.
    UserError if the function's parameters do not fit the schema."""
    try:
        found = inspect.signature(made.function).parameters.values()
    except (TypeError, ValueError):  # some functions written in C tell nothing
        return made
    properties, required = _properties(made.parameters, made.parameters)[0], _required(made.parameters, made.parameters)
    if any(p.kind == p.POSITIONAL_ONLY for p in found):  # math.sqrt knows no names: it gets the values in their order
        def ordered(*values, **arguments):
            return made.function(*values, *(arguments[name] for name in properties if name in arguments))
        return replace(made, function=ordered)
    named = {p.name: p.default is p.empty for p in found if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    if (surplus := sorted(set(properties) - set(named))) and not any(p.kind == p.VAR_KEYWORD for p in found):
        raise UserError(f"{where}: its function takes no argument {surplus[0]!r}, which the schema has")
    missing = {name for name, needed in named.items() if needed} - set(required)
    defaults = {name: properties[name]["default"] for name in missing if "default" in properties.get(name, {})}
    if missing := sorted(missing - set(defaults)):
        raise UserError(f"{where}: its function needs {missing[0]!r}, which the schema does not require")
    return replace(made, function=functools.partial(made.function, **defaults)) if defaults else made


OWN = ("toolplay", "sft", "ppo", "dpo", "teacher", "lora", "tools", "data", "eval")


def import_by_name(path, what):
    """The object that "package.module:name" names. `what`: who needs the object, for the error message."""
    try:
        return pkgutil.resolve_name(path)
    except (Exception, SystemExit) as error:  # a user's module may raise anything when it is imported
        own = path.split(":")[0].split(".")[0]
        hint = (f"; {own} is a module of Toolplay's: give yours another name" if own in OWN
                else '; write "package.module:name"' if ":" not in path
                else f"; {own}.py must be in the current folder (for --tools FILE: beside FILE)"
                if isinstance(error, ModuleNotFoundError) and error.name == own else "")
        raise UserError(f"{what}: cannot import {path!r} ({type(error).__name__}: {error}){hint}") from error


def without_nulls(schema):
    """A JSON schema without the keywords that are null; dumps of typed objects contain null keywords. In default, const
    and enum, null may be a value and is kept."""
    if not isinstance(schema, dict):
        return {} if schema is True else schema  # the schema `true` allows any value
    kept = {key: value for key, value in schema.items() if value is not None or key in ("default", "const")}
    for key in ("properties", "$defs", "definitions"):
        if isinstance(kept.get(key), dict):
            kept[key] = {name: without_nulls(field) for name, field in kept[key].items() if field is not None}
    if isinstance(kept.get("required"), list) and isinstance(schema.get("properties"), dict):
        kept["required"] = [name for name in kept["required"] if not isinstance(name, str)
                            or schema["properties"].get(name, name) is not None]
    for key in ("items", "additionalProperties"):
        kept |= {key: without_nulls(kept[key])} if key in kept else {}
    return kept | {key: [without_nulls(x) for x in kept[key]] for key in COMBINED if isinstance(kept.get(key), list)}


def load_tools(items=None, known=None) -> dict:
    """{name: Tool} from a list of names, Tool objects and schemas; None: the three built-ins. Names refer to the
    `known` tools ({name: Tool}, the built-ins if not given). A schema with the name of a known tool, and with no
    further parameters, runs the function of the known tool."""
    if items is not None and not isinstance(items, (list, tuple)):
        raise UserError(f"tools: must be a list of names, Tool objects or schemas, not {items!r:.80}")
    tools, known = {}, BUILTIN if known is None else known
    for item in BUILTIN if items is None else items:
        if isinstance(item, str) and item not in known:
            raise UserError(f"tools: unknown tool {item!r}{_nearest(item, known)}; "
                            "a tool of your own needs its whole schema here, or its place in the config's tools")
        made = known[item] if isinstance(item, str) else item if isinstance(item, Tool) else tool_from_schema(item)
        own = known.get(made.name)
        if own and made.function is None and _narrows(made.parameters.get("properties", {}), own.parameters):
            # a reworded tool still runs, with arguments that its function was made for
            made = replace(made, function=own.function, isolated=own.isolated, own=own.own or _whole(own.parameters))
        if made.name in tools:
            raise UserError(f"tools: {made.name!r} is there twice; give each tool its own name")
        tools[made.name] = made
    return tools


def _narrows(fields, parameters):
    """Whether the fields are parameters of a tool, include all required ones, and list no enum value that the tool does
    not know."""
    known = parameters.get("properties", {})
    return set(_required(parameters, parameters)) <= set(fields) <= set(known) and all(
        "enum" not in known[key]
        or set(map(str, field.get("enum", known[key]["enum"]))) <= set(map(str, known[key]["enum"]))
        for key, field in fields.items())


def render_tools(tools, style="signature") -> str:
    """The text that tells the model about its tools, one tool per line."""
    if style not in ("signature", "described", "call", "json"):
        raise UserError(f"tool style {style!r}: must be 'signature', 'described', 'call' or 'json'")
    tools = tools.values() if isinstance(tools, dict) else tools
    return "\n".join(_dumps(tool.schema()) if style == "json" else tool.signature(style) for tool in tools)


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
    """A value as JSON text that can be printed anywhere and contains no tag."""
    return SURROGATE.sub("\ufffd", json.dumps(value, ensure_ascii=False, allow_nan=False)).replace("<", "\\u003c")


def format_call(call: Call) -> str:
    return f"<tool_call>{_dumps({'name': call.name, 'arguments': call.arguments})}</tool_call>"


# A call ends where the next call begins, so that an unclosed call does not swallow the next one.
CALL = re.compile(r"<tool_call>(.*?)(</tool_call>|(?=<tool_call>)|\Z)|</tool_call>", re.DOTALL)


def parse_calls(text) -> tuple:
    """-> (calls, errors) in a text that the model wrote.  Never raises; takes linear time.

    Any text may lie between calls.  Three deviations are accepted: arguments as a string that contains
    a JSON object, missing arguments, a trailing comma before } or ].  A tag inside a tag is an error;
    parsing continues with the inner tag.
    """
    found = read_calls(text)
    return [x for x in found if isinstance(x, Call)], [x for x in found if isinstance(x, CallError)]


def read_calls(text) -> list:
    """Like `parse_calls`, but returns one list: calls and errors in the order of the text."""
    if not isinstance(text, str):
        return [CallError(0, f"not text but {type(text).__name__}", "")]
    found, errors = [], 0
    for match in CALL.finditer(text):
        try:
            if not match[2]:
                raise ValueError("</tool_call> without <tool_call>" if match[1] is None
                                 else "<tool_call> without </tool_call>")
            found.append(_read_call(match[1]))
        except (ValueError, RecursionError) as error:
            errors += 1
            if errors <= MAX_ERRORS:
                prefix = "not JSON: " if isinstance(error, json.JSONDecodeError) else ""
                found.append(CallError(match.start(), f"{prefix}{error}", SURROGATE.sub("\ufffd", match[0][:200])))
    return found


def _read_call(text):
    if len(text) > MAX_CALL:
        raise ValueError(f"the call is longer than {MAX_CALL} characters")
    data = _loads(text)
    if not isinstance(data, dict) or not {"name"} <= data.keys() <= {"name", "arguments"}:
        raise ValueError("a call is a JSON object with the keys name and arguments, and no others")
    name, arguments = data["name"], _given(data.get("arguments"))
    if not isinstance(name, str) or not name.strip() or not isinstance(arguments, dict):
        raise ValueError("the name must be a word, and the arguments a JSON object")
    return Call(name, arguments)


def _given(arguments):
    """A call's arguments as an object. They may be JSON text (as in OpenAI's format); missing arguments become {}.
    Raises what `_loads` raises."""
    if isinstance(arguments, str):
        arguments = _loads(arguments) if arguments.strip() else None
    return {} if arguments is None else arguments


def _loads(text, strict=True):
    """The value of a text in strict JSON, except that trailing commas are allowed (and raw newlines in strings, if not
    `strict`). Raises ValueError or RecursionError."""
    def unique(pairs):
        if len(pairs) != len(dict(pairs)):
            raise ValueError("the same key twice in one object")
        return dict(pairs)

    # A string is matched as a whole and kept, so only commas outside strings are removed.
    text = re.sub(r'("(?:[^"\\]|\\.)*(?:"|\\?\Z)|[\[{,]\s*,)|,(?=\s*[}\]])', r"\1", text, flags=re.DOTALL)
    return _clean(json.loads(text, object_pairs_hook=unique, strict=strict))


def _clean(value, depth=0):
    """A JSON value made printable. Raises ValueError if a number is not finite, or if the value is nested too deeply
    for the functions that walk through it."""
    if depth > MAX_DEPTH or isinstance(value, float) and not math.isfinite(value):  # NaN, 1e999
        raise ValueError(f"JSON nested deeper than {MAX_DEPTH}, or with a number that is not finite")
    if isinstance(value, list):
        return [_clean(item, depth + 1) for item in value]
    if isinstance(value, dict):
        cleaned = {_clean(key): _clean(item, depth + 1) for key, item in value.items()}
        if len(cleaned) < len(value):  # two keys differed only in half characters
            raise ValueError("the same key twice in one object")
        return cleaned
    return SURROGATE.sub("\ufffd", value) if isinstance(value, str) else value


def call_state(text, tools):
    """The state of a turn that begins with `text`: "outside" a call, "inside" a call that can still become valid, or
    "invalid".

    A call is invalid if it is not written `{"name": ..., "arguments": {...}}`, names no known tool, has an argument
    that is unknown to the tool's schema or has a wrong type, or closes while a required argument is missing.  If each
    token is checked with this function before it is accepted, the model keeps to the schemas: constrained decoding
    (Willard & Louf 2023, arXiv:2307.09702; our own parser replaces their automaton).  The call must be strict JSON,
    with at most two spaces or line breaks between its parts.  Bounds, lengths and what alternatives require are not
    checked.  Never raises.
    """
    tools, reader = _by_name(tools), _CallReader(text)
    while True:
        start, stray = text.find("<tool_call>", reader.at), text.find("</tool_call>", reader.at)
        if start < 0 or 0 <= stray < start:
            return "outside" if stray < 0 else "invalid"
        reader.at = start + len("<tool_call>")
        try:
            reader.call(tools)
        except _Unfinished:
            return "inside"
        except Exception:  # a call that breaks the grammar raises ValueError; an unreadable schema may raise anything
            return "invalid"


class _Unfinished(Exception):
    """The text has ended, but more text may complete it."""


class _CallReader:
    """Reads a call that may be unfinished. Each method moves `at` past the text that it reads. It raises _Unfinished if
    the text ends first, and ValueError if the text cannot become a call."""
    INTEGER = re.compile(r"-?(?:0|[1-9][0-9]*)"), re.compile(r"-?(?:0|[1-9][0-9]*)?")  # finished, unfinished
    NUMBER = (re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?"),
              re.compile(r"-?(?:(?:0|[1-9][0-9]*)(?:\.[0-9]*|(?:\.[0-9]+)?[eE][+-]?[0-9]*)?)?"))
    STRING = tuple(re.compile(r'"(?:[^"\\<\x00-\x1f]|<(?!/?tool_call>)|\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4}))*' + end)
                   for end in ('"', r"(?:\\(?:u[0-9a-fA-F]{0,3})?)?"))

    def __init__(self, text):
        self.text, self.at, self.root, self.known, self.typed, self.depth = text, 0, ANYTHING, {}, {}, 0

    def call(self, tools):
        if not tools:
            raise ValueError
        names = {_dumps(name): tool for name, tool in tools.items()}
        self.words("{", '"name"', ":")
        self.root = _whole(names[self.word(names)].parameters)
        self.words(",", '"arguments"', ":")
        if self.peek() != "{":
            raise ValueError
        self.new_value(self.root)
        self.words("}", "</tool_call>")

    def peek(self):
        """The next character. One space or newline may precede it; if more were allowed, a model might never stop."""
        self.at += self.text[self.at:self.at + 1] in (" ", "\n")
        if self.at == len(self.text):
            raise _Unfinished
        return self.text[self.at]

    def word(self, choices):
        """Read one of these words -> the word."""
        choices = list(choices)
        if not choices:
            raise ValueError
        self.peek()
        rest = self.text[self.at:self.at + max(map(len, choices)) + 4]
        # after `head`: the first bytes of a character, which a tokenizer may split into several tokens
        head = rest.rstrip("\ufffd")
        bytes_ = 0 < len(rest) - len(head) <= 3 and self.text.endswith(rest)
        if any(word != rest and word.startswith(rest) or bytes_ and word.startswith(head)
               and word[len(head):len(head) + 1] > "\x7f" for word in choices):
            raise _Unfinished
        if not (found := max(filter(rest.startswith, choices), key=len, default="")):
            raise ValueError
        self.at += len(found)
        return found

    def words(self, *words):
        for word in words:
            self.word([word])

    def match(self, finished, unfinished):
        if unfinished.fullmatch(self.text, self.at):
            raise _Unfinished
        if not (found := finished.match(self.text, self.at)):
            raise ValueError
        self.at = found.end()
        return found[0]

    def value(self, *schemas):
        """Read the longest value of a kind that one of these schemas allows."""
        self.peek()
        end = max(map(self.end, schemas))
        if end == math.inf:
            raise _Unfinished
        if end < 0:
            raise ValueError
        self.at = end

    def end(self, schema):
        """The position where the value that begins here ends, if the schema allows its kind: -1 if there is no such
        value, inf if it may continue after the text. No schema is tried twice at one place, because alternatives that
        contain themselves would never end."""
        start = self.at
        if (start, id(schema)) not in self.known:
            self.known[start, id(schema)] = -1  # for a schema that begins with itself
            self.depth += 1
            try:
                # `_clean` would refuse a deeper value; each choice between alternatives counts as a level, too
                if self.depth >= MAX_DEPTH:
                    raise ValueError
                self.new_value(schema)
                end = self.at
            except _Unfinished:
                end = math.inf
            except ValueError:
                end = -1
            self.depth -= 1
            self.at, self.known[start, id(schema)] = start, end
        return self.known[start, id(schema)]

    def new_value(self, schema):
        schema = _resolved(schema, self.root)
        for part in reversed(schema.get("allOf", [])):
            schema = {**_resolved(part, self.root), **schema}
        types = _types(schema)
        if types is None:
            types = {dict} if any("properties" in part for part in _parts(schema, self.root)) else JSON_TYPES
        first = self.text[self.at]
        if first == "n" and schema.get("nullable") is True:
            self.word(["null"])
        elif choices := [x for x in [*schema.get("enum", []), *([schema["const"]] if "const" in schema else [])]
                         if type(x) in types]:
            self.word({text for x in choices
                       for text in (_dumps(x), json.dumps(x, ensure_ascii=False),
                                    *([str(int(x))] if type(x) is float and x.is_integer() else []))})
        elif "properties" not in schema and (alternatives := schema.get("anyOf") or schema.get("oneOf")):
            if "type" in schema:  # the type holds for each alternative
                alternatives = self.typed.setdefault((id(alternatives), str(schema["type"])), [
                    {"type": schema["type"], **_resolved(part, self.root)} for part in alternatives])
            self.value(*alternatives)
        elif first == '"' and str in types:
            self.match(*self.STRING)
        elif first == "[" and list in types:
            self.array(schema.get("items"))
        elif first == "{" and dict in types:
            self.object(schema)
        elif first in "-0123456789" and int in types:
            if not math.isfinite(float(self.match(*(self.NUMBER if float in types else self.INTEGER)))):
                raise ValueError
        else:
            self.word(["true", "false"] * (bool in types) + ["null"] * (type(None) in types))

    def array(self, items):
        self.word("[")
        if self.peek() == "]":
            return self.word("]")
        while True:
            self.value(items if isinstance(items, dict) else ANYTHING)
            if self.word("],") == "]":
                return

    def object(self, schema):
        """Read an object: each property at most once, in any order. It may close when no required property is
        missing."""
        properties, others = _properties(schema, self.root)
        free, required, seen = others is not False, set(_required(schema, self.root, properties, others)), set()
        self.word("{")
        if self.peek() == "}":
            return self.word(["}"] * (not required))
        while True:
            start, left = self.at, [name for name in properties if name not in seen]
            if free:
                self.match(*self.STRING)
            else:
                self.word(map(_dumps, left))
            name = json.loads(self.text[start:self.at])
            if name in seen:
                raise ValueError
            seen.add(name)
            self.word(":")
            if self.peek() == "n" and self.depth == 0 and name in properties and name not in required:
                self.word(["null"])  # null leaves the argument out
            else:
                self.value(properties.get(name, others if isinstance(others, dict) else ANYTHING))
            if self.word(["}"] * (required <= seen) + [","] * (free or len(left) > 1)) == "}":
                return
            self.peek()


# 3. running a call

@dataclass
class Result:
    name: str
    ok: bool
    value: typing.Any = None
    error_type: str = ""
    message: str = ""
    max_chars: int = 1000

    def text(self) -> str:
        """{"result": ...} or {"error": ...}, valid JSON of at most `max_chars` characters.

        A value that JSON cannot represent is written as the list or number that its tolist() gives (NumPy), else as
        its str().  (An impossible limit, below about 25, still returns the bare marker.)
        """
        key, value = ("result", self.value) if self.ok else ("error", self.message)
        plain = lambda x: x.tolist() if hasattr(x, "tolist") else str(x)  # noqa: E731
        try:
            value = _clean(json.loads(json.dumps(value, ensure_ascii=False, default=plain)), 1)
        except (TypeError, ValueError, RecursionError):
            value = str(value)
        text, room = _dumps({key: value}), max(self.max_chars, 1)
        value = value if isinstance(value, str) else _dumps(value)
        while len(text) > self.max_chars and room > 0:
            text = _dumps({key: value[:room] + CUT})
            room -= max(1, (len(text) - self.max_chars) // 6)  # a character can take six: \u003c
        return text


def printable(text):
    """Text for a terminal: control characters from a file or model are shown, not executed; nor may a text change the
    direction of what follows."""
    return re.sub("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", lambda m: ascii(m[0])[1:-1], text)


def number(kind, low):
    """A type for argparse: an int or float of at least `low`."""
    def read(text):
        if not low <= (value := kind(text)) < math.inf:
            raise ValueError
        return value
    read.__name__ = f"number (at least {low})"
    return read


@contextlib.contextmanager
def one_line_errors():
    """In this context, a user's mistake prints one line and exits with code 2; Ctrl-C prints no traceback either."""
    sys.path.append(os.getcwd())  # a user's custom tools and rewards may lie here
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a character that a terminal cannot show stops no run
    try:
        yield
    except BrokenPipeError:  # `| head` has closed the pipe; discard what is still to be flushed
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(141) from None
    except (UserError, OSError) as error:  # OSError: no space, no permission, a folder in the way; it names the file
        print(f"error: {printable(' '.join(str(error).split()))}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        raise SystemExit(130) from None


def format_result(result: Result) -> str:
    return f"<tool_response>{result.text()}</tool_response>"


def _by_name(tools):
    """{name: Tool} from a dict (returned as it is), from a list of Tools (of two tools with one name, the last counts),
    or from a list that `load_tools` accepts."""
    if isinstance(tools, dict):
        return tools
    tools = list(tools or [])
    return {x.name: x for x in tools} if all(isinstance(x, Tool) for x in tools) else load_tools(tools)


def execute(call, tools, timeout=5.0, max_chars=1000) -> Result:
    """Check and run one call.  Never raises, except on Ctrl-C: each failure is a Result.

    error_type: unknown_tool, unknown_argument, missing_argument, wrong_type, not_executable,
    timeout, crashed, bad_result, or tool_error if the tool itself raised a ToolError.
    """
    name = str(getattr(call, "name", ""))
    try:
        tools = _by_name(tools)
    except (UserError, TypeError) as error:
        return Result(name, False, None, "unknown_tool", f"the tools cannot be used: {error}", max_chars)
    failed = functools.partial(Result, name, False, None, max_chars=max_chars)
    if name not in tools:
        return failed("unknown_tool", f"unknown tool {name[:100]!r}{_nearest(name, tools)}")
    tool = tools[name]
    try:
        timeout = min(5.0 if timeout is None else timeout, 1e6)
        if tool.function is None:
            return failed("not_executable", f"{name} can be shown but not run: it has no function")
        schema, arguments = _whole(tool.parameters), call.arguments
        if isinstance(arguments, dict):
            arguments = without_missing(arguments, schema)
        for problem in itertools.chain.from_iterable(_problems(arguments, s) for s in (schema, tool.own) if s):
            return failed(*problem)
        return _run_in_child(tool, arguments, failed, timeout) if tool.isolated else _run(tool, arguments, failed)
    except Exception as error:  # a broken schema, no more processes
        return failed("crashed", f"{name} could not be run: {type(error).__name__}")


def _run(tool, arguments, failed):
    """Run the tool in this process.  The result contains what its text will show: plain JSON, cut if it is too long."""
    try:
        result = replace(failed(), ok=True, value=tool.function(**arguments))
        if inspect.isawaitable(result.value) or isinstance(result.value, (Iterator, AsyncIterator)):
            return failed("bad_result", f"{tool.name} returned a {type(result.value).__name__}, "
                                        "which holds no value yet; it must return one")
    except ToolError as error:
        result = failed("tool_error", str(error))
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a tool may raise anything else, such as SystemExit or its own exception group
        said = ""
        with contextlib.suppress(Exception, SystemExit):  # an exception that cannot be printed
            said = f": {error}"
        result = failed("crashed", f"{type(error).__name__}{said}")
    try:
        shown = json.loads(result.text())
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        return failed("bad_result", f"the result can not be written: {type(error).__name__}")
    return replace(result, value=shown.get("result"), message=shown.get("error", ""))


FORKING = threading.Lock()


def _run_in_child(tool, arguments, failed, timeout):
    """Run the tool in a forked process; the result returns as one line of JSON through a socket."""
    with FORKING:  # else a child that another thread forks would inherit our socket and keep it open
        reader, writer = socket.socketpair()
        pid = os.fork()
        if pid == 0:
            FORKING.release()  # the child's own copy of the lock: a tool may run tools
            _child(tool, arguments, failed, timeout, writer)
        writer.close()
    try:
        line, end = b"", time.monotonic() + timeout
        with reader:
            while not line.endswith(b"\n") and len(line) < 1000 + 13 * failed().max_chars:
                reader.settimeout(max(end - time.monotonic(), 1e-3))
                if not (more := reader.recv(65536)):
                    break
                line += more
        ok, value, error_type, message = _loads(line.decode())
        return replace(failed(error_type, message), ok=ok, value=value)
    except TimeoutError:
        return failed("timeout", f"no answer within {timeout:g} seconds")
    except (ValueError, TypeError):
        if line:
            return failed("bad_result", f"{tool.name} sent something unreadable")
    finally:
        for kill in (os.killpg, os.kill):  # the group, and the child in case it had no time to make a group
            with contextlib.suppress(OSError):
                kill(pid, signal.SIGKILL)
        status = 0
        with contextlib.suppress(ChildProcessError):  # if SIGCHLD is ignored, there is no child to wait for
            status = os.waitpid(pid, 0)[1]
    return failed("crashed", f"{tool.name} ended without a result (exit code {os.waitstatus_to_exitcode(status)})")


def _child(tool, arguments, failed, timeout, writer):
    """Run the tool and send its result: the code of the forked process.  Never returns."""
    try:
        os.setpgid(0, 0)  # a separate process group, so that its children die with it
        signal.alarm(math.ceil(timeout) + 2)  # in case the parent dies first
        for number in (signal.SIGINT, signal.SIGTERM):  # training handles them; a tool's own processes must end
            signal.signal(number, signal.SIG_DFL)
        sys.stdout = sys.stderr = open(os.devnull, "w")
        null = os.open(os.devnull, os.O_RDWR)
        for descriptor in (0, 1, 2):
            os.dup2(null, descriptor)
        result = _run(tool, arguments, failed)
        writer.sendall(json.dumps([result.ok, result.value, result.error_type, result.message]).encode() + b"\n")
    finally:
        os._exit(1)  # not sys.exit, which would flush and clean up the parent's things a second time


# 4. calculator

MAX_EXPRESSION = 1000  # characters
MAX_BITS = 3000  # of an exact number
SPELLING = {**str.maketrans("×·⋅∙•÷∕⁄−–—", "*****///---"), ord("^"): "**", ord("√"): " sqrt ",
            **dict.fromkeys(map(ord, "$€£¥₹₩₽₺\xa0\u2009\u202f"), " ")}
FULL_WIDTH = {0xFEE0 + code: code for code in range(33, 127)}
WORDS = {"plus": "+", "minus": "-", "times": "*", "multiplied by": "*", "divided by": "/", "mod": "%", "modulo": "%"}
PLAIN = r"\d[\d,]*(?:\.\d+)?"  # a number
TOKEN = re.compile(r"[1-9]\d{0,2}(?:,\d{3})+(?!\d|,\d)(?:\.\d*)?|"  # 1,234.5
                   r"(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?|\.percent|[a-z]+|\*\*|//|\S", re.ASCII)


def calculate(expression: str) -> int | float:
    """Evaluate arithmetic: + - * / // % ** and parentheses, sqrt abs min max round.

    Numbers remain exact fractions as long as possible, so 0.1 + 0.2 is 0.3 and 6 / 2 is 3.
    Accepted spellings: 1,234 and 1 234 (but min(1,234) is 1, as in min(1, 234)); "3 x 4",
    "3 times 4", 2(3 + 4); "15% of 200". $ and € are dropped, also "=" or "= ?" at the ends.
    round(2.5) is 2: halves are rounded to the even number, as in Python.
    `%` before a number, a name or "(" is modulo, else percent: 17 % 5 is 2, 15% is 0.15.
    A percentage is only a number: 200 + 10% is 200.1.
    """
    return evaluate(parse_expression(expression))


def parse_expression(expression):
    """An expression -> its syntax tree, parsed as Python; nothing is run. ToolError if the text is no expression."""
    if not isinstance(expression, str) or len(expression) > MAX_EXPRESSION:
        raise ToolError(f"the expression must be a text of at most {MAX_EXPRESSION} characters")
    if not expression.strip():
        raise ToolError("the expression is empty")
    with _arithmetic_errors():
        return ast.parse(_respell(expression), mode="eval").body


def evaluate(tree):
    """The value of a tree from `parse_expression`, as a number. ToolError if there is no value."""
    with _arithmetic_errors():
        return _rounded(_value(tree))


@contextlib.contextmanager
def _arithmetic_errors():
    try:
        yield
    except ZeroDivisionError:
        raise ToolError("division by zero") from None
    except (OverflowError, RecursionError, MemoryError):
        raise ToolError("a number is too large, or the expression nested too deeply") from None
    except (SyntaxError, TypeError, ValueError) as error:  # such as "abs() takes exactly one argument (2 given)"
        raise ToolError(f"this is no arithmetic: {error.args[0]}") from None


def _respell(text):
    """The expression rewritten in Python's syntax: "1,234 x 5%" -> "1234 * 5 .percent"."""
    text = re.sub("⁻?[⁰¹²³⁴-⁹]+", lambda m: "**" + unicodedata.normalize("NFKC", m[0]), text)  # 10²³ has one exponent
    # 1 234
    text = re.sub(r"(?<![\d.,])\d{1,3}(?:[ \xa0\u2009\u202f]\d{3})+(?!\d)", lambda m: re.sub(r"\D", "", m[0]), text,
                  flags=re.ASCII)
    text = text.translate(FULL_WIDTH).translate(SPELLING)
    text = re.sub(r"\s*(?<![a-z])per ?cent\b", "%", text.rstrip("=? \t\n").lstrip("= \t\n").lower())
    text = re.sub(rf"(?<![a-z])({'|'.join(WORDS)})(?![a-z(])", lambda m: WORDS[m[0]], text)
    # A comma before three digits separates thousands. In min and max it separates arguments, unless other commas with a
    # space do so, or unless 000 follows, because nobody writes 000 as a number: max(1,000,2).
    tight = bool(re.search(r"min|max", text)) and not re.search(r"\d(,\s|\s+,)", text)
    if unclear := tight and re.search(r"(?<![\d.])\d{1,3}(,\d{3})*,(?!000)\d{3}(,\d{3})*,000(?!\d)", text):
        raise ToolError(f"{unclear[0][:50]!r}: write a space behind the commas that separate numbers")
    text = re.sub(rf"(?<![\d.])\d{{1,3}}(,\d{{3}})*?(,000)+{'' if tight else '(,[0-9]{3})*'}(?!\d)",
                  lambda m: m[0].replace(",", ""), text)
    text = re.sub(r"\bsqrt\s+(\d+(?:,\d{3})*(?:\.\d*)?(?:e[+-]?\d+)?|\.\d+)", r"sqrt(\1)", text)
    # in "100 / 10% of 50", "of" binds tighter than "/"
    text = re.sub(rf"(/|\*\*)\s*({PLAIN})\s*%\s*of\s+({PLAIN}(?:\s*\*\*\s*{PLAIN})?)(?!\w)", r"\1(\2% * \3)", text)
    if split := re.search(rf"(?:/|\*\*)\s*({PLAIN}\s*%\s*of\b.*)", text):
        raise ToolError(f"put brackets around {split[1][:50]!r}")
    if based := re.search(r"(?<![\w.])0[xob]\d\w*", text):
        raise ToolError(f"unexpected {based[0][:50]!r}: numbers are decimal")
    text = re.sub(r"(?<=[\d)])\s*(?=\()|(?<=[\d)])\s*(?=sqrt\b)", "*", text)  # 2(3 + 4), (1 + 2)(3 + 4), 2 sqrt(9)
    text = re.sub(r"(?<![a-z])(x|of)(?=\s*[\d.(]|\s+-?[\d.(a-z])", "*", text)  # "3 x 4", but not the variable in 3x + 4
    # Written as an attribute, the percent sign binds tightest, as it should: 2 ** 50% is 2 ** 0.5.
    tokens = TOKEN.findall(re.sub(r"%(?!\s*[0-9.(a-z]|(?<=\s%)\s+-[0-9.(a-z])", " .percent ", text))
    # for each open parenthesis: whether a comma without a space separates arguments in it
    calls = []
    for index, token in enumerate(tokens):
        if token == "(":
            calls.append(tight and tokens[index - 1] in ("min", "max"))
        elif token == ")":
            del calls[-1:]
        elif token not in FUNCTIONS and token[0] not in "0123456789.,+-*/%":
            raise ToolError(f"unexpected {token[:50]!r}")
        elif calls[-1:] != [True]:
            tokens[index] = token.replace(",", "") or token
    return re.sub(r"(?<![\d.])0+(?=\d)", "", " ".join(tokens))  # 007 is 7 here, but an error in Python


def _value(node):
    """The value of a node of Python's syntax tree."""
    match node:
        case ast.Constant():
            value = node.value if node.value == math.inf else Fraction(str(node.value))
        case ast.Attribute(attr="percent"):
            value = _value(node.value) / 100
        case ast.UnaryOp():
            value = OPERATORS[type(node.op)](_value(node.operand))
        case ast.BinOp():
            value = OPERATORS[type(node.op)](_value(node.left), _value(node.right))
        case ast.Call(func=ast.Name(id=name), keywords=[]):
            if name in FUNCTIONS and len(node.args) not in ARITY.get(name, range(1, 1000)):
                raise ToolError(f"{name} does not take {len(node.args)} numbers")
            value = FUNCTIONS[name](*map(_value, node.args))
        case _:
            raise ToolError(f"this is no arithmetic: {ast.unparse(node)[:50]}")
    if isinstance(value, complex):
        raise ToolError("a negative number has no such root")
    if not math.isfinite(value):  # no number may leave the range of a float
        raise OverflowError
    return float(value) if isinstance(value, Fraction) and value.denominator >> MAX_BITS else value


def _power(base, exponent):
    """The power: exact while the result is short, else in floating point, where 9 ** 9 ** 9 overflows at once."""
    exact = not isinstance(base, float) and exponent == int(exponent)
    if exact and max(abs(base.numerator), base.denominator).bit_length() * abs(exponent) <= MAX_BITS:
        return Fraction(base) ** int(exponent)
    return float(base) ** float(exponent)


def _round(value, digits=0):
    if digits not in range(-100, 101):
        raise ToolError("round takes a whole number of digits, at most 100")
    return round(value, int(digits))


def _rounded(value):
    """Round a value: whole numbers become int, exact decimals stay, other values keep 10 digits, at least 2 of them
    after the decimal point."""
    if not isinstance(value, float) and value.denominator == 1:
        return int(value)
    number = float(value)
    if isinstance(value, float) or Fraction(str(number)) != value:
        number = float(f"{number:.{max(10, len(str(int(abs(number)))) + 2)}g}")
    return int(number) if number.is_integer() and abs(number) < 1e15 else number


FUNCTIONS = {"sqrt": lambda value: _power(value, Fraction(1, 2)), "abs": abs, "round": _round,
             "min": lambda *values: min(values), "max": lambda *values: max(values)}
ARITY = {"sqrt": (1,), "abs": (1,), "round": (1, 2)}
OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
             ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.Pow: _power, ast.USub: operator.neg,
             ast.UAdd: operator.pos}


# 5. weather: a stand-in for a web service that always gives the same answer

CONDITIONS = ("sunny", "partly cloudy", "cloudy", "light rain", "heavy rain", "windy", "foggy", "clear")
LETTERS = str.maketrans({"ł": "l", "ø": "o", "đ": "d", "ð": "d", "ı": "i", "æ": "ae", "œ": "oe", "þ": "th", "'": "",
                         "’": ""})


def unaccented(text):
    """Lower case without accents: "São Paulo" -> "sao paulo"."""
    return "".join(c for c in unicodedata.normalize("NFKD", text.casefold()) if not unicodedata.combining(c))


def _normal(text):
    """Lower case without accents and punctuation: "São  Paulo" -> "sao paulo"."""
    return re.sub(r"[\W_]+", " ", unaccented(text).translate(LETTERS)).strip()


def _city_file(path=None):
    return str(path or os.environ.get("TOOLPLAY_CITIES") or CORPORA / "cities.json")


@functools.lru_cache(maxsize=8)
def _cities(path):
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8-sig"))
        cities = [*content["cities"], *content.get("geonames", [])]
        names = {_normal(name): city["name"] for city in reversed(cities)
                 for name in [*city.get("aliases", []), city["name"]]}
        # of two cities with one name, the first counts
        countries = {_normal(city.get("country", "")) for city in cities} - {""}
        return names, countries | set(map(_normal, content.get("countries", [])))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f'{path} (TOOLPLAY_CITIES): {type(error).__name__}: {error}; '
                        'it needs {"cities": [{"name": ...}]}') from error


def weather(city: str, unit: str = "celsius", path=None) -> dict:
    """The weather in a known city. Case, accents and a country at the end of the name do not matter."""
    cities, countries = _cities(_city_file(path))
    city = city[:200]  # no name is longer; sorting accents takes time that grows with the square of their number
    if unit not in ("celsius", "fahrenheit"):
        raise ToolError(f"unknown unit: {unit}")
    tries = [_normal(city), _normal(city.split(",")[0])]
    tries += [tries[0].removesuffix(f" {country}") for country in countries if tries[0].endswith(f" {country}")]
    key = next((key for key in tries if key in cities), None)
    if key is None:
        raise ToolError(f"unknown city: {city[:100]}")
    digest = hashlib.sha256(_normal(cities[key]).encode()).digest()  # not hash(), which changes from run to run
    celsius = digest[0] % 41 - 5
    condition = "light snow" if celsius < 1 and digest[1] % 2 else CONDITIONS[digest[2] % len(CONDITIONS)]
    temperature = round(celsius * 9 / 5 + 32) if unit == "fahrenheit" else celsius
    return {"city": cities[key], "temperature": temperature, "unit": unit, "condition": condition}


# 6. search: BM25 over a small text file

MAX_QUERY = 1000  # characters; the rest of a query is not read
STOP_WORDS = frozenset("""a about an and any are as at be been by can could did do does for from give had has have how i
    in is it its me my of on or please should show so some tell that the their them there these they this to up us
    was we were what when where which who whom whose why will with would you your""".split())


def _terms(text):
    """Words that carry meaning, in the singular: "The cities of bees" -> ["city", "bee"]."""
    words = [word for word in _normal(text).split() if word not in STOP_WORDS]
    return [re.sub(r"(?<=\w\w[^sui])s$", "", re.sub(r"(?<=\w\w)ies$", "y", word)) for word in words]


@functools.lru_cache(maxsize=8)
def _index(path):
    """-> (pages, terms of each title, counts of terms in each page, number of pages that contain each term)."""
    pages, number = [], 0
    try:
        for number, line in enumerate(Path(path).read_text(encoding="utf-8-sig").split("\n"), 1):
            page = json.loads(line) if line.strip() else {"comment": ""}
            if "title" in page or "comment" not in page:
                pages.append({"title": str(page["title"]), "text": str(page["text"])})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} (TOOLPLAY_SEARCH), line {number}: {type(error).__name__}: {error}; "
                        'it needs {"title": ..., "text": ...}') from error
    counts = [Counter(_terms(f"{page['title']} {page['text']}")) for page in pages]
    titles = [set(_terms(page["title"])) for page in pages]
    return pages, titles, counts, Counter(term for count in counts for term in count)


def _search_file(path=None):
    return str(path or os.environ.get("TOOLPLAY_SEARCH") or CORPORA / "search.jsonl")


def check_corpora():
    """UserError if the file that TOOLPLAY_CITIES or TOOLPLAY_SEARCH names cannot be used. Without this check, the model
    would see the error instead of the user."""
    if os.environ.get("TOOLPLAY_CITIES"):  # the built-in files exist; a command need not read them when it starts
        _cities(_city_file())
    if os.environ.get("TOOLPLAY_SEARCH"):
        _index(_search_file())


def search(query: str, path=None) -> list:
    """At most two pages, best first, by BM25 (Robertson and Zaragoza 2009, k1 = 1.5, b = 0.75)."""
    if not query.strip():
        raise ToolError("the query is empty")
    pages, titles, counts, holders = _index(_search_file(path))
    rarity = {term: math.log(1 + (len(pages) - holders[term] + 0.5) / (holders[term] + 0.5))
              for term in _terms(query[:MAX_QUERY])}
    mean = max(1, sum(count.total() for count in counts) / max(1, len(pages)))
    # A page would only mislead if it contains less than 0.4 of the question's meaning (its terms, weighted by rarity).
    # The limit is 0.7 if the question has no term of the page's title, which says what the page is about.
    scores = [sum(rarity[term] * count[term] * 2.5 / (count[term] + 1.5 * (0.25 + 0.75 * count.total() / mean))
                  for term in rarity)
              * (sum(rarity[term] for term in rarity if term in count) >= (0.4 if title & set(rarity) else 0.7)
                 * sum(rarity.values()))
              for count, title in zip(counts, titles)]
    ranked = sorted(zip(scores, pages), key=lambda pair: -pair[0])[:2]  # sorted() keeps the order of ties
    return [{**page, **{key: textwrap.shorten(page[key], 200, placeholder="…") for key in ("title", "text")}}
            for score, page in ranked if score > 0.1]


def _builtin(name, description, function, **properties):
    # The built-in tools limit themselves, so they need no separate process.
    return Tool(name, description, {"type": "object", "properties": properties, "required": [next(iter(properties))]},
                function, False)


TEXT = {"type": "string"}
BUILTIN = {tool.name: tool for tool in (
    _builtin("calculator", "Evaluate an arithmetic expression.", calculate,
             expression={**TEXT, "description": "such as 12 * (3 + 4)"}),
    _builtin("weather", "Get the current weather in a city.", weather, city=TEXT,
             unit={**TEXT, "enum": ["celsius", "fahrenheit"]}),
    _builtin("search", "Search the web.", search, query=TEXT))}


def main():
    print(render_tools(BUILTIN))
    for name, arguments in (("calculator", {"expression": "15% of 1,240"}), ("weather", {"city": "krakow"}),
                            ("weather", {"city": 12})):
        call = Call(name, arguments)
        print(f"\n{format_call(call)}\n  {format_result(execute(call, BUILTIN))}")
    print(f"\nA call without its end: {parse_calls(format_call(call)[:-1])}")


if __name__ == "__main__":
    with one_line_errors():
        main()
