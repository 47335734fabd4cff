"""
data.py - from conversations to token ids and the one mask

The idea. A training example is `(ids, mask)`: mask is 1 exactly on the tokens that the model chose, or should have
chosen (its calls, its answers, its end-of-turn token), and 0 on all tokens that it only reads (system prompt, user,
tool results). SFT, DPO, PPO and the teacher all train under this mask; they only add weights or train fewer tokens.
Each piece is tokenised alone and the ids are concatenated. The whole text is never re-tokenised, because a tokenizer
may merge two pieces at their seam into a token that was never sampled.

    <|im_start|>system ... <|im_end|>\n <|im_start|>user\n 17 * 23? <|im_end|>\n <|im_start|>assistant\n   mask 0
    <tool_call>{"name": "calculator", "arguments": {"expression": "17 * 23"}}</tool_call><|im_end|>        mask 1
    \n <|im_start|>tool\n <tool_response>{"result": 391}</tool_response><|im_end|>\n <|im_start|>assistant\n   mask 0
    17 * 23 is 391.<|im_end|>                                                                              mask 1

Sources of examples: written templates that a small paraphrasing engine varies (the engine is in this file, the
wording in configs/corpora/), synthetic functions, JSONL files of conversations, ToolBench, and a teacher. A
conversation has the form that is common in the field:
`{"messages": [{"role", "content", "tool_calls"?}, ...], "tools": [names or OpenAI schemas]}`.

Splits are by phrasing family and by value, never by row: train, dev and test share no template, no city, no entity that
is asked for and no pair of numbers drawn for a template (constants such as the 100 of percent occur in all splits;
synthetic functions are split by domain instead). A model that has memorised templates gains little on `test`.

    python data.py --show 20                    examples with the trained tokens coloured
    python data.py --split test --n 500 --out test.jsonl
"""

import argparse
import ast
import contextlib
import functools
import glob
import hashlib
import itertools
import json
import os
import random
import re
import sys
import zlib
from collections import Counter
from pathlib import Path

from tools import (BUILTIN, CORPORA, MAX_CALL, SURROGATE, Call, Result, UserError, _given, _loads, _problems,
                   calculate, check_corpora, execute, format_call, format_result, load_tools, number, one_line_errors,
                   parse_calls, printable, render_tools, tool_from_schema, without_missing)

SYSTEM = "You are a helpful assistant."
TOOL_RULES = ('Call a tool only when it is needed, else just answer. A call looks like this: '
              '<tool_call>{"name": "...", "arguments": {...}}</tool_call>')


# --------------------------------------------------------------------------- 1. conversations -> ids and mask

def system_text(conversation, style="signature"):
    """The system prompt: the conversation's own system message (or a default), then the tools and how to call them."""
    messages, tools = conversation["messages"], conversation.get("tools")
    own = messages[0]["content"] if messages and messages[0]["role"] == "system" else SYSTEM
    return f"{own}\n\nTools:\n{render_tools(load_tools(tools), style)}\n\n{TOOL_RULES}" if tools else own


def turns(conversation, style="signature"):
    """-> [(role, text)]. Calls and results are written in the call grammar; one turn's results form one message."""
    out = [("system", system_text(conversation, style))]
    for message in conversation["messages"]:
        role, text = message["role"], message.get("content") or ""
        if role == "assistant":
            calls = [format_call(Call(c["name"], c["arguments"])) for c in message.get("tool_calls") or []]
            text = "\n".join([text] * bool(text) + calls)
        elif role == "tool":
            marked = re.fullmatch(r"\s*<tool_response>(.*)</tool_response>\s*", text, re.DOTALL)
            texts = re.split(r"</tool_response>\s*<tool_response>", marked[1]) if marked else [text]
            texts = [text.replace("<", "\\u003c") for text in texts]  # no tag can be forged
            text = "\n".join(f"<tool_response>{text}</tool_response>" for text in texts)
            if out[-1][0] == "tool":
                out[-1] = ("tool", f"{out[-1][1]}\n{text}")
                continue
        if role != "system":
            out.append((role, text))
    return out


def is_chatml(tokenizer):
    """Whether a tokenizer has ChatML's tokens, and its chat template (if it has one) lays out turns with these tokens
    as `pieces` does. (Phi-4 and InternLM have ChatML's tokens, but another layout.) The text of the system turn may
    differ."""
    # not get_vocab(), which would build a dict of the whole vocabulary
    ids = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    if {None, tokenizer.unk_token_id} & set(ids):
        return False
    text = example_of(tokenizer, str(tokenizer.chat_template)) if tokenizer.chat_template else None
    return (text is None or text.startswith("<|im_start|>")
            and text.endswith("<|im_end|>\n<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\n"))


@functools.lru_cache(16)
def example_of(tokenizer, template):
    """Example turns in the template's layout: system and user, or user alone, or "" if the template refuses both.
    `template` is only the key of the cache."""
    for chat in ([{"role": "system", "content": "S"}, {"role": "user", "content": "U"}],
                 [{"role": "user", "content": "U"}]):
        with contextlib.suppress(Exception):  # templates may raise anything
            return tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    return ""


@functools.lru_cache(16)
def plain_tags(tokenizer, template):
    """Tags of a template that may be plain text to the tokenizer: [INST], Zephyr's <|user|>."""
    return set(re.findall(r"<{1,2}/?\|?\w+\|?>{1,2}|\[/?[A-Z_]{2,}\]",
                          template + example_of(tokenizer, template))) - set(GRAMMAR)


def end_of_turn(tokenizer):
    """The id that ends an assistant turn: the last id of the turn in the template's layout if it is a special or added
    token, else the tokenizer's eos token."""
    last = [ids[-1] for ids, trained in pieces([("system", SYSTEM), ("user", "."), ("assistant", ".")], tokenizer)
            if trained][-1]
    return last if is_token_of_its_own(last, tokenizer) else tokenizer.eos_token_id


def is_token_of_its_own(id_, tokenizer):
    return id_ in tokenizer.all_special_ids or id_ in tokenizer.added_tokens_decoder


def ids_behind(before, text, tokenizer, **how):
    """The ids of a text that follows the text `before`. A SentencePiece tokenizer puts a space before the start of any
    text. It gets the end of `before` as well, so that it adds no space."""
    ids = lambda text: tokenizer(text, add_special_tokens=False, **how)["input_ids"]  # noqa: E731
    if not before or not blank_first(tokenizer):
        return ids(text)
    added = [token.content for token in tokenizer.added_tokens_decoder.values()]
    head = next(filter(before.endswith, added), before[-1])
    behind, whole = ids(head), ids(head + text)
    return whole[len(behind):] if whole[:len(behind)] == behind else ids(text)


@functools.lru_cache(16)
def blank_first(tokenizer):
    return "".join(tokenizer.tokenize("a")).startswith("▁")


def pieces(messages, tokenizer, generation=False):
    """[(role, text)] -> [(ids, trained)]; the concatenated ids are the sequence.

    With `generation`, the header of one more assistant turn follows. ChatML is written out here. For any other model,
    its own chat template is rendered for each prefix of the turns, and each difference is tokenised alone.
    """
    if not is_chatml(tokenizer):
        return _template_pieces(messages, tokenizer, generation)
    start, end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    # "<|im_end|>" typed by a user or returned by a tool stays text and ends no turn: split_special_tokens does this for
    # special tokens; tags that are only added tokens are encoded in two parts.
    def plain(text):
        parts = re.split(r"(?<=<)(?=\|im_(?:start|end)\|>)", text)
        return [i for before, part in zip(["\n", *parts], parts)
                for i in ids_behind(before, part, tokenizer, split_special_tokens=True)]
    header = lambda role: [start] + ids_behind("<|im_start|>", role + "\n", tokenizer)  # noqa: E731
    newline, out = ids_behind("<|im_end|>", "\n", tokenizer), []
    for role, text in messages:
        out += [(header(role), 0), (plain(text) + [end], int(role == "assistant")), (newline, 0)]
    return out + [(header("assistant"), 0)] * generation


GRAMMAR = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")


def without_tags(messages, tokenizer):
    """[(role, text)] -> messages. If a text contains a token or tag of the template's layout, a zero-width space breaks
    it, so that it does not become the real token."""
    template = str(tokenizer.chat_template)
    # Special tokens, and added tokens that the template uses for its layout. Not included: words and newlines that
    # happen to be added tokens, and the call grammar.
    layout = [token.content for token in tokenizer.added_tokens_decoder.values() if token.content not in GRAMMAR
              and (token.special or token.content.strip() and token.content in template)]
    # plain-text tags are broken in all texts except the model's own
    tags = plain_tags(tokenizer, template) - set(layout)
    chat = []
    for role, text in messages:
        for token in sorted(layout if role == "assistant" else [*layout, *tags], key=len, reverse=True):
            text = text.replace(token, token[0] + "\u200b" + token[1:])
        chat.append({"role": "user" if role == "tool" else role, "content": text})
    return chat


class ChatTemplate:
    """Finds where the turns of a tokenizer's chat template begin and end, only from the texts that it renders."""

    def __init__(self, tokenizer):
        if not tokenizer.chat_template:
            raise UserError("the tokenizer has no chat template and is not ChatML: use an instruction-tuned model, "
                            "or set tokenizer.chat_template")
        self.tokenizer = tokenizer

    def render(self, turns, header=False):
        try:
            return self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=header)
        except Exception as error:  # templates may raise anything
            raise UserError(f"the tokenizer's chat template refuses the turns {', '.join(m['role'] for m in turns)} "
                            f"({str(error)[:80]})") from None

    def opened(self, chat):
        """-> (the chat in a form that this template can show, how many of its turns form the first piece). Some
        templates refuse a lone system message, or fold it into the first user turn."""
        first, shown = 1 + any(m["role"] == "user" for m in chat[1:2]), None
        with contextlib.suppress(UserError):
            shown = self.render([*chat[:first], {"role": "assistant", "content": "."}])
        # Many templates refuse a system role (Gemma's), leave it out, or show it only in the last turn (Mistral's).
        # Then the system message joins the first user turn.
        if len(chat) > 1 and (shown is None or chat[0]["content"].strip() not in shown):
            joined = "\n\n".join(m["content"] for m in chat[:first] if m["content"])
            return [{"role": "user", "content": joined}, *chat[first:]], 1
        return chat, first

    def settled(self, turns):
        """The text of the turns, without a final eos token that disappears if the conversation continues (Phi-3's)."""
        text, end = self.render(turns), self.tokenizer.eos_token
        if end and text.endswith(end) and not self.render(turns, header=True).startswith(text):
            return text.removesuffix(end)
        return text

    def begun(self, turns):
        """The text of the turns, and the text that any answer to them begins with."""
        return os.path.commonprefix([self.render([*turns, {"role": "assistant", "content": x}]) for x in "ab"])

    def asked(self, turns):
        """The text of the turns and the assistant's header. If a template ignores add_generation_prompt, the header is
        the text that any answer begins with."""
        text = self.render(turns, header=True)
        if text == self.render(turns) and (begun := self.begun(turns)).startswith(text) and begun[len(text):].strip():
            return begun
        return text

    def opening(self, turns, after):
        """The text of the turns and the header of the next assistant turn, as far as `after` contains the header (a
        thinking model's template opens a thought there)."""
        text = self.asked(turns)
        return text if after.startswith(text) else os.path.commonprefix([self.begun(turns), text, after])


def _behind(before, text):
    """The part of `text` after the earlier turns `before`."""
    if not text.startswith(before):
        raise UserError("this chat template rewrites earlier turns, so that turns cannot be told apart; "
                        "use a ChatML model or a simpler template")
    return text[len(before):]


def _template_pieces(messages, tokenizer, generation):
    template = ChatTemplate(tokenizer)
    chat, first = template.opened(without_tags(messages, tokenizer))
    ids = functools.partial(ids_behind, tokenizer=tokenizer)
    before = template.settled(chat[:first])
    out = [(ids("", before), 0)]
    for i in range(first, len(chat)):
        after = template.settled(chat[:i + 1])
        if chat[i]["role"] == "assistant":
            header = template.opening(chat[:i], after)
            body = _behind(header, after)
            if chat[i]["content"].strip() not in body:
                raise UserError("this chat template does not show an assistant's text as it is "
                                f"({chat[i]['content'].strip()[:40]!r}), so it cannot be trained")
            words = body.rstrip("\n ")  # whitespace after the end-of-turn token is layout
            said = ids(header, words)
            if said and tokenizer.eos_token_id is not None and (
                    not is_token_of_its_own(said[-1], tokenizer) or tokenizer.decode(said[-1:]).strip() in GRAMMAR):
                # a template without an end-of-turn token: without eos the model would never learn to stop
                said.append(tokenizer.eos_token_id)
            out += [(ids(before, _behind(before, header)), 0), (said, 1), (ids(words, body[len(words):]), 0)]
        else:
            out.append((ids(before, _behind(before, after)), 0))
        before = after
    if generation:  # the header that answers have in training, which may open no thought although the template does
        header = template.opening(chat, template.settled([*chat, {"role": "assistant", "content": "."}]))
        out.append((ids(before, _behind(before, header)), 0))
    return out


def encode(conversation, tokenizer, style="signature", generation=False):
    """Conversation -> (ids, mask), two lists of equal length T; mask is 1 on the model's own tokens.

    With `generation` the assistant's header is appended: the prompt for the next turn.
    Raises UserError when the conversation is malformed.
    """
    conversation = check_conversation(conversation)
    # "weight": 0, as in OpenAI's format, marks a turn that is not trained
    weights = iter([m.get("weight", 1) for m in conversation["messages"] if m["role"] == "assistant"])
    parts = [(ids, trained and next(weights, 1))
             for ids, trained in pieces(turns(conversation, style), tokenizer, generation)]
    return [i for ids, _ in parts for i in ids], [t for ids, t in parts for _ in ids]


def continuation(results, tokenizer):
    """The ids after an assistant turn: its tool results, then the header of the next turn. All have mask 0."""
    parts = pieces([("system", SYSTEM), ("user", "."), ("assistant", "."),
                    ("tool", "\n".join(map(format_result, results)))], tokenizer, generation=True)
    last = max(i for i, (_, trained) in enumerate(parts) if trained)
    return [i for ids, _ in parts[last + 1:] for i in ids]


def messages_of(item, completion=False):
    """The messages of a line that has "messages", or a "prompt"; with `completion` also the line's "completion" (as in
    TRL, each is a text or a list of messages). What an assistant says in a prompt has weight 0."""
    if item.get("messages") is not None or "prompt" not in item:
        return item.get("messages")
    parts = [("user", item["prompt"]), ("assistant", item.get("completion") if completion else None)]
    return [{**message, "weight": 0}
            if role == "user" and isinstance(message, dict) and message.get("role") == "assistant" else message
            for role, part in parts if role == "user" or part is not None
            for message in (part if isinstance(part, list) else [{"role": role, "content": part}])]


def check_conversation(conversation, known=None):
    """Normalise a conversation: tool calls become {"name", "arguments"}, tools become Tools (see load_tools). UserError
    with the reason if the input is no conversation.

    OpenAI's and TRL's spellings are also accepted: content in text parts, the role developer, arguments or tools as
    JSON text, results as objects, `tool_call_id` (results are sorted into the order of their calls), and "prompt" with
    "completion" instead of "messages".
    """
    if isinstance(conversation, dict) and "completion" in conversation:
        conversation = {**conversation, "messages": messages_of(conversation, True)}
    if (not isinstance(conversation, dict) or not isinstance(conversation.get("messages"), list)
            or not conversation["messages"]):
        raise UserError('a conversation is an object with a non-empty list "messages"')
    messages = [_check_message(message, n) for n, message in enumerate(conversation["messages"])]
    if late := [n for n, message in enumerate(messages) if n and message["role"] == "system"]:
        raise UserError(f"message {late[0]}: a system message can only be the first")
    tools = load_tools(offered_in(conversation) or [], known)
    for call in (call for message in messages for call in message.get("tool_calls", ()) if call["name"] in tools):
        # datasets with one type for all lines store null for what a line does not have
        call["arguments"] = without_missing(call["arguments"], tools[call["name"]].parameters, unknown=True)
    checked = {**conversation, "messages": _in_call_order(messages), "tools": list(tools.values())}
    try:
        "".join(text for _, text in turns(checked)).encode()
    except (ValueError, RecursionError) as error:  # NaN, half a surrogate pair: a prompt cannot contain them
        raise UserError(f"it cannot be written as text ({error})") from None
    return checked


