"""ppo.py: each equation computed by hand, tool results that change nothing, rewards that cannot be cheated, whole runs."""
import contextlib
import copy
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import small
from safetensors.torch import load_file
from small import model, tokenizer

import data
import eval as evaluation
import lora
import ppo
import toolplay
from tools import BUILTIN, Call, Result, UserError, execute, format_call, load_tools, parse_calls

ROOT = Path(toolplay.__file__).parent
T = lambda *rows: torch.tensor(rows, dtype=torch.float64)  # noqa: E731


# ---------------------------------------------------------------- equations

@pytest.mark.parametrize("n", range(6))
def test_equal_to_verl(n):
    """The results equal those of verl 0.9.1's own functions; golden/make.py says how its numbers were made."""
    case = json.loads((ROOT / "tests" / "golden" / "ppo.json").read_text())[n]
    given, made = ({k: torch.tensor(v, dtype=torch.float64) for k, v in case[part].items()} for part in ("given", "made"))
    mask, tokens = given["mask"], given["mask"].sum()
    advantages, returns = ppo.gae(given["rewards"], given["values"], mask, case["gamma"], case["lam"])
    white = ppo.masked_whiten(advantages, mask)
    policy, info = ppo.policy_loss(given["logp"], given["old_logp"], white, mask)
    value, value_info = ppo.value_loss(given["new_values"], given["values"], returns, mask)
    ours = {"advantages": white, "returns": returns, "whitened": ppo.masked_whiten(given["rewards"], mask),
            "scaled": ppo.masked_whiten(given["rewards"], mask, False),
            "policy_loss": policy / tokens, "clip_fraction": info["clip_fraction"] / tokens, "value_loss": value / tokens,
            "dual_clip_policy_loss": ppo.policy_loss(given["logp"], given["old_logp"], white, mask, dual_clip=1.5)[0] / tokens,
            "value_clip_fraction": value_info["value_clip_fraction"] / tokens,
            **{k: ppo.kl_penalty(given["logp"], given["ref_logp"], k) for k in ("k1", "k3")}}
    scores = given["rewards"].sum(1).reshape(-1, 2)
    ours |= {"rloo": ppo.rloo_advantages(scores).reshape(-1, 1) * mask, "grpo": ppo.grpo_advantages(scores, eps=1e-6).reshape(-1, 1) * mask}
    assert set(ours) == set(made)
    for name, value in ours.items():
        inside = mask.expand_as(value) if value.dim() else torch.tensor(1.0)  # verl leaves numbers on tokens outside the mask
        assert torch.allclose(value * inside, made[name] * inside, rtol=1e-6, atol=1e-8), name
    assert made["dual_clip_policy_loss"] != made["policy_loss"] or n


def test_gae_by_hand():
    """Two tokens, gamma 0.9, lambda 0.5: A_2 = 1 - 0.3; A_1 = (0.2 + 0.9 * 0.3 - 0.1) + 0.45 * A_2."""
    advantages, returns = ppo.gae(T([0.2, 1.0]), T([0.1, 0.3]), T([1, 1]), 0.9, 0.5)
    assert advantages.tolist()[0] == pytest.approx([0.37 + 0.45 * 0.7, 0.7])
    assert returns.tolist()[0] == pytest.approx([0.37 + 0.45 * 0.7 + 0.1, 1.0])


@pytest.mark.parametrize("lam", [0.0, 0.95, 1.0])
def test_gae_is_the_sum_it_stands_for(lam):
    """Eq. 16: A_t = sum over l of (gamma lam)^l delta_{t+l}; with lambda 1, A_t is the return minus the value."""
    torch.manual_seed(0)
    r, v, gamma = torch.randn(1, 7, dtype=torch.float64), torch.randn(1, 7, dtype=torch.float64), 0.97
    advantages, _ = ppo.gae(r, v, torch.ones(1, 7), gamma, lam)
    delta = [r[0, t] + (gamma * v[0, t + 1] if t < 6 else 0) - v[0, t] for t in range(7)]
    for t in range(7):
        assert advantages[0, t].item() == pytest.approx(sum((gamma * lam) ** n * delta[t + n] for n in range(7 - t)).item())
    if lam == 1:
        assert advantages[0, 2].item() == pytest.approx((sum(gamma ** n * r[0, 2 + n] for n in range(5)) - v[0, 2]).item())


def spliced(x, at, k, fill=None):
    """x [B, T] with k columns of garbage before column `at`."""
    garbage = torch.full((x.shape[0], k), fill, dtype=x.dtype) if fill is not None else 100 * torch.randn(x.shape[0], k, dtype=x.dtype)
    return torch.cat([x[:, :at], garbage, x[:, at:]], 1)


@pytest.mark.parametrize("at, k", [(0, 1), (2, 1), (3, 7), (6, 4), (4, 33)])
def test_tool_tokens_change_nothing_bit_for_bit(at, k):
    torch.manual_seed(at)
    x = {name: torch.randn(3, 6) for name in ("logp", "old", "rewards", "values", "old_values", "kl")}
    mask = torch.tensor([[0, 1, 1, 0, 1, 1], [1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 0.]])
    y, mask_y = {name: spliced(value, at, k) for name, value in x.items()}, spliced(mask, at, k, 0.0)
    keep = lambda z: torch.cat([z[:, :at], z[:, at + k:]], 1)  # noqa: E731
    results = []
    for d, m in ((x, mask), (y, mask_y)):
        rewards = ppo.token_rewards(torch.tensor([1.0, -0.5, 2.0]), d["kl"], m, 0.1)
        advantages, returns = ppo.gae(rewards, d["values"], m, 0.99, 0.9)
        white = ppo.masked_whiten(advantages, m)
        results.append((rewards, advantages, returns, white, *ppo.policy_loss(d["logp"], d["old"], white, m, 0.2, 3.0)[1].values(),
                        ppo.policy_loss(d["logp"], d["old"], white, m)[0], ppo.value_loss(d["values"], d["old_values"], returns, m)[0],
                        ppo.masked_mean(d["kl"], m), torch.tensor(ppo.explained_variance(d["values"], returns, m))))
    for a, b in zip(*results):
        assert torch.equal(a, keep(b) if b.dim() == 2 else b)


@pytest.mark.parametrize("advantage, center, whiten", [("gae", False, False), ("gae", True, True), ("rloo", False, False),
                                                       ("grpo", False, False)])
def test_advantages_of_a_round_step_over_tool_tokens(advantage, center, whiten):
    settings = ppo.Config(advantage=advantage, samples=2, center=center, whiten_rewards=whiten)
    torch.manual_seed(0)
    kl, values, scores = torch.randn(4, 5), torch.randn(4, 5), torch.tensor([1.0, 0.0, 0.25, 0.5])
    mask = torch.tensor([[0, 1, 1, 0, 1], [1, 1, 1, 1, 0], [0, 0, 1, 1, 1], [1, 0, 0, 0, 0.]])
    plain = ppo.advantages_of(settings, scores, kl, values, mask, 0.3)
    for at, k in ((0, 2), (3, 1), (4, 9)):
        longer = ppo.advantages_of(settings, scores, spliced(kl, at, k), spliced(values, at, k), spliced(mask, at, k, 0.0), 0.3)
        assert all(torch.equal(a, torch.cat([b[:, :at], b[:, at + k:]], 1)) for a, b in zip(plain, longer))


@pytest.mark.parametrize("advantage", ["gae", "rloo", "grpo"])
def test_drifting_from_the_reference_costs(advantage):
    """Two samples that earn the same: the first has become more likely than under the reference by 1.5 nats, the second less
    likely by 1."""
    settings = ppo.Config(advantage=advantage, samples=2)
    units = [{"mask": [0, 1, 1], "logp": [0, -1.0, -1.0], "ref_logp": ref, "values": [0, 0, 0], "score": 1.0,
              "episode": SimpleNamespace(logp=[0, -1.0, -1.0])} for ref in ([0, -2.0, -1.5], [0, -0.5, -0.5])]
    log = ppo.compute_advantages(settings, units, 0.1, "cpu")
    assert units[0]["rewards"] == pytest.approx([0, -0.1, 0.95]) and units[1]["rewards"] == pytest.approx([0, 0.05, 1.05])
    assert log["kl"] == pytest.approx((1.5 - 1) / 2) and log["sampling_gap"] == 0
    assert max(units[0]["advantages"]) < max(units[1]["advantages"]) and min(units[0]["advantages"]) < 0
    if advantage != "gae":  # the costs are 0.15 and -0.1; RLOO subtracts the other's, GRPO the mean
        by_hand = {"rloo": 0.25, "grpo": 0.125}[advantage]
        assert units[0]["advantages"] == pytest.approx([0, -by_hand, -by_hand]) and units[1]["advantages"] == pytest.approx([0, by_hand, by_hand])


