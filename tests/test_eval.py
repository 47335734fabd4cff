"""eval.py: each metric on hand-made cases, hostile output, and policies that try to cheat."""
import argparse
import csv
import dataclasses
import functools
import json
import math
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import small

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import data
import eval as evaluation
import toolplay
from tools import BUILTIN, Call, Result, Tool, UserError, execute, format_call, load_tools, parse_calls, search, weather

CITIES = ["Paris", "London", "Madrid", "Rome", "Berlin"]
QUERY = "how do bees make honey"


@pytest.fixture(autouse=True)
def corpora(tmp_path, monkeypatch):
    (tmp_path / "cities.json").write_text(json.dumps({"cities": [{"name": name} for name in CITIES + ["Kraków"]]}), encoding="utf-8")
    page = {"title": "Honey bees", "text": "Bees make honey from the nectar of flowers, which they dry in the comb."}
    (tmp_path / "search.jsonl").write_text(json.dumps(page) + "\n", encoding="utf-8")
    monkeypatch.setenv("TOOLPLAY_CITIES", str(tmp_path / "cities.json"))
    monkeypatch.setenv("TOOLPLAY_SEARCH", str(tmp_path / "search.jsonl"))


def calc(expression):
    return Call("calculator", {"expression": expression})


def case(prompt, calls=None, answer=None, final=None, kind="test", **more):
    expected = {"answer": answer, "final": final}
    expected["calls"] = None if calls is None else [dataclasses.asdict(call) for call in calls]
    return evaluation.as_case({"prompt": prompt, "expected": expected, "kind": kind, **more})


def play(given, *turns, stop="end"):
    """The episode in which the model writes these turns. The calls are really executed, as in toolplay.rollout."""
    tools, calls, errors, results, final = load_tools(given.conversation["tools"]), [], [], [], ""
    for turn in turns:
        new, bad = parse_calls(turn)
        calls, errors = calls + new, errors + bad
        results += [execute(call, tools) for call in new] + [Result("", False, error_type="malformed_call") for _ in bad]
        final = "" if new or bad else turn
    return SimpleNamespace(turns=list(turns), calls=calls, errors=errors, results=results, final=final, stop=stop)


def verdicts(given, *turns, stop="end"):
    return evaluation.judge(given, play(given, *turns, stop=stop))["verdicts"]


SUM = case("what is 17 * 23?", [calc("17 * 23")], 391, "That makes 391.")
TALK = case("tell me a joke about cats", [], final="Why did the cat sit down? It was tired.")


def test_a_weather_tool_of_one_s_own_has_results_of_its_own():
    """Its results are judged like those of any tool: by their numbers and texts."""
    for more in ({"unit": None}, {"unit": ""}, {"unit": "C"}, {"unit": "celsius", "city": {"name": "Oslo"}}):
        mine = Tool("weather", "", {"type": "object", "properties": {"x": {"type": "string"}}},
                    lambda x, more=more: {"temperature": 12, "city": "Oslo", **more}, isolated=False)
        asked = SUM._replace(conversation={"messages": [{"role": "user", "content": "x?"}], "tools": [mine]},
                             calls=[Call("weather", {"x": "?"})], answer=None, reference=None)
        assert [verdicts(asked, format_call(Call("weather", {"x": "?"})), final)["response_quality"]
                for final in ("It is 12 there.", "It is 13 there.")] == [True, False]


def test_answers_as_people_write_them():
    assert evaluation.states("It is minus 3 degrees in Oslo.", -3, set())
    assert not evaluation.states("It is minus 3 degrees in Oslo.", 3, set())
    assert evaluation.states("A spider has eight legs.", 8, set())
    assert not evaluation.states("A spider has eighty legs.", 8, set())
    assert evaluation.states("That's one thousand two hundred and five.", 1205, set())
    assert evaluation.describes("Nice and sunny, 17 degrees!", {"city": "Paris", "unit": "celsius"}, "") is True
    assert evaluation.same_expression("0.15 * 100", "15 / 100 * 100")
    assert not evaluation.same_expression("17 * 23", "391 * 1")
    given = evaluation.as_case({"prompt": "17 * 23?", "answer": 391,
                                "expected": {"calls": [{"name": "calculator", "arguments": {"expression": "17 * 23"}}]}})
    assert given.answer == 391
    assert not verdicts(SUM, format_call(calc("17*23")), 'The answer is {"result": 391}')["response_quality"]


# each metric in turn

def test_a_right_episode_is_right_everywhere():
    got = verdicts(SUM, format_call(calc("17*23")), "It is 391.")
    assert got["execution"] == [True] and 0 < got["response_f1"] < 1
    assert all(got[name] is True for name in evaluation.METRICS if name not in ("execution", "response_f1"))
    got = verdicts(TALK, "A cat walked into a bar and asked for milk.")
    assert got["tool_accuracy"] and got["format"] and got["response_quality"] and got["overall"]
    assert got["argument_accuracy"] is None and got["execution"] == []


@pytest.mark.parametrize("turn, right", [
    (format_call(calc("17 * 23")), True), (format_call(Call("search", {"query": "17 * 23"})), False), ("It is 391.", False), ("", False),
    (format_call(calc("1")) * 2, False), (format_call(calc("17 * 23")) + "<tool_call>{", True)])
def test_tool_accuracy_when_due(turn, right):
    assert verdicts(SUM, turn)["tool_accuracy"] is right


@pytest.mark.parametrize("turn", [format_call(calc("1 + 1")), "<tool_call>{broken}</tool_call>", "<tool_call>", "ha </tool_call>",
                                  "hm <tool_call"])
def test_what_looks_like_a_call_is_calling_when_none_is_due(turn):
    got = verdicts(TALK, turn)
    assert got["tool_accuracy"] is False and got["format"] is False and got["overall"] is False


@pytest.mark.parametrize("turn", [
    "It is 391.", '<tool_call>{"name": "calculator", "arguments": {"expression": 5}}</tool_call>', "<tool_call>oops</tool_call>",
    format_call(Call("calculator", {"expr": "17 * 23"})), format_call(Call("nothing", {})), format_call(Call("calculator", {})),
    format_call(calc("17 * 23")) + "<tool_call>{", format_call(calc("17 * 23")) + '<tool_response>{"result": 391}</tool_response>',
    format_call(calc("17 * 23")) + "<|im_start|>"])
def test_format_when_due(turn):
    assert verdicts(SUM, turn)["format"] is False


@pytest.mark.parametrize("turn, stop", [("", "end"), (" \n", "end"), ("hi <tool_response>", "end"), ("hi <|im_start|>user", "end")])
def test_format_when_none_is_due(turn, stop):
    assert verdicts(TALK, turn, stop=stop)["format"] is False
    cut = verdicts(TALK, "fine", stop="length")  # unfinished talk has the right format, but is not a good answer
    assert cut["format"] is True and cut["response_quality"] is False


@pytest.mark.parametrize("tool, key, gold, got, same", [
    ("calculator", "expression", "17 * 23", "23*17", True), ("calculator", "expression", "17 * 23", "391", False),
    ("calculator", "expression", "17 * 23", " (391.0) = ", False), ("calculator", "expression", "17 * 23", "-(-391)", False),
    *[("calculator", "expression", "17 * 23", x, False) for x in ("39100%", "0 - -391", "0--391")],
    ("calculator", "expression", "5 - 8", "0 - 3", False), ("calculator", "expression", "5 - 8", "-(8 - 5)", True),
    ("calculator", "expression", "5", "5.0", True), ("calculator", "expression", "15 / 100 * 80", "15% of 80", True),
    ("calculator", "expression", "17 * 23", "17 * 24", False), ("calculator", "expression", "1 / 3", "0.5 - 0.1666666666667", True),
    ("calculator", "expression", "5 / 0", "7 / 0", True), ("calculator", "expression", "5 / 0", "5 + ", False),
    ("calculator", "expression", "5 / 0", "5 + 0", False), ("calculator", "expression", "9 ** 900", "9 ** 900", True),
    ("calculator", "expression", "9 ** 900", "0.5 + 1", False), ("calculator", "expression", "1 + 1", "9**9**9**9", False),
    ("weather", "city", "Kraków", "krakow", True), ("weather", "city", "Paris, France", "paris", True),
    ("weather", "city", "Paris", "London", False), ("weather", "city", ", x", ", y", False),
    ("weather", "unit", "celsius", "fahrenheit", False),
    ("search", "query", "How do bees make honey?", "bees make honey", True), ("search", "query", QUERY, "how do ants make honey", False),
    ("search", "query", QUERY, "honey", False), ("search", "query", "who are you", "what is it", False),
    ("other", "n", 5, 5.0, True), ("other", "n", 1, True, False), ("other", "n", "5", 5, False), ("other", "op", "+", "-", False)])
