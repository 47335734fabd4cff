"""
eval.py - how well does a model use its tools?

The idea. The model answers each case greedily, its calls are executed, and the episode is compared with the gold
episode. A case is a conversation in training form (the prompt is everything before the first assistant message, the
gold is what follows), or an object {"prompt" or "messages", "tools"?, "expected"?: {"calls"?, "answer"?, "final"?}}. A
call is "due" if the gold has a call. Without any expectation, only format and execution are measured. Gold calls are
executed too: their results are the facts to look for. The first four metrics look only at the first assistant turn. A
case to which a metric does not apply is not counted in this metric.

  tool_accuracy      The names of the well-formed calls, as a multiset, equal the gold's names. None due: nothing looks
                     like a call; malformed call syntax, or a call without its tags, counts as a call.
  format             Due: at least one call, every call parses and fits its tool's JSON schema, no forged result or chat
                     tag. None due: a non-empty turn in which nothing looks like a call (as in tool_accuracy), without
                     tags of tool results or of the chat template (those of the form <|...|>).
  argument_accuracy  (due only) The tools are right, and the calls can be paired with the gold calls, in any order, so
                     that every argument is right. Expression: equal value (relative 1e-6), or the same error; and an
                     operation if the gold has one: a literal, or an expression that contains the result itself, is no
                     calculation. Other text: equal except for case, accents, punctuation and spaces. City: a region
                     after a comma may be missing. Query of search: F1 of the content words >= 0.75, words only left out
                     or only added, equal numbers. Anything else: equal. Missing or extra arguments are wrong, except
                     arguments that state a default (the schema's; celsius for weather).
  call_accuracy      argument_accuracy if a call is due, tool_accuracy if none is due: the calls are exactly right.
  execution          Share of the calls in all turns that have an ok result. A malformed call is a failure. A tool's own
                     error (an unknown city) is right if a gold call has a tool error too. Calls of a tool without
                     a function are not counted. Calls of one episode are counted as if independent.
  response_quality   The final text is right.
                     If a numeric answer is known: the text states it, not as a denial, with at most two other numbers
                     that nobody mentioned. A whole-number answer must be exact; any other answer must be within
                     0.5 %, or within 5 % if it is rounded to the digits shown. 75 % is 0.75.
                     Else, due: the text has the key fact of every gold result. Number: the number. Weather: the
                     temperature (and no other unit or city). Search: F1 >= 0.5 with the reference (or with a hit if
                     there is no reference) and no made-up number, or words for "not found" if the search found
                     nothing. Custom tool: a value of its result that the user did not say, or F1 >= 0.5 with the
                     reference; and no other numbers if the result has numbers. Error: words that it cannot be done (if
                     the reference has no such words: F1 >= 0.5 with it), and no made-up number or weather. A raw result
                     (JSON) is no answer. If a gold call's tool has no function: not measured.
                     None due: the text ends by itself, is mostly letters, has a word of small talk, of the prompt or of
                     the reference, repeats no 4-gram four times, does not echo the prompt, and follows no call ("I
                     searched for heads or tails but found nothing" is no reply). For kinds missing_tool and api_none
                     the text, even after a call, must say what cannot be done or is missing, without a made-up number
                     or weather; for api_ask the text must ask. If data.KINDS lacks the case's kind, a reference of one
                     to three words is a fact that the text must contain and not deny. A text that is nearly the
                     reference (F1 >= 0.8, and both deny something or neither does) is right at once.
  response_f1        Mean token F1 (as in SQuAD, Rajpurkar et al. 2016) of the final text and the reference.
  overall            sqrt(success if a call is due * success if none is due). Success: tool, format, arguments and
                     response are all right, no call is made twice, and after the first turn the model makes no more
                     successful calls than the gold. A model that always calls, never calls, calls twice or echoes the
                     prompt gets zero on one side, and so zero for the product. With cases of one side only: the rate
                     of that side. Beware if no case has a call due: nearly any tidy text then succeeds.

95 % intervals: Wilson (1927) for shares. For response_f1, the same formula with the sample variance instead of
p (1 - p). For overall, the percentiles of 2,000 draws (fixed seed) of each side's rate from its Jeffreys posterior,
Beta(yes + 1/2, no + 1/2), or Wilson if there is only one side.

    python eval.py --run runs/demo --split test
    python eval.py --model smollm2-135m --data cases.jsonl --out result.json
"""
import argparse
import ast
import contextlib
import csv
import functools
import itertools
import json
import os
import re
import sys
from collections import Counter, namedtuple
from pathlib import Path

import numpy as np
import torch

import data
import toolplay
from tools import (BUILTIN, STOP_WORDS, Call, Tool, ToolError, UserError, _cities, _city_file, _normal, _same, _terms,
                   execute, load_tools, number, parse_calls, parse_expression, printable, tool_from_schema)

METRICS = ("tool_accuracy", "format", "argument_accuracy", "call_accuracy", "execution", "response_quality",
           "response_f1", "overall")
FORGED = re.compile(r"</?tool_response|<\|\w+\|>")
NUMBER = re.compile(r"(?<![^\W_])(?<!\.)(?<!\d,)([-−–]?)[$€£]?"  # sign
                    r"((?:\d{1,3}(?:(?:[,'’\u00a0\u2009\u202f]\d{3})+(?!,?\d)|"  # digits in groups of three
                    r"(?: \d{3}){2,}(?![\d,]))|"  # between plain spaces at least two such groups: 1 500 000
                    r"\d+)(?:\.\d+)?|\.\d+)"  # digits without groups
                    r"([eE][-+]?\d+)?", re.ASCII)
MEANS = (r"(?:[\w-]+ ){0,2}(?:tool|function|calculator|search|access|way|means|data|report|forecast|service|"
         r"information)s?")
CANNOT = re.compile(r"(?:n['’]t|\bnot) (?:\w+ ){0,2}(?:have(?! to\b)|know|check|see|search|look|find|work|calculate|"
                    r"tell|include|available|help|fit|cover|got|able|possible|do (?:that|this|it)\b)|"
                    r"\bcan['’]t(?:[.!,;]|$)|"
                    r"\b(?:cannot|can not|unable|unavailable|impossible|lack|have nothing|no \w+ is available|"
                    r"(?:outside|beyond) (?:me|my|what)|none of (?:my|the) \w+|no (?:ability|way)|"
                    rf"(?:without|no|need an?|missing) {MEANS})\b", re.IGNORECASE)
# phrases that deny nothing, although they contain "no" or "not"
PHRASES = re.compile(r"\bno (problem|doubt|worries|need|clouds?|rain|snow|wind)\b|\bnot (bad|at all)\b", re.IGNORECASE)
DENIAL = re.compile(r"n['’]t\b|\b(no|not|nothing|none|cannot|without|unable|unknown|undefined|sorry|error|afraid|wrong|"
                    r"refused|empty|impossible|invalid|unavailable|lacks?|missing)\b", re.IGNORECASE)


# --------------------------------------------------------------------------- 1. cases

# A prompt and the expected answer. conversation: {"messages", "tools"}, the input of the model. calls: the gold calls
# of the first assistant turn; [] if no call is due, None if nothing is known. reference: the gold's final text, or
# None. later: how many calls the gold makes after its first turn, or None if this number is not known.
Case = namedtuple("Case", "conversation calls answer reference kind id later", defaults=[None])


