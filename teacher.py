"""
teacher.py - Toolformer: a model finds out by itself where a tool would have helped it

The idea (Schick et al. 2023, arXiv:2302.04761). Nobody labels the data. A language model reads plain text and guesses
where a call might help and what to ask. The calls are executed. A call is kept if its result makes the following words
more probable, by more than the call without its result does. The kept calls are inserted into the text, and the model
is fine-tuned on the new text.

c is a call, for example calculator(18 + 27), and r is its result; e(c) = " [calculator(18 + 27)]",
e(c, r) = " [calculator(18 + 27) -> 45]", and open is the token " [". P(x) is an instruction, a few examples, and the
text x. Section numbers are the paper's; equation numbers are ours.

    p_i    = p(open | P(x), x_<i)                        where a call may be: p_i > tau_s, the k largest        (sec. 2)
    c      ~ p(. | P(x), x_<i, open),  m times           what to ask; P(x) has a few examples for each tool
    w~_t   = max(0, 1 - 0.2 t),  w_t = w~_t / sum_s w~_s                                                      (sec. 4.1)
    L_i(z) = - sum_{j >= i} w_{j-i} log p(x_j | z, x_<j)                                                       (1)
    L+     = L_i(e(c, r)),   L- = min(L_i(nothing), L_i(e(c)))          what the result adds is L- - L+           (2)
    keep c   if  L- - L+ >= tau_f
    x*     = x_<i, e(c, r), x_>=i                        fine-tune on it with the language-model loss

z comes before the whole text, although the call will be inserted at i: a call in the middle of a sentence confuses a
model that has not been fine-tuned yet. Only five weights are above zero, so L_i needs the text only up to x_{i+4}. When
the fine-tuned model writes, a call begins, at most once per text, where `open` is among the `call_top` most probable
tokens (sec. 4.2), because models prefer to continue the text instead of calling a tool.

Departures. Inserted results have mask 0, as everywhere in this project: at inference the tool writes the results, so
the model must read them, not learn them. If several calls at one position pass the filter, only the best is kept. No
call is inserted before the first token or inside a character. A sample ends at "]"; a sample that continues with " ->"
asks for its result and also counts as complete. In L- the call has no arrow (in the paper, an arrow and nothing after).

Every pass is batched. For each tool, the texts are scored in tries that compute P once, and the calls are sampled from
KV caches that share P. In the filter the call comes first, so the rows share only the text without a call, and the
beginnings of calls.

Before and after the fine-tuning (this method does not use `eval_every`) we measure the loss of held-out texts and the
share of right arithmetic answers, with and without tools, on `eval_path` or the built-in prose of the test split.

    python teacher.py configs/teacher.json          the same as: python toolplay.py train configs/teacher.json
    python teacher.py --show RUN                    the funnel, the ten best and the ten worst calls
"""
from __future__ import annotations

import contextlib
import json
import random
import re
import sys
import zlib
from collections import namedtuple
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import torch


@dataclass
class Config:
    """The teacher's own keys. The shared keys, in toolplay.Config, control the fine-tuning afterwards."""
    text: str = ""                                 # text file (a text a line) or JSONL ({"text"} a line) to annotate;
                                                   # empty: built-in prose
    texts: Annotated[int, "> 0"] = 600             # how many texts to read
    tau_s: Annotated[float, "0 to 1"] = 0.0        # a position is tried if p(open) exceeds this; the paper: 0.05, for
                                                   # calculator and translation 0
    positions: Annotated[int, "> 0"] = 5           # k: at most this many positions per text and tool; the paper: 5, for
                                                   # calculator and translation 20
    samples: Annotated[int, "> 0"] = 4             # m: calls sampled at each position; the paper: 5, for calculator and
                                                   # translation 10
    tau_f: float = 0.5                             # a call is kept if it lowers the loss by at least this, in nats; the
                                                   # paper: 1, for calculator and translation 0.5
    call_tokens: Annotated[int, "> 0"] = 24        # a call that has not ended after this many tokens is dropped
    call_top: Annotated[int, "> 0"] = 10           # when writing, a call may begin if its token is among this many most
                                                   # probable tokens; the paper: 10
    texts_at_once: Annotated[int, "> 0"] = 8       # texts that are annotated together
    annotate_with: list[str] = field(default_factory=list)  # names of the tools whose calls are tried; empty: all


OPEN, ARROW, CLOSE = " [", " ->", "]"                  # [calculator(18 + 27) -> 45]
# position: an index into the text's tokens; call: a tools.Call; result: the tool's result in words
Candidate = namedtuple("Candidate", "position call result")


# --------------------------------------------------------------------------- 1. pure functions

