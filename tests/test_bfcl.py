"""eval.py's BFCL verdicts against the official checker's, on right, nearly right and random calls."""
import copy
import itertools
import json
import random
import re
import sys
import types
from pathlib import Path

import pytest

import data
import eval as evaluation
import toolplay
from tools import UserError

SUITE = "bfcl:" + ",".join(evaluation.BFCL)


@pytest.fixture(scope="module")
def official():
    pytest.importorskip("bfcl_eval")
    mapping = type("Any", (dict,), {"__missing__": lambda self, key: types.SimpleNamespace(underscore_to_dot=False)})()
    # the real module imports every vendor's client
    sys.modules["bfcl_eval.constants.model_config"] = types.SimpleNamespace(MODEL_CONFIG_MAPPING=mapping)
    from bfcl_eval.constants.enums import Language
    from bfcl_eval.eval_checker.ast_eval.ast_checker import ast_checker

    def verdict(category, functions, calls, answers):
        return ast_checker(functions, [{name: arguments} for name, arguments in calls], answers, Language.PYTHON, category, "any")["valid"]
    return verdict


@pytest.fixture(scope="module")
def cases(official):
    return evaluation.bfcl_cases(SUITE)


def gold_value(choices, rng):
    choice = rng.choice([c for c in choices if c != ""] or choices or [""])
    if isinstance(choice, dict):
        return {k: rng.choice(v) for k, v in choice.items() if v and ("" not in v or rng.random() < 0.5 and any(x != "" for x in v))}
    if isinstance(choice, list):
        return [gold_value([x], rng) if isinstance(x, dict) else x for x in choice]
    return choice


def gold_calls(answers, rng):
    return [(name, {k: gold_value(v, rng) for k, v in accepted.items() if "" not in v or rng.random() < 0.5 and any(x != "" for x in v)})
            for answer in answers for name, accepted in answer.items()]


def other_value(value, rng):
    """A value that is near the given one: another case, type or order, or a part of it."""
    options = [None, True, "", 0, 1.5, [], {}, "x", [value], str(value), {"a": value}]
    if isinstance(value, str):
        options += [value.upper(), value.replace(" ", ""), value + ".", f"'{value}'", value[:-1], value.replace(",", ";"), value.split()]
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        options += [float(value), int(value) if value == value and abs(value) < 1e15 else 0, value + 1, -value, str(value), bool(value)]
    if isinstance(value, list):
        options += [value[::-1], value[:-1], value + value[:1], tuple(value), [str(x) for x in value], [other_value(x, rng) for x in value],
                    ", ".join(map(str, value))]
    if isinstance(value, dict):
        options += [dict(list(value.items())[1:]), {**value, "zz": 1}, {k: other_value(v, rng) for k, v in value.items()},
                    list(value.items())]
    return rng.choice(options)


def spoiled(calls, functions, rng):
    calls = copy.deepcopy(calls)
    how = rng.randrange(9)
    if not calls or how == 0:
        return calls + [(functions[0]["name"], {})]
    n = rng.randrange(len(calls))
    name, arguments = calls[n]
    if how == 1:
        del calls[n]
    elif how == 2:
        calls[n] = (rng.choice([f["name"] for f in functions] + [name + "x", name.replace(".", "_")]), arguments)
    elif how == 3 and arguments:
        del arguments[rng.choice(list(arguments))]
    elif how == 4:
        known = rng.choice(functions)["parameters"]["properties"]
        arguments[rng.choice([*known, "unknown"])] = rng.choice([1, "a", [], {}, None])
    elif how == 5:
        rng.shuffle(calls)
    elif how == 6:
        calls.append(copy.deepcopy(calls[n]))
    elif arguments:
        key = rng.choice(list(arguments))
        arguments[key] = other_value(arguments[key], rng)
    return calls


def test_verdicts_are_the_official_ones(official, cases):
    rng, counts, breakdowns = random.Random(0), {True: 0, False: 0}, 0
    for case in cases:
        if case["category"] == "irrelevance":
            continue
        for attempt in range(5):
            calls = gold_calls(case["answers"], rng)
            for _ in range(rng.choice([1, 1, 2]) if attempt else 0):
                calls = spoiled(calls, case["functions"], rng)
            ours = evaluation.bfcl_valid(case["category"], case["functions"], copy.deepcopy(calls), case["answers"])
            try:
                theirs = official(case["category"], case["functions"], copy.deepcopy(calls), case["answers"])
            except Exception:  # the official checker crashes on values that it cannot compare; our verdict is: wrong
                breakdowns += 1
                assert not ours
                continue
            assert ours == theirs, (case["id"], calls, case["answers"])
            counts[ours] += 1
    assert counts[True] > 2000 and counts[False] > 3500 and breakdowns < 400


