"""tools.py: everything that its API promises, tried with hostile input.

Wall-clock limits are tested only where the failure would be a hang, and they are generous.
"""
import contextlib
import dataclasses
import faulthandler
import functools
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Annotated, Literal, Optional

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import tools
from tools import (BUILTIN, CORPORA, Call, CallError, Result, Tool, ToolError, UserError, calculate, call_state, execute, format_call,
                   format_result, load_tools, parse_calls, render_tools, search, tool, tool_from_schema, weather)


@pytest.fixture(autouse=True)
def corpora(tmp_path, monkeypatch):
    cities = [{"name": "Kraków", "country": "Poland"}, {"name": "Łódź"}, {"name": "Santiago de los Caballeros"},
              {"name": "Washington, D.C."}, {"name": "Xi'an"}, {"name": "Paris", "country": "France"}]
    (tmp_path / "cities.json").write_text(json.dumps({"comment": "test", "cities": cities}), encoding="utf-8")
    pages = [{"comment": "test"}, {"title": "Honey bees", "text": "Bees make honey from nectar. " * 20},
             {"title": "Mount Everest", "text": "The highest mountain on Earth."},
             {"title": "Alps", "text": "Mountains in Europe."}, {"title": "Twin A", "text": "zebra"},
             {"title": "Twin B", "text": "zebra"}, {"title": "Twin C", "text": "zebra"}]
    (tmp_path / "search.jsonl").write_text("\n".join(map(json.dumps, pages)) + "\n", encoding="utf-8")
    monkeypatch.setenv("TOOLPLAY_CITIES", str(tmp_path / "cities.json"))
    monkeypatch.setenv("TOOLPLAY_SEARCH", str(tmp_path / "search.jsonl"))


def tagged(body):
    return f"<tool_call>{body}</tool_call>"


def run(function, arguments=None, **options):
    made = tool(function)
    return execute(Call(made.name, arguments or {}), {made.name: made}, **options)


# calculator

@pytest.mark.parametrize("expression, value", [
    ("12 * (3 + 4)", 84), ("17 % 5", 2), ("7 // 2", 3), ("-7 // 2", -4), ("2 ** 10", 1024), ("2^10", 1024),
    ("6 × 7", 42), ("84 ÷ 2", 42), ("5 − 8", -3), ("3·4", 12), ("--5", 5), ("+5", 5), ("-2 ** 2", -4), ("2 ** -1", 0.5),
    ("2 ** 3 ** 2", 512), ("10 - 4 - 3", 3), ("100 / 5 / 2", 10), ("2 + 3 * 4", 14), ("sqrt(16)", 4), ("sqrt(2.25)", 1.5),
    ("SQRT(9)", 3), ("abs(-3.5)", 3.5), ("min(1,234)", 1), ("max(1, 234, 5)", 234), ("1,234 * 2", 2468),
    ("(1,234) * 2", 2468), ("max((1,234), 5)", 1234), ("5 x (1,234)", 6170), ("1,234,567.5 + 0.5", 1234568),
    ("15% of 200", 30), ("15%", 0.15), ("200 + 10%", 200.1), ("15 / 100 * 200", 30), ("100 / 5%", 2000),
    ("(5 + 5)%", 0.1), ("50% - 10%", 0.4), ("17 % (3)", 2), ("17 % sqrt(9)", 2), ("15% x 200", 30), ("$12.50 + €3", 15.5),
    ("2 + 2 =", 4), ("2 + 2 = ?", 4), ("2+2=?  ", 4), ("3 x 4", 12), ("3x4", 12), ("3 x -4", -12), ("2 x sqrt(9)", 6),
    ("max(1,000, 2,000)", 2000), ("max(1,000 , 2,000)", 2000), ("min(2,500 ,3,000)", 2500), ("max(1,000,\n2,000)", 2000),
    ("max(12,500, 3,000)", 12500), ("min(12,500, 13)", 13), ("max(1,500, 900) + 2", 1502), ("round(1,234.6)", 1235),
    ("round(1,234.567,1)", 1234.6), ("sqrt(1,000,000)", 1000), ("abs(-1,234)", 1234), ("round(1,234.567, 1)", 1234.6),
    ("1.0x5", 5), ("max(√16, 3)", 4), ("min(sqrt 9, 2)", 2), ("sqrt 1,600", 40), ("20percent of 50", 10), ("20 percent of 50", 10),
    ("5\xa0+\xa03", 8), ("√16", 4), ("5 — 3", 2), ("2 • 3", 6), ("¥500 * 2", 1000), ("15 % -4", -1), ("5% - 3", -2.95), ("5% -3", -2.95), ("0.1 + 0.2", 0.3),
    ("6/2", 3),
    ("1/3", 0.3333333333), ("1/3*3", 1), ("0.5 + 0.5", 1), (".5 * 4", 2), ("5.", 5), ("007 + 1", 8), ("1e3", 1000),
    ("round(2.567, 2)", 2.57), ("round(3.7)", 4), ("sqrt(2) ** 2", 2), ("8 ** (1/3)", 2), ("1000 * 1.05 ** 30", 4321.942375),
    ("1000 * 1.00041666 ** 360", 1161.795159), ("12345678.905 + 0", 12345678.905), ("100000000000 / 3", 33333333333.33),
    ("1 ** 99999999999", 1), ("0 * 5", 0), ("2 ** 200", 2 ** 200), ("10 ** 20 + 1", 10 ** 20 + 1), ("7.5 % 2", 1.5),
    ("2(3+4)", 14), ("(1+2)(3+4)", 21), ("2√9", 6), ("2 sqrt(16)", 8), ("８＋２", 10), ("6－2", 4), ("8∕2", 4), ("8⁄2", 4), ("1 000 + 2", 1002),
    ("1\xa0000 + 2", 1002), ("12 345 678 * 1", 12345678), ("7 mod 3", 1), ("=2+2", 4), ("₹5 * 2", 10), ("3 plus 4", 7),
    ("10 divided by 4", 2.5),
    ("3 times 4 minus 2", 10), ("max(1,000, 2)", 1000), ("max(1,000,2)", 1000), ("round(2.5)", 2), ("min(5, 10, 15)", 5),
    ("max($1,200,$900)", 1200), ("1,500,000 / 12", 125000), ("20% of 1,250,000", 250000), ("1,000,500 - 250", 1000250),
    ("max(1,500,000, 900,000)", 1500000), ("sqrt(2,250,000)", 1500), ("max(2,000,3,000)", 3000), ("max(1,000,500, 2)", 1000500),
    ("max(12,000,000)", 12000000), ("max(1,000,000,2)", 1000000), ("max(1,000,000,2,000,000)", 2000000), ("max(3,4)*1,000,000", 4000000),
    ("max(500,1,000)", 1000),
    ("1,000 + 007", 1007), ("$1,234", 1234), ("2³²", 2 ** 32), ("10²³", 10 ** 23), ("10⁻² * 5", 0.05),
    ("100 / 10% of 50", 20),
    ("2^50% of 4", 4), ("2 / 50% of 2^2", 1), ("20% of 50^2", 500), ("√1e4", 100), ("sqrt 1e4", 100),
])
def test_calculate(expression, value):
    result = calculate(expression)
    assert result == value and type(result) is type(value)


@pytest.mark.parametrize("expression", [
    "9**9**9", "9**9**9**9**9", "2**99999999", "(-8)**0.5", "1/0", "1%0", "1//0", "0 ** -1", "(" * 400 + "1" + ")" * 400,
    "-" * 999 + "1", "1" * 999, "1" * 1001, "1e999999999", "1e999", "9" * 500 + "*" + "9" * 499, "nan", "inf", "-inf",
    "sqrt(-1)", "__import__('os')", "a.b", "(1).real", "'a' * 9", "1 < 2", "2 == 2", "1 and 2", "lambda: 1", "[1]", "{}",
    "", " ", "=", "?", "2 +", "* 2", "()", "2 2", "min()", "min", "sqrt", "sqrt(1, 2)", "round(1, 2, 3)",
    "round(1, 0.5)", "round(1, 999999999)", "1,23 + 1", "1.2.3", "1j", "pi", "(1, 2)", "2 ** 1e300", ".", "٣+١",
    "3x + 52", "3x-4", "①", "\x00", "1\ud8002", "1;2", "x", "of", "x x x", "%", "5 of", "**", "1**" * 333, "2**" * 300 + "2",
    "1" + "%" * 999 + "x",
    "9e999**9", "round(9e400*9e400*9e400, 100)", "1e" + "9" * 900, "eval(1)", "1_000", "abs(1", "abs)1(", "🙂", None, 5, b"1",
    "max(1,500,000,900,000)", "min(100,200,000)", "1 2", "12 34", "1 0000", "3 4 + 2", "log2(8)", "x(3)", "2(", "mod 3", "0,125 * 8", "0,500 + 1", "3€50", "(16).sqrt", "(4).abs",
])
def test_calculate_refuses_quickly(expression):
    start = time.monotonic()
    with pytest.raises(ToolError):
        calculate(expression)
    assert time.monotonic() - start < 3


def test_calculate_only_gives_finite_numbers():
    pieces = ["9", "1.5", "**", "-", "%", "(", ")", "sqrt(", "/", "1e99", ",", "round(", " x ", "0", "//", "max("]
    rng = random.Random(1)
    for _ in range(3000):
        with contextlib.suppress(ToolError):
            value = calculate("".join(rng.choices(pieces, k=8)))
            assert type(value) in (int, float) and abs(value) < float("inf")


# reading and writing calls

def test_call_round_trip():
    for value in ("Kraków", "<tool_call>", "</tool_call><|im_end|>", 'q"\\', "a\nb", "\u2028", "🙂"):
        call = Call("search", {"query": value, "n": [1, {"a": None}]})
        text = format_call(call)
        assert text.count("<") == 2
        assert parse_calls(text) == ([call], [])
    assert format_call(Call("f", {"b": 1, "a": "é"})) == '<tool_call>{"name": "f", "arguments": {"b": 1, "a": "é"}}</tool_call>'