def loss_weights(n=5):
    """-> w_0 .. w_{n-1} [n]: the weights fall, and their sum over all t is 1."""
    return (1 - 0.2 * torch.arange(n, dtype=torch.float64)).clamp(min=0) / 3.0  # 1 + .8 + .6 + .4 + .2


def weighted_loss(logp, start):
    """Equation (1): log p of a row [T], prefix included -> L_i in nats; `start` is the index of x_i in the row."""
    following = logp[start:start + 5].double()
    return float(-(loss_weights(len(following)) * following).sum())


def gain(full, nothing, bare):
    """L- - L+ in nats (2): how much a call with its result helps, beyond no call and the call alone. Inputs: L_i."""
    return min(nothing, bare) - full


def best_positions(open_logp, tau_s, k):
    """log p(open) before each token [T] -> the at most k most probable positions with p > tau_s, in the order of the
    text (sec. 2)."""
    p = open_logp.exp().tolist()
    likely = [i for i in range(1, len(p)) if p[i] > tau_s]
    return sorted(sorted(likely, key=lambda i: -p[i])[:k])


def decide(candidates, tau_f):
    """Set "kept", and "why" a call is not kept, in the candidates of one text: keep c if L- - L+ >= tau_f, and if it is
    the best call at its position (sec. 2)."""
    for c in candidates:
        best = c is max((d for d in candidates if d["position"] == c["position"]),
                        key=lambda d: (d["gain"] == d["gain"], d["gain"]))  # nan is no gain
        c["why"] = ("its gain is below tau_f" if not c["gain"] >= tau_f else "another one at this position gains more"
                    if not best else "")
        c["kept"] = not c["why"]


# --------------------------------------------------------------------------- 2. calls in plain text

def ids_of(tokenizer, text):
    """Token ids of a piece of text. Text that looks like a special token is plain text here."""
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]


def opening(tokenizer):
    """The one token that begins a call: " [" if the tokenizer has that token, else "[" without the space."""
    return OPEN if len(ids_of(tokenizer, OPEN)) == 1 else OPEN.strip()


def call_text(call, result=None, start=OPEN):
    """e(c), or e(c, r) with a result: " [calculator(18 + 27) -> 45]". Each argument after the first has its name, so
    that `read_call` can read the text."""
    values = [str(value) if not n else f"{name}={value}" for n, (name, value) in enumerate(call.arguments.items())]
    return f"{start}{call.name}({', '.join(values)})" + (f"{ARROW} {result}" if result is not None else "") + CLOSE


def read_call(text, tools):
    """"calculator(18 + 27)]..." -> Call, or None if the call does not end, or names no tool.

    The brackets hold the required arguments (or the first argument, if none is required), separated by commas. Any
    argument may be given as "name=value", as in Python. If the last required argument is a number, optional arguments
    may follow it. A number holds no comma: 1,000 is refused. Lists and objects cannot be written in this form.
    """
    from tools import Call, _loads  # imported here, so that a copy of this file alone gives the losses
    found = re.match(r"\s*([^\s<>\"(),\[\]]+)\(([^\[\]\n]*?)\)\s*(?:\]|->)", text)
    if not found or found[1] not in tools:
        return None
    parameters = tools[found[1]].parameters
    required, fields = parameters.get("required") or [], parameters.get("properties") or {}
    order = list({**dict.fromkeys(required), **fields})
    if not order or not found[2].strip():
        return None if required or found[2].strip() else Call(found[1], {})
    kinds = {name: field.get("type") for name, field in fields.items()}
    numeric = [name for name, kind in kinds.items()
               if {"integer", "number", "boolean"} & set(kind if isinstance(kind, list) else [kind])]
    anywhere = "|".join(map(re.escape, order))
    # the part before the first name, then name, value, name, value, ...
    parts = re.split(rf"(?:^|,)\s*({anywhere})\s*=(?!=)", found[2])
    named, first = dict(zip(parts[1::2], parts[2::2])), parts[0].rstrip(", ")
    free = [name for name in order if name not in named]
    wanted = [name for name in free if name in required] or free[:1]
    if first.strip():
        if order[0] in named:
            return None  # given twice, by position and by name
        if wanted[-1] in numeric and first.count(",") >= len(wanted):
            if re.search(r"\d,\d{3}\b", first):
                return None
            wanted = free
        named |= zip(wanted, first.split(",", len(wanted) - 1))
    if order[0] not in named:
        return None  # the first argument must be given: call_text writes it without its name

    def typed(name, text):
        with contextlib.suppress(ValueError, RecursionError):  # a bad value stays text; execute says what is wrong
            return _loads(text.lower()) if name in numeric else text
        return text

    def bare(text):
        text = text.strip()
        return text[1:-1] if len(text) > 1 and text[0] == text[-1] and text[0] in "\"'" else text
    return Call(found[1], {name: typed(name, bare(named[name])) for name in order if name in named})


