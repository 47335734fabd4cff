"""
dpo.py - direct preference optimisation: prefer the better of two answers

The idea. Of two answers y to one prompt x, a judge prefers y_w ("chosen") to y_l ("rejected"). Reinforcement learning
would fit a reward model to the judgements and then maximise the reward under a KL penalty beta to a reference model.
Rafailov et al. (2023, arXiv:2305.18290) solve this problem in closed form: the best policy's own log-ratio to the
reference is the reward. So we can fit the judgements directly, with a classifier's loss and without sampling.

    r(x, y) = beta log pi(y|x) / pi_ref(y|x)  + a term of x alone, which cancels    implicit reward           (5)
    h       = log pi(y_w|x) / pi_ref(y_w|x)  -  log pi(y_l|x) / pi_ref(y_l|x)       log-ratio difference
    L_DPO   = - E log sigmoid(beta h)                                                                         (7)

log pi(y|x) is a sum over the trained tokens of y, which are the tokens that the model chose. Tool results lie inside y,
but the model did not choose them. So tool results are conditions, not terms of the sum (an implementation that sums
over tool results trains the tool's words, not the model's).

Departures. The reference is the policy before training: an SFT run, or the base model (a new adapter has B = 0, so it
changes nothing). The reference never changes, so its log-probs are computed once, kept in the run folder and checked
against the data, and memory holds no second model (while it samples, a copy of the weights that the adapters are merged
into). IPO's log-ratios are means over the tokens (as in TRL; IPO's eq. 17 has sums). The hinge loss omits SLiC's
regularisation term. Both answers and all pairs of a micro-batch share one token trie, which computes the prompt once
and also the turns that the two answers share.

What to watch: `logp/chosen` often falls, although it should rise; the loss only asks that `logp/rejected` falls faster
(Pal et al. 2024, arXiv:2402.13228). If `logp/chosen` collapses, beta is too small or the learning rate is too large.

For tool use the preference is not "this text, not that text" but "call, do not talk", "this tool" or "one more call":
one token decides each time. Over whole answers (7) also lowers the probability of all tokens after the wrong token.
Right calls consist of these tokens too, so soon no call is well-formed. Therefore `parting` cuts both answers after the
point where they differ. The policy's own faults also lean to one side: most are unnecessary calls, and the policy
learns "never call" before it learns "read the list of tools". Two settings add pairs that balance these faults:
`twins` adds the same request with the other list of tools, and `pairs: "both"` adds faulty copies of what the policy
does right.

    python dpo.py configs/dpo.json          the same as: python toolplay.py train configs/dpo.json
    python dpo.py --show 10 [CONFIG]        pairs, with what differs highlighted
"""
from __future__ import annotations

import contextlib
import difflib
import hashlib
import json
import random
import re
import sys
from collections import namedtuple
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import torch
import torch.nn.functional as F


@dataclass
class Config:
    """DPO's own keys; the shared keys are in toolplay.Config. `source: jsonl` reads pairs, or conversations from which
    pairs are made."""
    pairs: Literal["corrupted", "sampled", "both"] = "corrupted"
                                                     # corrupted: the gold answer against a faulty copy; sampled: the
                                                     # policy's best sample against its worst; both: sampled, or a
                                                     # faulty copy if sampling gives no pair
    faults: list = field(default_factory=list)       # corrupted, both: which of CORRUPTIONS; empty: all
    samples: Annotated[int, "> 0"] = 4               # sampled: answers per prompt (two or more), scored with ppo.py's
                                                     # reward
    temperature: Annotated[float, "> 0"] = 1.0       # sampled: of the sampling
    max_new_tokens: Annotated[int, "> 0"] = 64       # sampled: bound of each turn
    max_turns: Annotated[int, "> 0"] = 3             # sampled: assistant turns; 1 ends an answer after its first calls'
                                                     # results
    reward: str = ""                                 # sampled: as in ppo.py
    reward_weights: dict = field(default_factory=dict)  # sampled: as in ppo.py
    min_gap: Annotated[float, "> 0"] = 0.1           # sampled: best and worst must differ by this much in reward
    min_best: float = 0.0                            # sampled: the best must earn this much; the least bad of bad
                                                     # answers teaches nothing
    chosen: Literal["best", "gold"] = "best"         # sampled: the chosen answer is the best sample, or the example's
                                                     # own first turn (which counts as earning min_best)
    twins: bool = False                              # sampled or both, with chosen gold: if a tool that is not offered
                                                     # was called, add the same request with this tool offered, where
                                                     # the call is right
    parting: Annotated[int, ">= 0"] = 0              # train only this many tokens of each answer, from where the two
                                                     # differ; 0: all
    variant: Literal[tuple(VARIANTS)] = "sigmoid"    # the loss
    beta: Annotated[float, "> 0"] = 0.1              # strength of the pull to the reference; 0.1 as in the paper
    label_smoothing: Annotated[float, "0 to below 0.5"] = 0.0
                                                     # assumed share of wrong preferences (sigmoid, robust, simpo)
    simpo_margin: Annotated[float, ">= 0"] = 0.5     # SimPO's gamma; its beta is 2 to 2.5 in the paper


# --------------------------------------------------------------------------- 1. the losses