def as_case(item):
    """A conversation in training form, or a prompt with an expectation -> Case. UserError, with the reason, if bad."""
    if not isinstance(item, dict) or not isinstance(item.get("expected"), (dict, type(None))):
        raise UserError('a case is an object with "messages" or "prompt", and perhaps "expected", an object')
    messages, tools = data.messages_of(item, item.get("expected") is None), data.offered_in(item)
    conversation = data.check_conversation({"messages": messages, "tools": list(BUILTIN) if tools is None else tools})
    messages, expected = conversation["messages"], item.get("expected")
    if unknown := set(expected or ()) - {"calls", "final", "answer"}:
        raise UserError(f'"expected" has an unknown key {min(unknown)!r}; it may hold "calls", "final" and "answer"')
    tools, later = {tool.name: tool for tool in conversation["tools"]}, None
    if expected is None:
        own = [n for n, m in enumerate(messages) if m["role"] == "assistant" and m.get("weight", 1)]
        if messages[-1]["role"] == "user" and item.get("answer") is not None:  # the answer to this message
            own = []
        start = own[0] if own else len(messages)
        messages, gold = messages[:start], list(itertools.takewhile(lambda m: m["role"] != "user", messages[start:]))
        # text next to a call is no answer
        replies = [m["content"] for m in gold if m["role"] == "assistant" and not data.calls_of(m)]
        later = sum(len(data.calls_of(m)) for m in gold[1:]) if replies else None  # None: no gold answer
        expected = {"calls": data.calls_of(gold[0]) if gold else None, "final": "".join(replies[-1:])}
    turn = {"role": "assistant", "content": expected.get("final") or "", "tool_calls": expected.get("calls")}
    turn = data.check_conversation({"messages": [turn]})["messages"][0]
    conversation = {"messages": messages, "tools": list(tools.values())}
    calls = None if expected.get("calls") is None else [Call(**call) for call in turn.get("tool_calls", [])]
    if not messages or messages[-1]["role"] not in ("user", "tool"):
        raise UserError("the prompt must end with a message of the user or of a tool")
    if missing := {call.name for call in calls or []} - set(tools):
        raise UserError(f"the expected call names tool {min(missing)!r}, which is not offered")
    if (answer := expected.get("answer", item.get("answer"))) is not None and not is_number(answer):
        raise UserError(f'"answer" must be a number or null, not {str(answer)[:40]!r}')
    return Case(conversation, calls, answer, turn["content"] or None,
                str(item.get("kind") or item.get("part") or "all"), item.get("id"), later)


def is_number(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300  # not inf, not nan


# --------------------------------------------------------------------------- 2. when are two things equal?

def words_of(text, apart=False):
    """The words of a text in lower case and without accents; with `apart`, "I'm" is two words."""
    return _normal(re.sub("['’]", " ", text) if apart else text).split()


def f1(a, b, words=words_of):
    """Harmonic mean of precision and recall of the words of two texts, as multisets."""
    a, b = Counter(words(a)), Counter(words(b))
    return 2 * (a & b).total() / max(a.total() + b.total(), 1)


def near(a, b, tolerance):
    return a == b or max(abs(a), abs(b)) < 1e300 and abs(a - b) <= tolerance * abs(b)


def literals(expression):
    """The numbers written in an expression, except the divisor of a product or sum: nobody writes a guess as the
    divisor there."""
    try:
        tree = parse_expression(expression)
    except ToolError:
        return list(numbers(expression))
    under = [node.right for node in ast.walk(tree) if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div)
             and isinstance(node.left, ast.BinOp)]
    return [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and is_number(node.value)
            and node not in under]


def same_expression(gold, got):
    """Whether the values or the errors are equal, and `got` is not just a literal where the gold computes something."""
    bare = [re.fullmatch(r"[-+]*[\d.,]+(e[-+]?\d+)?(%|percent)?", re.sub(r"[\s()$€£=?]", "", x), re.IGNORECASE)
            for x in (gold, got)]
    a, b = [execute(Call("calculator", {"expression": x}), BUILTIN) for x in (gold, got)]
    written, percent = literals(gold), re.search(r"%|per ?cent|(?<!\d)0?\.\d", gold, re.IGNORECASE)
    # 0.15 may also be written as 15 percent
    given = [abs(x) for x in written] + [100 * abs(x) for x in written if percent or abs(x) < 1] + [100] * bool(percent)
    if a.ok and any(near(abs(n), abs(a.value), 1e-6) and not any(near(abs(n), g, 1e-9) for g in given)
                    for n in literals(got)):
        return False  # "391 * 1" for 17 * 23, or "0 - 3" for 5 - 8: the answer was guessed, not computed
    return (near(b.value, a.value, 1e-6) if a.ok and b.ok else a.message == b.message) and not (bare[1] and not bare[0])


def same_argument(tool, key, gold, got):
    if not isinstance(gold, str) or not isinstance(got, str):
        return _same(gold, got)
    if (tool, key) == ("calculator", "expression"):
        return same_expression(gold, got)
    a, b = map(_normal, (gold, got))
    if key == "city":
        (city, _, region), (other, _, other_region) = [[_normal(x) for x in text.partition(",")]
                                                       for text in (gold, got)]
        return (gold == got or a == b != "" or city == other != ""
                and (not region or not other_region or region == other_region))
    if (tool, key) == ("search", "query"):  # filler words may differ, but not the subject or the year
        x, y = Counter(_terms(gold)), Counter(_terms(got))
        denied = [set(re.findall(r"\b(?:not|no|never|cannot|without)\b|n't\b", text.lower().replace("’", "'")))
                  for text in (gold, got)]
        return (gold == got or a == b != "" or f1(gold, got, _terms) >= 0.75 and not (x - y and y - x)
                and set(numbers(gold)) == set(numbers(got)) and denied[0] == denied[1])
    signs = re.compile(r"[+#<>*/=%$@&]|(?<!\w)-|-(?=\d)|(?<=\d)\.(?=\d)")
    return gold == got or a == b != "" and signs.findall(gold) == signs.findall(got)


def same_call(gold, got, tools={}):
    """Whether two calls are equal. tools: name -> Tool. A stated default is the same as a missing argument."""
    defaults = {"unit": "celsius"} if gold.name == "weather" else {}
    if gold.name in tools:
        fields, required = (tools[gold.name].parameters.get(key) or {} for key in ("properties", "required"))
        stated = {key: field["default"] for key, field in fields.items() if isinstance(field, dict)
                  and "default" in field}
        defaults = {key: value for key, value in {**dict.fromkeys(fields), **defaults, **stated}.items()
                    if key not in required or key in stated}
    # null for an optional parameter is the same as a missing argument, as in `execute`
    a, b = [{k: v for k, v in call.arguments.items() if k not in defaults or v is not None
             and not same_argument(gold.name, k, defaults[k], v)} for call in (gold, got)]
    return (gold.name == got.name and set(a) == set(b)
            and all(same_argument(gold.name, key, a[key], b[key]) for key in a))


def same_calls(gold, got, tools={}):
    """Whether the gold calls and the calls can be paired, in any order, with no call left over."""
    if not gold or len(gold) != len(got):
        return len(gold) == len(got)
    # try identical calls only once: otherwise n identical calls would be tried in n! orders
    tries = {repr(call): n for n, call in enumerate(got)}.values()
    return any(same_call(gold[0], got[n], tools) and same_calls(gold[1:], got[:n] + got[n + 1:], tools) for n in tries)


SCALES = data.SCALES | {"billion": 10 ** 9, "trillion": 10 ** 12}