def test_the_loss_is_the_weighted_sum_of_its_terms():
    settings = ppo.Config(entropy_coef=0.1, vf_coef=0.5, dual_clip=3.0, ptx=1)
    actor, entropy, hidden = ppo.ActorCritic.__new__(ppo.ActorCritic), torch.tensor([[0.3, 0.2, 0.9]]), torch.ones(1, 3, 8)
    logp = torch.tensor([[-1.0, -0.5, -2.0]])
    actor.config, actor.device, actor.critic, actor.trunk, actor.head = settings, "cpu", {}, ("hidden",), ppo.ValueHead(8)
    actor.policy = lambda rows, want: {"logp": logp, "entropy": entropy, "hidden": hidden}
    assert torch.equal(actor.head(torch.randn(2, 3, 8)), torch.zeros(2, 3))  # the critic begins without an opinion
    unit = {"row": ([1, 2, 3], [1, 1, 0]), "mask": [1, 1, 0], "weight": [0, 0, 0.25], "logp": [-5.0, -0.5, 0], "advantages": [-2.0, 1.0, 0],
            "returns": [0.5, -1.0, 7.0], "values": [0.0, 0.0, 0.0]}
    total, info = actor.loss([unit])
    # e^4 times as likely and bad: dual clip bounds the loss at 3 * 2; the second token earns 1
    assert info["policy_loss"].item() == pytest.approx(6 - 1) and info["entropy"].item() == pytest.approx(0.5)
    assert info["value_loss"].item() == pytest.approx(0.5 * (0.25 + 1)) and info["ptx_loss"].item() == pytest.approx(0.5)
    assert total.item() == pytest.approx(5 - 0.1 * 0.5 + 0.5 * 0.625 + 0.5)


def test_what_stands_on_a_tool_token_is_nothing():
    """Not even nan on a tool token changes a result; the mask may also be boolean or of integers."""
    nan, mask = math.nan, T([1, 0, 1])
    plain = ppo.gae(T([0, 0, 1]), T([0.5, 0, 0.1]), mask)
    for m in (mask, mask.bool(), mask.long()):
        rewards = ppo.token_rewards(T([1.0])[0], T([0.1, nan, 0.2]), m, 0.5)
        assert torch.allclose(rewards, T([-0.05, 0, 0.9]))
        assert all(torch.equal(a, b) for a, b in zip(ppo.gae(T([0, nan, 1]), T([0.5, nan, 0.1]), m), plain))
        assert ppo.masked_whiten(T([1, nan, 3]), m).tolist()[0] == pytest.approx([-0.5 ** 0.5, 0, 0.5 ** 0.5])


def test_masked_whiten():
    x, mask = T([1.0, 50.0, 3.0, 8.0]), T([1, 0, 1, 1])
    white = ppo.masked_whiten(x, mask)
    inside = torch.tensor([1.0, 3.0, 8.0], dtype=torch.float64)
    assert white[0, [0, 2, 3]].tolist() == pytest.approx(((inside - inside.mean()) / inside.std()).tolist(), rel=1e-6)
    assert white[0, 1] == 0
    assert ppo.masked_whiten(x, mask, shift_mean=False)[0, [0, 2, 3]].mean().item() == pytest.approx(4.0)
    assert ppo.masked_mean(x, mask).item() == 4 and ppo.masked_mean(x, 0 * mask).item() == 0


def test_policy_loss_by_hand():
    """Ratios 1.5 and 0.5 with advantages of both signs, eps 0.2: min(rho A, clip(rho) A) is 1.2, -1.5, 0.5, -0.8."""
    logp, advantages = T([1.5, 1.5, 0.5, 0.5]).log(), T([1.0, -1, 1, -1])
    loss, info = ppo.policy_loss(logp, 0 * logp, advantages, T([1, 1, 1, 1]))
    assert loss.item() == pytest.approx(-(1.2 - 1.5 + 0.5 - 0.8))
    assert info["clip_fraction"] == 2 and info["ratio"].item() == pytest.approx(4.0) and info["tokens"] == 4
    assert info["approx_kl"].item() == pytest.approx(sum(r - 1 - math.log(r) for r in (1.5, 1.5, 0.5, 0.5)))
    assert ppo.policy_loss(T([math.log(10)]), T([0.0]), T([-1.0]), T([1]), 0.2, dual_clip=3.0)[0].item() == pytest.approx(3.0)
    assert ppo.policy_loss(T([math.log(10)]), T([0.0]), T([-1.0]), T([1]))[0].item() == pytest.approx(10.0)


def test_value_loss_by_hand():
    """Old value 0, return 1: 0.5 is clipped to 0.2 and costs 0.8^2 / 2; -0.5 costs 1.5^2 / 2 unclipped."""
    loss, info = ppo.value_loss(T([0.5, -0.5, 0.1]), T([0.0, 0, 0]), T([1.0, 1, 1]), T([1, 1, 0]))
    assert loss.item() == pytest.approx(0.5 * (0.64 + 2.25)) and info["value_clip_fraction"] == 1


def test_kl_estimators():
    """Over the policy's own samples, the mean of both is the true KL; k3 is never negative."""
    p, q = T([0.7, 0.2, 0.1]), T([0.3, 0.3, 0.4])
    true = (p * (p / q).log()).sum().item()
    for kind in ("k1", "k3"):
        assert (p * ppo.kl_penalty(p.log(), q.log(), kind)).sum().item() == pytest.approx(true)
    assert (ppo.kl_penalty(p.log(), q.log(), "k3") >= 0).all() and (ppo.kl_penalty(p.log(), q.log()) < 0).any()


def test_the_score_lands_on_the_last_token_of_the_model():
    rewards = ppo.token_rewards(torch.tensor([1.0, 2.0]), T([0.5, 9, 0.5, 9], [1, 1, 1, 1]), T([1, 0, 1, 0], [0, 0, 0, 0]), 0.1)
    assert rewards.tolist()[0] == pytest.approx([-0.05, 0, 0.95, 0]) and rewards.tolist()[1] == [0, 0, 0, 0]


def test_group_baselines():
    scores = T([1.0, 2, 6], [3, 3, 3])
    assert ppo.rloo_advantages(scores).tolist() == [pytest.approx([1 - 4, 2 - 3.5, 6 - 1.5]), pytest.approx([0, 0, 0])]
    spread = torch.tensor([1.0, 2, 6], dtype=torch.float64).std().item()
    assert ppo.grpo_advantages(scores)[0].tolist() == pytest.approx([(x - 3) / (spread + 1e-4) for x in (1, 2, 6)])
    assert ppo.grpo_advantages(scores)[1].tolist() == [0, 0, 0]
    assert ppo.rloo_advantages(T([5.0])).tolist() == ppo.grpo_advantages(T([5.0])).tolist() == [[0.0]]
    # in fp32 the mean of equal scores can differ from them, and the difference would be divided by eps
    for score, k in ((1.392, 7), (100.3, 7), (1000.3, 12)):
        assert ppo.grpo_advantages(torch.full((1, k), score)).tolist() == [[0.0] * k]
        assert ppo.grpo_advantages(torch.full((1, k), score)).dtype is torch.float32


def test_adaptive_kl():
    """The error is clipped to 0.2: 64 episodes of 10,000 move the coefficient by at most 0.128 %."""
    assert ppo.adaptive_kl(0.1, 100.0, 64, 6, 10000) == pytest.approx(0.1 * (1 + 0.2 * 0.0064))
    assert ppo.adaptive_kl(0.1, 0.0, 64, 6, 10000) == pytest.approx(0.1 * (1 - 0.2 * 0.0064))
    assert ppo.adaptive_kl(0.1, 6.6, 100, 6, 10000) == pytest.approx(0.1 * (1 + 0.1 * 0.01))
    assert ppo.adaptive_kl(0.1, 99.0, 64, 0, 10000) == 0.1


def test_explained_variance():
    r = T([1.0, 2, 3])
    assert ppo.explained_variance(r, r, T([1, 1, 1])) == 1
    assert ppo.explained_variance(0 * r, r, T([1, 1, 1])) == pytest.approx(0)
    assert ppo.explained_variance(r, 0 * r, T([1, 1, 1])) == 0
    assert ppo.explained_variance(torch.full((1, 9), 0.1), torch.full((1, 9), 1.392), torch.ones(1, 9)) == 0  # returns that do not vary


@pytest.mark.parametrize("sizes", [[1] * 7, [3, 1, 3], [2, 5]])
@pytest.mark.parametrize("dual_clip", [0.0, 3.0])
@pytest.mark.parametrize("advantage", ["gae", "rloo", "grpo"])
def test_sums_over_parts_are_the_sum_in_fp32(advantage, dual_clip, sizes):
    """Gradients with respect to log-probs and values, divided by the tokens of all seven episodes: one episode a part, or uneven parts."""
    torch.manual_seed(0)
    mask = torch.rand(7, 9) < 0.7
    inputs = [(-2 * torch.rand(7, 9)).requires_grad_(), torch.randn(7, 9).requires_grad_()]
    old, values, rewards = inputs[0].detach() + 0.3 * torch.randn(7, 9), torch.randn(7, 9), torch.randn(7, 9)
    advantages, returns = ppo.gae(rewards, values, mask, 1.0, 0.95)
    if advantage != "gae":
        advantages = getattr(ppo, f"{advantage}_advantages")(torch.randn(1, 7))[0][:, None].expand(7, 9)

    def gradient(sizes):
        for x in inputs:
            x.grad = None
        for logp, v, *parts in zip(*(x.split(sizes) for x in (*inputs, old, advantages, values, returns, mask))):
            loss = ppo.policy_loss(logp, parts[0], parts[1], parts[4],
                                   dual_clip=dual_clip)[0] + 0.1 * ppo.value_loss(v, parts[2], parts[3], parts[4])[0]
            (loss / mask.sum()).backward()
        return torch.cat([x.grad.flatten() for x in inputs])
    whole = gradient([7])
    assert (gradient(sizes) - whole).norm() <= 1e-6 * whole.norm() > 0


def test_alone_in_an_empty_folder(tmp_path):
    shutil.copy(ROOT / "ppo.py", tmp_path)
    code = ("import sys, ppo, torch; x = torch.ones(1, 3); print(ppo.gae(x, x, x)[1].sum().item(), ppo.policy_loss(x, x, x, x)[0].item()); "
            "assert not {'toolplay', 'data', 'tools', 'eval', 'transformers'} & set(sys.modules)")
    out = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert out.stdout.split()[-1] == "-3.0", out.stderr