def test_same_argument(tool, key, gold, got, same):
    assert evaluation.same_argument(tool, key, gold, got) is same


def test_optional_arguments():
    gold, stated = Call("weather", {"city": "Paris"}), Call("weather", {"city": "Paris", "unit": "celsius"})
    assert evaluation.same_call(gold, stated) and evaluation.same_call(stated, gold)
    assert not evaluation.same_call(gold, Call("weather", {"city": "Paris", "unit": "fahrenheit"}))
    assert not evaluation.same_call(gold, Call("weather", {}))
    assert not evaluation.same_call(gold, Call("weather", {"city": "Paris", "day": "x"}))
    assert not evaluation.same_call(gold, Call("weather", {"city": ["Paris"]}))


def test_to_state_a_default_of_the_schema_is_to_leave_it_out():
    tools = load_tools([{"name": "book", "description": "", "parameters": {"type": "object", "properties": {
        "who": {"type": "string"}, "seats": {"type": "integer", "default": 1}, "quiet": {"type": "boolean", "default": True}}}}])
    gold = Call("book", {"who": "Ada"})
    assert evaluation.same_call(gold, Call("book", {"who": "Ada", "seats": 1, "quiet": True}), tools)
    assert evaluation.same_call(Call("book", {"who": "Ada", "seats": 1}), gold, tools)
    for other in ({"seats": 2}, {"quiet": 1}, {"seats": True}, {"table": 1}):
        assert not evaluation.same_call(gold, Call("book", {"who": "Ada", **other}), tools)
    assert not evaluation.same_call(gold, Call("book", {"who": "Ada", "seats": 1}))


def test_calls_are_paired_in_any_order():
    a, b = Call("weather", {"city": "Paris"}), Call("weather", {"city": "Rome"})
    assert evaluation.same_calls([a, b], [b, a]) and evaluation.same_calls([a, a], [a, a])
    for wrong in ([a], [a, a], [a, b, b], []):
        assert not evaluation.same_calls([a, b], wrong)
    wide, narrow, other = (Call("weather", {"city": city}) for city in ("Paris", "Paris, Texas", "Paris, France"))
    for got in ([narrow, other], [other, narrow]):  # "Paris" matches either call, "Paris, Texas" only itself
        assert evaluation.same_calls([wide, narrow], got) and evaluation.same_calls([narrow, wide], got)
    two = case("weather in Paris and Rome?", [a, b])
    assert verdicts(two, format_call(b) + "\n" + format_call(a))["argument_accuracy"] is True
    assert verdicts(two, format_call(a) + "\n" + format_call(a))["argument_accuracy"] is False


def test_only_the_first_turn_counts_for_tools_and_arguments():
    got = verdicts(SUM, format_call(calc("1 + 1")), format_call(calc("17 * 23")), "It is 391.")
    assert got["tool_accuracy"] and not got["argument_accuracy"] and got["response_quality"] and not got["overall"]


def test_execution():
    assert verdicts(SUM, format_call(calc("1 / 0")) + format_call(calc("2 + 2")) + "<tool_call>x</tool_call>")["execution"] == [
        False, True, False]
    lost = case("weather in Atlantis?", [Call("weather", {"city": "Atlantis"})])
    assert verdicts(lost, format_call(Call("weather", {"city": "atlantis"})))["execution"] == [True]
    assert verdicts(lost, format_call(Call("weather", {"town": "atlantis"})))["execution"] == [False]
    schema = {"name": "send", "description": "", "parameters": {"type": "object", "properties": {"to": {"type": "string"}}}}
    for final in (None, "It is sent, as number 311."):  # nothing was run, so there is no result that an answer could state
        shown = case("send it", [Call("send", {"to": "Bo"})], final=final, tools=[schema])
        for text in ("Sent.", "I cannot send it."):
            got = verdicts(shown, format_call(Call("send", {"to": "bo"})), text)
            assert got["execution"] == [] and got["response_quality"] is None and got["overall"] is True
        assert verdicts(shown, format_call(Call("send", {"to": "Al"})), "Sent.")["overall"] is False


@pytest.mark.parametrize("answer, text, right", [
    (391, "17 * 23 is 391.", True), (391, "391", True), (391, "It is 392.", False), (391, "It is 3910", False), (391, "none", False),
    (391, "$391.00 in all", True), (1234, "It costs $1,234.", True), (1234, "1,234,000", False), (-5, "It is -5 degrees", True),
    (-5, "It is −5°C", True),
    (5, "It is -5", False), (12.5, "12.50 dollars", True), (20 / 3, "about 6.67", True), (20 / 3, "6.7", True), (20 / 3, "6", False),
    (0.4, "0", False), (1000, "1003", False), (4321.942375, "4,321.94", True), (25, "25kg", True), (3, "x3", False), (7, "2-7", True),
    (391, "1 2 3 4 391", False), (391, "5, 6 or 391", True), (10 ** 20, "1e20", True), (5, "9" * 400, False)])
def test_numeric_answers(answer, text, right):
    assert evaluation.states(text, answer, set()) is right


@pytest.mark.parametrize("text, answer, right", [("That makes minus 3.", -3, True), ("You get negative 3.", -3, True),
                                                 ("Minus three.", -3, True), ("10 minus 3", -3, False), ("ten minus 3", -3, False),
                                                 ("ten minus three", -3, False), ("It is 210, not 7560.", 210, True),
                                                 ("The total is 12, which is not 10.", 12, True), ("It is not 12.", 12, False),
                                                 ("12 is wrong.", 12, False), ("Six. Seven. Eight. Nine.", 8, False),
                                                 ("Eight, one more than seven.", 8, True),
                                                 ("The answer is not 6.67.", 20 / 3, False), ("It is not 0.33.", 1 / 3, False),
                                                 ("There are zero eggs left.", 0, True), ("Zero.", 0, True),
                                                 ("10 apples minus 3 is 7.", -3, False),
                                                 ("First, take seven. That gives 6.", 6, True),
                                                 ("It is minus five degrees and twelve are out.", 12, True),
                                                 ("A spider does not have eight legs.", 8, False),
                                                 ("It isn't eighty, it is eight.", 8, True), ("She doesn't have 42 stickers.", 42, False),
                                                 ("You have minus 3 dollars left.", -3, True), ("The balance is **minus 3**.", -3, True),
                                                 ("It leaves minus three.", -3, True), ("one thousand, two hundred and five", 1205, True),
                                                 ("That makes a hundred.", 100, True)])
def test_below_zero_contrasts_and_guesses_in_words(text, answer, right):
    assert evaluation.states(text, answer, set()) is right


def test_numbers_of_the_prompt_in_words_are_no_guesses():
    case = evaluation.as_case({"prompt": "Tom has three apples, four pears, five plums and six figs. How many is that?", "answer": 18,
                               "expected": {"calls": [{"name": "calculator", "arguments": {"expression": "3 + 4 + 5 + 6"}}]}})
    turns = [format_call(case.calls[0]), "Three apples, four pears, five plums and six figs make 18 fruits."]
    episode = SimpleNamespace(turns=turns, calls=case.calls, results=[execute(c, BUILTIN) for c in case.calls], final=turns[1], stop="end")
    assert evaluation.judge(case, episode)["verdicts"]["response_quality"]
    assert evaluation.states("50 dollars minus 12 dollars minus 8 dollars minus 5 dollars leaves 25.", 25, {50, 12, 8, 5})