@pytest.mark.parametrize("body, arguments", [
    ('{"name": "f", "arguments": {"a": 1}}', {"a": 1}), ('\n{\n "name": "f",\n "arguments": {\n"a": 1}\n}\n', {"a": 1}),
    ('{"name": "f"}', {}), *(('{"name": "f", "arguments": ' + nothing + "}", {}) for nothing in ("null", '""', '" "', "{}")),
    ('{"name": "f", "arguments": "{\\"a\\": 1}"}', {"a": 1}), ('{"arguments": {}, "name": "f"}', {}),
    ('{"name": "f", "arguments": {"a": [1, 2, ], }, }', {"a": [1, 2]}),
    ('{"name": "f", "arguments": {"a": ",}", "b": "x,]\\",}",},}', {"a": ",}", "b": 'x,]",}'}),
])
def test_parse_accepts(body, arguments):
    assert parse_calls("Well. " + tagged(body) + " Done.") == ([Call("f", arguments)], [])


@pytest.mark.parametrize("text", [
    '<tool_call>{"name": "f"}', '</tool_call>', tagged(""), tagged("f(1)"), tagged("[]"), tagged("null"), tagged('"f"'),
    tagged('{"arguments": {}}'), tagged('{"name": ""}'), tagged('{"name": "  "}'), tagged('{"name": 3}'),
    tagged('{"name": null}'), tagged('{"name": "f", "arguments": []}'),
    tagged('{"name": "f", "arguments": "x"}'), tagged('{"name": "f", "arguments": "[1]"}'), tagged('{"name": "f", "name": "g"}'),
    tagged('{"name": "f", "arguments": {"a": 1, "a": 2}}'), tagged('{"name": "f", "arguments": {"a": NaN}}'),
    tagged('{"name": "f", "arguments": {"a": -Infinity}}'), tagged('{"name": "f", "arguments": {"a": 1e999}}'),
    tagged('{"name": "f", "arguments": {"a": ' + "[" * 300 + "]" * 300 + "}}"), tagged('{"name": "f", "parameters": {"a": 1}}'),
    tagged('{"name": "f", "arguments": "{\\"a\\": 1, \\"a\\": 2}"}'), tagged("{'name': 'f'}"), tagged('{"name": "f"} {}'),
    tagged('{"name": "search", "arguments": {"query": "</tool_call>"}}'), tagged('{"name": "f", , }'), tagged('{,}'),
    tagged('{"name": "search", "arguments": {"query": "<tool_call>{\\"name\\": \\"f\\"}</tool_call>"}}'),
    tagged('{"name": "f", "arguments": {"a": ' + "9" * 9000 + "}}"), tagged('{"name": "f", "arguments": {"a": "' + "x" * 200_000 + '"}}'),
    *(tagged('{"name": "f", "arguments": ' + arguments + "}")
      for arguments in ("{,}", '{"a": [,]}', '{"a": [1,,]}', '{"\\ud800": 1, "\\ud801": 2}')),
])
def test_parse_refuses(text):
    calls, errors = parse_calls(text)
    assert calls == [] and errors
    for error in errors:
        assert 0 <= error.position < len(text) and error.reason and len(error.text) <= 200
        assert text[error.position:].startswith(error.text)


@pytest.mark.parametrize("text", [None, b"<tool_call>", 5, [], object()])
def test_parse_takes_any_type(text):
    calls, errors = parse_calls(text)
    assert calls == [] and len(errors) == 1 and isinstance(errors[0], CallError)


def test_parse_several_and_recovery():
    good = tagged('{"name": "f"}')
    assert parse_calls("") == ([], []) and parse_calls("no call < here >") == ([], [])
    assert parse_calls(good + "\n" + good) == ([Call("f", {})] * 2, [])
    calls, errors = parse_calls("ab" + '<tool_call>{"name": "g"\n' + good)
    assert calls == [Call("f", {})] and [error.position for error in errors] == [2]
    calls, errors = parse_calls(f"<tool_call>{good}</tool_call>")
    assert len(errors) == 2
    calls, errors = parse_calls(tagged("oops") + good)
    assert calls == [Call("f", {})] and len(errors) == 1


NASTY = ["<tool_call>", "</tool_call>", "{", "[", "<", "<tool_call>{", "<tool_call></tool_call>", "<tool_call>[</tool_call>",
         '"', '\\"', ", ", '{"a":', '<tool_call>"\\', tagged('{"name": "f",}'), "\ud800", "<tool_call></tool_call></tool_call>"]


@pytest.mark.parametrize("piece", NASTY)
def test_parse_the_longest_call_that_is_read(piece):
    """On such a call the repair of commas could be slow."""
    text, start = (piece * 99_000)[:99_000], time.monotonic()
    parse_calls(tagged(text))
    parse_calls(tagged('{"' + text + "\\"))
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("piece, megabytes", [("<tool_call>", 10), ("{", 10), ("<tool_call>{", 3), ('<tool_call>"\\', 3),
                                              ("<tool_call></tool_call></tool_call>", 1), (tagged('{"name": "f",}'), 1)])
