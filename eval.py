"""
eval.py - how well does a model use its tools?

The idea. The model answers each case greedily, its calls are really executed, and the episode is compared with the gold
one. A case is a conversation in training form (the prompt is everything before the first assistant message, the gold is
what follows), or an object {"prompt" or "messages", "tools"?, "expected"?: {"calls"?, "answer"?, "final"?}}. A call is
"due" when the gold has one; with no expectation at all only format and execution are measured. The first three metrics
look at the first assistant turn alone. What does not apply to a case is not counted for it.

  tool_accuracy      The multiset of the names of the well-formed calls is the gold's. None due: nothing that looks like
                     a call; malformed call syntax counts as calling.
  format             Due: at least one call, every call parses and fits its tool's JSON schema, no forged result or chat
                     tag. None due: a non-empty turn that ended by itself, with no tag of the call grammar or of chat.
  argument_accuracy  (due only) Right tools, and the calls can be paired with the gold ones, in any order, so that every
                     argument is right. An expression: equal value (relative 1e-6; or the same error), and an operation
                     in it where the gold has one: a bare literal is no calculation. Other text: equal but for case,
                     accents, punctuation and spaces. City: the part before the first comma is enough. Query: F1 of the
                     content words >= 0.75. Anything else: equal. Missing or extra arguments are wrong, except those
                     that state the default (weather in celsius).
  execution          Share of the calls of all turns with an ok result; a malformed call is a failure; a tool's own
                     error (an unknown city) is right where a gold call errs too. A tool that has no function is left
                     out. Calls of one episode are counted as if independent.
  response_quality   The final text is right. A numeric answer is known: the text states it, and at most three other
                     numbers that nobody mentioned. A whole answer must be exact, another one within 0.5 %, or within
                     5 % when it is rounded to the digits shown. Else, due: for every gold result its key fact: the
                     number; the temperature; for search F1 >= 0.5 with the reference (or with a hit), or "not found"
                     where the reference says so; for an error, words that it cannot be done (or F1 >= 0.2), and no
                     made-up number. None due: ended by itself, mostly letters, no 4-gram four times, no echo of the
                     prompt; for the kind missing_tool it must also say that it cannot, with no made-up number.
  response_f1        Mean token F1 (as in SQuAD, Rajpurkar et al. 2016) of the final text and the reference.
  overall            sqrt(success where a call is due * success where none is), success being all of tool, format,
                     arguments and response. To call always, never, twice, or to echo gives nothing on one side, and a
                     product forgives no zero. One side alone: its rate; then beware, for what none is due nearly any
                     tidy text succeeds.

95 % intervals: Wilson (1927) for shares, the normal approximation for response_f1, and for overall a percentile
bootstrap over the cases of each side (2,000 draws, fixed seed; resampling zeros and ones is a binomial draw).

    python eval.py --run runs/sft_demo --split test
    python eval.py --model smollm2-135m --data cases.jsonl --out result.json
"""
from __future__ import annotations

import itertools
import json
import math
import re
import sys
from collections import Counter
from dataclasses import dataclass, replace

import numpy as np

import data
from tools import (BUILTIN, SURROGATE, Call, ToolError, UserError, _normal, _terms, calculate, execute, load_tools,
                   parse_calls)

METRICS = ("tool_accuracy", "format", "argument_accuracy", "execution", "response_quality", "response_f1", "overall")
DEFAULTS = {("weather", "unit"): "celsius"}  # saying the default is the same as leaving it out
FORGED = re.compile(r"</?tool_response|<\|\w+\|>")
NUMBER = re.compile(r"(?<![\w.,])([-−]?)[$€£]?((?:\d{1,3}(?:,\d{3})+(?![\d,])|\d+)(?:\.(\d+))?|\.(\d+))(e[-+]?\d+)?", re.ASCII)
DENIAL = re.compile(r"n['’]t\b|\b(no|not|nothing|none|cannot|without|unable|unknown|undefined|impossible|sorry|error|"
                    r"unfortunately|afraid|failed|wrong|refused|empty)\b", re.IGNORECASE)


# --------------------------------------------------------------------------- 1. cases