def test_short_replies_are_replies():
    for text in ("I'm fine!", "Don't worry!", "That’s wonderful!", "You're amazing!", "Can't complain!", "Congratulations!",
                 "Sweet dreams!"):
        assert evaluation.worded(text, "Hello there, how are you doing today?"), text
    assert not any(evaluation.worded(text, "Hello there") for text in ("asdf qwer", "t", "m.", "re", "ll ve", "qzx wvk t jjq"))


@pytest.mark.parametrize("kind, prompt, text, right", [
    ("no_tool", "heads or tails?", "I searched for heads or tails but found nothing.", False),
    ("trap", "Write a caption for my photo of a rainy street", "It is currently clear in Granada.", False),
    ("", "Tell me a joke", "There is nothing about a joke in the search.", False),
    ("missing_tool", "What is 21 % of 393?", "Sorry, I don't have a way to calculate that.", True)])
def test_what_follows_a_needless_call_is_no_reply(kind, prompt, text, right):
    asked = case(prompt, [], kind=kind)
    assert verdicts(asked, text)["response_quality"] is True
    for needless in (Call("search", {"query": "heads or tails"}), Call("nothing", {})):
        assert verdicts(asked, format_call(needless), text)["response_quality"] is right


@pytest.mark.parametrize("text, right", [
    ("I don't think it's 42.", False), ("It cannot be 42.", False), ("I doubt it is 42.", False), ("It isn't equal to 42.", False),
    ("It's not going to be 42.", False), ("The answer is not, in fact, 42.", False), ("The result isn't forty-two.", False),
    ("That is wrong: 42.", False), ("42, which is wrong.", False), ("42? No, 43.", False),
    ("I'm not sure, but it's 42.", True), ("Don't worry, it is 42.", True), ("It is not 41, it is 42.", True), ("No doubt: 42.", True),
    ("That can't be right at first sight, but it is 42.", True), ("Is it 42? Yes.", True)])
def test_more_denials(text, right):
    assert evaluation.states(text, 42, {6, 7, 41}) is right


@pytest.mark.parametrize("text, answer, right", [
    ("60 is 75% of 80.", 0.75, True), ("75 percent.", 0.75, True), ("It is 74 %.", 0.75, False), ("That is 1 500 000.", 1500000, True),
    ("33%", 1 / 3, True), ("33.3 percent", 1 / 3, True), ("34%", 1 / 3, False), ("30%", 1 / 3, False),
    ("Choose 1 500 or 2 500.", 1500, False), ("2 trillion", 2e12, True), ("It is 75.", 0.75, False)])
def test_percent_and_spaces_between_thousands(text, answer, right):
    assert evaluation.states(text, answer, {60, 80}) is right


def test_the_question_or_a_claim_is_no_answer_where_nothing_was_found():
    asked = case("How many hearts does an octopus have?", [Call("search", {"query": "how many qqq does a zzz have"})],
                 final='My search for "how many hearts does an octopus have" had no results.')
    lost = case("Frost in King's Landing?", [Call("weather", {"city": "King's Landing"})], final="The weather service doesn't know King's Landing.")
    for given, said in ((asked, "I found nothing about the hearts of an octopus."), (lost, "I don't know King's Landing.")):
        call = format_call(given.calls[0])
        assert verdicts(given, call, said)["response_quality"] is True
        assert verdicts(given, call, given.reference)["response_quality"] is True
        for wrong in (given.conversation["messages"][-1]["content"], "The weather service knows King's Landing.",
                      "An octopus does have hearts.", "How many hearts does an octopus have? Yes, of course."):
            assert verdicts(given, call, wrong)["response_quality"] is False, wrong


@pytest.mark.parametrize("text, calling", [
    ('{"function": "calculator", "parameters": {"expression": "2"}}', True), ('```\n{"tool": "calculator", "args": {}}\n```', True),
    ('calculator: {"expression": "2+2"}', True), ('<toolcall>{"x": 1}</toolcall>', True),
    ('<|python_tag|>calculator.call(expression="2")', True), ("Weather(2019) is a film.", False), ("The weather: {lovely}", True)])
def test_more_calls_in_other_spellings(text, calling):
    assert verdicts(TALK, text)["tool_accuracy"] is not calling


@pytest.mark.parametrize("text", ["Blue.", "Apples, bananas, cherries."])
def test_a_terse_reply_is_a_reply(text):
    assert verdicts(case("Tell me something", []), text)["response_quality"] is True


def test_response_to_weather_search_and_errors():
    there = weather("Paris")["temperature"]
    asked = case("weather in Paris?", [Call("weather", {"city": "Paris"})])
    assert verdicts(asked, f"In Paris it is {there}°C.")["response_quality"] is True
    assert verdicts(asked, f"In Paris it is {there + 1}°C.")["response_quality"] is False
    hit = search(QUERY)[0]["text"]
    for reference in (None, f"I found this: {hit}"):
        asked = case(QUERY, [Call("search", {"query": QUERY})], final=reference)
        assert verdicts(asked, f"Sure! {hit}")["response_quality"] is True
        assert verdicts(asked, "Sorry, I found nothing.")["response_quality"] is False
    asked = case("who is Zork", [Call("search", {"query": "Zork"})], final="No luck: nothing came up for Zork.")
    assert verdicts(asked, "Sorry, I could not find Zork.")["response_quality"] is True
    assert verdicts(asked, "Zork was king in 1544, sorry.")["response_quality"] is False
    for reference in (None, "I have no weather for Atlantis."):
        asked = case("weather in Atlantis?", [Call("weather", {"city": "Atlantis"})], final=reference)
        assert verdicts(asked, "I don't know Atlantis.")["response_quality"] is True
        assert verdicts(asked, "Sorry, Atlantis has 21 degrees.")["response_quality"] is False
        assert verdicts(asked, "Sunny!")["response_quality"] is False


@pytest.mark.parametrize("text, right", [
    ("Here is one: a cat walks into a bar.", True), ("", False), ("?!...", False), ("{} [] ## 42 == 1 a", False),
    ("so funny it is " * 4, False), ("Tell me a joke about cats!", False), ("You said: tell me a joke about cats", False)])
def test_response_when_none_is_due(text, right):
    assert verdicts(TALK, text)["response_quality"] is right


def test_a_missing_tool_must_be_owned_up_to():
    asked = case("17 * 23?", [], final="I have no calculator here.", kind="missing_tool", tools=[])
    assert verdicts(asked, "I can't work that out without a calculator.")["overall"] is True
    assert verdicts(asked, "It is 388.")["overall"] is False


def test_what_one_city_s_weather_is_may_be_told_where_another_is_unknown():
    asked = case("Weather in Paris and in Atlantis?", [Call("weather", {"city": "Paris"}), Call("weather", {"city": "Atlantis"})])
    calls = "".join(format_call(call) for call in asked.calls)
    told = execute(asked.calls[0], load_tools()).value
    assert verdicts(asked, calls, f"Paris: {told['temperature']}°C and {told['condition']}, but I couldn't find Atlantis.")["overall"] is True
    assert verdicts(asked, calls, f"Paris: {told['temperature']}°C; it is stormy in Atlantis, sorry.")["overall"] is False


def test_results_of_tools_of_ones_own():
    """The final text must state the returned value. If there is no value to compare with, there is no verdict. A built-in's name does not
    make a tool a built-in."""
    schema = {"type": "object", "properties": {"x": {"type": "string"}}}
    for name, value, right, wrong in (("find", "Ann", "The name is ann.", "Sorry, I cannot tell."),
                                      ("weather", "sunny", "It's sunny!", "It's wet."),
                                      ("weather", {"temp": 3}, "It is 3 now", "It is 33 now"),
                                      ("search", ["a", "b"], "It is a.", "No, none."),
                                      ("price", {"price": 40.0}, "It is 40 now.", "It is 4 now."),
                                      ("price", [1234567], "1,234,567 in all", "1,234 in all"),
                                      ("order", {"id": 98765432109876543}, "It is 98765432109876543.", "It is 9."),
                                      ("people", {"n": 2.1, "unit": "million"}, "2.1 million people", "2 people"),
                                      ("pair", {"a": [1, "two"]}, "two of them", "Sorry, nothing.")):
        mine = Tool(name, "", schema, lambda x, value=value: value, isolated=False)
        asked = SUM._replace(conversation={"messages": [{"role": "user", "content": "x?"}], "tools": [mine]},
                             calls=[Call(name, {"x": "?"})], answer=None, reference=None)
        turn = format_call(Call(name, {"x": "?"}))
        assert [verdicts(asked, turn, final)["response_quality"] for final in (right, wrong)] == [True, False], name
    empty = asked._replace(conversation={**asked.conversation, "tools": [Tool("pair", "", schema, lambda x: None, isolated=False)]})
    assert verdicts(empty, turn, "Done.")["response_quality"] is None


