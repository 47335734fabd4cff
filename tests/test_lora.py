"""lora.py against hand-computed numbers and against PEFT (a test-time extra) as the oracle.

PEFT: pip install --no-deps peft==0.21.2 accelerate==1.15.0 psutil==7.2.2
"""
import contextlib
import copy
import inspect
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import lora  # noqa: E402
from lora import (LoRALinear, add_lora, freeze_lowest, load_adapter, lora_disabled, lora_parameters, lora_state, merge, merged,  # noqa: E402
                  remove, save_adapter, unmerge)

LLAMA_TARGETS = ["q_proj", "v_proj", "down_proj"]
GPT2_TARGETS = ["c_attn", "c_fc"]


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(6, 10)
        self.down = nn.Linear(10, 6)

    def forward(self, x):
        return self.down(torch.tanh(self.up(x)))


class Toy(nn.Module):
    """Two blocks and a head, small enough to look at the numbers."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 6)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.lm_head = nn.Linear(6, 7)

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = x + block(x)
        return self.lm_head(x)


IDS = torch.tensor([[1, 2, 3, 4], [6, 5, 0, 2]])


def toy(dtype=torch.float32):
    torch.manual_seed(0)
    return Toy().to(dtype)


def randomise(model, seed=1):
    """The model with adapters as after training: B is no longer zero."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in lora_state(model).values():
        tensor.copy_(0.3 * torch.randn(tensor.shape, generator=generator))
    return model


def adapted(dtype=torch.float32, **kwargs):
    model = toy(dtype)
    add_lora(model, **{"targets": ["up", "down"], "r": 3, "alpha": 6, "seed": 0, **kwargs})
    return randomise(model)


def snapshot(model):
    return {k: v.clone() for k, v in model.state_dict().items()}, {n: p.requires_grad for n, p in model.named_parameters()}


def assert_unchanged(model, before):
    state, grads = snapshot(model)
    assert grads == before[1] and list(state) == list(before[0])
    assert all(torch.equal(state[k], before[0][k]) for k in state)


# --- the layer ---


@pytest.mark.parametrize("rslora, expected", [(False, [9.0, 22.0]), (True, [1 + 8 * math.sqrt(2), 2 + 20 * math.sqrt(2)])])
def test_forward_by_hand(rslora, expected):
    base = nn.Linear(3, 2)
    base.weight.data = torch.tensor([[1.0, 0, 0], [0, 1.0, 0]])
    base.bias.data = torch.tensor([0.0, 1.0])
    layer = LoRALinear(base, r=2, alpha=2, rslora=rslora)
    layer.lora_A.data = torch.tensor([[1.0, 1.0, 1.0], [2.0, 0.0, 0.0]])
    layer.lora_B.data = torch.tensor([[1.0, 1.0], [3.0, 1.0]])
    # x = (1, 1, 4): base (1, 2), A x = (6, 2), B A x = (8, 20); scaling 2/2 = 1 or 2/sqrt(2)
    assert layer.scaling == pytest.approx(2 / math.sqrt(2) if rslora else 1.0)
    torch.testing.assert_close(layer(torch.tensor([1.0, 1.0, 4.0])), torch.tensor(expected))


def test_starts_at_the_base_and_only_adapters_learn():
    model = toy()
    before = model(IDS)
    names = add_lora(model, ["up", "down"], r=2, alpha=4, seed=0)
    assert names == ["blocks.0.up", "blocks.0.down", "blocks.1.up", "blocks.1.down"]
    assert torch.equal(model(IDS), before)
    randomise(model)(IDS).sum().backward()
    with_grad = {n for n, p in model.named_parameters() if p.grad is not None}
    assert with_grad == set(lora_state(model)) == {n for n, p in model.named_parameters() if p.requires_grad}
    assert all(p.grad.abs().sum() > 0 for p in lora_parameters(model))
    assert len(lora_parameters(model)) == 8