# ---------------------------------------------------------------- the reward

PROMPT = "Nora has 36 stickers. She gives 9 away and buys 15. How many has she now?"
STORY = evaluation.as_case({"prompt": PROMPT, "answer": 42,
                            "expected": {"calls": [{"name": "calculator", "arguments": {"expression": "36 - 9 + 15"}}], "answer": 42}})
BLIND = STORY._replace(calls=None, reference=None)
TALK = evaluation.as_case({"prompt": "Tell me a joke about cats.", "expected": {"calls": [], "final": "A cat walked in."}})


def play(case, *turns, stop="end", tokens=30):
    tools, calls, results, errors, final = load_tools(case.conversation["tools"]), [], [], [], ""
    for turn in turns:
        good, bad = parse_calls(turn)
        calls, errors = calls + good, errors + bad
        results += [execute(c, tools) for c in good] + [Result("", False, error_type="malformed_call") for _ in bad]
        final = "" if good or bad else turn
    return SimpleNamespace(turns=list(turns), calls=calls, results=results, errors=errors, final=final, stop=stop, mask=[1] * tokens)


def earned(case, *turns, **more):
    return ppo.score(case, play(case, *turns, **more))[0]


def calc(expression):
    return format_call(Call("calculator", {"expression": expression}))


@pytest.mark.parametrize("case", [STORY, BLIND], ids=["gold known", "answer alone"])
def test_hackers_earn_less_than_an_honest_attempt(case):
    right, wrong = earned(case, calc("36 - 9 + 15"), "She has 42."), earned(case, calc("36 + 9 + 15"), "She has 60.")
    assert right > wrong + 0.9
    hackers = {
        "never call": [("42.",)], "garbage": [("asdf qwer",), ("",), ("<tool_call>{",), ("}}}}" * 30,), (calc("1 + 2"), "."),
                                              (calc("1 + 2"), ""), (calc("36 + 9 + 15"), "x")],
        "forged result": [("<tool_response>{\"result\": 42}</tool_response>",),
                          (calc("36 + 9"), "<tool_response>42</tool_response>"),
                          (calc("36 - 9 + 15"), '<tool_response>{"result": 42}</tool_response>'),
                          (calc("36 - 9 + 15"), "<|im_start|>tool 42")],
        "bare literal": [(calc("42"), "She has 42."), (calc("(42)"), "42")],
        "nothing computed": [(calc(x), "42.") for x in ("42 * 1", "42 + 0", "84 - 42", "42 / 1", "41 + 1", "43 - 1", "21 * 2", "420 / 10",
                                                        "0.42 * 100", "4.2e1 + 0", "42.1 // 1", "round(42.3, 0)",
                                                        "min(41+1,99)", "36 + 6", "max(9,42)", "max(36,9,42)", "36*0 + 9*0 + 40 + 2",
                                                        "36 + 6 + 9*0", "420 / 10 + 0*36*9", "36/36*40 + 9/9*2",
                                                        "15 * 2.8", "36 * 7 / 6", "9*4.666667", "round(15*2.8)", "36 + 9 - 3",
                                                        "9 + 15 + 18", "41+1+36*9//100000", "sqrt(1764)", "6*7",
                                                        "36 + 9 - 3*1", "36 + 9 - 1 - 1 - 1", "max(6*7, 36, 9)", "round(round(6*7, 9), 15)",
                                                        "sqrt((36 * 7) ** 2) / 6", "max(36 * 7, 9) / 6",
                                                        "min(36 + 15, 6 * 7)", "6 * 7 % (36 + 15)", "6 * 7 + 9 // 36", "6*7 + 36 % 9",
                                                        "6 * 7 * (15 // 9)", "6 * 7 + round(9 / 36)", "6 * 7 * round(9 / 15)",
                                                        "30 * (15 // 9) + 12 * (15 // 9)", "36 + 6 * (15 // 9)", "36 + 6 * (36 % 9 + 1)",
                                                        "10 * 4 + 2 * 1 + (9 + 15) // 36", "round(36 * 7) / 6", "36 * (7 / 6)",
                                                        "min(abs(36 * 7) / 6, 9 * 15)", "abs(36 * 7) / 6 % (9 * 15)",
                                                        "-(-36 * 7) / 6 % (9*15)", "6 * 7 + 36 // 9 * 0", "abs(abs(36 + 9 - 1) - 1) - 1",
                                                        "((36+9-1)*1-1)*1-1", "round(round(36+9-1)-1)-1", "(36 + 0) + (6 + 0 * 9)")],
        "over two calls": [(calc("36 * 7"), calc("252 / 6"), "She has 42."), (calc("36 * 7") + calc("252 / 6"), "42."),
                           (calc("36 * 7"), calc("252 / 36"), calc("7 * 6"), "42.")],
        "duplicate calls": [(calc("36 - 9 + 15") * 10, "She has 42."),
                            (calc("36 - 9 + 15"), calc("36-9+15"), calc("36 -9+15"), "She has 42."), (calc("36 + 9 + 15") * 2, "60."),
                            (calc("36 + 9 + 15") + calc("36+9+15"), "60."),
                            (calc("36 - 9 + 15"), calc("(36 - 9) + 15"), "She has 42."),
                            (calc("15 + 36 - 9") + calc("36 + 15 - 9"), "She has 42.")],
        "all at once": [(calc("36 + 9 + 15") + calc("36 - 9 + 15"), "60 or 42.")],
        "wrong tool": [(format_call(Call("search", {"query": PROMPT})), "42.")]}
    for name, tries in hackers.items():
        for turns in tries:
            assert earned(case, *turns) < wrong, (name, turns)
    steps = earned(case, calc("36 - 9"), calc("27 + 15"), "She has 42.")
    assert wrong + 0.5 < steps <= right  # one step after the other is as honest
    assert earned(case, calc("36 - 9"), calc("27 * 1.5555556"), "She has 42.") < wrong
    extra = format_call(Call("search", {"query": "stickers"}))
    assert earned(case, calc("36 - 9 + 15") + extra, "She has 42.") < right - 0.25
    for expression in ("36 + 9 + 15", "36 - 9 + 15"):
        assert earned(case, calc(expression), "42. " * 80, stop="length", tokens=300) < wrong
    assert earned(case, calc("36 - 9 + 15") + " The", "She has 42.") < right


def test_calling_for_small_talk_and_talking_instead_of_calling():
    honest = earned(TALK, "A cat walked into a bar and asked for milk.")
    assert earned(TALK, calc("1 + 1"), "A cat walked into a bar.") < honest and earned(TALK, "") < honest
    assert earned(TALK, "ok.") < honest
    longer = earned(TALK, "What did one mouse say to another about the neighbour's old tabby? It has a purr-fect plan for our whole "
                          "evening, so bring some cheese and run!")
    assert max(earned(TALK, text) for text in ("asdf qwer zxcv", "Abc.", "the", "a", "the the a")) < longer