def test_the_same_call_in_another_spelling_is_made_twice():
    assert verdicts(SUM, format_call(calc("17 * 23")), format_call(calc("17*23")), "It is 391.")["overall"] is False
    both = case("17 * 23, and once more 17 * 23", [calc("17 * 23"), calc("17 * 23")], 391)
    assert verdicts(both, format_call(calc("17 * 23")) + format_call(calc("17*23")), "It is 391.")["overall"] is True  # asked for twice


def test_numbers_the_model_wrote_into_a_call_are_guesses_too():
    assert verdicts(SUM, format_call(calc("389+390+391+392+393")), "389, 390, 391, 392, 393")["response_quality"] is False
    assert verdicts(SUM, format_call(calc("17 * 23")), "__391__")["response_quality"] is True


def test_a_prompt_of_several_turns_is_asked_whole():
    said = [{"role": "user", "content": "What is 1 + 2?"}, {"role": "assistant", "content": "3"}, {"role": "user", "content": "plus 1?"}]
    gold = {"role": "assistant", "tool_calls": [{"name": "calculator", "arguments": {"expression": "3 + 1"}}]}
    for item, calls in (({"prompt": said, "answer": 4}, None), ({"messages": said, "answer": 4}, None),
                        ({"prompt": said, "completion": [gold]}, [Call("calculator", {"expression": "3 + 1"})])):
        made = evaluation.as_case({**item, "tools": ["calculator"]})
        assert [m["content"] for m in made.conversation["messages"]] == [m["content"] for m in said]
        assert made.calls == calls and made.answer == item.get("answer")


def test_null_is_left_out_as_execute_does_it():
    tools = load_tools(["weather"])
    assert evaluation.same_call(Call("weather", {"city": "Paris", "unit": None}), Call("weather", {"city": "Paris"}), tools)
    assert not evaluation.same_call(Call("weather", {"city": None}), Call("weather", {}), tools)


@pytest.mark.parametrize("prompt, reply, reference", [("Good morning!", "Good morning!", "Good morning!"),
                                                      ("Thank you!", "Thank you too!", None), ("What is 40 and 2?", "42", "42"),
                                                      ("你好", "您好,很高兴见到你", None)])
def test_short_and_foreign_replies(prompt, reply, reference):
    assert verdicts(case(prompt, [], final=reference), reply)["response_quality"] is True


def test_calls_that_a_gold_turn_has_written_into_its_text():
    """As in data sets whose assistant turns are plain text."""
    for text, said in ((format_call(calc("17 * 23")), ""), ("Let me see. " + format_call(calc("17 * 23")), "It is 391.")):
        turns = [{"role": "user", "content": "17 * 23?"}, {"role": "assistant", "content": text},
                 *([{"role": "tool", "content": "391"}, {"role": "assistant", "content": said}] if said else [])]
        given = evaluation.as_case({"messages": turns, "tools": ["calculator"]})
        assert given.calls == [calc("17 * 23")] and given.reference == (said or None)
        assert verdicts(given, format_call(calc("23 * 17")), "It is 391.")["overall"] is True
    with pytest.raises(UserError, match="names tool 'calculator', which is not offered"):
        evaluation.as_case({"messages": turns, "tools": ["search"]})


def test_words_beside_a_call_are_no_reference():
    turn = {"role": "assistant", "content": "Let me look that up.", "tool_calls": [{"name": "search", "arguments": {"query": QUERY}}]}
    asked = evaluation.as_case({"messages": [{"role": "user", "content": QUERY}, turn, {"role": "tool", "content": "..."}],
                                "tools": ["search"]})
    assert asked.reference is None and asked.calls == [Call("search", {"query": QUERY})]


def test_every_written_refusal_is_recognised():
    answers = data.corpus("answers.json")
    for text in answers["search_empty"] + [t for kind in ("unknown_city", "division_by_zero") for t in answers["error"][kind]] + \
            [t for kind in answers["missing"].values() for t in kind]:
        assert evaluation.declines(text, text, set(), ""), text
    missed = [t for kind in answers["missing"].values() for t in kind if not evaluation.DENIAL.search(t)]
    assert len(missed) <= 4, missed


def test_without_expectation_only_format_and_execution():
    free = evaluation.as_case({"prompt": "hello"})
    assert free.calls is None
    for turns, fine in ((["Hi!"], True), ([format_call(calc("1 + 1")), "2"], True), (["<tool_call>"], False), ([""], False)):
        got = verdicts(free, *turns)
        assert got["format"] is fine
        assert all(got[name] is None for name in evaluation.METRICS if name not in ("format", "execution"))
    report = evaluation.summarise([evaluation.judge(free, play(free, "Hi!"))])
    assert report["metrics"]["overall"] == {"value": None, "n": 0, "low": None, "high": None} and report["tools"] == {}


@pytest.mark.parametrize("text", ["<tool_call>" * 5000, "\ud800 half", "<tool_call>{\"name\": \"calculator\", \"arguments\": "
                                                                       "{\"expression\": \"9**9**9\"}}</tool_call>",
                                  "1," * 20000, "9" * 5000, "9" + " " * 20000, "9 degrees " * 5000, "a " * 5000, "<|im_end|>" * 100, "</tool_call>\x00", "(" * 1000])
def test_hostile_output_is_judged(text):
    for given in (SUM, TALK, case("weather in Atlantis?", [Call("weather", {"city": "Atlantis"})])):
        record = evaluation.judge(given, play(given, text))
        assert record["verdicts"]["overall"] is False or given is TALK
        json.dumps(record)


def test_what_is_expected_is_spelled_right():
    for expected in ({"tool_calls": []}, {"call": []}, {"calls": [], "other": 1}):
        with pytest.raises(UserError, match="unknown key"):
            evaluation.as_case({"prompt": "x", "expected": expected})


# policies

def games():
    made = []
    for n in range(12):
        made += [case(f"what is {n + 12} times {n + 31}", [calc(f"{n + 12} * {n + 31}")], (n + 12) * (n + 31),
                      f"That makes {(n + 12) * (n + 31)}."),
                 case(f"weather in {CITIES[n % 5]} please", [Call("weather", {"city": CITIES[n % 5]})]),
                 case(QUERY, [Call("search", {"query": QUERY})]),
                 case(f"tell me story number {n} about a dragon", [], final="Once upon a time there was a dragon.")]
    return made


def right_turns(given):
    if not given.calls:
        return ["Once there was a small green dragon who liked tea."]
    tools = load_tools(None)
    result = execute(given.calls[0], tools).value
    words = {"calculator": lambda: f"It is {result}.", "weather": lambda: f"It is {result['temperature']} degrees.",
             "search": lambda: result[0]["text"]}
    return ["\n".join(map(format_call, given.calls)), words[given.calls[0].name]()]


