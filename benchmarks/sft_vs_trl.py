"""
sft_vs_trl.py - our SFT step against TRL's SFTTrainer: the same numbers, less time, less memory

Both sides train the same LoRA adapter (r 16, alpha 32, all linear layers) of smollm2-135m on the same token ids and
masks in the same order, in fp32, with the same AdamW, learning rate, clipping and loss (mean over the trained tokens of
a batch of 16). The workload is data.generate("train", seed 0) with the same three tools offered everywhere.

Fairness. TRL pads to the longest row of the batch (its default) and runs twice: "plain" is without gradient
checkpointing, which is its fastest setting; "checkpointing" is with it, which is its default and needs the least
memory. Ours has one setting; compare it with both rows. Seconds are measured from the end of a step to the end of the
next step, and include all that a trainer does between steps. The first two steps are warm-up. common.py says how memory
and FLOPs are counted, and what to install.

    .venv/bin/python benchmarks/sft_vs_trl.py --out benchmarks/sft_vs_trl.json
"""
import json
import sys
import time

import common

TOOLS = ["calculator", "weather", "search"]
LR = 1e-3  # cosine to zero without warm-up: both trainers then use the same formula


def prepare(folder, options):
    """Write rows.json: ids and mask of every example, in order."""
    import data
    tokenizer = common.prepare_model(folder, options)
    count = options.steps * options.batch_size
    # A "missing_tool" example is about a tool that is not offered; here all three tools are offered.
    kept = [c for c in data.generate("train", 2 * count + 100, options.seed) if c["kind"] != "missing_tool"][:count]
    rows = [data.encode({**c, "tools": TOOLS}, tokenizer) for c in kept]
    if len(rows) < count:
        sys.exit(f"only {len(rows)} examples for {options.steps} steps of {options.batch_size}")
    (folder / "rows.json").write_text(json.dumps(rows))
    return {"examples": len(rows), "tokens": sum(len(ids) for ids, _ in rows),
            "trained_tokens": sum(sum(mask) for _, mask in rows)}


def ours(folder, options):
    """The loop of sft.train without its run folder, evaluation and log."""
    import sft
    import toolplay
    config = toolplay.load_config({"method": "sft", "lr": LR, "schedule": "cosine", "warmup": 0,
                                   "max_grad_norm": common.MAX_NORM,
                                   "batch_size": options.batch_size, "precision": "fp32", "device": "cpu"})
    rows = json.loads((folder / "rows.json").read_text())
    model = common.our_model(folder)
    trainer = toolplay.Trainer(config, {n: p for n, p in model.named_parameters() if p.requires_grad}, options.steps)
    model.train()

    def loss(batch):
        return sft.sft_loss(toolplay.token_logprobs(model, batch), sft.pad_mask(batch))

    batches = [rows[i:i + options.batch_size] for i in range(0, len(rows), options.batch_size)]
    losses, clock = [], [time.perf_counter()]
    for batch in batches:
        losses.append(toolplay.train_step(trainer, batch, loss, size=lambda row: sum(row[1]))["loss"])
        clock.append(time.perf_counter())
        common.tell(losses, clock)
    return common.with_share_of_peak(common.measured(losses, clock), model,
                                     [[[row] for row in batch] for batch in batches], config.micro_tokens, options.seed)


def trl(folder, options, checkpointing):
    """TRL's SFTTrainer on tokenised rows. It uses the given `labels`: -100 where the mask is 0."""
    model, tokenizer = common.peer_model(folder)
    import trl
    from datasets import Dataset
    rows = json.loads((folder / "rows.json").read_text())
    dataset = Dataset.from_dict({"input_ids": [ids for ids, _ in rows],
                                 "labels": [[i if m else -100 for i, m in zip(ids, mask)] for ids, mask in rows]})
    losses, clock = [], []
    Trainer, callback = common.recorded(trl.SFTTrainer, losses, clock)
    settings = trl.SFTConfig(**common.peer_settings(folder, options, LR, checkpointing), packing=False,
                             padding_free=False, shuffle_dataset=False)
    Trainer(model, settings, train_dataset=dataset, callbacks=[callback], processing_class=tokenizer).train()
    return {**common.measured(losses, clock), "versions": common.peer_versions()}


if __name__ == "__main__":
    common.main_against_trl(__file__, "examples", prepare, ours, trl, steps=12, batch_size=16)