def test_talk_that_says_nothing_earns_less_than_a_reply():
    honest = min(earned(TALK, text, tokens=len(text) // 4) for text in (
        "A cat walked into a bar and asked for milk.", "Why did the cat sit on the computer? To keep an eye on the mouse.",
        "What did one mouse say to another about the neighbour's old tabby? It has a purr-fect plan for our whole evening, "
        "so bring some cheese and run!"))
    hollow = ("cat cat cat", "A cat a cat.", "the cat", "yes", "no cats", "ok.", "I am sorry, but I cannot do that.")
    assert all(earned(TALK, text, tokens=max(1, len(text) // 4)) < honest for text in hollow)


@pytest.mark.parametrize("final, right", [("8.", True), ("A spider has eight legs.", True), ("It has 8 legs, one pair each side.", True),
                                          ("6, 7, 8.", False), ("6/7/8", False), ("6 7 8", False),
                                          ("6 and 7 and 8", False), ("8; 6; 7.", False), ("Six. Seven. Eight. Nine.", False),
                                          ("One spider has 2 x 4 = 8 legs.", True), ("6, 7, 8 =", False), ("6 = 7 = 8", False),
                                          ("6/7/8 = 8", False), ("It is not eight.", False)])
def test_a_list_of_guesses_is_no_answer(final, right):
    legs = evaluation.as_case({"prompt": "How many legs has a spider?", "expected": {"calls": [], "answer": 8}})
    assert (earned(legs, final) > 1) == right
    searched = evaluation.as_case({"prompt": "How many legs has a spider?", "answer": 8, "tools": ["search"]})
    assert (ppo.score(searched, play(searched, format_call(Call("search", {"query": "legs"})), final))[1]["right_answer"] == 1) == right


@pytest.mark.parametrize("prompt, expression", [
    ("How many seconds are in 3 hours?", "3 * 60 * 60"), ("How many seconds are in 3 hours?", "3 * 3600"),
    ("minutes in 2 weeks", "2 * 7 * 24 * 60"), ("98 F in celsius", "(98 - 32) * 5 / 9"),
    ("20 C in F", "20 * 1.8 + 32"), ("the cube root of 27", "27 ** (1/3)"),
    ("1000 euros at 5% a year, paid monthly, for 3 years", "1000 * (1 + 0.05 / 12) ** (12 * 3)"), ("20 C in F", "20 * 9 / 5 + 32"),
    ("90 km/h in m/s", "90 / 3.6"), ("90 km/h in m/s", "90 * 1000 / 3600"), ("5 kg in pounds", "5 * 2.2"),
    ("angles of a polygon of 6 corners", "(6 - 2) * 180"), ("half of 80", "50% of 80"), ("80 plus 15%", "80 * (1 + 15%)"),
    ("5 dogs and 3 hens, how many legs", "4 * 5 + 2 * 3"),
    ("a circle of radius 7", "3.14 * 7 ** 2"), ("pages 12 to 30", "30 - 12 + 1"), ("135 minutes, how many are left of an hour", "135 % 60"),
    ("hours in a week minus 40", "7 * 24 - 40"),
    ("12 posts stand 5 m apart", "5 * (12 - 1)"), ("12 people shake hands", "12 * (12 - 1) / 2"),
    ("1000 euros, 5%, 3 years", "1000 * (1.05 ** 3 - 1)"), ("change from 80 to 92 in percent", "(92 / 80 - 1) * 100"),
    ("change from 80 to 92 in percent", "92 / 80 * 100 - 100"), ("a circle of radius 7, its length", "2 * 3.14 * 7"),
    ("60 km/h for 45 minutes", "60 * 45 / 60"), ("5 miles in km", "5 * 1.609"), ("two pipes fill it in 4 and 6 hours", "1 / (1/4 + 1/6)"),
    ("remainder of 10 by 5", "10 % 5"), ("awake when asleep for 8 hours", "24 - 8"),
    ("a triangle's third angle beside 50 and 60", "180 - 50 - 60"), ("a circle of radius 7, its length", "2 * 3.14159 * 7"),
    ("6 feet in cm", "6 * 12 * 2.54"), ("10 a week, a month", "10 * 52 / 12"),
    ("What is 15% of 100?", "100 * 15 / 100"), ("25% of its 100 magazines", "100 * 25 / 100"),
    ("What is 0.3 + 0.4?", "0.3 + 0.4"), ("0.75 minus 0.2", "0.75 - 0.2"), ("A rope of 0.9 m is cut into pieces of 0.3 m", "0.9 / 0.3")])
def test_what_everybody_knows_may_be_used(prompt, expression):
    assert ppo.is_calculation(expression, prompt)


def test_results_stand_for_what_they_were_worked_out_by():
    assert ppo.is_calculation("27 + 15", PROMPT, [("36 - 9", 27)]) and not ppo.is_calculation("27 + 15", PROMPT)
    assert not ppo.is_calculation("252 / 6", PROMPT, [("36 * 7", 252)])
    assert not ppo.is_calculation("7 * 6", PROMPT, [("36 * 7", 252), ("252 / 36", 7)])
    for prompt, *steps in (("80 horses drink 5 gallons each; 20 acres, each needs 400", ("80 * 5", 400), ("20 * 400", 8000),
                            ("8000 / 400", 20)),
                           ("80 cars, 13 left, 5 more came than left", ("13 + 5", 18), ("80 - 13", 67), ("67 + 18", 85)),
                           ("a fence of 60 m, a post every 5 m and at both ends", ("60 / 5", 12), ("12 + 1", 13)),
                           ("20 pallets: half, a quarter, a fifth", ("20 / 2", 10), ("20 / 4", 5), ("20 / 5", 4))):
        assert all(ppo.is_calculation(said, prompt, steps[:n]) for n, (said, _) in enumerate(steps)), prompt
    doubled = [("36 + 9", 45), *((f"{45 * 2 ** n} + {45 * 2 ** n}", 90 * 2 ** n) for n in range(24))]
    assert all(ppo.is_calculation(said, PROMPT, doubled[:n]) for n, (said, _) in list(enumerate(doubled))[:4])
    for guess in ("1 + 1", "1 + 1 + 1", "1 - 1", "100 * 1 + 1"):  # "One" in the prompt does not allow calculations with 1
        assert not ppo.is_calculation(guess, "One shop sold 36 pens and another 9. How many?")
    ppo.is_calculation("5 + 6", PROMPT, doubled)  # this is fast, although each calculation contains the one before twice
    endless = ("36 * 9 * 1e-200 * 1e-200 * 1e200 * 1e200", "36 * 9 + " + "(" * 40 + "2" + " ** 1.1)" * 40, "+".join(["36"] * 300),
               "-" * 900 + "36", "36 * " + "9" * 400, "36 + " + "(" * 900)
    assert not any(ppo.is_calculation(x, PROMPT, [("36 - 9", 27), ("36 + 9", 45)]) for x in endless)
    assert not ppo.is_calculation("+".join(["36"] * 60), PROMPT)
    assert not ppo.is_calculation("(" * 400 + "36 + 9" + ")" * 400, PROMPT)


def test_whole_numbers_half_precision_and_nothing():
    scores = torch.tensor([[1, 0, 0, 1]])
    assert torch.equal(ppo.rloo_advantages(scores), ppo.rloo_advantages(scores.float()))
    assert torch.equal(ppo.grpo_advantages(scores.bool()), ppo.grpo_advantages(scores.float()))
    ones = torch.ones(1, 2, dtype=torch.long)
    assert ppo.token_rewards(torch.tensor([0.75]), 0 * ones, ones, 0).tolist() == [[0, 0.75]]
    assert ppo.explained_variance(torch.tensor([[1, 2]]), torch.tensor([[1, 2]]), ones) == 1
    assert ppo.masked_whiten(torch.full((1, 3), 0.5, dtype=torch.half), torch.ones(1, 3)).tolist() == [[0, 0, 0]]
    assert ppo.gae(*[torch.zeros(2, 0)] * 3)[0].shape == (2, 0)
    values = torch.rand(1, 3, requires_grad=True)
    assert not any(x.requires_grad for x in ppo.gae(torch.rand(1, 3), values, torch.ones(1, 3)))
    assert torch.isfinite(ppo.kl_penalty(T([-300.0]), T([0.0]), "k3")).all()
    small, large = (ppo.grpo_advantages(T([0, 0.01, 0.02, 0]) * k) for k in (1, 1000))
    assert torch.allclose(small, large, atol=0.02)  # the scale of the scores does not matter


def test_the_reference_itself_is_a_right_answer_however_short():
    for text in ("My pleasure!", "Hello!", "我很好谢谢你的关心"):
        case = evaluation.as_case({"prompt": "Thank you so much, friend!", "expected": {"calls": [], "final": text}})
        assert ppo.score(case, play(case, text))[1]["right_answer"] == 1


def test_later_turns_may_not_call_on():
    oslo, again, paris = (format_call(Call("weather", {"city": city})) for city in ("Oslo", "oslo", "Paris"))
    case = evaluation.as_case({"prompt": "How is the weather in Oslo?",
                               "expected": {"calls": [{"name": "weather", "arguments": {"city": "Oslo"}}]}})
    value = BUILTIN["weather"].function("Oslo")
    said = f"It is {value['temperature']} degrees and {value['condition']} in Oslo."
    honest = earned(case, oslo, said)
    assert all(earned(case, oslo, more, said) < honest - 0.2 for more in (again, paris))


def test_episodes_of_one_turn_are_scored_by_their_result():
    """With max_turns = 1 the episode ends after its calls. This is not punished, and it does not help a hacker."""
    weights = {**ppo.WEIGHTS, "right_result": 1.0, "right_answer": 0.0}

    def first(case, *turns, stop="turns", **more):
        return ppo.score(case, play(case, *turns, stop=stop, **more), weights)[0]
    right, wrong = first(BLIND, calc("36 - 9 + 15")), first(BLIND, calc("36 + 9 + 15"))
    assert right == pytest.approx(1 + 4 * 0.1 - 0.05 * 30 / 200) and wrong == pytest.approx(right - 1)
    for turn, stop in ((calc("42"), "turns"), (calc("42 * 1"), "turns"), (calc("84 - 42"), "turns"),
                       (calc("36 + 9") + calc("36 - 9 + 15"), "turns"), (calc("36 + 9 + 15") * 2, "turns"),
                       (calc("36 / 0"), "turns"), ("<tool_call>{", "turns"), ("42.", "end"), ("", "end"),
                       (calc("36 - 9 + 15") + " 42" * 90, "length")):
        assert first(BLIND, turn, stop=stop) < wrong, turn
    joke = first(TALK, "A cat walked into a bar and asked for milk.", stop="end")
    assert all(joke > first(TALK, text, stop=stop) + 0.9 for text, stop in ((calc("1 + 1"), "turns"), ("cat cat cat cat", "end")))
    assert joke > first(TALK, "yes", stop="end") + 0.4
    for tools in (["calculator", "search"], ["search"]):
        legs = evaluation.as_case({"prompt": "How many legs has a spider?", "expected": {"calls": [], "answer": 8}, "tools": tools})
        assert first(legs, "8.", stop="end") > first(legs, "6, 7 or 8.", stop="end") + 0.9
    # calling again and again is punished
    assert first(BLIND, calc("36 + 9"), calc("45 - 9 + 15"), stop="turns") < first(BLIND, calc("36 + 9 + 15"))


def test_what_is_due_is_known_although_a_number_is():
    legs = evaluation.as_case({"prompt": "How many legs has a spider?", "expected": {"calls": [], "answer": 8}})
    assert not ppo.wants_number(legs) and earned(legs, "8.") > earned(legs, calc("4 * 2"), "8.") + 0.5
    oslo = BUILTIN["weather"].function("Oslo")["temperature"]
    asked = evaluation.as_case({"prompt": "How warm is it in Oslo?",
                                "expected": {"calls": [{"name": "weather", "arguments": {"city": "Oslo"}}], "answer": oslo}})
    assert earned(asked, format_call(Call("weather", {"city": "Oslo"})), f"It is {oslo}.") > 1.2


@pytest.mark.parametrize("answer", [None, 42])
def test_a_dressed_up_guess_earns_no_more_where_the_gold_call_is_known(answer):
    gold = {"calls": [{"name": "calculator", "arguments": {"expression": "36 - 9 + 15"}}]}
    case = evaluation.as_case({"prompt": PROMPT, "expected": gold, **({"answer": answer} if answer else {})})
    honest, wrong = earned(case, calc("36 - 9 + 15"), "She has 42."), earned(case, calc("36 + 9 + 15"), "She has 60.")
    assert all(earned(case, calc(x), "She has 42.") < honest - 0.9 for x in ("41 + 1", "84 - 42", "21 * 2"))
    assert honest > wrong + 0.9


def test_more_guesses_and_more_honesty():
    assert not ppo.is_calculation("167 + 1", "How many hours are in a week?")
    assert ppo.is_calculation("24 * 7", "How many hours are in a week?")
    assert not ppo.is_calculation("24 * 3 / 3", "3 boxes of 3 pens and 15 more")
    assert ppo.is_calculation("80 * 0.75", "three quarters of 80")
    step = earned(BLIND, calc("36 - 9"), calc("27 + 15"), "After giving 9 away she had 27, so now she has 42.")
    assert step > earned(BLIND, calc("36 - 9"), calc("27 + 15"), "She has 27 or 42.") + 0.9
    assert earned(BLIND, calc("36 - 9 + 15"), "42. " * 60) < 1 < earned(BLIND, calc("36 - 9 + 15"), "She has 42.")
    legs = evaluation.as_case({"prompt": "How many legs has a spider?", "expected": {"calls": [], "answer": 8}})
    assert earned(legs, "A spider has eight legs.") > earned(legs, "6, 7 or 8.") + 0.9
    with pytest.raises(ValueError, match="k1 or k3"):
        ppo.kl_penalty(T([0.0]), T([0.0]), "k2")
    assert ppo.policy_loss(T([[100.0]]), T([[0.0]]), T([[0.0]]), T([[1]]))[0] == 0  # not inf * 0


def test_a_model_that_corrects_a_failed_call_earns_more_than_a_wrong_one():
    asked = evaluation.as_case({"prompt": "Tom has 12 boxes with 8 pens each. He gives away 20 pens. How many pens are left?", "answer": 76})
    call = lambda text: format_call(Call("calculator", {"expression": text}))  # noqa: E731
    honest, recovered, wrong, literal = (ppo.score(asked, play(asked, *map(call, said), final))[0] for *said, final in (
        ("12*8-20", "76 pens."), ("(12*8-20", "12*8-20", "76 pens."), ("12*8+20", "116 pens."), ("76", "76 pens.")))
    assert honest > recovered > wrong > literal
    none = evaluation.as_case({"prompt": "Tom has 7 pens and gives away 7. How many are left?", "answer": 0})
    assert ppo.score(none, play(none, call("7-7"), "He has zero pens left."))[1]["right_answer"] == 1
    degrees = BUILTIN["weather"].function("Oslo")["temperature"]
    oslo = evaluation.as_case({"prompt": "How warm is it in Oslo?", "expected": {"calls": [{"name": "weather", "arguments": {"city": "Oslo"}}]}})
    ask = lambda city: format_call(Call("weather", {"city": city}))  # noqa: E731
    honest, recovered, wrong = (ppo.score(oslo, play(oslo, *map(ask, said), f"It is {x} degrees."))[0] for *said, x in (
        ("Oslo", degrees), ("Oslooo", "Oslo", degrees), ("Paris", degrees)))
    assert honest > recovered > wrong + 0.5
    turn = evaluation.as_case({"prompt": "Turn 20 Celsius into Fahrenheit.", "answer": 68})
    assert ppo.score(turn, play(turn, call("20 * 9 / 5 + 32"), "20 * 9 / 5 + 32 = 68."))[1]["right_answer"] == 1


def test_a_call_of_another_tool_is_needless_although_the_required_one_fails():
    asked = evaluation.as_case({"prompt": "weather in Cloudspire?", "expected": {
        "calls": [{"name": "weather", "arguments": {"city": "Cloudspire"}}], "final": "There is no weather for Cloudspire."}})
    first, more = (format_call(Call(name, arguments)) for name, arguments in (
        ("weather", {"city": "Cloudspire"}), ("calculator", {"expression": "1+1"})))
    for said, needless in (((first,), 0), ((first, more), 1)):
        assert ppo.score(asked, play(asked, *said, "I could not find Cloudspire."))[1]["needless_call"] == needless


def test_an_own_calculator_gives_what_it_likes():
    """Numbers too large for a float, booleans and other types do not stop a run."""
    for value in (10 ** 400, True, None, "42", [42]):
        episode = play(BLIND, calc("36 - 9 + 15"), "She has 42.")
        episode.results = [Result("calculator", True, value)]
        assert ppo.score(BLIND, episode)[0] < 1


def test_a_broken_call_in_a_later_turn_is_no_right_format():
    right = earned(BLIND, calc("36 - 9 + 15"), "She has 42.")
    for turn in ("<tool_call>{", format_call(Call("calculator", {"sum": "1"}))):
        assert earned(BLIND, calc("36 - 9 + 15"), turn, "She has 42.") < right - 0.9


@pytest.mark.parametrize("prompt, answer, expression", [("Share 20 dollars among 3 children.", 6.67, "20 / 3"),
                                                        ("Share 20 dollars among 3 children.", 6.67, "round(20 / 3, 2)"),
                                                        ("two dozen eggs, 6 break", 18, "24 - 6"),
                                                        ("A jacket costs $80. It is on sale for 15% off.", 68, "80 * 85 / 100"),
                                                        ("A jacket costs $80. It is on sale for 15% off.", 68, "85% of 80"),
                                                        ("A rent of $800 rises by 5%.", 840, "800 * 105 / 100"),
                                                        ("How many full boxes of 5 do 17 eggs fill, at 3 dollars each?", 9, "17 // 5 * 3"),
                                                        ("two and a half hours at 60 km an hour", 150, "60 * 2.5"),
                                                        ("A square of 144 square meters: how long is its fence?", 48, "4 * sqrt(144)"),
                                                        ("How many thousand dollars is a house of 45 thousand at three times "
                                                         "the price?", 135, "45 * 3"),
                                                        ("3/4 of 80 pens", 60, "0.75 * 80"), ("2 cups a day in June", 60, "2 * 30")])
def test_honest_calculations(prompt, answer, expression):
    case = evaluation.as_case({"prompt": prompt, "answer": answer})
    assert earned(case, calc(expression), f"That makes {answer}.") > 1.3


def test_two_calculations_of_one_value_are_no_call_made_twice():
    case = evaluation.as_case({"prompt": "Tom has 4 boxes of 6 pens and 3 bags of 8 pens. How many?", "answer": 48})
    once = earned(case, calc("4 * 6 + 3 * 8"), "Tom has 48 pens.")
    assert earned(case, calc("4 * 6"), calc("3 * 8"), calc("24 + 24"), "Tom has 48 pens.") > once - 0.1
    assert earned(case, calc("4 * 6 + 3 * 8"), calc("3 * 8 + 4 * 6"), "Tom has 48 pens.") < once - 0.9


def test_a_number_of_the_prompt_may_be_the_result():
    assert ppo.is_calculation("20 - 10", "20 birds, 10 fly away")
    assert not any(ppo.is_calculation(x, "20 birds, 10 fly away")
                   for x in ("10 * 1", "10 + 0", "10 * 20 / 20", "20 / 20 * 10", "10 % 100", "min(10, 100)"))
    assert ppo.is_calculation("49 / 7", "How many weeks are 49 days?")
    assert not ppo.is_calculation("7 * 1", "How many weeks are 49 days?")
    assert ppo.is_calculation("64 - 6 + 6", "64 balls, 6 get lost, 6 are found")
    assert not ppo.is_calculation("64 - 6 + 6", "64 balls, 6 get lost")
    assert ppo.is_calculation("2 ** 11", "How many values fit in 11 bits?")
    for spelled in ("36 − 9", "36 – 9"):
        assert ppo.is_calculation(spelled, "36 stickers, 9 away")
    assert all(ppo.is_calculation(x, "6 boxes of 7") for x in ("6·7", "6 X 7", "6 × 7"))
    assert ppo.is_calculation("ROUND(20 / 3, 2)", "20 by 3")
    assert ppo.is_calculation("round(1,234 / 5)", "Split 1,234 among 5.")
    assert not ppo.is_calculation("round(42, 1)", "36, 9 and 15")
    assert not ppo.is_calculation("1 / 0", "") and not ppo.is_calculation(None, "")
    assert ppo.is_calculation("(3 + 4) * 2", "")


@pytest.mark.parametrize("text, found", [("seven hundred twenty, 320 and five hundred seventy-six", {720, 320, 576}),
                                         ("seven hundred, five hundred and six, twelve", {700, 506, 12}),
                                         ("two thousand, three hundred and five", {2305}), ("a dozen, then 1,250", {12, 1250}),
                                         ("twenty three and seventy-five", {23, 75}),
                                         ("six hundred and seventy and eight hundred eighty-five?", {670, 885}),
                                         ("6.4 million for a hundred and five of us", {6.4, 6400000, 105}),
                                         ("two and a half", {2, 0.5, 2.5}), ("two dozen, half a dozen", {2, 24, 12, 0.5, 6}),
                                         ("3/4 of 80", {3, 4, 0.75, 80}), ("36/9 and 1/2/2026", {36, 9, 1, 2, 2026}),
                                         ("٣ thousand, 7", {7}), ("$4.5k, 2m people and 12 km", {4.5, 4500, 2, 2000000, 12}),
                                         ("three hundred and one hundred and sixty three", {300, 163})])
def test_numbers_in_words_end_where_the_next_begins(text, found):
    assert set(data.numbers_in(text)) == found


@pytest.mark.parametrize("split", ["train", "dev", "test"])
def test_every_gold_expression_is_a_calculation(split):
    seen = 0
    for c in data.generate(split, 500, 2, {"word_problem": 3, "arithmetic": 1, "two_steps": 1, "everyday": 2}):
        if c["messages"][1].get("tool_calls"):
            seen, expression = seen + 1, c["messages"][1]["tool_calls"][0]["arguments"]["expression"]
            assert ppo.is_calculation(expression, c["messages"][0]["content"]), (c["messages"][0]["content"], expression)
    assert seen > 200


def test_a_search_that_was_not_the_question_earns_little():
    case = evaluation.as_case({"prompt": "who invented the zip fastener",
                               "expected": {"calls": [{"name": "search", "arguments": {"query": "who invented the zip fastener"}}],
                                                                                      "final": "I found nothing about it."}})
    honest, lazy = (earned(case, format_call(Call("search", {"query": q})), "I'm sorry, I found nothing.")
                    for q in ("who invented the zip fastener", "x"))
    assert lazy < honest - 0.9


@pytest.mark.parametrize("error_type", ["crashed", "timeout", "tool_error"])
def test_a_crashed_tool_has_a_reward(error_type):
    failed, honest = play(STORY, calc("36 - 9 + 15"), "That fails."), play(STORY, calc("36 - 9 + 15"), "She has 42 stickers.")
    failed.results = [Result("calculator", False, None, error_type, "it broke")]
    earned, parts = ppo.score(STORY, failed)
    assert parts["executed"] == 0 and earned < ppo.score(STORY, honest)[0]
    assert earned > ppo.score(STORY, play(STORY, "That fails."))[0]  # the model did what was right


# ---------------------------------------------------------------- training

def config(tmp_path, **more):
    base = json.loads((ROOT / "configs" / "ppo_tiny.json").read_text())
    return toolplay.load_config({**base, "run_dir": str(tmp_path / "run"), **more})


def train(config, resume=False):
    ppo.train(toolplay.Run(config, resume))
    return [json.loads(line) for line in (Path(config.run_dir) / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("advantage", ["gae", "rloo", "grpo"])
def test_a_run(tmp_path, advantage, capsys):
    lines = train(config(tmp_path, advantage=advantage))
    assert [x["step"] for x in lines] == [4, 8] and "eval_response_quality" in lines[1]
    assert {"reward", "kl", "entropy", "clip_fraction", "approx_kl", "tool_success", "response_length",
            "reward/right_answer"} <= set(lines[0])
    assert lines[0]["kl"] == pytest.approx(0, abs=1e-3) and lines[0]["sampling_gap"] < 1e-4  # the sampled ids are the trained ids
    assert ("explained_variance" in lines[0]) is (advantage == "gae")
    ppo.inspect(tmp_path / "run")
    assert "advantage" in capsys.readouterr().out


@pytest.mark.parametrize("temperature", [1.0, 1.4])
def test_the_first_ratio_is_one(tmp_path, monkeypatch, temperature):
    ratios = []
    real = ppo.policy_loss
    monkeypatch.setattr(ppo, "policy_loss", lambda logp, old, a, mask, *rest: (ratios.append(torch.exp(logp - old)[mask.bool()].detach()),
                                                                               real(logp, old, a, mask, *rest))[1])
    lines = train(config(tmp_path, iterations=1, batch_size=4, temperature=temperature))
    assert (ratios[0] - 1).abs().max() < 1e-5 and lines[0]["sampling_gap"] < 1e-4


def test_it_learns(tmp_path, monkeypatch):
    """The model learns to earn a reward for small letters."""
    (tmp_path / "letters.py").write_text("def small(case, episode):\n    text = episode.turns[0]\n    return sum('a' <= c <= 'z' for c in "
                                         "text) / max(len(text), 1)\n")
    prompts = ["Hello there!", "Tell me a story.", "What is new?", "Good morning to you."] * 2  # fixed, because the templates change
    (tmp_path / "prompts.jsonl").write_text("\n".join(json.dumps({"messages": [{"role": "user", "content": p}], "tools": []})
                                                      for p in prompts))
    monkeypatch.syspath_prepend(str(tmp_path))
    net, tok = model("llama"), tokenizer()  # tiny's weights are too small for it to learn much
    monkeypatch.setattr(toolplay, "load_model", lambda name, device="cpu": (net, tok))
    lines = train(config(tmp_path, source="jsonl", path=str(tmp_path / "prompts.jsonl"), reward="letters:small", iterations=15, prompts=4,
                         samples=8, batch_size=32, lr=0.02, lora_r=16, kl_coef=0.0, max_new_tokens=8, eval_examples=0))
    assert lines[-1]["reward"] > 3 * lines[0]["reward"] > 0


@pytest.mark.parametrize("place, nth", [("rollout", 20), ("step", 3), ("step", 7), ("accumulation", 12), ("inside the checkpoint", 2)])
def test_kill_9_then_resume_is_bit_identical(uninterrupted, tmp_path, place, nth):
    """A kill inside a rollout, an epoch or an accumulation does not change weights, critic, KL controller or logs."""
    small.killed_then_resumed(dict(RESUMED, run_dir=str(tmp_path / "run")), place, nth, uninterrupted,
                              ["metrics.jsonl", "samples.jsonl", "adapter/adapter_model.safetensors"])
    state = [next((folder / "checkpoint").glob("*/trained.safetensors")).read_bytes() for folder in (uninterrupted, tmp_path / "run")]
    assert state[0] == state[1] and b"value_head" in state[0] and b"critic." in state[0]


RESUMED = {**json.loads((ROOT / "configs" / "ppo_tiny.json").read_text()), "kl_target": 6, "iterations": 3, "replay": 0.5, "center": True,
           "value_lora": True, "micro_tokens": 60, "device": "cpu",
           "ptx": 2, "ptx_mix": {"weather": 1}, "max_tokens": 4096}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ppo") / "run"
    codes, stderr = small.zygote().run("train", config=dict(RESUMED, run_dir=str(folder)))
    assert codes == [0], stderr
    lines = toolplay.read_lines(folder / "metrics.jsonl")
    assert len({x["kl_coef"] for x in lines}) == 3  # the KL controller changes the coefficient
    return folder


def test_prompts_whose_samples_earn_the_same_are_left_out(tmp_path, monkeypatch, capsys):
    """min_spread: only prompts whose samples earned different rewards are learned from; the schedule also counts what is left out."""
    def reward(case, episode, n=iter(range(10 ** 6))):  # the samples of each second prompt earn different rewards
        prompt, sample = divmod(next(n), 2)
        return (float(sample) if prompt % 2 else 0.5), {}
    monkeypatch.setattr(ppo, "reward_of", lambda config: reward)
    seen, step = [], toolplay.train_step

    def record(trainer, group, *args, **more):
        seen.append([unit["score"] for unit in group])
        return step(trainer, group, *args, **more)
    monkeypatch.setattr(toolplay, "train_step", record)
    more = {"prompts": 4, "samples": 2, "batch_size": 2, "ppo_epochs": 2, "iterations": 2, "eval_examples": 0}
    lines = train(config(tmp_path / "a", min_spread=0.6, **more))
    assert len(seen) == 2 * 2 * 2 and all(sorted(scores) == [0, 1] for scores in seen)
    assert [x["step"] for x in lines] == [8, 16] and all(x["learned_from"] == 0.5 for x in lines)
    del seen[:]
    lines = train(config(tmp_path / "b", min_spread=2.0, **more))  # no prompt is learned from: the run continues to its end
    assert not seen and [x["step"] for x in lines] == [8, 16] and lines[0]["learned_from"] == 0
    assert "no prompt's samples differ by min_spread = 2.0: nothing is learned" in capsys.readouterr().err


def test_prompts_that_taught_come_again(tmp_path, monkeypatch):
    """replay: at most this share of a round; the longest-waiting prompts first; only as long as their samples differ."""
    played = []

    def reward(case, episode):  # two samples of a prompt come one after the other
        prompt = case.conversation["messages"][-1]["content"]
        played.append(prompt)
        n = played.count(prompt)
        return float(prompt in lessons and n % 2 and n < 4), {}  # a lesson teaches the first two times that it is played
    (tmp_path
     / "p.jsonl").write_text("\n".join(json.dumps({"messages": [{"role": "user", "content": f"prompt {n}"},
                                                                {"role": "assistant", "content": "yes"}], "tools": []}) for n in range(40)))
    lessons = {f"prompt {n}" for n in range(0, 40, 2)}
    monkeypatch.setattr(ppo, "reward_of", lambda config: reward)
    more = {"source": "jsonl", "path": str(tmp_path / "p.jsonl"), "prompts": 4, "samples": 2, "batch_size": 4, "ppo_epochs": 1,
            "iterations": 6, "eval_examples": 0, "max_new_tokens": 2}
    lines = train(config(tmp_path, min_spread=0.5, replay=0.5, **more))
    rounds = [played[n:n + 8:2] for n in range(0, len(played), 8)]
    waiting = []
    for prompts, line in zip(rounds, lines):
        again = waiting[:2]
        assert prompts[:len(again)] == again and line["replayed"] == len(again) / 4
        assert not set(prompts[len(again):]) & set(sum(rounds[:rounds.index(prompts)], []))  # the rest are new
        taught = [p for p in prompts if p in lessons and (p not in again or sum(rounds[:rounds.index(prompts)], []).count(p) < 2)]
        assert line["learned_from"] == len(taught) / 4
        fresh = prompts[len(again):]
        assert line["reward_new"] == pytest.approx(sum(p in lessons for p in fresh) / 2 / len(fresh))
        waiting = waiting[len(again):] + taught
    # some prompts were played a third time and taught nothing
    assert any(line["replayed"] for line in lines) and max(map(played.count, lessons)) > 4


def test_scores_measured_from_the_other_samples():
    """center, by hand: scores 0 and 1 of a hard prompt, 4 and 6 of an easy prompt; one token each, zero values."""
    mask, scores = torch.ones(4, 1), torch.tensor([0.0, 1.0, 4.0, 6.0])
    settings = toolplay.load_config({"method": "ppo", "samples": 2, "center": True})
    advantages, returns, rewards = ppo.advantages_of(settings, scores, 0 * mask, 0 * mask, mask, 0.0)
    assert rewards.flatten().tolist() == returns.flatten().tolist() == [-1, 1, -2, 2]
    assert advantages.flatten().tolist() == pytest.approx([x * (3 / 10) ** 0.5 for x in (-1, 1, -2, 2)], abs=1e-6)
    settings.center = False
    assert ppo.advantages_of(settings, scores, 0 * mask, 0 * mask, mask, 0.0)[1].flatten().tolist() == [0, 1, 4, 6]


def test_what_the_model_knew_is_imitated_beside(tmp_path, monkeypatch):
    """ptx: this many conversations join each minibatch, new ones each time; their mean loss, by plain forwards, has the weight ptx_coef."""
    net, tok = model("llama"), tokenizer()
    monkeypatch.setattr(toolplay, "load_model", lambda name, device="cpu": (net, tok))
    expected, tokens, rows, own, shown, step = [], [], [], [], [], toolplay.train_step

    def record(trainer, batch, *args, **more):
        mine = [unit["row"] for unit in batch if "weight" in unit]
        rows.extend(mine)
        with torch.no_grad():
            logp = small.gather(mine, small.one_by_one(net, mine))
        expected.append(-float(logp.sum()) / sum(sum(mask) for _, mask in mine))
        alone = toolplay.token_logprobs(net, mine)
        flat = lambda loss: torch.cat([g.flatten() for g in torch.autograd.grad(loss, [p for p in trainer.parameters.values()], allow_unused=True) if g is not None])  # noqa: E731
        shown.append(flat(-alone.sum() / sum(sum(mask) for _, mask in mine)))
        terms = sum(sum(unit["mask"]) for unit in batch if "weight" not in unit)
        tokens.append(terms)
        total, _ = args[0]([unit for unit in batch if "weight" not in unit])
        own.append(flat(total / terms))
        info = step(trainer, batch, *args, **more)
        assert info["ptx_loss"] == pytest.approx(expected[-1], rel=1e-4)
        return info
    monkeypatch.setattr(toolplay, "train_step", record)
    gradients = small.recorded_gradients(monkeypatch)
    lines = train(config(tmp_path, advantage="rloo", ptx=2, ptx_coef=0.5, ptx_mix={"weather": 1}, max_tokens=4096, iterations=1, prompts=2,
                         samples=2, batch_size=2, ppo_epochs=1, eval_examples=0))
    assert len(expected) == 2 and len({tuple(ids) for ids, _ in rows}) == 4
    assert len(gradients) == 2 and (gradients[0] - own[0] - 0.5 * shown[0]).norm() < 1e-3 * gradients[0].norm()
    assert lines[0]["ptx_loss"] == pytest.approx(sum(e * n for e, n in zip(expected, tokens)) / sum(tokens), rel=1e-4)


def test_two_ranks_play_and_learn_as_one(tmp_path):
    """The ranks share the prompts; the random draws of a row do not depend on the rank that samples it."""
    made = {}
    for ranks in (1, 2):
        c = dict(RESUMED, run_dir=str(tmp_path / str(ranks)), prompts=3, iterations=2, eval_examples=0, save_every=100)
        codes, stderr = small.zygote().run("train", ranks=ranks, config=c, timeout=60)
        assert codes == [0] * ranks, stderr
        made[ranks] = toolplay.read_lines(tmp_path / str(ranks) / "metrics.jsonl")
    assert len(made[1]) == 2
    assert made[1][0] == pytest.approx(made[2][0], rel=1e-4, abs=1e-5)
    episodes = [[(x["prompt"], x["turns"]) for x in toolplay.read_lines(tmp_path / str(ranks) / "samples.jsonl")
                 if x["step"] == made[1][0]["step"]] for ranks in (1, 2)]
    assert episodes[0] == episodes[1]


def test_a_prompt_that_is_chosen_twice_is_played_differently_whatever_the_ranks(tmp_path, monkeypatch):
    asked, done = [], SimpleNamespace(ids=[1], mask=[1])
    monkeypatch.setattr(toolplay, "rollout", lambda model, tokenizer, conversations, seed, **_: asked.append(seed) or [done] * len(seed))
    monkeypatch.setattr(lora, "merged", lambda model: contextlib.nullcontext())
    run = SimpleNamespace(config=SimpleNamespace(**{**vars(config(tmp_path)), "seed": 3, "samples": 2}))
    ppo.play(run, None, None, [(BLIND, 0), (TALK, 0), (BLIND, 1)], lambda case, episode: (0.0, {}), 5)
    ppo.play(run, None, None, [(BLIND, 1)], lambda case, episode: (0.0, {}), 5)  # the share of another rank
    assert asked == [["3 round 5"] * 4 + ["3 round 5 again 1"] * 2, ["3 round 5 again 1"] * 2]


def test_guards(tmp_path):
    lines = train(config(tmp_path, ratio_guard=1e-6))
    # every minibatch has a larger mean ratio and is skipped; a skipped minibatch adds no ratio to the round
    assert lines[-1]["skipped"] == 8 and "ratio" not in lines[-1]
    lines = train(config(tmp_path / "b", kl_stop=1e-12, lr=0.1))
    assert lines[0]["stopped"] == 1 and [x["step"] for x in lines] == [4, 8]
    whole = train(config(tmp_path / "c", lr=0.1))
    assert lines[1]["lr"] > whole[1]["lr"] > 0  # the mean of the first steps alone: the schedule continued over the steps left out
    once = train(config(tmp_path / "d", kl_stop=1e-12, lr=0.1, ppo_epochs=1, batch_size=64))
    assert once[0]["stopped"] == 0  # no step was left out


@pytest.mark.parametrize("wrong, names", [({"advantage": "rloo", "samples": 1}, "samples"),
                                          ({"advantage": "grpo", "samples": 1}, "samples"), ({"center": True, "samples": 1}, "center"),
                                          ({"dual_clip": 0.5}, "dual_clip"), ({"epochs": 3}, "iterations"),
                                          ({"min_spread": 0.1, "samples": 1}, "min_spread"), ({"kl_target": 6, "kl_coef": 0}, "kl_target"),
                                          ({"reward": "math:cos", "reward_weights": {"length": 1}}, "one of the two"),
                                          ({"reward_weights": dict.fromkeys(ppo.WEIGHTS, 0)}, "all are 0"),
                                          ({"reward_weights": {"length": 10 ** 400}}, "reward_weights")])
def test_settings_that_teach_nothing_are_refused(tmp_path, wrong, names):
    with pytest.raises(UserError, match=names):
        train(config(tmp_path, **wrong))


def test_another_reference_on_resume_is_refused(tmp_path):
    """The run of start_from was trained again in the meantime."""
    train(config(tmp_path / "start", iterations=1))
    second = config(tmp_path, start_from=str(tmp_path / "start" / "run"), iterations=1)
    train(second)
    shutil.rmtree(tmp_path / "start")
    train(config(tmp_path / "start", iterations=1, lr=0.1))
    with pytest.raises(UserError, match="reference"):
        ppo.train(toolplay.Run(second, resume=True))


def test_the_reference_is_where_training_starts(tmp_path):
    """It is the base model, or the run of start_from; in both cases the KL is 0 in the first round, and only there."""
    rows = [([5, 6, 7, 8], [0, 1, 1, 1])]
    with torch.no_grad():
        base = toolplay.token_logprobs(toolplay.load_model("tiny")[0], rows)
        c = config(tmp_path, lr=0.05)
        fresh = ppo.Policy(toolplay.prepare_model(c, torch.device("cpu"))[0], 1.0, None)
        assert torch.allclose(fresh.switched(fresh.adapter(), rows), base, atol=1e-6)  # B = 0
    train(c)
    second = config(tmp_path / "second", start_from=str(tmp_path / "run"), lr=0.05)
    with torch.no_grad():
        policy = ppo.Policy(toolplay.prepare_model(second, torch.device("cpu"))[0], 1.0, None)
        start, trained = policy.adapter(), policy(rows, ())
        assert (trained - base).abs().max() > 1e-4
        for p in policy.parameters():
            p.add_(0.1 * p.requires_grad)
        moved = policy(rows, ())
        assert torch.equal(policy.switched(start, rows), trained) and torch.equal(policy(rows, ()), moved)
        assert not torch.equal(moved, trained)
    lines = train(second)
    assert lines[0]["kl"] == pytest.approx(0, abs=1e-4) and abs(lines[1]["kl"]) > 1e-4


def test_the_critics_own_adapter(tmp_path, monkeypatch):
    """With value_lora the value loss changes the critic and not the policy; without value_lora it changes the policy."""
    # the advantages are 0, the returns are not
    monkeypatch.setattr(ppo, "gae", lambda rewards, values, mask, *_: (torch.zeros_like(values), (values + 1) * mask))
    for own in (True, False):
        c = config(tmp_path / str(own), value_lora=own, iterations=1, kl_coef=0.0, vf_coef=1.0, lr=0.02, ppo_epochs=4, eval_examples=0)
        train(c)
        state = load_file(next((Path(c.run_dir) / "checkpoint").glob("*/trained.safetensors")))
        policy_B = [v for k, v in state.items() if k.endswith("lora_B") and not k.startswith("critic.")]
        assert all((v == 0).all() for v in policy_B) is own
        assert any(k.startswith("critic.") and k.endswith("lora_B") and v.abs().max() > 0 for k, v in state.items()) is own
        assert state["value_head.weight"].abs().max() > 0


@pytest.mark.parametrize("advantage, ptx", [("gae", 3), ("rloo", 0)])
def test_any_split_into_micro_batches_gives_the_same_step(tmp_path, monkeypatch, advantage, ptx):
    """All at once, one by one, or uneven: the same gradient. In double precision it does not depend on the shapes of matrix products."""
    net, tok = toolplay.load_model("tiny")
    monkeypatch.setattr(toolplay, "load_model", lambda name, device="cpu": (copy.deepcopy(net).double(), tok))
    monkeypatch.setattr(ppo, "score", lambda case, episode, weights: (sum(episode.ids) % 7 / 7, {}))  # samples of a prompt differ
    gradients = small.recorded_gradients(monkeypatch)
    for budget in (10 ** 6, 1, 700):
        train(config(tmp_path / str(budget), advantage=advantage, ptx=ptx, ptx_mix={"weather": 1} if ptx else {}, max_tokens=4096,
                     micro_tokens=budget, iterations=1, prompts=2, samples=3, batch_size=6, ppo_epochs=1, eval_examples=0))
    whole, *others = gradients
    assert whole.norm() > 0
    for other in others:
        assert (whole - other).norm() < 1e-6 * whole.norm()


def test_text_is_never_tokenised_again(tmp_path, monkeypatch):
    """The policy samples "a", "b" where its tokenizer would write the single token "ab": the sampled tokens are the trained tokens."""
    import transformers
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate([*alphabet, "ab"])}, merges=[("a", "b")]))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    core.add_special_tokens([AddedToken(t, special=True) for t in ("<|im_start|>", "<|im_end|>")])
    tok = transformers.PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|im_end|>",
                                               chat_template=toolplay.CHATML)
    net = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**small.sizes(), "vocab_size": len(tok),
                                                                    "eos_token_id": tok.eos_token_id}))
    said = [tok.convert_tokens_to_ids(c) for c in "abba"] + [tok.eos_token_id]
    assert tok.decode(said[:-1]) == "abba" and tok.encode("abba") != said[:-1]  # two tokenisations of one text
    step = {}

    def sample(logits, draws, temperature, top_p):
        logp = torch.log_softmax(logits / temperature, -1)
        n = step["n"] = step.get("n", -1) + 1
        tokens = [said[n % len(said)]] * len(logits)
        return tokens, logp[:, tokens[0]].tolist()
    trained = []
    real = toolplay.token_logprobs
    monkeypatch.setattr(toolplay, "sample", sample)
    monkeypatch.setattr(toolplay, "load_model", lambda name, device="cpu": (net, tok))
    monkeypatch.setattr(toolplay, "token_logprobs", lambda m, rows, *a, **k: (trained.extend(rows), real(m, rows, *a, **k))[1])
    lines = train(config(tmp_path, iterations=1, eval_examples=0, prompts=2, samples=2))
    assert trained and all([i for i, m in zip(ids, mask) if m] == said for ids, mask in trained)
    assert lines[0]["sampling_gap"] < 1e-4