POLICIES = {
    "always calls": lambda c, n: [format_call(c.calls[0] if c.calls else calc("1 + 1")), right_turns(c)[-1]],
    "never calls": lambda c, n: [right_turns(c)[-1]],
    "garbage": lambda c, n: ["{{}} ]] 1 2 3 4 5 6 7 ## <tool_call>"],
    "words": lambda c, n: ["abc"],
    "echo": lambda c, n: [c.conversation["messages"][-1]["content"]],
    "every number": lambda c, n: [" ".join(map(str, range(2000)))],
    "calls twice": lambda c, n: [right_turns(c)[0] * 2, right_turns(c)[-1]] if c.calls
    else [format_call(calc("1 + 1")) * 2, right_turns(c)[-1]],
    "all tools": lambda c, n: ["".join(map(format_call, [calc("1 + 1"), Call("weather", {"city": "Paris"}),
                                                         Call("search", {"query": QUERY})]))],
    "silence": lambda c, n: [""],
    "the same call again": lambda c, n: [right_turns(c)[0], *right_turns(c)] if c.calls else [format_call(calc("1 + 1"))],
    "the result as it came": lambda c, n: [right_turns(c)[0], *([execute(c.calls[0], load_tools(None)).text()] if c.calls else [])]
    if c.calls else ["{}"],
}


def score(policy):
    return evaluation.summarise([evaluation.judge(c, play(c, *policy(c, n))) for n, c in enumerate(games())])


def test_cheats_score_below_an_honest_weak_policy():
    weak = score(lambda c, n: right_turns(c) if (n // 4) % 2 else ["I am not sure what you mean by that, sorry."])["metrics"]["overall"]
    assert 0.5 < weak["low"] < weak["value"] < weak["high"] < 0.9  # talk is always right, calls are right half of the time
    half = score(lambda c, n: right_turns(c) if (n // 4) % 2 else ["?"])["metrics"]["overall"]
    assert half["value"] == pytest.approx(0.5)
    for name, policy in POLICIES.items():
        assert score(policy)["metrics"]["overall"]["value"] <= 0.05, name
    assert score(lambda c, n: right_turns(c))["metrics"]["overall"]["value"] == 1


# statistics and tables

def test_intervals():
    got = evaluation.estimate([True] * 8 + [False] * 2)
    assert (got["value"], got["n"]) == (0.8, 10)
    assert got["low"] == pytest.approx(0.4901, abs=2e-4) and got["high"] == pytest.approx(0.9433, abs=2e-4)  # statsmodels, method="wilson"
    assert evaluation.estimate([True] * 5)["high"] == 1 and evaluation.estimate([False] * 5)["low"] == 0
    assert score(POLICIES["words"]) == score(POLICIES["words"])  # the bootstrap has a fixed seed
    alone = evaluation.summarise([evaluation.judge(TALK, play(TALK, "A joke about a cat in a hat."))])["metrics"]["overall"]
    assert alone["value"] == 1 and alone["low"] == pytest.approx(0.2065, abs=1e-3)


def test_a_scale_is_the_question_s_own():
    asked = case("A house cost 45 thousand dollars and costs three times as much now. How many thousand dollars does it cost?",
                 [calc("45 * 3")], 135)
    for text, right in (("It now costs 135 thousand dollars.", True), ("It costs 135.", True), ("It costs 13 thousand.", False)):
        assert verdicts(asked, format_call(calc("45 * 3")), text)["response_quality"] is right, text
    assert evaluation.numbers("5 thou\u017fand and 5 m\u0131llion") == {5.0: 0}


def test_report_and_tables():
    records = [evaluation.judge(c, play(c, *right_turns(c))) for c in games()] + [evaluation.judge(SUM, play(SUM, "no | idea", "x"))]
    report = evaluation.summarise(records)
    assert report["n"] == 49 and set(report["tools"]) == {"calculator", "weather", "search", "none"}
    assert set(report["kinds"]) == {"test"}
    assert report["tools"]["calculator"]["tool_accuracy"]["n"] == 13
    text = evaluation.format_report(report, "Title", records)
    assert "Title (49 cases)" in text and "17 * 23" in text and "no | idea" in text and "1 cases failed" in text
    assert "no | idea" not in evaluation.format_report(report, "Title", records, show_failures=0)
    # with many tools, the report shows those with most cases
    report["tools"] = {f"tool_{n:02}": report["tools"]["calculator" if n == 7 else "search"] for n in range(40)}
    text = evaluation.format_report(report, "Title")
    assert "| tool_07 |" in text and "| tool_30 |" not in text and "and 15 more tools" in text
    table = evaluation.compare_table({"before": report, "after": report}).splitlines()
    assert table[0] == "| metric | before | after |" and len(table) == 2 + len(evaluation.METRICS)
    assert {line.count("|") for line in table} == {4}
    json.dumps([report, records], allow_nan=False)


# cases and files

def test_training_form():
    turn = {"role": "assistant", "content": "", "tool_calls": [{"name": "calculator", "arguments": {"expression": "2 + 2"}}]}
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "2 + 2?"}, turn,
                {"role": "tool", "content": '{"result": 4}'},
                {"role": "assistant", "content": "It is 4."}, {"role": "user", "content": "Thanks"},
                {"role": "assistant", "content": "Bye."}]
    got = evaluation.as_case({"messages": messages, "tools": ["calculator"], "kind": "arithmetic", "answer": 4, "id": "a1"})
    assert got.conversation["messages"] == messages[:2]
    assert [tool.name for tool in got.conversation["tools"]] == ["calculator"]
    assert (got.calls, got.answer, got.reference, got.kind, got.id) == ([calc("2 + 2")], 4, "It is 4.", "arithmetic", "a1")
    got = evaluation.as_case({"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "Hello!"}]})
    assert (got.calls, got.reference, len(got.conversation["tools"])) == ([], "Hello!", 3)


def test_expectation_form():
    call = {"type": "function", "function": {"name": "calculator", "arguments": '{"expression": "2 + 2"}'}}
    history = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "Hello!"}, {"role": "user", "content": "2 + 2?"}]
    got = evaluation.as_case({"id": 7, "messages": history, "tools": None, "part": "arithmetic",
                              "expected": {"calls": [call], "answer": 4}})
    assert got.conversation["messages"] == history and got.calls == [calc("2 + 2")] and got.reference is None
    assert got.kind == "arithmetic"
    got = evaluation.as_case({"prompt": "2 + 2?", "tools": [], "expected": {"calls": [], "answer": None, "final": "Four."}})
    assert got.calls == [] and got.conversation["tools"] == [] and got.reference == "Four."
    # TRL's form
    assert evaluation.as_case({"prompt": [{"role": "user", "content": "2 + 2?"}],
                               "answer": 4}) == evaluation.as_case({"prompt": "2 + 2?", "answer": 4})
    got = evaluation.as_case({"prompt": "2 + 2?", "expected": {"answer": 4}})
    assert got.calls is None and got.answer == 4
    assert verdicts(got, "It is 4.")["response_quality"] is True and verdicts(got, "It is 4.")["overall"] is None


BAD = [5, [], {}, {"prompt": 5}, {"prompt": None}, {"messages": []}, {"messages": "x"},
       {"messages": [{"role": "user", "content": "a"}], "tools": "x"},
       {"prompt": "a", "tools": ["nothing"]}, {"prompt": "a", "tools": [5]}, {"prompt": "a", "expected": "x"},
       {"prompt": "a", "expected": []},
       {"prompt": "a", "expected": {"calls": "x"}}, {"prompt": "a", "expected": {"calls": [{"name": 5}]}},
       {"prompt": "a", "expected": {"calls": [3]}},
       {"prompt": "a", "expected": {"calls": [], "answer": "four"}}, {"prompt": "a", "answer": True},
       {"prompt": "a", "answer": float("nan")},
       {"prompt": "a", "expected": {"final": 5}},
       {"prompt": "a", "tools": [], "expected": {"calls": [{"name": "search", "arguments": {}}]}},
       {"messages": [{"role": "assistant", "content": "first"}]}, {"messages": [{"role": "system", "content": "only"}]}]


@pytest.mark.parametrize("item", BAD, ids=lambda item: json.dumps(item)[:60])
def test_a_bad_case_has_a_reason(item):
    with pytest.raises(UserError, match=r"\w+ \w+"):
        evaluation.as_case(item)


def test_bad_lines_are_reported_by_number(tmp_path, capsys):
    path = tmp_path / "cases.jsonl"
    path.write_text('{"prompt": "hi"}\nnot json\n{"prompt": "a", "expected": 1}\n{"prompt": "\\ud800"}\n{"prompt": "bye"}\n',
                    encoding="utf-8")
    assert len(data.read_jsonl(path, evaluation.as_case)) == 2
    assert [line.split(":")[0][-6:] for line in capsys.readouterr().err.splitlines()] == ["line 2", "line 3", "line 4"]


# with a model

@pytest.fixture(scope="module")
def tiny():
    return toolplay.load_model("tiny")


def test_evaluate_keeps_order_and_is_deterministic(tiny):
    items = [{"id": n, "prompt": p, "tools": t, "expected": {"calls": []}}
             for n, (p, t) in enumerate([("a", []), ("b", None), ("c", []), ("d", ["search"])])]
    report, records = evaluation.evaluate(*tiny, items, batch_size=3, max_new_tokens=4, bar="")
    assert [r["id"] for r in records] == [0, 1, 2, 3] and [r["prompt"] for r in records] == list("abcd")
    assert report["n"] == 4
    _, alone = evaluation.evaluate(*tiny, items[2:3], max_new_tokens=4, bar="")
    assert alone[0] == records[2] and alone[0]["turns"]


def test_talk_loss(tiny, monkeypatch):
    talk = [{"comment": ""}] + [{"prompt": "hi", "reply": reply, "kind": "k", "split": "test"} for reply in ("Hello you", "ok")]
    monkeypatch.setattr(data, "corpus", lambda name: talk)
    net, tokenizer = small.model("llama"), tiny[1]
    rows = [data.encode({"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": reply}]},
                        tokenizer) for reply in ("Hello you", "ok")]
    expected = -small.gather(rows, small.one_by_one(net, rows)).sum() / sum(sum(mask) for _, mask in rows)
    assert evaluation.talk_loss(net, tokenizer) == pytest.approx(float(expected.detach()), abs=1e-4)  # the loss of the replies alone
    with pytest.raises(UserError):
        evaluation.talk_loss(*tiny, split="dev")