VARIANTS = {}               # name of a loss in a config -> the loss
MEAN, FREE = set(), set()   # names of losses: with means over the trained tokens, not sums; without a reference


def variant(*traits):
    """Decorator: enter a loss into VARIANTS and into the sets `traits`. The loss is a function of (chosen, rejected,
    beta, label_smoothing) -> loss of each pair [B]. chosen and rejected are log-ratios to the reference [B], or
    log-probs if the loss is in FREE."""
    def add(loss):
        VARIANTS[loss.__name__] = loss
        for names in traits:
            names.add(loss.__name__)
        return loss
    return add


@variant()
def sigmoid(chosen, rejected, beta, label_smoothing):
    """DPO, eq. 7; with label smoothing: conservative DPO (Mitchell 2023, ericmitchell.ai/cdpo.pdf, eq. 3)."""
    h = chosen - rejected                                                                      # [B]
    return -(1 - label_smoothing) * F.logsigmoid(beta * h) - label_smoothing * F.logsigmoid(-beta * h)


@variant()
def robust(chosen, rejected, beta, label_smoothing):
    """rDPO: unbiased when a share of the judgements is flipped (Chowdhury et al. 2024, arXiv:2403.00409, the loss
    "rDPO")."""
    h = chosen - rejected
    kept, flipped = -F.logsigmoid(beta * h), -F.logsigmoid(-beta * h)
    return ((1 - label_smoothing) * kept - label_smoothing * flipped) / (1 - 2 * label_smoothing)


@variant(MEAN)
def ipo(chosen, rejected, beta, label_smoothing):
    """IPO: regress the difference of the log-ratios on 1 / (2 beta), a finite target (Azar et al. 2023,
    arXiv:2310.12036, eq. 17)."""
    return (chosen - rejected - 1 / (2 * beta)) ** 2


@variant()
def hinge(chosen, rejected, beta, label_smoothing):
    """SLiC's loss on DPO's reward (Zhao et al. 2023, arXiv:2305.10425, eq. 1; Liu et al. 2024, arXiv:2309.06657,
    "hinge-norm")."""
    return torch.relu(1 - beta * (chosen - rejected))


@variant(MEAN, FREE)
def simpo(chosen, rejected, beta, label_smoothing, margin):
    """SimPO: no reference, mean log-probs, a target margin (Meng et al. 2024, arXiv:2405.14734, eq. 6)."""
    h = beta * (chosen - rejected) - margin
    return -(1 - label_smoothing) * F.logsigmoid(h) - label_smoothing * F.logsigmoid(-h)


def dpo_loss(policy_chosen_logp, policy_rejected_logp, ref_chosen_logp, ref_rejected_logp, beta=0.1, variant="sigmoid",
             label_smoothing=0.0, simpo_margin=0.5):
    """The loss of B pairs, as a sum.

    *_logp: [B] log-probs of whole answers, sums over their trained tokens (for ipo and simpo: means, see
    `sequence_logp`). simpo ignores the reference's log-probs; for simpo they may be None.
    -> (loss summed over the pairs, info: sums over the pairs of rewards, margin, accuracy and log-probs).
    Raises ValueError for an unknown variant, for a beta or a label smoothing that makes the loss meaningless, and if
    the variant needs a reference and gets none.
    """
    if not beta > 0:
        raise ValueError(f"beta = {beta}: must be above 0")
    if variant not in VARIANTS:
        raise ValueError(f"variant {variant!r}: must be one of {', '.join(VARIANTS)}")
    if variant in FREE:
        ref_chosen_logp = ref_rejected_logp = torch.zeros(())
    elif ref_chosen_logp is None or ref_rejected_logp is None:
        raise ValueError(f"variant {variant!r} needs the reference's log-probs")
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing = {label_smoothing}: must be in [0, 0.5); "
                         "from there on the judgements say nothing, or the reverse")
    # at least fp32: bf16 cannot tell 760 from 761
    policy_chosen_logp, policy_rejected_logp, ref_chosen_logp, ref_rejected_logp = (
        x.to(torch.promote_types(x.dtype, torch.float32))
        for x in (policy_chosen_logp, policy_rejected_logp, ref_chosen_logp, ref_rejected_logp))
    chosen, rejected = policy_chosen_logp - ref_chosen_logp, policy_rejected_logp - ref_rejected_logp  # [B]
    more = {"margin": simpo_margin} if variant == "simpo" else {}
    losses = VARIANTS[variant](chosen, rejected, beta, label_smoothing, **more)  # [B]
    info = {"rewards/chosen": beta * chosen, "rewards/rejected": beta * rejected,
            "rewards/margin": beta * (chosen - rejected), "rewards/accuracy": (chosen > rejected).float(),
            "logp/chosen": policy_chosen_logp, "logp/rejected": policy_rejected_logp}
    return losses.sum(), {name: value.detach().sum() for name, value in info.items()}


def sequence_logp(logp, mask, mean=False):
    """Log-probs of tokens [B, T] and their mask [B, T] -> log-probs of whole answers [B]: the sum, or the mean, over
    trained tokens.

    In float64, because the loss uses small differences between sums of hundreds of terms.
    """
    total = torch.where(mask.bool(), logp.double(), 0).sum(-1)
    return total / mask.double().sum(-1).clamp(min=1) if mean else total