def _check_message(message, n):
    roles = ("system", "developer", "user", "assistant", "tool", "function")
    if not isinstance(message, dict) or message.get("role") not in roles:
        raise UserError(f'message {n}: "role" must be system, user, assistant or tool')
    role = {"developer": "system", "function": "tool"}.get(message["role"], message["role"])
    content, calls = message.get("content"), message.get("tool_calls") or []
    if not calls and isinstance(message.get("function_call"), dict):  # OpenAI's first format
        calls = [message["function_call"]]
    if message.get("weight") not in (None, 0, 1) or message.get("weight") == 0 and role != "assistant":
        raise UserError(f'message {n}: "weight" is 0 or 1, of an assistant message')
    parts = isinstance(content, list) and all(isinstance(part, dict) and isinstance(part.get("text"), str)
                                              for part in content)
    # a list in a tool message may itself be the result
    if parts and (role != "tool" or content and all(part.get("type") == "text" for part in content)):
        content = "".join(part["text"] for part in content)
    if role == "tool" and not isinstance(content, str):
        content = json.dumps(content, ensure_ascii=False)
    if content is None and not calls or not isinstance(content, (str, type(None))):
        other = isinstance(content, list) and next((str(part.get("type"))[:20]
                                                    for part in content if isinstance(part, dict)
                                                    and part.get("type") != "text"), None)
        fault = ("is missing" if content is None
                 else f"holds a part of type {other!r}; only text can be read" if other else "must be a string")
        raise UserError(f'message {n}: "content" {fault}')
    if not isinstance(calls, list) or calls and role != "assistant":
        raise UserError(f'message {n}: "tool_calls" is a list in an assistant message')
    clean = {"role": role, "content": content or "", "id": message.get("tool_call_id"),
             **({"weight": 0} if message.get("weight") == 0 else {})}
    if calls:
        clean |= {"tool_calls": [_check_call(call, n) for call in calls], "ids": [call.get("id") for call in calls]}
    return clean


def calls_of(message):
    """The calls of a message, each {"name", "arguments"}; an assistant may also have written them into its text."""
    if message["role"] != "assistant" or message.get("tool_calls"):
        return message.get("tool_calls") or []
    return [{"name": call.name, "arguments": call.arguments} for call in parse_calls(message.get("content"))[0]]


def _in_call_order(messages):
    """Sort tool results that name their calls into the order of the calls, and remove the ids."""
    for n, message in enumerate(messages):
        ids = message.get("ids", [])
        results = list(itertools.takewhile(lambda m: m["role"] == "tool", messages[n + 1:]))
        order, answered = list(map(str, ids)), [str(m["id"]) for m in results]
        if ids and results and len(set(order)) == len(order) and None not in [*ids, *(m["id"] for m in results)]:
            if sorted(answered) != sorted(order):
                raise UserError(f"message {n}: its calls have the ids {', '.join(order)[:80]}, "
                                f"but the results after it answer {', '.join(answered)[:80]}")
            messages[n + 1:n + 1 + len(ids)] = sorted(results, key=lambda m: order.index(str(m["id"])))
    return [{key: value for key, value in m.items() if key not in ("id", "ids")} for m in messages]


def without_function(schema):
    """A tool schema from a data file (or its JSON text), without its "function" path: data must never decide which code
    is imported."""
    with contextlib.suppress(ValueError):  # load_tools reports a text that is not JSON
        schema = json.loads(schema) if isinstance(schema, str) and schema.lstrip().startswith("{") else schema
    if not isinstance(schema, dict):
        return schema
    inner = schema.get("function")
    return ({**schema, "function": without_function(inner)} if isinstance(inner, dict)
            else {k: v for k, v in schema.items() if k != "function"})


def _check_call(call, n):
    call = call.get("function") or call if isinstance(call, dict) else {}
    arguments = call.get("arguments") if isinstance(call, dict) else None
    with contextlib.suppress(ValueError, RecursionError):
        arguments = _given(arguments)
    if (not isinstance(call, dict) or not isinstance(call.get("name"), str) or not call["name"].strip()
            or not isinstance(arguments, dict)):
        raise UserError(f'message {n}: a tool call needs "name" (a string) and "arguments" (an object, '
                        'or its JSON text)')
    return {"name": call["name"], "arguments": arguments}


def read_jsonl(path, check=check_conversation):
    """Read a JSONL file of conversations. Bad lines are reported by number and skipped. A file without a good line is
    an error."""
    good, bad, unit = [], [], "line"
    try:
        lines = Path(path).read_bytes().splitlines()
    except OSError as error:
        raise UserError(f"{path}: cannot read it ({error.strerror})") from None
    with contextlib.suppress(ValueError, RecursionError):  # a text that is not one JSON value is read as lines
        if isinstance(items := json.loads(b"\n".join(lines).decode("utf-8-sig")), list):
            lines, unit = [json.dumps(item).encode() for item in items], "item"
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            item = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            if isinstance(item, dict) and set(item) == {"comment"}:
                continue
            good.append(check(item))
        except (ValueError, RecursionError) as error:  # UserError, bad JSON and bad UTF-8 are all ValueErrors
            bad.append(number)
            if len(bad) <= 20:
                print(printable(f"{path}, {unit} {number}: {error or type(error).__name__}; skipped"), file=sys.stderr)
    if more := bad[20:]:
        runs = [[n for _, n in run] for _, run in itertools.groupby(enumerate(more), lambda x: x[1] - x[0])]
        listed = ", ".join(f"{run[0]}-{run[-1]}" if run[1:] else str(run[0]) for run in runs)
        print(f"{path}: and {len(more)} more {unit}s skipped: {listed}", file=sys.stderr)
    if not good:
        raise UserError(f"{path}: no usable line ({len(bad)} bad)" if bad else f"{path}: the file is empty")
    return good


# --------------------------------------------------------------------------- 2. numbers and words

ONES = ("zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
        "seventeen eighteen nineteen").split()
TENS = "_ _ twenty thirty forty fifty sixty seventy eighty ninety".split()


def number_words(n):
    """342 -> 'three hundred and forty-two', 1005 -> 'one thousand and five', for 0 <= n < 10**9."""
    if n < 20:
        return ONES[n]
    if n < 100:
        return TENS[n // 10] + (f"-{ONES[n % 10]}" if n % 10 else "")
    for size, name in ((10 ** 6, "million"), (1000, "thousand"), (100, "hundred")):
        if n >= size:
            return (f"{number_words(n // size)} {name}"
                    + (f"{' and ' if n % size < 100 else ' '}{number_words(n % size)}" if n % size else ""))


NUMBER = r"\d{1,3}(?:,\d{3})+(?!,?\d)(?:\.\d+)?|\d+(?:\.\d*)?(?:e[-+]?\d+)?|\.\d+"  # with or without commas


SCALES = {"hundred": 100, "thousand": 1000, "million": 10 ** 6}


def numbers_in(text):
    """-> list of the numbers in a text, in digits or in words ("one thousand and seven", 57k), as often as they
    occur."""
    alone = {"half": (2, 0.5), "third": (3,), "quarter": (4, 0.25), "quarters": (4, 0.25, 0.75), "thirds": (3,),
             "twice": (2,), "double": (2,), "triple": (3,), "dozen": (12,)}
    small = {**{word: n for n, word in enumerate(ONES)}, **{word: 10 * n for n, word in enumerate(TENS)}}
    # total, current: of a number in words, its finished thousands and the part after them
    found, total, current, before = [], 0, None, ""
    text = re.sub(r"(?<=\d)(k|m)\b", lambda m: {"k": " thousand", "m": " million"}[m[1]], str(text).lower())  # 57k
    for word in [*re.findall(NUMBER + r"|[a-z]+|(?<!thousand),", text, re.ASCII), ""]:
        if word in SCALES and before[:1].isdigit():
            found.append(found[-1] * SCALES[word])
        elif word == "hundred" and current and current > 100:  # "three hundred and one hundred" are two numbers
            found.append(float(total + current - current % 100))
            total, current = 0, 100 * (current % 100)
        elif word in SCALES and (current or before == "a"):
            current = (current or 1) * SCALES[word]
            if word != "hundred":
                total, current = total + current, None
        elif word in small and (not current or current % 100 == 0 or small[word] < 10 and current % 10 == 0
                                and current % 100 > 10):
            current = (current or 0) + small[word]
        elif word != "and" or before not in SCALES:  # the number ends here, and the next may begin
            found += [float(x) for x in [(current or 0) + total] if x]
            total, current = 0, small.get(word)
            found += map(float, [word.replace(",", "")] if word[:1] in tuple("0123456789.") else alone.get(word, ()))
            # two dozen, two and a half
            if word == "dozen" and len(found) > 1 or word == "half" and before == "a" and len(found) > 2:
                found.append(12 * found[-2] if word == "dozen" else found[-3] + 0.5)
        before = word
    # 3/4 of them
    return found + [int(a) / int(b) for a, b in re.findall(r"(?<![\d./])(\d{1,2})/(\d{1,2})(?![\d./])", text, re.ASCII)
                    if 0 < int(a) < int(b)]


MONTHS = "January February March April May June July August September October November December".split()
HOURS = {**{words: n for n in range(24) for words in (str(n), f"{n:02}")}, **{number_words(n): n for n in range(1, 13)},
         "noon": 12, "midday": 12, "midnight": 0}
MINUTES = {**{words: n for n in range(60) for words in (str(n), f"{n:02}", number_words(n))}, "quarter": 15, "half": 30}


@functools.lru_cache(1)
def _moments():
    """Patterns of dates and times. An earlier one takes its text from the later ones."""
    month, hour, minute = ("|".join(sorted(words, key=len, reverse=True)) for words in (
        [*MONTHS, *(name[:3] for name in MONTHS), "Sept"], HOURS, MINUTES))
    day, year = r"(?P<day>\d{1,2})(?:st|nd|rd|th)?\b", r"(?:,? (?P<year>\d{4})\b)?"
    hour = rf"(?P<hour>{hour})(?=h\d|[ap]\.?m\b|\b)"
    part = r"(?: ?(?P<half>[ap])\.?m\b\.?|,? (?:in the |this |at )?(?P<part>morning|afternoon|evening|night|tonight)\b)"
    return [re.compile(r"(?:(?<![\w.,:/-])|(?<=\d-))" + pattern, re.IGNORECASE | re.ASCII) for pattern in (
        r"(?P<year>\d{4})-(?P<month>\d{1,2})-(?P<day>\d{1,2})(?![\w-])",
        r"(?P<month>\d{1,2})(?P<slashes>/)(?P<day>\d{1,2})/(?P<year>\d{4})(?![\w/])",
        rf"{day} (?:of )?(?P<month>{month})\b\.?{year}", rf"(?P<month>{month})\b\.? (?:the )?{day}{year}",
        rf"(?P<minutes>quarter|half|five|ten|twenty(?:-five)?|(?:{minute})(?= minute))(?: minutes?)? "
        rf"(?P<side>past|after|to|before) {hour}(?: o'clock)?{part}?",
        rf"{hour}[:h](?P<minutes>[0-5]\d)(?::[0-5]\d)?(?:{part}|(?![\w:]))", rf"{hour}\.(?P<minutes>[0-5]\d){part}",
        rf"{hour}(?= ?(?:-|to|and|until) ?\d{{1,2}}(?: ?[ap]\.?m\b| o'clock))",  # 2 to 4 pm
        rf"{hour} (?P<minutes>{minute}){part}", rf"{hour} o'clock{part}?", rf"{hour}{part}",
        r"(?P<hour>noon|midday|midnight)\b",
        rf"(?:at|by|until|till|before|after|around|from) (?=\d){hour}(?![\w:/]| ?[%°]|[.,]\d)")]


def moments_in(text):
    """The dates and times of day in a text -> [(position, as it is written, set of its readings)], in order.

    A reading is "2027-10-01", "10-01" if no year is stated, or "19:30". "half past seven" has two readings.
    """
    found = {}  # {start: (text, readings)}

    def take(match):
        said = {key: value and value.lower() for key, value in match.groupdict().items()}
        if readings := _dates(**said) if "day" in said else _times(**said):
            found[match.start()] = match[0], readings
        return " " * len(match[0])

    for pattern in _moments():
        text = pattern.sub(take, text)
    return [(start, *found[start]) for start in sorted(found)]


def _dates(day, month, year, slashes=None):
    number = int(month) if month.isdigit() else 1 + [name[:3].lower() for name in MONTHS].index(month[:3])
    pairs = {(number, int(day)), (int(day), number) if slashes else (number, int(day))}
    return {(f"{year}-" if year else "") + f"{m:02}-{d:02}" for m, d in pairs if 1 <= m <= 12 and 1 <= d <= 31}


def _times(hour, minutes="0", side=None, half=None, part=None):
    """hour, minutes, part of the day: as they are written; half: "a" or "p"."""
    time, late = 60 * HOURS[hour] + MINUTES[minutes] * (-1 if side in ("to", "before") else 1), 0
    if HOURS[hour] <= 12 and (half or part):
        time %= 720
        late = 720 * (half == "p" or part in ("afternoon", "evening") or part in ("night", "tonight") and time >= 300)
    times = {time + late}
    if not (half or part) and 0 < HOURS[hour] <= 12 and hour[0] != "0" and hour not in ("noon", "midday"):
        times.add(time + 720)
    return {f"{t // 60 % 24:02}:{t % 60:02}" for t in times}


# These rules assign each pair of numbers to a split, without a list of pairs. A hash gives every number one of nine
# colours. A pair of two colours belongs to train; a pair of one colour belongs to dev (colours 0 to 3) or test (4 to
# 8). So 17 * 23 occurs in one split only. A number that is drawn alone belongs to the split of its own colour (ALONE).
# If dev or test draws two or more numbers, none of them is a larger constant (CONSTANTS).
COLOURS, ALONE = {"dev": range(4), "test": range(4, 9)}, {"dev": [0], "test": [4]}
# constants in the train split's expressions; most small ones are not listed, because they are too common to avoid
CONSTANTS = {1, 24, 52, 60, 100, 365, 501, 1000}
ROUND = (5, 8, 10, 12, 15, 18, 20, 25, 30, 40, 50, 75)  # the percentages that people use most


def colour(value):
    """The colour of a number, one of nine: random but fixed. 4.50, however it is written, has the colour of 45."""
    text = f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)
    return zlib.crc32(text.replace(".", "").encode(), 8) % 9  # with start value 8, every colour has numbers under 13


@functools.lru_cache(maxsize=None)
def taken_pairs():
    """Pairs of numbers in the examples that are written out in full. These examples belong to the train split."""
    numbers = [[float(x.replace(",", "")) for x in re.findall(r"\d[\d,]*(?:\.\d+)?", e["prompt"])]
               for e in corpus("canonical.json")["examples"]]
    return {frozenset(pair) for found in numbers for pair in itertools.combinations(found, 2) if pair[0] != pair[1]}


def constants_of(expression):
    return {float(n) for n in re.findall(r"(?<![\w.])\d+(?:\.\d+)?(?![\w.])", expression)}


@functools.lru_cache(maxsize=None)
def kept_constants():
    """Constants that expressions of dev and test combine with one drawn number. Train does not draw such a constant
    together with a number of dev or test."""
    families = [f for name in ("arithmetic", "everyday", "traps") for split in ALONE
                for f in pool(f"{name}.json", "families", split)]
    return {n for f in families if len(f.get("slots", {})) == 1 for n in constants_of(f.get("expression", ""))}