@dataclass(frozen=True)
class Case:
    """A prompt and what is expected of it. calls: None when nothing is known, [] when none is due."""
    conversation: dict   # {"messages", "tools"}: what the model is given
    calls: list | None   # gold calls of the first assistant turn
    results: list        # what each of them returns: {"result": ...}, {"error": ...}, or {} when that is not known
    answer: float | None
    reference: str | None
    kind: str
    id: object


def as_case(item):
    """A conversation in training form, or a prompt with an expectation -> Case; UserError with the reason."""
    if not isinstance(item, dict) or not {"messages", "prompt"} & set(item):
        raise UserError('a case is an object with "messages" or "prompt"')
    prompt = item["messages"] if "messages" in item else [{"role": "user", "content": item["prompt"]}]
    offered = list(BUILTIN) if item.get("tools") is None else item["tools"]
    tools = load_tools([_without_code(tool) for tool in offered] if isinstance(offered, list) else offered)
    prompt = data.check_conversation({"messages": prompt, "tools": offered})["messages"]
    expected = item.get("expected") or {}
    if not isinstance(expected, dict):
        raise UserError('"expected" must be an object with "calls", "answer" or "final"')
    if "expected" in item:
        gold = [{"role": "assistant", "content": "", "tool_calls": expected["calls"]}] if expected.get("calls") is not None else []
        gold += [{"role": "assistant", "content": expected["final"]}] if expected.get("final") is not None else []
        gold = data.check_conversation({"messages": prompt + gold})["messages"][len(prompt):]
    else:
        start = next((n for n, m in enumerate(prompt) if m["role"] == "assistant"), len(prompt))
        prompt, gold = prompt[:start], list(itertools.takewhile(lambda m: m["role"] != "user", prompt[start:]))
    if not prompt or prompt[-1]["role"] not in ("user", "tool"):
        raise UserError("the prompt must end with a message of the user or of a tool")
    conversation = {"messages": prompt, "tools": offered}
    try:
        shown = "".join(text for _, text in data.turns(conversation))
    except (TypeError, AttributeError) as error:  # a schema can be wrong in more ways than load_tools looks for
        raise UserError(f"the tools cannot be shown ({error})") from None
    if SURROGATE.search(shown):
        raise UserError("the text holds broken Unicode (half of a surrogate pair)")
    calls = None
    if gold and ("expected" not in item or expected.get("calls") is not None):
        calls = [Call(**call) for call in gold[0].get("tool_calls", [])] + parse_calls(gold[0]["content"])[0]
    if missing := {call.name for call in calls or []} - set(tools):
        raise UserError(f"the expected call names tool {min(missing)!r}, which is not offered")
    replies = [m["content"] for m in gold if m["role"] == "assistant" and not m.get("tool_calls") and not parse_calls(m["content"])[0]]
    returned = [_read_result(m["content"]) for m in gold if m["role"] == "tool"]
    if len(returned) < len(calls or []):
        returned = [_run_gold(call, tools) for call in calls]
    answer = expected.get("answer", item.get("answer"))
    if answer is not None and not _finite(answer):
        raise UserError(f'"answer" must be a number or null, not {str(answer)[:40]!r}')
    return Case(conversation, calls, returned[:len(calls or [])], answer, replies[-1] if replies else None,
                str(item.get("kind") or item.get("part") or "all"), item.get("id"))


def _without_code(tool):
    """A schema whose "function" names Python code would import that code: a data file must not."""
    inner = tool.get("function") if isinstance(tool, dict) and isinstance(tool.get("function"), dict) else tool
    if isinstance(inner, dict) and "function" in inner:
        raise UserError('a tool in a data file cannot name Python code ("function"); declare it in the config')
    return tool