# --------------------------------------------------------------------------- 2. pairs by corruption

GIVEN = "given"  # the `why` of a pair that was read from a file
# A pair: two rows (ids, mask) that share their prompt, and `why`, which says what is wrong with the second row.
Pair = namedtuple("Pair", "chosen rejected why")

# Each function takes a gold conversation {"messages", "tools"} and returns the messages of a worse conversation. One
# assistant turn differs and contains a fault that small models really make. If the fault does not apply: None.


def wrong_tool(conversation, rng):
    """A call to another offered tool, with arguments that the user's message suggests."""
    at, calls = first_call(conversation)
    others = [name for name in tools_of(conversation) if calls and name != calls[0]["name"]]
    return until(conversation, at, others and [tempting_call(rng.choice(others), conversation), *calls[1:]])


def malformed(conversation, rng):
    """A call that does not parse: an end or a quote is missing, or it is Python instead of JSON."""
    from tools import Call, format_call, parse_calls  # here, so that the losses work without other files
    at, calls = first_call(conversation)
    if not calls:
        return None
    text = format_call(Call(**calls[0]))
    broken = [text.replace("}}", "}"), text.replace('"}', "}"), text.replace('": "', '": '), text.replace('"', "'"),
              text.removesuffix("</tool_call>"),
              re.sub(r'\{"name": "(\w+)", "arguments": (.*)\}<', r"\1(\2)<", text)]
    broken = [b for b in broken if parse_calls(b)[1]]
    thought = conversation["messages"][at].get("content")
    return until(conversation, at, broken and "\n".join([thought] * bool(thought) + [rng.choice(broken)]))


def wrong_argument(conversation, rng):
    """A call with one wrong argument: another operator or number, half of a city's name, a question without one of its
    words, or a list without its last item."""
    from eval import same_call  # here, so that the losses work without other files
    from tools import Call
    at, calls = first_call(conversation)
    changeable = [(key, value) for key, value in (calls[0]["arguments"].items() if calls else ())
                  if isinstance(value, (str, int, float)) or isinstance(value, list) and value]
    if not changeable:
        return None
    key, value = rng.choice(changeable)
    worse = [{**calls[0], "arguments": {**calls[0]["arguments"], key: c}} for c in changes(key, value, rng)]
    worse = [call for call in worse if not same_call(Call(**calls[0]), Call(**call))]  # a missing filler is no fault
    return until(conversation, at, worse and [rng.choice(worse), *calls[1:]])


def changes(key, value, rng):
    """Wrong values for an argument; some of these values may still equal the right one."""
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, (int, float)):
        return [value + rng.randint(1, 9)]
    if isinstance(value, list):
        return [value[:-1]]
    words = value.split()
    left_out = rng.randrange(max(len(words), 1))
    texts = [re.sub(r"\d(?=\D*$)", lambda m: str((int(m.group()) + rng.randint(1, 9)) % 10), value, count=1),
             value.translate(str.maketrans("+-*/", "-+/*")) if key == "expression" else value,
             " ".join(w for i, w in enumerate(words) if i != left_out) if len(words) > 1 else value[:-2],
             {"celsius": "fahrenheit", "fahrenheit": "celsius"}.get(value, value)]
    return [text for text in texts if text.strip()]


def missing_argument(conversation, rng):
    """A call without its first required argument. (Without an optional argument the call could still be right.)"""
    at, calls = first_call(conversation)
    if not calls or calls[0]["name"] not in (tools := tools_of(conversation)):
        return None
    required = tools[calls[0]["name"]].parameters.get("required", [])
    gone = next((name for name in calls[0]["arguments"] if name in required), None)
    arguments = {name: value for name, value in calls[0]["arguments"].items() if name != gone}
    return until(conversation, at, gone and [{**calls[0], "arguments": arguments}, *calls[1:]])


def call_left_out(conversation, rng):
    """Several calls without the last one."""
    at, calls = first_call(conversation)
    return until(conversation, at, calls[:-1])


def call_too_many(conversation, rng):
    """The right calls, followed by one more call."""
    at, calls = first_call(conversation)
    names = list(tools_of(conversation))
    return until(conversation, at, names and calls and [*calls, tempting_call(rng.choice(names), conversation)])


def missing_call(conversation, rng):
    """A made-up answer instead of a tool call."""
    at, calls = first_call(conversation)
    guess = out_of_the_blue("guesses", rng)
    return until(conversation, at, calls and guess)


def needless_call(conversation, rng):
    """A call although the message needs no call."""
    at, calls = first_call(conversation)
    names = list(tools_of(conversation))
    return until(conversation, at, names and not calls and [tempting_call(rng.choice(names), conversation)])


def ignores_result(conversation, rng):
    """A final answer whose numbers or content differ from the tool's result."""
    text = final_answer(conversation)
    if not text:
        return None
    other = re.sub(r"\d{1,4000}", lambda m: str(int(m.group()) + rng.randint(1, 30)), text)
    # the answer has no number to change, or the result is an error: make up an answer instead
    if other == text or '"error"' in conversation["messages"][-2]["content"]:
        other = out_of_the_blue("made_up", rng)
    return until(conversation, -1, other)