def draw_values(slots, split, rng, expression=""):
    """One value per slot ('num 2 99', 'money 1 50', ...). Every pair of values belongs to `split`; in train, so does
    every pair of a value and a constant of `expression`. None if no values were found."""
    values, wanted = {}, None if split == "train" or len(slots) < 2 else rng.choice(COLOURS[split])
    constants = {colour(n) for n in constants_of(expression) - CONSTANTS}

    def owner(value):
        return next((name for name, colours in ALONE.items() if colour(value) in colours), "train")

    def fits(value):
        if split == "train" and colour(value) in constants:
            return False
        if len(slots) == 1:
            return owner(value) == split
        if split == "train":
            kept = [float(a) in kept_constants() and owner(b) != "train" for v in values.values()
                    for a, b in ((v, value), (value, v))]
            return colour(value) not in map(colour, values.values()) and not any(kept)
        return (value not in CONSTANTS and colour(value) == wanted and value not in values.values()
                and not any(frozenset((float(value), float(v))) in taken_pairs() for v in values.values()))
    for name, spec in slots.items():
        kind, *bounds = spec.split()
        low, high = map(float, bounds)
        places = {"dec": rng.choice([1, 1, 2]), "money": 2, "pct": rng.choice([0, 0, 0, 0, 0, 1])}.get(kind, 0)
        for _ in range(60):
            value = round(rng.randint(int(low * 10 ** places), int(high * 10 ** places)) / 10 ** places, places or None)
            if kind == "dec" and value.is_integer():
                value = int(value)  # nobody types 27.0
            if (kind == "pct" and split == "train" and rng.random() < 0.4
                    and (common := [x for x in ROUND if low <= x <= high])):
                value = rng.choice(common)
            if kind == "million":
                value = round(round(rng.uniform(low, high), rng.choice([0, 1, 1, 2])) * 10 ** 6)
            # people like round numbers such as 1200, or numbers that are short to say such as 3047
            if kind in ("num", "int", "word", "dollars") and value > 99 and rng.random() < 0.2:
                rounded = (value - value % 1000 + value % 100 if value > 1000 and rng.random() < 0.3
                           else round(value, 2 - len(str(value))))
                value = rounded if low <= rounded <= high else value
            if fits(value):
                values[name] = value
                break
        else:
            return None
    return values


def write_value(value, kind, rng, style=None):
    """A number as a person might type it. `style` (0 to 1) selects one of the ways to write money; all amounts of a
    request have the same style."""
    digits = f"{value:.2f}" if kind == "money" else str(value)
    comma = digits if kind == "year" else f"{value:,}" if kind != "money" else f"{value:,.2f}"
    if kind == "pct":
        # draw the typo here: the engine's typos do not reach words that are written with a number
        slip = rng.choice(corpus("register.json")["typos"]["percent"])
        return digits + rng.choice([*corpus("register.json")["percent"], f" {slip}"])
    if kind == "million":
        return rng.choice([f"{value / 10 ** 6:g} million"] * 3 + [f"{value / 10 ** 6:g}m", comma, digits])
    if kind in ("num", "int", "dollars") and value >= 2000 and value % 100 == 0 and rng.random() < 0.2:
        sign, unit = ("$", "k") if kind == "dollars" else ("", rng.choice(["k", "k", " thousand"]))
        return f"{sign}{value / 1000:g}{unit}"
    if kind in ("money", "dollars"):
        ways, euros = corpus("register.json")["money"], rng.choice(["euros", "euros", "eur"])
        way = ways[int((rng.random() if style is None else style) * len(ways))]
        return fill(way, {"comma": comma, "digits": digits, "word": "bucks" if kind == "dollars" else "USD",
                          "euros": euros})
    if kind == "word" or kind == "int" and rng.random() < 0.2 and value < 10000:
        words = number_words(value)
        if value % 100 == 0 and value % 1000 and value < 10000 and rng.random() < 0.7:
            words = f"{number_words(value // 100)} hundred"  # twelve hundred
        return rng.choice([words, words, words.replace(" and ", " "), words.replace("-", " ")])
    return comma if rng.random() < 0.35 else digits


# --------------------------------------------------------------------------- 3. the paraphrasing engine

@functools.lru_cache(maxsize=None)
def corpus(name):
    """A corpus of configs/corpora by file name, read once."""
    text = (CORPORA / name).read_text(encoding="utf-8")
    try:
        return json.loads(text) if name.endswith(".json") else [json.loads(line)
                                                                for line in text.splitlines() if line.strip()]
    except ValueError as error:
        raise UserError(f"{CORPORA / name}: not valid JSON ({error})") from None


def of_split(items, split):
    return [item for item in items if item["split"] == split]


@functools.lru_cache(maxsize=None)
def pool(name, key, split):
    """The items of a split in the list `key` of a corpus file, filtered once."""
    return of_split(corpus(name)[key], split)


@functools.lru_cache(maxsize=None)
def talks(split):
    """The no-tool messages of a split with their replies. A message is "easy" if it asks nothing that one could look
    up, mentions nothing that tools are for, and is no trap."""
    easy = {k["kind"] for k in corpus("talk_prompts.json")["kinds"] if not (k.get("lookup") or k.get("mentions"))}
    return [{**t, "easy": t["kind"] in easy} for t in of_split(corpus("talk_replies.jsonl")[1:], split)]


def any_name(rng):
    """The name of anything that people search for, from the train split."""
    entities = corpus("search_questions.json")["entities"]
    return rng.choice(of_split(entities[rng.choice(list(entities))], "train"))["name"]


SEVERAL = 0.64  # share of calculation requests that have more than one operation
# share of calculation requests that are written as people say them, "twelve hundred minus eighty-two"
SPOKEN = 0.08
# share of one-operation requests that begin with a number in words, "seventeen times twelve", because the first word of
# a text has other tokens
SAID = 0.2
# Next to a number's slot, these symbols show that an expression is written, not said (in words, "{h}h" would become
# "twoh", and "{a} {b}" "forty two").
SYMBOLS = re.compile(r"\} ?[-−+*/x×÷^²³%=)]|[(√^/] ?\{|\}[A-Za-z\"]|\} \{[a-z]\}")
TOWNS = 0.2  # share of place names, in training, that few people have heard of
# shares of requests with several operations, in training, that are a random formula, or steps in words: people write
# templates for dozens of shapes, but there are thousands
FORMULAS, CHAINS = 0.2, 0.05
# shares of everyday arithmetic, in training, that is generated from parts: "30 a month, over two years?"; "12 eggs cost
# 3.60, one?"
RATES, PRICES = 0.03, 0.03