def numbers(text):
    """The numbers in a text -> {value: digits after the point}; commas, currency signs and units are ignored."""
    text = re.sub(rf"(?<![\w.,])(\d[\d,]*(?:\.\d+)?)[ -]({'|'.join(SCALES)})\b",
                  lambda m: f"{float(m[1].replace(',', '')) * SCALES[m[2].lower()]:.15g}", text,
                  flags=re.IGNORECASE | re.ASCII)
    return {float(re.sub("[−–]", "-", sign) + re.sub(r"[^\d.]", "", digits) + power): len(digits.partition(".")[2])
            for sign, digits, power in NUMBER.findall(text)}


IN_WORDS = re.compile(r"\b(?:a (?=hundred|thousand|million))?(?:{0})(?: (?:{0}))*\b".format(
    "|".join([*data.ONES, *data.TENS[2:], *data.SCALES])))


# after these words "minus" is a sign; in "10 minus 3" it is an operator
BELOW = (r"(?:^|[.,:;!?(=]|\b(?:is|are|was|at|be|to|of|about|in|by|has|have|had|with|leaves?|becomes?|makes?|gives?|"
         r"gets?|equals?|it's|that's|currently|around|about|now|only|just|reads?|like|as|roughly|nearly|almost|chilly|"
         r"cold|frosty)|[*_\"“])\s*(?:minus|negative) |\bnegative ")


# denies the number that follows
NOT = (r"(?:(?:\bnot|n't|\bnever|\bneither|\banything but|\bcannot|\bdoubt)(?:, in fact,)?\s+"
       r"(?:(?:think|believe|say|possibly|really|exactly|quite|it|that|this|is|be|it's|that's|equal|to|going|"
       r"the answer)\s+){0,4}(?:\w+\s+)??|\b(?:wrong|incorrect|false):\s+)")


def states(text, answer, known, guesses=2):
    """Whether the text states the answer, not as a denial, and with at most `guesses` other numbers that are not
    `known`."""
    text = re.sub(rf"({BELOW})(?=[$€£]?\d)", lambda m: m[1].rstrip().rpartition(" ")[0] + " -",
                  text.replace("’", "'"), flags=re.IGNORECASE)
    text = re.sub(r"(?<![-−–\w.])(?=\d[\d.]* ?(?:°|degrees?)? ?(?:[CF]|celsius|fahrenheit)? below zero)", "-", text,
                  flags=re.IGNORECASE)
    shown, spelled, exact = numbers(text), in_words(text), answer == round(answer) and abs(answer) < 1e15

    def rounded(value, places):  # a half may be rounded up or down
        return near(value, answer, 0.05) and abs(value - answer) <= 0.5 * 10 ** -places * (1 + 1e-9)

    right = {value for value, places in shown.items()
             if value == answer or not exact and (near(value, answer, 0.005) or rounded(value, places))}
    if not right and answer in spelled:  # the text spells the answer out: "eight legs"
        right = {answer}
    if not right:  # 75 % is 0.75
        shares = numbers(" ".join(re.findall(r"(?<![\w.,])\d[\d,.]*(?= ?(?:%|per ?cent\b))", text)))
        right = {value for value, places in shares.items()
                 if near(value / 100, answer, 0.005) or not exact and rounded(value / 100, places + 2)}
    denied = re.findall(rf"{NOT}({NUMBER.pattern})|({NUMBER.pattern})(?:\?\s+no|[%°.;:!)*\"]{{0,3}}(?:, which)?\s+"
                        r"(?:(?:is|was|would be) (?:wrong|incorrect|false)|"
                        r"(?:is|was|would be)(?:n't| not) (?:right|correct|true|it|what|the)))\b",
                        text, re.IGNORECASE | re.ASCII)
    if any({answer, *right} & set(numbers(found[0] or found[4])) for found in denied):
        return False
    if any(answer in in_words(found)
           for found in re.findall(rf"{NOT}({IN_WORDS.pattern})", text.lower().replace("-", " "))):
        return False
    others = {x for x in (set(shown) | spelled) - right - {1} if not {x, -x} & known}
    return bool(right) and len(others) <= guesses


def in_words(text):
    """The numbers that a text spells out ("minus twelve", "two and a half") -> set."""
    plain, found = " ".join(re.sub(r"-|\band\b|(?<=thousand),|(?<=million),", " ", text.lower()).split()), set()
    # in these phrases "one" is no number
    plain = re.sub(r"\b(no|some|any|every|that|which) one\b|\bone (moment|second|sec|another)\b", " . ", plain)
    for phrase in IN_WORDS.finditer(plain):
        sign = -1 if (re.search(rf"(?:{BELOW})$", plain[max(phrase.start() - 30, 0):phrase.start()])
                      or re.match(r" (?:degrees? )?(?:celsius |fahrenheit )?below zero", plain[phrase.end():])) else 1
        half = 0.5 * plain.startswith(" a half", phrase.end())  # the "and" before it is removed above
        found |= ({sign * (x + half) for x in data.numbers_in(phrase[0])}
                  | ({0} if "zero" in phrase[0].split() else set()))
    return found


def describes(text, weather, known):
    """Whether a text about the weather agrees with the unit and the city; it need not repeat them."""
    found = re.findall(r"(?<![\d.])(\d+(?:\.\d+)?) ?(?:°|degrees?)? ?(C|F|celsius|fahrenheit)\b",
                       text.replace("℃", "°C").replace("℉", "°F"), re.IGNORECASE)
    units = {unit[0].lower() for value, unit in found if float(value) == abs(weather["temperature"])}
    named = [city for city in _cities(_city_file())[0].values()
             if city in text and re.search(rf"(?<!\w){re.escape(city)}(?!\w)", text)]
    others = [city for city in named if city not in known and city not in data.corpus("verdicts.json")["ordinary"]]
    return (not units or weather["unit"][0] in units) and (weather["city"] in text or not others)


def denies(text, *patterns):
    """Whether a text has a word of denial, apart from phrases such as "no problem"."""
    return any(pattern.search(PHRASES.sub("", text)) for pattern in patterns)


def declines(text, reference, known, told):
    """Whether the text says that it cannot be done, and makes up no number (not `known`) or weather (not `told`)."""
    made_up = (set(numbers(text)) | in_words(text)) - known - in_words(reference or "") - {1}
    skies = set(data.corpus("verdicts.json")["skies"])
    weather = skies.intersection(words_of(text)).difference(words_of(f"{told} {reference}"))
    like = f1(text, reference or "") >= 0.5 and not denies(reference, DENIAL, CANNOT) and converses(text, told)
    return not made_up and not weather and (denies(text, DENIAL, CANNOT) or like)


def in_circles(words):
    """Whether a text repeats the same four words in a row at least four times."""
    return max(Counter(zip(words, words[1:], words[2:], words[3:])).values(), default=0) >= 4


def converses(text, prompt):
    """Whether the text is a reply at all: mostly letters, no loop, no echo ("Thank you!" plus one word is no echo). The
    content of the reply is not judged."""
    words, asked, solid = words_of(text), words_of(prompt), "".join(text.split())
    echo = set(words) == set(asked) or f1(text, prompt) >= 0.8 and len(asked) >= 4
    return bool(words) and not in_circles(words) and 2 * sum(map(str.isalpha, solid)) >= len(solid) and not echo


def common_words():
    return STOP_WORDS.union(data.corpus("verdicts.json")["polite"])


@functools.lru_cache(1)
def small_talk():
    """The words of at least three letters in the base model's own replies."""
    return {word for talk in data.corpus("talk_replies.jsonl")[1:] for word in words_of(talk["reply"])
            if len(word) > 2 and word.isalpha()}