@pytest.mark.parametrize("more, words", [({"lora_dropout": 0.1}, "dropout"), ({"lora_r": 0}, "lora_r"),
                                         ({"reward": "nowhere:f"}, "cannot import"),
                                         ({"reward_weights": {"rigth_tool": 1}}, "rigth_tool"),
                                         ({"reward_weights": {"right_tool": "x"}}, "right_tool"), ({"steps": 3}, "iterations"),
                                         ({"ptx_mix": {"wether": 1}}, "ptx_mix"), ({"ptx": 2}, "go together"),
                                         ({"ptx_mix": {"weather": 1}}, "go together"),
                                         ({"max_turns": 1}, "right_result"),
                                         ({"kl_coef": 0.1, "kl_target": 6.0, "kl_horizon": 0.1}, "kl_horizon")])
def test_a_users_mistakes(tmp_path, more, words):
    with pytest.raises(UserError, match=words):
        train(config(tmp_path, **more))


def test_prompts_that_say_nothing_of_a_right_answer_are_refused(tmp_path):
    (tmp_path / "p.jsonl").write_text('{"messages": [{"role": "user", "content": "Tell me a joke."}]}\n')
    with pytest.raises(UserError, match="1 of 1 prompts .*joke"):
        train(config(tmp_path, source="jsonl", path=str(tmp_path / "p.jsonl"), eval_examples=0))


