"""dpo.py: each loss computed by hand, pairs that name their fault, a reference that is computed once, whole runs."""
import copy
import json
import math
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import small
from small import model, tokenizer

import data
import dpo
import eval as evaluation
import lora
import ppo
import toolplay
from tools import BUILTIN, Call, UserError, load_tools, parse_calls

ROOT = Path(toolplay.__file__).parent
PC, PR, RC, RR = [torch.tensor(x, dtype=torch.float64) for x in ([-10.0, -3.0, -7.5], [-12.0, -2.5, -7.5], [-11.0, -2.0, -7.5],
                                                                 [-11.5, -4.0, -7.5])]
H = [(-10 + 11) - (-12 + 11.5), (-3 + 2) - (-2.5 + 4), 0.0]  # 1.5, -2.5, 0
log_sigmoid = lambda x: -math.log(1 + math.exp(-x))  # noqa: E731


# ---------------------------------------------------------------- the losses

@pytest.mark.parametrize("variant, smoothing, by_hand", [
    ("sigmoid", 0.0, lambda h, b, e: -log_sigmoid(b * h)),
    ("sigmoid", 0.1, lambda h, b, e: -(1 - e) * log_sigmoid(b * h) - e * log_sigmoid(-b * h)),
    ("robust", 0.1, lambda h, b, e: (-(1 - e) * log_sigmoid(b * h) + e * log_sigmoid(-b * h)) / (1 - 2 * e)),
    ("ipo", 0.0, lambda h, b, e: (h - 1 / (2 * b)) ** 2),
    ("hinge", 0.0, lambda h, b, e: max(0.0, 1 - b * h))])
@pytest.mark.parametrize("beta", [0.1, 0.7])
def test_losses_by_hand(variant, smoothing, by_hand, beta):
    loss, info = dpo.dpo_loss(PC, PR, RC, RR, beta, variant, smoothing)
    assert loss.item() == pytest.approx(sum(by_hand(h, beta, smoothing) for h in H), rel=1e-12)
    assert info["rewards/chosen"].item() == pytest.approx(beta * (1 - 1 + 0))
    assert info["rewards/rejected"].item() == pytest.approx(beta * (-0.5 + 1.5))
    assert info["rewards/margin"].item() == pytest.approx(beta * sum(H)) and info["rewards/accuracy"].item() == 1
    assert info["logp/chosen"].item() == -20.5 and info["logp/rejected"].item() == -22


def test_simpo_by_hand_needs_no_reference():
    loss, info = dpo.dpo_loss(PC, PR, None, None, 2.0, "simpo")
    margins = [2 * (c - r) - 0.5 for c, r in [(-10, -12), (-3, -2.5), (-7.5, -7.5)]]
    assert loss.item() == pytest.approx(sum(-log_sigmoid(h) for h in margins), rel=1e-12)
    smooth, _ = dpo.dpo_loss(PC, PR, None, None, 2.0, "simpo", 0.1)  # as in TRL
    assert smooth.item() == pytest.approx(sum(-0.9 * log_sigmoid(h) - 0.1 * log_sigmoid(-h) for h in margins), rel=1e-12)


@pytest.mark.parametrize("n", range(6))
def test_equal_to_trl(n):
    """The losses equal those of TRL 1.16's own trainers; golden/make.py says how its numbers were made."""
    case = json.loads((ROOT / "tests" / "golden" / "dpo.json").read_text())[n]
    mask, logp, ref = (torch.tensor(case[k], dtype=torch.float64) for k in ("mask", "logp", "ref_logp"))
    assert len(case["losses"]) == 11
    for name, loss in case["losses"].items():
        variant, smoothing, beta = name.split()
        four = [half for x in (logp, ref) for half in dpo.sequence_logp(x, mask, variant in dpo.MEAN).chunk(2)]
        more = {"simpo_margin": float(smoothing)} if variant == "simpo" else {"label_smoothing": float(smoothing)}
        ours, _ = dpo.dpo_loss(*four, beta=float(beta), variant=variant, **more)
        assert ours.item() / len(four[0]) == pytest.approx(loss, rel=1e-6), name


def test_known_values():
    zero = torch.zeros(1, dtype=torch.float64)
    assert dpo.dpo_loss(zero, zero, zero, zero)[0].item() == pytest.approx(math.log(2))     # an untrained policy
    assert dpo.dpo_loss(zero, zero, zero, zero, 0.1, "ipo")[0].item() == pytest.approx(25)  # (1 / 0.2) ** 2
    assert dpo.dpo_loss(zero, zero, zero, zero, 0.1, "hinge")[0].item() == 1


@pytest.mark.parametrize("variant", dpo.VARIANTS)
def test_gradients(variant):
    inputs = [x.clone().requires_grad_() for x in (PC, PR)]
    assert torch.autograd.gradcheck(lambda a, b: dpo.dpo_loss(a, b, RC, RR, 0.3, variant, 0.1)[0], inputs)
    dpo.dpo_loss(*inputs, RC, RR, 0.3, variant, 0.1)[0].backward()
    assert (inputs[0].grad <= 0).all() or variant == "ipo"  # more probability for the chosen answer


@pytest.mark.parametrize("variant, smoothing", [("sigmod", 0), ("robust", 0.5), ("sigmoid", 0.5), ("sigmoid", -0.1)])
def test_meaningless_settings_are_refused(variant, smoothing):
    with pytest.raises(ValueError, match="variant|label_smoothing"):
        dpo.dpo_loss(PC, PR, RC, RR, 0.1, variant, smoothing)


@pytest.mark.parametrize("more, words", [({"beta": 0}, "beta"), ({"beta": -1}, "beta"), ({"beta": math.nan}, "beta"),
                                         ({"ref_chosen_logp": None}, "reference")])
def test_what_makes_no_loss_is_refused(more, words):
    with pytest.raises(ValueError, match=words):
        dpo.dpo_loss(**{"policy_chosen_logp": PC, "policy_rejected_logp": PR, "ref_chosen_logp": RC, "ref_rejected_logp": RR, **more})


