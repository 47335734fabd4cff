"""
study.py - what DPO and PPO teach that imitation does not: every run, every score, every picture, in one command

    .venv/bin/python benchmarks/study.py              everything, about seven hours on two cores; skips finished runs
    .venv/bin/python benchmarks/study.py start gae-0  only these stages
    .venv/bin/python benchmarks/study.py table plot   the table, docs/ppo.png and docs/dpo.png from the existing runs

All trained runs start from one SFT checkpoint (configs/sft_start.json). It has seen no family of word problems with
more than one operation (but seven single problems of that type among the canonical examples, and everyday arithmetic
with several operations). PPO and DPO train as their configs say, and their rivals train for as long as PPO takes:

    gae-0 gae-1 gae-2, rloo-0, grpo-0    ppo.py from answers alone (configs/ppo.json, other seeds and advantages)
    sft-0 sft-1 sft-2                    the control: more SFT, on new examples of the kinds that the checkpoint learned
    rft-0                                the fair rival: sample, keep the right answers, fine-tune on them
                                         (rejection sampling, Yuan et al. 2023)
    dpo-0 dpo-1 dpo-2                    configs/dpo.json
    base                                 the untrained model

All are scored on runs/study/test.jsonl, from the test split: word problems with several operations (of families that no
run has seen), and as many cases of other kinds; in half of these cases no call is due, or there is a trap. `table`
prints the scores. This command compares any runs:

    .venv/bin/python toolplay.py compare --kind two_steps runs/study/start runs/study/gae-* ...
"""
import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
RUNS = ROOT / "runs" / "study"
N = 300  # number of test cases in each part
OTHERS = {"no_tool": 8, "trap": 8, "missing_tool": 3, "arithmetic": 4, "everyday": 4, "one_step": 4, "weather": 4,
          "search": 4, "two_calls": 1, "tool_error": 1}
STAGES = ["start", *(f"{name}-{seed}" for seed in range(3) for name in ("gae", "sft", "dpo")), "rloo-0", "grpo-0",
          "rft-0", "base", "table", "plot"]


def toolplay(*argv):
    subprocess.run([sys.executable, str(ROOT / "toolplay.py"), *map(str, argv)], check=True, cwd=ROOT)


def cases():
    """Write the test cases, once -> path."""
    import data
    path = RUNS / "test.jsonl"
    if not path.exists():
        made = data.generate("test", N, 0, {"two_steps": 1}) + data.generate("test", N, 0, OTHERS)
        import toolplay
        toolplay.write_lines(path, made)
    return path


def trained(folder, config, *overrides):
    """Train a run, or go on with it, unless it has finished."""
    if (folder / "adapter").is_dir() and not (folder / ".lock").exists():  # .lock stays while a run is unfinished
        return
    begun = (folder / "config.json").exists()
    toolplay("train", folder if begun else ROOT / "configs" / config,
             *(["--resume"] if begun else [f"--run_dir={folder}", *overrides]))


def train(name, config, *overrides):
    folder = RUNS / name
    trained(folder, config, *overrides)
    if not (folder / "eval.json").exists():
        toolplay("eval", "--run", folder, "--data", cases(), "--failures", 0)