def test_dropout_acts_on_the_adapter_input_only_and_follows_the_mode():
    model = toy().eval()
    add_lora(model, ["up"], r=2, alpha=4, dropout=0.5, seed=0)
    layer = randomise(model).blocks[0].up
    x = torch.ones(2000, 6)
    assert torch.equal(layer(x), layer(x))  # the model was in eval(), so the new layers are, too
    layer.train()
    delta = layer(x) - layer.base(x)
    assert delta.std(0).max() > 0.01  # random ...
    exact = layer.scaling * (layer.lora_B @ layer.lora_A).sum(1)
    torch.testing.assert_close(delta.mean(0), exact, atol=0.1, rtol=0)  # ... around the exact delta
    torch.testing.assert_close(layer.eval()(x)[0] - layer.base(x)[0], exact)


@pytest.mark.parametrize("base_dtype", [torch.float32, torch.bfloat16])
def test_adapters_stay_fp32_with_half_base_and_autocast(base_dtype):
    model = adapted(base_dtype)
    reference = adapted()(IDS)
    assert {p.dtype for p in lora_parameters(model)} == {torch.float32}
    plain = model(IDS)
    assert plain.dtype == base_dtype
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(IDS)
    assert out.dtype == torch.bfloat16
    for y in (plain, out):
        torch.testing.assert_close(y.float(), reference, atol=0.1, rtol=0.05)
    out.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in lora_parameters(model))


# --- choosing layers ---


@pytest.mark.parametrize("targets, names", [
    ("up", ["blocks.0.up", "blocks.1.up"]),
    (["blocks.1.*"], ["blocks.1.up", "blocks.1.down"]),
    (["blocks.1.up"], ["blocks.1.up"]),
    (["down", "*.0.up"], ["blocks.0.up", "blocks.0.down", "blocks.1.down"]),
    ("all-linear", ["blocks.0.up", "blocks.0.down", "blocks.1.up", "blocks.1.down"]),
    (["lm_head"], ["lm_head"]),
])
def test_targets(targets, names):
    assert add_lora(toy(), targets, r=1, alpha=1) == names


def test_all_linear_leaves_out_a_head_of_any_name():
    model = toy()
    model.get_output_embeddings = lambda: model.blocks[1].down
    assert add_lora(model, "all-linear", r=1, alpha=1) == ["blocks.0.up", "blocks.0.down", "blocks.1.up"]


def test_the_lowest_layers_can_be_left_out():
    every = add_lora(toy(), "all-linear", r=1, alpha=1)
    assert add_lora(toy(), "all-linear", r=1, alpha=1, skip=0.5) == [n for n in every if "blocks.0." not in n] != every
    assert add_lora(toy(), "all-linear", r=1, alpha=1, skip=0.49) == every  # a share is rounded down to whole layers
    with pytest.raises(ValueError, match="leaves no layer"):
        add_lora(toy(), "all-linear", r=1, alpha=1, skip=1.0)


def test_without_adapters_the_lowest_layers_can_be_frozen():
    model = toy()
    for skip, frozen in ((0.5, ("blocks.1.",)), (0.49, ("blocks.0.", "blocks.1."))):
        freeze_lowest(model, skip)
        assert {n for n, p in model.named_parameters() if p.requires_grad} == {n for n, _ in model.named_parameters()
                                                                               if n.startswith(frozen)}
    with pytest.raises(ValueError, match="leaves no layer"):
        freeze_lowest(model, 1.0)


@pytest.mark.parametrize("kwargs, words", [
    ({"targets": ["upp"]}, "upp; the model has: down, lm_head, up"),
    ({"targets": ["up", "embed"]}, "matches embed"),
    ({"targets": []}, "empty list"),
    ({"r": 0}, "r=0"), ({"r": -1}, "r=-1"), ({"r": 2.0}, "r=2.0"), ({"r": True}, "r=True"),
    ({"alpha": 0}, "alpha=0"), ({"alpha": float("nan")}, "alpha=nan"), ({"dropout": 1.0}, "dropout=1.0"),
    ({"dropout": -0.1}, "dropout=-0.1"), ({"rslora": 1}, "rslora=1"),
])
def test_impossible_requests_leave_the_model_alone(kwargs, words):
    model = toy()
    before = snapshot(model)
    with pytest.raises(ValueError, match=words.replace(".", r"\.")) as error:
        add_lora(model, **{"targets": ["up"], "r": 2, "alpha": 4, **kwargs})
    assert "\n" not in str(error.value)
    assert_unchanged(model, before)