def worded(text, known):
    """Whether a text has a word of small talk or of the text `known` ("asdf qwer" has neither), and not only stop words
    such as "the". Text in a script other than Latin only needs to have words."""
    words = set(words_of(text, apart=True))
    if not re.search("[a-z]", _normal(text)):
        return bool(words)
    return bool(words - STOP_WORDS) and bool(words & common_words() or words & small_talk() or f1(text, known) > 0)


# --------------------------------------------------------------------------- 3. one episode

def judge(case, episode):
    """Case and episode -> record: the texts and one verdict per metric, None if a metric does not apply."""
    first = episode.turns[0] if episode.turns else ""
    calls, errors = parse_calls(first)
    names = "|".join(map(re.escape, {tool.name for tool in case.conversation["tools"]} or {"tool_call"}))
    # finds calls without tags too, and calls in the formats of other models
    keys = [rf'["\']{key}["\']\s*:' for key in ("(?:name|function|tool)", "(?:arguments|parameters|args)")]
    bare = (rf"</?tool_?call|{keys[0]}.*{keys[1]}|{keys[1]}.*{keys[0]}|<\|python_tag\|>|<function=|"
            rf"""\b({names})(\.call)?(\((\s*\w+\s*[=:]|\s*["'{{])|:\s*\{{)|\b(?-i:{names})\(\s*\d|"""
            rf"\bAction:\s*({names})\b|(?m:^[ `*\[]*(?-i:{names})\([^\n]+\)[ `*\]]*$)|"  # a line that is only a call
            rf"""["'](?:name|function|tool|action)["']\s*:\s*["']({names})["']|["']({names})["']\s*:\s*\{{""")
    calling = bool(calls or errors or re.search(bare, first, re.DOTALL | re.IGNORECASE))
    due = None if case.calls is None else bool(case.calls)
    tools = load_tools(case.conversation["tools"])
    gold, gold_results = Counter(c.name for c in case.calls or []), [execute(call, tools) for call in case.calls or []]
    # The same schemas, with dict(**arguments) as the function: a call that fits its schema is ok and does nothing.
    hollow = {name: Tool(name, "", tool.parameters, dict, isolated=False) for name, tool in tools.items()}
    valid = bool(calls) and not errors and not FORGED.search(first) and all(execute(call, hollow).ok for call in calls)
    plain = not calling and bool(first.strip()) and not FORGED.search(first)
    right_tools = Counter(c.name for c in calls) == gold if due else not calling
    exact = right_tools and same_calls(case.calls or [], calls, tools)
    again = lambda calls: sum(same_call(a, b, tools) for a, b in itertools.combinations(calls, 2))  # noqa: E731
    may_err = any(result.error_type == "tool_error" for result in gold_results)
    verdicts = {
        "tool_accuracy": None if due is None else right_tools,
        "format": valid if due or due is None and calling else plain,
        "argument_accuracy": exact if due else None,
        "call_accuracy": None if due is None else exact,
        "execution": [r.ok or may_err and r.error_type == "tool_error"
                      for r in episode.results if r.error_type != "not_executable"],
        "response_quality": response(case, episode, gold_results),
        "response_f1": None if case.reference is None else f1(episode.final, case.reference)}
    failed = any(verdicts[name] is False for name in ("call_accuracy", "format", "response_quality"))
    further = sum(r.ok for r in episode.results[len(calls) + len(errors):])  # successful calls after the first turn
    too_many = bool(due) and case.later is not None and further > case.later
    verdicts["overall"] = (None if due is None
                           else not (failed or too_many or again(episode.calls) > again(case.calls or [])))
    wrong = [name for name, verdict in verdicts.items() if verdict is False or name == "execution" and False in verdict]
    return {"id": case.id, "kind": case.kind, "tools": sorted(set(gold)) or ["none"] * (due is False), "due": due,
            "wrong": wrong,
            "prompt": case.conversation["messages"][-1]["content"],
            "expected": case.calls and [vars(call) for call in case.calls],
            "answer": case.answer, "reference": case.reference, "turns": episode.turns,
            "calls": [vars(call) for call in episode.calls],
            "results": [json.loads(r.text()) for r in episode.results], "final": episode.final, "stop": episode.stop,
            "verdicts": verdicts}


def calls_with_results(episode):
    """-> [(call, result)]. The results of an episode also include those of malformed calls, which are no calls."""
    return list(zip(episode.calls, (r for r in episode.results if r.error_type != "malformed_call")))


def leaves(value):
    """All texts and numbers in a nested result, as a flat list."""
    if isinstance(value, (dict, list, tuple)):
        return [leaf for part in (value.values() if isinstance(value, dict) else value) for leaf in leaves(part)]
    return [value] if is_number(value) or isinstance(value, str) and value.strip() else []


def response(case, episode, gold_results):
    """response_quality of an episode: True, False, or None if there is nothing known to compare with."""
    # Whatever is in these texts is not made up. The results of the model's calls count only if no gold calls are known.
    shown = case.calls
    if shown is None:  # the work that led to the answer may be shown
        shown = [call for call, result in calls_with_results(episode) if is_number(result.value)
                 and case.answer is not None and near(result.value, case.answer, 1e-6)]
    asked = [m["content"] for m in case.conversation["messages"]] + [str(c.arguments) for c in shown]
    told = " ".join(asked + [r.text() for r in (episode.results if case.calls is None else gold_results)])
    asked, known = f" {_normal(' '.join(asked))} ", set(numbers(told)) | in_words(told)
    final = in_units_asked(episode.final, asked, gold_results)
    if (case.calls or case.answer is not None) and (final.lstrip()[:1] in ("{", "[")
                                                    or re.search(r'\{\s*"(result|error)"\s*:', final)):
        return False  # a raw tool result
    if case.answer is not None:
        return states(final, case.answer, known)
    # without a function nobody has seen the result that the text should state
    if case.calls is None or any(r.error_type == "not_executable" for r in gold_results):
        return None
    if case.calls:
        facts = [has_fact(case, final, result, asked, told, known) for result in gold_results]
        return False if False in facts else None if None in facts else True
    return episode.stop == "end" and replies(case, episode, final, asked, known)


def in_units_asked(final, asked, gold_results):
    """The text with "135 thousand" as 135, if the question is how many thousand, or if a result gives "thousand" as the
    unit."""
    units = {str(leaf).lower() for result in gold_results for leaf in leaves(result.value)}
    for unit in SCALES:
        if unit in units or f" how many {unit} " in asked:
            final = re.sub(rf"(?<=\d)[ -]{unit}\b", "", final, flags=re.IGNORECASE)
    return final


def has_fact(case, final, result, asked, told, known):
    """Whether a final text has the key fact of a gold result; None if there is nothing known to compare with.

    asked: what the user said, normalised. told: that and the results. known: the numbers in it.
    """
    value, reference = result.value, case.reference
    like = lambda text: f1(final, text) >= 0.5  # noqa: E731
    # a custom tool may have the name of a built-in tool, so compare functions
    function = {tool.name: tool.function for tool in case.conversation["tools"]}.get(result.name)
    if not result.ok:
        return declines(final, reference, known, told)
    if function is BUILTIN["weather"].function:
        return states(final, value["temperature"], known) and describes(final, value, told)
    if function is BUILTIN["search"].function:
        return (any(map(like, [reference] if reference else [hit["text"] for hit in value]))
                and not set(numbers(final)) - known - set(numbers(reference or ""))
                if value else declines(final, reference, known, told))
    if is_number(value):
        return states(final, value, known)
    # Custom tool: the text must have a value of the result that the user did not say. If the result has numbers,
    # the text must have no other numbers.
    said = [x for x in leaves(value) if f" {_normal(str(x))} " not in asked]
    if not said and not reference:
        return None
    made_up = (any(map(is_number, leaves(value)))
               and (set(numbers(final)) | in_words(final)) - known - {1} - set(numbers(reference or "")))
    if made_up:
        return False
    return bool(reference and like(reference)) or any(
        float(x) in numbers(final) if is_number(x) else
        re.search(rf"(?<!\w){re.escape(x)}(?!\w)", final, re.IGNORECASE) for x in said)