def test_verdicts_on_calls_that_are_easily_confused(official):
    """5.0 equals 5 but makes a different call; a call that the official checker crashes on is wrong."""
    number = {"name": "f", "parameters": {"type": "dict", "properties": {"mu": {"type": "float"}, "n": {"type": "integer"}},
                                          "required": ["mu"]}}
    answers = [{"f": {"mu": [5.0], "n": [2, ""]}}, {"f": {"mu": [5.0, 5], "n": [2]}}]
    for values in itertools.permutations([5.0, 5]):
        calls = [("f", {"mu": value, "n": 2}) for value in values]
        assert evaluation.bfcl_valid("parallel", [number], calls, answers) == official("parallel", [number], calls, answers)
    # without "parallel" the checker reads the first call and the first answer
    for category in ("simple_python", "multiple", "live_multiple"):
        for calls in itertools.product([("f", {"mu": 5.0, "n": 2}), ("f", {"mu": 5, "n": 2}), ("f", {"mu": 4.0, "n": 2})], repeat=2):
            for given in (calls, calls[:1], ()):
                for gold in (answers, answers[:1]):
                    assert (evaluation.bfcl_valid(category, [number], list(given), gold)
                            == official(category, [number], list(given), gold))
        assert not evaluation.bfcl_valid(category, [number], [("f", {"mu": 5.0})], [])
    assert not evaluation.bfcl_valid("simple_python", [number], [("f", {"mu": 10 ** 400})], answers[:1])
    nested = {"name": "f", "parameters": {"type": "dict", "properties": {"d": {"type": "dict"}}, "required": []}}
    assert not evaluation.bfcl_valid("simple_python", [nested], [("f", {"d": {"a": "b"}})], [{"f": {"d": [{"a": {"b": [1]}}]}}])
    assert not evaluation.bfcl_valid("simple_python", [{"name": "f", "parameters": {"type": "dict", "properties": {}}}], [("f", {})],
                                     [{"f": {}}])


def filled(answer, functions):
    """The call that an answer describes: the first accepted value of each parameter that the function knows."""
    (name, accepted), = answer.items()
    known = next(f for f in functions if f["name"] == name)["parameters"]["properties"]
    first = lambda choices: next(c for c in choices if c != "")  # noqa: E731
    value = lambda x: {k: first(v) for k, v in x.items() if set(map(str, v)) != {""}} if isinstance(x, dict) else [value(y) for y in x] if isinstance(x, list) else x  # noqa: E731
    return name, {k: value(first(v)) for k, v in accepted.items() if k in known and any(c != "" for c in v)}


def test_invented_functions_have_no_name_of_bfcl(official):
    """We train on nothing from BFCL, and no accidental match of names may suggest that we do."""
    from bfcl_eval.constants.eval_config import PROMPT_PATH
    found = [json.loads(line) for path in Path(PROMPT_PATH).glob("BFCL_v4_*.json") if "format" not in path.name
             for line in path.read_text(encoding="utf-8").splitlines()]
    same = lambda name: re.sub("[^a-z0-9]", "", name.rpartition(".")[2].lower())  # noqa: E731
    taken = {same(function["name"]) for case in found if isinstance(case.get("function"), list) for function in case["function"]}
    assert len(taken) > 1000
    assert not [f["words"] for domain in data.corpus("apis.json")["domains"]
                for f in domain["functions"] if same("".join(f["words"])) in taken]


def test_gold_answers_are_right(cases):
    right = {}
    for case in cases:
        calls = [filled(answer, case["functions"]) for answer in case["answers"]]
        right.setdefault(case["category"], []).append(evaluation.bfcl_valid(case["category"], case["functions"], calls, case["answers"]))
    shares = {category: sum(r) / len(r) for category, r in right.items()}
    assert all(shares[c] == 1 for c in ("simple_python", "multiple", "parallel", "irrelevance")), shares
    assert shares["parallel_multiple"] > 0.98 and shares["live_simple"] > 0.98 and shares["live_multiple"] > 0.98, shares
    assert [len(right[c]) for c in ("simple_python", "multiple", "parallel", "irrelevance", "live_simple")] == [400, 200, 200, 240, 258]


def test_irrelevance_never_stands_alone():
    pytest.importorskip("bfcl_eval")
    for suite in ("bfcl:irrelevance", "bfcl:irrelevance,simple_python"):
        assert {c["category"] for c in evaluation.bfcl_cases(suite)} == {"irrelevance", "simple_python"}
        assert sorted(c["category"] for c in evaluation.bfcl_cases(suite, n=2)) == ["irrelevance"] * 2 + ["simple_python"] * 2


