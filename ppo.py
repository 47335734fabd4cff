"""
ppo.py - proximal policy optimisation: learn from a score, not from an example

The idea. The model answers, its calls are executed, and a score says how good the whole episode was. Tokens that did
better than a critic expected become more probable, within a trust region: the probability ratio to the policy that
sampled the tokens is clipped, and a KL penalty ties the policy to a reference.

    r_t     = - beta KL_t  +  [t is the episode's last token] score              Ziegler et al. 2019, eq. 2
    delta_t = r_t + gamma V_{t+1} - V_t
    A_t     = delta_t + gamma lam A_{t+1}            R_t = A_t + V_t             (1) GAE, Schulman et al. 2016, eq. 16
    rho_t   = pi(x_t) / pi_old(x_t)
    L_clip  = - E min(rho_t A_t, clip(rho_t, 1 - eps, 1 + eps) A_t)              (2) PPO, Schulman et al. 2017, eq. 7
    L_value = E 1/2 max((V_t - R_t)^2, (clip(V_t, V_old +- eps) - R_t)^2)        (3) lm-human-preferences
    RLOO: A = score_i - mean of the other samples' scores                        (4) Ahmadian et al. 2024, "RLOO"
    GRPO: A = (score_i - mean) / std over the samples of one prompt              (5) Shao et al. 2024, sec. 4.1.2
    PPO-ptx: L = L_clip - gamma_ptx E_shown log pi(x)                            (6) Ouyang et al. 2022, eq. 2

t counts only the model's own tokens. Tool results lie between these tokens, but nobody chose the results. So the
recursion (1) skips tool results, and no advantage, return or loss depends on the length of a tool's answer. (In TRL
0.11 and OpenRLHF the recursion runs through the results with mask 0, so it discounts and leaks values across them.)

Implementation details, after Huang et al. 2024 (arXiv:2403.17031) and "The 37 implementation details", in our own
order:
  done      1  KL in the per-token reward (k1, or k3)
            2  adaptive KL coefficient (`adaptive_kl`, with `kl_target`)
            3  score on the last model token
            5  advantages whitened under the mask, returns computed before the whitening
            6  gamma 1, lambda 0.95
            7  ratio clip 0.2
            8  value clip 0.2, 1/2 max, coefficient 0.1
            9  value head starts at zero
           10  logits divided by the temperature everywhere
           11  penalty for a missing end token (reward `no_end`)
           12  explicit positions (the trie)
           14  four epochs, fresh permutations (of prompts: the samples of a prompt share its prefix in the trie)
           15  dropout off
           16  ratio guard, KL stop
           17  averages over model tokens only
  declined  4  reward whitening (`whiten_rewards` is off, because scores have a known scale)
           13  lr 1e-5 and Adam eps 1e-5, which suit training all weights. Adapters take larger steps, the shared
               Trainer uses eps 1e-8, and the lr falls along a cosine (or a line: `schedule`)

Departures. The reference is the policy before training, a copy of its adapter (B = 0 is the base model), so memory
holds one model (and, while it samples, a copy of the weights that the adapters are merged into). RLOO here uses clipped
ratios of tokens and several epochs; the paper uses plain REINFORCE of whole answers. GRPO here subtracts beta KL from
the advantage instead of adding a KL loss. It averages over all tokens, not first over each episode's tokens. With
`value_lora` the critic has its own adapter on the same trunk: policy and value no longer pull at the same weights, at
the cost of a second forward. `min_spread` leaves out prompts whose samples all earned the same, because these prompts
cost most of a round and teach almost nothing (dynamic sampling, Yu et al. 2025, arXiv:2503.14476, eq. 11, but no other
prompts are sampled instead). With `replay`, prompts that taught are played again for as long as they teach (prioritised
replay, Jiang et al. 2021, arXiv:2010.03934). With `center`, GAE's scores are (4), measured from the mean of the
prompt's other samples. The critic then learns which words of an answer were good and need not know how hard each
question is. With `ptx`, each minibatch also imitates conversations of kinds that the model knew before (6), so that the
model does not forget them. Under torchrun the ranks share the prompts of a round and the learning.

    python ppo.py configs/ppo.json          the same as: python toolplay.py train configs/ppo.json
    python ppo.py --inspect RUN             sampled episodes with reward, advantage and mask of every token
"""
from __future__ import annotations

import ast
import contextlib
import dataclasses
import functools
import itertools
import math
import random
import re
import sys
from collections import Counter
from dataclasses import dataclass, field
from typing import Annotated, Literal

import torch


@dataclass
class Config:
    """PPO's own keys; the shared keys are in toolplay.Config. batch_size is the number of episodes in a minibatch."""
    advantage: Literal["gae", "rloo", "grpo"] = "gae"  # critic, or the other samples of the same prompt as baseline
    iterations: Annotated[int, "> 0"] = 20             # rounds of sampling and learning
    prompts: Annotated[int, "> 0"] = 16                # prompts in a round
    samples: Annotated[int, "> 0"] = 4                 # episodes for each of them
    ppo_epochs: Annotated[int, "> 0"] = 4              # passes over a round's episodes; 4 as in lm-human-preferences
    temperature: Annotated[float, "> 0"] = 1.0         # of sampling, and of every log-prob
    max_new_tokens: Annotated[int, "> 0"] = 64         # bound of each turn
    max_turns: Annotated[int, "> 0"] = 3               # assistant turns in an episode
    gamma: Annotated[float, "0 to 1"] = 1.0            # discount
    lam: Annotated[float, "0 to 1"] = 0.95             # GAE's lambda
    clip_range: Annotated[float, "> 0"] = 0.2          # eps of equation (2)
    dual_clip: Annotated[float, ">= 0"] = 0.0          # bound of rho A for A < 0, above 1 (Ye et al. 2020, eq. 5: 3);
                                                       # 0: none
    value_clip: Annotated[float, "> 0"] = 0.2          # eps of equation (3)
    vf_coef: Annotated[float, ">= 0"] = 0.1            # weight of the value loss
    value_lora: bool = False                           # gae: the critic has its own adapter on the trunk; else it
                                                       # shares the policy's
    entropy_coef: Annotated[float, ">= 0"] = 0.0       # weight of an entropy bonus
    kl_coef: Annotated[float, ">= 0"] = 0.05           # beta, the weight of the KL to the reference
    kl_estimator: Literal["k1", "k3"] = "k1"           # of the KL to the reference
    kl_target: Annotated[float, ">= 0"] = 0.0          # KL per learned episode to which beta is adapted; 6 in
                                                       # lm-human-preferences; 0: beta is fixed
    kl_horizon: Annotated[float, "> 0"] = 10000.0      # episodes over which beta adapts
    center: bool = False                               # gae: subtract from each score the mean of the prompt's other
                                                       # samples, (4)
    min_spread: Annotated[float, ">= 0"] = 0.0         # learn only from prompts whose samples' rewards differ by at
                                                       # least this (dynamic sampling)
    replay: Annotated[float, "0 to 1"] = 0.0           # at most this share of a round's prompts is replayed: prompts
                                                       # that were learned from when last played; the rest is new
    ptx: Annotated[int, ">= 0"] = 0                    # conversations of ptx_mix that each minibatch also imitates,
                                                       # (6); 0: none
    ptx_coef: Annotated[float, "> 0"] = 1.0            # gamma_ptx: weight of their mean loss
    ptx_mix: dict = field(default_factory=dict)        # kinds of these conversations, with weights; their expressions
                                                       # are shown even with `answers_only`
    kl_stop: Annotated[float, ">= 0"] = 0.0            # end a round's learning when the KL to the sampling policy, per
                                                       # token, exceeds this; 0: never
    ratio_guard: Annotated[float, "> 0"] = 10.0        # a minibatch whose mean ratio exceeds this is skipped
    whiten_rewards: bool = False                       # gae: scale rewards to unit variance (their mean is kept)
    answers_only: bool = True                          # of a case with a number only this number is known, never its
                                                       # expression
    reward: str = ""                                   # custom reward, "package.module:function" of (case, episode);
                                                       # empty: the components
    reward_weights: dict = field(default_factory=dict)  # component -> weight, over WEIGHTS


