"""
dpo_vs_trl.py - our DPO step against TRL's DPOTrainer: the same pairs, the same losses, less time, less memory

Both sides train the same LoRA adapter of smollm2-135m on the same pairs (a gold conversation and its copy with one
fault, dpo.corrupted_pairs of data.generate("train", seed 0)) in the same order, in fp32, with the same AdamW, learning
rate, clipping and loss (sigmoid, beta 0.1, mean over a batch of 8). The reference is the adapter that training starts
from. The trained tokens are those of the last turn, which is the whole answer of a pair, so that TRL's completion mask
equals ours.

Fairness. TRL computes its reference in every step (its default). We compute ours once, before training, and add an
equal part of that time to each of our steps, as if there were only one pass over the data. TRL runs twice: "plain" (no
gradient checkpointing, its fastest setting) and "checkpointing" (its default). The first two steps are warm-up.
common.py says how memory and FLOPs are counted, and what to install.

    .venv/bin/python benchmarks/dpo_vs_trl.py --out benchmarks/dpo_vs_trl.json
"""
import json
import sys
import time

import common

TOOLS = ["calculator", "weather", "search"]
LR, BETA = 1e-4, 0.1


def prepare(folder, options):
    """Write pairs.json: the two rows of every pair, in order."""
    import data
    import dpo
    tokenizer = common.prepare_model(folder, options)
    count = options.steps * options.batch_size
    gold = [{**c, "tools": TOOLS} for c in data.generate("train", 2 * count + 100, options.seed)
            if c["kind"] != "missing_tool"]
    pairs = [pair[:2] for pair in dpo.corrupted_pairs(gold, tokenizer, options.seed)][:count]
    if len(pairs) < count:
        sys.exit(f"only {len(pairs)} pairs for {options.steps} steps of {options.batch_size}")
    last = lambda mask: len(mask) - mask[::-1].index(1)  # noqa: E731  (the newline after the end is not trained)
    pairs = [[(ids[:last(mask)], mask[:last(mask)]) for ids, mask in pair] for pair in pairs]
    for _, mask in (row for pair in pairs for row in pair):
        assert mask[mask.index(1):] == [1] * (len(mask) - mask.index(1)), "a tool result among the trained tokens"
    (folder / "pairs.json").write_text(json.dumps(pairs))
    return {"examples": len(pairs), "tokens": sum(len(ids) for pair in pairs for ids, _ in pair)}


def ours(folder, options):
    """The loop of dpo.train without its run folder, evaluation and log."""
    import torch

    import dpo
    import toolplay
    from sft import pad_mask
    config = toolplay.load_config({"method": "dpo", "lr": LR, "schedule": "cosine", "warmup": 0,
                                   "max_grad_norm": common.MAX_NORM,
                                   "batch_size": options.batch_size, "precision": "fp32", "device": "cpu"})
    pairs = json.loads((folder / "pairs.json").read_text())
    model = common.our_model(folder)
    trainer = toolplay.Trainer(config, {n: p for n, p in model.named_parameters() if p.requires_grad}, options.steps)

    def answers(group):
        rows = [row for pair in group for row in pair[:2]]
        logp = toolplay.token_logprobs(model, rows, budget=None if torch.is_grad_enabled() else config.micro_tokens)
        return dpo.sequence_logp(logp, pad_mask(rows)).reshape(-1, 2).T
    begin = time.perf_counter()
    with torch.no_grad():
        reference = torch.cat([answers(pairs[i:i + 64]).T for i in range(0, len(pairs), 64)]).tolist()
    reference_s = time.perf_counter() - begin
    units = [(*pair, *ref) for pair, ref in zip(pairs, reference)]

    def loss(group):
        return dpo.dpo_loss(*answers(group), *torch.tensor([unit[2:] for unit in group], dtype=torch.float64).T, BETA)

    batches = [units[i:i + options.batch_size] for i in range(0, len(units), options.batch_size)]
    losses, clock = [], [time.perf_counter()]
    for batch in batches:
        losses.append(toolplay.train_step(trainer, batch, loss, rows=lambda unit: list(unit[:2]))["loss"])
        clock.append(time.perf_counter())
        common.tell(losses, clock)
    out = common.with_share_of_peak(common.measured(losses, clock), model,
                                    [[list(unit[:2]) for unit in batch] for batch in batches], config.micro_tokens,
                                    options.seed)
    return {**out, "seconds": [s + reference_s / len(batches) for s in out["seconds"]], "reference_s": reference_s}


def trl(folder, options, checkpointing):
    """TRL's DPOTrainer on tokenised pairs."""
    model, tokenizer = common.peer_model(folder)
    import trl
    from datasets import Dataset
    pairs = json.loads((folder / "pairs.json").read_text())
    columns = {"prompt_ids": [], "chosen_ids": [], "rejected_ids": []}
    for (chosen, mask), (rejected, _) in pairs:
        start = mask.index(1)
        for name, ids in (("prompt_ids", chosen[:start]), ("chosen_ids", chosen[start:]),
                          ("rejected_ids", rejected[start:])):
            columns[name].append(ids)
    losses, clock = [], []
    Trainer, callback = common.recorded(trl.DPOTrainer, losses, clock)

    class Given(Trainer):
        def _prepare_dataset(self, dataset, *args):
            return dataset  # it is tokenised already
    settings = trl.DPOConfig(**common.peer_settings(folder, options, LR, checkpointing), beta=BETA,
                             loss_type=["sigmoid"])
    Given(model=model, args=settings, train_dataset=Dataset.from_dict(columns), callbacks=[callback],
          processing_class=tokenizer).train()
    return {**common.measured(losses, clock), "versions": common.peer_versions()}


if __name__ == "__main__":
    common.main_against_trl(__file__, "pairs", prepare, ours, trl, steps=12, batch_size=8)
