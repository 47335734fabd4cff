"""
call_margin.py - which `call_margin` fits a trained model?

    python benchmarks/call_margin.py runs/sft_many_tools
    python benchmarks/call_margin.py runs/sft --n 200 --margins 0 1 2

Reads how much more probable than any other beginning a call is at the end of n prompts of the dev split (with the
run's own mix of kinds; --synthetic: its synthetic functions alone). Prints for each margin which share of the prompts
that need no call would be answered with one, and which share of those that need a call would be answered without.
"""
import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

import data
import eval as evaluation
import toolplay
from tools import UserError


@torch.no_grad()
def leads(model, tokenizer, conversations, style):
    """logit of <tool_call> (its first token) - largest other logit, where each answer begins -> [B]."""
    opening = tokenizer.encode("<tool_call>", add_special_tokens=False)[0]
    rows = [data.encode(c, tokenizer, style, generation=True)[0] for c in conversations]
    out = []
    for group in toolplay.micro_batches([[(ids, None)] for ids in rows], toolplay.PREFILL):
        part = [rows[n] for n in group]
        logits = toolplay.prompt_cache(model, [ids[:-1] for ids in part]).step([ids[-1:] for ids in part]).float()
        call = logits[:, opening].clone()
        logits[:, opening] = float("-inf")
        out += zip(group, call - logits.max(-1).values)
    return torch.stack([lead for _, lead in sorted(out)])


def main():
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("run")
    parser.add_argument("--n", type=int, default=400)
    parser.add_argument("--seed", type=int, default=5)
    parser.add_argument("--synthetic", action="store_true", help="prompts to synthetic functions alone")
    parser.add_argument("--margins", type=float, nargs="+", default=[0, 0.5, 1, 1.5, 2, 3])
    options = parser.parse_args()
    with toolplay.one_line_errors():
        model, tokenizer, config = toolplay.load_run(options.run)
        mix = {kind: weight for kind, weight in (config.mix or data.MIX).items()
               if not options.synthetic or kind.startswith("api_")}
        if not any(mix.values()):
            raise UserError("--synthetic: the run's mix has no synthetic functions")
        cases = [evaluation.as_case(c) for c in data.generate("dev", options.n, options.seed, mix)]
        lead = leads(model.eval(), tokenizer, [case.conversation for case in cases], config.tool_style)
    due = torch.tensor([bool(case.calls) for case in cases])
    print(f"{options.n} prompts of the dev split, seed {options.seed}: {int(due.sum())} need a call")
    print("margin   calls where none is due   calls left out     sum")
    for margin in options.margins:
        needless, missed = (lead[~due] > margin).float().mean(), (lead[due] <= margin).float().mean()
        print(f"{margin:6.1f}   {needless:23.3f}   {missed:14.3f}   {needless + missed:5.3f}")


if __name__ == "__main__":
    main()