def replies(case, episode, final, asked, known):
    """Whether a final text is the reply that a case without a due call wants. asked, known: as in `has_fact`."""
    messages, reference = case.conversation["messages"], case.reference
    if reference and (final.strip() == reference.strip()
                      or f1(final, reference) >= 0.8 and denies(final, DENIAL) == denies(reference, DENIAL)):
        return True
    if not converses(final, messages[-1]["content"]) and case.kind in data.KINDS:
        return False
    if case.kind in ("missing_tool", "api_none"):
        return denies(final, CANNOT) and declines(final, reference, known, asked)
    if case.kind == "api_ask":  # must ask for the missing value
        return bool(re.search(r"\?|\b(need|please|tell me|let me know)\b", final, re.IGNORECASE))
    # "Paris", "4": a fact that the text must contain
    if reference and case.kind not in data.KINDS and len(words := words_of(reference, apart=True)) <= 3:
        opposite = {"yes": "no", "no": "yes"}.get(words[0] if words else "")
        if opposite in words_of(PHRASES.sub("", final), apart=True)[:3]:
            return False
        facts = (set(numbers(reference)) | in_words(reference)) - known
        names = {word for word in words if (len(word) > 2 or word.isdigit())
                 and not facts & (set(numbers(word)) | in_words(word))} - common_words()
        if facts or names:  # "Sure!" has neither, and is small talk
            denied, may_be = ({x for x in names if re.search(rf"{NOT}{x}\b", text.casefold().replace("’", "'"))}
                              for text in (final, reference))
            return (all(states(final, x, known | facts) for x in facts) and denied <= may_be
                    and names <= set(words_of(final, apart=True)))
    talk = " ".join([reference or "", *(m["content"] for m in messages)])
    return not episode.results and converses(final, messages[-1]["content"]) and worded(final, talk)


# --------------------------------------------------------------------------- 4. many episodes

def estimate(values, z=1.96):
    """Mean of values in [0, 1] with its Wilson interval; np.var replaces p (1 - p), the variance of yes/no values."""
    n = len(values)
    if not n:
        return {"value": None, "n": 0, "low": None, "high": None}
    mean, centre = float(np.mean(values)), (np.mean(values) + z * z / (2 * n)) / (1 + z * z / n)
    half = z * np.sqrt(np.var(values) / n + (z / (2 * n)) ** 2) / (1 + z * z / n)
    return {"value": mean, "n": n, "low": max(float(centre - half), 0.0), "high": min(float(centre + half), 1.0)}


def listed(verdict):
    """A verdict as a list: empty if the metric does not apply, one item per call for execution."""
    return verdict if isinstance(verdict, list) else [] if verdict is None else [verdict]


def measure(records):
    """Records -> {metric: {"value", "n", "low", "high"}}."""
    out = {name: estimate([x for r in records for x in listed(r["verdicts"][name])]) for name in METRICS}
    sides = [[r["verdicts"]["overall"] for r in records if r["due"] is due] for due in (True, False)]
    if all(sides):
        rng = np.random.default_rng(0)
        draws = [rng.beta(sum(side) + 0.5, len(side) - sum(side) + 0.5, 2000) for side in sides]  # Jeffreys
        low, high = np.percentile(np.sqrt(draws[0] * draws[1]), [2.5, 97.5])
        value = float(np.sqrt(np.mean(sides[0]) * np.mean(sides[1])))
        out["overall"].update(value=value, low=min(float(low), value), high=max(float(high), value))
    return out


def summarise(records):
    """Records -> {"n", "metrics": M, "kinds": {kind: M}, "tools": {tool: M}}, where each M is a dict
    {metric: {"value", "n", "low", "high"}}.

    A case with two gold tools counts for both tools; the tool "none" has the cases where no call is due.
    """
    def grouped(names):
        return {name: measure([r for r in records if name in names(r)])
                for name in sorted({name for r in records for name in names(r)})}
    return {"n": len(records), "metrics": measure(records), "kinds": grouped(lambda r: [r["kind"]]),
            "tools": grouped(lambda r: r["tools"])}


# --------------------------------------------------------------------------- 5. tables

MOST_ROWS = 25  # of a table; a test with synthetic functions has hundreds of tools


def cell(metric, full=True):
    tail = f' [{metric["low"]:.2f}, {metric["high"]:.2f}] n={metric["n"]}' if metric["n"] and full else ""
    return f'{metric["value"]:.3f}{tail}' if metric["n"] else "-"


def table(head, rows):
    return "\n".join("| " + " | ".join(str(x).replace("|", "/") for x in line) + " |"
                     for line in [head, ["---"] * len(head), *rows])


def compare_table(reports):
    """{label: report} -> a Markdown table, one column a report: value [95 % interval] n."""
    return table(["metric", *reports], [[m, *(cell(r["metrics"][m]) for r in reports.values())] for m in METRICS])


def format_report(report, title, records=None, show_failures=10):
    """The report as Markdown; with `records` also the first failures: prompt, expected and actual answer."""
    parts = [f"## {title} ({report['n']} cases)", compare_table({"value [95 % interval]": report})]
    known = [of["call_accuracy"]["value"] for of in report["kinds"].values() if of["call_accuracy"]["n"]]
    if len(known) > 1:
        parts.append(f"call_accuracy, mean over {len(known)} kinds: {np.mean(known):.3f}")
    for key in ("kinds", "tools"):
        rows = [[name, of["format"]["n"], *(cell(metric, full=False) for metric in of.values())]
                for name, of in report[key].items()]
        shown = sorted(sorted(rows, key=lambda row: -row[1])[:MOST_ROWS])
        parts.append(table([key, "n", *METRICS], shown) + f"\n\nand {len(rows) - len(shown)} more {key} with fewer "
                                                          "cases (--out keeps all)" * (len(rows) > len(shown)))
    failed = [record for record in records or [] if record["wrong"]]
    for r in failed[:show_failures]:
        shown = [f"{key:10}{json.dumps(r[key], ensure_ascii=False)}"
                 for key in ("prompt", "expected", "answer", "reference", "turns", "results")]
        parts.append("\n    ".join([f"{r['kind']}, case {r['id']}: wrong in {', '.join(r['wrong'])}", *shown]))
    if records:
        parts.append(f"{len(failed)} cases failed in some way; {min(show_failures, len(failed))} shown.")
    return printable("\n\n".join(parts))


# --------------------------------------------------------------------------- 6. runs against each other

def totals_of(records):
    """Records -> {metric: [2, cases]}: the sum and the number of each case's verdicts. The keys "due" and "none due"
    are the two sides of overall."""
    verdicts = {name: [listed(r["verdicts"][name]) for r in records] for name in METRICS}
    totals = {name: np.array([list(map(sum, lists)), list(map(len, lists))], dtype=float)
              for name, lists in verdicts.items()}
    due = np.array([bool(r["due"]) for r in records])
    return {**totals, "due": totals["overall"] * due, "none due": totals["overall"] * ~due}