def test_sequence_logp():
    logp, mask = torch.tensor([[-1.0, -2.0, -4.0], [-1.0, -1.0, -1.0]]), torch.tensor([[0, 1, 1], [0, 0, 0]])
    assert dpo.sequence_logp(torch.where(mask.bool(), logp, math.nan), mask).tolist() == [-6, 0]  # values outside the mask do not count
    assert dpo.sequence_logp(logp, mask).tolist() == [-6, 0]
    assert dpo.sequence_logp(logp, mask, mean=True).tolist() == [-3, 0]


def test_alone_in_an_empty_folder(tmp_path):
    shutil.copy(ROOT / "dpo.py", tmp_path)
    code = "import sys, dpo, torch; z = torch.zeros(2); print(dpo.dpo_loss(z, z, z, z)[0].item()); assert not {'toolplay', 'data', 'tools', 'transformers'} & set(sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert out.stdout.startswith("1.386"), out.stderr


# ---------------------------------------------------------------- pairs

@pytest.fixture(scope="module")
def gold():
    return data.generate("train", 800, 3, {**data.MIX, "two_calls": 9})


@pytest.mark.parametrize("name", dpo.CORRUPTIONS)
def test_corruptions(gold, name):
    made = [(c, dpo.CORRUPTIONS[name](c, random.Random(n))) for n, c in enumerate(gold)]
    made = [(c, worse) for c, worse in made if worse]
    assert len(made) > 20
    for c, worse in made:
        better = c["messages"][:len(worse)]
        assert better[:-1] == worse[:-1] and better[-1] != worse[-1] and worse[-1]["role"] == "assistant"
        gold_calls, calls = better[-1].get("tool_calls"), worse[-1].get("tool_calls")
        if name == "wrong_tool":
            assert calls[0]["name"] != gold_calls[0]["name"] and calls[0]["name"] in dpo.tools_of(c)
        elif name == "malformed":
            assert parse_calls(worse[-1]["content"])[1] and gold_calls
        elif name in ("wrong_argument", "missing_argument"):
            assert calls[0]["name"] == gold_calls[0]["name"] and calls[0]["arguments"] != gold_calls[0]["arguments"]
        elif name == "missing_call":
            assert gold_calls and not calls
        elif name == "call_left_out":
            assert calls == gold_calls[:-1] and calls
        elif name == "call_too_many":
            assert calls[:-1] == gold_calls and calls[-1]["name"] in dpo.tools_of(c)
        elif name == "needless_call":
            assert not gold_calls and calls
        else:
            assert better[-2]["role"] == "tool" and not calls
        if name == "wrong_argument":
            assert not evaluation.same_call(Call(**gold_calls[0]), Call(**calls[0]))


def test_no_talk_breaks_a_corruption():
    for talk in data.corpus("talk_replies.jsonl")[1:]:
        c = {"messages": [{"role": "user", "content": talk["prompt"]}, {"role": "assistant", "content": talk["reply"]}],
             "tools": ["calculator", "weather", "search"]}
        assert dpo.needless_call(c, random.Random(1))


def test_pairs_share_their_prompt_and_train_only_the_answers(gold):
    pairs = dpo.corrupted_pairs(gold, tokenizer(), seed=1)
    again, other = (dpo.corrupted_pairs(gold[:50], tokenizer(), seed=seed) for seed in (1, 2))
    assert pairs[:len(again)] == again != other and len(again) > 40
    assert {pair.why for pair in pairs} == set(dpo.CORRUPTIONS)
    for pair in pairs:
        (a, mask_a), (b, mask_b) = pair[:2]
        start = mask_a.index(1)
        assert a[:start] == b[:start] and mask_b.index(1) == start and sum(mask_b)
        assert (b[-1] == 257 or tokenizer().decode(b)[-1] == "\n") is (pair.why != "endless")


def test_earlier_answers_and_tool_results_are_not_trained():
    prompt = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "EARLIER"}, {"role": "user", "content": "2+2"}]
    call = {"role": "assistant", "content": "", "tool_calls": [{"name": "calculator", "arguments": {"expression": "2+2"}}]}
    answer = lambda text: [call, {"role": "tool", "content": '{"result": 4}'}, {"role": "assistant", "content": text}]  # noqa: E731
    pair = dpo.read_pair({"prompt": prompt, "chosen": answer("4"), "rejected": answer("5"), "tools": ["calculator"]}, tokenizer())
    for (ids, mask), text in zip(pair[:2], "45"):
        assert tokenizer().decode([i for i, m in zip(ids, mask) if m]) == f"{text}<|im_end|>"  # not the common call
    assert pair == dpo.read_pair({"chosen": prompt + answer("4"), "rejected": prompt + answer("5"), "tools": ["calculator"]}, tokenizer())


def test_pairs_as_trl_writes_them():
    text = {"prompt": "2+2", "chosen": "4", "rejected": "5"}
    lists = {key: [{"role": "user" if key == "prompt" else "assistant", "content": value}] for key, value in text.items()}
    whole = {"chosen": lists["prompt"] + lists["chosen"], "rejected": lists["prompt"] + lists["rejected"]}
    pair = dpo.read_pair(text, tokenizer())
    for line in (lists, whole, {**whole, "prompt": None}, {key: value[0] for key, value in lists.items()}):
        assert dpo.read_pair(line, tokenizer()) == pair  # the last line: a message instead of a list of one
    tool = {"name": "f", "description": "Do.", "parameters": {"type": "object", "properties": {}}}
    offered = dpo.read_pair({**text, "tools": [tool]}, tokenizer())
    assert offered != pair
    for more in ({"tools": [json.dumps(tool)]}, {"tools": json.dumps([tool])}, {"functions": [tool]}):
        assert dpo.read_pair({**text, **more}, tokenizer()) == offered
    for prompt in ("2+2", lists["prompt"]):  # UltraFeedback's lines hold the prompt twice
        assert dpo.read_pair({**whole, "prompt": prompt}, tokenizer()) == pair


def test_only_one_side_may_repeat_the_prompt():
    user = {"role": "user", "content": "2+2"}
    mixed = {"prompt": "2+2", "chosen": [user, {"role": "assistant", "content": "4"}], "rejected": "5"}
    assert dpo.read_pair(mixed, tokenizer()) == dpo.read_pair({"prompt": "2+2", "chosen": "4", "rejected": "5"}, tokenizer())