def test_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(evaluation, "evaluate", functools.partial(evaluation.evaluate, max_new_tokens=3))
    path, out = tmp_path / "cases.jsonl", tmp_path / "out.json"
    path.write_text('{"prompt": "hi", "expected": {"calls": []}}\nbad\n{"prompt": "bye"}\n', encoding="utf-8")
    parser = argparse.ArgumentParser()
    evaluation.add_arguments(parser)
    evaluation.command(parser.parse_args(["--model", "tiny", "--data", str(path), "--out", str(out), "--failures", "1"]))
    said, written = capsys.readouterr(), json.loads(out.read_text(encoding="utf-8"))
    assert "tool_accuracy" in said.out and written["report"]["n"] == 2 and len(written["records"]) == 2
    for wrong in (["--n", "0"], ["--data", str(tmp_path / "none.jsonl")], ["--out", str(tmp_path / "none" / "x.json")]):
        with pytest.raises(SystemExit) as stopped:
            evaluation.main(["--model", "tiny", *wrong])
        assert stopped.value.code == 2
        assert len(capsys.readouterr().err.splitlines()) == 1


def test_what_is_not_the_same():
    same = evaluation.same_argument
    assert not same("search", "query", "how tall is mount everest in feet", "how tall is mount kilimanjaro in feet")
    assert not same("search", "query", "who won the world cup in 1998", "who won the world cup in 2002")
    assert same("search", "query", "collect rainwater Colorado legal", "is it legal to collect rainwater in Colorado")
    assert not same("sql", "query", "select * from t where id = 3", "select * from t where id = 4")
    assert not same("weather", "city", "Paris, France", "Paris, Texas")
    assert same("weather", "city", "São Paulo, Brazil", "sao paulo brazil")
    assert not same("f", "x", "C++", "C#") and not same("f", "x", "-5", "5") and same("f", "x", "New-York.", "new york")
    assert not evaluation.same_expression("17 * 23", "391 * 1") and not evaluation.same_expression("17 * 23", "391 + 0")
    assert evaluation.same_expression("64.50 * 0.18", "18 / 100 * 64.5")


@pytest.mark.parametrize("text", ["It is 390, 391, 392 or 393.", "It is not 391.", "391 is wrong"])
def test_hedged_and_denied_answers(text):
    assert not evaluation.states(text, 391, {17, 23})


@pytest.mark.parametrize("text, right", [("Paris: 17°C, cloudy.", True), ("17 degrees", True), ("In Rome it is 17°C.", False),
                                         ("It's 17°F in Paris.", False), ("17 degrees (63 °F) and cloudy", True),
                                         ("63 °F, that is 17 degrees", True), ("17 °F or 63 °C", False), ("17 ℉", False)])
def test_a_weather_report_keeps_unit_and_city(text, right):
    assert evaluation.describes(text, {"city": "Paris", "unit": "celsius", "temperature": 17}, "how is it in Paris") is right


def test_a_call_without_tags_is_still_a_call():
    for text in ('{"name": "calculator", "arguments": {"expression": "1+1"}}', "calculator(expression='2+2')", "weather(Paris)",
                 "[weather(Paris)]", "`search(honey bees)`", "calculator(-5)", "Sure.\ncalculator((17 * 23))", "calculator(sqrt(4))",
                 '{"name": "search", "input": {}}', '{"tool": "search", "query": "x"}', '{"action": "search", "action_input": "x"}',
                 '{"search": {"query": "x"}}'):
        assert verdicts(TALK, text)["tool_accuracy"] is False and verdicts(TALK, text)["format"] is False, text
    for text in ("A calculator (or your head) does that.", "I'd do search (Google) first.", "Weather (mostly bad) is what we talk about."):
        assert verdicts(TALK, text)["tool_accuracy"] is True, text


@pytest.mark.parametrize("text, answer, right", [
    ("391 isn't the answer", 391, False), ("391 wasn't right", 391, False), ("I don't think it is 391.", 391, False),
    ("It can't possibly be 391.", 391, False), ("It's neither 391 nor 392", 391, False),
    ("Anything but 391", 391, False), ("391 is not a lot", 391, True), ("It is 391, isn't it?", 391, True),
    ("Don't worry, it is 391", 391, True), ("If you do not tip, the bill is 391", 391, True),
    ("about 63", 62.5, True), ("about 62", 62.5, True), ("$0.13", 0.125, True), ("7.3", 7.25, True), ("7.4", 7.25, False),
    ("In Oslo it's –3°C.", 3, False), ("In Oslo it's –3°C.", -3, True),
    ("It's currently minus 3°C", 3, False), ("It's currently minus 3°C", -3, True), ("That works out as minus 12", -12, True),
    ("10 minus 3 is 7", 7, True), ("No one knows.", 1, False),
    ("One moment, please.", 1, False), ("There is only one left.", 1, True), ("12'345", 12345, True), ("1\u202f234", 1234, True),
    ("3.91E2", 391, True), ("3–5 degrees", 5, True), ("That's 2.4 million.", 2400000, True), ("That's 5 million.", 5, False),
    ("1,200 Thousand", 1200000, True), ("It takes two and a half hours.", 2.5, True), ("It takes two and a half hours.", 2, False),
    ("It is 1 degree below zero.", -1, True), ("It is 1 degree below zero.", 1, False), ("-3°C below zero", -3, True),
    ("It is twelve below zero.", -12, True), ("twelve degrees below zero", 12, False)])
def test_how_people_say_a_number_or_deny_it(text, answer, right):
    assert evaluation.states(text, answer, set()) is right


@pytest.mark.parametrize("gold, got, same", [
    ("17 * 23", "1x391", False), ("17 * 23", "39.1E1*1", False), ("17 * 23", "1/(1/391)", False), ("100 * 1.15", "115 * 1", False),
    ("100 * 2", "200 * 1", False), ("80 * 1.25", "80 * 125 / 100", True),
    ("80 * 1.25", "80 + 80 * 25 / 100", True), ("400 / 4", "400 * 25 / 100", True), ("0.5 * 120", "120 * 30 / 60", True),
    ("15% of 100", "100 * 0.15", True), ("200 * 0.5", "200 * 50 / 100", True)])