# --------------------------------------------------------------------------- 1. pure functions

def model_tokens(x, mask):
    """The entries of x [B, T] where the mask is 1, in order -> [n], in fp32 at least. Sums over these entries do not
    depend on the entries between them."""
    return floating(x[mask.bool()])


def where_masked(x, mask):
    """x [B, T] where the mask is 1, 0 elsewhere, even if x is nan there."""
    return torch.where(mask.bool(), x, 0)


def floating(x):
    """x in fp32 at least: half precision cannot add up a thousand tokens, and integer scores need a fractional mean."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def masked_mean(x, mask):
    """Mean over the entries where the mask is 1 -> scalar; 0 if there are none."""
    return model_tokens(x, mask).sum() / mask.bool().sum().clamp(min=1)


def masked_whiten(x, mask, shift_mean=True):
    """x [B, T] scaled to variance 1 (with Bessel's correction) over the entries where the mask is 1; `shift_mean` also
    shifts their mean to 0. 0 elsewhere."""
    dtype, x = floating(x).dtype, where_masked(x, mask).double()  # no masked-out entry reaches a gradient
    inside, mean = model_tokens(x, mask), masked_mean(x, mask)  # fp64: else equal entries might not be their mean
    variance = ((inside - mean) ** 2).sum() / max(inside.numel() - 1, 1)
    white = (x - mean) * torch.rsqrt(variance + 1e-8)
    return where_masked(white if shift_mean else white + mean, mask).to(dtype)


@torch.no_grad()
def gae(rewards, values, mask, gamma=1.0, lam=0.95):
    """Equation (1). rewards, values, mask: [B, T] -> (advantages, returns) [B, T], 0 where the mask is 0."""
    rewards, values, mask = where_masked(floating(rewards), mask), where_masked(floating(values), mask), mask.bool()
    advantage, following, columns = values.new_zeros(len(values)), values.new_zeros(len(values)), []
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * following - values[:, t]                # [B]
        # (1); a tool's token passes on what comes after it
        advantage = torch.where(mask[:, t], delta + gamma * lam * advantage, advantage)
        following = torch.where(mask[:, t], values[:, t], following)
        columns.append(advantage)
    advantages = where_masked(torch.stack(columns[::-1], 1), mask) if columns else values  # no tokens, T = 0
    return advantages, where_masked(advantages + values, mask)


def rloo_advantages(scores):
    """Equation (4). scores [prompts, samples] -> advantages of this shape. A single sample has no baseline: advantage
    0."""
    dtype, scores, k = floating(scores).dtype, scores.double(), scores.shape[1]  # as in grpo_advantages
    return ((scores - scores.mean(1, keepdim=True)) * (k / max(k - 1, 1))).to(dtype)  # = score - mean of the others


def grpo_advantages(scores, eps=1e-4):
    """Equation (5). scores [prompts, samples] -> advantages of this shape. A single sample has advantage 0. Samples
    that differ only by a few tokens of length get advantages as large as right and wrong samples; `min_spread` leaves
    out prompts with samples that differ so little."""
    dtype, scores = floating(scores).dtype, scores.double()  # in fp32 the mean of equal scores may not equal them
    spread = scores.std(1, keepdim=True) if scores.shape[1] > 1 else torch.zeros_like(scores)
    return ((scores - scores.mean(1, keepdim=True)) / (spread + eps)).to(dtype)


def policy_loss(logp, old_logp, advantages, mask, clip_range=0.2, dual_clip=0.0):
    """Equation (2) as a sum over the model's tokens. All [B, T] -> (loss, {"tokens", "ratio", "clip_fraction",
    "approx_kl"}: sums)."""
    logp, old_logp, advantages = (model_tokens(x, mask) for x in (logp, old_logp, advantages.expand_as(logp)))    # [n]
    ratio = torch.exp((logp - old_logp).clamp(-20, 20))  # always finite (no gradient beyond the clamp)
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    gain = torch.minimum(ratio * advantages, clipped * advantages)                                # (2)
    if dual_clip:
        gain = torch.where(advantages < 0, torch.maximum(gain, dual_clip * advantages), gain)
    with torch.no_grad():
        info = {"tokens": mask.bool().sum(), "ratio": ratio.sum(),
                "clip_fraction": (clipped * advantages < ratio * advantages).float().sum(),
                "approx_kl": kl_penalty(old_logp, logp, "k3").sum()}
    return -gain.sum(), info


def value_loss(values, old_values, returns, mask, clip_range=0.2):
    """Equation (3) as a sum over the model's tokens. All [B, T] -> (loss, {"value_clip_fraction": sum})."""
    values, old_values, returns = (model_tokens(x, mask) for x in (values, old_values, returns))  # [n]
    clipped = old_values + (values - old_values).clamp(-clip_range, clip_range)
    plain, bounded = (values - returns) ** 2, (clipped - returns) ** 2
    return 0.5 * torch.maximum(plain, bounded).sum(), {"value_clip_fraction": (bounded > plain).float().sum()}    # (3)


def kl_penalty(logp, ref_logp, estimator="k1"):
    """KL(policy || reference) of each sampled token, estimated from this token alone (Schulman 2020,
    joschu.net/blog/kl-approx).

    k1 = log pi - log ref is unbiased; k3 = ref/pi - 1 - log ref/pi is unbiased, never negative, and varies less.
    """
    if estimator not in ("k1", "k3"):
        raise ValueError(f"estimator {estimator!r}: must be k1 or k3")
    difference = floating(ref_logp) - floating(logp)
    # expm1: exp(x) - 1 without rounding where x is small; the clamp keeps it finite, as in policy_loss
    return -difference if estimator == "k1" else torch.expm1(difference.clamp(-20, 20)) - difference


def token_rewards(scores, kl, mask, kl_coef):
    """r_t: - kl_coef * KL on the model's tokens, plus the episode's score on the last model token.
    scores [B], kl and mask [B, T]."""
    rewards = where_masked(-kl_coef * floating(kl), mask)
    if not mask.shape[1]:
        return rewards
    last = mask.shape[1] - 1 - mask.flip(1).int().argmax(1)                     # [B]
    return rewards.scatter_add(1, last[:, None], scores[:, None].to(rewards.dtype) * mask.any(1, keepdim=True))


def explained_variance(values, returns, mask):
    """1 - Var(returns - values) / Var(returns): 1 is a perfect critic, 0 a critic that knows nothing."""
    values, returns = (model_tokens(x, mask).double() for x in (values, returns))
    return float(1 - (returns - values).var() / returns.var()) if returns.numel() > 1 and returns.var() > 0 else 0.0


def adaptive_kl(beta, kl, episodes, target, horizon):
    """The next beta, steered so that the KL of an episode reaches the target (Ziegler et al. 2019, sec. 2.2). A target
    of 0 keeps beta."""
    error = min(max(kl / target - 1, -0.2), 0.2) if target and math.isfinite(kl) else 0.0
    return beta * max(1 + error * episodes / horizon, 0.0)


# --------------------------------------------------------------------------- 2. the reward