def endless(conversation, rng):
    """A final answer that repeats itself and does not end (`pair_of` removes its end token)."""
    text = final_answer(conversation)
    return until(conversation, -1, text and " ".join([text] * 3))


CORRUPTIONS = {f.__name__: f for f in (wrong_tool, malformed, wrong_argument, missing_argument, call_left_out,
                                       call_too_many, missing_call, needless_call, ignores_result, endless)}


def first_call(conversation):
    """-> (index of the first assistant message, calls of this message). There must be an assistant message."""
    from data import calls_of  # here, so that the losses work without other files
    at = next(n for n, m in enumerate(conversation["messages"]) if m["role"] == "assistant")
    return at, calls_of(conversation["messages"][at])


def final_answer(conversation):
    """The text of the answer that follows a tool result and ends the conversation; "" if there is no such answer."""
    from data import calls_of  # here, so that the losses work without other files
    *_, before, last = conversation["messages"]
    final = before["role"] == "tool" and last["role"] == "assistant" and not calls_of(last)
    return last["content"] if final else ""


def out_of_the_blue(kind, rng):
    """A random made-up answer of this kind, with a random number in it."""
    from data import corpus  # here, so that the losses work without other files
    return rng.choice([text.format(n=rng.randint(low, high)) for text, low, high in corpus("faults.json")[kind]])


def until(conversation, at, worse):
    """The messages before index `at`, then an assistant message with the `worse` calls or text; None if `worse` is
    empty. If calls replace calls, the thought beside the old calls is kept."""
    gold = conversation["messages"][at]
    thought = gold.get("content") or "" if gold.get("tool_calls") else ""
    said = {"content": worse, "tool_calls": ()} if isinstance(worse, str) else {"content": thought, "tool_calls": worse}
    return [*conversation["messages"][:at], {"role": "assistant", **said}] if worse else None


def tools_of(conversation):
    """{name: Tool} of the tools that the conversation offers."""
    from tools import load_tools  # here, so that the losses work without other files
    return load_tools(conversation.get("tools") or [])


def tempting_call(name, conversation):
    """A call that a model makes if it looks only at single words. The arguments are the numbers, the capitalised word
    or the whole message."""
    tool = tools_of(conversation)[name]
    first = next(iter([*tool.parameters.get("required", []), *tool.parameters.get("properties", {})]), "query")
    text = next(m["content"] for m in conversation["messages"] if m["role"] == "user")
    numbers, capital = re.findall(r"\d[\d.]*", text), re.findall(r"(?<!^)\b[A-Z]\w+", text)
    arguments = {"calculator": {"expression": " * ".join(numbers[:2]) or "1 + 1"},
                 "weather": {"city": (capital or text.rstrip("?.! ").split() or ["here"])[-1]}}
    return {"name": name, "arguments": arguments.get(name, {first: text.rstrip("?. ")})}


def corrupted_pairs(conversations, tokenizer, seed=0, style="signature", faults=()):
    """Gold conversations -> pairs: the gold conversation, and a copy with one fault of a random kind that applies (one
    of `faults`, if any are named)."""
    pairs = []
    for n, conversation in enumerate(conversations):
        roles = [m["role"] for m in conversation["messages"]]
        if "assistant" not in roles or "user" not in roles[:roles.index("assistant")]:
            continue  # nothing to corrupt: the conversation has no answer to a request
        rng, names = random.Random(f"{seed} pair {n}"), list(faults or CORRUPTIONS)
        for name in rng.sample(names, len(names)):
            worse = CORRUPTIONS[name](conversation, rng)
            if worse:
                *shared, better = conversation["messages"][:len(worse)]
                pair = pair_of({**conversation, "messages": shared}, [better], worse[-1:], tokenizer, style, name)
                # no pair if the gold turn has weight 0, because this turn must not be learned
                if all(any(mask) for _, mask in pair[:2]):
                    pairs.append(pair)
                    break
    return pairs


def pair_of(prompt, chosen, rejected, tokenizer, style="signature", why=""):
    """A prompt (conversation) and two continuations (messages) -> Pair. Assistant turns of the prompt are not
    trained."""
    import data  # here, so that the losses work without other files
    start = len(data.encode(prompt, tokenizer, style)[0])
    rows = []
    for answer in (chosen, rejected):
        ids, mask = data.encode({**prompt, "messages": [*prompt["messages"], *answer]}, tokenizer, style)
        rows.append((ids, [0] * start + mask[start:]))
    if why == "endless":  # the fault is the missing end token
        ids, mask = rows[1]
        end = max(t for t, m in enumerate(mask) if m)
        rows[1] = (ids[:end], mask[:end])
    return Pair(*rows, why)


def parted(pair, tokens):
    """The pair, cut `tokens` tokens after the point where its answers differ, with a mask for these tokens alone. With
    `tokens` = 0 the pair is unchanged.

    One or two tokens decide between call and talk, between one tool and another, between a further call and the end.
    DPO over whole answers also lowers the probability of what follows a wrong decision. All calls are alike there, so
    soon no call is well-formed. A pair is unchanged if its answers do not differ in tokens of the model (one answer
    begins with the whole other answer). A given pair is also unchanged: its answers are whatever somebody preferred.
    """
    at = parting_of(pair)
    rows = [(ids[:at + tokens], [0] * at + list(mask[at:at + tokens])) for ids, mask in pair[:2]]
    return Pair(*rows, pair.why) if tokens and pair.why != GIVEN and all(any(mask) for _, mask in rows) else pair


