"""The token trie against plain computation: one forward for each row."""
import random

import pytest
import torch
from small import close, gather, model, one_by_one, random_rows  # noqa: F401

import lora
import toolplay
from toolplay import Trie, common_prefix, micro_batches, token_logprobs

FULL, SLIDING = ["llama", "qwen3", "gpt2"], ["mistral", "gemma3"]


@pytest.fixture(scope="module", params=FULL)
def full(request):
    return model(request.param)


def nodes(rows):
    return {tuple(ids[:t + 1]) for ids, _ in rows for t in range(len(ids))}


# ---------------------------------------------------------------- the structure

@pytest.mark.parametrize("seed", range(30))
def test_trie_structure(seed, monkeypatch):
    monkeypatch.setattr(toolplay, "SEGMENT", (1, 2, 3, 128)[seed % 4])
    rows = [ids for ids, _ in random_rows(seed)]
    trie = Trie(rows)
    prefixes = {}
    for ids, path in zip(rows, trie.path):
        assert [trie.ids[i] for i in path] == ids
        assert [trie.depth[i] for i in path] == list(range(len(ids)))
        for t, i in enumerate(path):
            assert prefixes.setdefault(i, tuple(ids[:t + 1])) == tuple(ids[:t + 1])
    assert len(set(prefixes.values())) == len(trie) == len(prefixes)  # every distinct prefix once
    mask = trie.mask("cpu")[0, 0]
    for i, here in prefixes.items():
        assert {j for j in range(len(trie)) if mask[i, j]} == {j for j, p in prefixes.items() if here[:len(p)] == p}
    # The plan has the same context: for each segment, its ancestors' nodes and the earlier nodes of the segment itself.
    bounds = trie.starts + [len(trie)]
    for s, above in enumerate(trie.ancestors):
        context = [j for a in above for j in range(bounds[a], bounds[a + 1])]
        for i in range(bounds[s], bounds[s + 1]):
            assert context + list(range(bounds[s], i + 1)) == mask[i].nonzero()[:, 0].tolist()


def test_common_prefix():
    for a, b, n in [([], [], 0), ([1], [], 0), ([1], [2], 0), ([1, 2], [1], 1), ([1, 2, 3], [1, 2, 4], 2), ([1] * 99, [1] * 98, 98),
                    ([1] * 5, [1] * 5, 5), ([1, 2], [2, 2], 0)]:
        assert common_prefix(a, b) == common_prefix(b, a) == n
    rng = random.Random(0)
    for _ in range(200):
        a = [rng.randrange(2) for _ in range(rng.randrange(12))]
        b = [rng.randrange(2) for _ in range(rng.randrange(12))]
        assert common_prefix(a, b) == next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


# ---------------------------------------------------------------- exact values

@pytest.mark.parametrize("seed", range(8))
def test_logprobs_equal_one_by_one(full, seed, monkeypatch):
    monkeypatch.setattr(toolplay, "SEGMENT", (2, 128)[seed % 2])
    assert toolplay.takes_trie(full)
    rows = random_rows(seed)
    with torch.no_grad():
        expected = gather(rows, one_by_one(full, rows))
        for budget in (None, 1, 10, 40, 10 ** 6):
            got = token_logprobs(full, rows, budget=budget)
            assert got.dtype == torch.float32 and got.shape == expected.shape
            assert (got - expected).abs().max() < 1e-4
            assert not got[expected == 0].any()  # exactly 0 where nothing is trained


def test_all_logits_equal_one_by_one(full):
    """All logits at all nodes are equal, not only the log-probs of the tokens that follow."""
    rows = random_rows(3)
    trie = Trie([ids for ids, _ in rows])
    with torch.no_grad():
        logits = full(**trie.inputs("cpu")).logits[0]
        for (ids, _), path in zip(rows, trie.path):
            assert (logits[path] - full(input_ids=torch.tensor([ids])).logits[0]).abs().max() < 1e-4


