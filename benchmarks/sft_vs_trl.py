"""
sft_vs_trl.py - our SFT step against TRL's SFTTrainer: the same numbers, less time, less memory

Both sides train the same LoRA adapter (r 16, alpha 32, all linear layers) of smollm2-135m on the same token ids and masks
in the same order, in fp32, with the same AdamW, step size, clipping and loss (mean over the trained tokens of a batch of 16).
The workload is data.generate("train", seed 0) with the same three tools offered everywhere. lora_B starts at small
random numbers instead of zero, so that a mistake in either half of the adapter shows in the first loss already.

Fairness. Each side runs in a process of its own, one after the other, never at once. TRL pads to the longest row of the
batch (its default) and runs twice: "plain" without gradient checkpointing, which is its fastest, and "checkpointing"
with it, which is its default and its smallest memory. Ours has one setting; read it against both rows.
Seconds are measured from the end of a step to the end of the next, all that a trainer does between included. The first
two steps are warm-up. Memory is ru_maxrss of the process; "over model" is that peak less the resident size just after model
and adapter were loaded (Linux only).

FLOPs of our step, for the share of the machine's matmul peak. N trie nodes, n of them predict a trained token (only
there the head runs). A product of [N, in] with [in, out] is 2 N in out.
    frozen linear layers    2 N in out forward, the same backward (gradient of the input; frozen weights have none)
    LoRA, per layer         2 N r (in + out) forward, twice that backward (gradients of A and B, and of the input)
    head                    2 n D V forward, the same backward
Left out: the input gradient of the first block's q, k and v (embeddings are frozen, nobody asks for it); attention, norms,
the softmax and the optimizer (so the share is slightly too low, never too high). The peak is the best of several
square fp32 torch.mm in the same process, after training.

TRL and PEFT are extras for this script alone. torch and transformers stay as they are with exactly this line:

    .venv/bin/pip install --no-deps trl==1.16.0 peft==0.21.2 accelerate==1.15.0 datasets==5.2.0 dill==0.4.1 multiprocess==0.70.19 pandas==3.1.1 pyarrow==26.0.1 python-dateutil==4.0.0 tzdata==2026.6 xxhash==4.1.0 psutil==7.2.2 requests==2.34.2 charset-normalizer==3.5.2 urllib3==2.8.0

    .venv/bin/python benchmarks/sft_vs_trl.py --out benchmarks/sft_vs_trl.json

--peer-python names another interpreter for TRL's side, which needs nothing of this project.
"""
import argparse
import datetime
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

# The parent process imports nothing heavy: a child's ru_maxrss starts at the size of the process that started it.
ROOT = Path(__file__).resolve().parents[1]
TOOLS = ["calculator", "weather", "search"]
WARM_UP, COMPARED, TOLERANCE = 2, 10, 1e-3
R, ALPHA, LR, MAX_NORM = 16, 32, 1e-3, 1.0  # step size: cosine to zero without warm-up, where both trainers' formulas agree


# --------------------------------------------------------------------------- 1. what both sides read

def prepare(folder, options):
    """Write rows.json (ids and mask of every example, in order), base/ (the model) and adapter/ (PEFT's layout)."""
    import torch

    import data
    import lora
    import toolplay
    model, tokenizer = toolplay.load_model(options.model)
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    lora.add_lora(model, ["all-linear"], R, ALPHA, seed=options.seed)
    generator = torch.Generator().manual_seed(options.seed)
    for name, tensor in lora.lora_state(model).items():
        if name.endswith("lora_B"):
            tensor.normal_(0, 0.01, generator=generator)
    lora.save_adapter(model, folder / "adapter", str(folder / "base"))
    count = options.steps * options.batch_size
    # A "missing_tool" example is about a tool that is not offered; here all three are.
    kept = [c for c in data.generate("train", 2 * count + 100, options.seed) if c["kind"] != "missing_tool"][:count]
    rows = [data.encode({**c, "tools": TOOLS}, tokenizer) for c in kept]
    if len(rows) < count:
        sys.exit(f"only {len(rows)} examples for {options.steps} steps of {options.batch_size}")
    (folder / "rows.json").write_text(json.dumps(rows))
    return {"examples": len(rows), "tokens": sum(len(ids) for ids, _ in rows), "trained_tokens": sum(sum(mask) for _, mask in rows)}