def parting_of(pair):
    """The position of the first token that differs; 0 if one answer begins with the whole other answer."""
    return next((t for t, (a, b) in enumerate(zip(pair.chosen[0], pair.rejected[0])) if a != b), 0)


def part_in_arguments(pair, tokenizer):
    """Whether the answers of a pair part inside the arguments of a call. What is wrong is then a later decision (the
    tool, one call more), and the token where they part has nothing to do with it: to prefer that operator or digit
    would spoil the expressions."""
    call = tokenizer.decode(pair.chosen[0][:parting_of(pair)]).rpartition("<tool_call>")[2]
    return '"arguments"' in call and "</tool_call>" not in call


def lines_of(config, split, tokenizer, read, offered=()):
    """The content of a run's source: Pairs, and what `read` returns for other lines. A line with "chosen" or "rejected"
    is a pair, whatever else it holds (UltraFeedback's pairs also have "messages")."""
    import data  # here, so that the losses work without other files
    return data.conversations(config, split, tokenizer, lambda line: read_pair(line, tokenizer, config.tool_style)
                              if isinstance(line, dict) and {"chosen", "rejected"} & set(line) else read(line), offered)


def read_pair(line, tokenizer, style="signature"):
    """A line of a pairs file in TRL's format (prompt, chosen, rejected as messages or texts, and tools) -> Pair.

    Without "prompt", chosen and rejected are whole conversations and their common beginning is the prompt. Chosen and
    rejected may also be whole conversations that repeat the prompt's text or messages (as in UltraFeedback). A text in
    "prompt" becomes a user message, a text in chosen or rejected an assistant message. So two texts alone have no
    prompt. Raises UserError for anything else.
    """
    import data  # here, so that the losses work without other files
    from tools import UserError
    if not isinstance(line, dict) or not {"chosen", "rejected"} <= set(line):
        raise UserError('a pair is an object with "prompt", "chosen" and "rejected"')

    def as_messages(x, role):
        return [{"role": role, "content": x}] if isinstance(x, str) else [x] if isinstance(x, dict) else x

    prompt = as_messages(line.get("prompt") or [], "user")
    chosen, rejected = as_messages(line["chosen"], "assistant"), as_messages(line["rejected"], "assistant")
    if not all(isinstance(part, list) for part in (prompt, chosen, rejected)):
        raise UserError('"prompt", "chosen" and "rejected" are texts or lists of messages')
    if not chosen or not rejected:
        raise UserError(f'"{"rejected" if chosen else "chosen"}" is empty')

    tools = data.offered_in(line) or []

    def spelled(messages):  # in one spelling; otherwise equal messages could differ
        return data.check_conversation({"messages": messages, "tools": tools})["messages"] if messages else []

    def complete(answer):
        """The whole conversation: the prompt and the answer, or the answer alone if it repeats the prompt."""
        own, before = spelled(answer), spelled(prompt)
        whole = isinstance(line.get("prompt"), str) and own[0]["role"] in ("system", "user")
        if whole and line["prompt"].strip() not in ["", *(m["content"].strip() for m in own)]:
            raise UserError('"prompt" is another text than the conversation in "chosen" and "rejected" begins with')
        if whole or own[:len(before)] == before:
            return own
        if own[0]["role"] == before[-1]["role"] == "assistant":
            raise UserError('"prompt" ends with an assistant message; end it with the user\'s, '
                            'and let chosen and rejected hold all of the answer')
        return spelled([*prompt, *answer])
    chosen, rejected = complete(chosen), complete(rejected)
    shared = next((n for n, (a, b) in enumerate(zip(chosen[:-1], rejected[:-1])) if a != b),
                  min(len(chosen), len(rejected)) - 1)
    if not shared:
        raise UserError('the pair has no "prompt", and chosen and rejected have no messages in common that could be it')
    # Messages that both answers share belong to the prompt: in mean log-probs (ipo, simpo) they would not cancel.
    prompt = {"messages": chosen[:shared], "tools": tools}
    pair = pair_of(prompt, chosen[shared:], rejected[shared:], tokenizer, style, GIVEN)
    if not all(any(mask) for _, mask in pair[:2]):
        raise UserError("chosen and rejected must each hold an assistant message")
    if len({tuple(i for i, m in zip(ids, mask) if m) for ids, mask in pair[:2]}) == 1:
        raise UserError("chosen and rejected are the same in all that the model says: there is nothing to prefer")
    return pair


# --------------------------------------------------------------------------- 3. training

