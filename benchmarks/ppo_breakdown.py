"""
ppo_breakdown.py - where the time of a PPO round goes: rollout, reference and old log-probs, update

Runs a few rounds of a PPO config (unchanged, except for the number of rounds, over which the learning rate also falls,
and evaluation, which is off) and times the three parts; "other" is the reward, the log and the checkpoint. The first
round is warm-up. The share of the matmul peak is that of the update only; common.py says how FLOPs are counted.

    .venv/bin/python benchmarks/ppo_breakdown.py --config configs/ppo.json --start-from RUN
"""
import statistics
import sys
import tempfile
import time

import common


def ours(folder, options):
    import ppo
    import toolplay
    overrides = [f"--iterations={options.rounds}", f"--run_dir={tempfile.mkdtemp(dir=folder)}/run", "--eval_examples=0",
                 "--eval_every=0"]
    overrides += [f"--start_from={options.start_from}"] if options.start_from else []
    if options.rounds < 2:
        sys.exit("--rounds: the first is warm-up; give 2 or more")
    config = toolplay.load_config(options.config, overrides)
    spent, rounds, steps, models = {}, [], [], []

    def clocked(owner, name, part, note=lambda seconds, args: None):
        real = getattr(owner, name)

        def wrapped(*args, **kwargs):
            start = time.perf_counter()
            out = real(*args, **kwargs)
            seconds = time.perf_counter() - start
            spent[part] = spent.get(part, 0.0) + seconds
            note(seconds, args)
            return out
        setattr(owner, name, wrapped)
    clocked(toolplay, "rollout", "rollout", lambda seconds, args: models.append(args[0]))
    clocked(ppo.ActorCritic, "old_and_reference", "reference")
    clocked(toolplay, "train_step", "update",
            lambda seconds, args: steps.append((len(rounds), seconds, [[unit["row"]] for unit in args[1]])))
    log = toolplay.Run.log
    begin = [time.perf_counter()]

    def logged(run, number, metrics, tokens=0):
        now = time.perf_counter()
        rounds.append({**spent, "whole": now - begin[0], "tokens": tokens})
        spent.clear()
        begin[0] = now
        log(run, number, metrics, tokens)
    toolplay.Run.log = logged
    ppo.train(toolplay.Run(config))
    peak = common.matmul_peak()
    shares = [common.step_flops(models[0], units, config.micro_tokens)["flops"] / seconds / peak
              for n, seconds, units in steps if n]
    return {"rounds": rounds, "share_of_peak": statistics.median(shares or [0.0]), "matmul_peak_gflops": peak / 1e9,
            "provenance": toolplay.provenance(config.seed),
            "episodes": config.prompts * config.samples}


def text(sides):
    us = sides["ours"]
    mean = {key: statistics.mean(r.get(key, 0.0) for r in us["rounds"][1:])
            for key in ("rollout", "reference", "update", "whole", "tokens")}
    mean["other"] = mean["whole"] - mean["rollout"] - mean["reference"] - mean["update"]
    parts = ("rollout", "reference", "update", "other", "whole")
    lines = [f"{part:<12}{mean[part]:>8.2f} s{mean[part] / mean['whole']:>7.0%}" for part in parts]
    return [*lines, f"{us['episodes']} episodes, {mean['tokens']:.0f} sampled tokens a round; "
                    f"the update reaches {us['share_of_peak']:.0%} of the matmul peak "
            f"({us['matmul_peak_gflops']:.0f} GFLOP/s)"], {"seconds": mean, "share_of_matmul_peak": us["share_of_peak"]}


def main():
    parser = common.parser("where the time of a PPO round goes", config="configs/ppo.json", start_from="", rounds=4)
    common.run_roles(__file__, parser.parse_args(), {"ours": ours}, ["ours"], text)


if __name__ == "__main__":
    main()