def test_adding_twice_is_an_error():
    model = adapted()
    with pytest.raises(ValueError, match="already"):
        add_lora(model, ["up"], r=2, alpha=4)


def test_initialisation_is_seeded_and_leaves_the_global_rng_alone():
    def state(seed, global_seed=0):
        model = toy()
        torch.manual_seed(global_seed)
        before = torch.get_rng_state()
        add_lora(model, ["up"], r=4, alpha=4, seed=seed)
        assert torch.equal(torch.get_rng_state(), before)
        return lora_state(model)

    first, again, other = state(3), state(3, global_seed=9), state(4)
    assert list(first) == ["blocks.0.up.lora_A", "blocks.0.up.lora_B", "blocks.1.up.lora_A", "blocks.1.up.lora_B"]
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert not torch.equal(first["blocks.0.up.lora_A"], other["blocks.0.up.lora_A"])
    assert not torch.equal(first["blocks.0.up.lora_A"], first["blocks.1.up.lora_A"])
    assert first["blocks.0.up.lora_A"].abs().max() <= 1 / math.sqrt(6)  # kaiming with a = sqrt(5)
    assert not first["blocks.0.up.lora_B"].any()
    no_seed = [state(None, global_seed=s)["blocks.0.up.lora_A"] for s in (1, 1, 2)]
    assert torch.equal(no_seed[0], no_seed[1]) and not torch.equal(no_seed[0], no_seed[2])


# --- merge, disable ---


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.1)])
def test_merge_computes_the_same_and_unmerge_restores_the_bits(dtype, tolerance):
    model = adapted(dtype)
    before, out = snapshot(model), model(IDS)
    model.eval()
    assert_unchanged(model, before)  # eval() does not merge
    merge(model)
    assert not torch.equal(model.blocks[0].up.base.weight, before[0]["blocks.0.up.base.weight"])
    torch.testing.assert_close(model(IDS), out, atol=tolerance, rtol=tolerance)
    unmerge(model)
    assert_unchanged(model, before)
    assert torch.equal(model(IDS), out)


def test_a_merged_model_can_be_a_plain_one_again():
    model = adapted()
    names, out = {name for name, _ in toy().named_parameters()}, model(IDS)
    merge(model)
    remove(model)
    assert {name for name, _ in model.named_parameters()} == names
    torch.testing.assert_close(model(IDS), out, atol=1e-5, rtol=1e-5)


def test_merge_is_computed_in_fp32_even_under_autocast():
    model = adapted(torch.bfloat16)
    layer = model.blocks[0].up
    W0 = layer.base.weight.clone()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        merge(model)
    exact = W0.double() + layer.scaling * layer.lora_B.double() @ layer.lora_A.double()
    assert torch.equal(layer.base.weight, exact.float().bfloat16())


def test_merge_in_the_wrong_state():
    model = adapted()
    with pytest.raises(ValueError, match="not merged"):
        unmerge(model)
    merge(model)
    for action in (merge, lambda m: lora_disabled(m).__enter__()):
        with pytest.raises(ValueError, match="unmerge first"):
            action(model)
    unmerge(model)
    with lora_disabled(model), pytest.raises(ValueError, match="switched off"):
        merge(model)
    with pytest.raises(ValueError, match="no LoRA adapters"):
        merge(toy())
    with pytest.raises(ValueError, match="no LoRA adapters"):
        with lora_disabled(toy()):
            pass


def test_a_shared_weight_is_not_merged():
    model = toy()
    model.lm_head.weight = model.embed.weight
    add_lora(model, ["lm_head", "up"], r=2, alpha=4)
    before = snapshot(model)
    with pytest.raises(ValueError, match="lm_head cannot be merged"):
        merge(model)
    assert_unchanged(model, before)
    on = model(IDS)
    with merged(model):  # the shared weight stays unmerged: merging is only for speed
        assert torch.equal(model(IDS), on)
    assert_unchanged(model, before)


