"""One short test on the real SmolLM2-135M: it loads, samples like transformers, learns, and its rollouts are token-exact."""
import os

import pytest
import torch

import data
import lora
import ppo
import sft
import toolplay
from tools import Call, format_call, load_tools, render_tools

PROMPTS = ["What is 17 * 23?", "How is the weather in Kuala Lumpur?", "Hi! How are you?"]


@pytest.fixture(scope="module")
def real():
    threads = torch.get_num_threads()
    if "PYTEST_XDIST_WORKER" not in os.environ:  # with xdist, the other core runs other tests
        torch.set_num_threads(os.cpu_count())
    yield toolplay.load_model("smollm2-135m")
    torch.set_num_threads(threads)


def test_greedy_rollout_is_transformers_generate(real):
    model, tokenizer = real
    chats = [{"messages": [{"role": "user", "content": p}], "tools": ["calculator", "weather", "search"]} for p in PROMPTS]
    episodes = toolplay.rollout(model, tokenizer, chats, temperature=0, max_new_tokens=12, max_turns=1)
    for chat, episode in zip(chats, episodes):
        ids, _ = data.encode(chat, tokenizer, generation=True)
        theirs = model.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False, eos_token_id=data.end_of_turn(tokenizer),
                                pad_token_id=2)[0].tolist()
        assert episode.ids == theirs


def test_it_learns_a_call_and_the_rollout_executes_it(real):
    model, tokenizer = real
    lora.add_lora(model, "all-linear", r=8, alpha=16, seed=0, skip=0.67)  # adapters in a third of the layers: a third of the backward pass
    chat = data.generate("train", 1, mix={"weather": 1}, seed=1)[0]
    chat["messages"][0]["content"], chat["tools"] = "weather in Oslo?", ["weather"]
    chat["messages"][1]["tool_calls"][0]["arguments"] = {"city": "Oslo"}
    row = data.encode({**chat, "messages": chat["messages"][:2]}, tokenizer)
    config = toolplay.load_config({"lr": 0.004, "schedule": "constant", "warmup": 0.0})
    trainer = toolplay.Trainer(config, {n: p for n, p in model.named_parameters() if p.requires_grad}, 7)
    losses = [toolplay.train_step(trainer, [row], lambda rows: sft.sft_loss(toolplay.token_logprobs(model, rows), sft.pad_mask(rows)),
                                  size=lambda r: sum(r[1]))["loss"] for _ in range(7)]
    assert losses[-1] < 0.05 < losses[0]
    prompt = {"messages": chat["messages"][:1], "tools": ["weather"]}
    episode = toolplay.rollout(model, tokenizer, [prompt], load_tools(["weather"]), temperature=0, max_new_tokens=32, max_turns=2)[0]
    assert [(c.name, c.arguments) for c in episode.calls][:1] == [("weather", {"city": "Oslo"})]
    assert episode.results[0].ok and episode.results[0].value["city"] == "Oslo"
    logp = toolplay.token_logprobs(model, [(episode.ids, episode.mask)])[0]
    assert torch.allclose(logp, torch.tensor(episode.logp), atol=2e-4)
    # PPO's first ratio is 1: split and batched differently, the sampled tokens have the same log-probs in training
    sampled = toolplay.rollout(model, tokenizer, [prompt] * 2, load_tools(["weather"]), temperature=1.0, max_new_tokens=16, max_turns=2)
    rows = [(e.ids, e.mask) for e in (episode, *sampled)]
    policy, mask = ppo.Policy(model, 1.0, 200), ppo.padded([m for _, m in rows], max(len(m) for _, m in rows), "cpu")
    with torch.no_grad():
        old = policy(rows, ())
    new = policy(rows, ("hidden", "entropy"))["logp"]
    assert len(toolplay.micro_batches([[row] for row in rows], 200)) > 1 and new.requires_grad
    assert ((new - old).exp() - 1).abs()[mask.bool()].max() < 1e-5
    with lora.lora_disabled(model):
        base = toolplay.token_logprobs(model, [row])
    assert (base - toolplay.token_logprobs(model, [row])).abs().max() > 0.5


def test_in_the_form_of_a_call_names_have_the_tokens_that_are_to_be_written(real):
    """Why the style "call" exists: the parts of a call that already are in the signature can be copied token by token."""
    _, tokenizer = real
    tool = {"name": "bookStudyRoom", "description": "Book a room.", "parameters": {"type": "object", "properties": {
        "pickup_branch": {"type": "string"}, "seats": {"type": "integer"}, "equipment": {"type": "string"}}}}
    said = tokenizer.encode(format_call(Call("bookStudyRoom", {"pickup_branch": "x", "seats": 8, "equipment": "y"})))
    copied = {}
    for style in ("described", "call"):
        shown = tokenizer.encode(render_tools(load_tools([tool]), style))
        pairs = set(zip(shown, shown[1:]))
        copied[style] = sum(pair in pairs for pair in zip(said, said[1:])) / (len(said) - 1)
    assert copied["call"] > 4 * copied["described"] and copied["call"] > 0.5, copied
