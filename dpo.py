"""
dpo.py - direct preference optimisation: prefer the better of two answers

The idea. Of two answers y to one prompt x a judge prefers y_w ("chosen") to y_l ("rejected"). Reinforcement learning
would fit a reward model to such judgements and then maximise it under a KL penalty beta to a reference model. Rafailov
et al. (2023, arXiv:2305.18290) solve that problem in closed form: the best policy's own log-ratio to the reference is
the reward, so that the judgements can be fitted directly, with a classifier's loss and without sampling.

    r(x, y) = beta log pi(y|x) / pi_ref(y|x)  + a term of x alone, which cancels    implicit reward           (5)
    h       = log pi(y_w|x) / pi_ref(y_w|x)  -  log pi(y_l|x) / pi_ref(y_l|x)       log-ratio difference
    L_DPO   = - E log sigmoid(beta h)                                                                         (7)

log pi(y|x) is a sum over the trained tokens of y: what the model chose. Results of tools stand inside y, but the model
did not choose them, so they are conditions and no terms (implementations that sum over them push the tool, not the
model).

Departures. The reference is the policy as training found it (an SFT run, or the base model, which is the same thing
while B = 0); it never changes, so its log-probs are computed once, kept in the run folder and checked against the data,
and no second model is held in memory. IPO's log-ratios are means over the tokens (as in TRL; its eq. 17 has sums), and
the hinge stands without SLiC's regularisation term. Both answers and all pairs of a micro-batch lie in one token trie:
the prompt is computed once, and so are the turns that the two answers share.

What to watch: `logp/chosen` often falls, although it should rise; the loss only asks that `logp/rejected` falls faster
(Pal et al. 2024, arXiv:2402.13228). A fall to nothing means a beta too small or a step too large.

For tools the wish is not "this text rather than that one" but "call rather than talk, this tool, one call more": one
token each time. Over whole answers (7) also pushes down all that follows the wrong token, which is what right calls are
made of, and soon none is well-formed. So `parting` cuts both answers behind where they part; and since the policy's own
faults lean to one side (most are needless calls, and "never call" is learned before "read the list of tools"), they
need company: `twins`, the same request with the other list of tools, and `pairs: "both"`, faulty copies of what it does
right.

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
    """DPO's own keys; the shared ones are in toolplay.Config. `source: jsonl` reads pairs, or conversations to make
    them of."""
    pairs: Literal["corrupted", "sampled", "both"] = "corrupted"
                                                     # gold against a faulty copy; the policy's own best against its
                                                     # worst; that, and a faulty copy where it makes no pair
    faults: list = field(default_factory=list)       # corrupted, both: which of CORRUPTIONS; empty: all
    samples: Annotated[int, "> 0"] = 4               # sampled: answers to each prompt (two or more), scored with
                                                     # ppo.py's reward
    temperature: Annotated[float, "> 0"] = 1.0       # sampled: of the sampling
    max_new_tokens: Annotated[int, "> 0"] = 64       # sampled: bound of each turn
    max_turns: Annotated[int, "> 0"] = 3             # sampled: assistant turns; 1 ends an answer behind its calls'
                                                     # results
    reward: str = ""                                 # sampled: as in ppo.py
    reward_weights: dict = field(default_factory=dict)  # sampled: as in ppo.py
    min_gap: Annotated[float, "> 0"] = 0.1           # sampled: best and worst must differ by this much in reward
    min_best: float = 0.0                            # sampled: the best must earn this much; the least bad of bad
                                                     # answers teaches nothing
    chosen: Literal["best", "gold"] = "best"         # sampled: the better answer is the best sample, or the example's
                                                     # own first turn (taken to earn min_best)
    twins: bool = False                              # sampled, both; gold: where a tool that is not offered was called,
                                                     # also the same request with it: there the call is right
    parting: Annotated[int, ">= 0"] = 0              # train only this many tokens of either answer, from where the two
                                                     # part; 0: all
    variant: Literal[tuple(VARIANTS)] = "sigmoid"    # the loss
    beta: Annotated[float, "> 0"] = 0.1              # strength of the tie to the reference; 0.1 as in the paper
    label_smoothing: Annotated[float, "0 to below 0.5"] = 0.0
                                                     # share of judgements taken to be wrong (sigmoid, robust, simpo)
    simpo_margin: Annotated[float, ">= 0"] = 0.5     # SimPO's gamma; its beta is 2 to 2.5 in the paper


# --------------------------------------------------------------------------- 1. the losses

VARIANTS = {}               # name -> loss, as a config may name it
MEAN, FREE = set(), set()   # log-probs are means over the trained tokens, not sums; no reference is needed


def variant(*traits):
    """A loss of this name: a function of (chosen, rejected, beta, label_smoothing), log-ratios to the reference [B]
    (without one: log-probs) -> loss of each pair [B]."""
    def add(loss):
        VARIANTS[loss.__name__] = loss
        for names in traits:
            names.add(loss.__name__)
        return loss
    return add


@variant()
def sigmoid(chosen, rejected, beta, label_smoothing):
    """DPO, eq. 7; with label smoothing the conservative one (Mitchell 2023, ericmitchell.ai/cdpo.pdf, eq. 3)."""
    h = chosen - rejected                                                                      # [B]
    return -(1 - label_smoothing) * F.logsigmoid(beta * h) - label_smoothing * F.logsigmoid(-beta * h)


@variant()
def robust(chosen, rejected, beta, label_smoothing):
    """rDPO, unbiased when a share of the judgements is flipped (Chowdhury et al. 2024, arXiv:2403.00409, the loss
    "rDPO")."""
    h = chosen - rejected
    kept, flipped = -F.logsigmoid(beta * h), -F.logsigmoid(-beta * h)
    return ((1 - label_smoothing) * kept - label_smoothing * flipped) / (1 - 2 * label_smoothing)


@variant(MEAN)
def ipo(chosen, rejected, beta, label_smoothing):
    """IPO: regress the difference on 1 / (2 beta), which is finite (Azar et al. 2023, arXiv:2310.12036, eq. 17)."""
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
    `sequence_logp`). The reference's are ignored by simpo and may be None there.
    -> (loss summed over the pairs, info: sums over the pairs of rewards, margin, accuracy and log-probs).
    Raises ValueError for an unknown variant, for a beta or a smoothing that makes the loss meaningless, and without a
    reference that is needed.
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
    # half precision cannot tell 760 from 761
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
    """Log-probs of tokens [B, T] under their mask [B, T] -> of whole answers [B]: the sum, or the mean, over trained
    tokens.

    In float64: the loss looks at small differences of sums of hundreds of terms.
    """
    total = torch.where(mask.bool(), logp.double(), 0).sum(-1)
    return total / mask.double().sum(-1).clamp(min=1) if mean else total


# --------------------------------------------------------------------------- 2. pairs by corruption

GIVEN = "given"  # why, of a pair that a file holds
# A pair: two rows (ids, mask) that share their prompt, and what is wrong with the second.
Pair = namedtuple("Pair", "chosen rejected why")

# Each takes a gold conversation {"messages", "tools"} and returns the messages of a worse one that departs from it in
# one assistant turn, as such models really fail; or None where it does not apply.


def wrong_tool(conversation, rng):
    """Another of the offered tools, with arguments that the message suggests."""
    at, calls = first_call(conversation)
    others = [name for name in tools_of(conversation) if calls and name != calls[0]["name"]]
    return until(conversation, at, others and [tempting_call(rng.choice(others), conversation), *calls[1:]])


def malformed(conversation, rng):
    """A call that does not parse: an end or a quote missing, Python in the place of JSON."""
    from tools import Call, format_call, parse_calls  # here, so that this file alone gives the losses
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
    """An operator or a number changed, half of a city's name, a word of the question left out, a list's last item
    gone."""
    from eval import same_call  # here, so that this file alone gives the losses
    from tools import Call
    at, calls = first_call(conversation)
    changeable = [(key, value) for key, value in (calls[0]["arguments"].items() if calls else ())
                  if isinstance(value, (str, int, float)) or isinstance(value, list) and value]
    if not changeable:
        return None
    key, value = rng.choice(changeable)
    worse = [{**calls[0], "arguments": {**calls[0]["arguments"], key: c}} for c in changes(key, value, rng)]
    worse = [call for call in worse if not same_call(Call(**calls[0]), Call(**call))]  # a filler word less is no fault
    return until(conversation, at, worse and [rng.choice(worse), *calls[1:]])


def changes(key, value, rng):
    """What an argument may be mistaken for; some of it may be the same still."""
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
    """A call without the first argument that its tool requires; without an optional one it might be as right."""
    at, calls = first_call(conversation)
    if not calls or calls[0]["name"] not in (tools := tools_of(conversation)):
        return None
    required = tools[calls[0]["name"]].parameters.get("required", [])
    gone = next((name for name in calls[0]["arguments"] if name in required), None)
    arguments = {name: value for name, value in calls[0]["arguments"].items() if name != gone}
    return until(conversation, at, gone and [{**calls[0], "arguments": arguments}, *calls[1:]])


def call_left_out(conversation, rng):
    """Of several calls the last is not made."""
    at, calls = first_call(conversation)
    return until(conversation, at, calls[:-1])


def call_too_many(conversation, rng):
    """Behind the calls that are due one more."""
    at, calls = first_call(conversation)
    names = list(tools_of(conversation))
    return until(conversation, at, names and calls and [*calls, tempting_call(rng.choice(names), conversation)])


def missing_call(conversation, rng):
    """An answer out of the blue where a tool should have been asked."""
    at, calls = first_call(conversation)
    guess = out_of_the_blue("guesses", rng)
    return until(conversation, at, calls and guess)


def needless_call(conversation, rng):
    """A call although the message asks for none."""
    at, calls = first_call(conversation)
    names = list(tools_of(conversation))
    return until(conversation, at, names and not calls and [tempting_call(rng.choice(names), conversation)])


def ignores_result(conversation, rng):
    """A final answer whose numbers, or whose content, are not what the tool said."""
    text = final_answer(conversation)
    if not text:
        return None
    other = re.sub(r"\d{1,4000}", lambda m: str(int(m.group()) + rng.randint(1, 30)), text)
    # nothing found, or an error: made up instead
    if other == text or '"error"' in conversation["messages"][-2]["content"]:
        other = out_of_the_blue("made_up", rng)
    return until(conversation, -1, other)


def endless(conversation, rng):
    """A final answer that repeats itself and does not end (`pair_of` takes its end token away)."""
    text = final_answer(conversation)
    return until(conversation, -1, text and " ".join([text] * 3))


CORRUPTIONS = {f.__name__: f for f in (wrong_tool, malformed, wrong_argument, missing_argument, call_left_out,
                                       call_too_many, missing_call, needless_call, ignores_result, endless)}


def first_call(conversation):
    """-> (index of the first assistant message, its calls). There must be one."""
    at = next(n for n, m in enumerate(conversation["messages"]) if m["role"] == "assistant")
    return at, conversation["messages"][at].get("tool_calls") or []


def final_answer(conversation):
    """The text of the answer that follows a tool result and ends the conversation, or ""."""
    *_, before, last = conversation["messages"]
    final = before["role"] == "tool" and last["role"] == "assistant" and not last.get("tool_calls")
    return last["content"] if final else ""


def out_of_the_blue(kind, rng):
    """One of a kind of made-up answers, with a random number in it."""
    from data import corpus  # here, so that this file alone gives the losses
    return rng.choice([text.format(n=rng.randint(low, high)) for text, low, high in corpus("faults.json")[kind]])


def until(conversation, at, worse):
    """The messages before `at`, and in its place an assistant message with the `worse` calls or text; None without any.
    Calls in the place of calls keep the thought beside them."""
    gold = conversation["messages"][at]
    thought = gold.get("content") or "" if gold.get("tool_calls") else ""
    said = {"content": worse, "tool_calls": ()} if isinstance(worse, str) else {"content": thought, "tool_calls": worse}
    return [*conversation["messages"][:at], {"role": "assistant", **said}] if worse else None


def tools_of(conversation):
    """{name: Tool} of what it offers."""
    from tools import load_tools  # here, so that this file alone gives the losses
    return load_tools(conversation.get("tools") or [])


def tempting_call(name, conversation):
    """A call such as a model makes that looks at single words: the numbers, the capitalised word, the whole message."""
    tool = tools_of(conversation)[name]
    first = next(iter([*tool.parameters.get("required", []), *tool.parameters.get("properties", {})]), "query")
    text = next(m["content"] for m in conversation["messages"] if m["role"] == "user")
    numbers, capital = re.findall(r"\d[\d.]*", text), re.findall(r"(?<!^)\b[A-Z]\w+", text)
    arguments = {"calculator": {"expression": " * ".join(numbers[:2]) or "1 + 1"},
                 "weather": {"city": (capital or text.rstrip("?.! ").split() or ["here"])[-1]}}
    return {"name": name, "arguments": arguments.get(name, {first: text.rstrip("?. ")})}


def corrupted_pairs(conversations, tokenizer, seed=0, style="signature", faults=()):
    """Gold conversations -> pairs: the gold one, and the same with one fault of a random kind that applies (of
    `faults`, if any are named)."""
    pairs = []
    for n, conversation in enumerate(conversations):
        roles = [m["role"] for m in conversation["messages"]]
        if "assistant" not in roles or "user" not in roles[:roles.index("assistant")]:
            continue  # nothing to spoil: no answer to a request
        rng, names = random.Random(f"{seed} pair {n}"), list(faults or CORRUPTIONS)
        for name in rng.sample(names, len(names)):
            worse = CORRUPTIONS[name](conversation, rng)
            if worse:
                *shared, better = conversation["messages"][:len(worse)]
                pair = pair_of({**conversation, "messages": shared}, [better], worse[-1:], tokenizer, style, name)
                # not where the gold turn has weight 0: it is not to be learned
                if all(any(mask) for _, mask in pair[:2]):
                    pairs.append(pair)
                    break
    return pairs


def pair_of(prompt, chosen, rejected, tokenizer, style="signature", why=""):
    """A prompt (conversation) and two continuations (messages) -> Pair. Assistant turns of the prompt are not
    trained."""
    import data  # here, so that this file alone gives the losses
    start = len(data.encode(prompt, tokenizer, style)[0])
    rows = []
    for answer in (chosen, rejected):
        ids, mask = data.encode({**prompt, "messages": [*prompt["messages"], *answer]}, tokenizer, style)
        rows.append((ids, [0] * start + mask[start:]))
    if why == "endless":  # what is wrong with it is that it did not end
        ids, mask = rows[1]
        end = max(t for t, m in enumerate(mask) if m)
        rows[1] = (ids[:end], mask[:end])
    return Pair(*rows, why)


def parted(pair, tokens):
    """The pair, cut `tokens` behind where its answers part, with a mask for these tokens alone; 0: as it is.

    Call or talk, this tool or that one, another call or the end: each is decided by a token or two. DPO over whole
    answers also pushes down what follows a wrong decision, and calls are all alike there: soon none is well-formed. A
    pair whose answers do not part in words of the model (one begins with the whole other) is left as it is; so is a
    given one, whose answers are whatever somebody preferred.
    """
    at = next((t for t, (a, b) in enumerate(zip(pair.chosen[0], pair.rejected[0])) if a != b), 0)
    rows = [(ids[:at + tokens], [0] * at + list(mask[at:at + tokens])) for ids, mask in pair[:2]]
    return Pair(*rows, pair.why) if tokens and pair.why != GIVEN and all(any(mask) for _, mask in rows) else pair


def lines_of(config, split, tokenizer, read, offered=()):
    """What a run's source holds: Pairs, and what `read` makes of other lines. A pair has "chosen" or "rejected",
    whatever else it holds (UltraFeedback's have "messages" too)."""
    import data  # here, so that this file alone gives the losses
    return data.conversations(config, split, tokenizer, lambda line: read_pair(line, tokenizer, config.tool_style)
                              if isinstance(line, dict) and {"chosen", "rejected"} & set(line) else read(line), offered)


def read_pair(line, tokenizer, style="signature"):
    """A line of a pairs file, as TRL reads it: prompt, chosen, rejected (messages, or texts), tools; -> Pair.

    Without "prompt", chosen and rejected are whole conversations and their common beginning is the prompt; also where
    they repeat the prompt's text or messages (UltraFeedback does). Texts become a user's and an assistant's message, so
    that two texts alone have no prompt. Raises UserError for anything else.
    """
    import data  # here, so that this file alone gives the losses
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

    def spelled(messages):  # in one spelling, or the same would differ
        return data.check_conversation({"messages": messages, "tools": tools})["messages"] if messages else []

    def complete(answer):
        """The whole conversation: the prompt and the answer, unless this repeats the prompt."""
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
    # What both share is prompt: in mean log-probs (ipo, simpo) it would not cancel.
    prompt = {"messages": chosen[:shared], "tools": tools}
    pair = pair_of(prompt, chosen[shared:], rejected[shared:], tokenizer, style, GIVEN)
    if not all(any(mask) for _, mask in pair[:2]):
        raise UserError("chosen and rejected must each hold an assistant message")
    if len({tuple(i for i, m in zip(ids, mask) if m) for ids, mask in pair[:2]}) == 1:
        raise UserError("chosen and rejected are the same in all that the model says: there is nothing to prefer")
    return pair


# --------------------------------------------------------------------------- 3. training

def check_settings(config):
    """UserError for settings that fit each other badly; said before minutes of sampling."""
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
    # Imported here so that this file alone gives the losses to anyone who copies it.
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
        """Log-probs of the chosen answers and of the rejected ones: [2, B]."""
        rows = [row for pair in group for row in pair[:2]]  # by turns
        logp = toolplay.token_logprobs(model, rows, budget=None if torch.is_grad_enabled() else config.micro_tokens)
        return sequence_logp(logp, pad_mask(rows, run.device), config.variant in MEAN).reshape(-1, 2).T

    # 2. reference: under the trainer's precision, or the first log-ratios would not be 0
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
    # always in eval mode: with dropout the policy would not be compared with its reference alone
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
    """-> (training pairs, held-out pairs), given ones and corrupted ones; those longer than max_tokens are left out and
    counted."""
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
    """On-policy pairs: of `samples` answers to each prompt the best against the worst, if the reward tells them apart.

    The rows are the sampled ids themselves, token for token. With `chosen: "gold"` the worst stands against the
    example's own first turn (as in SPIN, Chen et al. 2024, arXiv:2401.01335, but only where the sample is at fault).
    Given Pairs stay as they are.
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
        # A line with "expected" has no gold turn; a prompt as long as the context has no answer.
        answered = any(chosen[1][tries[worst].prompt:]) and any(tries[worst].mask)
        if earned >= config.min_best and earned - scores[worst] >= config.min_gap and answered:
            pairs.append(Pair(chosen, (tries[worst].ids, tries[worst].mask),
                              f"reward {scores[worst]:.2f} against {rival}"))
            if config.twins and config.chosen == "gold" and tries[worst].calls and (call := withheld(conversation)):
                rng = random.Random(f"{config.seed} twin {n}")
                pairs.append(twin(conversation, call, tokenizer, config.tool_style, rng))
        elif config.pairs == "both" and len(conversation["messages"]) > len(case.conversation["messages"]):
            # it has an answer, which is kept up
            pairs += corrupted_pairs([conversation], tokenizer, f"{config.seed} {n}", config.tool_style, config.faults)
    return fitting(pairs, config, "sampled pairs")


def withheld(conversation):
    """The call that would be right if its tool were offered ("facts" of a conversation of the templates), or None."""
    from tools import BUILTIN
    match conversation:
        case {"facts": {"withheld": {"name": str(name), "arguments": dict()} as call}} if (
                name in BUILTIN and name not in tools_of(conversation)):
            return call


def twin(conversation, call, tokenizer, style, rng):
    """A request whose tool was withheld, now with the tool: the call is preferred to saying that it cannot be done.

    Beside the pair that prefers the opposite nothing but the list of tools tells which is right. Without it DPO learns
    what is the same in all such pairs: not to call.
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
    """Conversations whose first user turns are sampled from, the three built-in tools offered where a line of a file
    names none; and a file's own Pairs."""
    import data
    from eval import as_case
    from tools import BUILTIN

    def usable(line):  # here, where a bad line still has its number
        case = as_case(line)
        return data.check_conversation({**line, "messages": data.messages_of(line),
                                        "tools": case.conversation["tools"]})
    return lines_of(config, split, tokenizer, usable, BUILTIN)


def sampled_datasets(run, model, tokenizer):
    """-> (training pairs, held-out pairs) sampled from the initial policy, once: they are kept in the run folder."""
    import lora
    import toolplay
    from tools import UserError
    config, path = run.config, run.folder / "pairs.json"
    if not toolplay.gathered(path.exists())[0]:  # for all ranks alike
        prompts = [prompts_of(config, split, tokenizer) for split in ("train", "dev")]
        with lora.merged(model) if config.lora_r else contextlib.nullcontext():  # sampled from faster
            out = toolplay.gathered([sampled_pairs(model, tokenizer, chats, config) if chats else []
                                     for chats in prompts])[0]
        asked = sum(not isinstance(chat, Pair) for chat in prompts[0])
        given = f" and {len(prompts[0]) - asked} given pairs" if asked < len(prompts[0]) else ""
        print(f"{len(out[0])} pairs of {asked} prompts with {config.samples} answers each{given}; "
              "without one are prompts whose answers earn alike, or too little", file=sys.stderr)
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
    """The initial policy's log-probs of all pairs -> [[chosen, rejected]], from the run folder if they are there and
    fit.

    Must be called before a checkpoint is loaded: the model is the initial policy only until then.
    """
    import toolplay
    from tools import UserError
    key = hashlib.sha256(json.dumps([run.config.model, toolplay.start_hashes(run.config), run.config.precision,
                                     run.config.variant in MEAN, [pair[:2] for pair in pairs]]).encode()).hexdigest()
    path = run.folder / "reference.json"
    if toolplay.gathered(path.exists())[0]:  # for all ranks alike
        kept = toolplay.read_json(path,
                                  lambda kept: (kept["data_sha256"], [float(a) + float(b) for a, b in kept["logp"]]),
                                  "remove it: it is computed anew")
        if kept["data_sha256"] != key or len(kept["logp"]) != len(pairs):
            raise UserError(f"{path}: these log-probs are of other pairs or another model; "
                            "the data has changed since the run began. Start a new run")
        return kept["logp"]
    with torch.no_grad(), autocast():  # without a reference: kept for the hash
        logp = ([(0.0, 0.0)] * len(pairs) if run.config.variant in FREE
                else toolplay.shared_out(pairs, lambda own: answers(own).T.tolist()))
    if run.rank == 0:
        toolplay.write_json(path, {"data_sha256": key, "logp": logp})
    return logp


def show(n, config):
    """Print n pairs: what stands behind the last user's words, and where the two differ (green: chosen, red:
    rejected)."""
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
        # where they part, or an answer begins
        start = min(toolplay.common_prefix(ids, other), mask.index(1), other_mask.index(1))
        words = [re.findall(r"\w+|\s+|[^\w\s]", printable(tokenizer.decode(row[start:]).rstrip("\n")))
                 for row in (ids, other)]
        marked = ["", ""]
        for tag, a, b, c, d in difflib.SequenceMatcher(None, *words, autojunk=False).get_opcodes():
            for side, (colour, piece) in enumerate(((32, words[0][a:b]), (31, words[1][c:d]))):
                marked[side] += ("".join(piece) if tag == "equal" or not piece
                                 else f"\033[{colour};1m{''.join(piece)}\033[0m")
        prompt = tokenizer.decode(ids[:start]).split("<|im_start|>user\n")[-1]
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