def test_pairs_in_two_spellings():
    """Ids and arguments as text make no difference; an answer that ends where the other continues does."""
    user, result, said = {"role": "user", "content": "2+2"}, {"role": "tool", "content": "4",
                                                              "tool_call_id": "b"}, {"role": "assistant", "content": "4"}
    plain = {"role": "assistant", "content": "", "tool_calls": [{"name": "calculator", "arguments": {"expression": "2+2"}}]}
    openai = {"role": "assistant", "content": None,
              "tool_calls": [{"id": "b", "type": "function", "function": {"name": "calculator", "arguments": '{"expression": "2+2"}'}}]}
    line = {"prompt": [user], "tools": ["calculator"]}
    with pytest.raises(UserError, match="the same"):
        dpo.read_pair({**line, "chosen": [plain], "rejected": [openai]}, tokenizer())
    other = dpo.read_pair({**line, "chosen": [plain, {"role": "tool", "content": "4"}, said],
                           "rejected": [openai, result, {**said, "content": "5"}]}, tokenizer())
    # the call belongs to the prompt
    assert [tokenizer().decode([i for i, m in zip(ids, mask) if m]) for ids, mask in other[:2]] == ["4<|im_end|>", "5<|im_end|>"]
    early = dpo.read_pair({**line, "chosen": [openai, result, said], "rejected": [plain]}, tokenizer())
    assert all("calculator" in tokenizer().decode([i for i, m in zip(ids, mask) if m]) for ids, mask in early[:2])
    for wrong, words in (({"chosen": []}, '"chosen" is empty'), ({"prompt": None}, "no .prompt.")):
        with pytest.raises(UserError, match=words):
            dpo.read_pair({**line, "chosen": "4", "rejected": "5", **wrong}, tokenizer())


@pytest.mark.parametrize("line", [[], {"chosen": "a"}, {"chosen": "a", "rejected": "b"}, {"prompt": "x", "chosen": "a", "rejected": "a"},
                                  {"prompt": 1, "chosen": "a", "rejected": "b"},
                                  {"prompt": "x", "chosen": [{"role": "user", "content": "a"}], "rejected": "b"},
                                  # the assistant's turn is unfinished
                                  {"prompt": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "I say"}], "chosen": "yes",
                                   "rejected": "no"},
                                  {"prompt": "hello", "chosen": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}],
                                   "rejected": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "b"}]},
                                  {"prompt": "q", "chosen": [{"role": "assistant", "content": "a"}, {"role": "user", "content": "x"},
                                                             {"role": "assistant", "content": "ok"}],
                                   "rejected": [{"role": "assistant", "content": "a"}, {"role": "user", "content": "y"},
                                                {"role": "assistant", "content": "ok"}]}])
def test_bad_pairs_are_named(line):
    with pytest.raises(UserError):
        dpo.read_pair(line, tokenizer())


@pytest.mark.parametrize("line", [
    {"prompt": "Hi", **{side: [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}, {"role": "assistant", "content": side}]
                        for side in ("chosen", "rejected")}},
    {"prompt": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}],
     **{side: [{"role": "user", "content": "x"}, {"role": "assistant", "content": side}] for side in ("chosen", "rejected")}}])
def test_odd_but_good_pairs(line):
    assert dpo.read_pair(line, tokenizer()).why == "given"