def test_the_plan_and_the_plain_mask_agree(full):
    """The segment-wise attention equals one attention under the N x N mask, and the model uses it."""
    toolplay.takes_trie(full)
    trie, used = Trie([ids for ids, _ in random_rows(5)]), []
    inputs = trie.inputs("cpu")
    plan = inputs["attention_mask"].attend
    inputs["attention_mask"].attend = lambda *args: used.append(1) or plan(*args)
    with torch.no_grad():
        planned = full(**inputs).logits
        assert len(used) == 2  # once a layer
        inputs["attention_mask"] = trie.mask("cpu")
        assert (planned - full(**inputs).logits).abs().max() < 1e-4
    assert len(used) == 2


EDGES = {
    "one row": [([1, 2, 3], [0, 1, 1])],
    "one token": [([1], [1])],
    "only one-token rows": [([1], [1]), ([2], [0]), ([1], [0])],
    "same row, other masks": [([1, 2, 3, 4], [0, 0, 0, 1]), ([1, 2, 3, 4], [0, 1, 1, 0])],
    "duplicates": [([1, 2, 3], [0, 1, 1])] * 4,
    "chain of prefixes": [([1, 2, 3, 4, 5, 6][:n], [1] * n) for n in (6, 1, 3, 2, 5, 4)],
    "nothing shared": [([n, n, n], [0, 1, 1]) for n in range(5)],
    "branch at every depth": [([1] * n + [2, 3], [1] * (n + 2)) for n in range(7)],
    "nothing trained": [([1, 2], [0, 0]), ([1, 3, 4], [0, 0, 0])],
    "first token masked 1": [([5, 6], [1, 0]), ([7, 6], [1, 1])],
    "tuples": [((1, 2, 3), (0, 1, 1)), ((1, 2, 4), (0, 1, 1))],
}


def test_in_bf16_the_trie_stays_near_fp32(full):
    """A row's log-probs in bf16 are about as far from fp32 in a trie as they are alone."""
    rows = random_rows(3)
    exact = token_logprobs(full, rows)
    with torch.autocast("cpu", torch.bfloat16):
        shared, alone = token_logprobs(full, rows), gather(rows, one_by_one(full, rows))
    far = lambda x: float((x.detach().float() - exact.detach()).abs().mean())  # noqa: E731
    assert 0 < far(shared) < 2 * far(alone) < 0.2