# Each component looks at one episode and returns a number from 0 to 1: how far the episode has what the component's
# name says. `verdicts` come from eval.judge. The reward is the sum weighted by WEIGHTS; negative weights are faults.


def first_turn_only(episode):
    """Whether the episode was stopped after its first calls: with max_turns = 1 nothing more is required."""
    return episode.stop == "turns" and len(episode.turns) == 1


def forges(episode):
    """Whether a turn contains a result tag or a chat tag, which the model must not write."""
    from eval import FORGED  # here, so that the losses work without other files
    return any(FORGED.search(turn) for turn in episode.turns)


def right_format(case, episode, verdicts):
    """Every call parses and fits its schema, no turn contains a forged result tag or chat tag, and the final text is
    not empty (it contains a number if the case asks for a number)."""
    from eval import in_words, numbers
    said = first_turn_only(episode) or (numbers(episode.final) or in_words(episode.final) if wants_number(case)
                                        else episode.final.strip())
    broken = {"malformed_call", "unknown_tool", "unknown_argument", "missing_argument", "wrong_type"}
    return float(bool(verdicts["format"]) and bool(said) and not forges(episode)
                 and not any(result.error_type in broken for result in episode.results))


def right_tool(case, episode, verdicts):
    """The required tool was called, or no tool if none is required. If only a number is known, the calculator is
    required."""
    if verdicts["tool_accuracy"] is None:
        return float(wants_number(case) and {call.name for call in episode.calls} == {"calculator"})
    return float(verdicts["tool_accuracy"])


def executed(case, episode, verdicts):
    """Share of calls that gave a result, or the tool's own error if a gold call gives one too. A crash, a time-out and
    a malformed call give none. Calls of a tool without a function are not counted."""
    results = verdicts["execution"]
    return sum(results) / len(results) if results else 0.0


def calculates(case, episode, verdicts):
    """The case asks for a number, and the calculator works it out; see `worked_out`."""
    return float(wants_number(case) and worked_out(case, episode))


def calculations(episode):
    """The calculator's calls -> [(expression, result)]. A result that is no number becomes nan (a custom tool may have
    the calculator's name)."""
    from eval import calls_with_results, is_number
    return [(call.arguments.get("expression"), result.value if is_number(result.value) else math.nan)
            for call, result in calls_with_results(episode) if call.name == "calculator"]


def unused(episode):
    """Results of the calculator that no later expression uses; the last result is not included."""
    from data import numbers_in
    steps = calculations(episode)
    results = [(n, value) for n, (_, value) in enumerate(steps) if not math.isnan(value)]
    return [value for n, value in results[:-1]
            if not any(math.isclose(abs(value), x) for later, _ in steps[n + 1:] for x in numbers_in(later))]


def worked_out(case, episode):
    """If the calculator is required: each of its calls has the numbers of a gold call, or works with numbers of the
    prompt and results of earlier calls (`is_calculation`). If the case asks for a number, there must be a call. Calls
    that gave no number do not count: the model may correct itself."""
    gold = [written(call.arguments.get("expression")) for call in case.calls or [] if call.name == "calculator"]
    prompt = " ".join(message["content"] for message in case.conversation["messages"])
    steps = [(said, value) for said, value in calculations(episode) if not math.isnan(value)]
    honest = (written(x) in gold or is_calculation(x, prompt, steps[:n]) for n, (x, _) in enumerate(steps))
    return bool(steps) and all(honest) if wants_number(case) else not gold or all(honest)


def right_arguments(case, episode, verdicts):
    """All arguments match the gold arguments, which must be known. An expression matches if it has the same value and
    works this value out (`worked_out`)."""
    return float(bool(verdicts["argument_accuracy"]) and worked_out(case, episode))


def answer_was_computed(case, episode):
    """Whether the calculator's last result is the number that the case asks for, calculated with the prompt's
    numbers."""
    last = [value for _, value in calculations(episode) if not math.isnan(value)][-1:]
    places = len(f"{case.answer:.9f}".rstrip("0").partition(".")[2])  # 20 / 3 is right if the answer is 6.67
    right = any(math.isclose(x, case.answer, rel_tol=1e-6) or places and math.isclose(round(x, places), case.answer)
                for x in last)
    return right and worked_out(case, episode)


def right_result(case, episode, verdicts):
    """The conditions of right_answer for the calls alone, for episodes of one turn. A number is the last result of the
    calculator and is worked out by its calls. Other calls are the gold calls. If no call is required, the turn is the
    whole answer: right_answer."""
    if not wants_number(case):
        return (float(bool(verdicts["call_accuracy"]) and worked_out(case, episode)) if case.calls
                else right_answer(case, episode, verdicts))
    faults = needless_call(case, episode, verdicts) or no_end(case, episode, verdicts)
    return float(answer_was_computed(case, episode) and not faults)


def right_answer(case, episode, verdicts):
    """The final text is right, tidy, and ends, and no call was made twice. A number must be the last result of the
    calculator, worked out by its calls, and the only result that the text states. A searched fact must come from the
    right search. Talk earns a half, and up to another half for its likeness to the reference."""
    from eval import in_circles, words_of
    if (in_circles(words_of(episode.final)) or not verdicts["response_quality"]
            or not right_format(case, episode, verdicts) or episode.stop != "end" or repeated(episode)):
        return 0.0
    if wants_number(case):
        return float(answer_was_computed(case, episode) and not states_a_step(case, episode))
    wrong = verdicts["argument_accuracy"] is False and not recovered(case, episode)
    if wrong or not worked_out(case, episode) or guesses(case, episode):
        return 0.0
    if case.calls == [] and case.answer is None and case.kind != "missing_tool":
        return worth_of_talk(case, episode, verdicts)
    return 1.0


def recovered(case, episode):
    """Whether calls that failed were followed by the right ones: the calls with a result are the gold calls."""
    from eval import calls_with_results, same_calls
    done = [call for call, result in calls_with_results(episode) if result.ok]
    tools = {tool.name: tool for tool in case.conversation["tools"]}
    return len(done) < len(episode.results) and bool(case.calls) and same_calls(case.calls, done, tools)


def states_a_step(case, episode):
    """Whether the final text states an intermediate result beside the number. The text may state a result that a later
    step uses."""
    from eval import numbers
    earlier = [x for _, x in calculations(episode)[:-1]] if re.search(r"\bor\b", episode.final) else unused(episode)
    return any(math.isclose(x, y) and not math.isclose(x, case.answer) for x in earlier for y in numbers(episode.final))


def guesses(case, episode):
    """For a number that the model should know without a call: whether the final text states it among other numbers that
    nobody told the model. Numbers of the prompt, of results and of shown work (no list of guesses) are told."""
    from eval import in_words, numbers, states
    if case.answer is None or case.calls:
        return False
    equations = re.findall(r"(\d[\d.]*(?:\s*[-+*/x×÷−]\s*\d[\d.]*)+)\s*=\s*([\d.]*\d)", episode.final)
    told = " ".join([*(m["content"] for m in case.conversation["messages"]),
                     *(said for said, of in equations if same_value(said, of)),
                     *(r.text() for r in episode.results)])
    return not states(episode.final, case.answer, set(numbers(told)) | in_words(told), guesses=0)


def worth_of_talk(case, episode, verdicts):
    """0.5, and up to 1 for the likeness to the reference. Untidy text earns 0: garbage is short or repeats itself."""
    likeness = like_reference(case, episode, verdicts)
    if not tidy(episode.final) and likeness < 0.8:
        return 0.0
    return 0.5 + 0.5 * min(4 * likeness, 1.0) if case.reference else 1.0