def _finite(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300  # nan is not < either


def _read_result(text):
    text = re.sub(r"^<tool_response>|</tool_response>$", "", text.strip())
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return {"result": text}
    return value if isinstance(value, dict) and set(value) in ({"result"}, {"error"}) else {"result": value}


def _run_gold(call, tools):
    result = execute(call, tools)
    return {"result": result.value} if result.ok else {} if result.error_type == "not_executable" else {"error": result.message}


# --------------------------------------------------------------------------- 2. when are two things equal?

def token_f1(a, b):
    """Harmonic mean of precision and recall of the tokens of two lists, as multisets."""
    common = (Counter(a) & Counter(b)).total()
    return 2 * common / (len(a) + len(b)) if common else 0.0


def text_f1(a, b):
    return token_f1(_normal(a).split(), _normal(b).split())


def near(a, b, tolerance):
    try:
        return a == b or abs(a - b) <= tolerance * abs(b)
    except OverflowError:  # an integer beyond the floats against a float
        return False


def same_expression(gold, got):
    """Equal value or the same error; and not just the literal where the gold computes something."""
    def value(expression):
        try:
            return calculate(expression)
        except ToolError as error:
            return str(error)

    def literal(expression):
        return re.fullmatch(r"[-+]*[\d.,]+(e[-+]?\d+)?", re.sub(r"[\s()$€£=?]", "", expression), re.IGNORECASE)
    a, b = value(gold), value(got)
    equal = a == b if isinstance(a, str) or isinstance(b, str) else near(b, a, 1e-6)
    return equal and not (literal(got) and not literal(gold))


def same_argument(tool, key, gold, got):
    if not isinstance(gold, str) or not isinstance(got, str):
        return gold == got and isinstance(gold, bool) == isinstance(got, bool)  # in Python True == 1
    if (tool, key) == ("calculator", "expression"):
        return same_expression(gold, got)
    if gold == got or _normal(gold) == _normal(got) != "":
        return True
    if key == "city":
        return _normal(gold.split(",")[0]) == _normal(got.split(",")[0]) != ""
    return key == "query" and token_f1(_terms(gold), _terms(got)) >= 0.75


def same_call(gold, got):
    def stated(call):
        return {key: value for key, value in call.arguments.items() if DEFAULTS.get((call.name, key), call) != value}
    a, b = stated(gold), stated(got)
    return gold.name == got.name and set(a) == set(b) and all(same_argument(gold.name, key, a[key], b[key]) for key in a)


def same_calls(gold, got):
    """Whether calls and gold calls can be paired, in any order (bipartite matching by augmenting paths)."""
    owner = {}

    def place(g, tried):
        for n in range(len(got)):
            if n not in tried and same_call(gold[g], got[n]):
                tried.add(n)
                if n not in owner or place(owner[n], tried):
                    owner[n] = g
                    return True
        return False
    return len(gold) == len(got) and all(place(g, set()) for g in range(len(gold)))


def numbers(text):
    """The numbers in a text -> [(value, digits after the point)]; commas, currency signs and units do not matter."""
    return [(float(sign.replace("−", "-") + digits.replace(",", "") + exponent), len(places or tail))
            for sign, digits, places, tail, exponent in NUMBER.findall(text)]


def states(text, answer, known):
    """Whether the text states the answer, without a list of guesses around it."""
    def right(value, places):
        if answer == round(answer) and abs(answer) < 1e15:
            return value == answer
        return near(value, answer, 0.005) or near(value, answer, 0.05) and near(value, round(answer, places), 1e-9)
    shown = numbers(text)
    guesses = {value for value, places in shown if not right(value, places)} - known
    return any(right(*number) for number in shown) and len(guesses) <= 3


def declines(text, reference, known):
    """Whether the text says that it cannot be done, and does not make up a number."""
    invented = {value for value, _ in numbers(text)} - known
    return not invented and bool(DENIAL.search(text) or text_f1(text, reference or "") >= 0.2)


def converses(text, prompt):
    """Whether this is a reply at all: mostly letters, no loop, no echo. No judgement of what it says."""
    words = _normal(text).split()
    fourgrams = Counter(zip(words, words[1:], words[2:], words[3:]))
    letters = sum(map(str.isalpha, text)) >= 0.5 * len("".join(text.split()))
    return bool(words) and letters and max(fourgrams.values(), default=0) < 4 and text_f1(text, prompt) < 0.8


# --------------------------------------------------------------------------- 3. one episode

def judge(case, episode):
    """Case and episode -> record: its text and its verdicts, one per metric, None where a metric does not apply."""
    first = episode.turns[0] if episode.turns else ""
    calls, errors = parse_calls(first)
    prompt = case.conversation["messages"][-1]["content"]
    calling = bool(calls or errors or re.search("</?tool_call", first))
    due = None if case.calls is None else bool(case.calls)
    tools = load_tools(case.conversation["tools"])
    # The schema alone is checked: the same tools with nothing behind them.
    empty = {name: replace(tool, function=lambda **arguments: None, isolated=False) for name, tool in tools.items()}
    valid = bool(calls) and not errors and not FORGED.search(first) and all(execute(call, empty).ok for call in calls)
    plain = not calling and bool(first.strip()) and episode.stop == "end" and not FORGED.search(first)
    names = Counter(call.name for call in calls)
    right_tools = names == Counter(call.name for call in case.calls or []) and (bool(due) or not calling)
    erring = any("error" in result for result in case.results)
    verdicts = {
        "tool_accuracy": None if due is None else right_tools,
        "format": valid if due or due is None and calling else plain,
        "argument_accuracy": right_tools and same_calls(case.calls, calls) if due else None,
        "execution": [r.ok or erring and r.error_type == "tool_error" for r in episode.results if r.error_type != "not_executable"],
        "response_quality": _response(case, episode, due, prompt),
        "response_f1": None if case.reference is None else text_f1(episode.final, case.reference)}
    needed = [verdicts[name] for name in ("tool_accuracy", "format", "argument_accuracy", "response_quality")]
    verdicts["overall"] = None if due is None else all(verdict for verdict in needed if verdict is not None)
    return {"id": case.id, "kind": case.kind, "prompt": prompt, "due": due, "answer": case.answer, "reference": case.reference,
            "expected": None if case.calls is None else [vars(call) for call in case.calls],
            "turns": list(episode.turns), "calls": [vars(call) for call in episode.calls],
            "results": [json.loads(result.text()) for result in episode.results],
            "final": episode.final, "stop": episode.stop, "verdicts": verdicts}


def _response(case, episode, due, prompt):
    final = episode.final
    seen = [m["content"] for m in case.conversation["messages"]] + [r.text() for r in episode.results]
    seen += [str(value) for call in [*(case.calls or []), *episode.calls] for value in call.arguments.values()]
    known = {value for text in seen for value, _ in numbers(text)}  # who repeats these makes nothing up
    if case.answer is not None:
        return states(final, case.answer, known)
    if due:
        verdicts = [_fact(call, result, final, case.reference, known) for call, result in zip(case.calls, case.results)]
        return None if None in verdicts else all(verdicts)
    if due is None:
        return None
    return episode.stop == "end" and converses(final, prompt) and (
        case.kind != "missing_tool" or declines(final, case.reference, known))


def _fact(call, result, final, reference, known):
    """Whether the final text holds the key fact of one gold result; None when there is nothing to compare with."""
    if "error" in result:
        return declines(final, reference, known)
    value = result.get("result")
    value = value.get("temperature") if call.name == "weather" and isinstance(value, dict) else value
    if call.name in ("calculator", "weather") and _finite(value):
        return states(final, value, known)
    hits = [str(hit["text"]) for hit in value if isinstance(hit, dict) and "text" in hit] if isinstance(value, list) else []
    if call.name == "search" and "result" in result:
        found = bool(hits) if reference is None else any(hit in reference for hit in hits) or not DENIAL.search(reference)
        if not found and declines(final, reference, known):
            return True
    texts = hits if reference is None else [reference]
    return any(text_f1(final, text) >= 0.5 for text in texts) if texts or value == [] else None


# --------------------------------------------------------------------------- 4. many episodes

def wilson(right, n, z=1.96):
    """95 % interval of a share (Wilson 1927): right at small n and near 0 and 1, where the normal one is not."""
    p, centre = right / n, (right + z * z / 2) / (n + z * z)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return max(centre - half, 0.0), min(centre + half, 1.0)


def _estimate(name, verdicts):
    n, value = len(verdicts), sum(verdicts) / max(len(verdicts), 1)
    if not n:
        return {"value": None, "n": 0, "low": None, "high": None}
    if name == "response_f1":
        half = 1.96 * float(np.std(verdicts, ddof=1)) / math.sqrt(n) if n > 1 else 1.0
        low, high = max(value - half, 0.0), min(value + half, 1.0)
    else:
        low, high = wilson(sum(verdicts), n)
    return {"value": value, "n": n, "low": low, "high": high}


def _overall(records):
    sides = [[r["verdicts"]["overall"] for r in records if r["due"] is due] for due in (True, False)]
    if not all(sides):
        return _estimate("overall", sides[0] + sides[1])
    rng, value, draws = np.random.default_rng(0), 1.0, 1.0
    for side in sides:
        share = sum(side) / len(side)
        value, draws = value * share, draws * rng.binomial(len(side), share, 2000) / len(side)
    low, high = np.percentile(np.sqrt(draws), [2.5, 97.5])
    return {"value": math.sqrt(value), "n": len(sides[0] + sides[1]), "low": float(low), "high": float(high)}


def _metrics(records):
    out = {}
    for name in METRICS[:-1]:
        verdicts = [r["verdicts"][name] for r in records]
        verdicts = list(itertools.chain(*verdicts)) if name == "execution" else [v for v in verdicts if v is not None]
        out[name] = _estimate(name, verdicts)
    return {**out, "overall": _overall(records)}


def summarise(records):
    """Records -> {"n", "metrics": {name: {"value", "n", "low", "high"}}, "kinds": {kind: the same}, "tools": {tool: the same}}.

    A case with two gold tools counts for both; "none" are the cases where no call is due.
    """
    kinds, tools = {}, {}
    for record in records:
        kinds.setdefault(record["kind"], []).append(record)
        for name in {call["name"] for call in record["expected"] or []} or ({"none"} if record["due"] is False else ()):
            tools.setdefault(name, []).append(record)
    return {"n": len(records), "metrics": _metrics(records), "kinds": {k: _metrics(kinds[k]) for k in sorted(kinds)},
            "tools": {t: _metrics(tools[t]) for t in sorted(tools)}}


# --------------------------------------------------------------------------- 5. tables

def _row(*cells):
    return "| " + " | ".join(map(str, cells)) + " |"


def _cell(metric, interval=False):
    if metric["value"] is None:
        return "-"
    return f'{metric["value"]:.3f}' + (f' [{metric["low"]:.2f}, {metric["high"]:.2f}]' if interval else "")


def compare_table(reports):
    """{label: report} -> a Markdown table, one column a report: value [95 % interval]."""
    rows = [_row("metric", *reports), _row(*["---"] * (len(reports) + 1))]
    rows += [_row(name, *(_cell(report["metrics"][name], interval=True) for report in reports.values())) for name in METRICS]
    if any("talk_loss" in report for report in reports.values()):
        rows.append(_row("talk loss (lower is better)", *(f'{r["talk_loss"]:.3f}' if "talk_loss" in r else "-" for r in reports.values())))
    return "\n".join(rows)


def format_report(report, title, records=None, show_failures=10):
    """The report as Markdown; with `records` also the first failures, with what was asked, expected and got."""
    lines = [f"## {title} ({report['n']} cases)", "", compare_table({"value [95 % interval]": report})]
    for group in ("kinds", "tools"):
        lines += ["", _row(group[:-1], "n", *METRICS), _row(*["---"] * (len(METRICS) + 2))]
        lines += [_row(name.replace("|", "/"), max(m["n"] for k, m in metrics.items() if k != "execution"), *(_cell(metrics[k]) for k in METRICS))
                  for name, metrics in report[group].items()]
    failed = [r for r in records or [] if False in r["verdicts"].values() or False in r["verdicts"]["execution"]]
    if failed and show_failures:
        lines += ["", f"{len(failed)} cases failed in some way; the first {min(show_failures, len(failed))}:"]
    for r in failed[:show_failures]:
        wrong = [name for name, v in r["verdicts"].items() if v is False or name == "execution" and False in v]
        expected = json.dumps(r["expected"], ensure_ascii=False) if r["expected"] else "no call" if r["due"] is False else "not known"
        lines += ["", f"{r['kind']}, case {r['id']}: wrong in {', '.join(wrong)}", f"  asked:    {r['prompt']!r}",
                  f"  expected: {expected}; {r['reference']!r}" + (f"; answer {r['answer']}" if r["answer"] is not None else "")]
        lines += [f"  got:      {turn!r}" for turn in r["turns"]]
        lines += [f"  results:  {json.dumps(r['results'], ensure_ascii=False)}"] * bool(r["results"])
    return "\n".join(lines)


# --------------------------------------------------------------------------- 6. with a model

def evaluate(model, tokenizer, cases, batch_size=32, max_new_tokens=96, style="signature", progress=True):
    """Greedy rollouts of the cases (Case objects or what as_case takes) -> (report, records in the order of the cases)."""
    from tqdm import tqdm

    import toolplay
    cases = [case if isinstance(case, Case) else as_case(case) for case in cases]
    if not cases:
        raise UserError("there is no case to evaluate")
    # Neighbours with the same system prompt share it in the rollout's cache.
    order = sorted(range(len(cases)), key=lambda n: [text for _, text in data.turns(cases[n].conversation, style)])
    with tqdm(total=len(cases), desc="eval", unit="case", disable=not progress, dynamic_ncols=True) as bar:
        episodes = toolplay.rollout(model, tokenizer, [cases[n].conversation for n in order], temperature=0.0, style=style,
                                    max_new_tokens=max_new_tokens, batch_size=batch_size, progress=bar.update)
    records = dict(zip(order, map(judge, (cases[n] for n in order), episodes)))
    for n, record in records.items():
        record["id"] = n if record["id"] is None else record["id"]
    records = [records[n] for n in range(len(cases))]
    return summarise(records), records


def talk_loss(model, tokenizer, split="test", n=100):
    """Mean loss per token of the base model's own replies to no-tool talk: what tool training costs it in talk.

    The untrained model's value is the floor to compare with; it is not zero, as the replies were partly sampled.
    """
    import torch

    import toolplay
    talks = data.of_split(data.corpus("talk_replies.jsonl")[1:], split)[:n]
    if not talks:
        raise UserError(f"talk_replies.jsonl has no reply in the {split} split")
    rows = [data.encode({"messages": [{"role": "user", "content": talk["prompt"]}, {"role": "assistant", "content": talk["reply"]}]},
                        tokenizer) for talk in talks]
    training = model.training
    model.eval()
    with torch.no_grad():
        logp = toolplay.token_logprobs(model, rows, budget=4096)
    model.train(training)
    return -float(logp.sum()) / sum(sum(mask) for _, mask in rows)


def add_arguments(parser):
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--run", metavar="RUN", help="a run folder; the result is also kept there, as eval.json")
    which.add_argument("--model", metavar="NAME", help="smollm2-135m, tiny, a hub name, a folder or a .gguf file")
    parser.add_argument("--split", choices=["test", "dev"], default="test", help="of the templates (default test)")
    parser.add_argument("--data", metavar="FILE.jsonl", help="cases from a file instead of the templates")
    parser.add_argument("--n", type=int, help="how many cases (default: 200 of the templates, every line of --data)")
    parser.add_argument("--seed", type=int, default=0, help="of the templates")
    parser.add_argument("--failures", type=int, default=10, metavar="N", help="how many failures to show (default 10)")
    parser.add_argument("--out", metavar="FILE", help="write report and records here as JSON")


def command(args):
    """The work of `eval`: load, evaluate, print, write."""
    import toolplay
    if args.n is not None and args.n < 1 or args.failures < 0:
        raise UserError("--n must be at least 1, --failures at least 0")
    items = data.read_jsonl(args.data, as_case)[:args.n] if args.data else data.generate(args.split, args.n or 200, args.seed)
    cases = items if args.data else [as_case(item) for item in items]
    style = "signature"
    if args.run:
        model, tokenizer, config = toolplay.load_run(args.run)
        style, extra = config.tool_style, list(load_tools(config.tools).values())  # the run's own tools, as in training
        cases = [replace(c, conversation={**c.conversation, "tools": [*c.conversation["tools"], *extra]}) for c in cases]
    else:
        model, tokenizer = toolplay.load_model(args.model, toolplay.pick_device("auto"))
    report, records = evaluate(model, tokenizer, cases, style=style, progress=sys.stderr.isatty())
    if not args.data:
        report["talk_loss"] = talk_loss(model, tokenizer, args.split)
    source = args.data or f"{args.split} templates, seed {args.seed}"
    print(format_report(report, f"{args.run or args.model} on {source}", records, args.failures))
    for path in ([f"{args.run}/eval.json"] if args.run else []) + ([args.out] if args.out else []):
        try:
            toolplay.write_json(path, {"model": args.run or args.model, "data": source, **report, "records": records})
        except OSError as error:
            raise UserError(f"{path}: cannot write it ({error.strerror})") from None
        print(f"written: {path}", file=sys.stderr)


def main(argv=None):
    import toolplay  # only here: toolplay's verb `eval` calls command() above
    toolplay.main(["eval", *(sys.argv[1:] if argv is None else argv)])


if __name__ == "__main__":
    main()