def result_text(result, most=80):
    """A tool's result in a few words; None if the call failed, or if the result is empty or a number that is too long.
    """
    value = result.value
    if not result.ok or value in (None, "", [], {}):
        return None
    if isinstance(value, list):  # the first item found, or a list of plain values
        value = value[0] if isinstance(value[0], (dict, list)) else ", ".join(map(str, value))
    if isinstance(value, dict):
        asked = ("city", "unit") if result.name == "weather" else ()
        value = value["text"] if "text" in value else ", ".join(str(v) for k, v in value.items() if k not in asked)
    if isinstance(value, (int, float)) and len(str(value)) > most:
        return None  # its first digits would be another number
    return re.sub(r"[\[\]\n]+|->", " ", str(value))[:most].strip() or None


def asked_tool(text, tools):
    """The text that the model wrote after OPEN -> (Call or None, the result of the executed call in words or None)."""
    from tools import execute
    call = read_call(text, tools)
    return call, result_text(execute(call, tools)) if call else None


def kept_calls(candidates):
    """The kept candidates of a line of augmented.jsonl."""
    from tools import Call
    return [Candidate(c["position"], Call(**c["call"]), c["result"]) for c in candidates if c["kept"]]


def insert(ids, calls, tokenizer):
    """Insert calls into the ids of a text -> (ids, mask): the text and the calls are trained, the results are not."""
    out, mask, before = [], [], 0
    for position, call, result in sorted(calls, key=lambda c: c.position):
        asked = ids_of(tokenizer, call_text(call, start=opening(tokenizer))[:-len(CLOSE)] + ARROW)
        answered = ids_of(tokenizer, f" {result}{CLOSE}")
        out += ids[before:position] + asked + answered
        mask += [1] * (position - before + len(asked)) + [0] * len(answered)
        before = position
    return out + ids[before:], mask + [1] * (len(ids) - before)


# --------------------------------------------------------------------------- 3. the annotation

def few_shot(tool, tokenizer):
    """The prompt P(x) without x -> (ids before x, ids between x and the annotated form of x)."""
    import data
    task = (f"Add calls to {tool.name} to the text, where they help to complete it. {tool.description} "
            f"A call looks like [{tool.name}(...)].")
    prompt = data.corpus("teacher_prompts.json")["tools"].get(tool.name, {"task": task, "examples": []})
    # Each text begins a line, so that its first word has the same tokens here as in the text alone.
    shots = "".join(f"Text:\n{x}\nWith calls:\n{y}\n\n" for x, y in prompt["examples"])
    return ids_of(tokenizer, f"{prompt['task']}\n\n{shots}Text:\n"), ids_of(tokenizer, "\nWith calls:\n")


def open_logprobs(model, tokenizer, rows, heads, config):
    """log p_i (sec. 2): log p(open | P(x), x_<i) before each token of each text -> one [T] per text. The head of a text
    is its P(x). The value is -inf inside a character, because a text cannot be split there."""
    import toolplay
    open_id, = ids_of(tokenizer, opening(tokenizer))
    whole = [(head + ids, [0] * len(head) + [1] * len(ids)) for head, ids in zip(heads, rows)]
    scored = toolplay.token_logprobs(model, whole, budget=config.micro_tokens * 4, also=(open_id,))["also"]
    out = [scored[n, len(head):len(head) + len(ids), 0] for n, (head, ids) in enumerate(zip(heads, rows))]
    for ids, opens in zip(rows, out):
        opens[inside_characters(tokenizer, ids)] = -torch.inf
    return out


CACHED = 2 ** 15  # limit of a cache's tokens besides the shared prefix; more prompts are sampled group by group


def sample_calls(model, tokenizer, prompts, config, seed):
    """c ~ p(. | P(x), x_<i, open) (sec. 2): rows of ids that end in OPEN -> the text that the model writes after each
    row, until the call ends."""
    import toolplay
    streams, said = [random.Random(f"{seed} {r}") for r in range(len(prompts))], [[] for _ in prompts]
    shared = min((toolplay.common_prefix(prompts[0], prompt) for prompt in prompts), default=0)
    size = CACHED // max([1, *(len(prompt) - shared for prompt in prompts)]) or 1  # prompts at once
    for start in range(0, len(prompts), size):
        alive = list(range(len(prompts)))[start:start + size]
        cache = toolplay.prompt_cache(model, [prompts[r][:-1] for r in alive])
        while alive:
            logits = cache.step([said[r][-1:] or prompts[r][-1:] for r in alive]).float()
            tokens, _ = toolplay.sample(logits, [streams[r].random() for r in alive], 1.0, 1.0)
            for token, r in zip(tokens, alive):
                said[r].append(token)
            going = [n for n, r in enumerate(alive) if len(said[r]) < config.call_tokens
                     and not re.search(r"[\]\n]|->", tokenizer.decode(said[r][-3:]))]
            alive = [alive[n] for n in going]
            cache.keep(going)
    return [tokenizer.decode(ids) for ids in said]