def same_value(expression, result):
    """Whether an expression in an answer has the value that the answer states. Its numbers are then shown work."""
    from tools import ToolError, calculate
    with contextlib.suppress(ToolError, ValueError):
        return math.isclose(calculate(expression), float(result), rel_tol=0.01)
    return False


def tidy(text):
    """Whether a text may be a sentence: at least three different words, and more different words than repeated words.
    The order of the words is not checked. In scripts without Latin letters the characters count as words."""
    cjk = "\u3040-\u9fff\uac00-\ud7a3"
    words = re.findall(rf"[{cjk}]|[^\W{cjk}]+" if re.search("[a-z]", text.lower()) else r"\w", text.lower())
    return len(set(words)) >= 3 and 2 * len(set(words)) > min(len(words), 30)


def like_reference(case, episode, verdicts):
    """Overlap of words with the reference answer: 0 for garbage, small for a reply that fits any prompt."""
    return verdicts["response_f1"] or 0.0


def written(expression):
    """The numbers in an expression, sorted."""
    from data import numbers_in  # here, so that the losses work without other files
    return sorted(numbers_in(expression))


def repeated(episode):
    """Whether a call was made twice, in any spelling; 4 * 6 and 3 * 8 are two different calls."""
    from eval import same_call
    numbers = [written(call.arguments.get("expression")) if call.name == "calculator" else [] for call in episode.calls]
    return any(same_call(a, b) and x == y
               for (a, x), (b, y) in itertools.combinations(zip(episode.calls, numbers), 2))


def needless_call(case, episode, verdicts):
    """A call where none is required, a call of another tool than the required ones, more calls with a result than
    required, a repeated call, or a calculation whose result is at most listed and never used."""
    too_many = (case.calls is not None and not wants_number(case)
                and sum(r.ok for r in episode.results) > len(case.calls) + (case.later or 0))
    required = {call.name for call in case.calls or []} or ({"calculator"} if wants_number(case) else set())
    others = required and not case.later and {call.name for call in episode.calls} - required
    return float(case.calls == [] and bool(episode.calls) or too_many or repeated(episode) or bool(others)
                 or wants_number(case) and bool(unused(episode)))


def length(case, episode, verdicts):
    """Number of sampled tokens / 200, at most 1."""
    return min(sum(episode.mask) / 200, 1.0)


def no_end(case, episode, verdicts):
    """A turn did not end by itself: the last turn was stopped, a turn continued with text after its calls, or a turn
    forged a result tag or chat tag."""
    return float(forges(episode) or episode.stop != "end" and not first_turn_only(episode)
                 or any(turn.rpartition("</tool_call>")[2].strip() for turn in episode.turns if "</tool_call>" in turn))


COMPONENTS = {f.__name__: f for f in (right_format, right_tool, executed, calculates, right_arguments, right_result,
                                      right_answer, like_reference, needless_call, length, no_end)}
WEIGHTS = {"right_format": 0.1, "right_tool": 0.1, "executed": 0.1, "calculates": 0.1, "right_arguments": 0.2,
           "right_result": 0.0, "right_answer": 1.0,
           "like_reference": 0.1, "needless_call": -0.3, "length": -0.05, "no_end": -0.3}


def wants_number(case):
    """Whether the case asks for a number and the calculator is the tool for it (if the calls are known, one of them
    calls the calculator)."""
    due = case.calls is None or any(call.name == "calculator" for call in case.calls)
    return case.answer is not None and due and any(tool.name == "calculator" for tool in case.conversation["tools"])


# What everybody knows: numbers of legs, days, ounces, coins, hours, weeks, minutes, degrees, metres; several such
# numbers together, as for the minutes of a week, km/h, °F, a circle, a ball; and formulas that add a number and also
# multiply by numbers: (added number, its multipliers) of °F and of the angles of a polygon.
EVERYDAY = {*range(2, 11), 12, 16, 24, 25, 30, 31, 36, 50, 52, 60, 75, 180, 360, 365, 366, 1000, 3600, 1000000,
            14, 1024, 1760, 5280, 0.01, 0.05, 0.1, 0.25, 0.3048, 0.45, 0.4536, 0.5, 0.62, 0.6214, 0.75, 1.5, 1.6, 1.609,
            1.60934, 1.61, 1.8, 2.2, 2.205, 2.20462, 2.54, 3.14, 3.1416, 3.14159, 3.14159265, 3.6}
TOGETHER = [7 * 24, 7 * 24 * 60, 7 * 24 * 3600, 24 * 60, 24 * 3600, 365 * 24, 365 * 24 * 60, 3600, 3.6, 1.8,
            365 * 24 * 3600, 5 * 52, 12 * 2.54, 52 / 12,
            *(k * pi for pi in (3.14, 3.1416, 3.14159, 3.14159265) for k in (2, 4, 4 / 3))]
FORMULAS = [(32, {1.8}), (32, {5, 9}), (2, {180})]
LEFT_OF = {12, 24, 60, 90, 180, 360, 365, 366}  # "60 - x": what is left of a day, an hour, an angle, a year


def is_calculation(expression, prompt, earlier=()):
    """Whether an expression works something out, instead of disguising a guessed number.

    `earlier`: [(expression, result)] of the calculations before this expression.

    1. The result is not just a number of the expression (as in 10 * 1, 7 * (9 - 8)). The prompt's own number beside
       other prompt numbers is allowed (64 - 6 + 6).
    2. Every number matters: another number in its place changes the result (in 36 / 36 * 42 it does not).
    3. The expression is built on the prompt's numbers, see `Ground`. So 36 + 6, 15 * 2.8, 36 * 7 / 6 and
       min(36 + 9, 6 * 7) are guesses.
    """
    from data import numbers_in
    from tools import ToolError, evaluate, parse_expression
    prompts = numbers_in(prompt)
    given = [*prompts, *(abs(result) for _, result in earlier)]
    if not any(x > 1 for x in given):  # then what everybody knows counts as given
        given = prompts = [*prompts, *EVERYDAY]
    with contextlib.suppress(ToolError, RecursionError, ArithmeticError):  # no expression, or one too deep or too large
        tree = parse_expression(expression)
        places, result = numbers_of(tree), abs(evaluate(tree))
        used = {place.value for place in places}
        if len(places) > 50 or used <= {0, 1, 100}:  # 1 + 1, for a prompt that contains "one"
            return False
        mine = sum(place.value not in (0, 1) and is_own(place.value, given) for place in places)
        divisors = {place.value for node in ast.walk(tree)
                    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div) for place in numbers_of(node.right)}
        for place in places:
            x, equal = place.value, [other for other in places if other.value == place.value]
            if same(x, result) and x not in {1, *divisors} and not (mine > 1 and is_own(x, given)):  # 1
                return False
            # If a number is used more often than it is given, all its places change together: 20 does not matter in
            # 10 * 20 / 20. The divisors 2, 3, 4, 60 and 100 may be used once more than they are given: base * height
            # / 2 with a base of 2, 60 km/h for 45 / 60 of an hour, 15 / 100 of 100.
            often = sum(same(x, y) for y in given) + (x in divisors & {2, 3, 4, 60, 100})
            if not changes(tree, [place] if x == 1 or len(equal) <= often else equal):  # 2
                return False
        # an earlier result stands for two numbers at least
        mine += sum(place.value != 1 and is_own(place.value, given) and not is_own(place.value, prompts)
                    for place in places)
        ground = Ground(prompts, used, mine >= min(2, len({x for x in given if x > 1})))
        for said, came_to in earlier:
            ground.known.append((abs(came_to), ground.factors(parse_expression(said))))
        return ground.spare(ground.factors(tree)) >= 0  # 3
    return False


