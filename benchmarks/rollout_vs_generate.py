"""
rollout_vs_generate.py - our batched sampling against transformers.generate

Both sides sample one assistant turn for each of 16 prompts x 4 samples (data.generate("test", seed 0), the three tools
in the system prompt) from the same weights at temperature 1, at most 64 tokens a turn, in fp32. A token counts if it
is sampled up to its row's end of turn; tokens that generate computes after that end do not count. Each side runs three
times: the first run is warm-up, the faster of the other two counts. Our rollout computes a prompt once for all rows
that have it, and removes finished rows; generate pads on the left and continues until its last row ends. With --run the
weights are a trained run's (adapter merged), whose turns end early; without it the base model's, whose turns are long.

    .venv/bin/python benchmarks/rollout_vs_generate.py [--run RUN] --out benchmarks/rollout_vs_generate.json
"""
import json
import time

import common

TOOLS = ["calculator", "weather", "search"]


def prepare(folder, options):
    """Write base/ (the model, with the run's adapter merged in) and chats.json."""
    import data
    import lora
    import toolplay
    if options.run:
        model, tokenizer, _ = toolplay.load_run(options.run)  # merged already
        lora.remove(model)
    else:
        model, tokenizer = toolplay.load_model(options.model)
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    kept = [c for c in data.generate("test", 4 * options.prompts, options.seed)
            if c["kind"] != "missing_tool"][:options.prompts]
    chats = [{"messages": c["messages"][:1], "tools": TOOLS} for c in kept]
    (folder / "chats.json").write_text(json.dumps(chats))
    (folder / "ids.json").write_text(json.dumps([data.encode(c, tokenizer, generation=True)[0] for c in chats]))
    return {"provenance": toolplay.provenance(options.seed)}


def timed(sample):
    """Time sample(seed) -> number of tokens. Return tokens and seconds of the faster of two runs after a warm-up."""
    runs = []
    for seed in range(3):
        start = time.perf_counter()
        tokens = sample(seed)
        runs.append({"tokens": tokens, "seconds": time.perf_counter() - start})
    return max(runs[1:], key=lambda run: run["tokens"] / run["seconds"])


def ours(folder, options):
    import toolplay
    model, tokenizer = toolplay.load_model(str(folder / "base"))
    chats = [chat for chat in json.loads((folder / "chats.json").read_text()) for _ in range(options.samples)]

    def sample(seed):
        episodes = toolplay.rollout(model, tokenizer, chats, max_new_tokens=options.max_new_tokens, max_turns=1,
                                    seed=seed, batch_size=len(chats))
        return sum(sum(e.mask) for e in episodes)
    return timed(sample)


def transformers_generate(folder, options):
    import torch
    import transformers
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "base", padding_side="left")
    rows = [ids for ids in json.loads((folder / "ids.json").read_text()) for _ in range(options.samples)]
    width, end = max(map(len, rows)), tokenizer.convert_tokens_to_ids("<|im_end|>")
    ids = torch.tensor([[end] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])

    def sample(seed):
        torch.manual_seed(seed)
        with torch.no_grad():
            out = model.generate(ids, attention_mask=mask, do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
                                 max_new_tokens=options.max_new_tokens,
                                 eos_token_id=end, pad_token_id=end)[:, width:].tolist()
        return sum(row.index(end) + 1 if end in row else len(row) for row in out)
    return timed(sample) | {"versions": {"transformers": transformers.__version__, "torch": torch.__version__}}


ROLES = {"prepare": prepare, "ours": ours, "generate": transformers_generate}


def text(sides):
    speed = {name: sides[name]["tokens"] / sides[name]["seconds"] for name in ("ours", "generate")}
    lines = [f"{name:<12}{sides[name]['tokens']:>7} tokens{sides[name]['seconds']:>8.2f} s{speed[name]:>9.1f} tokens/s"
             for name in speed]
    return [*lines, f"ratio {speed['ours'] / speed['generate']:.2f}"], {"tokens_per_s": speed,
                                                                        "ratio": speed["ours"] / speed["generate"]}


def main():
    parser = common.parser("our rollout against transformers.generate", prompts=16, samples=4, max_new_tokens=64,
                           run="")
    common.run_roles(__file__, parser.parse_args(), ROLES, list(ROLES), text)


if __name__ == "__main__":
    main()