def check_settings(config):
    """Raise UserError for settings that do not fit each other, before minutes of sampling."""
    from ppo import reward_of
    from tools import UserError
    if config.lora_dropout:
        raise UserError(f"lora_dropout = {config.lora_dropout}: must be 0 for dpo, whose reference is the same model")
    if unknown := [fault for fault in config.faults if fault not in list(CORRUPTIONS)]:
        raise UserError(f"faults: {unknown[0]!r} is none of {', '.join(CORRUPTIONS)}")
    if config.pairs != "corrupted":
        if config.samples < 2 and config.chosen == "best":
            raise UserError(f"samples = {config.samples}: the best and the worst of several answers make a pair; "
                            "at least 2 are needed")
        if config.chosen == "gold" and config.max_turns > 1:
            raise UserError(f'max_turns = {config.max_turns}: chosen = "gold" is the example\'s first turn, so what '
                            'stands against it must be one turn too; set max_turns = 1')
        reward_of(config)


def train(run):
    # Imported here so that the losses work in a project that copies this file alone.
    import data
    import toolplay
    from sft import pad_mask
    config = run.config
    check_settings(config)

    # 1. data: pairs of rows
    model, tokenizer = toolplay.prepare_model(config, run.device)
    pairs, held_out = (datasets(config, tokenizer) if config.pairs == "corrupted"
                       else sampled_datasets(run, model, tokenizer))
    pairs, held_out = [[parted(pair, config.parting) for pair in part] for part in (pairs, held_out)]
    tokens = sum(len(ids) for pair in pairs for ids, _ in pair[:2])
    nodes = sum(len(toolplay.Trie([ids for ids, _ in pair[:2]])) for pair in pairs)
    if run.rank == 0:
        print(f"{len(pairs)} pairs: {tokens} tokens, {nodes} trie nodes, "
              f"{tokens / nodes:.2f} times fewer for sharing the prompt within a pair alone", file=sys.stderr)

    def answers(group):
        """Log-probs of the chosen and of the rejected answers: [2, B]."""
        rows = [row for pair in group for row in pair[:2]]  # chosen and rejected alternate
        logp = toolplay.token_logprobs(model, rows, budget=None if torch.is_grad_enabled() else config.micro_tokens)
        return sequence_logp(logp, pad_mask(rows, run.device), config.variant in MEAN).reshape(-1, 2).T

    # 2. reference: in the trainer's precision; otherwise the first log-ratios would not be 0
    batches = data.Batches([pair.chosen for pair in pairs], config)
    trainer = toolplay.Trainer(config, {n: p for n, p in model.named_parameters() if p.requires_grad}, batches.total)
    reference = reference_logp(run, pairs + held_out, answers, trainer.autocast)
    units = [(*pair[:2], *logp) for pair, logp in zip(pairs + held_out, reference)]  # chosen, rejected, reference's two
    units, held_out = units[:len(pairs)], units[len(pairs):]

    # 3. optimizer
    run.start(trainer, [pairs, held_out])

    def loss(group):
        reference = torch.tensor([unit[2:] for unit in group], dtype=torch.float64, device=run.device).T  # [2, B]
        return dpo_loss(*answers(group), *reference, config.beta, config.variant, config.label_smoothing,
                        config.simpo_margin)

    # 4. loop
    # always in eval mode: with dropout, the log-ratios would also contain the dropout noise
    for step in run.steps(trainer, batches.total):
        batch = [units[i] for i in batches(step)]
        info = toolplay.train_step(trainer, batch, loss, rows=lambda unit: unit[:2])
        if held_out and (trainer.step == batches.total or config.eval_every and trainer.step % config.eval_every == 0):
            with torch.no_grad(), trainer.autocast():
                total, sums = loss(held_out)
            info |= {"eval_loss": float(total) / len(held_out),
                     "eval_accuracy": float(sums["rewards/accuracy"]) / len(held_out)}
        if step == 0:
            info["trie_saving"] = tokens / nodes
        run.log(trainer.step, info, tokens=sum(len(ids) for unit in batch for ids, _ in unit[:2]))

    # 5. save
    run.save_model(model, tokenizer)
    run.finish()


def datasets(config, tokenizer):
    """-> (training pairs, held-out pairs): given pairs and corrupted pairs. Pairs longer than max_tokens are left out
    and counted."""
    import data
    from tools import UserError
    out = []
    for split in ("train", "dev"):
        made = lines_of(config, split, tokenizer, data.check_conversation)
        pairs = [x for x in made if isinstance(x, Pair)]
        pairs += corrupted_pairs([x for x in made if not isinstance(x, Pair)], tokenizer, config.seed,
                                 config.tool_style, config.faults)
        fit = fitting(pairs, config, f"{split} pairs")
        if split == "train" and not fit:
            raise UserError(f"no pair fits max_tokens = {config.max_tokens}; raise it" if pairs else
                            f"faults: none of {', '.join(config.faults or CORRUPTIONS)} applies to any of the "
                            f"{len(made)} conversations; name others, or another mix")
        out.append(fit)
    return out