class Writer:
    """Writes requests in the words of one split. All choices come from `rng`, so the same seed writes the same text."""

    def __init__(self, split, rng):
        self.split, self.rng = split, rng

    def pick(self, name, key):
        """A random item of this split from a list in a corpus file."""
        return self.rng.choice(pool(name, key, self.split))

    def register(self, text, rambling=True):
        """Restyle a template except its slots: openers, closers, context, typos, texting, case, punctuation.

        -> (template, lower): if `lower`, the slots should be written in lower case too.
        """
        rng, style = self.rng, corpus("register.json")
        lower, where = rng.random() < 0.3, rng.random()
        if where < 0.12:
            opener = self.pick("register.json", "openers")["text"]
            text = f"{opener} {text if opener[-1] in '.!?:' else decapitalise(text)}"
        elif where < 0.2 and rambling:
            text = f'{self.pick("register.json", "rambles")["text"]} {text}'
        elif where < 0.24 and rambling:
            text = f'{end_sentence(text)} {self.pick("register.json", "rambles_after")["text"]}'
        elif where < 0.34:
            closer = self.pick("register.json", "closers")["text"]
            text = (f"{text}, {decapitalise(closer)}" if text[-1] not in ".!?=" and rng.random() < 0.5
                    else f"{text} {closer}")
        for table, share, rate in ((style["typos"], 0.08, 0.3), (style["texting"], 0.04, 0.9)):
            if rng.random() < share:
                text = re.sub(r"(?<![{\w'])[A-Za-z]+(?![}\w'])", lambda m: swap_word(m.group(), table, rate, rng), text)
        if lower:
            text = re.sub(r"(\{\w+\})|([^{}]+)", lambda m: m.group(1) or m.group(2).lower(), text)
        if rng.random() < 0.3:
            text = text.rstrip(".?! ")
        if lower and rng.random() < 0.2:
            text = re.sub(r"(?<=\S)[,.?!;](?=\s|$)", "", text)  # not the ? of "3 + ? = 8"
        return text, lower

    def tools(self, needed=(), without=None):
        """The offered tools: mostly all three in one fixed order, so that prompts are shared; else three, two, one
        or none in random order, always including the needed ones. Some offers describe them in other words."""
        names, rng = list(BUILTIN), self.rng
        if without is not None or rng.random() >= 0.55:
            free = [n for n in names if n not in needed and n != without]
            names = list(needed) + rng.sample(free, rng.choices([len(free), max(len(free) - 1, 0), 0], [6, 3, 2])[0])
            rng.shuffle(names)
        if not names or rng.random() >= 0.15:
            return names
        wording = rng.randrange(3)  # full schemas in other words; sorted, so that there are few different prompts
        return [{**BUILTIN[n].schema()["function"], "description": corpus("extra.json")["descriptions"][n][wording]}
                for n in sorted(names)]

    # The methods below write one kind of request each. They return (prompt, calls, the family's id, extra facts about
    # the example), or None if the draw did not fit.

    def calculator_call(self, family, spoken=False):
        """A request from a family with number slots. `spoken`: whole numbers are written as words."""
        slots = family["slots"]
        kinds = {k: slot.split()[0] for k, slot in slots.items()}
        whole = family.get("whole", "steps" in family and set(kinds.values()) <= {"num", "int", "pct", "year", "word"})
        for _ in range(300):
            values = draw_values(slots, self.split, self.rng, family["expression"])
            if values is None or not all(holds(test, values) for test in family.get("where", [])):
                continue
            numbers = {k: f"{v:.2f}" if kinds[k] == "money" else v for k, v in values.items()}
            result = calculate(fill(family["expression"], numbers))
            if (result > 0 or family.get("negative")) and not (whole and result != int(result)):
                break
        else:
            return None
        template, lower = self.register(self.rng.choice(family["texts"]), rambling=len(family["texts"][0]) < 90)
        if spoken and not SYMBOLS.search(template):  # the whole request as people say it
            kinds.update({k: "word" for k, v in values.items() if kinds[k] in ("num", "int") and v < 10000})
        style = self.rng.random()
        written = {k: write_value(v, kinds[k], self.rng, style) for k, v in values.items()}
        expression = fill(in_order(family["expression"], template, slots), numbers)
        prompt = fill(template, {**written, **self.story_words(family, lower)})
        prompt = self.capital(prompt, template, lower) if family.get("said") else prompt
        return prompt, [Call("calculator", {"expression": expression})], family["id"], values

    def capital(self, text, template, lower):
        """The text; if its template begins with a slot, half of the time with a capital first letter."""
        return text[0].upper() + text[1:] if template[0] == "{" and not lower and self.rng.random() < 0.5 else text

    def story_words(self, family, lower):
        stories = corpus("stories_add.json")
        first, second, third = self.rng.sample(stories["names"], 3)
        thing, thing2 = self.rng.sample(stories["things"][family.get("things", "toys")], 2)
        words = {**first, "name2": second["name"], "name3": third["name"], "thing": thing, "thing2": thing2,
                 "city": self.pick("cities.json", "cities")["name"]}
        words |= {key.capitalize(): words[key].capitalize() for key in ("he", "his", "thing")}
        return {k: v.lower() if lower else v for k, v in words.items()}

    def calculation(self, name, wanted=lambda family: True, spoken=0):
        found = [f for f in pool(name, "families", self.split) if wanted(f)]
        # a family's weight: how often people ask for it
        family, = self.rng.choices(found, [f.get("weight", 1) for f in found])
        return self.calculator_call(family, spoken=self.rng.random() < spoken)

    def arithmetic(self):
        """One operation, or several. This choice is drawn first, so that the many wordings of one operation do not
        crowd out the requests for several."""
        several = self.rng.random() < SEVERAL
        made = self.rng.random() if several and self.split == "train" else 1
        if made < FORMULAS + CHAINS:
            return self.calculator_call(self.formula() if made < FORMULAS else self.chain(),
                                        spoken=made > FORMULAS and self.rng.random() < SPOKEN)
        if not several and self.rng.random() < SAID:
            return self.calculator_call(self.said())
        return self.calculation("arithmetic.json", lambda family: (operations(family["expression"]) > 1) == several,
                                SPOKEN)

    def said(self):
        """A family of one operation on two whole numbers, both in words, whose text begins with one of the numbers."""
        family, text = self.rng.choice([(f, text) for f in pool("arithmetic.json", "families", self.split)
                                        if re.fullmatch(r"\{\w+\} [-+*/] \{\w+\}", f["expression"])
                                        and {s.split()[0] for s in f["slots"].values()} <= {"num", "int", "word"}
                                        for text in f["texts"] if text[0] == "{" and not SYMBOLS.search(text)])
        return {**family, "said": True, "texts": [text],
                "slots": {name: self.rng.choice(["word 2 20", "word 11 99", "word 100 1999"])
                          for name in family["slots"]}}

    def formula(self):
        """A generated family: a random formula of two to four operations, written in symbols, in one of many
        sentences."""
        rng, slots = self.rng, {}
        gap, root, square = rng.choice(["", " ", " "]), rng.choice(["sqrt", "√"]), rng.choice(["^2", "²"])
        signs = {"+": "+", "-": rng.choice("--−"), "*": rng.choice("**x×"), "/": rng.choice("//÷")}
        bracket = lambda text, needed: f"({text})" if needed else text  # noqa: E731

        def grow(size, positive=False):
            """-> (expression, the expression as a person writes it, how tightly it binds: 0 a sum, 1 a product, 2 a
            root or square, 3 a number)."""
            if size == 0:
                name = "abcde"[len(slots)]
                slots[name] = rng.choice(["num 2 12", "num 2 99", "num 2 99", "num 20 3000", "dec 1 60"])
                return f"{{{name}}}", f"{{{name}}}", 3
            if rng.random() < 0.2:
                expression, text, tight = grow(size - 1, positive=True)
                if rng.random() < 0.5:
                    return f"sqrt({expression})", root + bracket(text, root == "sqrt" or tight < 3), 2
                return bracket(expression, tight < 3) + " ** 2", bracket(text, tight < 3) + square, 2
            # no root of a value that may be negative, no divisor that may be zero
            sign = rng.choice("+*/" if positive else "+-*/")
            left, tight = rng.randrange(size), int(sign in "*/")
            a, b = grow(left, positive), grow(size - 1 - left, positive or sign == "/")
            a_loose, b_loose = a[2] < tight, b[2] < tight + (sign in "-/")
            return (f"{bracket(a[0], a_loose)} {sign} {bracket(b[0], b_loose)}",
                    bracket(a[1], a_loose) + gap + signs[sign] + gap + bracket(b[1], b_loose), tight)

        expression, text, _ = grow(rng.choice([2, 2, 3, 3, 4]))
        sentence = self.pick("arithmetic.json", "sentences")["text"]
        return {"id": "formula", "expression": expression, "slots": slots, "texts": [fill(sentence, {"f": text})],
                "negative": True}

    def chain(self):
        """A generated family of two or three operations, stated one after the other: "take 340, knock 25 off, then
        halve it"."""
        rng, parts = self.rng, corpus("made_sums.json")
        start, slots = rng.choice(parts["starts"]), {}
        expression, text, tight = start["expression"], start["text"], binding(start["expression"])
        for name in re.findall(r"\{(\w)\}", text):
            slots[name] = ({"p": "pct 2 90"}.get(name)
                           or rng.choice(["num 2 99", "num 20 900", "num 20 900", "num 100 5000", "num 100 5000",
                                          "dec 2 80", "dec 2 80", "million 0.2 40"]))
        for name in "nm"[:rng.choice([1, 2, 2]) if operations(expression) else 2]:
            step = rng.choice(parts["steps"])
            x = expression if tight >= step["tight"] else f"({expression})"
            words = {"x": x, "n": f"{{{name}}}"}
            expression, said = fill(step["expression"], words), fill(rng.choice(step["texts"]), words)
            text, tight = text + rng.choice(parts["links"]) + said, binding(step["expression"])
            if "slot" in step:
                slots[name] = step["slot"]
        text = (text if start.get("noun") else text[0].upper() + text[1:]) + rng.choice(parts["ends"])
        return {"id": "chain", "expression": expression, "slots": slots, "texts": [text], "negative": True,
                "whole": False, "where": [start["where"]] if "where" in start else []}

    def rate(self):
        """A generated family that needs an unstated number: an amount per month is twelve times as much per year."""
        rng, parts = self.rng, corpus("made_sums.json")
        unit = rng.choice(list(parts["rates"].values()))
        context, (goals, expression) = rng.choice(unit["texts"]), rng.choice(unit["goals"])
        extra, more = rng.choice(parts["rate_extras"])
        if "{b}" in extra and ("{m}" not in context or "/" in expression):
            extra, more = "", ""  # a one-time payment fits only an amount of money that is multiplied
        goal = rng.choice(goals.split("|"))
        context = fill(context, {"per": rng.choice(unit["per"])}) + extra
        ask = rng.choice(parts["rate_asks"])
        text = fill(ask, {"context": context if ask.startswith("{context}") else decapitalise(context), "goal": goal})
        slots = {"a": "num 2 400", "m": rng.choice(["money 3 900", "dollars 5 3000"]), "b": "dollars 5 300",
                 "k": "int 2 12", "n": "int 2 9"}
        expression = (expression + more).replace("{a}", "{m}" if "{m}" in context else "{a}")
        return made_family("rate", expression, text, slots)

    def price(self):
        """A generated family about the price of one thing and of several. Either price may be given, so the model must
        decide between multiplying and dividing."""
        rng, parts = self.rng, corpus("made_sums.json")
        kind, (goods, goods2) = rng.choice(parts["prices"]), rng.sample(parts["goods"], 2)
        words = dict(zip(("good", "goods", "good2", "goods2"), (*goods.split("|"), *goods2.split("|"))))
        text = fill(rng.choice(kind["texts"]), words)
        slots = {"m": rng.choice(["money 0.2 30", "money 1 90", "dollars 2 60"]), "n": "int 2 48", "k": "int 2 30",
                 "m2": rng.choice(["money 0.2 30", "dollars 2 60"])}
        slots["m2"] = "dollars 20 900" if kind["expression"].startswith("{m2}") else slots["m2"]
        return made_family("price", kind["expression"], text, slots)

    def sums(self):
        """Two numbers in digits and one of the four operations, each operation equally often."""
        form = r"\{\w+\} [%s] \{\w+\}" % re.escape(self.rng.choice("+-*/"))
        family = self.rng.choice([f for f in pool("arithmetic.json", "families", self.split)
                                  if re.fullmatch(form, f["expression"])])
        return self.calculator_call({**family, "slots": {name: re.sub("^(int|word) ", "num ", slot)
                                                         for name, slot in family["slots"].items()}})

    def everyday(self):
        made = self.rng.random() if self.split == "train" else 1
        if made < RATES + PRICES:
            return self.calculator_call(self.rate() if made < RATES else self.price(),
                                        spoken=self.rng.random() < SPOKEN)
        return self.calculation("everyday.json", spoken=SPOKEN)

    def word_problem(self, steps=None):
        return self.calculation(self.rng.choice(["stories_add.json", "stories_mul.json"]),
                                lambda family: steps in (None, family["steps"]))

    one_step, two_steps = functools.partialmethod(word_problem, 1), functools.partialmethod(word_problem, 2)

    def city(self, towns=TOWNS):
        """A city that people ask for, or (in training only) any town of the world."""
        return self.pick("cities.json", "geonames" if self.split == "train" and self.rng.random() < towns else "cities")

    def place(self, lower, towns=TOWNS):
        city = self.city(towns)
        name = f'{city["name"]}, {city["country"]}' if self.rng.random() < 0.12 else city["name"]
        return name.lower() if lower else name

    def weather(self, wanted=lambda family: True, towns=TOWNS):
        family = self.rng.choice([f for f in pool("weather.json", "families", self.split) if wanted(f)])
        template, lower = self.register(self.rng.choice(family["texts"]))
        # "in oslo rn": the model must learn where the city ends
        if self.split == "train" and re.search(r"\{city\}[?.]?$", template) and self.rng.random() < 0.25:
            closers = [c["text"] for c in pool("register.json", "closers", self.split)
                       if re.fullmatch(r"[a-z']+( [a-z]+)?", c["text"])]
            template = template.rstrip("?.") + " " + self.rng.choice(closers)
        city = self.place(lower, towns)
        if self.split == "train" and self.rng.random() < 0.2:  # no city: the model must copy, not recall
            one, two = (self.city(towns)["name"] for _ in range(2))
            # a word that is one token after a space is several tokens after a quotation mark: the model learns to spell
            if towns and self.rng.random() < 0.3:
                one = re.sub("^(the|an?) ", "", any_name(self.rng))
                city = one[0].upper() + one[1:]
            else:  # half of one name, half of another
                city = (f"{one.split()[0]} {two.split()[-1]}" if " " in one and " " in two
                        else one[:len(one) // 2 + 1] + two[len(two) // 2:].lower())
            city = city.lower() if lower else city
        return self.forecast(family, template, city)

    def forecast(self, family, template, city, **words):
        """A weather request: the template with its city and other words, in the family's unit."""
        arguments = {"city": city, **({"unit": family["unit"]} if family.get("unit") else {})}
        return fill(template, {**words, **arguments}), [Call("weather", arguments)], family["id"], {"city": city}

    # no request for a unit; only cities that people ask for
    skies = functools.partialmethod(weather, lambda family: not family.get("unit"), towns=0)

    def search(self):
        if self.rng.random() < 0.4:
            query, entity, family = self.pick("search_questions.json", "plain")["text"], None, "plain"
        else:
            made = self.pick("search_questions.json", "families")
            entity, family = self.rng.choice(of_split(corpus("search_questions.json")["entities"][made["entity"]],
                                                      self.split))["name"], made["id"]
            query = fill(self.rng.choice(made["texts"]), {"e": entity})
        query = query.rstrip("?. ")
        wrapper = "{q}" if self.rng.random() < 0.6 else self.pick("search_questions.json", "wrappers")["text"]
        if (not re.match(r"(who|whose|what|when|where|which|how|why)\b", query)
                and not re.search(r"(:|search for|look up|find|search on) \{q\}", wrapper)):
            wrapper = "{q}"  # nobody writes "I was wondering height of Everest"
        if wrapper == "{q}" and self.rng.random() < 0.4:
            wrapper = "{q}?"
        template, lower = self.register(wrapper)
        query = query.lower() if lower else query
        shown = self.capital(query, template, lower)
        call = Call("search", {"query": shown if wrapper.startswith("{q}") else query})
        return fill(template, {"q": shown}), [call], family, {"entity": entity}

    def trap(self):
        family = self.pick("traps.json", "families")
        if family["tool"] == "calculator":
            return self.calculator_call(family)
        if family["tool"] == "search":
            item = self.rng.choice(family["items"])
            template, lower = self.register("{q}?" if item["text"][-1] == "?" else "{q}")
            text, query = (x.lower() if lower else x for x in (item["text"].rstrip("?. "), item["query"]))
            return fill(template, {"q": text}), [Call("search", {"query": query})], family["id"], {}
        if family["tool"] == "none":
            return self.no_tool(lambda t: t["kind"] == f'trap_{family["id"]}')
        values = draw_values(family.get("slots", {}), self.split, self.rng)
        if values is None:
            return None
        template, lower = self.register(self.rng.choice(family["texts"]))
        city = self.place(lower)
        written = {k: write_value(v, family["slots"][k].split()[0], self.rng) for k, v in values.items()}
        return self.forecast(family, template, city, **written)

    def no_tool(self, wanted=lambda talk: True):
        """A message that needs no tool, with the base model's own reply. The message keeps the words for which the
        reply was sampled."""
        talk = self.rng.choice([t for t in talks(self.split) if wanted(t)])
        return talk["prompt"], [], talk["kind"], {"reply": talk["reply"]}

    small_talk = functools.partialmethod(no_tool, lambda talk: talk["easy"])  # `talks` defines "easy"

    def two_calls(self):
        if self.rng.random() < 0.4:
            return self.several_cities("several_cities" if self.split == "train" and self.rng.random() < 0.7
                                       else "two_cities")
        first, second = self.rng.sample([self.arithmetic, self.weather, self.search, self.arithmetic], 2)
        one, two = first(), second()
        if not one or not two:
            return None
        prompt = fill(self.pick("extra.json", "joiners")["text"],
                      {"x": end_sentence(one[0]), "y": decapitalise(two[0], two[1])})
        return prompt, one[1] + two[1], "joined", {}

    def several_cities(self, family):
        """The weather in two cities, or in three to five, at once. The model practises copying names, whose first token
        is often different after a quotation mark."""
        template, lower = self.register(self.pick("extra.json", family)["text"])
        cities = [self.place(lower) for _ in range(2 if family == "two_cities" else self.rng.choice([3, 3, 4, 5]))]
        if len(set(cities)) < len(cities):
            return None
        words = {"city": cities[0], "city2": cities[1]}
        if family == "several_cities":
            comma, last = self.rng.choice(corpus("extra.json")["between_cities"])
            words = {"cities": comma.join(cities[:-1]) + last + cities[-1]}
        return fill(template, words), [Call("weather", {"city": city}) for city in cities], family, {"city": cities}

    def tool_error(self):
        if self.rng.random() < 0.25:
            template, _ = self.register(self.pick("extra.json", "zero")["text"])
            own = {"train": range(5), "dev": [5], "test": [6]}[self.split]
            a = self.rng.choice([n for n in range(2, 1000) if n % 7 in own])
            return fill(template, {"a": a}), [Call("calculator", {"expression": f"{a} / 0"})], "zero", {}
        family = self.pick("weather.json", "families")
        template, lower = self.register(self.rng.choice(family["texts"]))
        town = self.rng.choice(self.pick("extra.json", "towns")["names"])
        return self.forecast(family, template, town.lower() if lower else town)

    def missing_tool(self):
        return self.rng.choice([self.arithmetic, self.weather, self.search])()

    def canonical(self):
        example = self.pick("canonical.json", "examples")
        return example["prompt"], [Call(c["name"], c["arguments"])
                                   for c in example["calls"]], "canonical", {"reply": example.get("reply")}


def operations(expression):
    """How many operations an expression has; a function such as sqrt counts as one."""
    return len(re.findall(r"\*\*|//|[-+*/%]|[a-z]{3,}", re.sub(r"\{\w+\}", "0", expression)))


def made_family(name, expression, text, slots):
    """A generated family: one text with a capital first letter, and those `slots` that the expression contains."""
    return {"id": name, "expression": expression, "slots": {k: v for k, v in slots.items() if f"{{{k}}}" in expression},
            "texts": [text[0].upper() + text[1:]]}


def in_order(expression, text, slots):
    """The expression with its factors, and the terms of its sums, in the order of the text: "4 screws for each of 18"
    is 4 * 18. (Percentages keep their place, because they follow their amount in all families. Products that are
    divided keep their order too.)"""
    def ordered(chain):
        names = re.findall(r"\w+", chain[0])
        known = all(f"{{{name}}}" in text and not slots[name].startswith("pct") for name in names)
        if known:
            names.sort(key=lambda name: text.find(f"{{{name}}}"))
        return f" {chain[1]} ".join(f"{{{name}}}" for name in names)
    expression = re.sub(r"(?<![*/%] )\{\w+\}(?: (\*) \{\w+\})+(?! [*/%])", ordered, expression)
    return re.sub(r"(?<![-*/%] )(?<!-)\{\w+\}(?: (\+) \{\w+\})+(?! [*/%])", ordered, expression)


def binding(expression):
    """How tightly an expression with {slots} binds: 0 a sum, 1 a product, 2 a power, 3 a number or a function."""
    top = ast.parse(re.sub(r"\{\w+\}", "x", expression), mode="eval").body
    return 3 if not isinstance(top, ast.BinOp) else {ast.Add: 0, ast.Sub: 0, ast.Pow: 2}.get(type(top.op), 1)


def holds(test, values):
    """Whether a test between slots and numbers, 'a > b' or 'a >= 3', is true."""
    left, sign, right = test.split()
    a, b = (values[x] if x in values else float(x) for x in (left, right))
    return {">": a > b, "<": a < b, ">=": a >= b, "<=": a <= b, "!=": a != b}[sign]


def fill(template, words):
    return re.sub(r"\{(\w+)\}", lambda m: str(words.get(m[1], m[0])), template)


def decapitalise(text, calls=()):
    """The text with a small first letter, to continue a sentence. The letter stays if the text begins with a value of
    the calls, with "I" or with a recognisable name."""
    first = text.split(" ", 1)[0]
    values = tuple(v for c in calls for value in c.arguments.values()
                   for v in (value if isinstance(value, list) else [value]) if isinstance(v, str) and v)
    name = (first in ("I", "I'm", "I've", "I'd", "I'll") or first[1:] != first[1:].lower()
            or not first.replace("'", "").isalpha())
    return text if name or text.startswith(values) else text[0].lower() + text[1:]


def end_sentence(text):
    return text if text[-1] in ".!?=" else text + "."


def swap_word(word, table, rate, rng):
    options = table.get(word.lower())
    if not options or rng.random() > rate:
        return word
    new = options if isinstance(options, str) else rng.choice(options)
    return new.capitalize() if word[0].isupper() else new


# --------------------------------------------------------------------------- 4. whole conversations

MIX = {"canonical": 2, "arithmetic": 21, "everyday": 35, "weather": 10, "search": 9, "no_tool": 6, "trap": 9,
       "word_problem": 4, "missing_tool": 2, "two_calls": 2, "tool_error": 1}
# synthetic functions (section 5)
SYNTHETIC = {"api_one": 3, "api_choice": 4, "api_parallel": 3, "api_ask": 1, "api_none": 2}
# easy kinds for the demo; word problems of one operation, and of several
KINDS = [*MIX, "sums", "skies", "small_talk", "one_step", "two_steps", *SYNTHETIC]


def final_answer(call, result, rng, story=False):
    """The assistant's closing words for one call and its result, in one of many wordings."""
    answers = corpus("answers.json")
    if not result.ok:
        kind = ("unknown_city" if "unknown city" in result.message else "division_by_zero" if "zero" in result.message
                else "other")
        return fill(rng.choice(answers["error"][kind]), {**call.arguments, "message": result.message})
    if call.name == "calculator":
        return fill(rng.choice(answers["calculator_story" if story else "calculator"]),
                    {**call.arguments, "result": result.value})
    if call.name == "weather":
        return fill(rng.choice(answers["weather"]),
                    {**result.value, "unit_symbol": "°F" if result.value["unit"] == "fahrenheit" else "°C"})
    if result.value:
        return fill(rng.choice(answers["search"]), result.value[0])
    return fill(rng.choice(answers["search_empty"]), call.arguments)


def exchange(prompt, calls, results, reply, learned=True):
    """The messages of a request, its calls with their results, and the reply. A reply that is not `learned` has weight
    0: calls are harder to learn than replies, so the time is usually better spent on another call."""
    made = [{"name": c.name, "arguments": c.arguments} for c in calls]
    called = [{"role": "assistant", "content": "", "tool_calls": made}] * bool(calls)
    told = [{"role": "tool", "content": r.text()} for r in results]
    return [{"role": "user", "content": prompt}, *called, *told,
            {"role": "assistant", "content": reply, **({} if learned else {"weight": 0})}]


def converse(kind, split, rng):
    """One conversation of a kind: request, calls, executed results, final answer. None when the draw did not fit."""
    if kind.startswith("api_"):
        return api_conversation(kind, split, rng)
    writer = Writer(split, rng)
    made = getattr(writer, kind)()
    if made is None:
        return None
    prompt, calls, family, facts = made
    needed = sorted({c.name for c in calls})
    if kind == "missing_tool":
        call, offered, calls = calls[0], writer.tools(without=needed[0]), []
        facts = {**facts, "withheld": vars(call)}  # the right call if the tool were offered
        reply = fill(rng.choice(corpus("answers.json")["missing"][call.name]), call.arguments)
    else:
        offered, reply = writer.tools(needed), facts.pop("reply", None)
    tools = load_tools(offered)
    results = [execute(call, tools) for call in calls]
    if calls:
        if (kind != "tool_error" and os.environ.get("TOOLPLAY_CITIES")
                and (unknown := [r.message for r in results if r.message.startswith("unknown city")])):
            raise UserError(f"TOOLPLAY_CITIES = {os.environ['TOOLPLAY_CITIES']}: {unknown[0]}, "
                            "but the templates ask for it; unset it while data are generated")
        finals = [final_answer(c, r, rng, story=kind in ("word_problem", "one_step", "two_steps"))
                  for c, r in zip(calls, results)]
        two = "{first}" if len(finals) == 1 else rng.choice(corpus("answers.json")["two"])
        reply = " ".join(finals) if len(finals) > 2 else fill(two, {"first": finals[0], "second": finals[-1]})
    answer = results[0].value if [c.name for c in calls] == ["calculator"] else None
    found = kind == "search" and results[0].value  # retelling a text takes more practice than reporting a number
    rare = kind in ("two_calls", "tool_error") and family != "several_cities"
    learned = not (split == "train" and calls and not rare and rng.random() < (0.6 if found else 0.8))
    family = f"{family}_{split}" if family in ("plain", "two_cities", "joined", "zero") else family
    return {"kind": kind, "family": family, "split": split,
            "messages": exchange(prompt, calls, results, reply, learned),
            "tools": offered, "answer": answer, "facts": facts}


def generate(split, n, seed=0, mix=None):
    """n conversations of a split, determined by the arguments alone. `mix`: {kind: weight}."""
    mix = {k: v for k, v in (mix or MIX).items() if k != "canonical" or split == "train"}
    if split not in ("train", "dev", "test") or not any(mix.values()):
        raise UserError(f"split {split!r}: it must be train, dev or test, "
                        "and one kind of the mix must weigh more than 0 (canonical examples are all in train)")
    if unknown := set(mix) - set(KINDS):
        raise UserError(f"unknown kind {sorted(unknown)[0]!r} in the mix; kinds are {', '.join(KINDS)}")
    check_corpora()  # else the model would learn from the tool errors of an unreadable custom corpus
    rng = random.Random(f"{split} {seed}")
    out, seen = [], set()
    for _ in range(50 * n + 1002):
        if len(out) == n:
            return out
        kind = rng.choices(list(mix), list(mix.values()))[0]
        made = converse(kind, split, rng)
        if made and (prompt := made["messages"][0]["content"]) not in seen:
            # these kinds have few prompts, which may be repeated in training with other tools
            if split != "train" or kind not in ("no_tool", "small_talk", "canonical"):
                seen.add(prompt)
            out.append(made)
    raise UserError(f"the {split} split has no {n} different examples for this mix; ask for fewer")


# --------------------------------------------------------------------------- 5. many tools

# Synthetic APIs (configs/corpora/apis.json), in the spirit of ToolBench: a model that knows only three tools knows only
# three strings. Each domain belongs to one split. Names have several styles. Sometimes meaningless names replace them,
# so that the model must read the descriptions (function masking, Lin et al. 2024, arXiv:2410.04587).
STYLES = {"snake": lambda domain, words: "_".join(words),
          "camel": lambda domain, words: words[0] + "".join(w.capitalize() for w in words[1:]),
          "dotted": lambda domain, words: f"{domain}.{'_'.join(words)}"}
MEANINGLESS = {"train": "func", "dev": "method", "test": "api"}
NAMED = ["{n} {v}", "{n}: {v}", "{n} = {v}"]
# share of requests that use a sentence written as a whole, if the function has such sentences; all other requests are
# composed of phrases
WHOLE = 0.5
# how often a phrase states an optional value; in train, written sentences state more optional values
SAID_TOO = {"train": 0.1, "dev": 0.25, "test": 0.25}
# how often an offer has an optional parameter: the model must learn to omit values that nobody stated
SHOWN = {"train": 0.95, "dev": 0.7, "test": 0.7}
# number of different offers with one function, and with several; in dev and test every conversation has its own offer
OFFERS = {"train": 1500}


class ApiWriter:
    """Writes requests to the functions of one offer (a set of tools), in one style of names. Each offer is drawn from
    its own random stream. In training, several conversations share an offer, so that one set of tools gets different
    requests (and the trie computes the set once). All other choices come from `rng`."""

    def __init__(self, split, rng, several, joined=False):
        offer = rng.randrange(OFFERS.get(split, 10 ** 9))
        self.split, self.rng = split, random.Random(f"{split} offer {offer} {several}")
        style = self.rng.choice(list(STYLES))
        self.described, self.masked = self.rng.random() < 0.8, self.rng.random() < 0.1
        self.style = "snake" if self.masked else style
        self.domain, function = self.function()
        chosen = [(self.domain, function)]
        if several:  # near misses of the same domain, and other functions
            near = [f for f in self.domain["functions"] if f is not function]
            chosen += ([(self.domain, f) for f in self.rng.sample(near, self.rng.randint(1, 2))]
                       + self.others(self.rng.randint(0, 1)))
        self.rng.shuffle(chosen)
        self.originals = [f for _, f in chosen]
        self.offered = [(d, shown, self.tool(d, shown)) for n, (d, f) in enumerate(chosen)
                        for shown in [self.variant(f, n)]]
        self.rng, self.joined = rng, joined  # joined: several requests make one prompt
        # values are pasted with their parameters' names: "party size: 4"
        self.named = not self.masked and rng.random() < 0.1

    def function(self):
        domain = self.rng.choice(pool("apis.json", "domains", self.split))
        return domain, self.rng.choice(domain["functions"])

    def variant(self, function, number):
        """The function as one offer shows it. Some optional parameters are left out, and the order of the rest varies.
        Some names consist of words of a description ("day of travel" -> day_travel) or are meaningless (masked). A few
        functions give many schemas, so that the model learns to read schemas instead of memorising them."""
        rng = self.rng
        shown = [p for p in function["parameters"] if p["required"] or rng.random() < SHOWN[self.split]]
        if rng.random() < 0.3:
            rng.shuffle(shown)
        parameters = []
        for n, p in enumerate(shown):
            words = ([f"arg{n + 1}"] if self.masked
                     else self.described and rng.random() < 0.4 and telling_words(rng.choice(p["description"]))
                     or p["name"])
            taken = [q["name"] for q in shown + parameters]
            parameters.append({**p, "name": words if words not in taken else p["name"], "called": p["name"]})
        words = rng.random() < 0.4 and telling_words(rng.choice(function["descriptions"])) or function["words"]
        words = [MEANINGLESS[self.split], str(number + 1)] if self.masked else words
        return {**function, "parameters": parameters, "shown": words}

    def key(self, parameter):
        """A parameter's name in this style; functions with dotted names have parameters in snake case."""
        return STYLES["camel" if self.style == "camel" else "snake"]("", parameter["name"])

    def tool(self, domain, function):
        """-> the schema of a function's variant."""
        fields = self.fields(function["parameters"])  # drawn before the description
        return {"name": STYLES[self.style](domain["name"], function["shown"]),
                "description": self.rng.choice(function["descriptions"]),
                "parameters": {"type": "object", **fields}}

    def fields(self, parameters):
        return {"properties": {self.key(p): self.field(p) for p in parameters},
                "required": [self.key(p) for p in parameters if p["required"]]}

    def field(self, parameter):
        field = {"type": parameter["type"]}
        # a date or time always needs a description, which states its format
        if self.described or self.masked or parameter.get("values") in ("date", "time"):
            field["description"] = self.rng.choice(parameter["description"])
        field |= {key: parameter[key] for key in ("enum", "default") if key in parameter}
        if parameter["type"] == "array":
            field["items"] = {"type": parameter["items"]}
        return field | self.fields(parameter["properties"]) if parameter["type"] == "object" else field

    def value(self, kind):
        """-> (the value in an argument, how a person may write it)."""
        rng = self.rng
        if isinstance(kind, list):
            foreign = (self.split == "train" and isinstance(kind[0], str) and kind[0][0].isupper()
                       and not set(kind) & set(corpus("apis.json")["closed"]))
            # a name from anywhere, because the model must copy values, not memorise them
            name = any_name(rng) if foreign and rng.random() < 0.08 else ""
            value = name if name[:1].isupper() else rng.choice(kind)
            return value, str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)
        name, *limits = kind.split()
        if name == "city":
            return (rng.choice(pool("cities.json", "cities", self.split))["name"],) * 2
        if name == "code":
            return (f"{''.join(rng.choices('ABCDEFGHJKLMNPQRSTUVWXYZ', k=2))}-{rng.randint(1000, 9999)}",) * 2
        if name in ("person", "email"):
            first = rng.choice(corpus("stories_add.json")["names"])["name"]
            last = rng.choice(corpus("extra.json")["surnames"])
            return (f"{first} {last}" if name == "person" else
                    f"{first}.{last}@{rng.choice(['mail', 'post', 'inbox'])}.example".lower(),) * 2
        if name == "date":
            year, month, day = rng.choice([2026, 2026, 2027]), rng.randint(1, 12), rng.randint(1, 28)
            end = "th" if day in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(day % 10, "th")
            said = [f"{year}-{month:02}-{day:02}", f"{MONTHS[month - 1]} {day}, {year}",
                    f"{day} {MONTHS[month - 1]} {year}", f"the {day}{end} of {MONTHS[month - 1]} {year}"]
            return said[0], rng.choice(said)
        if name == "time":
            hour, minute = rng.randint(6, 22), rng.choice([0, 0, 15, 30, 45])
            twelve = (hour - 1) % 12 + 1
            part = "in the morning" if hour < 12 else "in the evening" if hour > 17 else "in the afternoon"
            minutes, half = f":{minute:02}" if minute else "", "am" if hour < 12 else "pm"
            said = [f"{hour:02}:{minute:02}", f"{twelve}{minutes} {half}"]
            if words := {0: "{} o'clock", 15: "quarter past {}", 30: "half past {}"}.get(minute):
                said.append(f"{words.format(number_words(twelve))} {part}")
            return said[0], rng.choice(said)
        low, high = float(limits[0]), float(limits[1])
        if name == "int":
            value = rng.randint(int(low), int(high))
            # nobody writes the year 1,998
            said = (([number_words(value)] if 0 <= value < 100 else []) + ["a dozen"] * (value == 12)
                    + [f"{value:,}"] * (value > 2100))
            return value, rng.choice(said) if said and rng.random() < 0.3 else str(value)
        value = round(rng.uniform(low, high), 2 if name == "money" or high <= 2 else 1)
        if name != "money" and (value.is_integer() or self.split == "train" and name == "dec" and high > 5
                                and value >= 1 and rng.random() < 0.4):
            value = int(value)  # people like whole numbers, and nobody says 110.0
        return value, f"${value:.2f}" if name == "money" and rng.random() < 0.7 else str(value)

    def argument(self, parameter):
        """-> (value, phrase) of a parameter; an object's phrase joins the phrases of its fields."""
        rng = self.rng
        if parameter["type"] == "object":
            made = {self.key(p): self.argument(p) for p in parameter["properties"] if p["required"]
                    or rng.random() < 0.5}
            return {k: v for k, (v, _) in made.items()}, self.together([text for _, text in made.values()])
        if parameter["type"] == "boolean" or "enum" in parameter and not self.named:
            value = rng.choice(parameter.get("enum") or [True, False])
            return value, rng.choice(parameter["phrases"][str(value).lower() if isinstance(value, bool) else value])
        value, said = self.plain(parameter)
        return value, self.state(parameter, said)

    def styled(self, parameter, value):
        """A value from the corpus; the keys of an object are changed to this writer's style."""
        return {self.key(p): value["_".join(p["name"])] for p in parameter["properties"]
                if "_".join(p["name"]) in value} if parameter["type"] == "object" else value

    def plain(self, parameter):
        """-> (value, how it is written) of a parameter that is neither an object nor a boolean."""
        if "enum" in parameter:
            value = self.rng.choice(parameter["enum"])
            return value, str(value).replace("_", " ")
        if parameter["type"] != "array":
            return self.value_of(parameter)
        # all lists of numbers in a request are equally long, because both ends of a line have as many coordinates
        alike = parameter["items"] != "string" and canonical(parameter) not in corpus("apis.json")["single"]
        return self.listed(parameter, self.length if alike else self.rng.choice([1, 2, 2, 3]))

    def value_of(self, parameter):
        """-> (a value of a parameter, how it is written). For "the lathe" in a request, the argument is "lathe"."""
        value, said = self.value(parameter["values"])
        bare = isinstance(value, str) and not takes_text(parameter)
        return re.sub("^(the|an?) ", "", value) if bare else value, said

    def listed(self, parameter, n):
        """-> (up to n different values of a parameter, how they are written)."""
        items = []
        for _ in range(9 * n):  # a short list may have fewer than n different values
            if len(items) == n:
                break
            item = self.value_of(parameter)
            items += [item] if item[0] not in [value for value, _ in items] else []
        words = [said for _, said in items]
        said = words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
        return [value for value, _ in items], said

    def state(self, parameter, said, several=False):
        """A phrase that states a parameter's value (or `several` values), in words of the corpus or with the
        parameter's name."""
        name = canonical(parameter).replace("_", " ")
        phrase = (self.way if self.named
                  else self.rng.choice([x for x in parameter["phrases"] if not several or x.endswith("{v}")]))
        return phrase.replace("{n}", name).replace("{v}", said)

    def together(self, phrases):
        """The phrases joined. A person who pastes names and values puts commas between the phrases; other people do so
        sometimes."""
        return (", " if self.named or self.rng.random() < 0.25 else " ").join(phrases)

    def sentence(self, function):
        """-> (a sentence written as a whole for the function, with slots for the values; the names of all parameters
        that it states; {name: value} of the parameters that it states in fixed words: "with no stops"). None if no
        sentence fits the parameters of this variant, or if this request is composed of phrases."""
        shown, found = {canonical(p) for p in function["parameters"]}, []
        for item in corpus("api_sentences.json")["sentences"].get("_".join(function["words"]), []):
            text, told = (item, {}) if isinstance(item, str) else item
            if told and self.joined and re.search("[.!?] ", text):
                continue  # nobody could tell to which request its sentences belong
            names = {*re.findall(r"{(\w+)}", text), *told}
            found += [(text, names, told)] if names <= shown else []
        return self.rng.choice(found) if found and self.rng.random() < WHOLE else None

    def request(self, function, without=None, spread=1, template=None, like=()):
        """-> (text, list of arguments) of one call, or of up to `spread` calls that differ in one parameter ("in Oslo
        and Rome") or in two ("for Ann and Bo, with 3 and 5 guests, respectively"). `without`: a parameter that is not
        stated. `template`: words around the values, instead of the function's own. `like`: the arguments of an earlier
        call, which are all stated again."""
        self.way, self.length = self.rng.choice(NAMED), self.rng.choice([2, 2, 3, 4])
        whole = self.sentence(function) if not without and not template else None
        text, names, told = whole or (template, (), {})
        chosen = [p for p in function["parameters"] if (canonical(p) in names if whole else p is not without and
                  (p["required"] or self.key(p) in like or self.rng.random() < SAID_TOO[self.split]))]
        spare = [p for p in function["parameters"] if not p["required"]]
        if (not whole and function["words"][0] in ("modify", "update", "change") and spare
                and all(p["required"] for p in chosen)):
            chosen.append(self.rng.choice(spare))  # a request to change must change something
        simple = [p for p in chosen if p["required"] and canonical(p) not in told and not takes_text(p)
                  and p["type"] in ("string", "integer", "number") and "enum" not in p
                  and p["values"] not in ("date", "time")]
        if whole:  # "rent a {model}" asks for one model
            one = r"\b(a|an|the|that|this|its|my) (\w+ )?{%s}"
            simple = [p for p in simple if p["type"] == "string" and p["values"] != "person"
                      and not re.search(one % canonical(p), text)]
        else:  # "the {v} game" is one game, so its value cannot vary
            simple = [p for p in simple if any(phrase.endswith("{v}") for phrase in p["phrases"])]
        varied = []
        # with a list, nobody could tell which value belongs to which call
        if spread > 1 and simple and not any(p["type"] == "array" for p in chosen):
            # Names vary first: "for Ann and Bo", not "2.5 and 1.6 stars".
            varied = [self.rng.choice([p for p in simple if p["type"] == "string"] or simple)]
            rest = [p for p in simple if p is not varied[0]]
            varied += [self.rng.choice(rest)] if rest and not whole and self.rng.random() < 0.35 else []
        made = []  # (parameter, its value (or values, if it varies), how it is written)
        for p in chosen:
            if p in varied:
                values, said = self.listed(p, spread)
                made.append((p, values, said if whole else self.state(p, said, several=True)))
            else:
                made.append((p, self.styled(p, told[canonical(p)]), "") if canonical(p) in told
                            else (p, *(self.plain(p) if whole else self.argument(p))))
        words = [word for _, value, _ in made for word in (value if isinstance(value, list) else [value])
                 if isinstance(word, str)]
        counts = {len(values) for p, values, _ in made if p in varied}
        later = set(corpus("apis.json")["later"])
        dates = [(not later.isdisjoint(canonical(p).split("_")), value)
                 for p, value, _ in made if p.get("values") == "date" and p["type"] == "string"]
        backwards = any(a[0] < b[0] and a[1] > b[1] for a in dates for b in dates)
        # draw again, to avoid "from euros to euros", two people and three tables, a return before the departure
        if len(set(words)) < len(words) or len(counts) > 1 or backwards:
            return self.request(function, without, spread, template, like)
        arguments = [{self.key(p): value[n] if p in varied else value for p, value, _ in made}
                     for n in range(max(counts, default=1))]
        if whole:
            return fill(text, {canonical(p): said for p, _, said in made}), arguments
        joint = varied if len(varied) == 2 else []  # these two are stated together, at the end
        phrases = [text for p, _, text in made if p not in joint]
        # People begin with what matters most, but not always.
        if self.rng.random() < 0.2 and (self.named or {text.split(" ")[0]
                                                       for text in phrases} <= set(corpus("apis.json")["anywhere"])):
            self.rng.shuffle(phrases)
        phrases += [text for p, _, text in made if p in joint] + ["respectively"] * bool(joint)
        text = " ".join((text or self.rng.choice(function["requests"])).replace("{..}", self.together(phrases)).split())
        return re.sub(r" ([?.,!])", r"\1", text), arguments

    def others(self, n):
        """n functions of other domains."""
        out = []
        while len(out) < n:
            other = self.function()
            if other[0] is not self.domain and other not in out:
                out.append(other)
        return out


def takes_text(parameter):
    """Whether a parameter takes whole sentences, whatever its name in the variant."""
    return parameter.get("called", parameter["name"])[-1] in corpus("apis.json")["texts"]


def canonical(parameter):
    """A parameter's name in the corpus, whatever its name in the variant."""
    return "_".join(parameter.get("called", parameter["name"]))


def telling_words(text):
    """The words of a short description as a name: "day of travel, YYYY-MM-DD" -> ["day", "travel"]. None if the words
    make no name ("party that sued", "lock or unlock", "night's plan")."""
    head = re.split(r", (?=yyyy|hh:mm)|[.;:(]", text.lower())[0]
    if not head.isascii() or re.search(r"[',]|\b(order|looked|and|or|that|which|what|where|who|whom|whose|one|is|are|"
                                       r"was|be|to|it|its|with|how|when|from|so|by)\b", head):
        return None
    words = [w for w in re.findall("[a-z]+", head) if w not in ("a", "an", "the", "of", "in", "on", "for", "at")]
    return words if 2 <= len(words) <= 4 else None


def api_calls(writer, function, tool):
    """-> (texts, calls, mock results) of requests to the functions of an offer; the first request is to `function`. If
    the writer joins requests, several calls are asked for: one by one, or in one text for calls that differ in a
    value."""
    rng, prompts, calls, results = writer.rng, [], [], []
    spread = rng.choice([2, 2, 3]) if writer.joined and rng.random() < 0.4 else 1
    for n in range(rng.choice([2, 2, 3]) if writer.joined and spread == 1 else 1):
        again = n > 0 and rng.random() < 0.3  # the same function with other values: the text states only the values
        if n and not again and rng.random() < 0.8:
            _, function, tool = rng.choice([o for o in writer.offered if o[1] is not function] or writer.offered)
        template, like = (rng.choice(of_split(corpus("answers.json")["api"]["again"], writer.split))["text"],
                          tuple(calls[-1].arguments)) if again else (None, ())
        text, several = writer.request(function, spread=spread, template=template, like=like)
        prompts.append(text)
        calls += [Call(tool["name"], arguments) for arguments in several]
        results += [{key: writer.value(form)[0] for key, form in function["result"].items()} for _ in several]
    return prompts, calls, results


def unfit_request(writer, domain):
    """-> (text, family) of a request that no offered function fits: for another function of the same domain, for a
    function of another domain, or for a built-in tool. None if the drawn function is on offer after all."""
    rng, split = writer.rng, writer.split
    if near := rng.random() < 0.5:
        function = rng.choice(domain["functions"])
    else:  # in training, of several functions the one whose request an offered function seems most able to answer
        shapes = Counter(p["type"] for f in writer.originals for p in f["parameters"])
        domain, function = max(writer.others(4 if split == "train" else 1),
                               key=lambda one: (shapes & Counter(p["type"] for p in one[1]["parameters"])).total()
                               / len(one[1]["parameters"]))
    if (any(f is function for f in writer.originals)
            or (not near and any(d is domain for d, _, _ in writer.offered))):
        return None
    if near or rng.random() >= 0.6:
        return writer.request(function)[0], api_family(domain, function)
    kinds = ["arithmetic", "everyday", "one_step", "weather", "weather", "search", "search", "search"]
    made = getattr(Writer(split, rng), rng.choice(kinds))()
    if made is None or any(made[1][0].name in d.get("near", ()) for d, _, _ in writer.offered):
        return None
    text, _, family, _ = made
    return text, family


def incomplete_request(writer, function):
    """-> (text, the words for the missing value) of a request that leaves out one value that the function requires.
    None if no value can be left out."""
    required = [p for p in function["parameters"] if p["required"] and p["type"] not in ("boolean", "object")
                and p["called"][0] not in ("to", "from", "for", "with", "by", "at", "on", "in")]
    if len(required) < 2:
        return None
    missing = writer.rng.choice(required)
    return writer.request(function, missing)[0], missing["called"]


def joined_prompt(prompts, calls, split, rng):
    """Several requests in one message."""
    if len(prompts) == 1:
        return prompts[0]
    joiner = rng.choice([x["text"] for x in of_split(corpus("answers.json")["api"]["joined"], split)
                         if not x["text"].startswith("Two ") or len(calls) == 2])
    last = prompts[-1] if joiner.endswith("} {y}") else decapitalise(prompts[-1], calls)
    return fill(joiner, {"x": " ".join(end_sentence(p) for p in prompts[:-1]), "y": last})


def carelessly_typed(prompt, calls):
    """The prompt in lower case if no value of the calls has a capital letter, else without its final full stop."""
    stated = json.dumps([list(c.arguments.values()) for c in calls], ensure_ascii=False)
    if stated == stated.lower():
        return prompt.lower()
    ends = tuple(v for c in calls for v in c.arguments.values() if isinstance(v, str))
    while prompt[-1] in ".?!" and not prompt.endswith(ends):  # a full stop that belongs to a value stays
        prompt = prompt[:-1]
    return prompt


def api_family(domain, function):
    return f"{domain['name']}.{'_'.join(function['words'])}"


def api_conversation(kind, split, rng):
    """One conversation with synthetic functions: request, calls, mock results and answer; or a request and a question
    for the missing value; or a request and a refusal. None if the draw did not fit."""
    answers = corpus("answers.json")["api"]
    several = {"api_one": False, "api_choice": True}.get(kind, rng.random() < 0.6)
    writer = ApiWriter(split, rng, several, kind == "api_parallel")
    if len({tool["name"] for _, _, tool in writer.offered}) < len(writer.offered):
        return None
    domain, function, tool = rng.choice(writer.offered)
    calls, results, family = [], [], api_family(domain, function)
    if kind == "api_none":
        if (made := unfit_request(writer, domain)) is None:
            return None
        prompt, family = made
        reply = rng.choice(answers["none"])
    elif kind == "api_ask":
        if (made := incomplete_request(writer, function)) is None:
            return None
        prompt, missing = made
        plural = missing[-1].endswith("s") and not missing[-1].endswith(("ss", "us"))
        reply = fill(rng.choice([x for x in answers["ask"] if not (plural and " is " in x)]),
                     {"what": " ".join(missing)})
    else:
        prompts, calls, results = api_calls(writer, function, tool)
        different = {json.dumps([c.name, c.arguments], sort_keys=True) for c in calls}
        if kind == "api_parallel" and len(different) < max(len(calls), 2):
            return None
        prompt = joined_prompt(prompts, calls, split, rng)
    prompt = re.sub(r"\b(the|an?|my) (the|an?) ", r"\1 ", prompt)
    if rng.random() < 0.25:
        prompt = carelessly_typed(prompt, calls)
    if calls:
        said = "; ".join(", ".join(f"{key.replace('_', ' ')}: {value}" for key, value in r.items()) for r in results)
        reply = fill(rng.choice(answers["done"]), {"result": said})
    learned = not (calls and split == "train" and rng.random() < 0.85)
    results = [Result("", True, r) for r in results]
    return {"kind": kind, "family": family, "split": split,
            "messages": exchange(prompt, calls, results, reply, learned),
            "tools": [tool for _, _, tool in writer.offered], "answer": None, "facts": {}}


# --------------------------------------------------------------------------- 6. ToolBench

# Qin et al. 2023 (arXiv:2307.16789). Files have three shapes: answer trees, "toolllama" dialogues, and bare
# instructions. All become conversations: functions become tools, the call of Finish becomes the final answer. An
# instruction has no answer: it is the question alone.

# How many characters of a tool's result are kept: the first limit that lets the conversation fit.
OBSERVATIONS = (1024, 512, 256, 128)
# all other types become strings; those in lower case are Python's names
API_TYPES = {"NUMBER": "integer", "BOOLEAN": "boolean", "int": "integer", "float": "number", "double": "number",
             "bool": "boolean", "list": "array", "tuple": "array", "dict": "object"}
RESERVED = ("from", "class", "return", "false", "true", "id", "and")


class Unusable(UserError):
    """The reason why an item of a data set is left out, in a few words."""


class Damaged(Unusable):
    """The item is malformed; the report names its file."""


def standard_name(text, reserved=RESERVED):
    """A name as ToolBench writes it: "Get Player's-ID" -> get_player_s_id, "2fa" -> get_2fa, "id" -> is_id."""
    name = re.sub("_+", "_", re.sub("[^a-z0-9_\u4e00-\u9fa5]", "_", text.lower())).strip("_")
    return f"get_{name}" if name[:1].isdigit() else f"is_{name}" if name in reserved else name


def toolbench_api(api):
    """An entry of an instruction's api_list -> tool schema. The tool has the same name as in the answers: the last 64
    characters of api_for_tool."""
    required, optional = (api.get(key) or [] for key in ("required_parameters", "optional_parameters"))
    # Reversed twice, so that of two parameters with one name the first counts.
    fields = {p["name"]: {"type": str(p.get("type")).upper(), "description": p.get("description") or None}
              for p in reversed(required + optional)}
    parameters = {"properties": dict(reversed(fields.items())), "required": [p["name"] for p in required]}
    name = f"{standard_name(api['api_name'])}_for_{standard_name(api['tool_name'], ())}"[-64:]
    return toolbench_function({"name": name, "description": api.get("api_description"), "parameters": parameters})


def is_json(value):
    """Whether a value that was read from JSON is one: Python also reads NaN."""
    with contextlib.suppress(ValueError):
        return bool(json.dumps([value], allow_nan=False))
    return False


def toolbench_function(function):
    """A function of an answer -> tool schema; the text that wraps the description is removed. Invalid names and types
    become standard ones."""
    def standard_type(kind):
        kind = str(kind)
        known = ("string", "integer", "number", "boolean", "array", "object", "null")
        return kind if kind in known else API_TYPES.get(kind) or API_TYPES.get(kind.upper(), "string")

    def field(given):
        given = given if isinstance(given, dict) else {"type": given}
        kept = {key: given[key] for key in ("type", "description", "enum", "items", "default")
                if given.get(key) is not None and given[key] != [] and is_json(given[key])}
        kind = kept.get("type")
        if "type" in kept:
            kind = kept["type"] = [*map(standard_type, kind)] if isinstance(kind, list) else standard_type(kind)
        if "default" in kept:  # numbers may be written as text, as in arguments
            kept["default"] = toolbench_typed(kept["default"], kind)
        if isinstance(kept.get("enum"), list):
            kept["enum"] = [toolbench_typed(x, kind) for x in kept["enum"]]
        if isinstance(kept.get("items"), dict):
            kept["items"] = field(kept["items"])
        return kept
    name, text = function["name"], function.get("description") or ""
    parameters, fields = function.get("parameters") or {}, {}
    properties = parameters.get("properties") or {}
    for key, given in properties.items():
        fields.setdefault(standard_name(key) or key, field(given))  # of two parameters with one name, the first counts
    required = dict.fromkeys(standard_name(key) or key for key in parameters.get("required") or [] if key in properties)
    wrapped = re.match(r'.*The description of this function is: "?(.*?)"?$', text, re.DOTALL)
    text = (wrapped[1] if wrapped else text).strip()
    # a name of 64 characters is the end of a longer name
    name = name if re.fullmatch(r"\w{64}", name) else standard_name(name)[-64:]
    return {"name": name, "description": text, "parameters": {"type": "object", "properties": fields,
                                                              "required": list(required)}}


def toolbench_items(text):
    """The text of a ToolBench file, JSON or JSON lines -> ([(name of the shape or None, item)], {line number: why it
    is unusable}). Bytes that are not UTF-8 are half characters in it (surrogateescape)."""
    shapes, bad = {"answer tree": "answer_generation", "dialogue": "conversations", "instruction": "api_list"}, {}
    def read(text):
        if re.search("[\udc80-\udcff]", text):
            raise ValueError("a byte of it is not UTF-8")
        return json.loads(text)
    try:
        content, why = [read(text)], "it is none of ToolBench's shapes"
    except (ValueError, RecursionError) as error:
        content, why = [], str(error) if text.strip() else "it is empty"
        for number, line in enumerate(text.split("\n"), 1):
            try:  # a list that was cut off has commas between its lines
                content += [read(line.strip().removesuffix(","))] if line.strip() else []
            except (ValueError, RecursionError) as error:
                bad[number] = "it is no JSON" if isinstance(error, json.JSONDecodeError) else str(error)
    items = [item for part in content for item in (part if isinstance(part, list) else [part])]
    items = [(next((shape for shape, key in shapes.items() if isinstance(item, dict) and key in item), None), item)
             for item in items]
    if not any(shape for shape, _ in items):
        raise Unusable(why)
    return items, bad


def literal(text):
    """The value of a Python literal; nothing is executed. ValueError if it is too long: Python 3.10's parser ends the
    process on long nested texts."""
    if len(text) > MAX_CALL:
        raise ValueError(f"a literal of more than {MAX_CALL} characters")
    tree = ast.parse(text.strip(), mode="eval")
    for node in ast.walk(tree):
        keys = [key.value for key in getattr(node, "keys", []) if isinstance(key, ast.Constant)]
        if len(keys) > len(set(keys)):
            raise ValueError("the same key twice in one object")
    return ast.literal_eval(tree)


@functools.lru_cache(8)  # the steps of one dialogue are items of their own, with the same text; nobody changes the list
def toolbench_functions(text):
    """The list of functions in a dialogue's system text: a Python list after a text about the functions, which may also
    contain brackets."""
    text = text[max(text.find("access to the following APIs:"), 0):]
    starts, ends = ([m.start() for m in re.finditer(mark, text)] for mark in (r"\[", r"\]"))
    for start, end, read in itertools.product(starts[:20], ends[:-6:-1], (literal, json.loads)):
        with contextlib.suppress(ValueError, SyntaxError, RecursionError, MemoryError):
            if text.count("{", 0, start) > text.count("}", 0, start):  # not a [] inside a function
                continue
            functions = read(text[start:end + 1])
            if isinstance(functions, list) and functions and all(isinstance(f, dict) and "name" in f
                                                                 for f in functions):
                return functions
    raise Damaged("its list of functions cannot be read")


# where the text of a call begins
ACTION = re.compile(r"^[ \t]*(?:Action[ \t]*[:：][^\n]*\n\s*)?Action Input[ \t]*[:：]", re.MULTILINE | re.IGNORECASE)


def toolbench_action(text):
    """An assistant's text in a dialogue, "Thought: ... Action: ... Action Input: ..." -> (its thought, (function name,
    argument text or None) or None)."""
    lines = re.match(r"(.*?(?:^|\n))[ \t]*Action[ \t]*[:：][ \t]*([^\n]*\S)\s*?\n[ \t]*Action Input[ \t]*[:：](.*)$",
                     text, re.DOTALL | re.IGNORECASE)
    if lines:
        return lines[1], (lines[2].strip(), lines[3] or None)
    before, _, arguments = text.partition("Action Input:")  # all in one line
    thought, action, name = before.rpartition("Action:")
    if not action or not arguments and thought.rpartition("\n")[2].strip():
        # a call without a name, or words that only mention an action
        return text, ("", "") if ACTION.search(text) else None
    return thought, (name.strip(), arguments or None)


def toolbench_steps(shape, item):
    """An item -> (tool schemas, [(role, text, (function name, argument text) or None)]). With a result stands the name
    of its function instead of a call, or None."""
    if shape == "instruction":
        return [toolbench_api(api) for api in item["api_list"]], [("user", item["query"], None)]
    if shape == "answer tree":
        answer = item["answer_generation"]
        if not answer.get("train_messages"):
            raise Unusable("no train_messages: the search found no answer")
        functions, steps = answer["function"], []
        # cumulative, one list per step: the longest list contains all messages
        for message in max(answer["train_messages"], key=len):
            role, call = message["role"], message.get("function_call")
            call = (call["name"], call.get("arguments")) if call else None
            steps.append((role, toolbench_typed(message.get("content"), "string") or "",
                          message.get("name") if role in ("function", "tool") else call))
    else:
        functions = toolbench_functions(next((turn["value"] for turn in item["conversations"]
                                              if turn["from"] == "system"), ""))
        steps = [(turn["from"], *(toolbench_action(turn["value"]) if turn["from"] == "assistant"
                                  else (turn["value"], None))) for turn in item["conversations"]]
    # Finish is the answer, not a tool
    functions = [toolbench_function(function) for function in functions if standard_name(function["name"]) != "finish"]
    return [function for function in functions if function["name"]], steps  # a name in another script becomes ""


def toolbench_arguments(text):
    """The arguments of a call -> dict, or None if they cannot be read. Real arguments contain raw newlines and extra
    commas, lie between code fences, or are Python literals."""
    with contextlib.suppress(ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        given = text if isinstance(text, str) else json.dumps(text)
        given, end = given.strip().strip("`").removeprefix("json").strip(), None
        # JSON does not allow \_ and \'
        given, as_json = (re.sub(rf"(?<!\\)((?:\\\\)*)\\(?=[{marks}])", r"\1", given) for marks in ("_", "_'"))
        with contextlib.suppress(ValueError):
            end = json.JSONDecoder(strict=False).raw_decode(as_json)[1]  # words after the JSON are dropped,
            if re.match(r'\s*,\s*"', as_json[end:]):                     # but not further arguments
                return None
        try:
            found = _loads(as_json[:end], strict=False)
        except ValueError:
            if end:
                return None  # JSON with a duplicate key, or with NaN
            found = _loads(json.dumps(literal(given)))
        found = _loads(found, strict=False) if isinstance(found, str) else found
        return found if isinstance(found, dict) else None
    return None


def toolbench_typed(value, kind):
    """A value converted to the type `kind`, if possible: "5" -> 5, 5 -> "5", 5.0 -> 5."""
    if kind == "string" and not isinstance(value, (str, type(None))):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, str) and kind in ("integer", "number", "boolean", "array", "object"):
        with contextlib.suppress(ValueError, RecursionError):
            value = _loads(value.lower() if kind == "boolean" else value)
    return int(value) if kind == "integer" and isinstance(value, float) and value.is_integer() else value


def toolbench_repaired(arguments, tool):
    """The arguments converted to the schema's types, without unknown and empty optional arguments (empty texts stay).
    None if the result still does not fit, or if no argument is known. NUMBER became integer, as in ToolBench, where
    NUMBER includes fractions; if an argument is a fraction, its type in the tool's schema is changed to number."""
    fields, required = tool["parameters"]["properties"], tool["parameters"]["required"]
    names = {standard_name(name): name for name in reversed(fields) if standard_name(name)}
    # an exact name has priority
    arguments = {key if key in fields else names.get(standard_name(key), key): value
                 for key, value in sorted(arguments.items(), key=lambda pair: pair[0] in fields)}
    made = {key: toolbench_typed(value, fields[key].get("type")) for key, value in arguments.items()
            if key in fields
            and (key in required or value is not None and (value != "" or fields[key].get("type") == "string"))}
    for key, value in made.items():
        if isinstance(value, float) and fields[key].get("type") == "integer":
            fields[key] = {**fields[key], "type": "number"}
        items = fields[key].get("items")
        if isinstance(value, list) and isinstance(items, dict):
            made[key] = [toolbench_typed(item, items.get("type")) for item in value]
            if items.get("type") == "integer" and any(isinstance(item, float) for item in made[key]):
                fields[key] = {**fields[key], "items": {**items, "type": "number"}}
    return None if arguments and not set(arguments) & set(fields) or any(_problems(made, tool["parameters"])) else made


def toolbench_text(text):
    """An assistant's text without the words that mark it as a thought, and without tags that would be read as calls."""
    text = SURROGATE.sub("\ufffd", re.sub(r"(?m)^[ \t]*Thought:[ \t]*", "", text))
    return re.sub(r"</?(tool_call|tool_response)>", r"[\1]", text).strip()


def toolbench_thought(text):
    """The same, and without a call that is written into the text: it may be broken."""
    return toolbench_text(ACTION.split(text, maxsplit=1)[0])


def toolbench_call(name, text, tools):
    """A call of an offered tool with its argument text -> {"name", "arguments"}. None if the model must never learn it:
    an unknown name (None), invalid JSON, wrong or endless arguments."""
    given = toolbench_arguments("{}" if text is None or isinstance(text, str) and not text.strip() else text)
    arguments = toolbench_repaired(given, tools[name]) if name and given is not None else None
    if arguments is None or len(format_call(Call(name, arguments))) > MAX_CALL:
        return None
    return {"name": name, "arguments": arguments}


def toolbench_conversation(shape, item, observation=OBSERVATIONS[0]):
    """An item -> (conversation, number of calls left out because they were broken, whether a result was clipped).

    Thoughts are kept in the turn of the next call. Thoughts with Finish are left out, because the user sees that turn;
    thoughts with a call that is left out are left out too. Raises Unusable with the reason.
    """
    try:
        tools = {}
        found, steps = toolbench_steps(shape, item)
        for tool in found:
            tools.setdefault(tool["name"], tool)  # of two tools with one name ToolBench runs the first
        standard = lambda name: standard_name(str(name))[-64:].strip("_")  # noqa: E731
        names = {standard(name): name for name in reversed(tools)}
        messages, thoughts, dropped, unended, clipped, finished = [], [], 0, 0, False, False
        waiting = None  # the last call, until its result arrives; {} if the call was left out
        earlier = None  # the name of a call before it that has no result: the next result may be the earlier call's
        for role, text, call in steps:
            # a waiting call that has no result: no turn can follow it
            if waiting and (role == "user" or role == "assistant" and call):
                dropped, earlier, waiting = dropped + 1, waiting["tool_calls"][0]["name"], None
            if role == "user":
                earlier = None
                if messages and any(thoughts):  # words to the user, who now answers
                    messages.append({"role": "assistant", "content": "\n".join(filter(None, thoughts))})
                    thoughts = []
                text = SURROGATE.sub("\ufffd", text.strip().removesuffix("Begin!").strip())
                messages += [{"role": "user", "content": text}] if text or not messages else []
            elif role in ("function", "tool"):
                of = names.get(standard(call))
                if waiting and (of and of != waiting["tool_calls"][0]["name"]  # the result of another call,
                                or earlier and of in (earlier, None)):         # or perhaps of another
                    dropped, waiting = dropped + 1, {}
                if waiting:
                    content, cut = toolbench_observation(text, observation)
                    messages += [waiting, {"role": "tool", "content": content}]
                    clipped = clipped or cut
                dropped += waiting is None  # the result of a call that cannot be read
                waiting = earlier = None
            elif role == "assistant" and call is None:
                thoughts.append(toolbench_thought(text))
            elif role == "assistant" and standard_name(str(call[0])) == "finish":
                given = toolbench_arguments(call[1] or "{}") or {}
                answer = toolbench_text(toolbench_typed(given.get("final_answer"), "string") or "")
                ends = str(given.get("return_type")).strip()
                if ends == "give_up_and_restart":
                    raise Unusable("it gives up, or its Finish is broken")
                if finished := ends == "give_answer" and bool(answer):
                    messages.append({"role": "assistant", "content": answer})
                    break
                unended, waiting, thoughts = unended + 1, {}, []  # ToolBench answers it with an error and continues
            elif role == "assistant":
                made = toolbench_call(call[0] if call[0] in tools else names.get(standard(call[0])), call[1], tools)
                said = "\n".join(filter(None, [*thoughts, toolbench_thought(text)]))
                waiting = {"role": "assistant", "content": said, "tool_calls": [made]} if made else {}
                dropped += (made is None) + len(ACTION.findall(str(call[1])))  # a turn's further calls have no result
                thoughts = []
            elif role != "system":
                raise Damaged(f"a turn of an unknown role, {str(role)[:20]!r}")
        if not messages or messages[0]["role"] != "user" or not messages[0]["content"]:
            raise Unusable("nobody asks for anything")
        if dropped and not any(m.get("tool_calls") for m in messages):
            raise Unusable("all its calls are broken, made up or without a result")
        if not finished and shape != "instruction":
            raise Unusable("it gives up, or its Finish is broken" if unended
                           else "no Finish: a step of a longer conversation, or cut off")
        return check_conversation({"kind": "toolbench", "messages": messages,
                                   "tools": list(tools.values())}), dropped + unended, clipped
    except Unusable:
        raise
    except (KeyError, TypeError, AttributeError, IndexError, ValueError, RecursionError) as error:
        raise Damaged(f"it is damaged ({error if isinstance(error, UserError) else f'{type(error).__name__}: {error}'})"
                      [:120]) from None


def toolbench_observation(text, limit):
    """{"error": "", "response": ...} -> (our {"result": ...} or {"error": ...} with at most `limit` characters of the
    content; whether the content was clipped).

    ToolBench cuts the whole text at 1,024 characters and appends dots. The part that is left is unwrapped too.
    """
    text, error = toolbench_typed(text, "string") or "", ""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        text = text.removesuffix("...")
        if cut := re.fullmatch(r'\{"error": ("(?:[^"\\]|\\.)*"), '
                               r'"response": "((?:[^"\\]|\\[^u]|\\u[0-9a-fA-F]{4})*)(?:\\(?:u[^"]{0,3})?|"\}?)?',
                               text, re.DOTALL):
            with contextlib.suppress(ValueError):  # an escape that JSON does not know: the text stays as it is
                error, text = json.loads(cut[1], strict=False), json.loads(f'"{cut[2]}"', strict=False)
    else:
        if isinstance(found, dict) and found and not set(found) - {"error", "response"}:
            error, text = (toolbench_typed(x, "string") or ""
                           for x in (found.get("error") or "", found.get("response")))
    said = f"{error} {text}".strip() if error else text
    return Result("", not error, said[:limit], message=said[:limit], max_chars=10 * limit).text(), len(said) > limit


def toolbench_files(path):
    """-> (the files to read, the other files) of a path: one file, a folder or a glob. Each file is listed once, even
    if several links lead to it. In folders, only *.json* files are read."""
    found, others, walked = {}, set(), set()
    for given in [path] if os.path.lexists(path) else glob.glob(str(path), recursive=True):
        files = []  # if `given` is a file, onerror adds it: a path that cannot be walked is read
        for folder, folders, names in os.walk(given, followlinks=True,
                                              onerror=lambda error: files.append(error.filename)):
            if os.path.realpath(folder) in walked:  # a link that leads back, or a second match of the glob
                folders.clear()
                continue
            walked.add(os.path.realpath(folder))
            files += [os.path.join(folder, name) for name in names if ".json" in name.lower()]
            others.update(os.path.join(folder, name) for name in names if ".json" not in name.lower())
        found = {os.path.realpath(file): file for file in files} | found
    return sorted(found.values()), sorted(others - set(found.values()))


def read_toolbench(path, fits=lambda conversation: True, report=None, questions=True):
    """ToolBench files (one file, a folder, a glob) -> conversations that fit. Prints a summary; `report`: a path where
    the summary is also written as JSON.

    `questions`: include instructions, which end with the user's message. A model cannot learn from them, but can be
    asked. The only fatal error is a path that contains nothing usable. If a conversation does not fit, its tool results
    are clipped further (OBSERVATIONS); if clipping does not help, it is left out.
    """
    names, others = toolbench_files(path)
    if not names:
        raise UserError(f"{path}: no such file or folder, or no *.json in it")
    kept, counts, damaged, seen, calls_dropped = [], Counter(), {}, set(), 0
    noted = {name: "not read: its name has no .json" for name in others}
    for name in names:
        try:
            if not os.path.isfile(name):  # reading a pipe would wait forever
                raise Unusable("it is no file that can be read")
            raw = Path(name).read_bytes()
            items, bad = toolbench_items(raw.decode("utf-8-sig", "surrogateescape"))
        except (OSError, ValueError) as error:
            damaged[name] = str(error)[:120]
            continue
        damaged.update({f"{name}, line {number}": why for number, why in bad.items()})
        if raw.startswith(b"\xef\xbb\xbf"):
            noted[name] = "it begins with a byte order mark; read all the same"
        for number, (shape, item) in enumerate(items, 1):
            try:
                if shape is None:
                    raise Damaged("it is none of ToolBench's shapes")
                if shape == "instruction" and not questions:
                    raise Unusable("an instruction without an answer")
                for observation in OBSERVATIONS:
                    conversation, dropped, clipped = toolbench_conversation(shape, item, observation)
                    if fits(conversation):
                        break
                else:
                    raise Unusable("too long, even with its results clipped")
                key = hashlib.sha256(json.dumps([turns(conversation)]).encode()).digest()
                if key in seen:
                    raise Unusable("the same as an earlier one")
            except UserError as error:  # also from a chat template that refuses unknown turns
                counts[str(error)] += 1
                if isinstance(error, Damaged):
                    damaged[name if len(items) == 1 else f"{name}, item {number}"] = str(error)
                continue
            seen.add(key)
            kept.append(conversation)
            calls_dropped += dropped
            counts["used, a question without an answer" if shape == "instruction" else "used, its results clipped"
                   if clipped else "used"] += 1
    summary = {"path": str(path), "files": len(names), "damaged_files": damaged, "noted_files": noted,
               "conversations": len(kept), "calls_left_out": calls_dropped, "items": dict(counts.most_common())}
    lines = [f"ToolBench, {path}: {len(kept)} conversations from {len(names)} files; "
             f"{calls_dropped} broken or made-up calls left out of them"]
    lines += [f"  {count:7d}  {what}" for what, count in counts.most_common()]
    lines += [f"  {len(damaged):7d}  files, lines or items damaged"] * bool(damaged)
    for word, named in (("damaged", damaged), ("noted", noted)):
        lines += [f"  {word}  {name}: {why}" for name, why in [*named.items()][:100]]
        lines += [f"  and {len(named) - 100} more {word} (--report names all)"] * (len(named) > 100)
    print(printable("\n".join(lines)), file=sys.stderr)
    if report:
        Path(report).write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    if not kept:
        raise UserError(f"{path}: nothing usable in {len(names)} files (see above; if all is too long, "
                        "raise max_tokens)")
    return kept


# --------------------------------------------------------------------------- 7. what a teacher found

def read_teacher(path, split, n, seed=0, extra=(), whole=False):
    """At most n conversations from the calls that survived in a run of teacher.py (its folder, or its augmented.jsonl).

    `extra`: tools in addition to the three built-in ones. Calls of any other tool are left out.

    The user asks for the rest of a text. The assistant makes the call and continues from its result. At most equally
    many texts are continued without a call. One text in ten (a repeated text counts once) belongs to `dev`, all others
    to `train`; if `whole`, all belong to the split that is asked for.
    """
    def check(line):
        with contextlib.suppress(TypeError, KeyError):
            text, kept = line["text"], [(c["offset"], Call(c["call"]["name"], c["call"]["arguments"]))
                                        for c in line["candidates"] if c["kept"]]
            if isinstance(text, str) and all(type(offset) is int and isinstance(call.name, str)
                                             and isinstance(call.arguments, dict) for offset, call in kept):
                return text, kept
        raise UserError("it is no line of a teacher's augmented.jsonl")

    def example(text, offset, call=None, result=None):
        before, rest = text[:offset].strip(), text[offset:].strip()
        prompt = fill(rng.choice(corpus("teacher_prompts.json")["complete"]), {"text": before})
        answer = (result.value if call and call.name == "calculator"
                  and re.match(re.escape(str(result.value)) + r"(?!\d|[.,]\d)", rest) else None)
        return {"kind": call.name if call else "no_tool",
                "messages": exchange(prompt, [call] * bool(call), [result] * bool(call), rest),
                "tools": list(BUILTIN), "answer": answer}
    file = Path(path) / "augmented.jsonl" if Path(path).is_dir() else Path(path)
    rng, tools = random.Random(f"{split} teacher {seed}"), {**BUILTIN, **load_tools(list(extra))}
    calling, silent, lost, numbers = [], [], 0, {}
    for text, kept in read_jsonl(file, check):
        if not whole and (numbers.setdefault(text, len(numbers)) % 10 == 9) != (split == "dev"):
            continue
        between = [m.start() for m in re.finditer(r"\s", text)]
        usable = [(offset, call, result) for offset, call in kept if offset in between and call.name in tools
                  for result in [execute(call, tools)] if result.ok]
        calling += [example(text, *found) for found in usable]
        lost += len(kept) - len(usable)
        if not kept and between:
            silent.append(example(text, between[len(between) // 2]))
    if lost:
        print(f"{file}: {lost} calls of the {split} part are left out: inside a word or an amount, "
              "of a tool that is not given, or without a result today", file=sys.stderr)
    if not calling and split == "train":
        raise UserError(f"{file}: no call of {', '.join(tools)} survived in it; run teacher.py on more texts, "
                        "or with a lower tau_f")
    out = calling + silent[:len(calling)]
    rng.shuffle(out)
    if len(out) < n and split == "train":
        print(f"{file}: {len(out)} conversations where {n} are wanted: {len(calling)} with a call, "
              "and as many without one at most", file=sys.stderr)
    return out[:n]


# --------------------------------------------------------------------------- 8. datasets

def dataset(config, tokenizer):
    """The rows that a run trains and evaluates on -> (train rows, held-out rows), each a list of (ids, mask).

    Conversations longer than max_tokens are left out and counted, never cut. A row without a trained token is an error;
    in a JSONL file, its line is skipped and reported.
    """
    train, held_out = (conversations(config, split, tokenizer, check_trained) for split in ("train", "dev"))
    return (encode_all(train, tokenizer, config, "training"),
            encode_all(held_out, tokenizer, config, "evaluation") if held_out else [])


def check_trained(item):
    """`check_conversation`, and that something in it can be trained: an assistant's turn, and no call that is malformed
    or of a tool that is not there."""
    conversation = check_conversation(item)
    if all(m["role"] != "assistant" or m.get("weight", 1) == 0 for m in conversation["messages"]):
        raise UserError("it has no assistant message (or only messages of weight 0), so nothing in it is trained")
    if any(not m["content"].strip() and not m.get("tool_calls") and m.get("weight", 1)
           for m in conversation["messages"] if m["role"] == "assistant"):
        raise UserError("an assistant message is empty (its text can only be in \"content\")")
    names = {tool.name for tool in conversation["tools"]}
    for calls, broken in (parse_calls(text) for role, text in turns(conversation) if role == "assistant"):
        if unknown := names and sorted({call.name for call in calls} - names):
            raise UserError(f"it calls {unknown[0]!r}, which is not among its tools")
        if broken:
            raise UserError(f"an assistant turn holds a call that cannot be read ({broken[0].reason})")
    return conversation


def conversations(config, split, tokenizer, line=check_conversation, offered=()):
    """The conversations that a run learns from ("train") or is evaluated on ("dev"), from the config's `source`, with
    the config's custom tools.

    `line` checks the content of a line of a JSONL file. `offered`: the tools for a line that names none.
    """
    path, count = (config.path, config.examples) if split == "train" else (config.eval_path, config.eval_examples)
    made, extra = [], [tool_from_schema(t) for t in config.tools]
    if split == "dev" and not count:
        return made
    if config.source == "jsonl" and path:
        made = read_jsonl(path, lambda item: line(with_tools(item, extra, offered)))
    elif config.source == "teacher":
        made = read_teacher(path or config.path, split, count, config.seed, extra, bool(split == "dev" and path))
    elif config.source == "toolbench" and path:
        try:
            made = read_toolbench(path,
                                  lambda c: len(encode(with_tools(c, extra), tokenizer,
                                                       config.tool_style)[0]) <= config.max_tokens, questions=False)
        except UserError as error:
            if not config.fallback:
                raise
            made = learned_part(generate(split, count, config.seed, stand_in(config, error, split)))
    elif config.source in ("manual", "synthetic"):
        made = learned_part(generate(split, count, config.seed, mix_of(config)))
    return [with_tools(item, extra) for item in (made if split == "train" else made[:count])]


def learned_part(conversations):
    """Generated conversations without the results and replies that are not learned (weight 0)."""
    return [c if c["messages"][-1].get("weight", 1) else
            {**c, "messages": list(itertools.takewhile(lambda m: m["role"] != "tool", c["messages"]))}
            for c in conversations]


def with_tools(item, extra, offered=()):
    """A line or a conversation with the `extra` tools (a config's custom tools) added to its own tools, or to the
    `offered` tools if it names none."""
    if not extra or not isinstance(item, dict):
        return item
    own, more = offered_in(item), {tool.name: tool for tool in extra}
    tools = load_tools(list(offered) if own is None else own, {**BUILTIN, **more})
    return {**item, "tools": [*(tool for name, tool in tools.items() if name not in more), *extra]}


def offered_in(item):
    """The tools that a line or conversation names, under "tools" or the older key "functions", perhaps as JSON text;
    None if it names none. "function" paths of schemas are removed: data must never decide which code is imported."""
    tools = item.get("functions") if item.get("tools") is None else item["tools"]
    with contextlib.suppress(ValueError, RecursionError):  # load_tools reports a text that is not JSON
        tools = json.loads(tools) if isinstance(tools, str) else tools
    return [without_function(t) for t in tools] if isinstance(tools, (list, tuple)) else tools


def mix_of(config):
    return config.mix or (SYNTHETIC if config.source == "synthetic" else MIX)


def stand_in(config, why, split="train"):
    """Replace ToolBench by the synthetic generator in a run -> the generator's mix: the synthetic kinds of the config's
    mix, if it has any. The replacement is printed and, if the run learns from the data, recorded in its config.json."""
    mix = {kind: weight for kind, weight in config.mix.items() if kind in SYNTHETIC} or SYNTHETIC
    unread = f"; eval_path = {config.eval_path} is not read" if split == "train" and config.eval_path else ""
    print(f"{why}: synthetic functions ({', '.join(mix)}) are used instead of ToolBench{unread}", file=sys.stderr)
    if split == "train":
        config.source, config.fallback, config.mix = "synthetic", "synthetic", mix
    return mix


def encode_all(conversations, tokenizer, config, what):
    rows = [encode(conversation, tokenizer, config.tool_style) for conversation in conversations]
    if silent := next((n for n, (_, mask) in enumerate(rows, 1) if not any(mask)), None):
        raise UserError(f"{what} conversation {silent}: it has no assistant turn, so nothing in it is trained")
    rows = fitting(rows, [len(ids) for ids, _ in rows], config.max_tokens, f"{what} conversations")
    if not rows:
        raise UserError(f"no {what} conversation fits max_tokens = {config.max_tokens}; raise it")
    return rows


def fitting(items, lengths, limit, what, why="max_tokens"):
    """The items that are at most `limit` tokens long. Prints how many items are left out; no item is cut. `why`: what
    sets the limit."""
    kept = [item for item, length in zip(items, lengths) if length <= limit]
    if len(kept) < len(items):
        print(f"{len(items) - len(kept)} of {len(items)} {what} are longer than {why} = {limit} and left out",
              file=sys.stderr)
    return kept


class Batches:
    """The order in which a run uses its rows: batches(step) returns the row indices of a step's batch, batches.total is
    the number of steps."""

    def __init__(self, rows, config):
        self.size, self.per_epoch = config.batch_size, -(-len(rows) // config.batch_size)
        self.total = config.steps or max(1, round(config.epochs * self.per_epoch))
        self.order = functools.lru_cache(1)(lambda epoch: epoch_order(rows, config.seed, epoch, config.group))

    def __call__(self, step):
        epoch, at = divmod(step, self.per_epoch)
        return self.order(epoch)[at * self.size:(at + 1) * self.size]


def epoch_order(rows, seed, epoch, group):
    """A new random order of the rows for an epoch. Rows with the same system prompt are shuffled and placed in groups
    of `group` rows, because the trie computes the shared prompt of a batch once."""
    rng = random.Random(f"{seed} order {epoch}")
    by_prompt = {}
    for i, (ids, mask) in enumerate(rows):
        second = ids.index(ids[0], 1) if ids[0] in ids[1:] else 64  # where the second turn starts, in ChatML
        by_prompt.setdefault(tuple(ids[:second]), []).append(i)
    chunks = []
    for members in by_prompt.values():
        rng.shuffle(members)
        chunks += [members[k:k + group] for k in range(0, len(members), group)]
    rng.shuffle(chunks)
    return [i for chunk in chunks for i in chunk]


def coloured(conversation, tokenizer):
    """The conversation as the model sees it, with trained tokens in green."""
    runs = itertools.groupby(zip(*encode(conversation, tokenizer)), key=lambda pair: pair[1])
    return "".join(f"\033[{32 if trained else 2}m{printable(tokenizer.decode([i for i, _ in run]))}\033[0m"
                   for trained, run in runs)


def write_jsonl(path, conversations):
    """Export conversations as JSONL, if a path is given."""
    if path:
        lines = [json.dumps({**c, "tools": [tool.schema() for tool in load_tools(c["tools"]).values()]},
                            ensure_ascii=False) + "\n" for c in conversations]
        Path(path).write_text("".join(lines), encoding="utf-8", errors="replace")  # half a surrogate pair is invalid
        print(f"{len(lines)} conversations written to {path}")


def main(argv=None):
    parser = argparse.ArgumentParser(description="Write, show and export training conversations.")
    parser.add_argument("--show", type=number(int, 1), metavar="N",
                        help="print N examples, the trained tokens in green")
    parser.add_argument("--out", metavar="FILE", help="export conversations as JSONL")
    parser.add_argument("--n", type=number(int, 1), help="how many to export (default 1000; of ToolBench all)")
    parser.add_argument("--split", choices=["train", "dev", "test"], default="train",
                        help="of the templates (default train)")
    parser.add_argument("--seed", type=int, default=0, help="of the templates (default 0)")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--kind", choices=[*KINDS, "synthetic"],
                       help="only this kind (synthetic: all kinds of synthetic functions)")
    which.add_argument("--jsonl", metavar="FILE", help="show (or export) the conversations of this file instead")
    which.add_argument("--toolbench", metavar="PATH",
                       help="read ToolBench files (a file, folder or glob) instead; with --out: export them")
    parser.add_argument("--questions", action="store_true",
                        help="of ToolBench: its instructions too, questions without an answer (for predict)")
    parser.add_argument("--max-tokens", type=number(int, 1), metavar="N",
                        help="of ToolBench: clip or leave out what is longer, as training does")
    parser.add_argument("--report", metavar="FILE", help="write what became of ToolBench's items here, as JSON")
    parser.error = lambda message: parser.exit(2, f"error: {message}\n")  # one line
    args = parser.parse_args(argv)
    if not args.toolbench and (args.report or args.max_tokens or args.questions):
        parser.error("--report, --max-tokens and --questions go with --toolbench")
    mix = SYNTHETIC if args.kind == "synthetic" else {args.kind: 1} if args.kind else None
    with one_line_errors():
        inputs = toolbench_files(args.toolbench)[0] if args.toolbench else [args.jsonl] * bool(args.jsonl)
        for file in filter(None, (args.out, args.report)):  # before the work begins
            if os.path.realpath(file) in map(os.path.realpath, inputs):
                raise UserError(f"{file}: it is read here; write to another file")
            Path(file).parent.mkdir(parents=True, exist_ok=True)
        if args.show or args.max_tokens:
            import toolplay  # only here: data.py lies below toolplay.py
            _, tokenizer = toolplay.load_model("smollm2-135m")
        if args.toolbench:
            fits = (lambda c: len(encode(c, tokenizer)[0]) <= args.max_tokens) if args.max_tokens else lambda c: True
            made = read_toolbench(args.toolbench, fits, args.report, args.questions)[:args.n]
            made = [{"id": n, **c} for n, c in enumerate(made, 1)] if args.questions else made  # predict needs an id
        elif args.jsonl:
            made = read_jsonl(args.jsonl, check_trained)[:args.n]
        elif args.show or args.out:
            made = generate(args.split, args.n or (1000 if args.out else args.show), args.seed, mix)
        else:
            return parser.print_help()
        for conversation in made[:args.show or 0]:
            kind, family = conversation.get("kind", ""), conversation.get("family", "")
            print(f"--- {kind} ({family})\n{coloured(conversation, tokenizer)}")
        write_jsonl(args.out, made)


if __name__ == "__main__":
    main()