def test_a_prompt_in_another_form_is_not_there_twice():
    whole = {side: [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": side}] for side in ("chosen", "rejected")}
    plain = dpo.read_pair({"prompt": "", **whole}, tokenizer())
    for prompt in ([{"role": "user", "content": [{"type": "text", "text": "Hi"}]}], [{"role": "user", "content": "Hi", "name": None}],
                   "Hi"):
        assert dpo.read_pair({"prompt": prompt, **whole}, tokenizer()) == plain


# ---------------------------------------------------------------- training

def config(tmp_path, **more):
    return toolplay.load_config({"method": "dpo", "model": "tiny", "examples": 16, "eval_examples": 4, "max_tokens": 4000, "batch_size": 4,
                                 "lora_r": 2, "steps": 4,
                                 "eval_every": 2, "save_every": 1, "lr": 0.01, "run_dir": str(tmp_path / "run"), **more})


def train(config, resume=False):
    dpo.train(toolplay.Run(config, resume))
    return [json.loads(line) for line in (Path(config.run_dir) / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("variant", dpo.VARIANTS)
def test_a_run(tmp_path, variant, capsys):
    lines = train(config(tmp_path, variant=variant))
    assert "times fewer" in capsys.readouterr().err and lines[0]["trie_saving"] > 1 and "trie_saving" not in lines[1]
    first = {"sigmoid": math.log(2), "robust": math.log(2), "ipo": 25, "hinge": 1}
    if variant in first:  # the policy starts equal to its reference
        assert lines[0]["loss"] == pytest.approx(first[variant], abs=1e-5)
        assert lines[0]["rewards/margin"] == pytest.approx(0, abs=1e-5)
    assert {"rewards/chosen", "rewards/rejected", "rewards/margin", "rewards/accuracy", "logp/chosen", "logp/rejected"} <= set(lines[0])
    assert "eval_accuracy" in lines[1] and (tmp_path / "run" / "adapter").is_dir()


def test_it_learns_the_preference(tmp_path, monkeypatch):
    net, tok = model("llama"), tokenizer()  # tiny's weights are too small for it to learn much
    monkeypatch.setattr(toolplay, "load_model", lambda name, device="cpu": (copy.deepcopy(net), tok))
    lines = train(config(tmp_path, steps=12, examples=8, batch_size=8, eval_examples=0, lr=0.02))
    assert lines[-1]["rewards/accuracy"] == 1 and lines[-1]["rewards/margin"] > 0.5


@pytest.mark.parametrize("variant", dpo.VARIANTS)
def test_any_split_into_micro_batches_gives_the_same_step(tmp_path, monkeypatch, variant):
    """All at once, one by one, or uneven: the same gradient. In double precision it does not depend on the shapes of matrix products."""
    net = small.model("gpt2").double()  # not Llama, because its norms compute in fp32 in any case
    monkeypatch.setattr(toolplay, "load_model", lambda name, device="cpu": (copy.deepcopy(net), tokenizer()))
    message = lambda role, text: [{"role": role, "content": text}]  # noqa: E731
    lines = [{"prompt": message("user", f"{n}?"), "chosen": message("assistant", "Yes." * n),
              "rejected": message("assistant", "No, " * (4 - n))} for n in (1, 2, 3)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    start = config(tmp_path / "start", source="jsonl", path=str(tmp_path / "pairs.jsonl"), seed=5, eval_examples=0, steps=2)
    train(start)  # makes an adapter that is not zero
    gradients = small.recorded_gradients(monkeypatch)
    for budget in (10 ** 6, 1, 120):
        train(config(tmp_path / str(budget), source="jsonl", path=str(tmp_path / "pairs.jsonl"), micro_tokens=budget, batch_size=3, steps=1,
                     start_from=start.run_dir,
                     variant=variant, label_smoothing=0.1, eval_examples=0))
    whole, *others = gradients
    assert whole.norm() > 0
    for other in others:
        assert (whole - other).norm() < 1e-6 * whole.norm()  # the adapters are fp32


@pytest.mark.parametrize("variant", dpo.VARIANTS)
@pytest.mark.parametrize("sizes", [[1] * 7, [3, 1, 3], [2, 5]])
def test_sums_over_parts_are_the_sum_in_fp32(variant, sizes):
    """Gradients with respect to the log-probs: one pair a part, or uneven parts."""
    torch.manual_seed(0)
    inputs = [(-20 * torch.rand(7)).requires_grad_() for _ in range(2)]
    reference = [-20 * torch.rand(7) for _ in range(2)]

    def gradient(sizes):
        for x in inputs:
            x.grad = None
        for parts in zip(*(x.split(sizes) for x in (*inputs, *reference))):
            (dpo.dpo_loss(*parts, 0.1, variant, 0.1)[0] / 7).backward()
        return torch.cat([x.grad for x in inputs])
    whole = gradient([7])
    assert (gradient(sizes) - whole).norm() <= 1e-6 * whole.norm() > 0


RESUMED = {"method": "dpo", "model": "tiny", "examples": 8, "eval_examples": 2, "max_tokens": 4000, "batch_size": 4, "lora_r": 2,
           "steps": 3, "eval_every": 2, "save_every": 1,
           "lr": 0.01, "micro_tokens": 1, "device": "cpu"}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dpo") / "run"
    codes, stderr = small.zygote().run("train", config=dict(RESUMED, run_dir=str(folder)))
    assert codes == [0], stderr
    return folder


@pytest.mark.parametrize("place, nth", [("start", 1), ("step", 3), ("accumulation", 6)])
def test_kill_9_then_resume_is_bit_identical(uninterrupted, tmp_path, place, nth):
    small.killed_then_resumed(dict(RESUMED, run_dir=str(tmp_path / "run")), place, nth, uninterrupted,
                              ["metrics.jsonl", "reference.json", "adapter/adapter_model.safetensors"])


def test_two_ranks_learn_as_one(tmp_path):
    made = {}
    for ranks in (1, 2):
        codes, stderr = small.zygote().run("train", ranks=ranks, config=dict(RESUMED, run_dir=str(tmp_path / str(ranks))), timeout=60)
        assert codes == [0] * ranks, stderr
        made[ranks] = toolplay.read_lines(tmp_path / str(ranks) / "metrics.jsonl")
    assert len(made[1]) > 1
    for one, two in zip(made[1], made[2], strict=True):
        assert one == pytest.approx(two, rel=1e-4, abs=1e-5)


def test_resume_is_bit_identical_and_reads_the_reference(tmp_path, monkeypatch):
    whole = config(tmp_path / "a")
    train(whole)
    cut = config(tmp_path / "b")
    log = toolplay.Run.log

    def stop(self, step, metrics, tokens=0):
        log(self, step, metrics, tokens)
        if step == 3:
            raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr(toolplay.Run, "log", stop)
        with pytest.raises(KeyboardInterrupt):
            train(cut)
    monkeypatch.setattr(dpo, "sequence_logp", lambda *a, f=dpo.sequence_logp, **k: f(*a, **k) if torch.is_grad_enabled()
                        or a[0].shape[0] < 20 else pytest.fail("reference computed again"))
    train(cut, resume=True)
    for name in ("metrics.jsonl", "adapter/adapter_model.safetensors", "reference.json"):
        assert (Path(whole.run_dir) / name).read_bytes() == (Path(cut.run_dir) / name).read_bytes(), name


@pytest.mark.parametrize("variant", ["sigmoid", "simpo"])
def test_other_data_than_the_run_began_with_is_refused(tmp_path, variant):
    c = config(tmp_path, variant=variant)
    train(c)
    path = Path(c.run_dir) / "reference.json"
    path.write_text(path.read_text().replace('"data_sha256": "', '"data_sha256": "0'))
    with pytest.raises(UserError, match="reference.json.*data has changed"):
        train(c, resume=True)
    kept = json.loads(path.read_text().replace('"data_sha256": "0', '"data_sha256": "'))
    path.write_text(json.dumps({**kept, "logp": kept["logp"][:-1]}))  # its last value is lost
    with pytest.raises(UserError, match="reference.json"):
        train(c, resume=True)


def test_the_reference_is_where_training_starts(tmp_path):
    """It is the base model if training starts from the base model, and the SFT run if training starts from an SFT run."""
    base = config(tmp_path / "base")
    train(base)
    net, tok = toolplay.load_model("tiny")
    pairs, held_out = dpo.datasets(base, tok)
    rows = [row for pair in pairs + held_out for row in pair[:2]]
    logp = lambda net: torch.stack([toolplay.token_logprobs(net, [row]).sum() for row in rows]).reshape(-1, 2)  # noqa: E731
    kept = lambda c: torch.tensor(json.loads((Path(c.run_dir) / "reference.json").read_text())["logp"])  # noqa: E731
    with torch.no_grad():
        assert (kept(base) - logp(net)).abs().max() < 1e-3
    after = config(tmp_path / "after", start_from=base.run_dir)
    train(after)
    with torch.no_grad():
        lora.load_adapter(net, Path(base.run_dir) / "adapter")
        assert (kept(after) - logp(net)).abs().max() < 1e-3
    assert (kept(after) - kept(base)).abs().max() > 1e-2


def test_tiny_config_and_show(capsys):
    assert toolplay.load_config(ROOT / "configs" / "dpo_tiny.json").method == "dpo"
    config_ = toolplay.load_config({"method": "dpo", "model": "tiny", "examples": 12, "max_tokens": 4000})
    dpo.show(5, config_)
    out = capsys.readouterr().out
    assert out.count("---") == 5 and "\033[32;1m" in out and "\033[31;1m" in out


def test_pairs_from_the_policys_own_samples(tmp_path, monkeypatch, capsys):
    """The best against the worst sample by reward, with the ids as sampled; a resumed run reads the pairs and samples nothing."""
    tok = tokenizer()
    monkeypatch.setattr(toolplay, "load_model", lambda name, device="cpu": (model("llama"), tok))
    monkeypatch.setattr(ppo, "score", lambda case, episode, weights: (weights["length"] * sum(episode.ids[episode.prompt:]) / 1000, {}))
    c = config(tmp_path, pairs="sampled", examples=6, eval_examples=2, samples=3, max_new_tokens=6, mix={"arithmetic": 1},
               reward_weights={"length": 1.0})
    lines = train(c)
    assert lines[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert re.search("pairs of 6 prompts with 3 answers each", capsys.readouterr().err)
    pairs, held_out = json.loads((tmp_path / "run" / "pairs.json").read_text())
    assert 4 <= len(pairs) <= 6 and 1 <= len(held_out) <= 2  # a prompt whose answers score alike gives no pair
    for chosen, rejected, why in pairs:
        start = chosen[1].index(1)
        assert chosen[0][:start] == rejected[0][:start] and sum(chosen[0][start:]) > sum(rejected[0][start:])
        assert why.startswith("reward")
    monkeypatch.setattr(toolplay, "rollout", lambda *a, **k: pytest.fail("sampled again"))
    train(c, resume=True)


def test_twins_differ_in_the_offered_tools_alone(monkeypatch):
    """twins: a call to a tool that is not offered is a fault; the same request with the tool offered makes a second, reversed pair."""
    tok = tokenizer()
    chats = data.generate("train", 12, 0, {"missing_tool": 1}) + data.generate("train", 3, 0, {"no_tool": 1})
    calls = [c["facts"]["withheld"] for c in chats[:12]]

    def rollout(model, tokenizer, conversations, **more):
        rows = [data.encode(c, tok, generation=True)[0] for c in conversations]
        return [toolplay.Episode(ids + [65], [0] * len(ids) + [1], [0.0] * (len(ids) + 1), len(ids),
                                 calls=[toolplay.Call("weather", {"city": "X"})] if n != 1 else [])
                for n, ids in enumerate(rows)]
    monkeypatch.setattr(toolplay, "rollout", rollout)
    monkeypatch.setattr(ppo, "score", lambda case, episode, weights: (0.0, {}))
    settings = {"method": "dpo", "pairs": "sampled", "chosen": "gold", "samples": 1, "min_best": 1.0, "max_tokens": 9000}
    made = lambda **more: dpo.sampled_pairs(None, tok, chats, toolplay.load_config({**settings, **more}))  # noqa: E731
    alone, pairs = made(), made(twins=True)
    assert len(alone) == 15 and [p for p in pairs if p.why != "its tool is offered"] == alone
    twins = [p for p in pairs if p.why == "its tool is offered"]
    assert len(twins) == 11 and pairs == made(twins=True)  # the second sample called nothing
    text = lambda row, trained: tok.decode([i for i, m in zip(*row) if m == trained])  # noqa: E731
    chats, calls = chats[:1] + chats[2:12], calls[:1] + calls[2:12]
    for chat, call, (chosen, rejected, _) in zip(chats, calls, twins):
        assert [vars(c) for c in parse_calls(text(chosen, 1))[0]] == [call]
        assert text(rejected, 1).startswith(chat["messages"][1]["content"])
        assert text(chosen, 0) == text(rejected, 0) and chat["messages"][0]["content"] in text(chosen, 0)
        assert all(f"{next(iter(load_tools([tool])))}(" in text(chosen, 0) for tool in [*chat["tools"], call["name"]])


@pytest.mark.parametrize("facts", [None, "x", {}, {"withheld": 3}, {"withheld": {"name": "weather"}},
                                   {"withheld": {"name": 3, "arguments": {}}},
                                   {"withheld": {"name": "foo", "arguments": {}}}, {"withheld": {"name": "search", "arguments": {}}},
                                   {"withheld": {"name": "weather", "arguments": 3}}])
def test_facts_that_are_not_ours_make_no_twin(facts):
    assert dpo.withheld({"facts": facts, "tools": ["search"]}) is None
    assert dpo.withheld({"facts": {"withheld": {"name": "weather", "arguments": {}}}}) and dpo.withheld({}) is None


def test_a_turn_of_the_prompt_is_no_gold_answer(monkeypatch):
    """chosen: gold, and a line whose expected answer is not in its messages: their assistant turn was said before, so it is not gold."""
    tok = tokenizer()
    line = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "Hello!"},
                         {"role": "user", "content": "2 + 2?"}], "tools": [],
            "expected": {"calls": [], "answer": 4}}

    def rollout(model, tokenizer, conversations, **more):
        ids = data.encode(conversations[0], tok, generation=True)[0]
        return [toolplay.Episode(ids + [65], [0] * len(ids) + [1], [0.0] * (len(ids) + 1), len(ids))]
    monkeypatch.setattr(toolplay, "rollout", rollout)
    monkeypatch.setattr(ppo, "score", lambda case, episode, weights: (0.0, {}))
    settings = {"method": "dpo", "pairs": "sampled", "chosen": "gold", "samples": 1, "min_best": 1.0, "max_tokens": 9000}
    assert dpo.sampled_pairs(None, tok, [line], toolplay.load_config(settings)) == []


def test_digits_without_end_make_a_pair_too():
    messages = [{"role": "user", "content": "2 + 2?"},
                {"role": "assistant", "content": "", "tool_calls": [{"name": "calculator", "arguments": {"expression": "2 + 2"}}]},
                {"role": "tool", "content": '{"result": 4}'}, {"role": "assistant", "content": "9" * 5000}]
    made = dpo.ignores_result({"messages": messages, "tools": ["calculator"]}, random.Random(0))
    assert made and made[-1]["content"] != "9" * 5000


def test_a_call_behind_a_result_is_no_final_answer():
    call = {"role": "assistant", "content": "", "tool_calls": [{"name": "calculator", "arguments": {"expression": "2 + 2"}}]}
    gold = {"messages": [{"role": "user", "content": "2 + 2, doubled?"}, call, {"role": "tool", "content": '{"result": 4}'}, call],
            "tools": ["calculator"]}
    assert dpo.corrupted_pairs([gold], tokenizer(), faults=["endless", "ignores_result"]) == []


def test_what_makes_no_pair_is_corrupted(monkeypatch):
    """pairs: both uses the policy's own faults, and one of the named faults where the policy makes no fault."""
    tok = tokenizer()
    chats = data.generate("train", 30, 0, {"no_tool": 1, "weather": 1, "two_calls": 1})
    monkeypatch.setattr(toolplay, "rollout",
                        lambda model, tok, chats, **more: [
                            toolplay.Episode(ids + [65], [0] * len(ids) + [1], [0.0] * (len(ids) + 1), len(ids))
                            for c in chats for ids in [data.encode(c, tok, generation=True)[0]]])
    monkeypatch.setattr(ppo, "score", lambda case, episode, weights: (2.0 - (case.kind == "weather"), {}))
    settings = {"method": "dpo", "pairs": "both", "chosen": "gold", "samples": 1, "min_best": 2.0, "max_tokens": 9000,
                "faults": ["call_left_out", "needless_call"]}
    pairs = dpo.sampled_pairs(None, tok, chats, toolplay.load_config(settings))
    kinds = [c["kind"] for c in chats]
    expected = {"weather": "reward 1.00 against the example's", "two_calls": "call_left_out", "no_tool": "needless_call"}
    assert [pair.why for pair in pairs] == [expected[k] for k, c in zip(kinds, chats) if k != "no_tool" or c["tools"]]
    assert set(kinds) == set(expected)


def test_a_pair_cut_where_it_parts():
    """parting = 1: rows end after the token where the answers part (it decides between call and talk), and only that token is trained."""
    prompt, talk, call = [1, 2, 3], [7, 8, 9, 10], [7, 5, 6, 10]
    pair = dpo.Pair((prompt + talk, [0] * 3 + [1] * 4), (prompt + call, [0] * 3 + [1] * 4), "why")
    assert dpo.parted(pair, 0) == pair
    assert dpo.parted(pair, 1) == dpo.Pair(([1, 2, 3, 7, 8], [0, 0, 0, 0, 1]), ([1, 2, 3, 7, 5], [0, 0, 0, 0, 1]), "why")
    assert dpo.parted(pair, 2) == dpo.Pair(([1, 2, 3, 7, 8, 9], [0, 0, 0, 0, 1, 1]), ([1, 2, 3, 7, 5, 6], [0, 0, 0, 0, 1, 1]), "why")
    longer = dpo.Pair((prompt + talk, [0] * 3 + [1] * 4), (prompt + talk + [4], [0] * 3 + [1] * 5), "endless")
    given = pair._replace(why=dpo.GIVEN)
    assert dpo.parted(given, 1) == given  # a given pair stays whole: somebody may have preferred any part of it
    assert dpo.parted(longer, 1) == longer  # after the parting, the first answer has no token left to prefer


@pytest.mark.parametrize("rejected, inside", [
    ([("calculator", "2 + 4")], True), ([("calculator", "2 - 3"), ("search", "2")], True), ([("search", "2 + 3")], False),
    ([("calculator", "2 + 3"), ("search", "2")], False), ([], False)])
def test_answers_that_part_inside_arguments_say_nothing_of_the_decision(rejected, inside, monkeypatch):
    """`parting` prefers the token where two answers part. Inside arguments it is an operator, although the fault is one call too many."""
    tok = tokenizer()
    chat = {"messages": [{"role": "user", "content": "2 and 3?"}], "tools": ["calculator", "search"]}
    keys = {"calculator": "expression", "search": "query"}
    written = lambda calls: {**chat, "messages": [*chat["messages"], {"role": "assistant", "content": "" if calls else "5", "tool_calls": [  # noqa: E731
        {"name": name, "arguments": {keys[name]: text}} for name, text in calls]}]}
    pair = dpo.Pair(*(data.encode(written(calls), tok) for calls in ([("calculator", "2 + 3")], rejected)), "why")
    assert dpo.part_in_arguments(pair, tok) is inside
    # in sampling, a faulty copy of the example then replaces the pair
    ids, mask = pair.rejected
    start = mask.index(1)
    episode = toolplay.Episode(ids=ids, mask=mask, logp=[0.0] * len(ids), prompt=start)
    monkeypatch.setattr(toolplay, "rollout", lambda *args, **kwargs: [episode])
    monkeypatch.setattr(ppo, "score", lambda *args: (-1.0, {}))
    c = toolplay.load_config({"method": "dpo", "pairs": "both", "chosen": "gold", "samples": 1, "max_tokens": 9000, "parting": 1,
                              "faults": ["call_too_many"]})
    whys = [made.why for made in dpo.sampled_pairs(None, tok, [written([("calculator", "2 + 3")])], c)]
    assert whys == (["call_too_many"] if inside else ["reward -1.00 against the example's"])


def test_faults_of_the_policy_against_the_examples_own_turn(tmp_path, monkeypatch):
    """chosen: gold makes pairs only of faulty samples; both answers have the same prompt ids; the chosen one ends after its first turn."""
    tok = tokenizer()
    monkeypatch.setattr(toolplay, "load_model", lambda name, device="cpu": (model("llama"), tok))
    seen = []
    # the first three prompts have no fault
    monkeypatch.setattr(ppo, "score", lambda case, episode, weights: (seen.append(case) or float(len(seen) <= 6) * 2, {}))
    c = config(tmp_path, pairs="sampled", chosen="gold", examples=6, eval_examples=0, samples=2, max_new_tokens=6, max_turns=1,
               mix={"arithmetic": 1}, min_best=2.0, min_gap=0.5,
               reward_weights={"right_answer": 0.0})
    train(c)
    pairs, _ = json.loads((tmp_path / "run" / "pairs.json").read_text())
    assert len(pairs) == 3
    golds = [evaluation.as_case(x) for x in data.conversations(c, "train", tok)]
    for (chosen, rejected, why), case in zip(pairs, golds[3:]):
        start = chosen[1].index(1)
        assert chosen[0][:start] == rejected[0][:start] and rejected[1][start] == 1
        assert parse_calls(tok.decode(chosen[0][start:]))[0] == list(case.calls)
        assert [i for i, m in zip(*chosen) if m][-1] == data.end_of_turn(tok)
        assert why == "reward 0.00 against the example's"


@pytest.mark.parametrize("fault", ["typo", 1, ["malformed"]])
def test_a_fault_that_is_none_is_one_line(tmp_path, fault):
    with pytest.raises(UserError, match=rf"faults: {re.escape(repr(fault))} is none of wrong_tool, malformed"):
        train(config(tmp_path, faults=["wrong_tool", fault]))


def test_faults_that_apply_nowhere_are_one_line(tmp_path):
    with pytest.raises(UserError, match="none of call_left_out applies to any of the 16"):
        train(config(tmp_path, faults=["call_left_out"], mix={"no_tool": 1}, eval_examples=0))


def test_conversations_without_an_answer_make_no_pair():
    asked = {"messages": [{"role": "user", "content": "Hi"}], "tools": ["calculator"]}
    greeted = {"messages": [{"role": "assistant", "content": "Hello!"}, *asked["messages"], {"role": "assistant", "content": "Hi."}],
               "tools": ["calculator"]}
    alone = {"messages": [{"role": "system", "content": "Be kind."}, {"role": "assistant", "content": "Yes."}], "tools": ["calculator"]}
    assert dpo.corrupted_pairs([asked, greeted, alone], tokenizer()) == []


def test_calls_without_a_list_of_tools():
    call = {"role": "assistant", "content": "", "tool_calls": [{"name": "calculator", "arguments": {"expression": "2+2"}}]}
    bare = {"messages": [{"role": "user", "content": "2+2"}, call], "tools": []}
    assert len(dpo.corrupted_pairs([bare] * 12, tokenizer())) == 12


def test_bad_lines_of_prompts_are_skipped_by_number(tmp_path, capsys):
    user, call = {"role": "user", "content": "2+2"}, {"role": "assistant", "content": "",
                                                      "tool_calls": [{"name": "nothing", "arguments": {}}]}
    lines = [{"messages": [user, call]},
             {"messages": [user, {**call, "tool_calls": [{"name": "calculator", "arguments": {"expression": "2+2"}}]}]}]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    c = config(tmp_path, source="jsonl", path=str(tmp_path / "c.jsonl"), pairs="both")
    prompts = dpo.prompts_of(c, "train", tokenizer())
    # the line names no tools
    assert len(prompts) == 1 and [tool.name for tool in prompts[0]["tools"]] == list(BUILTIN) and evaluation.as_case(prompts[0]).calls
    assert "line 1: the expected call names tool 'nothing'" in capsys.readouterr().err


@pytest.mark.parametrize("argv", [["0"], ["-1"], ["1000001"], ["3", "4"], ["a.json", "b.json"]])
def test_show_says_what_it_takes(argv, capsys):
    with pytest.raises(SystemExit):
        dpo.main(["--show", *argv])
    assert "1 to 1000" in capsys.readouterr().err


def test_show_of_a_model_without_chatml(monkeypatch, capsys):
    net, other = toolplay.load_model("tiny")
    other.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}<e>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    monkeypatch.setattr(toolplay, "load_model", lambda *_: (net, other))
    dpo.show(2, toolplay.load_config({"method": "dpo", "model": "tiny", "examples": 3, "max_tokens": 4000}))
    assert "prompt" in (out := capsys.readouterr().out) and "Evaluate" not in out and "Call a tool only" not in out


def test_a_file_may_hold_pairs_and_conversations(tmp_path):
    gold = data.generate("train", 2, 0, {"weather": 1})
    lines = [{"prompt": "2+2", "chosen": "4", "rejected": "5"}, *({"messages": c["messages"], "tools": c["tools"]} for c in gold)]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    pairs, _ = dpo.datasets(config(tmp_path, source="jsonl", path=str(tmp_path / "p.jsonl")), tokenizer())
    assert [pair.why for pair in pairs][0] == "given" and len(pairs) == 3
    assert set(p.why for p in pairs[1:]) <= set(dpo.CORRUPTIONS)


def test_given_pairs_are_read_where_others_are_sampled(tmp_path, capsys):
    model, tok = toolplay.load_model("tiny")
    gold = data.generate("train", 2, 0, {"weather": 1})
    lines = [{"prompt": "2+2", "chosen": "4", "rejected": "5"}, *({"messages": c["messages"], "tools": c["tools"]} for c in gold),
             {"prompt": "2+2", "chosen": "4"}]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    c = config(tmp_path, source="jsonl", path=str(tmp_path / "p.jsonl"), pairs="both", max_new_tokens=4, samples=2)
    read = dpo.prompts_of(c, "train", tok)
    assert "line 4: a pair is an object" in capsys.readouterr().err
    assert [pair.why for pair in dpo.sampled_pairs(model, tok, read, c)][0] == "given" and len(read) == 3
    assert [pair.why for pair in dpo.sampled_pairs(model, tok, read[:1], c)] == ["given"]


def test_a_turn_that_is_not_to_be_learned_is_no_gold_answer():
    """With OpenAI's "weight": 0 the chosen side would have no trained token, and only the rejected side would be learned from."""
    call = {"role": "assistant", "content": "", "tool_calls": [{"name": "calculator", "arguments": {"expression": "2 + 2"}}]}
    messages = [{"role": "user", "content": "2 + 2?"}, {**call, "weight": 0}, {"role": "tool", "content": '{"result": 4}'},
                {"role": "assistant", "content": "4."}]
    gold = data.check_conversation({"messages": messages, "tools": ["calculator", "weather"]})
    tok = toolplay.load_model("tiny")[1]
    found = {name: dpo.corrupted_pairs([gold], tok, 0, "signature", [name]) for name in dpo.CORRUPTIONS}
    assert {name for name, pairs in found.items() if pairs} == {"ignores_result", "endless"}  # both change only the last turn
    given = dpo.read_pair({"prompt": "2 + 2?", "chosen": messages[1:], "rejected": "5.", "tools": ["calculator"]}, tok)
    assert sum(given.chosen[1]) == sum(given.rejected[1])  # "4." and "5.", each with its end-of-turn token


def test_an_answer_without_a_token_is_no_rejected_one(monkeypatch):
    """A prompt as long as the context leaves no room for an answer."""
    net, tok = toolplay.load_model("tiny")
    c = toolplay.load_config({"method": "dpo", "model": "tiny", "pairs": "sampled", "chosen": "gold", "max_turns": 1, "min_best": 1.0,
                              "max_tokens": 9000, "max_new_tokens": 3,
                              "reward_weights": {"right_tool": 1.0, "right_answer": 0.0}}, [])
    long = {"messages": [{"role": "user", "content": "a " * 2200}, {"role": "assistant", "content": "ok"}], "tools": []}
    for length, pairs in ((2200, 0), (20, 1)):
        talk = data.check_conversation({**long, "messages": [{"role": "user", "content": "a " * length}, long["messages"][1]]})
        assert len(dpo.sampled_pairs(net, tok, [talk], c)) == pairs


def test_an_argument_that_may_be_missing_is_no_fault():
    tool = {"name": "f", "description": "",
            "parameters": {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}, "required": ["b"]}}
    chat = lambda **arguments: {"tools": [tool], "messages": [{"role": "user", "content": "go"}, {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": arguments}]}]}  # noqa: E731
    assert dpo.missing_argument(chat(a=1, b=2), None)[-1]["tool_calls"][0]["arguments"] == {"a": 1}
    assert dpo.missing_argument(chat(a=1), None) is None


def test_a_turn_of_the_prompt_is_no_answer_to_keep_up():
    model, tok = toolplay.load_model("tiny")
    greeted = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "Hello!"},
                            {"role": "user", "content": "2+2?"}], "tools": ["calculator"],
               "expected": {"calls": [{"name": "calculator", "arguments": {"expression": "2+2"}}]}}
    c = toolplay.load_config({"method": "dpo", "model": "tiny", "pairs": "both", "samples": 2, "max_new_tokens": 2, "max_turns": 1,
                              "min_gap": 1e9, "reward_weights": {"right_answer": 0.0, "right_tool": 1.0}})
    assert dpo.sampled_pairs(model, tok, [greeted], c) == []


@pytest.mark.parametrize("settings, message", [({"pairs": "sampled", "samples": 1}, "at least 2 are needed"),
                                               ({"pairs": "sampled", "chosen": "gold", "max_turns": 3}, "set max_turns = 1")])
def test_settings_that_fit_each_other_badly(settings, message):
    with pytest.raises(UserError, match=message):
        dpo.check_settings(toolplay.load_config({"method": "dpo", **settings}))


def test_gold_against_a_single_sample():
    dpo.check_settings(toolplay.load_config({"method": "dpo", "pairs": "sampled", "chosen": "gold", "samples": 1, "max_turns": 1,
                                             "reward_weights": {"right_answer": 0.0}}))


def test_a_new_variant_is_one_function():
    @dpo.variant(dpo.FREE)
    def margin(chosen, rejected, beta, label_smoothing):
        return -(chosen - rejected)
    try:
        loss, _ = dpo.dpo_loss(torch.tensor([1.0]), torch.tensor([3.0]), None, None, variant="margin")
        assert loss == 2 and toolplay.load_config({"method": "dpo", "variant": "margin"}).variant == "margin"
    finally:
        del dpo.VARIANTS["margin"]
        dpo.FREE.remove("margin")


@pytest.mark.parametrize("arguments", [{"seats": 4}, {"ok": True}, {"ratio": 0.5}, {"days": ["Monday", "Friday"]}])
def test_a_wrong_argument_of_any_type(arguments):
    call = {"name": "book", "arguments": arguments}
    worse = dpo.wrong_argument({"messages": [{"role": "user", "content": "Book it."},
                                             {"role": "assistant", "content": "", "tool_calls": [call]}]}, random.Random(0))
    [changed] = worse[-1]["tool_calls"]
    assert changed["arguments"] != arguments and changed["arguments"].keys() == arguments.keys()
    assert [type(x) for x in changed["arguments"].values()] == [type(x) for x in arguments.values()]


@pytest.mark.parametrize("more", ["both", "corrupted"])
def test_a_pair_that_holds_messages_too_is_a_pair(tmp_path, more):
    """UltraFeedback's lines have "messages" beside prompt, chosen and rejected."""
    line = {"prompt": "2+2", **{side: [{"role": "user", "content": "2+2"}, {"role": "assistant", "content": side}]
                                for side in ("chosen", "rejected")}}
    line["messages"] = line["chosen"]
    (tmp_path / "p.jsonl").write_text(json.dumps(line) + "\n")
    config = toolplay.load_config({"method": "dpo", "model": "tiny", "source": "jsonl", "path": str(tmp_path / "p.jsonl"), "pairs": more})
    made = dpo.datasets(config, tokenizer())[0] if more == "corrupted" else dpo.prompts_of(config, "train", tokenizer())
    assert [pair.why for pair in made] == [dpo.GIVEN]


def test_half_precision_is_compared_in_fp32():
    logps = [torch.tensor(x) for x in ([-760.0, -30.0], [-761.0, -31.0], [-750.0, -30.5], [-760.5, -30.0])]
    for ours, exact in zip(dpo.dpo_loss(*(x.half() for x in logps))[1].items(),
                           dpo.dpo_loss(*(x.half().float() for x in logps))[1].items()):
        assert ours == exact