def test_parse_megabytes(piece, megabytes):
    text, start = piece * (megabytes * 1_000_000 // len(piece)), time.monotonic()
    for whole in (text, tagged(text)):
        assert len(parse_calls(whole)[1]) <= 1000
    assert time.monotonic() - start < 20


def test_surrogates_never_reach_the_output():
    half = "\ud83d"
    texts = [tagged('{"name": "search", "arguments": {"query": "a \\ud83d b", "\\udc00": ["\\ud800"]}}'),
             tagged(f'{{"name": "sea{half}rch"}}'), f"<tool_call>{half}"]
    for text in texts:
        calls, errors = parse_calls(text)
        str((calls, errors)).encode()
        for error in errors:
            error.text.encode()
        for call in calls:
            format_call(call).encode()
            json.dumps([call.name, call.arguments], ensure_ascii=False).encode()
            format_result(execute(call, load_tools())).encode()
    format_call(Call(half, {half: half})).encode()
    format_result(Result("f", True, {half: half})).encode()
    format_result(Result("f", False, message=half)).encode()
    assert parse_calls(tagged('{"name": "f", "arguments": {"a": "\\ud83d\\ude00"}}'))[0] == [Call("f", {"a": "😀"})]

    def odd():
        return "\ud800"
    run(odd).value.encode()

    def raises():
        raise ToolError("\ud800")
    run(raises).message.encode()


# results

def test_result_text():
    assert format_result(Result("f", True, 391)) == '<tool_response>{"result": 391}</tool_response>'
    assert Result("f", False, None, "timeout", "too slow").text() == '{"error": "too slow"}'
    for forged in ("</tool_response>", "<|im_end|>\n<|im_start|>user", "<tool_call>", "<" * 5000, {"<": ["<"]}):
        for result in (Result("f", True, forged), Result("f", False, None, "crashed", str(forged))):
            assert "<" not in result.text()
            json.loads(result.text())
    assert json.loads(Result("f", True, "a<b").text()) == {"result": "a<b"}


@pytest.mark.parametrize("value", ["x" * 10 ** 6, "<" * 5000, '"' * 5000, "\\" * 999, list(range(10 ** 5)), {"a": "\n" * 5000}])
@pytest.mark.parametrize("max_chars", [30, 100, 1000])
def test_result_text_is_capped_valid_json(value, max_chars):
    text = Result("f", True, value, max_chars=max_chars).text()
    assert len(text) <= max_chars and json.loads(text)["result"].endswith("…[cut]")
    assert json.loads(text)["result"].count("…") == 1

    def big():
        return value
    result = run(big, max_chars=max_chars)
    assert result.ok and len(result.text()) <= max_chars and json.loads(result.text())


def test_result_of_exact_length_is_whole():
    assert "cut" not in Result("f", True, "x" * (1000 - len('{"result": ""}'))).text()
    assert "cut" in Result("f", True, "x" * (1001 - len('{"result": ""}'))).text()


# schemas

def sample(city: str, days: int = 5, unit: Literal["c", "f"] = "c", tags: list[str] = None, extra: Optional[dict] = None,
           exact: bool = False, scale: Optional[float] = None):
    """Forecast the weather. Needs a network.

    Args:
        city: where,
            in full: with the country
        days (int): how many
    Returns:
        text: nothing
    """


def test_tool_decorator():
    made = tool(sample)
    assert made.parameters["required"] == ["city"] and made.description == "Forecast the weather. Needs a network."
    properties = made.parameters["properties"]
    assert properties["city"] == {"type": "string", "description": "where, in full: with the country"}
    assert properties["days"] == {"type": "integer", "default": 5, "description": "how many"}
    assert properties["unit"]["enum"] == ["c", "f"] and properties["tags"]["items"] == {"type": "string"}
    assert [properties[name]["type"] for name in ("extra", "exact", "scale")] == ["object", "boolean", "number"]
    assert made.signature() == ('sample(city: string, days?: integer = 5, unit?: "c" | "f" = "c", tags?: array<string>, '
                                'extra?: object, exact?: boolean = false, scale?: number) - Forecast the weather.')
    named = tool(name="a.b", isolated=False)(sample)
    assert named.name == "a.b" and not named.isolated and named.signature().startswith("a.b(")
    assert made.schema() == {"type": "function", "function": {"name": "sample", "description": made.description,
                                                              "parameters": made.parameters}}
    assert tool_from_schema(made.schema()).parameters == made.parameters

    def bare(x, y: Optional[int]):
        return [x, y]
    assert tool(bare).signature() == "bare(x: any, y?: integer)"
    assert run(bare, {"x": 1}).value == [1, None]


def test_signature_of_nested_types():
    inner = {"type": "object", "properties": {"a": {"type": "string"}, "b": {"type": "integer"}}, "required": ["a"]}
    made = Tool("math.sum-up", "Adds\n  things. More.", {"type": "dict", "properties": {
        "xs": {"type": "array", "items": {"type": "array", "items": {"type": "integer"}}}, "o": inner,
        "e": {"enum": ["a", 2, "é"]}, "n": {"type": ["string", "null"]}, "z": {}}, "required": ["xs"]})
    assert made.signature() == ('math.sum-up(xs: array<array<integer>>, o?: object{a: string, b?: integer}, '
                                'e?: "a" | 2 | "é", n?: string | null, z?: any) - Adds things.')
    assert Tool("f", "", {}).signature() == "f()"
    inner["properties"]["b"]["description"] = "two\n  lines"
    assert render_tools([made], "described").startswith("math.sum-up(xs: array<array<integer>>, o?: object{a: string, b?: "
                                                        "integer (two lines)}, e?: ")
    assert "(two" not in render_tools([made])
    assert render_tools([made], "call") == ('{"name": "math.sum-up", "arguments": {"xs": array<array<integer>>, "o": {"a": string, "b": '
                                            'integer? (two lines)}?, '
                                            '"e": "a" | 2 | "é"?, "n": string | null?, "z": any?}} - Adds things.')
    assert Tool("f", "", {}).signature("call") == '{"name": "f", "arguments": {}}'


def test_tool_from_schema():
    bare = {"name": "f", "description": "D.", "parameters": {"type": "object", "properties": {"x": {"type": "number"}}}}
    assert tool_from_schema(bare) == tool_from_schema({"type": "function", "function": bare})
    assert tool_from_schema({"name": "f"}).signature() == "f()"
    assert tool_from_schema(bare, abs).function is abs
    assert tool_from_schema({**bare, "function": "math:sqrt"}).function(4) == 2
    for wrong in ("math:nothing", "no_such_module:f", "math", ":f", "", "math:pi"):
        with pytest.raises(UserError):
            tool_from_schema({**bare, "function": wrong})
    for wrong in (None, 5, {}, [], {"name": ""}, {"name": 3}, {"name": "a b"}, {"name": "f", "parameters": [1]},
                  {"name": "f", "parameters": {"properties": []}}, {"name": "f", "parameters": {"properties": {"x": 1}}},
                  {"name": "f", "description": 3}, {"type": "function", "function": {}}):
        with pytest.raises(UserError) as caught:
            tool_from_schema(wrong)
        assert "\n" not in str(caught.value)


def test_a_function_and_a_schema_that_are_given_apart_must_fit(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text("def temp(city, unit): return [city, unit]\n"
                                      "def loose(city, **more): return [city, sorted(more)]\nNUMBER = 5\n")
    monkeypatch.syspath_prepend(tmp_path)
    unit = {"type": "string", "default": "c"}
    parameters = {"type": "object", "properties": {"city": {"type": "string"}, "unit": unit}, "required": ["city"]}
    made = lambda name, **parameters: tool_from_schema({"name": "t", "function": f"mine:{name}", "parameters": parameters})  # noqa: E731
    run = lambda made, **arguments: execute(Call("t", arguments), {"t": made}).value  # noqa: E731
    assert run(made("temp", **parameters), city="Oslo") == ["Oslo", "c"]  # the schema's default is used
    assert run(made("temp", **parameters), city="Oslo", unit="f") == ["Oslo", "f"]
    assert run(made("loose", **parameters), city="Oslo", unit="f") == ["Oslo", ["unit"]]
    with pytest.raises(UserError, match="tool t: its function needs 'unit', which the schema does not require"):
        made("temp", properties={"city": {"type": "string"}}, required=["city"])
    with pytest.raises(UserError, match="tool t: its function takes no argument 'town'"):
        made("temp", properties={"town": {}, "city": {}, "unit": {}}, required=["city", "unit"])
    with pytest.raises(UserError, match="tool t: 'mine:NUMBER' is 5, which cannot be called"):
        tool_from_schema({"name": "t", "function": "mine:NUMBER"})
    root = tool_from_schema({"name": "t", "function": "math:sqrt", "parameters": {"type": "object", "properties": {"x": {"type": "number"}}}})
    assert run(root, x=9) == 3  # a function that knows no names gets the values in their order


def test_a_signature_describes_parameters_whose_names_say_nothing():
    field = {"type": "string", "description": "where"}
    shown = {name: Tool("f", "", {"type": "object", "properties": {name: field}}).signature() for name in ("arg1", "param_2", "city", "x")}
    assert shown == {"arg1": "f(arg1?: string (where))", "param_2": "f(param_2?: string (where))", "city": "f(city?: string)",
                     "x": "f(x?: string)"}


def test_results_of_numpy_are_numbers():
    import numpy
    assert Result("f", True, {"mean": numpy.float32(0.5), "all": numpy.arange(3)}).text() == '{"result": {"mean": 0.5, "all": [0, 1, 2]}}'


def test_load_and_render():
    assert list(load_tools()) == ["calculator", "weather", "search"] == list(BUILTIN)
    made = tool(sample)
    assert list(load_tools(["search", made, {"name": "g"}])) == ["search", "sample", "g"]
    assert load_tools([]) == {}
    with pytest.raises(UserError, match="calculator"):
        load_tools(["calculater"])
    described = {**BUILTIN["calculator"].schema()["function"], "description": "Works out sums."}  # a new description: it still runs
    offered = load_tools([described])
    assert render_tools(offered).endswith("Works out sums.")
    assert execute(Call("calculator", {"expression": "1 + 1"}), offered).value == 2
    other = load_tools([{"name": "calculator", "parameters": {"properties": {"a": {}, "b": {}}}}])  # another tool of that name does not run
    assert execute(Call("calculator", {"a": 1}), other).error_type == "not_executable"
    for wrong in (["search", "search"], "search", [None], [3], {"name": "g"}):
        with pytest.raises(UserError):
            load_tools(wrong)
    assert render_tools(load_tools()).split("\n")[1].startswith('weather(city: string, unit?: "celsius" | "fahrenheit") - ')
    assert render_tools(load_tools()).split("\n")[0].startswith("calculator(expression: string) - ")
    assert render_tools(list(load_tools().values())) == render_tools(load_tools())
    lines = render_tools(load_tools(), "json").split("\n")
    assert [json.loads(line)["function"]["name"] for line in lines] == list(BUILTIN)
    with pytest.raises(UserError):
        render_tools(load_tools(), "xml")


# execution: arguments

@pytest.mark.parametrize("name, arguments, error_type, word", [
    ("calc", {}, "unknown_tool", "calculator"), ("x" * 10 ** 5, {}, "unknown_tool", ""), ("", {}, "unknown_tool", ""),
    ("calculator", {}, "missing_argument", "expression"), ("calculator", {"expression": 5}, "wrong_type", "string"),
    ("calculator", {"expresion": "1"}, "unknown_argument", "expression"), ("weather", {"city": None}, "wrong_type", "string"),
    ("weather", {"city": "Paris", "unit": "kelvin"}, "wrong_type", "celsius"), ("weather", {"city": "Gotham"}, "tool_error", "Gotham"),
    ("calculator", {"expression": "1/0"}, "tool_error", "zero"), ("search", {"query": " "}, "tool_error", "empty"),
    ("weather", {"city": "Paris", "path": "/etc/passwd"}, "unknown_argument", "path"), ("search", [], "wrong_type", ""),
    ("search", None, "wrong_type", ""), (None, {}, "unknown_tool", ""), ([], {}, "unknown_tool", ""),
])
def test_bad_calls_of_builtins(name, arguments, error_type, word):
    result = execute(Call(name, arguments), load_tools())
    assert (result.ok, result.error_type) == (False, error_type) and word in result.message
    assert len(result.text()) <= 1000 and json.loads(result.text())["error"]


def test_execute_takes_anything():
    for call in (None, 5, "calculator", object(), CallError(0, "", "")):
        assert not execute(call, load_tools()).ok
    assert execute(Call("f", {}), {}).error_type == "unknown_tool"


def test_argument_types():
    accepted = {"string": ["", "5"], "integer": [5, -1], "number": [5, 5.5], "boolean": [True], "array": [[]], "object": [{}],
                "null": [None]}
    for kind in accepted:
        made = Tool("f", "", {"type": "object", "properties": {"x": {"type": kind}}}, lambda x: "fine", isolated=False)
        for other, values in accepted.items():
            for value in values:
                good = value in accepted[kind] and not (isinstance(value, bool) and kind != "boolean")
                result = execute(Call("f", {"x": value}), {"f": made})
                assert result.ok == good or (kind == "number" and other == "integer"), (kind, value)
        assert execute(Call("f", {"x": 5.0}), {"f": made}).ok == (kind == "number")
        assert execute(Call("f", {}), {"f": made}).error_type == "crashed"  # optional in the schema, not in Python


def test_nested_arguments():
    inner = {"type": "object", "properties": {"a": {"type": "integer"}, "e": {"enum": [1, "x"]}}, "required": ["a"]}
    made = Tool("f", "", {"properties": {"xs": {"type": "array", "items": inner}, "free": {"type": "object"}}},
                lambda **arguments: "fine", isolated=False)
    for arguments, error_type in [({"xs": [{"a": 1}, {"a": 2, "e": "x"}]}, ""), ({"xs": [{"a": 1}, {}]}, "missing_argument"),
                                  ({"xs": [{"a": "1"}]}, "wrong_type"), ({"xs": [{"a": True}]}, "wrong_type"),
                                  ({"xs": {}}, "wrong_type"), ({"xs": [{"a": 1, "e": True}]}, "wrong_type"),
                                  ({"free": {"q": [1]}}, ""), ({"more": 1}, "unknown_argument")]:
        assert execute(Call("f", arguments), {"f": made}).error_type == error_type
    for broken in ({"type": 5}, {"enum": 3}, {"type": "array", "items": {"type": 5}}, {"default": float("nan")}, {"anyOf": 1}):
        with pytest.raises(UserError, match="not a JSON schema"):
            Tool("f", "", {"type": "object", "properties": {"x": broken}}, lambda x: 1)
    assert execute(Call("g", {"q": 1}), {"g": Tool("g", "", {})}).error_type == "not_executable"


# execution: tools that misbehave

def forever():
    while True:
        try:
            time.sleep(0.001)
        except BaseException:
            continue


def busy():
    while True:
        pass


def sleeps():
    time.sleep(60)


def slow_in_c():
    return sum(range(10 ** 12))


def floods_output():
    while True:
        print("x" * 10 ** 5)
        os.write(1, b"x" * 10 ** 5)


def floods_pipe():
    while True:
        os.write(RESULT_PIPE[-1], b"x" * 10 ** 4)


def forks_and_hangs():
    os.fork()
    time.sleep(60)


@pytest.mark.parametrize("function", [forever, busy, sleeps, slow_in_c, floods_output, forks_and_hangs])
def test_timeout(function):
    start = time.monotonic()
    result = run(function, timeout=0.15)
    assert result.error_type == "timeout" and time.monotonic() - start < 5


def handles_signals():
    return [signal.getsignal(number) is signal.SIG_DFL for number in (signal.SIGTERM, signal.SIGINT)]


def test_a_tool_s_processes_can_be_ended_during_training():
    """Training handles SIGTERM itself; a tool that ends a process of its own must not wait for it forever."""
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        assert run(handles_signals).value == [True, True]
    finally:
        signal.signal(signal.SIGTERM, before)


def leaves():
    sys.exit(0)


def leaves_hard():
    os._exit(0)


def dies():
    faulthandler.disable()  # pytest's handler would print a page
    os.kill(os.getpid(), 11)


def raises():
    raise RuntimeError("x" * 10 ** 6)


def recurses():
    return recurses()


def interrupts():
    raise KeyboardInterrupt


def closes():
    os.closerange(3, 200)
    return 1


class Unspeakable(Exception):
    def __str__(self):
        raise ValueError

    __repr__ = __str__


def unspeakable():
    raise Unspeakable


@pytest.mark.parametrize("function", [leaves, leaves_hard, dies, raises, recurses, interrupts, closes, unspeakable])
def test_crash(function):
    result = run(function)
    assert result.error_type == "crashed" and len(result.text()) <= 1000


RESULT_PIPE = []


def test_bad_results(monkeypatch):
    assert run(lambda_unspeakable).error_type == "bad_result"
    pair = socket.socketpair

    def spied():
        ends = pair()
        RESULT_PIPE.append(ends[1].fileno())
        return ends
    monkeypatch.setattr(socket, "socketpair", spied)
    for garbage in (b"\n", b"nonsense\n", b"\xff\n", b"[1]\n", b"5\n", b'{"a": 1}\n', b"[true, NaN, 1, 2]\n", b"[true, "):
        def forges():
            os.write(RESULT_PIPE[-1], garbage)
            os._exit(0)
        assert run(forges).error_type == "bad_result"
    result = run(floods_pipe, timeout=3)
    assert result.error_type in ("bad_result", "timeout")


def lambda_unspeakable():
    return Unspeakable()


def test_odd_values():
    def answer(value):
        def give():
            return value
        return run(give)
    assert answer({1: (1, 2)}).value == {"1": [1, 2]}
    assert answer({1, }).value == "{1}" and answer(float("nan")).value == "nan" and answer(None).value is None
    loop = []
    loop.append(loop)
    assert answer(loop).value == "[[...]]"
    deep = []
    for _ in range(500):
        deep = [deep]
    assert answer(deep).ok and isinstance(answer(deep).value, str)
    edge = 1
    for _ in range(49):
        edge = [edge]
    assert answer(edge).value == edge
    giant = answer("é" * 5_000_000)
    assert giant.ok and len(giant.text()) <= 1000 and giant.value.endswith("…[cut]")

    def own():
        raise ToolError("no such <user>")
    result = run(own)
    assert (result.error_type, result.message) == ("tool_error", "no such <user>") and "<" not in result.text()


def test_child_is_silent_and_alone(capfd, tmp_path):
    changed = []

    def noisy():
        print("to stdout")
        print("to stderr", file=sys.stderr)
        os.system("echo from the shell")
        changed.append(1)
        return len(changed)
    assert run(noisy).value == 1 and changed == []
    assert capfd.readouterr() == ("", "")


def test_grandchildren_die_and_nothing_leaks(tmp_path):
    def breeds():
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        return child.pid
    pid = run(breeds).value
    for _ in range(100):
        stat = Path(f"/proc/{pid}/stat")
        if not stat.exists() or ") Z " in stat.read_text():
            break
        time.sleep(0.05)
    else:
        pytest.fail("the grandchild lives on")
    def children():
        return set(Path(f"/proc/self/task/{os.getpid()}/children").read_text().split())
    before, others = len(os.listdir("/proc/self/fd")), children()  # other tests may have their own children
    for _ in range(5):
        run(sleeps, timeout=0.05)
        run(leaves_hard)
    assert len(os.listdir("/proc/self/fd")) == before
    assert children() <= others


def test_builtins_run_in_process(monkeypatch):
    monkeypatch.setattr(os, "fork", lambda: pytest.fail("forked"))
    assert execute(Call("calculator", {"expression": "17 * 23"}), load_tools()).text() == '{"result": 391}'

    def leave():
        sys.exit(1)
    made = tool(leave, isolated=False)
    assert execute(Call("leave", {}), {"leave": made}).error_type == "crashed"


def test_from_threads():
    results = []

    def add(a: int, b: int):
        return a + b

    def work(number):
        results.append(run(add, {"a": number, "b": 1}).value == number + 1)
        results.append(run(leaves_hard).error_type == "crashed")
        results.append(run(sleeps, timeout=0.1).error_type == "timeout")
    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert results == [True] * 24


def test_with_torch_threads():
    torch = pytest.importorskip("torch")
    torch.randn(300, 300) @ torch.randn(300, 300)

    def add(a: int):
        return a + 1
    assert all(run(add, {"a": number}).value == number + 1 for number in range(5))


# weather and search

def test_weather():
    first = weather("Kraków")
    assert first == weather("  KRAKOW ") == weather("krakow, Poland") == weather("Krakow,  anything, else")
    assert set(first) == {"city", "temperature", "unit", "condition"} and first["city"] == "Kraków"
    assert weather("Kraków", "fahrenheit") == {**first, "unit": "fahrenheit", "temperature": round(first["temperature"] * 9 / 5 + 32)}
    assert weather("lodz")["city"] == "Łódź" and weather("washington, d.c.")["city"] == "Washington, D.C."
    assert weather("XIAN")["city"] == "Xi'an"
    for city in ("Gotham", "", "???", ",", "Santiago", "x" * 10 ** 5, "\ud800"):
        with pytest.raises(ToolError, match="unknown city"):
            weather(city)
    with pytest.raises(ToolError):
        weather("Paris", "kelvin")
    script = "import tools; print(tools.weather('Paris'))"
    outputs = {subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True,
                              env={**os.environ, "PYTHONHASHSEED": seed}).stdout for seed in ("1", "2")}
    assert outputs == {f"{weather('Paris')}\n"}


def test_corpus_files(tmp_path):
    for text in ("", "[]", "{}", '{"cities": [1]}'):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(UserError, match="bad.json"):
            weather("Paris", path=tmp_path / "bad.json")
    with pytest.raises(UserError, match="nothing.jsonl"):
        search("bees", path=tmp_path / "nothing.jsonl")
    (tmp_path / "bad.jsonl").write_text('{"comment": ""}\n{"title": "x"}\n')
    with pytest.raises(UserError, match="line 2"):
        search("bees", path=tmp_path / "bad.jsonl")
    (tmp_path / "long.jsonl").write_text(json.dumps({"title": "bees " * 300, "text": "honey " * 300}) + "\n")
    assert [len(text) <= 200 for text in search("bees", path=tmp_path / "long.jsonl")[0].values()] == [True, True]
    (tmp_path / "other.json").write_text('{"cities": [{"name": "Oz"}]}')
    assert weather("oz", path=tmp_path / "other.json")["city"] == "Oz"


def test_broken_corpus_is_a_result(monkeypatch):
    monkeypatch.setenv("TOOLPLAY_CITIES", "/nowhere")
    assert execute(Call("weather", {"city": "Paris"}), load_tools()).error_type == "crashed"


def test_search():
    assert [hit["title"] for hit in search("What do bees make?")] == ["Honey bees"]
    text = search("honey")[0]["text"]
    assert len(text) <= 200 and text.split()[-1].rstrip("….") in ("from", "nectar", "make", "honey", "Bees")
    assert {hit["title"] for hit in search("mountain")} == {"Mount Everest", "Alps"}
    assert [hit["title"] for hit in search("zebras")] == ["Twin A", "Twin B"]
    assert search("quantum chromodynamics") == [] and search("what is the") == [] and search("?!") == []
    assert set(search("EVEREST")[0]) == {"title", "text"}
    for query in ("", "  \n"):
        with pytest.raises(ToolError):
            search(query)
    search("bees " * 20_000)


def test_script_runs():
    done = subprocess.run([sys.executable, "tools.py"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("calculator(expression: string)") and "<tool_response>" in done.stdout
    assert tools.__doc__


def test_combined_schemas():
    fields = {"a": {"anyOf": [{"type": "integer"}, {"type": "null"}]}, "b": {"$ref": "#/$defs/point"}, "c": {"const": "x"},
              "d": {"type": "object", "additionalProperties": {"type": "integer"}}, "e": {"type": "string", "nullable": True},
              "f": {"allOf": [{"type": "string"}, {"enum": ["u", "v"]}]}, "g": {"type": "object", "required": ["k"]},
              "h": {"type": "array", "items": True}}
    made = Tool("t", "",
                {"type": "object", "properties": fields,
                 "$defs": {"point": {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}}},
                lambda **arguments: "fine", isolated=False)
    good = {"a": [1, None], "b": [{"x": 1}], "c": ["x"], "d": [{}, {"q": 2}], "e": ["s", None], "f": ["u"], "g": [{"k": 1}],
            "h": [[1, "a"]]}
    bad = {"a": ["oops", 1.5], "b": [{"x": "1"}, {}], "c": ["y"], "d": [{"q": "2"}], "e": [3], "f": ["w"], "g": [{}], "h": ["no list"]}
    for key in fields:
        for value in good[key]:
            assert execute(Call("t", {key: value}), {"t": made}).ok, (key, value)
        for value in bad[key]:
            assert execute(Call("t", {key: value}), [made]).error_type in ("wrong_type", "missing_argument"), (key, value)


def test_null_for_what_may_be_left_out():
    assert execute(Call("weather", {"city": "Paris", "unit": None}), BUILTIN).ok
    assert execute(Call("weather", {"city": None}), BUILTIN).error_type == "wrong_type"
    assert execute(Call("weather", {"city": "Paris", "sky": None}), BUILTIN).error_type == "unknown_argument"


def test_what_cannot_be_a_tool_says_why():
    async def later(x: int, unit: Optional[str]): ...
    def primes(n: int): yield n
    def star(*numbers: int): ...
    def method(self, x: int): ...
    def painted(x=object()): ...
    def odd(x: set): ...
    def listed(x: [float]): ...
    def unknown(x: "NoSuchType"): ...  # noqa: F821
    def broken(x: "in t"): ...  # noqa: F722
    def absent(x: "os.nope"): ...
    for function, message in ((later, "later: it is async"), (primes, "primes: it is .* a generator"),
                              (star, "star: parameter numbers: arguments come by name"),
                              (method, "method: it is a method"), (painted, "painted: parameter x: its default .* has no JSON form"),
                              (odd, "odd: parameter x: type .*set.* has no JSON form"),
                              (listed, r"listed: parameter x: type \[.*float.*\] has no JSON form"),
                              *((f, f"{f.__name__}: .*in a type hint") for f in (unknown, broken, absent)),
                              *((f, "is no plain function") for f in (functools.partial(print), max, dict, tool(lambda: 1, name="t"), 5))):
        with pytest.raises(UserError, match=message):
            tool(function)
    with pytest.raises(UserError, match="stand under 'paramters'; the key is \"parameters\""):
        tool_from_schema({"name": "f", "paramters": {"type": "object", "properties": {}}})
    assert tool_from_schema({"name": "f", "returns": {"type": "object", "properties": {"x": {"type": "integer"}}}}).parameters[
        "properties"] == {}


def test_a_built_in_offered_with_fewer_parameters_runs_and_with_other_values_does_not():
    less = {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}}
    assert execute(Call("weather", {"city": "Paris"}), load_tools([less])).ok
    loose = load_tools([{"name": "weather", "parameters": {"type": "object", "properties": {"city": {}, "unit": {"type": "string"}}}},
                        {"name": "calculator", "parameters": {"type": "object", "properties": {"expression": {"type": "string"}}}}])
    for call, problem in ((Call("weather", {"city": 7}), "wrong_type"), (Call("calculator", {}), "missing_argument")):
        assert execute(call, loose).error_type == problem  # the built-in's own schema still holds
    other = {"name": "weather",
             "parameters": {"type": "object", "properties": {"city": {"type": "string"}, "unit": {"type": "string", "enum": ["C", "F"]}}}}
    assert execute(Call("weather", {"city": "Paris", "unit": "C"}), load_tools([other])).error_type == "not_executable"


@pytest.mark.parametrize("city, name", [("Delhi", "New Delhi"), ("paris france", "Paris"), ("Paris (France)", "Paris"), ("Köln", "Cologne"),
                                        ("Washington, D.C., USA", "Washington"), ("London UK", "London"), ("nice", "Nice"), ("Reykjavik", "Reykjavík")])
def test_other_names_of_a_city(city, name):
    real = functools.partial(weather, path=CORPORA / "cities.json")
    assert real(city)["city"] == name and real(city) == real(name)


def test_a_search_reads_the_beginning_of_a_long_query(monkeypatch):
    search("honey")  # builds the index
    read = []
    monkeypatch.setattr(tools, "_terms", lambda text: read.append(len(text)) or ["honey"])
    search(" ".join(f"word{n}" for n in range(20_000)))
    assert max(read) == 1000


def test_an_answer_in_drops_does_not_stretch_the_time(monkeypatch):
    pairs, pair = [], socket.socketpair
    monkeypatch.setattr(tools.socket, "socketpair", lambda: pairs.append(pair()) or pairs[-1])

    def drip():
        while True:
            pairs[-1][1].send(b" ")  # directly to its parent, not through the code that sends the result
            time.sleep(0.1)
    start = time.monotonic()
    assert execute(Call("drip", {}), [Tool("drip", "", {}, drip)], timeout=0.5).error_type == "timeout"
    assert time.monotonic() - start < 2


def test_search_says_nothing_rather_than_something_else():
    real = functools.partial(search, path=CORPORA / "search.jsonl")
    for query in ("which city is the capital of Nigeria", "why do we celebrate Christmas", "largest ocean", "is lavender toxic to dogs"):
        assert real(query) == [], query
    assert [real(query)[0]["title"] for query in ("Eiffel Tower height", "who painted the Mona Lisa")] == ["Eiffel Tower", "Mona Lisa"]


def test_a_module_that_exits_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "leaves.py").write_text("import sys\nsys.exit(0)\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match="cannot import"):
        tool_from_schema({"name": "x", "function": "leaves:f"})


def test_an_import_that_fails_says_why(tmp_path, monkeypatch):
    (tmp_path / "slips.py").write_text("def f(:\n")
    (tmp_path / "has_f.py").write_text("def f():\n    return 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    for path, words in (("slips:f", r"SyntaxError: .*slips.py, line 1"), ("has_f:g", "has no attribute"),
                        ("has_f.g", 'write "package.module:name"'), ("nowhere_at_all:f", "nowhere_at_all.py must be in the current folder")):
        with pytest.raises(UserError, match=words):
            tools.import_by_name(path, "tool x")


# ---------------------------------------------------------------- schemas of several parts, and references

def problems(parameters, arguments):
    made = Tool("t", "", parameters, lambda **given: given, isolated=False)
    result = execute(Call("t", arguments), {"t": made})
    return [] if result.ok else [result.error_type]


def test_arguments_may_be_named_by_any_part_of_a_schema():
    by = {"type": "object", "oneOf": [{"properties": {"id": {"type": "integer"}}, "required": ["id"]},
                                      {"properties": {"name": {"type": "string"}}, "required": ["name"]}]}
    assert problems(by, {"id": 5}) == problems(by, {"name": "x"}) == []
    assert problems(by, {"id": "x"}) == ["wrong_type"] and problems(by, {"id": 5, "zzz": 1}) == ["unknown_argument"]
    both = {"type": "object",
            "properties": {"p": {"allOf": [{"properties": {"a": {"type": "integer"}}, "required": ["a"]},
                                           {"properties": {"b": {"type": "integer"}}}]}}}
    assert problems(both, {"p": {"a": 1, "b": 2}}) == [] and problems(both, {"p": {"b": 2}}) == ["missing_argument"]
    assert problems(both, {"p": {"a": 1, "c": 2}}) == ["unknown_argument"]
    beside = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
              "anyOf": [{"properties": {"a": {}}, "required": ["a"]}, {"required": ["b"]}]}
    assert problems(beside, {"b": 1}) == problems(beside, {"a": 1, "b": 2}) == []
    assert problems(beside, {}) == ["wrong_type"]


def test_references_are_followed_to_their_end():
    chain = {"type": "object", "properties": {"x": {"$ref": "#/$defs/A"}}, "$defs": {"A": {"$ref": "#/$defs/B"}, "B": {"type": "integer"}}}
    assert problems(chain, {"x": 1}) == [] and problems(chain, {"x": "abc"}) == ["wrong_type"]
    tree = {"type": "object", "properties": {"n": {"type": "integer"}, "kids": {"type": "array", "items": {"$ref": "#"}}}}
    assert problems(tree, {"n": 1, "kids": [{"n": 2, "kids": []}]}) == []
    assert problems(tree, {"kids": [{"n": "x"}]}) == ["wrong_type"]
    assert Tool("t", "", tree).signature().startswith("t(n?: integer, kids?: array<")
    unit = {"type": "object", "properties": {"unit": {"$ref": "#/$defs/Unit", "default": "a"},
                                             "or": {"anyOf": [{"$ref": "#/$defs/Unit"}, {"type": "null"}]}},
            "$defs": {"Unit": {"enum": ["a", "b"], "type": "string"}}}
    assert Tool("t", "", unit).signature() == 't(unit?: "a" | "b" = "a", or?: "a" | "b" | null)'
    for ref in ("#/$defs/nothing", "#/$defs/A"):
        with pytest.raises(UserError, match="not a JSON schema that can be used"):
            Tool("t", "", {"type": "object", "properties": {"x": {"$ref": ref}}, "$defs": {"A": {"$ref": "#/$defs/A"}}})


# ---------------------------------------------------------------- found in a later review

def test_a_tool_may_run_tools():
    @tool
    def add(a: int, b: int) -> int:
        return a + b

    @tool
    def agent(q: str) -> int:
        return execute(Call("add", {"a": 1, "b": 2}), [add]).value
    assert execute(Call("agent", {"q": "x"}), [agent]).value == 3


def test_hints_of_several_types_and_sections_of_other_names():
    @tool
    def pick(x: int | str, y: Optional[int] = 5) -> str:
        """Pick.

        Arguments:
            x: which one
        """
        return f"{x} {y}"
    assert pick.parameters["properties"]["x"] == {"anyOf": [{"type": "integer"}, {"type": "string"}], "description": "which one"}
    assert execute(Call("pick", {"x": "a", "y": None}), [pick]).value == "a None"
    assert execute(Call("pick", {"x": 1}), [pick]).value == "1 5"
    assert execute(Call("pick", {"x": [1]}), [pick]).error_type == "wrong_type"


@pytest.mark.parametrize("field, good, bad", [
    ({"type": "integer", "minimum": 1}, 1, 0), ({"type": "number", "exclusiveMaximum": 2}, 1.9, 2),
    ({"type": "number", "minimum": 0, "exclusiveMinimum": True}, 0.1, 0), ({"maximum": 2, "exclusiveMaximum": False}, 2, 3),
    ({"type": "string", "maxLength": 2}, "ab", "abc"),
    ({"type": "array", "minItems": 1}, [1], []), ({"type": "number", "multipleOf": 0.1}, 0.3, 0.35),
    ({"type": "array", "uniqueItems": True}, [1, True], [[1], [1]]), ({"type": "number", "enum": [0.5, 1]}, 1.0, 2),
    ({"const": {"a": 1, "b": 2}}, {"b": 2, "a": 1}, {"a": 1})])
def test_bounds_of_a_schema(field, good, bad):
    t = Tool("t", "", {"type": "object", "properties": {"x": field}, "required": ["x"]}, lambda x: "ran", isolated=False)
    assert execute(Call("t", {"x": good}), [t]).value == "ran"
    assert execute(Call("t", {"x": bad}), [t]).error_type == "wrong_type"


@pytest.mark.parametrize("value", [float("nan"), b"1", {1, 2}, object()])
def test_what_json_cannot_hold_is_a_wrong_type(value):
    assert execute(Call("calculator", {"expression": value}), BUILTIN).error_type == "wrong_type"


def test_odd_values_odd_exceptions_and_odd_limits():
    import datetime

    class Stop(BaseException):
        pass

    def raises():
        raise Stop("so")
    free = lambda function: Tool("t", "", {"type": "object", "properties": {}}, function, isolated=False)  # noqa: E731
    assert json.loads(execute(Call("t", {}), [free(lambda: {"when": datetime.date(2026, 1, 2), "n": 3})]).text()) == {
        "result": {"when": "2026-01-02", "n": 3}}
    assert execute(Call("t", {}), [free(raises)]).error_type == "crashed"
    for limit in (None, float("inf")):
        assert execute(Call("calculator", {"expression": "1 + 1"}), BUILTIN, timeout=limit).value == 2
    assert len(execute(Call("t", {}), [free(lambda: "long " * 9)], max_chars=0).text()) < 40


def test_a_declaration_that_says_too_little_or_too_much(tmp_path, monkeypatch):
    (tmp_path / "own_tools_here.py").write_text("def add(a: int, b: int = 1) -> int:\n    \"\"\"Add.\"\"\"\n    return a + b\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    made = tools.tool_from_schema({"name": "plus", "function": "own_tools_here:add"})
    assert made.signature() == "plus(a: integer, b?: integer = 1) - Add."
    assert execute(Call("plus", {"a": 2}), [made]).value == 3
    with pytest.raises(UserError, match="unknown key 'paramters'"):
        tools.tool_from_schema({"name": "plus", "paramters": {}, "function": "own_tools_here:add"})
    with pytest.raises(UserError, match="data is a module of Toolplay's"):
        tools.tool_from_schema({"name": "mine", "description": "", "parameters": {}, "function": "data:mine"})


def test_an_optional_parameter_of_a_function_that_speaks_for_itself(tmp_path, monkeypatch):
    (tmp_path / "own_optional_tool.py").write_text("from typing import Optional\ndef f(a: int, b: "
                                                   "Optional[int]) -> int:\n    return a + (b or 0)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert execute(Call("f", {"a": 1}), [tools.tool_from_schema({"name": "f", "function": "own_optional_tool:f"})]).value == 1


def test_keywords_that_are_null_are_none():
    schema = {"type": "object", "properties": {"x": {"type": "string", "enum": None, "default": None}, "y": None}, "required": None,
              "additionalProperties": None}
    made = tools.tool_from_schema({"name": "f", "description": None, "parameters": schema})
    assert made.parameters == {"type": "object", "properties": {"x": {"type": "string", "default": None}}}


def test_execute_without_tools_and_with_names():
    assert execute(Call("calculator", {"expression": "2 + 2"}), None).error_type == "unknown_tool"
    assert execute(Call("calculator", {"expression": "2 + 2"}), ["calculator"]).value == 4
    assert execute(Call("calculator", {"expression": "2 + 2"}), ["nosuch"]).error_type == "unknown_tool"


def nested(depth, first):
    value = {"op": "neg"}
    for _ in range(depth):
        value = {"arg": value, "op": "neg"} if first else {"op": "neg", "arg": value}
    return value


@pytest.mark.parametrize("first", [True, False])
def test_alternatives_that_hold_themselves_are_checked_in_time(first):
    either = {"anyOf": [{"type": "object", "properties": {"op": {"const": op}, "arg": {"$ref": "#/$defs/e"}}, "required": ["op"]}
                        for op in ("add", "neg")]}
    f = Tool("f", "", {"type": "object", "properties": {"e": {"$ref": "#/$defs/e"}}, "$defs": {"e": either}}, lambda e: 1)
    assert execute(Call("f", {"e": nested(40, first)}), {"f": f}).ok  # 2^40 checks if each alternative were checked again
    wrong = json.loads(json.dumps(nested(40, first)).replace('"neg"}', '"other"}', 1))
    assert execute(Call("f", {"e": wrong}), {"f": f}).error_type == "wrong_type"
    assert f.signature() == 'f(e?: object{op: "add", arg?: any} | object{op: "neg", arg?: any})'


@pytest.mark.parametrize("field, right, wrong", [
    ({"type": "string", "oneOf": [{"format": "date"}, {"format": "date-time"}]}, "a", 5),
    ({"type": "integer", "anyOf": [{"minimum": 0}, {"maximum": -5}]}, 7, "x"),
    ({"type": "string", "anyOf": [{"const": "EUR"}, {"enum": ["GBP", 5]}]}, "GBP", 5)])
def test_a_type_beside_alternatives_holds_for_each_of_them(field, right, wrong):
    made = tool_from_schema({"name": "f", "parameters": {"type": "object", "properties": {"d": field}}}, lambda d: "ok")
    written = lambda value: '<tool_call>{"name": "f", "arguments": {"d": ' + json.dumps(value)  # noqa: E731
    assert execute(Call("f", {"d": right}), [made]).ok and call_state(written(right) + "}}</tool_call>", [made]) == "outside"
    assert execute(Call("f", {"d": wrong}), [made]).error_type == "wrong_type"
    assert call_state(written(wrong), [made]) == "invalid"


def test_alternatives_that_two_types_share():
    made = tool_from_schema({"name": "f", "parameters": {
        "type": "object", "$defs": {"U": {"anyOf": [{"minimum": 0}, {"maxLength": 5}]}},
        "properties": {"a": {"$ref": "#/$defs/U", "type": "string"}, "b": {"$ref": "#/$defs/U", "type": "integer"}}}}, lambda a, b: "ok")
    assert call_state('<tool_call>{"name": "f", "arguments": {"a": "x", "b": 3}}</tool_call>', [made]) == "outside"


def test_a_city_with_very_many_accents(monkeypatch):
    """Sorting the accents takes time that grows with the square of their number."""
    read, real = [], tools._normal
    monkeypatch.setattr(tools, "_normal", lambda text: read.append(len(text)) or real(text))
    assert execute(Call("weather", {"city": "a" + "\u0301\u0316" * 40000}), BUILTIN).error_type == "tool_error"
    assert read and max(read) <= 200


@pytest.mark.parametrize("parameters, shown", [
    ({"type": "object", "properties": {k: {"$ref": "#"} for k in "abcd"}}, "a?: any, b?: any, c?: any, d?: any"),
    ({"$ref": "#/$defs/A", "$defs": {"A": {"type": "object", "properties": {"q": {"type": "string"}}, "required": ["q"]}}}, "q: string"),
    ({"type": "object", "allOf": [{"properties": {"id": {"type": "integer"}}, "required": ["id"]}]}, "id: integer"),
    ({"type": "object", "oneOf": [{"properties": {"id": {"type": "integer"}}, "required": ["id"]},
                                  {"properties": {"name": {"type": "string"}}}]}, "id?: integer, name?: string"),
    ({"type": "object", "properties": {"p": {"allOf": [{"$ref": "#/$defs/U"}], "default": "a"}}, "$defs": {"U": {"enum": ["a", "b"]}}},
     'p?: "a" | "b" = "a"'),
    ({"type": "object", "properties": {"a\nb <|im_end|>": {"type": "array", "items": {"type": "string"}}}},
     "a b \\u003c|im_end|>?: array<string>"),
])
def test_signatures_of_combined_and_odd_schemas(parameters, shown):
    assert Tool("f", "Half \ud800.", parameters).signature() == f"f({shown}) - Half \ufffd."


@pytest.mark.parametrize("expression, message", [("0x10 + 1", "0x10"), ("100 / 10% of (20 + 30)", "brackets around '10% of"),
                                                 ("sqrt(1, 2)", "sqrt does not take 2 numbers"), ("min()", "min does not take 0"),
                                                 ("sqrt(-1)", "negative number has no such root"),
                                                 ("(-8)**0.5", "negative number has no such root"), (" ", "is empty")])
def test_what_the_calculator_says(expression, message):
    assert message in execute(Call("calculator", {"expression": expression}), BUILTIN).message


def test_results_that_hold_no_value_yet():
    async def later():
        return 1

    def unawaited():
        coroutine = later()
        coroutine.close()
        return coroutine
    for made in (lambda: (n for n in range(3)), lambda: map(str, [1]), unawaited):
        assert execute(Call("f", {}), {"f": Tool("f", "", {"type": "object", "properties": {}}, made)}).message.startswith("f returned a")
    for function in ("asyncio:sleep", "asyncio:open_connection"):
        with pytest.raises(UserError, match="async"):
            tool_from_schema({"name": "s", "parameters": {"type": "object", "properties": {"delay": {"type": "number"}}},
                              "function": function})


def test_hints_inside_lists_and_dicts():
    @tool
    def f(x: list[Optional[int]], y: dict[str, int]):
        """F."""
        return 1
    assert execute(Call("f", {"x": [1, None], "y": {"a": 1}}), {"f": f}).ok
    assert execute(Call("f", {"x": [1], "y": {"a": "b"}}), {"f": f}).message == "argument 'y.a' must be integer, not \"b\""


NUMPY = """Add two numbers.

    Parameters
    ----------
    x : int
        The first,
        and more.
    y : int, optional
        The second.

    Returns
    -------
    int
        The sum.
    """
REST = """Add two numbers.

    :param int x: The first,
        and more.
    :param y: The second.
    :returns: the sum
    """
GOOGLE = """Add two numbers.

    Args:
\t\tx: The first,
\t\t\tand more.
\t\ty (int, optional): The second.

    Returns:
        The sum.
    """


SHOWN = "add(x: integer (The first, and more.), y?: integer = 1 (The second.))"


@pytest.mark.parametrize("text, shown", [*((text, SHOWN + " - Add two numbers.") for text in (NUMPY, REST, GOOGLE)),
                                         (GOOGLE.removeprefix("Add two numbers.\n\n"), SHOWN),  # no summary before its arguments
                                         # "Formula:" is no section
                                         (GOOGLE.replace("Add two numbers.", "Formula:\n    x + y"), SHOWN + " - Formula: x + y")])
def test_docstrings_of_three_styles(text, shown):
    def add(x: int, y: int = 1):
        return x + y
    add.__doc__ = text
    assert tool(add).signature("described") == shown


def test_a_tool_that_needs_its_process_keeps_it_when_json_names_it(tmp_path, monkeypatch):
    (tmp_path / "countdown.py").write_text("from tools import tool\nleft = [3]\n\n\n@tool(isolated=False)\ndef count():\n"
                                           "    left[0] -= 1\n    return left[0]\n")
    monkeypatch.syspath_prepend(tmp_path)
    tools = load_tools([{"name": "count", "function": "countdown:count"}])
    assert [execute(Call("count", {}), tools).value for _ in range(3)] == [2, 1, 0]


def test_a_blank_before_the_colon_is_no_type():
    def add(x: int, y: int = 1):
        """Args:
            x : The first, and more.
            y : The second.
        """
    assert tool(add).signature("described") == SHOWN


def test_schemas_as_they_are_found():
    def made(**parameters):
        return tool_from_schema({"name": "f", "parameters": {"type": "object", **parameters}}, lambda **k: 1)

    def said(parameters, **arguments):
        return execute(Call("f", arguments), {"f": made(**parameters)}).error_type
    assert said({"patternProperties": {"^a": {"type": "string"}}, "additionalProperties": False}, a1="3") == ""
    beside = {"properties": {"x": {"$ref": "#/$defs/I", "minimum": 5}}, "$defs": {"I": {"type": "integer"}}}
    assert said(beside, x=3) == "wrong_type" and said(beside, x=6) == ""
    assert said({"properties": {"x": {"type": "object", "properties": {"q": True}}}}, x={"q": 1}) == ""
    assert said({"properties": {"x": {"$ref": "#/$defs/A%20B"}, "y": {"$ref": "#/$defs/C/anyOf/0"}},
                 "$defs": {"A B": {"type": "integer"}, "C": {"anyOf": [{"type": "integer"}]}}}, x=1, y="2") == "wrong_type"
    with pytest.raises(UserError, match="names no schema"):
        made(properties={"x": {"$ref": "#/$defs/C"}})


# ---------------------------------------------------------------- constrained decoding

ODD = [tool_from_schema({"name": name, "description": "d", "parameters": parameters}) for name, parameters in {
    "f": {"type": "object", "required": ["a", "o"], "properties": {
        "a": {"type": "string"}, "n": {"type": "number"}, "i": {"type": "integer"}, "b": {"type": "boolean"},
        "e": {"enum": ["x", "xy", 1, 12]},
        "l": {"type": "array", "items": {"type": "integer"}},
        "o": {"type": "object", "properties": {"q": {"type": "string"}, "z": {"type": "number"}}, "required": ["q"]},
        "u": {"anyOf": [{"type": "integer"}, {"type": "number"}, {"type": "null"}]}, "any": {}}},
    "f.empty": {"type": "object", "properties": {}},
    "tree": {"type": "object", "properties": {"t": {"$ref": "#/$defs/t"}},
             "$defs": {"t": {"anyOf": [{"$ref": "#/$defs/t"}, {"type": "array", "items": {"$ref": "#/$defs/t"}}, {"type": "string"}]}}},
    "open": {"type": "object", "properties": {"k": {"type": "integer"}}, "additionalProperties": {"type": "boolean"}},
    "spelled": {"type": "object", "properties": {"city": {"enum": ["北京", "Київ", "<5"]}, "城市": {"type": "string"},
                                                 "x": {"type": "number", "enum": [1.0, 2.5]},
                                                 "z": {"type": "array", "enum": ["a"], "items": {"type": "string"}}, "none": {"enum": []}}},
    "nullable": {"type": "object", "properties": {"s": {"type": "string"}, "e": {"type": "string", "enum": ["a", 1], "nullable": True},
                                                  "u": {"allOf": [{"$ref": "#/$defs/U"}]}}, "required": ["e"],
                 "$defs": {"U": {"type": "string", "enum": ["m", "km"]}}},
    "closed": {"type": "object"},
    "old": {"type": "object", "properties": {"o": {"type": "object", "required": True, "properties": {"k": {"type": "integer"}}}}},
    "more": {"type": "object", "required": ["lat"], "additionalProperties": {"type": "number"}},
    "both": {"allOf": [{"properties": {"p": {"type": "string", "nullable": True}}, "required": ["p"]},
                       {"properties": {"q": {"const": 3}}}]}}.items()]
VALID = [Call("f", {"a": 'hi "<\u00e9\\', "o": {"q": "s"}, "n": -1.5e-3, "i": 12, "b": True, "e": 12, "l": [1, -2], "u": None,
                    "any": {"x": [1, {"y": None}]}}),
         Call("f", {"o": {"z": 0, "q": "\n"}, "a": "", "l": [], "e": "xy", "u": 2.5}), Call("f.empty", {}),
         Call("tree", {"t": [["a"], []]}),
         Call("open", {"k": 1, "more": True}), Call("both", {"p": None, "q": 3}), Call("spelled", {"city": "Київ", "城市": "北京", "x": 1.0}),
         Call("spelled", {"city": "北京"}),
         Call("nullable", {"s": None, "e": None, "u": "km"}), Call("closed", {}), Call("old", {"o": {"k": 1}}),
         Call("more", {"lat": 1.5, "lon": 2})]


@pytest.mark.parametrize("call", VALID)
def test_a_valid_call_can_be_written_to_its_end(call):
    text = "Sure. " + format_call(call) + "\n" + format_call(VALID[2]) + " done"
    states = [call_state(text[:n], ODD) for n in range(len(text) + 1)]
    assert "invalid" not in states and states[0] == states[-1] == "outside"
    assert states[6 + len("<tool_call>")] == "inside"


@pytest.mark.parametrize("call", VALID)
def test_what_may_end_is_a_call_that_runs(call):
    """In texts with one letter changed, each call that is accepted to its end is read by parse_calls and fits its schema."""
    rng, whole, ended = random.Random(0), format_call(call), 0
    runnable = [dataclasses.replace(t, function=lambda **arguments: 1, isolated=False) for t in ODD]
    for _ in range(1500):
        n = rng.randrange(len(whole))
        text = whole[:n] + rng.choice('{}[]",: 0159.eE-xyabqtrufnlso\\<') + whole[n + rng.choice([0, 1]):]
        if call_state(text, ODD) == "outside" and "<tool_call>" in text:
            calls, errors = parse_calls(text)
            ended += 1
            assert not errors and all(execute(c, runnable).ok for c in calls), text
    assert ended


@pytest.mark.parametrize("text", ['{"name": "z', '{"name": "f", "arguments": {"c', '{"name": "f", "arguments": {"a": "x"}',
                                  '{"name": "f.empty", "arguments": {"', '{"name": "f", "arguments": {"a": "x<tool_call>',
                                  '{"name": "f", "arguments": {"a": "x", "a"', '{"name": "f", "arguments": {"i": 1.',
                                  '{"name": "f", "arguments": {"l": [1, "', '{"name": "f", "arguments": {"o": {}', '{"a',
                                  '{"name": "f", "arguments": {"n": 01', '{"name": "f", "arguments": {"e": "xyz',
                                  '{"name": "f", "arguments": {"u": t', '{"name": "f",  ', '{"name": "open", "arguments": {"m": 1',
                                  '{"name": "both", "arguments": {"q": 4',
                                  '{"name": "f", "arguments": {"a": "\\x', '{"name": "f.empty", "arguments": {}}}',
                                  '{"name": "f.empty", "arguments": {}}</tool_call></tool_call>', '{"name": "closed", "arguments": {"',
                                  '{"name": "nullable", "arguments": {"u": 5', '{"name": "nullable", "arguments": {"e": 1',
                                  '{"name": "more", "arguments": {}', '{"name": "f", "arguments": {"n": 1e999,',
                                  '{"name": "spelled", "arguments": {"city": "京', '{"name": "both", "arguments": {}'])
def test_what_cannot_become_a_call(text):
    assert call_state("<tool_call>" + text, ODD) == "invalid"
    assert call_state("<tool_call>" + text[:-1], ODD) == "inside" or text.endswith(("</tool_call>", "<tool_call>"))


@pytest.mark.parametrize("field", [{"enum": ["a", "b"]}, {"const": "a"}, {"anyOf": [{"type": "integer"}, {"type": "string"}]},
                                   {"type": ["string", "null"], "enum": ["a"]}])
def test_null_is_written_only_where_it_fits(field):
    made = tool_from_schema({"name": "f", "parameters": {"type": "object", "properties": {"x": field}, "required": ["x"]}}, lambda x: 1)
    assert call_state('<tool_call>{"name": "f", "arguments": {"x": n', [made]) == "invalid"
    assert execute(Call("f", {"x": None}), [made]).error_type == "wrong_type"


def test_call_state_is_quick_and_never_raises():
    start = time.monotonic()
    for text in ("[" * 30000, "[" * 100, '["' * 300, "-" * 9999, '{"x": ' * 5000):
        for name in ("tree", "f"):
            assert call_state(f'<tool_call>{{"name": "{name}", "arguments": {{"t": ' + text, ODD) in ("inside", "invalid")
            assert call_state('<tool_call>{"name": "f", "arguments": {"any": ' + text, ODD) in ("inside", "invalid")
    assert time.monotonic() - start < 5
    assert call_state("<tool_call>", {}) == call_state("</tool_call>", ODD) == "invalid"
    assert call_state("</tool_cal", ODD) == "outside"
    assert [call_state('<tool_call>\n{"name":"f.empty","arguments":{}}\n</tool_call>', ODD)] == ["outside"]  # as Qwen writes it
    loop = {"type": "object", "properties": {"t": {"anyOf": [{"$ref": "#/properties/t"}, {"$ref": "#/properties/t"}]}}}
    assert execute(Call("loop", {"t": 1}),
                   [tool_from_schema({"name": "loop", "description": "d", "parameters": loop}, print)]).error_type == "wrong_type"


def test_a_character_may_take_several_tokens():
    """What a tokenizer's decode gives for the first bytes of a character is not yet an error."""
    for name, arguments in (("spelled", '{"city": "'), ("spelled", '{"'), ("f", '{"a": "')):
        begun = f'<tool_call>{{"name": "{name}", "arguments": ' + arguments
        assert call_state(begun + "\ufffd", ODD) == call_state(begun, ODD) == "inside"
    # but no character has more than four bytes
    assert call_state('<tool_call>{"name": "spelled", "arguments": {"city": "' + "\ufffd" * 4,
                      ODD) == call_state('<tool_call>{"name": "s\ufffd', ODD) == "invalid"
    assert call_state('<tool_call>{"name": "spelled", "arguments": {"city": "<5"}}</tool_call>', ODD) == "outside"  # not escaped
    assert call_state('<tool_call>{"name": "spelled", "arguments": {"x": 1}}</tool_call>',
                      ODD) == call_state('<tool_call>{"name": "spelled", "arguments": {"z": ["b"]}}</tool_call>', ODD) == "outside"
    assert execute(Call("x", {"o": {"k": 1}}),
                   [tool_from_schema({**ODD[-4].schema()["function"], "name": "x"}, str)]).error_type != "crashed"


def test_one_schema_asked_twice_of_one_place():
    """The key "a.b" is not the key "b" inside "a"; a schema that contains itself ends."""
    nested = {"type": "object", "properties": {"x": {"type": "object", "additionalProperties": {"$ref": "#/$defs/n"}}},
              "$defs": {"n": {"anyOf": [{"type": "integer"}, {"type": "object", "additionalProperties": {"$ref": "#/$defs/n"}}]}}}
    assert not tools._problems({"x": {"a": {"b": 1}}}, nested)
    assert tools._problems({"x": {"a": {"b": 1}, "a.b": "str"}}, nested)
    assert not tools._problems({"": {"": {}}}, {"type": "object", "additionalProperties": {"$ref": "#"}})
    own = {"type": "object",
           "properties": {"t": {"anyOf": [{"$ref": "#/properties/t"}, {"type": "object", "properties": {"a": {"type": "integer"}}}]}}}
    assert not tools._problems({"t": {"a": 1}}, own) and tools._problems({"t": {"a": "x"}}, own)


@pytest.mark.parametrize("kind, good, bad", [("STRING", "x", 1), ("str", "x", 1), ("int", 3, "x"), ("bool", True, "x"), ("list", [1], 1),
                                             ("Double", 1.5, "x")])
def test_types_as_people_write_them(kind, good, bad):
    made = tool_from_schema({"name": "f", "description": "d", "parameters": {"type": "object", "properties": {"a": {"type": kind}}}},
                            lambda a: "ok")
    assert execute(Call("f", {"a": good}), [made]).ok
    assert execute(Call("f", {"a": bad}), [made]).error_type == "wrong_type"
    assert call_state('<tool_call>{"name": "f", "arguments": {"a": ' + json.dumps(good) + "}}</tool_call>", [made]) == "outside"


def test_a_decorated_function_is_still_a_function():
    @tool
    def add(a: int, b: Annotated[int, "the second one"] = 2) -> int:
        """Add."""
        return a + b
    assert add(1) == 3 and add.signature("described") == "add(a: integer, b?: integer = 2 (the second one)) - Add."
    with pytest.raises(UserError, match="no plain function"):
        tool(add)

    @tool
    def sub(a: int, b: Optional[int], c: Optional[int]) -> int:
        return a - (b or 0) - (c or 0)
    assert (sub(5, 2), sub(5, 2, 1), sub(5, c=1), sub(a=5, b=1)) == (3, 2, 4, 4) and sub.parameters["required"] == ["a"]
    assert execute(Call("sub", {"a": 5, "c": 2}), [sub]).value == 3


def test_a_docstring_goes_on_at_the_margin_behind_its_parameters():
    @tool
    def convert(amount: float, currency: str = "EUR") -> float:
        """Convert dollars, e.g. of the U.S. treasury. Slowly.

        Args:
            amount: how many dollars,
                with cents

            currency: ISO code
        Returns: the amount in that currency
        """
    fields = convert.parameters["properties"]
    assert [fields[key]["description"] for key in fields] == ["how many dollars, with cents", "ISO code"]
    assert convert.signature().endswith(" - Convert dollars, e.g. of the U.S. treasury.")


def test_parameters_that_are_no_schema_are_refused():
    with pytest.raises(UserError, match='get_rate: its parameters must stand under "properties"'):
        tool_from_schema({"name": "get_rate", "parameters": {"currency": {"description": "ISO code", "type": "str"}}})
    assert tool_from_schema({"name": "now", "parameters": {}}).signature() == "now()"
    assert tool_from_schema({"name": "free", "parameters": {"patternProperties": {".*": {"type": "string"}}}}).name == "free"


def test_what_is_required_but_no_parameter_is_not_asked_for():
    made = tool_from_schema({"name": "convert", "parameters": {"type": "object", "required": ["amount", "currency"],
                                                               "properties": {"amount": {"type": "number"}}}}, lambda amount: amount)
    assert execute(Call("convert", {"amount": 5}), [made]).value == 5
    assert call_state('<tool_call>{"name": "convert", "arguments": {"amount": 5}}</tool_call>', [made]) == "outside"
    assert execute(Call("convert", {}), [made]).error_type == "missing_argument"


def test_nothing_near_is_not_called_the_nearest():
    assert "nearest" not in execute(Call("nope", {}), BUILTIN).message
    assert "nearest is 'weather'" in execute(Call("wether", {}), BUILTIN).message


def test_corpora_may_begin_with_a_mark(tmp_path, monkeypatch):
    for name, variable, text in (("c.json", "TOOLPLAY_CITIES", '{"cities": [{"name": "Oslo"}]}'),
                                 ("s.jsonl", "TOOLPLAY_SEARCH", '{"title": "Oslo", "text": "A city."}')):
        (tmp_path / name).write_text(text, encoding="utf-8-sig")
        monkeypatch.setenv(variable, str(tmp_path / name))
    assert weather("Oslo")["city"] == "Oslo" and search("Oslo")[0]["title"] == "Oslo"


def test_a_reworded_tool_keeps_the_schema_of_its_own_function():
    """A line of a data file may offer a user's tool in other words, but its function gets only what it was made for."""
    @tool
    def pay(amount: int, currency: Literal["EUR", "USD"] = "EUR") -> str:
        return f"{amount} {currency}"
    known = {"pay": pay}
    weaker = {"name": "pay", "description": "Send money.", "parameters": {"type": "object", "properties": {"amount": {}, "currency": {
        "type": "string", "enum": ["EUR"]}}}}
    offered = load_tools([weaker], known)
    assert execute(Call("pay", {"amount": 5, "currency": "EUR"}), offered).value == "5 EUR"
    assert execute(Call("pay", {"amount": "5; rm -rf"}), offered).error_type == "wrong_type"
    assert execute(Call("pay", {}), offered).error_type == "missing_argument"
    assert execute(Call("pay", {"amount": 5, "currency": "USD"}), offered).error_type == "wrong_type"  # its own words hold, too
    twice = load_tools([{**weaker, "parameters": {"properties": {"amount": {"type": "string"}}}}], offered)
    assert execute(Call("pay", {"amount": "5"}), twice).error_type == "wrong_type"


def test_schemas_that_refer_to_each_other_are_read_in_time():
    pairs = {f"a{n}": {"allOf": [{"$ref": f"#/$defs/a{n + 1}"}, {"$ref": f"#/$defs/a{n + 1}"}]} for n in range(60)}
    pairs["a60"] = {"properties": {"x": {"type": "integer"}}, "required": ["x"]}
    made = Tool("f", "", {"$defs": pairs, "allOf": [{"$ref": "#/$defs/a0"}]}, lambda x: x, False)
    assert execute(Call("f", {"x": 3}), [made]).value == 3 and execute(Call("f", {}), [made]).error_type == "missing_argument"
    wide = {f"b{n}": {"type": "object", "properties": {f"p{k}": {"$ref": f"#/$defs/b{n + 1}"} for k in range(12)}} for n in range(8)}
    with pytest.raises(UserError, match="more than 100000 characters"):
        Tool("f", "", {"$defs": {**wide, "b8": {"type": "integer"}}, "properties": {"p": {"$ref": "#/$defs/b0"}}})
    many = tools._problems([1] * 100_000, {"type": "array", "items": {"type": "string"}})
    assert len(many) == 10
    assert "\n" not in Tool("f", "", {"properties": {" " * 30_000: {}, "a\n\n b": {}}}).signature()


def test_text_for_a_terminal_neither_commands_it_nor_turns_around(capsys):
    assert tools.printable("a\x1b[2Jb\u202ec\u2066\td\ne") == "a\\x1b[2Jb\\u202ec\\u2066\td\ne"
    with pytest.raises(UserError, match="one word"):
        Tool("f\x1b[2J", "", {})
    with pytest.raises(SystemExit), tools.one_line_errors():
        raise UserError("no file a\x1b[31mb")
    assert capsys.readouterr().err == "error: no file a\\x1b[31mb\n"


class Unspeakable(Exception):
    def __str__(self):
        raise SystemExit(3)


def test_an_error_that_cannot_be_printed_is_a_crash():
    def broken():
        raise Unspeakable
    assert execute(Call("f", {}), [Tool("f", "", {}, broken, False)]).error_type == "crashed"