def test_disabled_is_the_base_bit_for_bit_nested_and_after_an_exception():
    model, base = adapted(), toy()(IDS)
    on = model(IDS)
    assert not torch.allclose(on, base)
    with lora_disabled(model):
        assert torch.equal(model(IDS), base)
        with lora_disabled(model):
            pass
        assert torch.equal(model(IDS), base)
    assert torch.equal(model(IDS), on)
    with pytest.raises(KeyError):
        with lora_disabled(model):
            raise KeyError
    assert torch.equal(model(IDS), on)
    model.blocks[0].up.enabled = False  # a layer that was off before stays off
    partly = model(IDS)
    with lora_disabled(model):
        pass
    assert torch.equal(model(IDS), partly)


# --- files ---


@pytest.mark.parametrize("targets, written", [
    (["up", "down"], ["down", "up"]),
    (["blocks.0.up", "blocks.1.down"], ["blocks.0.up", "blocks.1.down"]),
])
def test_round_trip(tmp_path, targets, written):
    model = adapted(targets=targets, rslora=True, alpha=5, dropout=0.25)
    save_adapter(model, tmp_path / "a" / "b", base_model_name="me/base")
    config = json.loads((tmp_path / "a/b/adapter_config.json").read_text())
    assert config["target_modules"] == written
    assert config["use_rslora"] is True and config["base_model_name_or_path"] == "me/base"
    assert sorted(p.name for p in (tmp_path / "a/b").iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    fresh = toy()
    load_adapter(fresh, tmp_path / "a" / "b")
    assert torch.equal(fresh.eval()(IDS), model.eval()(IDS))
    assert list(lora_state(fresh)) == list(lora_state(model))
    assert {n for n, p in fresh.named_parameters() if p.requires_grad} == set(lora_state(fresh))
    again = randomise(adapted(targets=targets, rslora=True, alpha=5), seed=7)
    load_adapter(again, tmp_path / "a" / "b")
    assert torch.equal(again.eval()(IDS), model(IDS))


def test_names_that_are_endings_of_others_are_written_as_a_pattern(tmp_path):
    model = nn.ModuleDict({"up": nn.Linear(2, 2), "block": nn.ModuleDict({"up": nn.Linear(2, 2)})})
    fresh = copy.deepcopy(model)
    model["up"] = LoRALinear(model["up"], r=1, alpha=1)
    save_adapter(model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"] == "up"
    load_adapter(fresh, tmp_path)
    assert list(lora.lora_layers(fresh)) == ["up"]


@pytest.mark.parametrize("target_modules", [
    ["blocks.0.up", "blocks.1.up"], ["0.up", "1.up"], ["up"], r".*\.(up|sideways)", "blocks.[01].up"])
def test_target_modules_as_peft_may_write_them(tmp_path, target_modules):
    model = adapted(targets=["up"])
    save_adapter(model, tmp_path)
    edit_config(tmp_path, target_modules=target_modules)
    fresh = toy()
    load_adapter(fresh, tmp_path)
    assert torch.equal(fresh(IDS), model(IDS))


def test_all_linear_in_a_file(tmp_path):
    save_adapter(adapted(), tmp_path)
    edit_config(tmp_path, target_modules="all-linear")
    load_adapter(toy(), tmp_path)


def test_only_one_setting_can_be_saved(tmp_path):
    model = adapted(targets=["up"])
    model.blocks[0].down = LoRALinear(model.blocks[0].down, r=5, alpha=1)
    for wrong in (model, toy()):
        with pytest.raises(ValueError, match="one adapter setting"):
            save_adapter(wrong, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def edit_config(folder, **changes):
    path = folder / "adapter_config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))


def edit_tensors(folder, change):
    from safetensors.torch import load_file, save_file
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


KEY = "base_model.model.blocks.0.up.lora_A.weight"
SPOILERS = {
    "no folder": (lambda d: shutil.rmtree(d), "adapter_config.json: .*No such file"),
    "no config": (lambda d: (d / "adapter_config.json").unlink(), "adapter_config.json: .*No such file"),
    "no weights": (lambda d: (d / "adapter_model.safetensors").unlink(), "adapter_model.safetensors: .*No such file"),
    "cut config": (lambda d: (d / "adapter_config.json").write_text('{"r": 3'), "adapter_config.json: "),
    "binary config": (lambda d: (d / "adapter_config.json").write_bytes(b"\xff\xfe\x00"), "adapter_config.json: "),
    "deep config": (lambda d: (d / "adapter_config.json").write_text("[" * 200_000), "adapter_config.json: "),
    "list config": (lambda d: (d / "adapter_config.json").write_text("[]"), "not a JSON object"),
    "cut weights": (lambda d: (d / "adapter_model.safetensors").write_bytes(
        (d / "adapter_model.safetensors").read_bytes()[:-5]), "adapter_model.safetensors: "),
    "empty weights": (lambda d: (d / "adapter_model.safetensors").write_bytes(b""), "adapter_model.safetensors: "),
    "garbage weights": (lambda d: (d / "adapter_model.safetensors").write_bytes(b"\x80\x04garbage" * 9),
                        "adapter_model.safetensors: "),
    "weights are a folder": (lambda d: ((d / "adapter_model.safetensors").unlink(),
                                        (d / "adapter_model.safetensors").mkdir()), "adapter_model.safetensors: "),
    "missing tensor": (lambda d: edit_tensors(d, lambda t: t.pop(KEY)), f"safetensors: {KEY} is missing"),
    "unexpected tensor": (lambda d: edit_tensors(d, lambda t: t.update(x=torch.ones(1))), "x is unexpected"),
    "wrong shape": (lambda d: edit_tensors(d, lambda t: t.update({KEY: torch.ones(3, 5)})),
                    r"lora_A.weight is torch.float32 \[3, 5\], the model needs floats \[3, 6\]"),
    "integers": (lambda d: edit_tensors(d, lambda t: t.update({KEY: torch.ones(3, 6, dtype=torch.int8)})), "int8"),
    "no r": (lambda d: edit_config(d, r=...), "not a JSON object with lora_alpha, peft_type, r"),
    "bad r": (lambda d: edit_config(d, r="3"), "r='3'"),
    "bad alpha": (lambda d: edit_config(d, lora_alpha=float("inf")), "alpha=inf"),
    "other r": (lambda d: edit_config(d, r=4), "adapter_"),
    "target gone": (lambda d: edit_config(d, target_modules=None), "target_modules must be"),
    "target numbers": (lambda d: edit_config(d, target_modules=[1]), "target_modules must be"),
    "dora": (lambda d: edit_config(d, use_dora=True), "use_dora = True is not supported"),
    "rank_pattern": (lambda d: edit_config(d, rank_pattern={"up": 8}), "rank_pattern"),
    "bias": (lambda d: edit_config(d, bias="all"), "bias = 'all'"),
    "pissa": (lambda d: edit_config(d, init_lora_weights="pissa"), "init_lora_weights = 'pissa'"),
    "not lora": (lambda d: edit_config(d, peft_type="IA3"), "peft_type = 'IA3'"),
    "modules_to_save": (lambda d: edit_config(d, modules_to_save=["lm_head"]), "modules_to_save"),
    "from the future": (lambda d: edit_config(d, use_newest_trick=1), "use_newest_trick"),
}
FRESH_ONLY = {  # a model that already has adapters does not read target_modules
    "target regex": (lambda d: edit_config(d, target_modules="(up"), "adapter_config.json: "),
    "target unknown": (lambda d: edit_config(d, target_modules=["zzz"]), "match no linear layer"),
    "target too few": (lambda d: edit_config(d, target_modules=["up"]), "unexpected"),
    "target too many": (lambda d: edit_config(d, target_modules=["up", "down", "lm_head"]), "missing"),
}


@pytest.mark.parametrize("fresh, case", [(f, c) for f in (True, False) for c in SPOILERS] + [(True, c) for c in FRESH_ONLY])
def test_bad_files_are_refused_in_one_line_and_the_model_is_unchanged(tmp_path, fresh, case):
    spoil, words = {**SPOILERS, **FRESH_ONLY}[case]
    save_adapter(adapted(), tmp_path)
    spoil(tmp_path)
    model = toy() if fresh else randomise(adapted(), seed=2)
    before = snapshot(model)
    with pytest.raises(ValueError, match=words) as error:
        load_adapter(model, tmp_path)
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)
    assert_unchanged(model, before)


@pytest.mark.parametrize("changes", [{"lora_alpha": 7}, {"use_rslora": True}])
def test_another_scaling_is_not_loaded_into_existing_adapters(tmp_path, changes):
    save_adapter(adapted(), tmp_path)
    edit_config(tmp_path, **changes)
    with pytest.raises(ValueError, match="in the model it is"):
        load_adapter(adapted(), tmp_path)


def test_loading_into_a_merged_model_is_refused(tmp_path):
    model = adapted()
    save_adapter(model, tmp_path)
    merge(model)
    with pytest.raises(ValueError, match="unmerge first"):
        load_adapter(model, tmp_path)


# --- the file alone ---


def save_pair(folder):
    torch.manual_seed(0)
    model = nn.ModuleDict({"one": nn.Linear(3, 4), "two": nn.Linear(4, 3)})
    add_lora(model, ["one", "two"], r=2, alpha=4, seed=0)
    save_adapter(model, folder)


def test_lora_py_alone_in_an_empty_folder_writes_the_same_bytes(tmp_path):
    shutil.copy(ROOT / "lora.py", tmp_path)
    code = ("import lora, sys, torch; from torch import nn; from lora import *; lora.main()\n" + inspect.getsource(save_pair) + "\n"
            "save_pair('there'); assert 'transformers' not in sys.modules and 'peft' not in sys.modules")
    out = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, timeout=60, capture_output=True, text=True,
                         env={**os.environ, "PYTHONHASHSEED": "1"})
    assert out.stdout.count("error") == 3
    save_pair(tmp_path / "here")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "here" / name).read_bytes() == (tmp_path / "there" / name).read_bytes()