def sampled_pairs(model, tokenizer, conversations, config):
    """On-policy pairs: the best against the worst of `samples` answers to each prompt, if the reward tells them apart.

    The rows are the sampled ids themselves, token for token. With `chosen: "gold"` the pair is the example's own first
    turn against the worst sample (as in SPIN, Chen et al. 2024, arXiv:2401.01335, but only if the sample is wrong).
    Given Pairs are unchanged.
    """
    import data
    import eval as evaluation
    import toolplay
    from ppo import judgeable, reward_of
    score = reward_of(config)
    pairs = [x for x in conversations if isinstance(x, Pair)]
    conversations = [x for x in conversations if not isinstance(x, Pair)]
    cases = judgeable([evaluation.as_case(c) for c in conversations], config)
    episodes = toolplay.rollout(model, tokenizer, [case.conversation for case in cases for _ in range(config.samples)],
                                temperature=config.temperature, max_new_tokens=config.max_new_tokens,
                                max_turns=config.max_turns, style=config.tool_style, seed=f"{config.seed} pairs",
                                batch_size=128, bar="dpo answers")
    for n, (case, conversation) in enumerate(zip(cases, conversations)):
        tries = episodes[n * config.samples:(n + 1) * config.samples]
        scores = [score(case, episode)[0] for episode in tries]
        best, worst = scores.index(max(scores)), scores.index(min(scores))
        chosen, earned, rival = (tries[best].ids, tries[best].mask), scores[best], f"{scores[best]:.2f}"
        if config.chosen == "gold":
            turn = len(case.conversation["messages"]) + 1
            shown = {**conversation, "messages": conversation["messages"][:turn]}
            chosen, earned = data.encode(shown, tokenizer, config.tool_style), config.min_best
            rival = "the example's"
        # A line with "expected" has no gold turn; a prompt that fills the whole context has no answer.
        answered = any(chosen[1][tries[worst].prompt:]) and any(tries[worst].mask)
        pair = Pair(chosen, (tries[worst].ids, tries[worst].mask), f"reward {scores[worst]:.2f} against {rival}")
        if (earned >= config.min_best and earned - scores[worst] >= config.min_gap and answered
                and not (config.parting and part_in_arguments(pair, tokenizer))):
            pairs.append(pair)
            if config.twins and config.chosen == "gold" and tries[worst].calls and (call := withheld(conversation)):
                rng = random.Random(f"{config.seed} twin {n}")
                pairs.append(twin(conversation, call, tokenizer, config.tool_style, rng))
        elif config.pairs == "both" and len(conversation["messages"]) > len(case.conversation["messages"]):
            # the example has an answer, which a faulty copy helps to maintain
            pairs += corrupted_pairs([conversation], tokenizer, f"{config.seed} {n}", config.tool_style, config.faults)
    return fitting(pairs, config, "sampled pairs")


def withheld(conversation):
    """The call that would be right if its tool were offered, or None. (A template conversation has it in "facts".)"""
    from tools import BUILTIN
    match conversation:
        case {"facts": {"withheld": {"name": str(name), "arguments": dict()} as call}} if (
                name in BUILTIN and name not in tools_of(conversation)):
            return call


def twin(conversation, call, tokenizer, style, rng):
    """Pair for a request whose tool was withheld, now with the tool: the call is preferred to the answer that it cannot
    be done.

    The original pair prefers the opposite, so only the list of tools tells which answer is right. Without the twin, DPO
    learns what all pairs with a withheld tool have in common: not to call.
    """
    at, _ = first_call(conversation)
    tools = list(conversation["tools"])
    tools.insert(rng.randint(0, len(tools)), call["name"])
    prompt = {"messages": conversation["messages"][:at], "tools": tools}
    return pair_of(prompt, [{"role": "assistant", "content": "", "tool_calls": [call]}],
                   conversation["messages"][at:at + 1], tokenizer, style, "its tool is offered")


def fitting(pairs, config, what):
    import data
    return data.fitting(pairs, [max(len(ids) for ids, _ in pair[:2]) for pair in pairs], config.max_tokens, what)


def prompts_of(config, split, tokenizer):
    """Conversations whose first user turns are the prompts for sampling, and a file's own Pairs. A line of a file that
    names no tools offers the three built-in tools."""
    import data
    from eval import as_case
    from tools import BUILTIN

    def usable(line):  # checked here, where the error message can still name the number of a bad line
        case = as_case(line)
        return data.check_conversation({**line, "messages": data.messages_of(line, True),
                                        "tools": case.conversation["tools"]})
    return lines_of(config, split, tokenizer, usable, BUILTIN)


def sampled_datasets(run, model, tokenizer):
    """-> (training pairs, held-out pairs), sampled once from the initial policy and kept in the run folder."""
    import lora
    import toolplay
    from tools import UserError
    config, path = run.config, run.folder / "pairs.json"
    if not toolplay.gathered(path.exists())[0]:  # all ranks decide alike
        prompts = [prompts_of(config, split, tokenizer) for split in ("train", "dev")]
        with lora.merged(model) if config.lora_r else contextlib.nullcontext():  # sampling is faster
            out = toolplay.gathered([sampled_pairs(model, tokenizer, chats, config) if chats else []
                                     for chats in prompts])[0]
        asked = sum(not isinstance(chat, Pair) for chat in prompts[0])
        given = f" and {len(prompts[0]) - asked} given pairs" if asked < len(prompts[0]) else ""
        if run.rank == 0:
            print(f"{len(out[0])} pairs of {asked} prompts with {config.samples} answers each{given}; the other "
                  "prompts gave none: their answers earned alike, too little, or (chosen = gold) none was bad enough",
                  file=sys.stderr)
        if not out[0]:
            raise UserError("no prompt gave a pair: raise temperature or samples, "
                            "or start_from a run that gets some prompts right")
        if run.rank == 0:
            toolplay.write_json(path, out)
        return out

    def as_pairs(kept):
        return [[Pair(tuple(chosen), tuple(rejected), why) for chosen, rejected, why in part] for part in kept]
    return as_pairs(toolplay.read_json(path, as_pairs, "remove it (the pairs are sampled anew), and start a new run"))