def tiny_suite(tmp_path):
    tool = {"name": "math.add", "description": "Add.",
            "parameters": {"type": "dict", "properties": {"a": {"type": "integer"}, "b": {"type": "float"}}, "required": ["a"]}}
    for category, question in (("simple_python", "Add 1 and 2"), ("irrelevance", "Sing")):
        (tmp_path / f"BFCL_v4_{category}.json").write_text(json.dumps({"id": f"{category}_0",
                                                                       "question": [[{"role": "user", "content": question}]],
                                                                       "function": [tool]}) + "\n")
    (tmp_path / "possible_answer").mkdir()
    (tmp_path / "possible_answer" / "BFCL_v4_simple_python.json").write_text(
        json.dumps({"id": "simple_python_0", "ground_truth": [{"math.add": {"a": [1], "b": [2.0, ""]}}]}) + "\n")
    return tmp_path


def test_a_model_is_judged(tmp_path, capsys):
    """End to end from a folder: official names and types reach the prompt as JSON schema; the result is printed and saved."""
    folder = tiny_suite(tmp_path)
    case = evaluation.bfcl_cases("bfcl:simple_python", folder)[0]
    assert "math.add(a: integer, b?: number) - Add." in data.turns(case["conversation"])[0][1]
    calls = [("math.add", {"a": 1, "b": 2})]
    assert evaluation.bfcl_valid("simple_python", case["functions"], calls, case["answers"])
    toolplay.main(["eval", "--model", "tiny", "--suite", "bfcl:irrelevance", "--bfcl", str(folder), "--out", str(tmp_path / "out.json")])
    out = capsys.readouterr().out
    assert "simple_python" in out and "irrelevance" in out
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["report"]["simple_python"]["n"] == 1 and len(result["records"]) == 2


def test_a_prompt_beyond_the_context_is_counted_and_wrong(tmp_path):
    folder = tiny_suite(tmp_path)
    path = folder / "BFCL_v4_irrelevance.json"
    short = path.read_text()
    long = json.dumps({**json.loads(short), "id": "irrelevance_1", "question": [[{"role": "user", "content": "long " * 1000}]]})
    path.write_text(short + long + "\n")
    toolplay.main(["eval", "--model", "tiny", "--suite", "bfcl:irrelevance", "--bfcl", str(folder), "--out", str(tmp_path / "out.json")])
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["report"]["irrelevance"]["too_long"] == 1 and result["report"]["irrelevance"]["n"] == 2
    assert [record["valid"] for record in result["records"] if record["id"] == "irrelevance_1"] == [False]


@pytest.mark.parametrize("suite, words", [("bfcl:simple", "must be bfcl:"), ("other", "must be bfcl:"),
                                          ("bfcl:multiple", "cannot be read")])
def test_mistakes(tmp_path, suite, words):
    with pytest.raises(UserError, match=words):
        evaluation.bfcl_cases(suite, tiny_suite(tmp_path))


@pytest.mark.parametrize("line", ['{"id": "a"}', '[1]', '{"id": "a", "question": [], "function": []}',
                                  '{"id": "a", "question": [[]], "function": [{"name": "f"}]}', "{", "[" * 200000])
def test_a_damaged_suite_is_one_line(tmp_path, line):
    folder = tiny_suite(tmp_path)
    (folder / "BFCL_v4_simple_python.json").write_text(line + "\n")
    with pytest.raises(UserError, match="BFCL_v4_simple_python.json: cannot be read"):
        evaluation.bfcl_cases("bfcl:simple_python", folder)


@pytest.mark.parametrize("gold", ["", '{"id": "other", "ground_truth": [{"f": {}}]}',
                                  *(json.dumps({"id": "simple_python_0", "ground_truth": truth})
                                    for truth in (None, [], [{}], ["abc"], [{"f": {}, "g": {}}], [{"f": None}]))])
def test_gold_that_is_missing_or_no_answer_is_one_line(tmp_path, gold):
    """Otherwise silence would count as right, or the judge would crash after minutes of sampling."""
    folder = tiny_suite(tmp_path)
    (folder / "possible_answer" / "BFCL_v4_simple_python.json").write_text(gold + "\n")
    with pytest.raises(UserError, match="BFCL_v4_simple_python.json: cannot be read"):
        evaluation.bfcl_cases("bfcl:simple_python", folder)


def test_a_suite_without_cases_is_no_suite_and_none_counts_twice(tmp_path, capsys):
    folder = tiny_suite(tmp_path)
    assert len(evaluation.bfcl_cases("bfcl:simple_python,simple_python", folder)) == 1
    (folder / "BFCL_v4_simple_python.json").write_text("\n")
    for options in (["--suite", "bfcl:simple_python", "--bfcl", str(folder)], ["--suite", ""], ["--suite", "bfcl:multiple", "--data", "x"],
                    ["--bfcl", str(folder)]):
        with pytest.raises(SystemExit) as exit_:
            toolplay.main(["eval", "--model", "tiny", *options])
        assert exit_.value.code == 2 and capsys.readouterr().err.startswith("error: ")