def test_demo_reaches_what_is_possible_for_each_rank():
    before = torch.get_rng_state()
    rows = lora.demo()
    assert torch.equal(torch.get_rng_state(), before)
    assert [row["trained"] for row in rows] == [16, 32, 64]
    for row in rows:
        assert row["error"] == pytest.approx(row["best"], abs=1e-3)
        assert row["merge_error"] < 1e-5
    assert rows[0]["best"] > 1 and rows[1]["best"] < 1e-4


# --- PEFT as the oracle ---


def tiny(kind):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    if kind == "llama":
        config = transformers.LlamaConfig(vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
                                          num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True)
        return transformers.LlamaForCausalLM(config).eval()
    config = transformers.GPT2Config(vocab_size=50, n_positions=16, n_embd=16, n_layer=2, n_head=2,
                                     bos_token_id=0, eos_token_id=0)
    return transformers.GPT2LMHeadModel(config).eval()


def logits(model):
    with torch.no_grad():
        return model(torch.arange(10).reshape(2, 5)).logits


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("conv1d", [False, True])
def test_layer_equals_peft(rslora, conv1d):
    pytest.importorskip("peft")
    from peft import LoraConfig
    from peft.tuners.lora.layer import Linear
    torch.manual_seed(0)
    base = nn.Linear(16, 24)
    if conv1d:
        from transformers.pytorch_utils import Conv1D
        base = Conv1D(24, 16)
    config = LoraConfig(r=4, lora_alpha=8, init_lora_weights=True, use_rslora=rslora, fan_in_fan_out=conv1d)
    theirs = Linear(copy.deepcopy(base), "default", config=config, r=4, lora_alpha=8)
    ours = randomise(LoRALinear(base, r=4, alpha=8, rslora=rslora))
    theirs.lora_A["default"].weight.data.copy_(ours.lora_A)
    theirs.lora_B["default"].weight.data.copy_(ours.lora_B)
    x = torch.randn(3, 5, 16)
    torch.testing.assert_close(ours(x), theirs(x), atol=1e-6, rtol=1e-6)
    merge(ours)
    theirs.merge()
    torch.testing.assert_close(ours.base.weight, theirs.base_layer.weight, atol=1e-6, rtol=1e-6)