def reference_logp(run, pairs, answers, autocast):
    """The initial policy's log-probs of all pairs -> [[chosen, rejected]], from the run folder if it holds them.

    UserError if they belong to other pairs or to another model. Must be called before a checkpoint is loaded: the model
    is the initial policy only until then.
    """
    import toolplay
    from tools import UserError
    key = hashlib.sha256(json.dumps([run.config.model, toolplay.start_hashes(run.config), run.config.precision,
                                     run.config.variant in MEAN, [pair[:2] for pair in pairs]]).encode()).hexdigest()
    path = run.folder / "reference.json"
    if toolplay.gathered(path.exists())[0]:  # all ranks decide alike
        kept = toolplay.read_json(path,
                                  lambda kept: (kept["data_sha256"], [float(a) + float(b) for a, b in kept["logp"]]),
                                  "remove it: it is computed anew")
        if kept["data_sha256"] != key or len(kept["logp"]) != len(pairs):
            raise UserError(f"{path}: these log-probs belong to other pairs or to another model; "
                            "the data has changed since the run began. Start a new run")
        return kept["logp"]
    with torch.no_grad(), autocast():  # a loss without reference gets zeros: the file is written for its hash
        logp = ([(0.0, 0.0)] * len(pairs) if run.config.variant in FREE
                else toolplay.shared_out(pairs, lambda own: answers(own).T.tolist()))
    if run.rank == 0:
        toolplay.write_json(path, {"data_sha256": key, "logp": logp})
    return logp


def show(n, config):
    """Print n pairs: the text from the last user message on (without ChatML: all text after the tools), with the
    differences in colour (green: chosen, red: rejected)."""
    import data
    import toolplay
    from tools import UserError, printable
    check_settings(config)
    if config.pairs != "corrupted":
        model, tokenizer = toolplay.prepare_model(config, toolplay.pick_device(config.device))
        pairs = sampled_pairs(model.eval(), tokenizer, prompts_of(config, "train", tokenizer)[:4 * n], config)
    else:
        tokenizer = toolplay.load_model(config.model)[1]
        pairs, _ = datasets(config, tokenizer)
    if config.parting:
        print(f"(trained are {config.parting} tokens of either answer, from where the two part)")
    if not pairs:
        raise UserError(f"no pair among the answers to {4 * n} prompts: show more, or raise temperature or samples")
    for pair in pairs[:n]:
        (ids, mask), (other, other_mask), why = pair
        # the first difference, or the beginning of an answer if that comes earlier
        start = min(toolplay.common_prefix(ids, other), mask.index(1), other_mask.index(1))
        words = [re.findall(r"\w+|\s+|[^\w\s]", printable(tokenizer.decode(row[start:]).rstrip("\n")))
                 for row in (ids, other)]
        marked = ["", ""]
        for tag, a, b, c, d in difflib.SequenceMatcher(None, *words, autojunk=False).get_opcodes():
            for side, (colour, piece) in enumerate(((32, words[0][a:b]), (31, words[1][c:d]))):
                marked[side] += ("".join(piece) if tag == "equal" or not piece
                                 else f"\033[{colour};1m{''.join(piece)}\033[0m")
        # in other layouts no turns can be told apart
        before = "<|im_start|>user\n" if data.is_chatml(tokenizer) else data.TOOL_RULES
        prompt = tokenizer.decode(ids[:start]).split(before)[-1]
        prompt = prompt.replace("<|im_end|>\n<|im_start|>assistant\n", "\n")
        prompt = printable(prompt.rstrip("\n")).replace("\n", "\n            ")
        print(f"--- {why}\n  prompt    {prompt}\n  chosen    {marked[0]}\n  rejected  {marked[1]}")


def main(argv=None):
    import toolplay
    from tools import UserError
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] != ["--show"]:
        return toolplay.main(["train", *argv])
    with toolplay.one_line_errors():
        counts, rest = ([a for a in argv[1:] if bool(re.fullmatch(r"[-+]?\d+", a)) is number]
                        for number in (True, False))
        count, names = int((counts or ["10"])[0]), [a for a in rest if a[:2] != "--"]
        if len(counts) > 1 or len(names) > 1 or not 1 <= count <= 1000:
            raise UserError(f"--show {' '.join(argv[1:])}: how many pairs (1 to 1000), "
                            "perhaps one config or run folder, and --key=value")
        source = Path(names[0]) if names else None
        source = (source / "config.json" if source and source.is_dir()
                  else source or {"method": "dpo", "examples": 4 * count})
        config = toolplay.load_config(source, [a for a in rest if a[:2] == "--"])
        if config.method != "dpo":
            raise UserError(f"{source}: its method is {config.method}; pairs are DPO's")
        show(count, config)


if __name__ == "__main__":
    main()