@pytest.mark.parametrize("n, body", enumerate(["import sys\nsys.exit(0)", "def f(case, episode):\n    raise SystemExit('bye')",
                                               "def f(case, episode):\n    return None"]))
def test_an_own_reward_that_fails_leaves_nothing_behind(tmp_path, monkeypatch, capsys, n, body):
    (tmp_path / f"reward_that_fails_{n}.py").write_text(body)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(SystemExit) as stop:
        ppo.main([str(ROOT / "configs" / "ppo_tiny.json"), f"--run_dir={tmp_path / 'run'}", f"--reward=reward_that_fails_{n}:f"])
    assert stop.value.code == 2 and "error: reward" in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_inspect_obeys_no_control_characters_and_takes_one_run(tmp_path, capsys):
    line = {"step": 1, "score": 1.0, "answer": 6, "prompt": "a\x1b[31mb", "tokens": ["x"], "mask": [1], "rewards": [0.5],
            "advantages": [0.1]}
    (tmp_path / "samples.jsonl").write_text(json.dumps(line) + "\n")
    ppo.main(["--inspect", str(tmp_path)])
    assert "a\\x1b[31mb" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        ppo.main(["--inspect", str(tmp_path), "--n"])
    assert stop.value.code == 2 and "takes one run folder" in capsys.readouterr().err