def changes(tree, places):
    """Whether the value of a tree changes with another number, much larger or smaller, in these places."""
    from tools import ToolError, evaluate
    x, results = places[0].value, set()
    for number in (1000 * x + 7, x / 1000, x):  # x comes last and restores the tree
        for place in places:
            place.value = number
        with contextlib.suppress(ToolError):
            results.add(evaluate(tree))
    return len(results) > 1


def is_own(x, given):
    """Whether a number is given: as it is, as p %, or as p % more or less."""
    return any(same(x, y) for g in given for y in (g, g / 100, 1 + g / 100, 1 - g / 100, 100 + g, 100 - g))


def same(x, y):
    return math.isclose(x, y, rel_tol=1e-9)


def numbers_of(node):
    """The numbers in an expression's tree, without the number of digits in `round`."""
    inner = node.args[:1] if isinstance(node, ast.Call) and node.func.id == "round" else ast.iter_child_nodes(node)
    return [node] if isinstance(node, ast.Constant) else [place for child in inner for place in numbers_of(child)]


class Ground:
    """What an expression may be built on: the `given` numbers, and numbers that everybody knows, which must not
    outnumber the given numbers. A part that is built in this way "stands".

    Every part is a product {number or node: power}. A product stands if one of its factors is given, or is itself a
    sum, power, remainder or choice that stands. Its `spare` is by how many these factors outnumber the other factors; a
    sum, power, remainder or choice has at most 1 to spare. 36 * 7 has 0 to spare; 36 * 7 / 6 and sqrt(36 * 7) / 6
    would have -1, so they do not stand.

    `used`: all numbers of the expression. `enough`: two used numbers are given (or one, if the prompt has only one);
    otherwise nothing may be added to given numbers. `known`: results [(number, product)]; such a number counts as the
    product that it was worked out from.
    """

    def __init__(self, given, used, enough):
        self.given, self.used, self.enough, self.standing, self.known = given, used, enough, {}, []

    def spare(self, factors):
        """By how many the standing factors outnumber the other factors; -1 if no factor stands, or if not everybody
        knows the other factors."""
        own = {x: self.standing.get(x, 1) for x in factors if x in self.standing or is_own(x, self.given)}
        others = {x: n for x, n in factors.items() if x not in own and x not in (1, 100)}
        ratio = math.prod(float(x) ** n for x, n in others.items())
        if any(same(ratio, y) or same(ratio * y, 1) for y in TOGETHER):
            others = {}
        if not own or not EVERYDAY.issuperset(others):
            return -1
        # 7 / 7 adds 0 (its power is 0)
        return sum(spare * abs(factors[x]) for x, spare in own.items()) - sum(map(abs, others.values()))

    def factors(self, node):
        """A node as a product {number or node: power}; nan replaces a node that does not stand."""
        match node:
            case ast.Constant(value=x):
                made = [factors for result, factors in self.known if same(result, x)]
                return made[-1] if made and not is_own(x, self.given) else Counter({x: 1})
            case (ast.Attribute(value=part) | ast.UnaryOp(operand=part) | ast.Call(func=ast.Name(id="abs"), args=[part])
                  | ast.Call(func=ast.Name(id="round"), args=[part, _])):
                return self.factors(part)  # a percent sign is no factor, like 100
            case ast.BinOp(left=left, op=ast.Mult() | ast.Div() as op, right=right):
                product = Counter(self.factors(left))
                (product.update if isinstance(op, ast.Mult) else product.subtract)(self.factors(right))
                return product
        spare = self.carried(node)
        self.standing.update({node: min(spare, 1)} if spare >= 0 else {})
        return Counter({node if spare >= 0 else math.nan: 1})

    def carried(self, node):
        """The `spare` of a sum, power, remainder or choice; -1 if it does not stand."""
        from tools import evaluate
        sides = node.args if isinstance(node, ast.Call) else [node.left, node.right]
        is_sum, raised, whole = (isinstance(getattr(node, "op", None), kinds)
                                 for kinds in ((ast.Add, ast.Sub), ast.Pow, (ast.FloorDiv, ast.Mod)))
        # a value that is cut to a whole number may be 1, whatever numbers it is made of
        whole = whole or isinstance(node, ast.Call) and node.func.id == "round"
        products = [self.factors(side) for side in sides]
        # a side with the value 0 does not stand
        spare = [self.spare(product) if evaluate(side) else -1 for side, product in zip(sides, products)]
        if min(spare) >= 0 or isinstance(node, ast.Call):
            return sum(spare) if is_sum else min(spare + [0] * whole)
        right = spare[0] >= 0  # one side does not stand: is it the right side?
        x = abs(evaluate(sides[right])) if {math.nan, *self.standing}.isdisjoint(products[right]) else math.nan
        if is_sum:
            left = isinstance(node.op, ast.Sub) and not right and x in LEFT_OF
            share = x == 1 and abs(evaluate(sides[not right])) < 1              # 1 + 5%
            free = (left or share or x >= 100 and x in TOGETHER
                    or any(x == added and beside <= self.used for added, beside in FORMULAS))
            known = self.enough and (free or x in (1, 100))                     # 100 - 20
        else:
            free = raised and right                                             # an exponent
            known = round(x, 6) in (2, 3, 4, 0.5, 0.333333) if free else x in EVERYDAY and (raised or right)
        return min(max(spare), 1) - (not free) if known else -1


def score(case, episode, weights=WEIGHTS):
    """The reward of an episode -> (weighted sum, {component: value})."""
    from eval import judge
    verdicts = judge(case, episode)["verdicts"]
    parts = {name: COMPONENTS[name](case, episode, verdicts) for name in weights if weights[name]}
    return sum(weights[name] * value for name, value in parts.items()), parts


def custom_reward(path):
    """The reward function that "package.module:name" names, as (case, episode) -> (number, {})."""
    from tools import UserError, import_by_name
    function = import_by_name(path, "reward")
    if not callable(function):
        raise UserError(f"reward = {path!r}: it is not a function")

    def reward(case, episode):
        try:
            value = float(function(case, episode))
            if not math.isfinite(value):
                raise ValueError(f"{value} is no finite number")
        except (Exception, SystemExit) as error:
            raise UserError(f"reward {path} failed on {case.conversation['messages'][-1]['content'][:60]!r}: "
                            f"{type(error).__name__}: {error}") from error
        return value, {}
    return reward


def reward_of(config):
    """The reward function that a config asks for: (case, episode) -> (number, {component: value})."""
    from tools import UserError
    weights = {**WEIGHTS, **config.reward_weights}
    for name, weight in weights.items():
        if name not in COMPONENTS or type(weight) not in (int, float) or not abs(weight) <= 1e6:
            raise UserError(f"reward_weights: {name!r}: {weight!r:.40}: "
                            f"must be a number from -1e6 to 1e6 for one of {', '.join(COMPONENTS)}")
    if config.reward and config.reward_weights or not any(weights.values()):
        raise UserError("reward_weights: all are 0; nothing could be learned" if not config.reward else
                        f"reward_weights: they weigh toolplay's components, but reward = {config.reward!r} is used; "
                        "give one of the two")
    if config.max_turns == 1 and not config.reward and weights["right_answer"] and not weights["right_result"]:
        raise UserError("max_turns = 1: an episode ends after its calls, so right_answer is never earned; "
                        'set "reward_weights": {"right_result": 1.0, "right_answer": 0.0}, or max_turns to 2 or more')
    return custom_reward(config.reward) if config.reward else lambda case, episode: score(case, episode, weights)