CASES = [("llama", LLAMA_TARGETS), ("llama", ["model.layers.1.self_attn.q_proj"]), ("llama", "all-linear"),
         ("gpt2", GPT2_TARGETS), ("gpt2", ["*.attn.c_proj"]), ("gpt2", "all-linear")]


@pytest.mark.filterwarnings("error:.*adapter:UserWarning")
@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("kind, targets", CASES)
def test_peft_reads_our_files(tmp_path, kind, targets, rslora):
    peft = pytest.importorskip("peft")
    ours = tiny(kind)
    add_lora(ours, targets, r=4, alpha=8, dropout=0.1, rslora=rslora, seed=0)
    randomise(ours.eval())
    save_adapter(ours, tmp_path)
    theirs = peft.PeftModel.from_pretrained(tiny(kind), str(tmp_path)).eval()
    assert len(peft.get_peft_model_state_dict(theirs)) == len(lora_state(ours))
    assert not torch.allclose(logits(ours), logits(tiny(kind)), atol=1e-3)
    torch.testing.assert_close(logits(ours), logits(theirs), atol=1e-5, rtol=0)
    merge(ours)
    torch.testing.assert_close(logits(ours), logits(theirs), atol=1e-5, rtol=0)


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("kind, targets", [
    ("llama", LLAMA_TARGETS), ("llama", "all-linear"), ("llama", r".*layers\.1.*\.(q|k)_proj"),
    ("llama", ["layers.0.mlp.up_proj"]), ("gpt2", GPT2_TARGETS), ("gpt2", "all-linear")])