def test_a_guess_in_an_expression(gold, got, same):
    assert evaluation.same_expression(gold, got) is same


def test_a_negation_makes_another_question():
    assert not evaluation.same_argument("search", "query", "foods cats can eat", "foods cats can not eat")


@pytest.mark.parametrize("text, right", [
    ("There is no rain in Oslo today, it's sunny.", False), ("You need a coat in Oslo, it is not warm.", False),
    ("I have no doubt you will like it.", False), ("It's eighty-four, no doubt; there is no trick.", False),
    ("I lack the tool for that.", True), ("I can't.", True), ("That's not possible for me.", True), ("I have no way to do that.", True),
    ("I won't be able to check this.", True), ("It is impossible for me to check.", True), ("I have no ability to check this.", True),
    ("None of my tools can do that.", True), ("I'm afraid that's beyond me.", True), ("As an AI I have no real-time data.", True),
    ("Checking the weather is outside what I can do.", True), ("I can't wait, Oslo is lovely!", False), ("I do not have a weather tool.", True), ("My tools don't cover the weather.", True),
    ("Weather data is unavailable.", True), ("I haven't got a forecast.", True), ("I would need a weather service for that.", True)])
def test_a_refusal_is_no_guess(text, right):
    asked = case("weather in Oslo?", [], final="I have no weather tool here.", kind="missing_tool", tools=[])
    assert verdicts(asked, text)["response_quality"] is right


@pytest.mark.parametrize("text, right", [("Not bad at all: sunny!", False), ("No problem! It is sunny in Atlantis.", False),
                                         ("It's sunny with no clouds", False), ("No problem: it is twenty-one degrees in Atlantis.", False),
                                         ("Atlantis is missing from my list.", True), ("The city is invalid.", True),
                                         ("I can't find Atlantis.", True)])
def test_an_error_is_no_weather(text, right):
    call = Call("weather", {"city": "Atlantis"})
    assert verdicts(case("weather in Atlantis", [call], kind="tool_error"), format_call(call), text)["response_quality"] is right


def test_a_search_is_not_retold_with_other_numbers(tmp_path, monkeypatch):
    hit = "The Eiffel Tower in Paris was built from 1887 to 1889 and is 330 metres tall."
    (tmp_path / "pages.jsonl").write_text(json.dumps({"title": "Eiffel Tower", "text": hit}))
    monkeypatch.setenv("TOOLPLAY_SEARCH", str(tmp_path / "pages.jsonl"))
    call = Call("search", {"query": "Eiffel Tower"})
    asked = case("How tall is the Eiffel Tower?", [call], kind="search")
    assert verdicts(asked, format_call(call), hit)["overall"] is True
    assert verdicts(asked, format_call(call), re.sub(r"\d+", lambda m: str(int(m[0]) + 137), hit))["overall"] is False


@pytest.mark.parametrize("text", ['{"name": "weather", "parameters": {"city": "Paris"}}',
                                  '{"arguments": {"city": "Paris"}, "name": "weather"}',
                                  "{'name': 'weather', 'arguments': {'city': 'Paris'}}", 'weather(city: "Paris")',
                                  '<function=weather>{"city": "Paris"}</function>', 'Action: weather\nAction Input: {"city": "Paris"}',
                                  '<Tool_Call>{"city": "Paris"}', 'Weather(city="Paris")'])
def test_a_call_in_another_models_spelling_is_a_call(text):
    asked = case("What does the word weather mean?", [], final="The state of the air.")
    assert verdicts(asked, text)["tool_accuracy"] is False and verdicts(asked, text)["format"] is False


def test_missing_tool_needs_more_than_a_negative_word():
    for kind in data.corpus("answers.json")["missing"].values():
        assert all(evaluation.CANNOT.search(text) for text in kind)
    assert not evaluation.CANNOT.search("Nothing is easier! I like cats.")


def test_a_perfect_score_on_few_cases_is_not_certain():
    records = [{"due": due, "verdicts": {**dict.fromkeys(evaluation.METRICS), "execution": [], "overall": True}}
               for due in [True] * 5 + [False] * 5]
    assert evaluation.measure(records)["overall"]["low"] < 0.9 and evaluation.measure(records)["overall"]["high"] == 1
    for record in records:
        record["verdicts"].update(dict.fromkeys(set(evaluation.METRICS) - {"execution"}, True), overall=not record["due"])
    assert evaluation.measure(records)["overall"]["low"] == 0  # an interval contains its value
    silent = [{**r, "verdicts": {**r["verdicts"], "execution": []}} for r in records]
    loud = [{**r, "verdicts": {**r["verdicts"], "execution": [True]}} for r in records]
    assert evaluation.compare({"a": [silent, loud]}, 50)["a"]["execution"]["low"] == pytest.approx(0.7225, abs=1e-4)
    compared = evaluation.compare({"a": [records]}, 50)["a"]["tool_accuracy"]
    assert compared["value"] == 1 and compared["low"] == pytest.approx(0.7225, abs=1e-4)  # Wilson's interval for 10 of 10


def test_compare(tmp_path, capsys, monkeypatch):
    """Two seeds of one config against another run on the same cases: means, paired differences, one column per config."""
    def records(right):
        return [{"id": n, "kind": f"k{n % 2}", "prompt": f"p{n}", "due": n % 2 == 0,
                 "verdicts": {name: (None if name == "argument_accuracy" and n % 2 else [ok] if name == "execution" else ok)
                                                                           for name in evaluation.METRICS}} for n, ok in enumerate(right)]
    runs = {"sft": ([True, False] * 10, 0), "ppo-s1": ([True] * 15 + [False] * 5, 1), "ppo-s2": ([True] * 19 + [False], 2)}
    for name, (right, seed) in runs.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "eval.json").write_text(json.dumps({"records": records(right)}))
        (tmp_path / name / "config.json").write_text(json.dumps({"method": name[:3], "seed": seed, "run_dir": name}))
    argv = ["compare", *(str(tmp_path / name) for name in runs), "--csv", str(tmp_path / "out.csv")]
    toolplay.main(argv)
    out = capsys.readouterr().out
    assert "sft (1 seed)" in out and "ppo (2 seeds)" in out
    row = next(line for line in out.splitlines() if line.startswith("| tool_accuracy"))
    assert "0.500" in row and "0.850" in row and "(+0.350" in row
    lines = [line.split(",") for line in (tmp_path / "out.csv").read_text().splitlines()]
    assert len(lines) == 1 + 2 * len(evaluation.METRICS) and float(lines[1][3]) <= 0.5 <= float(lines[1][4])
    toolplay.main([*argv, "--kind", "k1"])  # the odd cases, which the first run gets all wrong
    out = capsys.readouterr().out
    assert "10 cases" in out
    assert "0.000" in next(line for line in out.splitlines() if line.startswith("| tool_accuracy"))
    toolplay.main(["compare", str(tmp_path / "ppo-s1"), str(shutil.copytree(tmp_path / "ppo-s1", tmp_path / "other-code"))])
    assert "ppo-s1 (1 seed)" in (out := capsys.readouterr().out) and "other-code (1 seed)" in out  # one seed twice is not a group
    with pytest.raises(SystemExit):
        toolplay.main(["compare", str(tmp_path / "sft"), str(tmp_path / "sft")])
    assert "named twice" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        toolplay.main([*argv, "--kind", "k7"])
    assert "no case of kind 'k7'" in capsys.readouterr().err
    for seed in (1, 2):  # each starts from the run of its own seed and has a comma in its name; the untrained model has no config
        (tmp_path / f"dpo,{seed}").mkdir()
        shutil.copy(tmp_path / f"ppo-s{seed}" / "eval.json", tmp_path / f"dpo,{seed}")
        (tmp_path / f"dpo,{seed}" / "config.json").write_text(json.dumps({"seed": seed, "start_from": str(tmp_path / f"ppo-s{seed}")}))
    (tmp_path / "base").mkdir()
    shutil.copy(tmp_path / "sft" / "eval.json", tmp_path / "base")
    toolplay.main(["compare", *(str(tmp_path / name) for name in ("base", "dpo,1", "dpo,2")), "--csv", str(tmp_path / "out.csv")])
    assert "base (1 seed)" in (out := capsys.readouterr().out) and "dpo, (2 seeds)" in out
    assert {len(row) for row in csv.reader((tmp_path / "out.csv").open())} == {10}
    same = evaluation.compare({"a": [records([True, False] * 10)], "b": [records([True, False] * 10)]}, 200)["b"]["tool_accuracy"]
    assert same["difference"] == same["d_low"] == same["d_high"] == 0  # paired: the same cases are drawn for both
    for seed in (1, 2):  # folders that are only numbers
        shutil.copytree(tmp_path / f"ppo-s{seed}", tmp_path / "grpo" / str(seed))
    toolplay.main(["compare", *(str(tmp_path / name) for name in ("base", "grpo/1", "grpo/2"))])
    assert "grpo (2 seeds)" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        toolplay.main(["compare", str(tmp_path / "base"), "--csv", str(tmp_path / "nowhere/x.csv")])
    caught = capsys.readouterr()
    assert "its folder does not exist" in caught.err and not caught.out
    for name, seed in (("rloo-1", 1), ("rloo-2", 2), ("rloo", 3)):  # the name of the group is that of another run
        (tmp_path / name).mkdir()
        shutil.copy(tmp_path / "sft" / "eval.json", tmp_path / name)
        (tmp_path / name / "config.json").write_text(json.dumps({"seed": seed, "lr": 1 if name == "rloo" else 2}))
    monkeypatch.chdir(tmp_path)
    toolplay.main(["compare", "rloo-1", "rloo-2", "rloo"])
    assert "rloo (2 seeds)" in (out := capsys.readouterr().out) and f"{tmp_path / 'rloo'} (1 seed)" in out
    changed = records([True, False] * 10)
    changed[3]["expected"] = [{"name": "weather", "arguments": {}}]
    for other in (records([True] * 3), changed):  # other gold calls also make other cases
        (tmp_path / "sft" / "eval.json").write_text(json.dumps({"records": other}))
        with pytest.raises(SystemExit):
            toolplay.main(argv)
        assert "other cases" in capsys.readouterr().err