def resident_mib():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def measured(losses, clock, loaded):
    """clock: the time at the start and after every step."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    return {"losses": losses, "seconds": [b - a for a, b in zip(clock, clock[1:])], "peak_mib": peak, "over_model_mib": peak - loaded}


# --------------------------------------------------------------------------- 2. the two sides

def ours(folder, options):
    """The loop of sft.train without its run folder, evaluation and log."""
    import lora
    import sft
    import toolplay
    config = toolplay.load_config({"method": "sft", "lr": LR, "schedule": "cosine", "warmup": 0, "max_grad_norm": MAX_NORM,
                                   "batch_size": options.batch_size, "precision": "fp32", "device": "cpu"})
    rows = json.loads((folder / "rows.json").read_text())
    model, _ = toolplay.load_model(str(folder / "base"))
    lora.load_adapter(model, folder / "adapter")
    loaded = resident_mib()
    trainer = toolplay.Trainer(config, {n: p for n, p in model.named_parameters() if p.requires_grad}, options.steps)
    model.train()

    def loss(batch):
        return sft.sft_loss(toolplay.token_logprobs(model, batch), sft.pad_mask(batch))

    batches = [rows[i:i + options.batch_size] for i in range(0, len(rows), options.batch_size)]
    losses, clock = [], [time.perf_counter()]
    for batch in batches:
        losses.append(toolplay.train_step(trainer, batch, loss, size=lambda row: sum(row[1]))["loss"])
        clock.append(time.perf_counter())
        print(f"  step {len(losses)}: loss {losses[-1]:.6f}, {clock[-1] - clock[-2]:.2f} s", file=sys.stderr)
    out = measured(losses, clock, loaded)
    counts = [count(model, batch, config.micro_tokens) for batch in batches]
    peak = matmul_peak()
    shares = [c["flops"] / s / peak for c, s in zip(counts, out["seconds"])]
    return {**out, "nodes": [c["nodes"] for c in counts], "gflop": [c["flops"] / 1e9 for c in counts],
            "matmul_peak_gflops": peak / 1e9, "share_of_peak": shares, "provenance": toolplay.provenance(options.seed)}


def count(model, batch, budget):
    """{"nodes": N, "flops"} of one step: forward and backward as the docstring of this file counts them."""
    import lora
    import toolplay
    nodes = predicting = 0
    for group in toolplay.micro_batches([[row] for row in batch], budget):
        trie = toolplay.Trie([list(batch[i][0]) for i in group])
        nodes += len(trie)
        predicting += len({trie.path[b][t - 1] for b, i in enumerate(group) for t in range(1, len(batch[i][0])) if batch[i][1][t]})
    flops = 4 * predicting * model.get_output_embeddings().weight.numel()
    for name, layer in lora.lora_layers(model).items():
        first = ".layers.0.self_attn." in name and not name.endswith("o_proj")  # no input gradient there
        flops += 2 * nodes * layer.base.weight.numel() * (1 if first else 2)
        flops += 6 * nodes * (layer.lora_A.numel() + layer.lora_B.numel()) - first * 2 * nodes * layer.lora_A.numel()
    return {"nodes": nodes, "flops": flops}


def matmul_peak():
    """Best FLOP/s of square fp32 matrix products."""
    import torch
    best = 0.0
    for n in (1024, 2048, 4096):
        a, b = torch.randn(n, n), torch.randn(n, n)
        for _ in range(5):
            start = time.perf_counter()
            a @ b
            best = max(best, 2 * n**3 / (time.perf_counter() - start))
    return best


def trl(folder, options, checkpointing):
    """TRL's SFTTrainer on tokenised rows. It takes `labels` as they are: -100 where the mask is 0."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    import accelerate
    import peft
    import torch
    import transformers
    import trl
    from datasets import Dataset
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(model, folder / "adapter", is_trainable=True)
    loaded = resident_mib()
    rows = json.loads((folder / "rows.json").read_text())
    dataset = Dataset.from_dict({"input_ids": [ids for ids, _ in rows],
                                 "labels": [[i if m else -100 for i, m in zip(ids, mask)] for ids, mask in rows]})
    losses, clock = [], []

    class Recorded(trl.SFTTrainer):
        def training_step(self, *args, **kwargs):
            loss = super().training_step(*args, **kwargs)
            losses.append(loss.item())
            return loss

    class Clock(transformers.TrainerCallback):
        def on_train_begin(self, *args, **kwargs):
            clock.append(time.perf_counter())

        def on_step_end(self, *args, **kwargs):
            clock.append(time.perf_counter())
            print(f"  step {len(losses)}: loss {losses[-1]:.6f}, {clock[-1] - clock[-2]:.2f} s", file=sys.stderr)

    settings = trl.SFTConfig(
        output_dir=str(folder / "trl"), max_steps=options.steps, per_device_train_batch_size=options.batch_size,
        gradient_accumulation_steps=1, learning_rate=LR, lr_scheduler_type="cosine", warmup_steps=0, weight_decay=0.0,
        adam_beta1=0.9, adam_beta2=0.999, adam_epsilon=1e-8, max_grad_norm=MAX_NORM, packing=False, padding_free=False,
        max_length=None, shuffle_dataset=False, train_sampling_strategy="sequential", gradient_checkpointing=checkpointing,
        bf16=False, fp16=False, use_cpu=True, seed=options.seed, dataloader_pin_memory=False,
        logging_strategy="no", save_strategy="no", eval_strategy="no", report_to="none", disable_tqdm=True)
    trainer = Recorded(model, settings, train_dataset=dataset, callbacks=[Clock()],
                       processing_class=transformers.AutoTokenizer.from_pretrained(folder / "base"))
    trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    trainer.train()
    versions = {m.__name__: m.__version__ for m in (trl, peft, accelerate, transformers, torch)}
    return {**measured(losses, clock, loaded), "versions": versions, "trained_parameters": trained, "threads": torch.get_num_threads()}


