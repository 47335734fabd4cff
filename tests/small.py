"""What several tests share: small random models, rows to feed them, and a process that forks scenarios."""
import atexit
import functools
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import toolplay  # noqa: E402
from toolplay import load_model  # noqa: E402  (the real function: tests replace toolplay.load_model)

VOCAB = 258  # vocabulary size of the byte-level tokenizer of the model "tiny"


def sizes(**more):
    return dict(vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                initializer_range=0.25, tie_word_embeddings=False, bos_token_id=256, eos_token_id=257, pad_token_id=257, **more)


def model(name, seed=0):
    """A small random model in eval mode. Its weights are large, so its predictions are far from uniform."""
    import transformers as t
    t.utils.logging.set_verbosity_error()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if name == "llama":  # grouped-query attention: four query heads, two key heads
            made = t.LlamaForCausalLM(t.LlamaConfig(**sizes()))
        elif name == "qwen3":
            made = t.Qwen3ForCausalLM(t.Qwen3Config(**sizes(head_dim=16)))
        elif name == "gpt2":
            made = t.GPT2LMHeadModel(t.GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=1024,
                                                  initializer_range=0.25,
                                                  bos_token_id=256, eos_token_id=257))
        elif name == "mistral":  # each layer sees a window of eight tokens
            made = t.MistralForCausalLM(t.MistralConfig(**sizes(sliding_window=8)))
        elif name == "gemma3":  # one layer with a window, one without
            made = t.Gemma3ForCausalLM(t.Gemma3TextConfig(**sizes(head_dim=8, sliding_window=8,
                                                                  layer_types=["sliding_attention", "full_attention"])))
    return made.eval()


@functools.cache
def tokenizer():
    return load_model("tiny")[1]


def random_rows(seed, most=9, longest=24):
    """A random mix of fresh rows, extensions, prefixes, branches, duplicates and one-token rows, with random masks."""
    rng = random.Random(seed)
    fresh = lambda n: [rng.randrange(6) for _ in range(n)]  # noqa: E731  (few symbols, so rows also share prefixes by chance)
    rows = [fresh(rng.randint(2, longest))]
    for _ in range(rng.randint(most // 2, most - 1)):
        other, cut = rng.choice(rows), rng.randint(0, longest)
        rows.append(rng.choice([fresh(rng.randint(1, longest)), other + fresh(rng.randint(1, 5)), other[:cut + 1], other[:cut] + fresh(4),
                                list(other), fresh(1)]))
    rng.shuffle(rows)
    return [(ids, [int(rng.random() < 0.6) for _ in ids]) for ids in rows]


def one_by_one(model, rows, temperature=1.0):
    """The oracle: a plain forward for every row -> [(log-softmax of all logits [T, V])]."""
    out = []
    for ids, _ in rows:
        logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0] / temperature
        out.append(torch.log_softmax(logits, -1))
    return out


def gather(rows, log_p, of=lambda log_p, token: log_p[token]):
    """[B, T]: of(distribution that predicts the token, token) where the mask is 1, else 0."""
    width = max(len(ids) for ids, _ in rows)
    return torch.stack([torch.stack([of(p[t - 1], ids[t]) if 0 < t < len(ids) and mask[t] else p.new_zeros(()) for t in range(width)])
                        for (ids, mask), p in zip(rows, log_p)])


def close(a, b, rel):
    """Whether two lists of gradients agree: each difference is small relative to its gradient, or to all gradients where it should be 0."""
    whole = torch.cat([x.flatten() for x in b]).norm()
    return all((x - y).norm() <= rel * max(y.norm(), 1e-3 * whole) for x, y in zip(a, b))


class Zygote:
    """A fresh process that imports everything once and forks itself for each scenario.

    Importing torch and transformers takes seconds; forking a process that has computed nothing yet takes almost no time.
    The children are real processes: a test can kill them with -9 or run them as the ranks of a distributed run.
    """

    def __init__(self):
        self.process = subprocess.Popen([sys.executable, str(Path(__file__).with_name("zygote.py"))], stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, text=True)

    def start(self, scenario, ranks=1, timeout=60, **args):
        self.process.stdin.write(json.dumps({"scenario": scenario, "ranks": ranks, "timeout": timeout, "args": args}) + "\n")
        self.process.stdin.flush()

    def result(self):
        """-> (exit codes: minus the signal if a signal ended the process, None if it hung; what the processes printed to stderr)."""
        answer = json.loads(self.process.stdout.readline())
        return answer["codes"], answer["stderr"]

    def run(self, scenario, **kwargs):
        self.start(scenario, **kwargs)
        return self.result()

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def killed_then_resumed(config, place, nth, uninterrupted, files):
    """Train; kill -9 when a place is reached for the nth time; resume: the files must equal those of the uninterrupted run."""
    codes, stderr = zygote().run("train", config=config, place=place, nth=nth)
    assert codes == [-9], stderr
    codes, stderr = zygote().run("train", config=config, resume=True)
    assert codes == [0], stderr
    for file in files:
        assert (uninterrupted / file).read_bytes() == (Path(config["run_dir"]) / file).read_bytes(), file


def recorded_gradients(monkeypatch):
    """A list that receives the whole gradient of every following training step."""
    gradients, clip = [], torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_",
                        lambda ps, *a: (gradients.append(torch.cat([p.grad.flatten() for p in ps if p.grad is not None])), clip(ps, *a))[1])
    return gradients


@functools.cache
def zygote():
    """The one Zygote that all tests share."""
    made = Zygote()
    atexit.register(made.close)
    return made
