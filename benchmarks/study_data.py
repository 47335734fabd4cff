"""
study_data.py - manual, synthetic and teacher data at equal numbers of examples: what does a model learn from each?

    .venv/bin/python benchmarks/study_data.py            everything, about two hours on two cores; skips finished runs
    .venv/bin/python benchmarks/study_data.py --table    the table and docs/data.png from the existing runs

Each run is SmolLM2-135M after --steps steps of SFT on N conversations of one source: the templates (data.MIX),
synthetic functions (data.SYNTHETIC), or the calls that a run of teacher.py kept (--teacher). All runs are scored on the
test split of the templates, and on synthetic functions of domains that no run has seen. Call accuracy: the first turn
makes exactly the right calls, or rightly makes none.
"""
import argparse
import json
import statistics
import sys
from pathlib import Path

from study import ROOT, toolplay, trained

SOURCES = ("manual", "synthetic", "teacher")
CASES = {"templates": "MIX", "functions": "SYNTHETIC"}


def cases(folder, n):
    """Write the two files of test cases, once -> {name: path}."""
    import data
    folder.mkdir(parents=True, exist_ok=True)
    for name, mix in CASES.items():
        if not (path := folder / f"{name}.jsonl").exists():
            data.write_jsonl(path, data.generate("test", n, 0, getattr(data, mix)))
    return {name: folder / f"{name}.jsonl" for name in CASES}


def score(folder, name, options):
    """Train and evaluate a run, unless that is done -> {set of cases: [call accuracy of each case]}."""
    source, n, seed = name
    run = folder / f"{source}-{n}-{seed}"
    trained(run, "study_data.json", f"--source={source}", f"--examples={n}", f"--seed={seed}",
            f"--steps={options.steps}", *([f"--path={options.teacher}"] if source == "teacher" else []))
    out = {}
    for what, path in cases(folder, options.cases).items():
        if not (made := run / f"{what}.json").exists():
            toolplay("eval", "--run", run, "--data", path, "--failures", 0, "--out", made)
        out[what] = [bool(r["verdicts"]["call_accuracy"]) for r in json.loads(made.read_text())["records"]]
    return out


def same_settings(folder, settings):
    """Stop if the folder holds runs with other settings: they would be mistaken for runs with these settings."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "settings.json"
    if path.exists() and (kept := json.loads(path.read_text())) != settings:
        sys.exit(f"{folder} holds runs of {kept}, not of {settings}; give another --folder")
    path.write_text(json.dumps(settings))


def table(folder, options, seeds):
    """Print mean and range over the seeds of the existing runs, in Markdown, and draw the picture."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(4.2 * len(CASES), 3.4), layout="tight")
    axes = figure.subplots(1, len(CASES), sharey=True)
    print(f"| data | examples | {' | '.join(CASES)} |\n| --- | ---: |{' ---: |' * len(CASES)}")
    for place, (source, colour) in enumerate(zip(SOURCES, ("#4477aa", "#cc3311", "#228833"))):
        for at, n in enumerate(options.sizes):
            done = [score(folder, (source, n, seed), options)
                    for seed in seeds if (folder / f"{source}-{n}-{seed}" / "functions.json").exists()]
            if not done:
                continue
            cells = []
            for axis, what in zip(axes, CASES):  # a point for each seed, a bar for their mean
                shares, x = [sum(run[what]) / len(run[what]) for run in done], at + 0.25 * place
                cells.append(f"{statistics.mean(shares):.3f} ({min(shares):.3f} to {max(shares):.3f})")
                axis.bar(x, statistics.mean(shares), 0.22, color=colour, alpha=0.3)
                axis.plot([x] * len(shares), shares, "o", color=colour, alpha=0.7,
                          label=None if source in axis.get_legend_handles_labels()[1] else source)
            print(f"| {source} | {n} | {' | '.join(cells)} |")
    if not axes[0].lines:
        sys.exit(f"{folder}: no run there has been scored; run this without --table")
    for axis, what in zip(axes, CASES):
        axis.set(title=f"call accuracy: {what}", xlabel="examples", ylim=(0, 1))
        axis.set_xticks([at + 0.25 for at in range(len(options.sizes))], options.sizes)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False)
    figure.savefig(ROOT / "docs" / "data.png", dpi=110)
    print(f"\n{ROOT / 'docs' / 'data.png'}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--teacher", default="runs/teacher", help="the run of teacher.py that the teacher data come "
                                                                  "from (default runs/teacher)")
    parser.add_argument("--sizes", type=int, nargs="+", default=[50, 200], help="numbers of examples (default 50 200)")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=50, help="optimizer steps of every run (default 50)")
    parser.add_argument("--cases", type=int, default=200, help="test cases of either kind (default 200)")
    parser.add_argument("--folder", default="runs/study_data")
    parser.add_argument("--table", action="store_true", help="only the table and the picture")
    options = parser.parse_args()
    # make paths absolute: the runs start in the repository
    folder, options.teacher = Path(options.folder).resolve(), str(Path(options.teacher).resolve())
    try:  # stop now, not after two hours
        import matplotlib  # noqa: F401
    except ImportError:
        sys.exit("the picture needs matplotlib: ./setup.sh --test")
    if not options.table:
        same_settings(folder, {"teacher": options.teacher, "steps": options.steps, "cases": options.cases})
        trained(Path(options.teacher), "teacher.json")
        import data
        if (found := len(data.read_teacher(options.teacher, "train", max(options.sizes)))) < max(options.sizes):
            sys.exit(f"{options.teacher}: its calls make {found} conversations, and --sizes asks for "
                     f"{max(options.sizes)}: the sources would not be compared at equal numbers")
        for seed in range(options.seeds):
            for n in options.sizes:
                for source in SOURCES:
                    print(f"== {source}, {n} examples, seed {seed}", flush=True)
                    score(folder, (source, n, seed), options)
    table(folder, options, range(options.seeds))


if __name__ == "__main__":
    main()