def compare(groups, draws=2000):
    """{label: [records of each seed]} on the same cases -> {label: {metric: {"value", "low", "high", "difference",
    "d_low", "d_high", "n", "seeds"}}}.

    A value is the mean over seeds and cases. Its interval comes from a bootstrap (with a fixed random seed) that draws
    cases and, if there are several, seeds. The difference to the first label is paired: both use the same drawn cases.
    """
    rng = np.random.default_rng(0)
    totals = {label: [totals_of(records) for records in seeds] for label, seeds in groups.items()}

    def drawn(n):
        """[draws + 1, n]: how often each of n items is in a draw with replacement; the first row has each item once."""
        return np.array([np.ones(n)] + [np.bincount(rng.integers(0, n, n), minlength=n) for _ in range(draws)])
    cases = drawn(len(next(iter(groups.values()))[0]))
    seeds = {label: drawn(len(totals[label])) for label in groups}

    def rates(label, name):
        """The rate of a metric in each draw; nan if the metric applies to no case of the draw."""
        if name == "overall":
            due, none = rates(label, "due"), rates(label, "none due")
            # if a draw has one side only: the rate of that side
            return np.sqrt(np.where(np.isnan(due), none, due) * np.where(np.isnan(none), due, none))
        summed, counted = np.einsum("ds,skc,dc->kd", seeds[label], [seed[name] for seed in totals[label]], cases)
        return np.divide(summed, counted, out=np.full(draws + 1, np.nan), where=counted > 0)
    out, first = {label: {} for label in groups}, next(iter(groups))
    for name in METRICS:
        at = {label: rates(label, name) for label in groups}
        for label, values in at.items():
            (low, high), (d_low, d_high) = ([np.nan] * 2 if np.isnan(x[1:]).all()
                                            else np.nanpercentile(x[1:], [2.5, 97.5])
                                            for x in (values, values - at[first]))
            if low == high:  # all verdicts are equal: every bootstrap draw is the same
                found = next(of for of in (measure(seed)[name] for seed in groups[label]) if of["n"])
                low, high = found["low"], found["high"]
            out[label][name] = {"value": values[0], "low": low, "high": high, "difference": values[0] - at[first][0],
                                "d_low": d_low, "d_high": d_high,
                                "n": int((totals[label][0][name][1] > 0).sum()), "seeds": len(totals[label])}
    return out


def settings_of(config):
    """The settings that are equal in two seeds of one experiment: the config without its seed and without keys that
    change no result. `start_from` is replaced by the settings of the run that it names."""
    free = ("seed", "run_dir", "comment", "provenance", "device", "save_every", "micro_tokens", *toolplay.HELD)
    kept = {k: v for k, v in config.items() if k not in free and not k.startswith("wandb")}
    # the start run may be deleted or damaged
    with contextlib.suppress(OSError, ValueError, TypeError, AttributeError, RecursionError):
        if kept.get("start_from"):
            start = (Path(kept["start_from"]) / "config.json").read_text(encoding="utf-8")
            kept["start_from"] = settings_of(json.loads(start))
    return kept


def compare_command(args):
    """Compare runs on the same cases: metrics with intervals, paired differences to the first, seeds aggregated."""
    if len({Path(run).resolve() for run in args.runs}) < len(args.runs):
        raise UserError("compare: a run is named twice; every run is one column, or one seed of it")
    replaceable(args.csv, "--csv", "run,metric,")
    if args.csv and (Path(args.csv).is_dir() or not Path(args.csv).resolve().parent.is_dir()):
        raise UserError(f"--csv {args.csv}: it is a folder, or its folder does not exist")
    groups, same = {}, None
    for folder in map(Path, args.runs):
        remedy = f"make one: python eval.py --run {folder} (all runs with the same --data)"
        if not folder.is_dir():
            raise UserError(f"{folder}: there is no such run folder")
        result = toolplay.read_json(folder / "eval.json",
                                    lambda d: [(r["id"], r["prompt"], r["kind"] + "", r["due"],
                                                [r["verdicts"][m] for m in METRICS]) for r in d["records"]], remedy)
        # no config.json: the result is from eval --model --out
        config = (toolplay.read_json(folder / "config.json", dict.items, remedy)
                  if (folder / "config.json").exists() else {"run": str(folder)})
        kinds = {r["kind"] for r in result["records"]}
        wanted = {kind.strip() for kind in args.kind.split(",")} if args.kind else kinds
        if missing := sorted(wanted - kinds):
            raise UserError(f"{folder}: its eval.json has no case of kind {missing[0]!r}; "
                            f"it has {', '.join(sorted(kinds))}")
        records = [r for r in result["records"] if r["kind"] in wanted]
        cases = [(r["id"], r["prompt"], r["due"], *map(r.get, ("expected", "answer", "reference"))) for r in records]
        if same is not None and cases != same or not cases:
            raise UserError(f"{folder}: its eval.json has other cases than {args.runs[0]}'s; "
                            "run eval on all with the same --data, --n and --seed")
        same = cases
        key, seed = json.dumps([settings_of(config), toolplay.held(result)], sort_keys=True), str(config.get("seed"))
        # a seed that occurs again belongs to a new group: the code has changed
        version = next(n for n in itertools.count() if seed not in groups.get((key, n), {}))
        groups.setdefault((key, version), {})[seed] = (folder, records)
    labelled = {}
    for by_seed in groups.values():
        members = list(by_seed.values())
        label = members[0][0].name
        if len(members) > 1:  # the seeds c/1 and c/2 are "c"
            label = (re.sub(r"([-_.](s|seed)[-_]?|[-_.])?\d+$", "", label) or members[0][0].resolve().parent.name)
        label = next(name for name in (label, str(members[0][0]), str(members[0][0].resolve()))
                     if name and name not in labelled)
        labelled[label] = [records for _, records in members]
    result = compare(labelled)
    first = next(iter(result))

    def shown(m, difference):
        if m["value"] != m["value"]:
            return "-"
        text = f'{m["value"]:.3f} [{m["low"]:.2f}, {m["high"]:.2f}]'
        if difference and m["difference"] == m["difference"]:
            text += f' ({m["difference"]:+.3f} [{m["d_low"]:+.2f}, {m["d_high"]:+.2f}])'
        return text

    seeds = {label: len(labelled[label]) for label in result}
    print(table(["metric", *(f"{label} ({n} seed{'s' * (n > 1)})" for label, n in seeds.items())],
                [[name, *(shown(of[name], label != first) for label, of in result.items())] for name in METRICS]))
    print(f"\n{len(same)} cases; value [95 % interval] (paired difference to {first} [95 % interval])")
    if args.csv:
        keys = ["value", "low", "high", "difference", "d_low", "d_high", "n", "seeds"]
        rows = [[label, name, *(f"{of[name][k]:.6g}" for k in keys)]
                for label, of in result.items() for name in METRICS]

        def write(path):
            with open(path, "w", encoding="utf-8", newline="") as file:
                csv.writer(file, lineterminator="\n").writerows([["run", "metric", *keys], *rows])
        toolplay.write_atomic(args.csv, write)


# --------------------------------------------------------------------------- 7. with a model

def evaluate(model, tokenizer, cases, **settings):
    """Greedy rollouts of the cases (Case objects, or inputs of as_case) -> (report, records in the order of the
    cases). settings: arguments of toolplay.rollout."""
    cases = [case if isinstance(case, Case) else as_case(case) for case in cases]
    settings = {"max_new_tokens": 256, "batch_size": 128, "bar": "eval", **settings}
    episodes = toolplay.rollout(model, tokenizer, [case.conversation for case in cases], temperature=0.0, **settings)
    records = [judge(case._replace(id=n if case.id is None else case.id), episode)
               for n, (case, episode) in enumerate(zip(cases, episodes))]
    return summarise(records), records