def test_we_read_peft_files(tmp_path, kind, targets, rslora):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=targets, use_rslora=rslora,
                             lora_dropout=0.1, init_lora_weights=False, fan_in_fan_out=kind == "gpt2")
    theirs = peft.get_peft_model(tiny(kind), config).eval()
    theirs.save_pretrained(tmp_path)
    ours = tiny(kind)
    load_adapter(ours, tmp_path)
    assert not torch.allclose(logits(ours), logits(tiny(kind)), atol=1e-3)
    torch.testing.assert_close(logits(ours), logits(theirs), atol=1e-5, rtol=0)
    assert lora.lora_layers(ours)[next(iter(lora.lora_layers(ours)))].dropout.p == 0.1


def test_the_frozen_head_that_peft_writes_along(tmp_path):
    peft = pytest.importorskip("peft")
    theirs = peft.get_peft_model(tiny("llama"), peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["lm_head", "q_proj"],
                                                                init_lora_weights=False)).eval()
    theirs.save_pretrained(tmp_path, save_embedding_layers=True)
    assert any(key.endswith("base_layer.weight") for key in safetensors.torch.load_file(tmp_path / "adapter_model.safetensors"))
    ours = tiny("llama")
    load_adapter(ours, tmp_path)
    torch.testing.assert_close(logits(ours), logits(theirs), atol=1e-5, rtol=0)
    other = tiny("llama")
    other.lm_head.weight = torch.nn.Parameter(other.lm_head.weight + 1)
    with pytest.raises(ValueError, match="belongs to other weights"):
        load_adapter(other, tmp_path)


def test_a_module_or_memory_with_two_names_is_not_merged():
    """The adapter stands at one of the names only, and merging would change what the other computes."""
    class Two(torch.nn.Module):
        def __init__(self, how):
            super().__init__()
            self.a = torch.nn.Linear(4, 4, bias=False)
            self.b = self.a if how == "module" else torch.nn.Linear(4, 4, bias=False)
            if how == "memory":
                self.b.weight = torch.nn.Parameter(self.a.weight.data)

        def forward(self, x):
            return self.b(self.a(x))
    class Again(torch.nn.Module):  # one adapted layer, reached by two names: merging is right
        def __init__(self):
            super().__init__()
            self.block = torch.nn.ModuleDict({"a": torch.nn.Linear(4, 4, bias=False)})
            self.same = self.block

        def forward(self, x):
            return self.same["a"](self.block["a"](x))
    net, x = Again(), torch.randn(3, 4)
    lora.add_lora(net, ["a"], 2, 4)
    torch.nn.init.normal_(net.block["a"].lora_B)
    before = net(x)
    lora.merge(net)
    assert torch.allclose(net(x), before, atol=1e-4)
    for how in ("module", "memory", ""):
        net = Two(how)
        lora.add_lora(net, ["a"], 2, 4)
        torch.nn.init.normal_(net.a.lora_B)
        x = torch.randn(3, 4)
        before = net(x)
        with lora.merged(net):
            assert torch.allclose(net(x), before, atol=1e-5)
        with contextlib.nullcontext() if not how else pytest.raises(lora.SharedWeight):
            lora.merge(net)