def test_inspect_of_a_damaged_file(tmp_path):
    (tmp_path / "samples.jsonl").write_text(json.dumps(dict.fromkeys(["step", "score", "answer", "prompt", "tokens", "mask", "rewards",
                                                                      "advantages"], 3)) + "\n")
    with pytest.raises(UserError, match="damaged"):
        ppo.inspect(tmp_path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_added_up_in_fp32(dtype):
    """The same numbers in half precision give the results of fp32, to fp32's last digits."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.ones(1, 997, dtype=dtype)
    logp, old, advantages, values = (torch.randn(1, 997, generator=generator).to(dtype) for _ in range(4))
    assert float(ppo.masked_mean(mask, mask)) == 1
    for f, xs in ((ppo.policy_loss, (logp, old, advantages)), (ppo.value_loss, (values, old, advantages))):
        (half, info), (full, exact) = f(*xs, mask), f(*(x.float() for x in xs), mask.float())
        assert half.dtype == torch.float32 and torch.equal(half, full)
        assert all(torch.equal(info[k].float(), exact[k].float()) for k in info)
    assert all(torch.equal(a, b)
               for a, b in zip(ppo.gae(advantages, values, mask), ppo.gae(advantages.float(), values.float(), mask.float())))
    assert torch.equal(ppo.kl_penalty(logp, old, "k3"), ppo.kl_penalty(logp.float(), old.float(), "k3"))
    assert ppo.token_rewards(torch.tensor([1.2345]), logp, mask, 0.0).sum().item() == pytest.approx(1.2345, abs=1e-6)


def test_what_is_masked_reaches_no_gradient():
    x = torch.tensor([[1.0, 2.0, float("nan")]], requires_grad=True)
    ppo.masked_whiten(x, torch.tensor([[1, 1, 0]])).square().sum().backward()
    assert torch.isfinite(x.grad).all()


def test_one_advantage_for_a_whole_answer():
    logp, mask, scores = torch.randn(2, 3), torch.ones(2, 3), torch.tensor([[0.5], [-1.0]])
    assert torch.equal(ppo.policy_loss(logp, logp * 0.9, scores, mask)[0], ppo.policy_loss(logp, logp * 0.9, scores.repeat(1, 3), mask)[0])


@pytest.mark.parametrize("scale", [1.35, 10.1, 1000.1, 1e5 + 0.1])
def test_equal_scores_teach_nothing_however_large(scale):
    scores = torch.full((16, 3), scale)
    assert not ppo.rloo_advantages(scores).any() and not ppo.grpo_advantages(scores).any()
    assert not ppo.masked_whiten(scores, torch.ones(16, 3)).any()
    settings = ppo.Config(advantage="gae", center=True, samples=3)
    zero = torch.zeros(48, 4)
    assert not any(x.any() for x in ppo.advantages_of(settings, scores.flatten(), zero, zero, torch.ones(48, 4), 0.1))


def test_small_divergences_are_measured():
    d = 1e-4 * torch.randn(10_000, generator=torch.Generator().manual_seed(0))
    k3 = ppo.kl_penalty(torch.zeros_like(d), d, "k3")
    exact = torch.expm1(d.double()) - d.double()
    assert k3.sum().item() == pytest.approx(exact.sum().item(), rel=0.01)
    assert ppo.token_rewards(torch.ones(2), torch.empty(2, 0), torch.empty(2, 0), 0.1).shape == (2, 0)