def test_padding_changes_no_node(full):
    rows = [ids for ids, _ in random_rows(3)]
    plain, padded = Trie(rows), Trie(rows)
    for multiple, n in ((len(plain), len(plain)), (7, -(-len(plain) // 7) * 7), (64, 64), (64, 64)):
        padded.pad(multiple)
        assert len(padded) == n
    with torch.no_grad():
        expected, inputs = full(**plain.inputs("cpu")).logits[0], padded.inputs("cpu")
        assert (full(**inputs).logits[0, :len(plain)] - expected).abs().max() < 1e-4
        inputs["attention_mask"] = padded.mask("cpu")
        assert (full(**inputs).logits[0, :len(plain)] - expected).abs().max() < 1e-4


def test_in_bf16_all_matrices_have_round_sizes(full):
    """A CPU compiles a kernel for each size that is new, so that every batch would compile all of them."""
    sizes, rows = set(), random_rows(3)
    hooks = [m.register_forward_pre_hook(lambda m, x: sizes.add(x[0].shape[-2])) for m in full.modules()
             if isinstance(m, torch.nn.Linear)]
    try:
        token_logprobs(full, rows)
        assert any(n % 64 for n in sizes)  # fp32 needs no rounding
        sizes.clear()
        with torch.autocast("cpu", torch.bfloat16):
            token_logprobs(full, rows, want=("entropy", "hidden"), also=[1])
            token_logprobs(full, EDGES["nothing trained"])
        assert sizes and all(n % 64 == 0 or n == 1 for n in sizes)
    finally:
        for hook in hooks:
            hook.remove()


def test_in_half_precision_frozen_weights_are_cast_once(monkeypatch):
    """Their copies give the same bits as autocast's own casts, and follow their weights."""
    net, rows = model("llama").requires_grad_(False), random_rows(3)
    net.model.layers[1].requires_grad_(True)

    def logp():
        with torch.autocast("cpu", torch.bfloat16):
            return token_logprobs(net, rows).detach(), toolplay.frozen_in_half(net)

    before, copies = logp()
    again, kept = logp()
    assert copies and all(kept[name] is copy for name, copy in copies.items()) and torch.equal(before, again)
    assert not any(name.startswith("model.layers.1.") for name in copies)  # trained: autocast casts these
    assert {copy.dtype for copy in copies.values()} == {torch.bfloat16} and not toolplay.frozen_in_half(net)
    with torch.no_grad():
        net.model.layers[0].mlp.up_proj.weight.mul_(1.5)
    after, renewed = logp()
    assert [n for n, copy in renewed.items() if copies[n] is not copy] == ["model.layers.0.mlp.up_proj.weight"]
    down = net.model.layers[0].mlp.down_proj
    shape = down.weight.shape
    for n in range(20):  # other tensors, which may be given the address of the one before
        del down.weight
        down.weight = torch.nn.Parameter(torch.full(shape, float(n)), requires_grad=False)
        assert (logp()[1]["model.layers.0.mlp.down_proj.weight"] == n).all()
    after, _ = logp()
    monkeypatch.setattr(toolplay, "frozen_in_half", lambda net: {})
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(token_logprobs(net, rows), after) and not torch.equal(before, after)


def test_half_copies_leave_tied_embeddings_in_fp32():
    """The head of SmolLM2 is the table of embeddings; what is looked up there stays exact."""
    net, rows = model("llama").requires_grad_(False), random_rows(3)
    net.lm_head.weight = net.model.embed_tokens.weight
    seen = []
    net.model.embed_tokens.register_forward_hook(lambda m, x, y: seen.append(y.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        token_logprobs(net, rows)
        assert "lm_head.weight" in toolplay.frozen_in_half(net)
    assert seen[-1] is torch.float32


@pytest.mark.parametrize("name", EDGES)
def test_edges(full, name):
    rows = EDGES[name]
    with torch.no_grad():
        expected = gather(rows, one_by_one(full, [(list(ids), mask) for ids, mask in rows]))
        for budget in (None, 1, 5):
            got = token_logprobs(full, rows, budget=budget)
            assert got.shape == expected.shape and (got - expected).abs().max() < 1e-4


def test_empty_batch(full):
    with pytest.raises(toolplay.UserError, match="empty"):
        token_logprobs(full, [])


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.5])
def test_temperature_entropy_and_hidden(full, temperature):
    rows = random_rows(11)
    with torch.no_grad():
        log_p = one_by_one(full, rows, temperature)
        hidden = [full.base_model(torch.tensor([ids])).last_hidden_state[0] for ids, _ in rows]
        for budget in (None, 12):
            out = token_logprobs(full, rows, temperature, budget, want=("entropy", "hidden"))
            assert (out["logp"] - gather(rows, log_p)).abs().max() < 1e-4
            assert torch.equal(out["logp"], token_logprobs(full, rows, temperature, budget))
            assert (out["entropy"] - gather(rows, log_p, lambda p, _: -(p.exp() * p).sum())).abs().max() < 1e-4
            width = out["logp"].shape[1]
            expected = torch.zeros(len(rows), width, 32)
            for b, (ids, mask) in enumerate(rows):
                for t in range(1, len(ids)):
                    if mask[t]:
                        expected[b, t] = hidden[b][t - 1]
            assert out["hidden"].shape == expected.shape and (out["hidden"] - expected).abs().max() < 1e-4
        assert set(token_logprobs(full, rows, want=("entropy",))) == {"logp", "entropy"}


# ---------------------------------------------------------------- exact gradients

def gradients(model, objective):
    model.zero_grad(set_to_none=True)
    objective.backward()
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize("adapters", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("name", FULL + SLIDING)
def test_gradients_equal_one_by_one(name, adapters):
    net = model(name)
    if adapters:
        lora.add_lora(net, ["all-linear"], 4, 8.0, seed=0)
        with torch.no_grad():
            for p in lora.lora_parameters(net):  # B starts at zero, which would hide A's gradient
                p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    for seed in range(20, 24):
        rows = random_rows(seed)
        weight = torch.randn(len(rows), max(len(ids) for ids, _ in rows), generator=torch.Generator().manual_seed(seed))
        expected = gradients(net, (weight * gather(rows, one_by_one(net, rows))).sum())
        assert close(gradients(net, (weight * token_logprobs(net, rows)).sum()), expected, 1e-4)
        # As in the training step: backward for each micro-batch, and the gradients are added.
        parts = [(weight[group][:, :max(len(rows[b][0]) for b in group)] * token_logprobs(net, [rows[b] for b in group])).sum()
                 for group in micro_batches([[row] for row in rows], 25)]
        assert close(gradients(net, sum(parts)), expected, 1e-4)


def test_gradient_through_entropy_and_hidden(full):
    rows = random_rows(31)
    out = token_logprobs(full, rows, want=("entropy", "hidden"))
    log_p = one_by_one(full, rows)
    got = gradients(full, out["entropy"].sum())
    assert close(got, gradients(full, gather(rows, log_p, lambda p, _: -(p.exp() * p).sum()).sum()), 1e-4)
    assert out["hidden"].requires_grad


# ---------------------------------------------------------------- models that take no tree mask

@pytest.mark.parametrize("name", SLIDING)
def test_sliding_windows_fall_back(name, capsys):
    net = model(name)
    rows = random_rows(2) + [([b % 7 for b in range(30)], [1] * 30), ([b % 7 for b in range(29)] + [9], [1] * 30)]  # longer than the window
    with torch.no_grad():
        expected = gather(rows, one_by_one(net, rows))
        got = token_logprobs(net, rows)
        assert (got - expected).abs().max() < 1e-4
        line = capsys.readouterr().err
        assert len(line.splitlines()) == 1 and type(net).__name__ in line and "one sequence per forward" in line
        out = token_logprobs(net, rows, 1.5, budget=20, want=("entropy", "hidden"))
        assert (out["logp"] - gather(rows, one_by_one(net, rows, 1.5))).abs().max() < 1e-4
        assert out["hidden"].shape == (*got.shape, 32)
    assert capsys.readouterr().err == ""  # the message appears once


def test_attention_without_tree_masks_is_noticed(capsys):
    """The eager kernel adds a mask instead of applying it; the trial notices a difference, whatever the reason."""
    net = model("llama")
    net.set_attn_implementation("eager")
    rows = random_rows(4)
    with torch.no_grad():
        assert (token_logprobs(net, rows) - gather(rows, one_by_one(net, rows))).abs().max() < 1e-4


def test_another_kind_of_attention_is_tried_anew():
    net, rows = model("llama"), random_rows(4)
    assert toolplay.takes_trie(net)
    net.set_attn_implementation("eager")
    with torch.no_grad():
        assert (token_logprobs(net, rows) - gather(rows, one_by_one(net, rows))).abs().max() < 1e-4


def test_the_trial_is_in_full_precision_and_out_of_memory_is_no_verdict(monkeypatch):
    net, seen = model("llama"), []

    def full(*args):
        seen.append(torch.get_float32_matmul_precision())
        raise torch.OutOfMemoryError
    monkeypatch.setattr(toolplay, "_logprobs", full)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        with pytest.raises(torch.OutOfMemoryError):
            toolplay.takes_trie(net)
        assert seen == ["highest"] and torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)


def test_positions_that_depend_on_a_row_s_length_fall_back():
    """Dynamic RoPE changes the angles of all positions if a row is longer than the model's context. A trie has rows of many
    lengths."""
    import transformers
    torch.manual_seed(0)
    net = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=8,
        rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0})).eval()
    rows = [([b % 7 for b in range(n)], [1] * n) for n in (5, 12, 30)]
    with torch.no_grad():
        assert not toolplay.takes_trie(net)
        assert (token_logprobs(net, rows) - gather(rows, one_by_one(net, rows))).abs().max() < 1e-4