def inside_characters(tokenizer, ids):
    """The token positions that lie inside a character: a byte-level token may hold only a part of a character."""
    text = tokenizer.decode(ids)
    return [] if text.isascii() else [i for i in range(1, len(ids)) if not text.startswith(tokenizer.decode(ids[:i]))]


FUNNEL = ("positions", "sampled", "parsed", "distinct", "executed", "kept")


@torch.no_grad()
def annotate(model, tokenizer, rows, tools, config, seed):
    """Texts as id lists -> (candidates of each text, left-out samples of each text, counts of the funnel).

    A candidate is a call that gave a result: {"position", "offset", "call", "result", "plus", "minus", "gain", "kept",
    "why" it is not kept}. A left-out sample gave none: {"position", "text", "why"}.
    """
    import toolplay
    from tools import execute
    funnel = dict.fromkeys(FUNNEL, 0)
    found, left_out = [[] for _ in rows], [[] for _ in rows]
    # Only the guesses use autocast. The filter decides by differences of losses, so it computes the losses in fp32.
    half = toolplay.autocast(config, model.device)
    for tool in tools.values():
        # 1. where: P(x) holds x once; x follows a second time, and we need p(OPEN) before each of its tokens
        before, between = few_shot(tool, tokenizer)
        heads = [before + ids + between for ids in rows]
        with half:
            opens = open_logprobs(model, tokenizer, rows, heads, config)
        places = [(n, i) for n in range(len(rows)) for i in best_positions(opens[n], config.tau_s, config.positions)]
        funnel["positions"] += len(places)
        # 2. what: m calls at each position
        open_ids = ids_of(tokenizer, opening(tokenizer))
        prompts = [heads[n] + rows[n][:i] + open_ids for n, i in places for _ in range(config.samples)]
        with half:
            written = sample_calls(model, tokenizer, prompts, config, f"{seed} {tool.name}")
        funnel["sampled"] += len(written)
        calls = {}
        for at, text in enumerate(written):
            call, (n, i) = read_call(text, {tool.name: tool}), places[at // config.samples]
            if call:
                funnel["parsed"] += 1
                calls[n, i, call_text(call)] = call
            else:
                left_out[n].append({"position": i, "text": text, "why": f"no call of {tool.name}"})
        # 3. execute
        funnel["distinct"] += len(calls)
        for (n, i, _), call in calls.items():
            outcome = execute(call, {tool.name: tool})
            if (result := result_text(outcome)) is not None:
                funnel["executed"] += 1
                found[n].append(Candidate(i, call, result))
            else:
                left_out[n].append({"position": i, "text": call_text(call).strip(),
                                    "why": outcome.message[:100] or "an empty result"})
    # 4. filter: the loss of the text after nothing, after the call alone, after the call with its result
    units = [(n, c) for n, candidates in enumerate(found) for c in candidates]
    scored = losses(model, tokenizer, [(rows[n], c) for n, c in units], config.micro_tokens * 4)
    out = [[] for _ in rows]
    for (n, c), (nothing, bare, full) in zip(units, scored):
        offset = len(tokenizer.decode(rows[n][:c.position]))  # in characters, for data.read_teacher
        out[n].append({"position": c.position, "offset": offset, "call": dict(vars(c.call)), "result": c.result,
                       "plus": full, "minus": min(nothing, bare),
                       "gain": gain(full, nothing, bare)})
    for candidates in out:
        decide(candidates, config.tau_f)
        funnel["kept"] += sum(c["kept"] for c in candidates)
    return out, left_out, funnel


@torch.no_grad()
def losses(model, tokenizer, units, budget):
    """The losses of (2): [(text ids, Candidate)] -> [(L_i of nothing, of e(c), of e(c, r))] in nats. The call always
    comes before the whole text."""
    import toolplay
    if not units:
        return []
    rows = [(prefix + ids[:i + 5], [0] * (len(prefix) + i) + [1] * len(ids[i:i + 5]))
            for ids, (i, call, result) in units
            for prefix in ([], ids_of(tokenizer, call_text(call).lstrip()),
                           ids_of(tokenizer, call_text(call, result).lstrip()))]
    logp = toolplay.token_logprobs(model, rows, budget=budget).cpu()
    found = [weighted_loss(row[:len(ids)], mask.count(0)) for row, (ids, mask) in zip(logp, rows)]
    return list(zip(found[::3], found[1::3], found[2::3]))


# --------------------------------------------------------------------------- 4. texts

def prose(split, n, seed=0):
    """n built-in texts of a split -> [{"text", "kind", "prompt"?, "answer"?}]. A text that computes a
    number has "prompt" and "answer"."""
    import data
    from tools import CORPORA, calculate, weather
    rng, out = random.Random(f"{split} prose {seed}"), []
    share = {"train": range(7), "dev": range(7, 8), "test": range(8, 10)}[split]
    articles = [a for a in data.corpus("search.jsonl")[1:] if zlib.crc32(a["title"].encode()) % 10 in share]
    while len(out) < n:
        kind, words = rng.choices(["calculator", "weather", "search", "plain"], [55, 15, 15, 15])[0], {}
        family = {} if kind == "search" else rng.choice(data.pool("prose.json", kind, split))
        text = rng.choice(family["texts"]) if family else rng.choice(articles)["text"]
        if kind == "calculator":
            values = data.draw_values(family["slots"], split, rng)
            if values is None or not all(data.holds(test, values) for test in family.get("where", [])):
                continue
            words = {k: str(v) for k, v in values.items()}
            answer = calculate(data.fill(family["expression"], words))
            if answer <= 0 or family.get("whole") and answer != int(answer):
                continue
            words["answer"] = str(answer)
        elif kind == "weather":
            city = rng.choice(data.pool("cities.json", "cities", split))["name"]
            told = weather(city, path=CORPORA / "cities.json")  # the city name comes from this file too
            words = {k: str(v) for k, v in told.items()} | {"city": city}
        if kind != "plain" and rng.random() < 0.4:
            text = f'{rng.choice(rng.choice(data.pool("prose.json", "plain", split))["texts"])} {text}'
        asked = ({"prompt": data.fill(text.partition("{answer}")[0].rstrip(), words), "answer": answer}
                 if kind == "calculator" else {})
        out.append({"text": data.fill(text, words), "kind": kind, **asked})
    return out


def read_texts(path, n):
    """The first n texts of a file: JSON lines with "text" (or "question" and "answer", as in GSM8K), or one text per
    line.

    A GSM8K text that ends in its answer also gets "prompt" and "answer", as in `prose`, because the model can be asked
    for this answer. UserError if the file holds no text.
    """
    import data
    from tools import UserError
    if str(path).lower().endswith((".jsonl", ".ndjson", ".json")):
        def check(item):
            item = item if isinstance(item, dict) else {"text": item}
            keys = ["text"] if "text" in item else ["content"] if "content" in item else ["question", "answer"]
            found = [item.get(key) for key in keys]
            if not all(isinstance(text, str) and text.strip() for text in found):
                raise UserError('a line is a text, or an object with "text" (or "content"), '
                                'or with "question" and "answer"')
            text, asked = found[0].strip(), {}
            if len(found) > 1:  # join the lines, drop GSM8K's marks: "5 + 6 = <<5+6=11>>11", and "#### 11" at the end
                text = " ".join(re.sub(r"<<[^<>]*>>|^####.*", "", f"{text}\n{found[1]}", flags=re.MULTILINE).split())
                last = re.search(r"^#### *(-?[\d,]*\d)$", found[1], re.MULTILINE)
                # the text's last number, if it is the answer
                ends = last and re.search(rf"(?<![\d.,]){re.escape(last[1])}(?![\d,]|\.\d)[^\d]*$", text)
                asked = ({"prompt": text[:ends.start()].rstrip(), "answer": int(last[1].replace(",", ""))}
                         if ends and ends.start() else {})
            text.encode()  # fails for half a surrogate pair, which is not text
            return {"text": text, "kind": "text", **asked}
        return data.read_jsonl(path, check)[:n]
    try:
        held = Path(path).read_bytes()
        text = held.decode("utf-16" if held[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
        lines = [line.strip() for line in text.split("\n") if line.strip()]  # not splitlines: \f ends no line
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot read it as text ({error})") from None
    if not lines:
        raise UserError(f"{path}: the file is empty")
    if re.match(r'\{\s*"\w+"\s*:', lines[0]):
        raise UserError(f'{path}: its lines are JSON objects; to have the "text" of each read, '
                        'let its name end in .jsonl')
    return [{"text": line, "kind": "text"} for line in lines[:n]]


# --------------------------------------------------------------------------- 5. with and without tools

@torch.no_grad()
def complete(model, tokenizer, rows, tools, most=16, call_tokens=24, call_top=1):
    """Continue each row of ids greedily -> [(text without calls, calls with results)]. Calls are executed when they are
    written. A call may begin where `open` is among the `call_top` most probable tokens, once per row; tools {}: never.
    """
    import toolplay
    if len(rows) > (size := CACHED // max([1, *map(len, rows)]) or 1):
        return [found for n in range(0, len(rows), size)
                for found in complete(model, tokenizer, rows[n:n + size], tools, most, call_tokens, call_top)]
    open_id, = ids_of(tokenizer, opening(tokenizer))
    end = toolplay.stop_ids(model, tokenizer)
    cache = toolplay.prompt_cache(model, [r[:-1] for r in rows])
    queues, said, calling, calls = [[r[-1]] for r in rows], [[] for _ in rows], [None] * len(rows), [[] for _ in rows]
    begun = [False] * len(rows)  # whether the row has begun a call, complete or not
    alive = list(range(len(rows)))
    while alive:
        logits = cache.step([[queues[r].pop(0)] for r in alive]).float()
        for n, r in enumerate(alive):
            if not queues[r]:
                if not tools or calling[r] is None and begun[r]:
                    logits[n, open_id] = -torch.inf
                may = tools and not begun[r] and int((logits[n] > logits[n, open_id]).sum()) < call_top
                token = open_id if may else int(logits[n].argmax())
                queues[r].append(token)
                if calling[r] is None and token == open_id:
                    calling[r], begun[r] = [], True
                elif calling[r] is None:
                    said[r].append(token)
                else:
                    calling[r].append(token)
                    text = tokenizer.decode(calling[r])
                    if "->" in text:
                        call, result = asked_tool(text, tools)
                        if result is not None:
                            calls[r].append((call, result))
                        queues[r] += ids_of(tokenizer, f" {result or ''}{CLOSE}")
                    if "->" in text or CLOSE in text or len(calling[r]) >= call_tokens:
                        calling[r] = None
        going = [n for n, r in enumerate(alive) if len(said[r]) < most and end.isdisjoint(said[r][-1:])]
        alive = [alive[n] for n in going]
        cache.keep(going)
    return [(tokenizer.decode([t for t in ids if t not in end]), found) for ids, found in zip(said, calls)]


def right_number(text, answer):
    """Whether the first number in a continuation equals the answer."""
    found = re.search(r"-?(?:\d[\d,]*\.?\d*|\.\d+)", text)
    return bool(found) and abs(float(found[0].replace(",", "").rstrip(".")) - answer) <= 1e-6 * max(1, abs(answer))


SURE = 0.05  # the paper's tau_s


@torch.no_grad()
def text_loss(model, tokenizer, rows, tools, config):
    """Mean loss of the texts' own tokens. With tools, the model's best call in each text (p(open) > SURE) is executed
    and inserted first. Unlike `complete`, this function does not use `call_top`: the text is given, so the question is
    where the model itself would put its one call."""
    import toolplay
    pairs = [(ids, [1] * len(ids)) for ids in rows]
    if tools:
        opens = open_logprobs(model, tokenizer, rows, [[]] * len(rows), config)
        places = [(n, i) for n, logp in enumerate(opens) for i in best_positions(logp, SURE, 1)]
        begun = [rows[n][:i] + ids_of(tokenizer, opening(tokenizer)) for n, i in places]
        written = complete(model, tokenizer, begun, {}, most=config.call_tokens) if places else []
        for (n, i), (text, _) in zip(places, written):
            call, result = asked_tool(text, tools)
            if result is not None:
                extra = ids_of(tokenizer, call_text(call, result, opening(tokenizer)))
                pairs[n] = (rows[n][:i] + extra + rows[n][i:], [1] * i + [0] * len(extra) + [1] * (len(rows[n]) - i))
    logp = toolplay.token_logprobs(model, pairs, budget=config.micro_tokens * 4)
    return -float(logp.sum()) / sum(sum(mask[1:]) for _, mask in pairs)


def measure(model, tokenizer, held_out, tools, config):
    """Held-out texts -> {"loss", "loss_with_tools", "right", "right_with_tools" (both None if no text asks for a
    number), "n", "calls"}."""
    rows = [ids_of(tokenizer, item["text"]) for item in held_out]
    asked = [item for item in held_out if "answer" in item]
    out = {"loss": text_loss(model, tokenizer, rows, {}, config),
           "loss_with_tools": text_loss(model, tokenizer, rows, tools, config)}
    prompts = [ids_of(tokenizer, item["prompt"]) for item in asked]
    answers = [complete(model, tokenizer, prompts, allowed, call_tokens=config.call_tokens, call_top=config.call_top)
               if asked else [] for allowed in ({}, tools)]
    for key, said in zip(("right", "right_with_tools"), answers):
        out[key] = (sum(right_number(text, item["answer"]) for (text, _), item in zip(said, asked)) / len(asked)
                    if asked else None)
    return {**out, "n": len(asked), "calls": sum(len(calls) for _, calls in answers[1])}


# --------------------------------------------------------------------------- 6. training

def train(run):
    # Imported here, so that a copy of this file alone gives the losses.
    import data
    import sft
    import toolplay
    from tools import UserError
    config = run.config

    # 1. data: texts, annotated by the model itself; texts that are annotated already are not annotated again
    model, tokenizer = toolplay.prepare_model(config, run.device)
    tools = tools_of(config)
    longest = longest_text(model, tokenizer, tools, config)
    texts = read_texts(config.text, config.texts) if config.text else prose("train", config.texts, config.seed)
    texts = fitting(texts, tokenizer, longest, config, "texts")
    if not texts:
        raise UserError(f"no text has 2 to {longest} tokens (max_tokens = {config.max_tokens}, and the model's context "
                        "holds a text twice behind the examples); write shorter texts, one a line")
    held_out = (read_texts(config.eval_path, config.eval_examples) if config.eval_path
                else prose("test", config.eval_examples, config.seed) if config.eval_examples else [])
    held_out = fitting(held_out, tokenizer, longest, config, "held-out texts")
    annotated = annotated_texts(run, model, tokenizer, texts, tools)
    rows = [insert(line["ids"], kept_calls(line["candidates"]), tokenizer) for line in annotated]
    rows = data.fitting(rows, [len(ids) for ids, _ in rows], config.max_tokens, "texts with their calls")
    if not any(0 in mask for _, mask in rows):
        best = max((c["gain"] for line in annotated for c in line["candidates"]), default=None)
        lower = "" if best is None else f"continue with --resume and a tau_f below {best:.3f}, or "
        raise UserError(f"no call helped in a text that fits max_tokens: nothing to learn from; {lower}"
                        "start a new run (--run_dir=...) with more texts, positions or samples")

    # 2. model: the adapter is trained, as in sft.py
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}

    # 3. optimizer
    batches = data.Batches(rows, config)
    trainer = toolplay.Trainer(config, trained, batches.total)
    if held_out and not (run.resume and toolplay.newest_checkpoint(run.folder)):
        trainer.extra["before"] = json.dumps(measure(model.eval(), tokenizer, held_out, tools, config))
    run.start(trainer, [rows, held_out])

    def loss(batch):
        return sft.sft_loss(toolplay.token_logprobs(model, batch), sft.pad_mask(batch, run.device))

    # 4. loop: the language-model loss of the texts with their calls
    for step in run.steps(trainer, batches.total):
        model.train()
        batch = [rows[i] for i in batches(step)]
        # nothing predicts the first token, so it has no loss
        info = toolplay.train_step(trainer, batch, loss, size=lambda row: sum(row[1][1:]))
        info.pop("tokens", None)
        if held_out and trainer.step >= batches.total:
            after = measure(model.eval(), tokenizer, held_out, tools, config)
            info.update({f"eval_{k}": v for k, v in after.items() if v is not None})
            if run.rank == 0:
                before = json.loads(trainer.extra["before"]) if "before" in trainer.extra else None
                toolplay.write_json(run.folder / "teacher.json", {"before": before, "after": after})
        run.log(trainer.step, info, tokens=sum(len(ids) for ids, _ in batch))

    # 5. save
    run.save_model(model, tokenizer)
    run.finish()


def tools_of(config):
    """{name: Tool} of the tools whose calls are tried."""
    from data import BUILTIN
    from tools import UserError, load_tools
    tools = {**BUILTIN, **load_tools(config.tools)}
    if unknown := [name for name in config.annotate_with if name not in tools]:
        raise UserError(f"annotate_with: there is no tool {unknown[0]!r}; there are {', '.join(tools)}")
    return {name: tools[name] for name in config.annotate_with or tools}


def longest_text(model, tokenizer, tools, config):
    """How many tokens a text may have: at most max_tokens, and P(x), x and a call must fit the model's context."""
    import toolplay
    from tools import UserError
    if len(ids_of(tokenizer, opening(tokenizer))) != 1:
        raise UserError(f"{config.model}: calls begin with {opening(tokenizer)!r}, which is not one token of its "
                        "tokenizer; use another model")
    around = max(sum(map(len, few_shot(tool, tokenizer))) for tool in tools.values())
    return max(min(config.max_tokens, (toolplay.context_of(model) - around - 2 * config.call_tokens) // 2), 0)


def fitting(texts, tokenizer, longest, config, what):
    """The texts of 2 to `longest` tokens. Prints how many are left out."""
    import data
    sized = [(text, n) for text in texts if (n := len(ids_of(tokenizer, text["text"]))) > 1]
    if len(sized) < len(texts):
        print(f"{len(texts) - len(sized)} of {len(texts)} {what} are one token long, have no loss and are left out",
              file=sys.stderr)
    why = "max_tokens" if longest == config.max_tokens else "what fits the model's context twice"
    return data.fitting([text for text, _ in sized], [n for _, n in sized], longest, what, why)


def read_augmented(path):
    """The lines of augmented.jsonl. UserError if a line is damaged."""
    import toolplay
    from tools import UserError
    lines = toolplay.read_lines(path, ["text", "ids", "candidates"])
    for number, line in enumerate(lines, 1):
        keys = {"position", "offset", "call", "result", "gain", "kept"}
        if (not isinstance(line["candidates"], list)
                or not all(isinstance(c, dict) and keys <= set(c) for c in line["candidates"])):
            raise UserError(f"{path}, line {number}: it is damaged")
    return lines


def annotated_texts(run, model, tokenizer, texts, tools):
    """The lines of augmented.jsonl, one per text, made now or before an interruption of the run: {"text", "kind",
    "ids", "candidates", "left_out", "augmented"}."""
    from tqdm import tqdm

    import toolplay
    from tools import UserError
    config, path, n = run.config, run.folder / "augmented.jsonl", run.config.texts_at_once
    lines = toolplay.gathered(read_augmented(path)[:len(texts)])[0]
    if len(lines) < len(texts):
        del lines[len(lines) // n * n:]  # keep whole groups only: a killed run may have left a part of a group
    if any(line["text"] != item["text"] for line, item in zip(lines, texts)):
        raise UserError(f"{path}: it belongs to other texts; start a new run")

    def augmented(line):
        return {**line,
                "augmented": tokenizer.decode(insert(line["ids"], kept_calls(line["candidates"]), tokenizer)[0])}

    for start in range(0, len(lines), n):  # tau_f may have changed since
        for at, line in enumerate(lines[start:start + n], start):
            decide(line["candidates"], config.tau_f)
            lines[at] = augmented(line)
        lines[at].get("funnel", {})["kept"] = sum(c["kept"] for line in lines[start:start + n]
                                                  for c in line["candidates"])
    if run.rank == 0:
        toolplay.write_lines(path, lines)
    model.eval()

    def annotated(starts):  # the groups of one rank
        out = []
        for start in starts:
            group = texts[start:start + n]
            ids = [ids_of(tokenizer, item["text"]) for item in group]
            found, left_out, funnel = annotate(model, tokenizer, ids, tools, config, f"{config.seed} {start}")
            out.append([augmented({**item, "ids": row, "candidates": candidates, "left_out": others})
                        for item, row, candidates, others in zip(group, ids, found, left_out)])
            out[-1][-1]["funnel"] = funnel  # the counts of the whole group
        return out
    with tqdm(total=len(texts), initial=len(lines), desc="annotate", unit="text", disable=run.rank != 0,
              dynamic_ncols=True) as bar:
        while len(lines) < len(texts):
            starts = list(range(len(lines), len(texts), n))[:toolplay.world_rank()[1]]
            fresh = [line for group in toolplay.shared_out(starts, annotated) for line in group]
            lines += fresh
            if run.rank == 0:
                with open(path, "a", encoding="utf-8", errors="backslashreplace") as file:
                    file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in fresh)
            bar.update(len(fresh))
    if run.rank == 0:
        print(funnel_text(lines), file=sys.stderr)
    return lines


def funnel_text(lines, n=10):
    """The funnel, the n best and the n worst calls, as text."""
    from tools import printable
    funnel = " -> ".join(f"{sum(line.get('funnel', {}).get(key, 0) for line in lines)} {key}" for key in FUNNEL)
    out = [f"{len(lines)} texts: {funnel}; {sum(any(c['kept'] for c in line['candidates']) for line in lines)} texts "
           "have a call now"]
    every = sorted(((c["gain"], line, c) for line in lines for c in line["candidates"]), key=lambda x: -x[0])
    for title, some in ((f"best {n}", every[:n]), (f"worst {n}", every[n:][-n:])):
        out.append(f"{title} (L- minus L+, in nats):")
        out += [f"  {g:+.2f}  {c['call']['name']}({', '.join(map(str, c['call']['arguments'].values()))}) "
                f"-> {c['result']}   in: {line['text'][:100]}" for g, line, c in some]
    return printable("\n".join(out))


def main(argv=None):
    import toolplay
    from tools import UserError
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] != ["--show"]:
        return toolplay.main(["train", *argv])
    with toolplay.one_line_errors():
        lines = read_augmented(Path(*argv[1:2]) / "augmented.jsonl")
        if not lines:
            raise UserError(f"{''.join(argv[1:2]) or '--show'}: no augmented.jsonl; "
                            "name a teacher run that has begun: python teacher.py --show RUN")
        print(funnel_text(lines))


if __name__ == "__main__":
    main()