def judgeable(cases, config):
    """The cases. UserError if toolplay's reward has nothing to judge a case by: neither calls nor answer are known."""
    from tools import UserError
    if not config.reward and (unknown := [c for c in cases if c.calls is None and c.answer is None]):
        raise UserError(f"{len(unknown)} of {len(cases)} prompts have no known right answer, for example "
                        f"{unknown[0].conversation['messages'][-1]['content'][:60]!r}: "
                        'give them "answer", "expected" with "calls" or "answer", or an assistant turn, '
                        'or set "reward" to a function of your own')
    return cases


# --------------------------------------------------------------------------- 3. a round of episodes

def prompts_of(config, tokenizer, context=math.inf):
    """Prompts that fit max_tokens and the model's `context` -> (cases to learn from, held-out cases).

    With `answers_only` the cases to learn from contain the number that is asked for, but not its expression (unless
    another tool is due as well).
    """
    import data
    from eval import Case, as_case
    from tools import BUILTIN, UserError
    read = [data.conversations(config, split, tokenizer, as_case, BUILTIN) for split in ("train", "dev")]
    cases, held_out = ([c if isinstance(c, Case) else as_case(c) for c in conversations] for conversations in read)
    judgeable(cases, config)
    if config.answers_only:
        cases = [case._replace(calls=None, reference=None)
                 if wants_number(case) and {call.name for call in case.calls or []} <= {"calculator"} else case
                 for case in cases]
    lengths = [len(data.encode(case.conversation, tokenizer, config.tool_style, generation=True)[0]) for case in cases]
    if not (cases := data.fitting(cases, lengths, min(config.max_tokens, context - 1), "prompts")):
        raise UserError(f"no prompt fits max_tokens = {config.max_tokens}; raise it")
    return cases, held_out


class ValueHead(torch.nn.Linear):
    """V_t from the trunk's output before token t: D numbers -> one. The weights start at zero, so the first returns are
    the rewards to come, not guesses.

    The head reads hidden / D^(1/4): its learning rate is that of the adapters, and Adam moves every weight by about the
    learning rate. Without the scaling, one step moves V by up to lr sum_d |hidden_d| (SmolLM2, lr 6e-4: 0.45, half of a
    reward), and V was noise. With the scaling 1/sqrt(D), V did not move.
    """

    def __init__(self, width):
        super().__init__(width, 1)
        torch.nn.init.zeros_(self.weight)
        torch.nn.init.zeros_(self.bias)

    def forward(self, hidden):
        return super().forward(hidden * self.in_features ** -0.25)[..., 0]      # [B, T, D] -> [B, T]


class Policy(torch.nn.Module):
    """The model as a function of rows (`toolplay.token_logprobs`), with its own or another adapter of equal shape."""

    def __init__(self, model, temperature, budget):
        super().__init__()
        self.model, self.temperature, self.budget = model, temperature, budget

    def forward(self, rows, want):
        import toolplay
        budget = None if torch.is_grad_enabled() else self.budget
        return toolplay.token_logprobs(self.model, rows, self.temperature, budget, want)

    def switched(self, adapter, rows, want=()):
        """The output with `adapter` ({name: tensor}, as from `adapter()`) instead of the model's own adapter: for this
        one call a parameter is replaced by the tensor of its name. So reference and critic are small adapters on one
        model; gradients go to the tensors of `adapter`."""
        return torch.func.functional_call(self, adapter, (rows, want))

    def adapter(self):
        """A copy of the current adapter: that is, before training, `start_from`'s adapter or (B = 0) the base model."""
        return {name: p.detach().clone() for name, p in self.named_parameters() if p.requires_grad}


class ActorCritic:
    """Policy, reference and critic in one model: they differ in the active adapter.

    `parameters` {name: tensor} holds what is trained: the policy's adapter, and with GAE also the value head and the
    critic's own adapter.
    """

    def __init__(self, model, config, device):
        self.config, self.device = config, device
        self.policy = Policy(model, config.temperature, config.micro_tokens)
        self.reference, self.critic = self.policy.adapter(), {}
        self.head = ValueHead(model.get_input_embeddings().weight.shape[1]).to(device)
        self.trunk = ("hidden",) if config.advantage in CRITIC else ()          # what the critic reads
        self.parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        if config.advantage in CRITIC:
            self.parameters.update({f"value_head.{n}": p for n, p in self.head.named_parameters()})
            if config.value_lora:
                self.critic = {name: p.requires_grad_() for name, p in self.policy.adapter().items()}
                self.parameters.update({f"critic.{name}": p for name, p in self.critic.items()})

    def values(self, rows, out):
        """V [B, T] of rows; `out` is the policy's output for rows. A critic with its own adapter reads rows again."""
        return self.head((self.policy.switched(self.critic, rows, self.trunk) if self.critic else out)["hidden"])

    @torch.no_grad()
    def old_and_reference(self, units):
        """What stays fixed while the policy learns from the episodes -> for each unit its log-probs under policy and
        reference, and its values."""
        rows = [unit["row"] for unit in units]
        out, ref_logp = self.policy(rows, self.trunk), self.policy.switched(self.reference, rows)
        logp, values = (out["logp"], self.values(rows, out)) if self.trunk else (out, torch.zeros_like(out))
        return [{name: x[b, :len(ids)].tolist()
                 for name, x in (("logp", logp), ("ref_logp", ref_logp), ("values", values))}
                for b, (ids, _) in enumerate(rows)]

    def loss(self, group):
        """(2), (3) and (6) over a minibatch's units -> (sum over their tokens, info)."""
        config, rows = self.config, [unit["row"] for unit in group]
        out = self.policy(rows, (*self.trunk, "entropy"))
        mask, weight, old_logp, advantages, returns, old_values = (
            padded([unit.get(key, ()) for unit in group], out["logp"].shape[1], self.device)
            for key in ("mask", "weight", "logp", "advantages", "returns", "values"))
        total, info = policy_loss(out["logp"], old_logp, advantages, mask, config.clip_range, config.dual_clip)
        entropy = model_tokens(out["entropy"], mask).sum()
        info = {**info, "policy_loss": total, "entropy": entropy.detach()}
        if config.entropy_coef:
            total = total - config.entropy_coef * entropy
        if config.advantage in CRITIC:
            value, more = value_loss(self.values(rows, out), old_values, returns, mask, config.value_clip)
            total, info = total + config.vf_coef * value, {**info, **more, "value_loss": value}
        if config.ptx:
            imitation = -model_tokens(weight * out["logp"], weight).sum()  # (6)
            total, info = total + imitation, {**info, "ptx_loss": imitation.detach() / config.ptx_coef}
        return total, info


def padded(rows, width, device):
    """Lists of numbers of different lengths (also []) -> [B, width], padded with zeros at the end."""
    return torch.tensor([list(row) + [0] * (width - len(row)) for row in rows], dtype=torch.float32, device=device)


@functools.lru_cache(4)
def shuffled(n, *seed):
    return random.Random(repr(seed)).sample(range(n), n)


CRITIC = {"gae"}              # advantages that read the critic's values
COMPARING = {"rloo", "grpo"}  # advantages that compare the samples of a prompt