def rejection_sampling(name, seed):
    """Sample from the start checkpoint, keep the right answers, and train on them together with examples of the old
    kinds, as PPO does."""
    import data
    import ppo
    import toolplay as tp
    path = RUNS / f"{name}.jsonl"
    if not path.exists():
        model, tokenizer, _ = tp.load_run(RUNS / "start")
        config = tp.load_config(ROOT / "configs" / "ppo.json", [f"--seed={seed + 1}", f"--examples={RFT_PROMPTS}"])
        cases, _ = ppo.prompts_of(config, tokenizer)  # as PPO has them: with the final answers only
        kept, begin = [], time.time()
        for at in range(0, len(cases), 32):
            group = cases[at:at + 32]
            episodes = tp.rollout(model, tokenizer, [c.conversation for c in group for _ in range(4)],
                                  max_new_tokens=48, max_turns=3, seed=f"{seed} {at}", batch_size=128)
            for n, case in enumerate(group):
                right = [e for e in episodes[4 * n:4 * n + 4] if ppo.score(case, e)[1]["right_answer"] == 1
                         and len(e.turns) == 2]
                # several ways to the answer teach more than one way (Yuan et al., sec. 3.3)
                for e in {str(e.calls): e for e in right}.values():
                    messages = [*case.conversation["messages"],
                                {"role": "assistant", "content": "",
                                 "tool_calls": [{"name": c.name, "arguments": c.arguments} for c in e.calls]},
                                *({"role": "tool", "content": r.text()} for r in e.results),
                                {"role": "assistant", "content": e.final}]
                    kept.append({"kind": case.kind, "messages": messages,
                                 "tools": [tool.name for tool in case.conversation["tools"]]})
        print(f"{len(kept)} right answers to {len(cases)} prompts, 4 samples each, "
              f"{(time.time() - begin) / 60:.1f} minutes")
        kept += [{key: c[key] for key in ("kind", "messages", "tools")}
                 for c in data.generate("train", len(kept) // 2, seed + 1, config.ptx_mix)]
        tp.write_lines(path, kept)
    train(name, "sft_start.json", f"--seed={seed}", "--source=jsonl", f"--path={path}", "--mix={}",
          f"--start_from={RUNS / 'start'}", f"--steps={RFT_STEPS}",
          "--lr=0.0005", "--eval_every=0", "--eval_examples=0")


RFT_PROMPTS, RFT_STEPS = 800, 220  # on two cores this takes about as long as the other rivals
STEP_S = 3.0  # seconds of an SFT step of 8 examples on two cores (measured: timing.jsonl of the start)


def stage(name, minutes):
    method, _, seed = name.partition("-")
    start = f"--start_from={RUNS / 'start'}"
    if name == "start":
        train("start", "sft_start.json")
    elif name == "base":
        if not (RUNS / name / "eval.json").exists():
            (RUNS / name).mkdir(exist_ok=True)
            toolplay("eval", "--model", "smollm2-135m", "--data", cases(), "--failures", 0, "--out",
                     RUNS / name / "eval.json")
    elif name in ("table", "plot"):
        {"table": table, "plot": plot}[name]()
    elif method in ("gae", "rloo", "grpo"):
        train(name, "ppo.json", start, f"--seed={seed}", f"--advantage={method}")
    elif method == "sft":
        train(name, "sft_start.json", start, f"--seed={int(seed) + 1}", f"--examples={int(minutes * 60 / STEP_S) * 8}",
              "--lr=0.0005", "--eval_every=0", "--eval_examples=0")
    elif method == "dpo":
        train(name, "dpo.json", start, f"--seed={seed}")
    else:
        rejection_sampling(name, int(seed))


LABELS = {"base": "untrained", "start": "SFT", "sft": "more SFT", "rft": "RFT", "dpo": "DPO", "gae": "PPO, gae",
          "rloo": "PPO, rloo", "grpo": "PPO, grpo"}


def table():
    """Two tables of every scored method, seeds together: means with 95 % intervals, and paired differences to the SFT
    checkpoint. The first is README's, the second has the parts."""
    import eval as evaluation
    scored = {m: sorted([*RUNS.glob(f"{m}/eval.json"), *RUNS.glob(f"{m}-[0-9]/eval.json")]) for m in LABELS}
    if not scored["start"]:
        sys.exit(f"{RUNS}/start has not been scored, and all are compared to it: python benchmarks/study.py start")
    records = {m: [json.loads(path.read_text(encoding="utf-8"))["records"] for path in scored[m]]
               for m in ("start", *LABELS) if scored[m]}
    for seed in sum(records.values(), []):
        for r in seed:  # a call that is due is in order if it is well-formed and of the right tool
            r["verdicts"]["in order"] = r["verdicts"]["tool_accuracy"] and (r["verdicts"]["format"] or not r["due"])

    def other(r):
        return r["kind"] != "two_steps"

    def column(title, metric, which, fault=False, difference=True):
        """[(title, {method: cell})] of a metric over the cases that `which` picks, and of its difference to the SFT
        checkpoint; with `fault`, of one minus the metric."""
        picked = {m: [[{**r, "verdicts": {**r["verdicts"], "tool_accuracy": r["verdicts"][metric]}}
                       for r in seed if which(r)] for seed in seeds] for m, seeds in records.items()}
        result = {m: of["tool_accuracy"] for m, of in evaluation.compare(picked).items()}
        cells, gains = {}, {}
        for m, of in result.items():
            value, low, high = (of[key] for key in ("value", "low", "high"))
            gain, d_low, d_high = (of[key] for key in ("difference", "d_low", "d_high"))
            if fault:
                value, low, high, gain, d_low, d_high = 1 - value, 1 - high, 1 - low, -gain, -d_high, -d_low
            cells[m] = f"{value:.3f} [{low:.2f}, {high:.2f}]"
            gains[m] = f"{gain + 0:+.3f} [{d_low:+.2f}, {d_high:+.2f}]" if m != "start" else ""
        return [(f"{title} (n = {result['start']['n']})", cells), ("minus SFT", gains)][:1 + difference]

    def rows(*columns):
        return evaluation.table(["run", "seeds", *(title for title, _ in columns)],
                                [[LABELS[m], len(records[m]), *(cells[m] for _, cells in columns)]
                                 for m in LABELS if m in records])
    print(rows(*column("word problems solved", "response_quality", lambda r: not other(r)),
               *column("other kinds: right answers", "response_quality", other),
               *column("unnecessary calls", "in order", lambda r: other(r) and not r["due"], True, False),
               *column("any wrong call", "in order", other, True)),
          rows(*column("tool accuracy", "tool_accuracy", other), *column("format", "format", other),
               *column("wrong or malformed calls", "in order", lambda r: other(r) and r["due"], True)), sep="\n\n")


def plot():
    """Plot the learning curves: PPO's over rounds, DPO's over steps."""
    from matplotlib.figure import Figure

    from toolplay import read_lines

    def curve(axis, folder, key, label, colour, smooth=5):
        values = [x[key] for x in read_lines(folder / "metrics.jsonl") if x.get(key) is not None]
        means = [sum(part) / len(part) for n in range(len(values)) for part in [values[max(0, n - smooth + 1):n + 1]]]
        axis.plot(range(1, len(means) + 1), means, color=colour, alpha=0.9, label=label)
    colours = {"gae": "#4477aa", "rloo": "#cc3311", "grpo": "#228833", "dpo": "#4477aa"}
    for name, unit, methods, keys in (("ppo", "round", ("gae", "rloo", "grpo"),
                                       ("reward_new", "kl", "entropy", "learned_from")),
                                      ("dpo", "step", ("dpo",), ("rewards/margin", "rewards/accuracy", "logp/chosen",
                                                                 "logp/rejected"))):
        figure = Figure(figsize=(16, 3.6), layout="tight")
        axes = figure.subplots(1, 4)
        for key, axis in zip(keys, axes):
            for method in methods:
                for folder in sorted(RUNS.glob(f"{method}-[0-9]")):
                    if (folder / "metrics.jsonl").exists():
                        curve(axis, folder, key, None if method in axis.get_legend_handles_labels()[1] else method,
                              colours[method])
            axis.set(title=f"{key}, moving mean of 5 {unit}s", xlabel=unit)
            axis.spines[["top", "right"]].set_visible(False)
        if axes[0].lines:
            axes[0].legend(frameon=False)
            figure.savefig(ROOT / "docs" / f"{name}.png", dpi=110)
            print(ROOT / "docs" / f"{name}.png")


def main():
    parser = argparse.ArgumentParser(description="what DPO and PPO teach that imitation does not")
    parser.add_argument("stages", nargs="*", help=f"of {', '.join(STAGES)} (default: all)")
    parser.add_argument("--minutes", type=float, default=28.0,
                        help="budget of the SFT runs, at STEP_S seconds a step: as long as PPO takes")
    options = parser.parse_args()
    if unknown := set(options.stages) - set(STAGES):
        parser.error(f"unknown stage {sorted(unknown)[0]}; stages are {', '.join(STAGES)}")
    RUNS.mkdir(parents=True, exist_ok=True)
    for name in options.stages or STAGES:
        print(f"== {name}", flush=True)
        stage(name, options.minutes)


if __name__ == "__main__":
    main()
