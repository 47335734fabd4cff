"""
sft.py - supervised fine-tuning: imitate the conversations

The idea. Raise the probability of exactly the tokens that a good assistant would have produced: its calls, its answers
and its end-of-turn token. The assistant only reads the system prompt, the user messages and the tool results: this text
is context, and no loss is computed on it.

    L = - (1 / M)  sum_b sum_t  m[b,t] log p(x[b,t] | x[b,<t]),      M = sum_b sum_t m[b,t]                       (1)

This is the language-model loss of GPT (Radford et al. 2018, eq. 1) under a mask, as instruction tuning uses it (Wei et
al. 2022, arXiv:2109.01652). M counts the trained tokens of the whole optimizer step, however the step is split into
micro-batches or over machines: the mean of the micro-batches' means would give a token in a short answer more weight.

Departures: two weights; with weights of 1 the loss is (1). Two of the forty tokens of a call are decisions: the first
token, where the model either opens a call or begins to talk, and the first token of the tool's name. The other tokens
follow from these two or are copied. The two decisions are a twentieth of the terms in (1). With `decision_weight` w
they count w times, in the sum and in M, so that more of the gradient goes to what is hard to learn. The second weight:
half of the loss comes from words that could equally well be different ("That comes to 210."), and no model can predict
them. With `call_weight` w the other tokens of turns that call a tool count w times. The logged `loss` is also weighted;
`eval_loss` is always (1) itself. The log-probs come from a token trie (toolplay.py). The trie computes the long prompt
that all examples share only once (with `lora_dropout` the examples also share the prompt's dropout noise).

    python sft.py configs/sft_demo.json          the same as: python toolplay.py train configs/sft_demo.json
"""
from __future__ import annotations

import itertools
import sys
from dataclasses import dataclass
from typing import Annotated

import torch


@dataclass
class Config:
    """SFT's own keys; the shared keys are in toolplay.Config."""
    decision_weight: Annotated[float, "> 0"] = 1.0     # weight of the tokens that decide: call or talk, and which tool
    call_weight: Annotated[float, "> 0"] = 1.0         # weight of the other tokens of turns that call a tool
    keep_best: bool = True                             # keep the weights with the lowest evaluation loss; false: the
                                                       # last weights


def sft_loss(logp, mask):
    """Equation (1) as a sum.

    logp: [B, T] log-prob of each token given the tokens before it.
    mask: [B, T], 1 (or the token's weight) where the token is trained.
    -> (loss in nats, summed over trained tokens, {"tokens": their number, or the sum of their weights}). Divide the
    loss by "tokens" to get (1).
    """
    # sums are fp32; what is masked does not count, even if it is -inf
    logp = torch.where(mask.bool(), logp, 0).to(torch.promote_types(logp.dtype, torch.float32))
    mask = mask.to(logp.dtype)
    return -(logp * mask).sum(), {"tokens": mask.sum()}  # (1)


def train(run):
    # Imported here so that the loss works in a project that copies this file alone.
    import data
    import toolplay
    config = run.config

    # 1. data: rows (ids, mask)
    model, tokenizer = toolplay.prepare_model(config, run.device)
    train_rows, held_out = data.dataset(config, tokenizer)
    train_rows = weigh(train_rows, config.decision_weight, config.call_weight, before_name(tokenizer))
    batches = data.Batches(train_rows, config)

    # 2. model: the base weights are frozen, the adapters are trained (with lora_r = 0 every weight is trained)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}

    # 3. optimizer
    trainer = toolplay.Trainer(config, trained, batches.total)
    run.start(trainer, [train_rows, held_out, *toolplay.start_hashes(config)])

    def loss(rows):
        logp = toolplay.token_logprobs(model, rows, budget=None if torch.is_grad_enabled() else config.micro_tokens)
        return sft_loss(logp, pad_mask(rows, run.device))

    # 4. loop
    for step in run.steps(trainer, batches.total):
        model.train()
        batch = [train_rows[i] for i in batches(step)]
        info = toolplay.train_step(trainer, batch, loss, size=lambda row: sum(row[1]))
        info.pop("tokens")
        if held_out and (trainer.step == batches.total or config.eval_every and trainer.step % config.eval_every == 0):
            model.eval()
            with torch.no_grad(), trainer.autocast():
                total, sums = loss(held_out)
            info["eval_loss"] = float(total / sums["tokens"])
            if info["eval_loss"] < trainer.extra.get("best", float("inf")) or not config.keep_best:
                trainer.extra["best"] = info["eval_loss"]
                run.save_model(model, tokenizer)
        run.log(trainer.step, info, tokens=sum(len(ids) for ids, _ in batch))

    # 5. save
    # keep the last weights if there was no evaluation, no finite evaluation loss, or if the best weights are gone
    if "best" not in trainer.extra or not any((run.folder / name).is_dir() for name in ("adapter", "model")):
        run.save_model(model, tokenizer)
    run.finish()


def before_name(tokenizer):
    """The ids directly before a tool's name in a call. (Encoded alone, without the tag, they might begin with a
    space.)"""
    return tokenizer.encode('<tool_call>{"name": "', add_special_tokens=False)[1:]


def weigh(rows, decision, call, before_name):
    """Rows (ids, mask) -> rows (ids, weights), where a weight replaces each 1 of the mask. `decision`: the first token
    of every assistant turn, and the token after the ids `before_name`, which begins a tool's name. `call`: the other
    tokens of a turn that calls a tool. All other trained tokens keep 1."""
    n, out = len(before_name), []
    for ids, mask in rows:
        weights = []
        for trained, turn in itertools.groupby(range(len(mask)), key=mask.__getitem__):
            turn = list(turn)
            names = [t for t in turn if n and ids[max(0, t - n):t] == before_name]  # n = 0: the tag is one token
            weights += [0 if not trained else decision if t == turn[0] or t in names else call if names else 1
                        for t in turn]
        out.append((ids, weights))
    return out


def pad_mask(rows, device="cpu"):
    """The rows' masks (or weights) as one tensor [B, T]. The first token gets 0, because nothing predicts it."""
    width = max(len(ids) for ids, _ in rows)
    return torch.tensor([[0] + list(mask[1:]) + [0] * (width - len(mask)) for _, mask in rows], device=device)


def main(argv=None):
    import toolplay
    toolplay.main(["train", *(sys.argv[1:] if argv is None else argv)])


if __name__ == "__main__":
    main()