def advantages_of(config, scores, kl, values, mask, kl_coef):
    """Scores [prompts * samples] and KL [B, T] of a round -> (advantages, returns, token rewards) [B, T]."""
    groups = scores.reshape(-1, config.samples)
    if config.advantage == "gae" and config.center:
        scores = rloo_advantages(groups).flatten()
    rewards = token_rewards(scores, kl, mask, kl_coef)
    if config.advantage == "gae":
        if config.whiten_rewards:
            rewards = masked_whiten(rewards, mask, shift_mean=False)
        advantages, returns = gae(rewards, values, mask, config.gamma, config.lam)
        return masked_whiten(advantages, mask), returns, rewards
    # RLOO and GRPO have no critic: every token of an episode gets the same advantage, and returns are not used.
    cost = kl_coef * torch.stack([model_tokens(x, m).sum() for x, m in zip(kl, mask)]).reshape(groups.shape)
    if config.advantage == "rloo":
        advantages = rloo_advantages(groups - cost)
    elif config.advantage == "grpo":
        # KL is not divided by std: if all samples are equally good, the division would amplify the KL's noise
        advantages = grpo_advantages(groups) - (cost - cost.mean(1, keepdim=True))
    else:
        raise ValueError(f"advantage {config.advantage!r} has no branch here")
    return advantages.reshape(-1, 1) * mask, torch.zeros_like(rewards), rewards