HOTEL = {"name": "hotel", "description": "Prices.", "parameters": {"type": "object", "properties": {"city": {"type": "string"}},
                                                                   "required": ["city"]}}


@pytest.mark.parametrize("final, right", [("A hotel there costs 40 a night.", True), ("It's 40.", True), ("Yes, it's 40.", True),
                                          ("How much is a hotel in Oslo?", False), ("Oslo", False),
                                          ("A hotel in Oslo is 999 a night.", False), ("It is full, and 40 or 999.", False)])
def test_a_tool_of_ones_own_must_have_said_it(final, right):
    case = evaluation.Case({"messages": [{"role": "user", "content": "How much is a hotel in Oslo?"}], "tools": []},
                           [Call("hotel", {"city": "Oslo"})], None, "A hotel there costs 40 a night.", "test", 0)
    episode = SimpleNamespace(final=final, stop="end", results=[])
    assert evaluation.response(case, episode, [Result("hotel", True, {"city": "Oslo", "price": 40, "state": "full"})]) is right


def test_an_invented_success_is_wrong_where_nothing_fits_or_something_is_missing():
    for kind in ("api_none", "api_ask", "missing_tool"):
        for one in data.generate("test", 40, 5, {kind: 1}):
            given = evaluation.as_case(one)
            assert verdicts(given, given.reference)["overall"], given.reference
            assert not verdicts(given, "I have done that for you, it is all booked.")["response_quality"]
            assert not verdicts(given, one["messages"][0]["content"])["response_quality"]


@pytest.mark.parametrize("reference, final, right", [("Paris", "I like cats.", False), ("Paris", "It is Paris, of course.", True),
                                                     ("4", "It is 5.", False), ("4", "2 + 2 = 4.", True), ("4", "It is four.", True),
                                                     ("It is 4.", "Four.", True), ("\U0001F44D", "\U0001F44D", True),
                                                     ("You're welcome!", "No problem at all.", True),
                                                     ("No.", "Yes, it is.", False), ("No.", "No, it is not.", True),
                                                     ("Yes!", "No, it is not.", False), ("Yes.", "It is, indeed.", True),
                                                     ("Yes.", "Yes, no doubt about it.", True),
                                                     ("Not available.", "No, it is not available now.", True),
                                                     ("Paris", "It isn't Paris, it is Lyon.", False),
                                                     ("Paris", "It’s Paris, not Lyon.", True),
                                                     ("It is Paris", "It is not Paris", False), ("It is 4", "It is not 4", False),
                                                     *[("Sure!", text, False) for text in ("", "zzq zzq", "and the capital of France?")]])
def test_a_short_reference_is_a_fact(reference, final, right):
    assert verdicts(case("and the capital of France?", [], final=reference), final)["response_quality"] is right


def test_percents_of_a_round_number_are_no_guess():
    for gold, got in (("25% of 400", "400 * 25 / 100"), ("0.25 * 400", "25 / 100 * 400"), ("20% of 400", "400 * 20 / 100")):
        assert evaluation.same_expression(gold, got)
    assert not evaluation.same_expression("10 * 10", "100 * 1")


def test_more_calls_than_the_gold_makes_cost_the_whole():
    given = evaluation.as_case({"messages": [{"role": "user", "content": "17 * 23?"},
                                             {"role": "assistant", "content": "",
                                              "tool_calls": [{"name": "calculator", "arguments": {"expression": "17 * 23"}}]},
                                             {"role": "tool", "content": '{"result": 391}'}, {"role": "assistant", "content": "391."}]})
    right, needless = format_call(calc("17 * 23")), format_call(calc("23 * 18"))
    assert verdicts(given, right, "391.")["overall"] and not verdicts(given, right, needless, "391.")["overall"]
    assert verdicts(given, right, "<tool_call>{</tool_call>", "391.")["overall"]  # a call without a result counts in execution only
    assert verdicts(SUM, right, needless, "391.")["overall"]  # it is unknown how many calls the gold makes


def test_an_echo_said_twice_is_an_echo():
    for prompt in ("Tell me a joke please now", "hi"):
        assert not evaluation.converses(f"{prompt} {prompt}", prompt)
    assert evaluation.converses("hi there", "hi")


def test_true_is_no_one_inside_lists_either():
    for gold, got in (([1], [True]), ({"a": 1}, {"a": True}), (1, True)):
        assert not evaluation.same_argument("f", "x", gold, got)
    assert evaluation.same_argument("f", "x", [1, {"a": 2}], [1.0, {"a": 2}])


def test_a_breakdown_of_the_official_checker_spoils_the_whole_case():
    function = {"name": "f", "parameters": {"type": "dict", "properties": {"d": {"type": "dict"}}, "required": ["d"]}}
    answers = [{"f": {"d": [{"k": [1]}, {"k": {"z": [2]}}]}}, {"f": {"d": [{"k": [5]}]}}]
    assert not evaluation.bfcl_valid("parallel", [function], [("f", {"d": {"k": 5}}), ("f", {"d": {"k": 1}})], answers)


@pytest.mark.parametrize("split", ["train", "test"])
def test_the_gold_of_every_kind_is_judged_right(split, monkeypatch):
    """Read by a parser and executed again, as if a model had written it."""
    monkeypatch.delenv("TOOLPLAY_CITIES"), monkeypatch.delenv("TOOLPLAY_SEARCH")
    for kind in [kind for kind in data.KINDS if kind != "canonical" or split == "train"]:
        for conversation in data.generate(split, 12, 3, {kind: 1}):
            given = evaluation.as_case(conversation)
            turns = [m["content"] + "".join(format_call(Call(c["name"], c["arguments"])) for c in m.get("tool_calls") or [])
                     for m in conversation["messages"][len(given.conversation["messages"]):] if m["role"] == "assistant"]
            wrong = [name for name, verdict in verdicts(given, *turns).items() if verdict is False]
            assert not wrong, (kind, conversation["prompt"], turns)