def test_trial_leaves_the_mode_alone():
    for training in (True, False):
        net = model("llama").train(training)
        toolplay.takes_trie(net)
        assert net.training is training and net.model.layers[0].training is training


def test_dropout_of_attention_does_not_depend_on_the_micro_batch():
    """GPT-2 has attention dropout 0.1 in training. We use none, whether a row is alone or not."""
    net = model("gpt2").train()
    net.transformer.drop.p = 0.0
    for block in net.transformer.h:
        block.mlp.dropout.p = block.attn.resid_dropout.p = 0.0
    row = ([1, 2, 3, 4], [0, 1, 1, 1])
    with torch.no_grad():
        assert (token_logprobs(net, [row]) - token_logprobs(net, [row, ([1, 2, 5], [0, 1, 1])])[:1]).abs().max() < 1e-5


# ---------------------------------------------------------------- budgets

@pytest.mark.parametrize("seed", range(12))
def test_micro_batches_keep_the_budget_and_the_units(seed):
    rng, rows = random.Random(seed), random_rows(seed, most=30)
    units = []
    while rows:
        size = rng.randint(1, 3)
        units.append(rows[:size])
        rows = rows[size:]
    for budget in (1, 7, 20, 60, 10 ** 6):
        groups = micro_batches(units, budget)
        assert sorted(u for group in groups for u in group) == list(range(len(units)))
        for group in groups:
            size = len(Trie([ids for u in group for ids, _ in units[u]]))
            assert size <= budget or len(group) == 1
            assert size == len(nodes([row for u in group for row in units[u]]))
    assert micro_batches(units) == [list(range(len(units)))]
    assert len(micro_batches(units, 10 ** 6)) == 1