def choose_prompts(state, n, config):
    """Which of n cases a round plays -> (cases that taught when last played, longest wait first; new cases, in a fresh
    order on each pass)."""
    waiting, start = state.get("taught", []), state.get("new", 0)
    again = waiting[:int(config.replay * config.prompts)]
    state.update(taught=waiting[len(again):], new=start + config.prompts - len(again))
    return again, [shuffled(n, config.seed, "prompts", at // n)[at % n] for at in range(start, state["new"])]


def what_taught(state, picked, played, config):
    """The groups of episodes that differ enough to learn from. Their cases wait in `state` to be played again."""
    scores = [[unit["score"] for unit in group] for group in played]
    taught = [max(s) - min(s) >= config.min_spread for s in scores]
    waiting = [i for i in state["taught"] if i not in picked]  # a waiting case may also be picked as a new case
    state["taught"] = waiting + list(dict.fromkeys(i for i, yes in zip(picked, taught) if yes))
    return [group for group, yes in zip(played, taught) if yes]


def compute_advantages(config, units, kl_coef, device):
    """Write advantages, returns and token rewards into the units to learn from -> log."""
    width = max(len(unit["mask"]) for unit in units)
    mask, logp, ref_logp, values, sampled = (padded(x, width, device) for x in [
        *([unit[key] for unit in units] for key in ("mask", "logp", "ref_logp", "values")),
        [unit["episode"].logp for unit in units]])
    kl = kl_penalty(logp, ref_logp, config.kl_estimator) * mask
    scores = torch.tensor([unit["score"] for unit in units], dtype=torch.float32, device=device)
    made = advantages_of(config, scores, kl, values * mask, mask, kl_coef)
    for b, unit in enumerate(units):
        unit.update({name: x[b, :len(unit["mask"])].tolist()
                     for name, x in zip(("advantages", "returns", "rewards"), made)})
    log = {"kl": float(model_tokens(kl, mask).sum()) / len(units),
           "sampling_gap": float(((logp - sampled) * mask).abs().max())}
    if config.advantage in CRITIC:
        log["explained_variance"] = explained_variance(values * mask, made[1], mask)
    return log


def summary(units):
    """What all episodes of a round earned, also the episodes that the policy does not learn from."""
    scores = torch.tensor([unit["score"] for unit in units])
    calls = [r.ok for unit in units for r in unit["episode"].results]
    return {"reward": float(scores.mean()), "reward_std": float(scores.std()) if len(units) > 1 else 0.0,
            **{f"reward/{name}": sum(unit["parts"][name] for unit in units) / len(units) for name in units[0]["parts"]},
            "tool_success": sum(calls) / max(len(calls), 1),
            "response_length": sum(sum(unit["mask"]) for unit in units) / len(units)}


# --------------------------------------------------------------------------- 4. training

def check_settings(config):
    """Raise UserError for settings that contradict each other or teach nothing."""
    from tools import UserError
    if not config.lora_r or config.lora_dropout:
        raise UserError("ppo trains adapters without dropout (switched off or back, they are the reference; the first "
                        "ratio must be 1): set lora_r > 0 and lora_dropout = 0")
    if config.steps or config.epochs != 1:
        raise UserError("steps, epochs: ppo counts rounds; set iterations (and ppo_epochs)")
    keys = {config.advantage: config.advantage in COMPARING, "center": config.center, "min_spread": config.min_spread}
    comparing = [name for name, on in keys.items() if on]
    if config.samples < 2 and comparing:
        raise UserError(f"samples = {config.samples}: {comparing[0]} compares the samples of a prompt; "
                        "at least 2 are needed")
    if config.kl_target and not config.kl_coef:
        raise UserError(f"kl_target = {config.kl_target} with kl_coef = 0: "
                        "the coefficient is steered by multiplying it; give one above 0")
    if config.kl_target and config.kl_horizon <= 0.2 * config.prompts * config.samples:
        raise UserError(f"kl_horizon = {config.kl_horizon}: one round could bring the coefficient to 0, where it "
                        f"stays; give more than {0.2 * config.prompts * config.samples:g} (a fifth of a round's "
                        "episodes)")
    if bool(config.ptx) != bool(config.ptx_mix):
        raise UserError("ptx and ptx_mix go together: how many conversations each minibatch imitates, "
                        "and of which kinds")
    if 0 < config.dual_clip <= 1:
        raise UserError(f"dual_clip = {config.dual_clip}: must be above 1 (or 0: none); below, "
                        "it would stop every lesson of a bad episode")


def minibatches(config, prompts):
    """Number of minibatches that the episodes of this many prompts give, in all epochs."""
    return config.ppo_epochs * -(-prompts * config.samples // config.batch_size)


def learn(trainer, groups, loss, imitated, position, config):
    """Train for all epochs on the episodes of a round's prompts -> means of the minibatches' logs, weighted by tokens.

    `imitated`: see `imitation`. `position`: the trainer's step before the round.
    """
    import toolplay
    sums, count, terms, stopped, whole = {}, 0, 0, False, minibatches(config, len(groups))
    orders = ([unit for p in shuffled(len(groups), config.seed, position, epoch) for unit in groups[p]]
              for epoch in range(config.ppo_epochs))
    for batch in (order[at:at + config.batch_size]
                  for order in orders for at in range(0, len(order), config.batch_size)):
        batch += imitated(trainer.step, sum(sum(unit["mask"]) for unit in batch))
        skipped = trainer.skipped
        info = toolplay.train_step(trainer, batch, loss, size=lambda unit: sum(unit["mask"]),
                                   rows=lambda unit: [unit["row"]],
                                   veto=lambda means: means["ratio"] > config.ratio_guard)
        count += 1
        if trainer.skipped == skipped:  # the numbers of a skipped step are nan, or belong to a refused step
            for name, value in info.items():
                # weighted by tokens, because the last minibatch may be short
                sums[name] = sums.get(name, 0.0) + value * info["terms"]
            terms += info["terms"]
        if stopped := bool(config.kl_stop and count < whole and info["approx_kl"] > config.kl_stop):
            break
    # A round may learn from fewer minibatches than planned. Step and schedule still advance by the planned number, so
    # that they depend on the round alone.
    left = minibatches(config, config.prompts) - count
    trainer.step, trainer.updates = trainer.step + left, trainer.updates + left
    return {**{name: value / terms for name, value in sums.items() if name not in ("tokens", "terms", "skipped")},
            "stopped": int(stopped)}


def imitation(config, tokenizer):
    """-> (the conversations to imitate as rows, a function (trainer's step, tokens of a minibatch) -> those that are
    imitated beside the minibatch). These are units whose tokens are no actions (mask 0). The tokens' weights make their
    mean loss count `ptx_coef`."""
    import data
    if not config.ptx:
        return [], lambda step, tokens: []
    old = dataclasses.replace(config, source="manual", path="", mix=config.ptx_mix, batch_size=config.ptx)
    rows = data.encode_all(data.conversations(old, "train", tokenizer), tokenizer, config, "imitation")
    batches = data.Batches(rows, old)

    def units(step, tokens):
        chosen = [rows[i] for i in batches(step)]
        weight = config.ptx_coef * tokens / max(1, sum(sum(mask) for _, mask in chosen))
        return [{"row": row, "mask": [], "weight": [weight * m for m in row[1]]} for row in chosen]
    return rows, units


def play(run, model, tokenizer, cases, reward, round_):
    """A rank's share of a round: for each of its [(case, how often it was chosen before)] `samples` episodes with their
    rewards."""
    import lora
    import toolplay
    config = run.config
    chosen, again = zip(*(pair for pair in cases for _ in range(config.samples)))
    with lora.merged(model):  # sampling is faster
        episodes = toolplay.rollout(model, tokenizer, [case.conversation for case in chosen],
                                    temperature=config.temperature, style=config.tool_style, bar="ppo rollout",
                                    max_new_tokens=config.max_new_tokens, max_turns=config.max_turns,
                                    seed=[f"{config.seed} round {round_}" + f" again {n}" * (n > 0) for n in again],
                                    batch_size=config.prompts * config.samples)
    units = [{"episode": e, "row": (e.ids, e.mask), "mask": e.mask, **dict(zip(("score", "parts"), reward(case, e)))}
             for case, e in zip(chosen, episodes)]
    return [units[n:n + config.samples] for n in range(0, len(units), config.samples)]


def play_round(run, model, tokenizer, cases, reward, round_):
    """-> for each case its episodes, played by all ranks together. A case that is chosen twice gets other episodes."""
    import toolplay
    chats = [case.conversation for case in cases]
    played = toolplay.shared_out([(case, chats[:n].count(chats[n])) for n, case in enumerate(cases)],
                                 lambda own: play(run, model, tokenizer, own, reward, round_))
    return [[{"case": case, **unit} for unit in group] for case, group in zip(cases, played)]


def train(run):
    # Imported here so that the losses work in a project that copies this file alone.
    import eval as evaluation
    import toolplay
    from tools import UserError
    config = run.config
    check_settings(config)
    reward = reward_of(config)

    # 1. data: prompts, and what is known about their answers
    model, tokenizer = toolplay.prepare_model(config, run.device)
    cases, held_out = prompts_of(config, tokenizer, toolplay.context_of(model))
    imitated_rows, imitated = imitation(config, tokenizer)

    # 2. model: policy, reference, critic
    actor = ActorCritic(model, config, run.device)

    # 3. optimizer
    per_round = minibatches(config, config.prompts)
    trainer = toolplay.Trainer(config, actor.parameters, config.iterations * per_round)
    run.start(trainer, [(case.conversation["messages"], [tool.schema() for tool in case.conversation["tools"]],
                         case.calls and [vars(call) for call in case.calls],
                         case.answer, case.reference, case.kind, case.later) for case in [*cases, *held_out]]
              + imitated_rows)
    if trainer.extra.setdefault("reference", started := toolplay.start_hashes(config)) != started:
        raise UserError(f"{config.start_from}: its adapter has changed since the run began, "
                        "and was its reference; start a new run")
    beta = trainer.extra.get("kl_coef", config.kl_coef)

    # 4. loop: each iteration samples one round and learns from it; a killed round is repeated exactly
    for position in run.steps(trainer, trainer.total):
        round_ = position // per_round
        again, new = choose_prompts(trainer.extra, len(cases), config)
        picked = again + new
        played = play_round(run, model, tokenizer, [cases[i] for i in picked], reward, round_)
        groups = what_taught(trainer.extra, picked, played, config)
        if not groups and run.rank == 0:
            run.bar.write(f"round {round_}: no prompt's samples differ by min_spread = {config.min_spread}: nothing is "
                          "learned", file=sys.stderr)
        everything, units = ([unit for group in some for unit in group] for some in (played, groups))
        log = {**summary(everything), "kl_coef": beta, "learned_from": len(groups) / config.prompts,
               "replayed": len(again) / config.prompts}
        if new:  # replayed prompts were chosen for their results: only new prompts show progress
            log["reward_new"] = summary(everything[len(again) * config.samples:])["reward"]
        if units:
            with trainer.autocast():
                fixed = toolplay.shared_out(units, actor.old_and_reference)
            for unit, numbers in zip(units, fixed):
                unit.update(numbers)
            log.update(compute_advantages(config, units, beta, run.device))
            beta = adaptive_kl(beta, log["kl"], len(units), config.kl_target, config.kl_horizon)
            trainer.extra["kl_coef"] = beta
        log.update(learn(trainer, groups, actor.loss, imitated, position, config), skipped=trainer.skipped)
        if held_out and (trainer.step >= trainer.total or config.eval_every and (round_ + 1) % config.eval_every == 0):
            report, _ = evaluation.evaluate(model, tokenizer, held_out, max_new_tokens=config.max_new_tokens,
                                            **toolplay.decoding(config), bar="")
            log.update({f"eval_{name}": report["metrics"][name]["value"]
                        for name in ("tool_accuracy", "format", "response_quality")})
        run.log(trainer.step, log, tokens=sum(sum(unit["mask"]) for unit in everything))
        run.append("samples.jsonl", trainer.step,
                   [sample_line(group[0], tokenizer) for group in (groups or played)[:2]])

    # 5. save
    run.save_model(model, tokenizer)
    run.finish()


def sample_line(unit, tokenizer):
    """The entry of an episode in samples.jsonl."""
    case, episode = unit["case"], unit["episode"]
    return {"prompt": case.conversation["messages"][-1]["content"], "turns": episode.turns,
            "results": [r.text() for r in episode.results], "answer": case.answer,
            "score": unit["score"], "tokens": [tokenizer.decode([i]) for i in episode.ids[episode.prompt:]],
            "mask": episode.mask[episode.prompt:],
            **{key: unit.get(key, [0.0] * len(episode.ids))[episode.prompt:] for key in ("rewards", "advantages")}}


def inspect(folder, n=4):
    """Print the newest samples of a run: the text, and the reward and advantage of every token of the model."""
    from pathlib import Path

    import toolplay
    from tools import UserError, printable
    path = Path(folder) / "samples.jsonl"
    keys = ["step", "score", "answer", "prompt", "tokens", "mask", "rewards", "advantages"]
    lines = toolplay.read_lines(path, keys)[-n:]
    try:
        for line in lines:
            idle = "" if any(line["advantages"]) or any(line["rewards"]) else ", not learned from"
            prompt = printable(line["prompt"])
            print(f"--- step {line['step']}, score {line['score']:.3f}, answer {line['answer']}{idle}\n{prompt}")
            for token, mask, reward, advantage in zip(*(line[key] for key in keys[-4:])):
                said = f"reward {reward:+.3f}  advantage {advantage:+.3f}" if mask else "(not the model's)"
                print(f"  {token!r:24}{said}")
    except (TypeError, ValueError):
        raise UserError(f"{path}: it is damaged") from None
    if not lines:
        raise UserError(f"{folder}: no samples.jsonl; name a PPO run that has finished a round: "
                        "python ppo.py --inspect RUN")


def main(argv=None):
    import toolplay
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] != ["--inspect"]:
        return toolplay.main(["train", *argv])
    with toolplay.one_line_errors():
        if len(argv) != 2:
            raise toolplay.UserError("--inspect takes one run folder and nothing else: python ppo.py --inspect RUN")
        inspect(argv[1])


if __name__ == "__main__":
    main()