def talk_loss(model, tokenizer, split="test", n=100):
    """Mean loss per token on the base model's own replies to no-tool talk: how much small talk tool training costs.

    Compare it with the loss of the untrained model, which is not zero.
    """
    talks = data.of_split(data.corpus("talk_replies.jsonl")[1:], split)[:n]
    rows = [data.encode({"messages": [{"role": "user", "content": talk["prompt"]},
                                      {"role": "assistant", "content": talk["reply"]}]}, tokenizer) for talk in talks]
    with torch.no_grad():
        logp = toolplay.token_logprobs(model.eval(), rows, budget=4096)
    return -float(logp.sum()) / sum(sum(mask) for _, mask in rows)


# --------------------------------------------------------------------------- 8. BFCL

# The Berkeley Function-Calling Leaderboard (Patil et al. 2025), for evaluation only: nothing here is ever trained on.
# The verdicts equal those of the package's own ast_checker for Python. If ast_checker raises an exception (a value that
# it cannot compare, a function that is not described), the calls are wrong here, unless another accepted value fits.
# Names are compared as they are, as it does for models whose API allows dots in names (underscore_to_dot=False).
BFCL = ("simple_python", "multiple", "parallel", "parallel_multiple", "irrelevance", "live_simple", "live_multiple")
BFCL_TYPES = {"string": str, "integer": int, "float": float, "boolean": bool, "array": list, "tuple": list,
              "dict": dict, "any": str}
plain = lambda x: re.sub(r"[ ,./\-_*^]", "", x).lower().replace("'", '"') if type(x) is str else x  # noqa: E731


def bfcl_valid(category, functions, calls, answers):
    """Whether calls [(name, arguments)] are right. functions: the descriptions; answers: [{name: {parameter: [accepted
    values]}}].

    irrelevance: right only without calls. parallel: as many calls as answers, in any order, matched greedily. Other
    categories have one answer and want one call.
    """
    if category.endswith("irrelevance"):
        return not calls
    parallel, several = "parallel" in category, "multiple" in category
    if len(calls) != (len(answers) if parallel or several else 1):
        return False
    described = {f["name"]: f for f in reversed(functions)}
    left = list(calls if parallel else calls[:1])  # the official checker reads no further
    try:
        for answer in answers if parallel else [answers[0]]:
            name, accepted = [*answer.items()][0]
            # With only one function, the official checker uses it without comparing its name with the answer's.
            function = described.get(name) if parallel or several else functions[0]
            hit = next((n for n, call in enumerate(left) if bfcl_call_valid(function, call, accepted)), None)
            if hit is None:
                return False
            del left[hit]
    except (TypeError, AttributeError, KeyError, IndexError, OverflowError, RecursionError):
        return False  # the official checker raises an exception here
    return True


def bfcl_call_valid(function, call, accepted):
    """Whether one call has the right name, every required parameter, no unknown parameter, and only accepted values. ""
    in a list of accepted values: the parameter may be left out."""
    name, arguments = call
    known = function["parameters"]["properties"]
    if (name != function["name"] or not isinstance(arguments, dict)
            or set(function["parameters"]["required"]) - set(arguments)):
        return False
    return (all(key in known and key in accepted and bfcl_value_valid(known[key], value, accepted[key])
                for key, value in arguments.items())
            and all(key in arguments or "" in values for key, values in accepted.items()))


def bfcl_value_valid(schema, value, accepted):
    """Whether a value is accepted: its type is exact, but an int may stand for a float; strings are compared without
    spaces, punctuation and case; the branches show the rest."""
    kind = BFCL_TYPES[schema["type"]]
    inner = BFCL_TYPES[schema["items"]["type"]] if schema["type"] in ("array", "tuple") else None
    value = (float(value) if kind is float and type(value) is int else list(value)
             if schema["type"] == "tuple" and type(value) is tuple else value)

    def kind_of(values):
        return next((type(x) for x in values if x != ""), None)
    if type(value) is not kind:  # the type of the accepted values is allowed too, for example a variable's name
        return type(value) is kind_of(accepted) and value in accepted
    if inner and not any(type(item) is not list or all(type(x) in (inner, kind_of(item)) for x in value)
                         for item in accepted):
        return False
    if kind_of(accepted) not in (None, kind):
        return value in accepted
    if kind is dict:
        return bfcl_dict_valid(value, accepted)
    if inner is dict:  # the order counts
        return any(len(value) == len(item) and all(bfcl_dict_valid(v, [x]) for v, x in zip(value, item))
                   for item in accepted)
    if kind is str:
        return plain(value) in [plain(x) for x in accepted if type(x) is str]
    if kind is list:
        return [plain(x) for x in value] in [[plain(x) for x in item] for item in accepted]
    return value in accepted


def bfcl_dict_valid(value, accepted):
    """Whether a dict is accepted. Each key has its own list of accepted values; the list of an optional key has ""."""
    return any(all(key in item and plain(x) in [plain(item[key][n]) for n in range(len(item[key]))]
                   for key, x in value.items())
               and all(key in value or "" in choices for key, choices in item.items())
               for item in accepted if item != "")


def bfcl_schema(schema):
    """BFCL's parameter description as a JSON schema."""
    types = {"dict": "object", "float": "number", "tuple": "array"}
    made = {k: types.get(v, v) if k == "type" else v for k, v in schema.items()
            if k in ("description", "enum", "default", "required", "type") and v is not None
            and (k, v) != ("type", "any")}
    if made.get("type") == "array" and "enum" in made:  # in BFCL this enum is for the items
        items = {**(schema.get("items") or {}), "enum": schema["enum"]}
        return bfcl_schema({k: v for k, v in schema.items() if k != "enum"} | {"items": items})
    if "properties" in schema:
        made["properties"] = {name: bfcl_schema(field) for name, field in schema["properties"].items()}
    return made | ({"items": bfcl_schema(schema["items"])} if schema.get("items") else {})


def bfcl_cases(suite, folder=None, n=None):
    """"bfcl:a,b" -> [{"category", "id", "conversation", "functions", "answers"}], the first n of each category.

    folder: where BFCL_v4_*.json are; default: in the package bfcl-eval.
    """
    import importlib.util
    name, _, categories = suite.partition(":")
    categories = list(dict.fromkeys(c for c in categories.split(",") if c))
    if name != "bfcl" or not categories or set(categories) - set(BFCL):
        raise UserError(f"--suite {suite}: must be bfcl: and some of {','.join(BFCL)}")
    if "irrelevance" in categories and "simple_python" not in categories:
        categories.insert(0, "simple_python")  # a model that never calls must not win
    if folder is None:
        spec = importlib.util.find_spec("bfcl_eval")
        if spec is None:
            raise UserError("--suite bfcl: the package is not installed; pip install --no-deps bfcl-eval==2026.3.23, "
                            "or name its data folder with --bfcl FOLDER")
        folder = Path(spec.submodule_search_locations[0]) / "data"

    def lines(file):
        return [json.loads(line) for line in (Path(folder) / file).read_bytes().splitlines() if line.strip()]
    cases = []
    for category in categories:
        file = f"BFCL_v4_{category}.json"
        try:
            if not (items := lines(file)[:n]):
                raise ValueError("it holds no case")
            gold = {} if category == "irrelevance" else {x["id"]: x["ground_truth"]
                                                         for x in lines(f"possible_answer/{file}")}
            for item in items:
                answers = [] if category == "irrelevance" else gold[item["id"]]
                if (not item["function"] or category != "irrelevance"
                        and not (answers and all(len(answer) == 1 and all(hasattr(x, "items") for x in answer.values())
                                                 for answer in answers))):
                    raise ValueError(f"{item['id']} has no function, or no answer")
                tools = {f["name"]: {"name": f["name"], "description": f["description"],
                                     "parameters": bfcl_schema(f["parameters"])} for f in reversed(item["function"])}
                tools = dict(reversed(tools.items()))  # of two equal names keep the first, as in bfcl_valid
                cases.append({"category": category, "id": item["id"], "functions": item["function"], "answers": answers,
                              "conversation": data.check_conversation({"messages": item["question"][0],
                                                                       "tools": list(tools.values())})})
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(
                f"{Path(folder) / file}: cannot be read as BFCL's ({type(error).__name__}: {error})") from None
    return cases


