"""
common.py - what the benchmarks share: one process per side, timing, memory, FLOPs and the machine's peak

Each side of a comparison is a function of (folder, options) and runs in a fresh process. The sides run one after the
other, never at the same time. The first role prepares what the other roles read. Memory is ru_maxrss of the process.

FLOPs of one of our training steps, for its share of the machine's matmul peak: there are N trie nodes, and n of them
predict a trained token (the head runs only on these n). A product of [N, in] with [in, out] costs 2 N in out.
    frozen linear layers    2 N in out forward, the same backward (gradient of the input; frozen weights have none)
    LoRA, per layer         2 N r (in + out) forward, twice that backward (gradients of A and B, and of the input)
    head                    2 n D V forward, the same backward
Not counted: the input gradient of the first block's q, k and v (embeddings are frozen, so it is not computed);
attention, norms, the softmax and the optimizer (so the share is slightly too low, never too high). The peak is the best
of several square fp32 torch.mm in the same process, after training.

Only these scripts need the peers' packages. Exactly this line leaves torch and transformers unchanged:

    .venv/bin/pip install --no-deps trl==1.16.0 peft==0.21.2 accelerate==1.15.0 datasets==5.2.0 dill==0.4.1 \
        multiprocess==0.70.19 pandas==3.1.1 pyarrow==26.0.1 python-dateutil==4.0.0 tzdata==2026.6 xxhash==4.1.0 \
        psutil==7.2.2 requests==2.34.2 charset-normalizer==3.5.2 urllib3==2.8.0
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

# The parent process imports nothing large: a child's ru_maxrss starts at the size of its parent.
ROOT = Path(__file__).resolve().parents[1]
WARM_UP, COMPARED = 2, 10
R, ALPHA, MAX_NORM = 16, 32, 1.0


def parser(description, **defaults):
    made = argparse.ArgumentParser(description=description)
    for name, value in {"seed": 0, "model": "smollm2-135m", **defaults}.items():
        made.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    made.add_argument("--out", help="also write everything to this JSON file")
    made.add_argument("--role", help=argparse.SUPPRESS)
    made.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return made


def run_roles(script, options, roles, wanted, text):
    """Run each wanted role in its own process; print text({role: result}) -> (lines, summary); write --out."""
    if options.role:
        if not options.role.startswith("trl"):  # TRL's side does not use this project
            sys.path.insert(0, str(ROOT))
        (options.folder / f"{options.role}.json").write_text(json.dumps(roles[options.role](options.folder, options)))
        return
    settings = {k: v for k, v in vars(options).items() if k not in ("role", "folder", "out", "peers")}
    sides = {}
    with tempfile.TemporaryDirectory() as name:
        for role in wanted:
            print(f"{role} ...", file=sys.stderr)
            command = [sys.executable, str(Path(script).resolve()), f"--role={role}", f"--folder={name}",
                       *(f"--{k.replace('_', '-')}={v}" for k, v in settings.items())]
            if subprocess.run(command).returncode:
                sys.exit(f"{role}: failed (see above)")
            sides[role] = json.loads(Path(name, f"{role}.json").read_text())
    lines, summary = text(sides)
    facts = next(side["provenance"] for side in sides.values() if "provenance" in side)
    packages = {**facts["packages"], **next((side["versions"] for side in sides.values() if "versions" in side), {})}
    lines += [f"seed {options.seed}, {datetime.date.today()}, {cpu_name()}, {facts['threads']} threads, "
              f"commit {facts['git_commit']}",
              ", ".join(f"{k} {v}" for k, v in packages.items())]
    print("\n".join(lines))
    if options.out:
        made = {**summary, "date": str(datetime.date.today()), "cpu": cpu_name(), "packages": packages,
                "settings": settings, "sides": sides}
        Path(options.out).write_text(json.dumps(made, indent=1) + "\n")


def main_against_trl(script, what, prepare, ours, trl, **defaults):
    """The command line of a comparison with TRL. trl(folder, options, checkpointing); `what`: "examples" or "pairs"."""
    roles = {"prepare": prepare, "ours": ours, "trl plain": lambda f, o: trl(f, o, False),
             "trl checkpointing": lambda f, o: trl(f, o, True)}
    made = parser(sys.modules["__main__"].__doc__.strip().splitlines()[0], **defaults)
    made.add_argument("--peers", default="plain,checkpointing", help="which TRL settings to run")
    options = made.parse_args()
    wanted = ["prepare", "ours", *(f"trl {peer}" for peer in filter(None, options.peers.split(",")))]
    if unknown := set(wanted) - set(roles):
        made.error(f"--peers: {min(unknown)[4:]!r} is none of plain, checkpointing")
    run_roles(script, options, roles, wanted, lambda sides: against_peers(sides, options, what, 1e-3))


def cpu_name():
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((x.partition(":")[2].strip() for x in lines if x.startswith("model name")), platform.processor())


def measured(losses, clock):
    """clock: the times at the start and after every step."""
    return {"losses": losses, "seconds": [b - a for a, b in zip(clock, clock[1:])],
            "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10}


def tell(losses, clock):
    print(f"  step {len(losses)}: loss {losses[-1]:.6f}, {clock[-1] - clock[-2]:.2f} s", file=sys.stderr)


def prepare_model(folder, options):
    """Write base/ (the model) and adapter/ (PEFT's layout) -> tokenizer. lora_B starts with small random numbers
    instead of zeros, so that an error in either half of the adapter already changes the first loss."""
    import torch

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
    return tokenizer


def our_model(folder):
    """The model with the prepared adapter."""
    import lora
    import toolplay
    model, _ = toolplay.load_model(str(folder / "base"))
    lora.load_adapter(model, folder / "adapter")
    return model


def peer_model(folder):
    os.environ["HF_HUB_OFFLINE"] = "1"
    import peft
    import torch
    import transformers
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(model, folder / "adapter", is_trainable=True)
    return model, transformers.AutoTokenizer.from_pretrained(folder / "base")


# Settings of TRL's trainers that make both sides do the same: AdamW, cosine to zero without warm-up, fixed order, fp32.
def peer_settings(folder, options, lr, checkpointing):
    return dict(output_dir=str(folder / "trl"), max_steps=options.steps, per_device_train_batch_size=options.batch_size,
                gradient_accumulation_steps=1, learning_rate=lr, lr_scheduler_type="cosine", warmup_steps=0,
                weight_decay=0.0,
                adam_beta1=0.9, adam_beta2=0.999, adam_epsilon=1e-8, max_grad_norm=MAX_NORM, max_length=None,
                train_sampling_strategy="sequential", gradient_checkpointing=checkpointing,
                bf16=False, fp16=False, use_cpu=True, seed=options.seed, dataloader_pin_memory=False,
                logging_strategy="no", save_strategy="no", eval_strategy="no", report_to="none", disable_tqdm=True)


def recorded(Trainer, losses, clock):
    """-> (a trainer class that records its losses, a callback that records the time after every step)"""
    import transformers

    class Recorded(Trainer):
        def training_step(self, *args, **kwargs):
            loss = super().training_step(*args, **kwargs)
            losses.append(loss.item())
            return loss

    class Clock(transformers.TrainerCallback):
        def on_train_begin(self, *args, **kwargs):
            clock.append(time.perf_counter())

        def on_step_end(self, *args, **kwargs):
            clock.append(time.perf_counter())
            tell(losses, clock)
    return Recorded, Clock()


def peer_versions():
    import accelerate
    import peft
    import torch
    import transformers
    import trl
    return {m.__name__: m.__version__ for m in (trl, peft, accelerate, transformers, torch)}


def step_flops(model, units, budget):
    """{"nodes": N, "flops"} of one step on units (lists of rows), counted as in the docstring of this file."""
    import lora
    import toolplay
    groups = toolplay.micro_batches(units, budget)
    nodes, predicting = map(sum, zip(*(toolplay.trie_size([row for u in group for row in units[u]])
                                       for group in groups)))
    flops = 4 * predicting * model.get_output_embeddings().weight.numel()
    for name, layer in lora.lora_layers(model).items():
        first = ".layers.0.self_attn." in name and not name.endswith("o_proj")  # they need no input gradient
        flops += 2 * nodes * layer.base.weight.numel() * (1 if first else 2)
        flops += 6 * nodes * (layer.lora_A.numel() + layer.lora_B.numel()) - first * 2 * nodes * layer.lora_A.numel()
    return {"nodes": nodes, "flops": flops}


def matmul_peak():
    """Highest measured FLOP/s of square fp32 matrix products."""
    import torch
    best = 0.0
    for n in (1024, 2048, 4096):
        a, b = torch.randn(n, n), torch.randn(n, n)
        for _ in range(5):
            start = time.perf_counter()
            a @ b
            best = max(best, 2 * n**3 / (time.perf_counter() - start))
    return best


def with_share_of_peak(out, model, steps, budget, seed):
    """Add nodes, FLOPs and the share of the peak to a side's numbers; steps: the units of each step."""
    import toolplay
    counts, peak = [step_flops(model, units, budget) for units in steps], matmul_peak()
    return {**out, "nodes": [c["nodes"] for c in counts], "gflop": [c["flops"] / 1e9 for c in counts],
            "matmul_peak_gflops": peak / 1e9,
            "share_of_peak": [c["flops"] / s / peak for c, s in zip(counts, out["seconds"])],
            "provenance": toolplay.provenance(seed)}


def against_peers(sides, options, what, tolerance):
    """The table of our training step against TRL's -> (lines, summary). `what`: "examples" or "pairs"."""
    def speed_of(side):
        return options.batch_size / statistics.median(side["seconds"][WARM_UP:] or side["seconds"])
    us, peers = sides["ours"], [name for name in sides if name.startswith("trl")]
    speed, n, first = speed_of(us), min(COMPARED, options.steps), WARM_UP if options.steps > WARM_UP else 0
    lines = [f"{'':<20}{what + '/s':>11}{'ratio':>8}{'peak MiB':>10}{'ratio':>8}{'max loss diff':>15}"]
    lines.append(f"{'toolplay':<20}{speed:>11.2f}{'':>8}{us['peak_mib']:>10.0f}")
    summary = {"per_s": {"ours": speed}, "speed_ratio": {}, "peak_ratio": {}, "max_loss_difference": {},
               "share_of_matmul_peak": statistics.median(us["share_of_peak"][first:])}
    for name in peers:
        side = sides[name]
        theirs = summary["per_s"][name] = speed_of(side)
        ratio = summary["speed_ratio"][name] = speed / theirs
        peak = summary["peak_ratio"][name] = us["peak_mib"] / side["peak_mib"]
        difference = max(abs(a - b) for a, b in zip(us["losses"][:n], side["losses"][:n]))
        summary["max_loss_difference"][name] = difference
        lines.append(f"{name:<20}{theirs:>11.2f}{ratio:>7.2f}x{side['peak_mib']:>10.0f}{peak:>7.2f}x"
                     f"{difference:>15.1e}")
    info = sides["prepare"]
    agree = ", ".join(f"{p}: {'yes' if d <= tolerance else 'NO'}" for p, d in summary["max_loss_difference"].items())
    gflop, nodes = (statistics.median(us[key][first:]) for key in ("gflop", "nodes"))
    lines += [
        "",
        f"losses of the first {n} steps agree to {tolerance}: {agree}",
        f"our step: {gflop:.0f} GFLOP on {nodes:.0f} trie nodes, {summary['share_of_matmul_peak']:.0%} of the measured "
        f"fp32 matmul peak ({us['matmul_peak_gflops']:.0f} GFLOP/s)",
        f"{options.model}, batch {options.batch_size}, {options.steps} steps, first {first} are warm-up, "
        f"{info['tokens'] / info['examples']:.0f} tokens for each of the {what}; ratios: ours / theirs"]
    return lines, summary