ROLES = {"prepare": prepare, "ours": ours, "trl plain": lambda f, o: trl(f, o, False), "trl checkpointing": lambda f, o: trl(f, o, True)}


# --------------------------------------------------------------------------- 3. the run

def median_speed(side, options):
    return options.batch_size / statistics.median(side["seconds"][WARM_UP:] or side["seconds"])


def cpu_name():
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((x.partition(":")[2].strip() for x in lines if x.startswith("model name")), platform.processor())


def report(sides, options, info):
    us, peers = sides["ours"], [name for name in sides if name.startswith("trl")]
    speed, n = median_speed(us, options), min(COMPARED, options.steps)
    first = WARM_UP if options.steps > WARM_UP else 0
    lines = [f"{'':<20}{'examples/s':>11}{'ratio':>8}{'peak MiB':>10}{'ratio':>8}{'over model MiB':>16}{'ratio':>8}{'max loss diff':>15}"]
    lines.append(f"{'toolplay':<20}{speed:>11.2f}{'':>8}{us['peak_mib']:>10.0f}{'':>8}{us['over_model_mib']:>16.0f}")
    summary = {"examples_per_s": {"ours": speed}, "speed_ratio": {}, "peak_ratio": {}, "over_model_ratio": {}, "max_loss_difference": {},
               "share_of_matmul_peak": statistics.median(us["share_of_peak"][first:])}
    for name in peers:
        side = sides[name]
        theirs = summary["examples_per_s"][name] = median_speed(side, options)
        ratio = summary["speed_ratio"][name] = speed / theirs
        peak = summary["peak_ratio"][name] = us["peak_mib"] / side["peak_mib"]
        over = summary["over_model_ratio"][name] = us["over_model_mib"] / side["over_model_mib"]
        difference = summary["max_loss_difference"][name] = max(abs(a - b) for a, b in zip(us["losses"][:n], side["losses"][:n]))
        lines.append(f"{name:<20}{theirs:>11.2f}{ratio:>7.2f}x{side['peak_mib']:>10.0f}{peak:>7.2f}x{side['over_model_mib']:>16.0f}{over:>7.2f}x{difference:>15.1e}")
    packages = {**us["provenance"]["packages"], **(sides[peers[0]]["versions"] if peers else {})}
    lines += [
        "",
        f"losses of the first {n} steps agree to {TOLERANCE}: " + ", ".join(f"{p}: {'yes' if d <= TOLERANCE else 'NO'}" for p, d in summary["max_loss_difference"].items()),
        f"our step: {statistics.median(us['gflop'][first:]):.0f} GFLOP on {statistics.median(us['nodes'][first:]):.0f} trie nodes, "
        f"{summary['share_of_matmul_peak']:.0%} of the measured fp32 matmul peak ({us['matmul_peak_gflops']:.0f} GFLOP/s)",
        f"{options.model}, batch {options.batch_size}, {options.steps} steps, first {first} are warm-up, {info['tokens'] / info['examples']:.0f} tokens an example; ratios: ours / theirs",
        f"seed {options.seed}, {datetime.date.today()}, {cpu_name()}, {us['provenance']['threads']} threads, commit {us['provenance']['git_commit']}",
        ", ".join(f"{k} {v}" for k, v in packages.items()),
    ]
    return "\n".join(lines), {**summary, "date": str(datetime.date.today()), "cpu": cpu_name(), "packages": packages}


def main(argv=None):
    parser = argparse.ArgumentParser(description="our SFT step against TRL's SFTTrainer")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--peers", default="plain,checkpointing", help="which TRL settings to run")
    parser.add_argument("--peer-python", default=sys.executable, help="interpreter that has trl")
    parser.add_argument("--out", help="also write everything to this JSON file")
    parser.add_argument("--role", choices=ROLES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.role:
        if not options.role.startswith("trl"):  # TRL's side uses nothing of this project
            sys.path.insert(0, str(ROOT))
        (options.folder / f"{options.role}.json").write_text(json.dumps(ROLES[options.role](options.folder, options)))
        return

    def run(role, folder, python=sys.executable):
        print(f"{role} ...", file=sys.stderr)
        given = [f"--{key}={getattr(options, key.replace('-', '_'))}" for key in ("steps", "batch-size", "seed", "model")]
        command = [python, str(Path(__file__).resolve()), f"--role={role}", f"--folder={folder}", *given]
        if subprocess.run(command).returncode:
            sys.exit(f"{role}: failed (see above)")
        return json.loads((folder / f"{role}.json").read_text())

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        info = run("prepare", folder)
        sides = {"ours": run("ours", folder)}
        for peer in filter(None, options.peers.split(",")):
            sides[f"trl {peer}"] = run(f"trl {peer}", folder, options.peer_python)
    text, summary = report(sides, options, info)
    print(text)
    if options.out:
        settings = {k: v for k, v in vars(options).items() if k in ("steps", "batch_size", "seed", "model")}
        Path(options.out).write_text(json.dumps({**summary, "settings": settings, "workload": info, "sides": sides}, indent=1) + "\n")


if __name__ == "__main__":
    main()
