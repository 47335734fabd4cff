"""
sample_replies.py - the base model's own replies to messages that need no tool, sampled once

    python benchmarks/sample_replies.py        rewrites configs/corpora/talk_replies.jsonl, which is part of the source
"""
import argparse
import json
import random
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import toolplay  # noqa: E402
from data import CORPORA, Writer, corpus, draw_values, fill  # noqa: E402
from eval import converses  # noqa: E402


def hollow(prompt, reply):
    """Whether a reply is a phrase that the model gives to any message: training on it would teach the model to console
    a user who got the job."""
    mourning = re.search(r"\b(died|death|passed away|funeral|grie|(lost|miss) (my|the|our) "
                         r"(gran\w*|mum|mom|dad|dog|cat|budgie))\b", prompt, re.IGNORECASE)
    return bool(re.search(r"classic (example|scene|case)", reply, re.IGNORECASE) or not mourning
                and re.search(r"sorry (for|about) your loss", reply, re.IGNORECASE))


def talk_prompts():
    """All messages that need no tool -> [{"prompt", "kind", "split"}]: talk, and the traps that need no tool."""
    prompts = [{"prompt": p, "kind": k["kind"], "split": k["split"]} for k in corpus("talk_prompts.json")["kinds"]
               for p in k["prompts"]]
    for family in corpus("traps.json")["families"]:
        if family["tool"] == "none":
            rng = random.Random(family["id"])
            for text in family["texts"]:
                writer = Writer(family["split"], rng)
                values = draw_values(family.get("slots", {}), family["split"], rng) or {}
                prompts.append({"prompt": fill(text,
                                               {"city": writer.place(False), **{k: str(v) for k, v in values.items()}}),
                                "kind": f'trap_{family["id"]}', "split": family["split"]})
    return prompts


def sample_replies():
    """Let the untrained model answer every message that needs no tool in its own words, once; keep answers that end.

    Messages that have a reply in the file keep it. An echo of the message is rejected: a model that learns to copy
    questions into searches would learn from echoes to copy everything.
    Tool training that includes these replies keeps the model's talk: it would say them anyway (self-distillation).
    """
    model, tokenizer = toolplay.load_model()
    prompts, path = talk_prompts(), CORPORA / "talk_replies.jsonl"
    brief = "You are a helpful assistant. Answer in one short sentence."
    before = {talk["prompt"]: talk["reply"] for talk in (corpus(path.name)[1:] if path.exists() else [])}

    def fits(i, text):
        return converses(text, prompts[i]["prompt"]) and not hollow(prompts[i]["prompt"], text)
    done = {i: before[talk["prompt"]] for i, talk in enumerate(prompts) if fits(i, before.get(talk["prompt"], ""))}
    for attempt, temperature in enumerate((0.0, 0.7, 0.7, 0.7, 0.7, 0.7)):
        left = [i for i in range(len(prompts)) if i not in done]
        chats = [{"messages": [{"role": "system", "content": brief}, {"role": "user", "content": prompts[i]["prompt"]}]}
                 for i in left]
        episodes = toolplay.rollout(model, tokenizer, chats, {}, temperature=temperature, max_new_tokens=24,
                                    seed=attempt)
        for i, episode in zip(left, episodes):
            text = episode.final.strip()
            if episode.stop == "end" and "<" not in text and fits(i, text):
                done[i] = text
        print(f"round {attempt}: {len(done)} of {len(prompts)} messages have a reply", file=sys.stderr)
    comment = ("No-tool messages (talk_prompts.json, traps.json) "
               "and the replies of the untrained SmolLM2-135M-Instruct (Apache-2.0) itself, "
               "sampled once by: python benchmarks/sample_replies.py")
    lines = [{"comment": comment}] + [{**prompts[i], "reply": done[i]} for i in sorted(done)]
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__.strip(), formatter_class=argparse.RawTextHelpFormatter).parse_args()
    sample_replies()