def bfcl(model, tokenizer, cases, **settings):
    """Greedy first turns -> (table, {category: {"value", "low", "high", "n", "too_long"}}, records). A prompt longer
    than the context counts as wrong.

    Only calls that tools.parse_calls reads are judged; a malformed call is no call. A turn ends after its last call
    (see rollout).
    """
    episodes = toolplay.rollout(model, tokenizer, [case["conversation"] for case in cases], temperature=0.0,
                                max_turns=1, max_new_tokens=512, bar="bfcl", **settings)
    records, report = [], {}
    for case, episode in zip(cases, episodes):
        calls = [(c.name, c.arguments) for c in episode.calls]
        too_long = episode.stop == "length" and not sum(episode.mask)
        records.append({"id": case["id"], "category": case["category"], "output": episode.turns[0], "calls": calls,
                        "too_long": too_long,
                        "valid": not too_long and bfcl_valid(case["category"], case["functions"], calls,
                                                             case["answers"])})
    for category in dict.fromkeys(r["category"] for r in records):
        own = [r for r in records if r["category"] == category]
        report[category] = {**estimate([float(r["valid"]) for r in own]), "too_long": sum(r["too_long"] for r in own)}
    return table(["BFCL category", "valid [95 % interval]", "beyond the context"],
                 [[name, cell(r), r["too_long"]] for name, r in report.items()]), report, records


def add_model(parser, about_run="a trained run folder"):
    """Add the arguments that toolplay.model_of reads."""
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--run", type=os.path.expanduser, help=about_run)
    which.add_argument("--model", type=os.path.expanduser,
                       help="smollm2-135m, tiny, a hub name, a folder or a .gguf file")
    parser.add_argument("--constrained", action=argparse.BooleanOptionalAction,
                        help="whether calls are held to their tools' schemas while they are written (default: "
                             "as the run's config says)")
    parser.add_argument("--call-margin", type=number(float, 0),
                        help="by how many nats a call must be more probable than any other beginning of a turn "
                             "(default: as the run's config says)")
    parser.add_argument("--beams", type=number(int, 1),
                        help="beam search for calls, with so many beams (default: as the run's config says)")
    parser.add_argument("--grounding", type=number(float, 0),
                        help="what a call loses in this search, in nats, for each value that the conversation does not "
                             "state, half for other mismatches (default: as the run's config says)")


def add_arguments(parser):
    add_model(parser, "a run folder; the result is also kept there, as eval.json")
    parser.add_argument("--split", choices=["test", "dev"], help="of the templates (default test)")
    parser.add_argument("--data", metavar="FILE", help="cases from a JSONL file instead of the templates; "
                                                       "lines without tools are offered the built-in three")
    parser.add_argument("--suite", metavar="bfcl:A,B", help="judge first turns as BFCL does; categories: "
                                                            f"{', '.join(BFCL)} (irrelevance: with "
                                                            "simple_python, so that never calling cannot win)")
    parser.add_argument("--bfcl", metavar="FOLDER", help="where BFCL_v4_*.json are (default: in the package bfcl-eval)")
    parser.add_argument("--n", type=number(int, 1), help="how many cases (default: 200 of the templates, "
                                                         "every line of --data, all of each BFCL category)")
    parser.add_argument("--seed", type=int, default=0, help="of the templates")
    parser.add_argument("--failures", type=number(int, 0), default=10, metavar="N",
                        help="how many failures to show (default 10)")
    parser.add_argument("--out", metavar="FILE", help="write report and records here as JSON")
    parser.add_argument("--batch-size", type=number(int, 1), default=128, help="cases at once (default 128)")


def replaceable(path, option, begin):
    """UserError if a result would be written over a file that is none: it does not begin as a result does."""
    if path and Path(path).is_file() and Path(path).stat().st_size:
        with open(path, encoding="utf-8", errors="replace") as file:
            if not file.read(len(begin)) == begin:
                raise UserError(f"{option} {path}: this file holds something else; write to another")


def command(args):
    """Score a run or a model."""
    replaceable(args.out, "--out", '{\n "data": ')
    if args.out and (not Path(args.out).parent.is_dir() or Path(args.out).is_dir()):
        raise UserError(f"--out {args.out}: there is a folder of that name" if Path(args.out).is_dir()
                        else f"--out {args.out}: there is no folder {Path(args.out).parent}")

    def keep(name, result):
        for path in filter(None, [args.out, args.run and f"{args.run}/{name}"]):
            toolplay.write_json(path, result)
    if args.data and args.suite is not None or args.bfcl and args.suite is None:
        raise UserError("--data with --suite: give one of the two" if args.data
                        else "--bfcl FOLDER goes with --suite bfcl:...")
    if args.split and (args.data or args.suite is not None):
        raise UserError("--split is of the templates; it does not go with --data or --suite")
    args.split = args.split or "test"
    suite = bfcl_cases(args.suite, args.bfcl, args.n) if args.suite is not None else []
    model, tokenizer, config = toolplay.model_of(args)
    stands_in = (" (trained on synthetic functions, used instead of ToolBench)"
                 if config.fallback and config.source == "synthetic" else "")
    trained_on = config.source + stands_in if args.run else None
    settings = {**toolplay.decoding(config), "batch_size": args.batch_size}
    if suite:
        text, report, records = bfcl(model, tokenizer, suite, **settings)
        print(f"## {args.run or args.model}{stands_in}\n\n{text}")
        return keep("bfcl.json", {"data": args.suite, "trained_on": trained_on, **toolplay.held(config),
                                  "report": report, "records": records})
    extra = [tool_from_schema(t) for t in config.tools]
    cases = (data.read_jsonl(args.data, lambda item: as_case(data.with_tools(item, extra, BUILTIN)))[:args.n]
             if args.data else data.generate(args.split, args.n or 200, args.seed, data.mix_of(config)))
    report, records = evaluate(model, tokenizer, cases, **settings)
    print(format_report(report, f"{args.run or args.model}{stands_in} on {args.data or args.split}", records,
                        args.failures))
    result = {"data": args.data or args.split, "trained_on": trained_on, **toolplay.held(config),
              "seed": args.seed, "report": report, "records": records}
    keep("eval.json", result)  # write it now, because the rest may fail
    if not args.data:
        report["talk_loss"] = talk_loss(model, tokenizer, args.split)
        if args.run:
            device = model.device
            del model
            report["talk_loss_before"] = talk_loss(*toolplay.load_model(config.model, device), args.split)
        before = f", {report['talk_loss_before']:.3f} before training" if args.run else ""
        print(f"\nLoss of the base model's own small talk: {report['talk_loss']:.3f}{before}")
        keep("eval.json", result)


def main(argv=None):
    toolplay.main(["eval", *(sys.argv[1:] if argv is None else argv)])


if __name__ == "__main__":
    main()