def test_forwards_stay_in_the_budget(full):
    rows, sizes = random_rows(7) + random_rows(8) + random_rows(9), []
    hook = full.register_forward_pre_hook(lambda module, args, kwargs: sizes.append(kwargs["input_ids"].shape[1]), with_kwargs=True)
    with torch.no_grad():
        token_logprobs(full, rows, budget=30)
    hook.remove()
    assert len(sizes) > 1 and max(sizes) <= 30


def test_shared_prompts_are_packed_together():
    """Units that arrive interleaved are grouped by the prefix that they share."""
    units = [[([n % 2] * 20 + [n], [1] * 21)] for n in range(2, 10)]
    groups = micro_batches(units, 24)
    assert [sorted(g) for g in groups] == [[0, 2, 4, 6], [1, 3, 5, 7]]


def test_the_trial_is_not_fooled_by_half_precision(capsys):
    net = model("llama")
    with torch.autocast("cpu", torch.bfloat16):
        assert toolplay.takes_trie(net)
    assert "falling back" not in capsys.readouterr().err


def test_rows_that_extend_each_other_are_one_segment():
    assert Trie([[1, 2], [1, 2, 3], [1, 2, 3, 4]]).starts == [0]
    assert Trie([[1, 2], [1, 2, 3, 4], [1, 2, 5], [6]]).starts == [0, 2, 4, 5]


def test_a_long_chain_is_several_segments():
    trie = Trie([[1] * 300 + [2], [1] * 300 + [3] * 129])
    assert trie.starts == [0, 128, 256, 300, 301, 429]
    assert trie.ancestors == [[], [0], [0, 1], [0, 1, 2], [0, 1, 2], [0, 1, 2, 4]]
