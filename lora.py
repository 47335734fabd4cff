"""LoRA: fine-tune a model by learning a small low-rank correction to its linear layers.

The idea. A linear layer W0 has millions of weights, but the *change* that fine-tuning makes to
it needs far fewer numbers. So we freeze W0 and learn only a product of two thin matrices: A
squeezes the input from `in` down to `r` numbers, B widens these r numbers to `out`. B starts at
zero, so training starts exactly at the base model. With the adapter switched off, the model
computes bit for bit what the base model computes: a reference model for free.

The equations.

    h = W0 x + scaling * B A x          A: [r, in]  B: [out, r]       (Hu et al. 2021, eq. 3)
    scaling = alpha / r                                               (Hu et al. 2021, sec. 4.1)
    scaling = alpha / sqrt(r)           rsLoRA: large ranks learn too (Kalajdzievski 2023)
    W_merged = W0 + scaling * B A       one matrix again, no extra cost at inference

    Hu et al. 2021, arXiv:2106.09685; Kalajdzievski 2023, arXiv:2312.03732

Departures from the paper.
  * A starts as kaiming_uniform(a=sqrt(5)), as in the authors' code and in PEFT; the paper says
    Gaussian. Both work, because B is zero.
  * Merging is an explicit call, never a side effect of eval() as in the authors' code. It keeps a
    copy of W0, because subtracting B A would not restore the same bits (in bf16, with an update a
    tenth of W0's size, 8 % of the numbers come back different).
  * A and B stay in fp32 when the base model is in half precision, because their updates are small.

Files use the layout of PEFT (https://github.com/huggingface/peft): PEFT can read our files, and
we can read PEFT's. Cast and move the base model *before* adding adapters; nothing here undoes a
later `model.half()`.

Run:  python lora.py        fits a rank-2 change of an 8x8 matrix with r = 1, 2, 4
"""
import contextlib
import fnmatch
import itertools
import json
import math
import re
from collections import Counter
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

# --- 1. the layer ---------------------------------------------------------------------------


def check_settings(r, alpha, dropout, rslora):
    """Raise ValueError, in one line, for settings that cannot work."""
    if not (type(r) is int and r >= 1 and type(alpha) in (int, float) and 0 < alpha < math.inf
            and type(dropout) in (int, float) and 0 <= dropout < 1 and type(rslora) is bool):
        raise ValueError("LoRA needs a whole number r >= 1, alpha > 0, 0 <= dropout < 1, rslora true or false; "
                         f"got r={r!r}, alpha={alpha!r}, dropout={dropout!r}, rslora={rslora!r}")


def is_conv1d(module):
    """GPT-2's `Conv1D` is a linear layer that stores its weight as [in, out]; `nf` is its output width."""
    return hasattr(module, "nf") and getattr(getattr(module, "weight", None), "ndim", 0) == 2


def out_in(base):
    """(out, in) of a linear layer, for both ways of storing the weight."""
    return tuple(base.weight.T.shape if is_conv1d(base) else base.weight.shape)


class LoRALinear(nn.Module):
    """A frozen linear layer `base` with a trainable low-rank correction beside it: [..., in] -> [..., out] (Hu et al.,
    eq. 3).

    ValueError for settings that cannot work (`check_settings`).
    The class deliberately has no attribute `weight`: code that reads `layer.weight` and does its
    own matrix product would leave out the adapter, so this code should fail.
    """

    def __init__(self, base, r, alpha, dropout=0.0, rslora=False, generator=None):
        check_settings(r, alpha, dropout, rslora)
        super().__init__()
        self.base = base.requires_grad_(False)
        self.r, self.alpha, self.rslora = r, alpha, rslora
        self.scaling = alpha / math.sqrt(r) if rslora else alpha / r
        self.enabled, self.backup = True, None  # backup: a copy of W0 while the adapter is merged into base.weight
        out_features, in_features = out_in(base)
        # A is drawn on the CPU, so that one seed gives the same adapter on every device.
        fp32, device = torch.float32, base.weight.device
        A = nn.init.kaiming_uniform_(torch.empty(r, in_features, dtype=fp32, device="cpu"), a=math.sqrt(5),
                                     generator=generator)
        self.lora_A = nn.Parameter(A.to(device))  # [r, in]
        self.lora_B = nn.Parameter(torch.zeros(out_features, r, dtype=fp32, device=device))
        self.dropout = nn.Dropout(dropout)
        self.train(base.training)  # a model in eval() stays in eval(), dropout included

    def forward(self, x):  # [..., in] -> [..., out]
        y = self.base(x)
        if self.backup is not None or not self.enabled:
            return y
        # Outside autocast this computes in fp32; inside autocast, F.linear casts down by itself.
        x = self.dropout(x).to(self.lora_A.dtype)
        # (alpha / r) B A x; we scale A x, which has only r numbers
        delta = F.linear(F.linear(x, self.lora_A) * self.scaling, self.lora_B)
        return y + delta.to(y.dtype)  # Hu et al., eq. 3


# --- 2. a model with adapters ---------------------------------------------------------------


def lora_layers(model):
    """{dotted name: LoRALinear}, in the order of the model."""
    return {n: m for n, m in model.named_modules() if isinstance(m, LoRALinear)}


def require_layers(model, merged):
    """The adapter layers. ValueError if there are none, or if their state differs from `merged`."""
    layers = lora_layers(model)
    if not layers:
        raise ValueError("the model has no LoRA adapters; call add_lora or load_adapter first")
    if any((layer.backup is not None) != merged for layer in layers.values()):
        state = "not merged" if merged else "merged into the base weights; call unmerge first"
        raise ValueError(f"the adapters are {state}")
    return layers


def linear_layers(model):
    """{dotted name: module} of all layers that can carry an adapter (quantised layers cannot)."""
    return {n: m for n, m in model.named_modules()
            if n and (isinstance(m, nn.Linear) or is_conv1d(m)) and m.weight.is_floating_point()}


def all_linear(model):
    """Names of all linear layers except the output head, like PEFT's "all-linear"."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return [n for n, m in linear_layers(model).items() if m is not head and last(n) != "lm_head"]


def last(name):
    return name.rpartition(".")[2]


def attach(model, names, seed=None, **settings):
    """Freeze the model and replace each named layer with a LoRALinear."""
    # initial_seed() reads the global seed. Unlike drawing a number, it does not change the generator's state.
    generator = torch.Generator().manual_seed(torch.initial_seed() if seed is None else seed)
    model.requires_grad_(False)
    for name in names:
        layer = LoRALinear(model.get_submodule(name), generator=generator, **settings)
        setattr(model.get_submodule(name.rpartition(".")[0]), last(name), layer)


def layer_numbers(names, skip):
    """Names of modules or parameters -> ({name: number of its transformer layer}, number of the first layer above the
    lowest `skip` share). The share of the layers is rounded down."""
    numbers = {n: int(m[1]) for n in names if (m := re.search(r"\.(\d+)\.", n))}
    return numbers, int(skip * (max(numbers.values(), default=-1) + 1))


def freeze_lowest(model, skip):
    """Prepare full fine-tuning of the upper layers only: freeze the lowest `skip` share of the transformer layers, and
    all parameters outside the layers, such as embeddings and head. The backward pass ends above the frozen layers."""
    parameters = dict(model.named_parameters())
    numbers, lowest = layer_numbers(parameters, skip)
    for name, parameter in parameters.items():
        parameter.requires_grad_(numbers.get(name, -1) >= lowest)
    if not any(p.requires_grad for p in parameters.values()):
        raise ValueError(f"skip = {skip} leaves no layer to train; lower it")


def add_lora(model, targets, r, alpha, dropout=0.0, rslora=False, seed=None, skip=0.0):
    """Add adapters to the linear layers that `targets` names, freeze all other parameters; return the layers' names.

    A target is the last component of a name ("q_proj"), a pattern for the whole dotted name if it
    has a "*" or "." ("*.layers.0.*"), or "all-linear". ValueError for a target that matches nothing,
    because it is most likely a typo, and for settings that cannot work. Without a seed, the seed given
    to torch.manual_seed is used. skip: the share (rounded down) of the lowest transformer layers that
    get no adapters; the backward pass ends above these layers.
    """
    check_settings(r, alpha, dropout, rslora)
    if lora_layers(model):
        raise ValueError("the model has LoRA adapters already")
    linears, targets = linear_layers(model), [targets] if isinstance(targets, str) else targets
    found = {t: all_linear(model) if t == "all-linear"
             else [n for n in linears if fnmatch.fnmatchcase(n, t) or last(n) == t]
             for t in targets}
    names = [n for n in linears if any(n in some for some in found.values())]  # in the model's order
    numbers, lowest = layer_numbers(linears, skip)
    if not all(found.values()) or not names:
        raise ValueError(f"no linear layer matches {', '.join(t for t in found if not found[t]) or 'an empty list'}; "
                         f"the model has: {', '.join(sorted(set(map(last, linears)))) or 'none'}")
    if not (names := [n for n in names if numbers.get(n, lowest) >= lowest]):
        raise ValueError(f"skip = {skip} leaves no layer to train; lower it")
    if r > (widest := max(max(linears[n].weight.shape) for n in names)):
        raise ValueError(f"lora_r = {r}: the chosen layers are at most {widest} wide")
    attach(model, names, seed, r=r, alpha=alpha, dropout=dropout, rslora=rslora)
    return names


def lora_state(model):
    """{"<layer>.lora_A": tensor, "<layer>.lora_B": tensor, ...}: live views, not copies."""
    return {f"{name}.{key}": p.detach() for name, layer in lora_layers(model).items()
            for key, p in layer.named_parameters(recurse=False)}


def lora_parameters(model):
    """The parameters to give to the optimizer."""
    return [p for layer in lora_layers(model).values() for p in layer.parameters(recurse=False)]


@contextlib.contextmanager
def lora_disabled(model):
    """Inside `with lora_disabled(model):` the model computes bit for bit what the base model does. May be nested."""
    with contextlib.ExitStack() as stack:
        for layer in require_layers(model, merged=False).values():
            stack.callback(setattr, layer, "enabled", layer.enabled)
            layer.enabled = False
        yield model


class SharedWeight(ValueError):
    """Another layer also uses the weight under an adapter (a tied head): the adapter works, but cannot be merged."""


@torch.no_grad()
def merge(model):
    """Add the adapters to the base weights (summed in fp32), and keep a copy of the base weights for `unmerge`. Raises
    SharedWeight, and changes nothing, if a weight is shared with another layer. To save a merged model, also call
    `remove`."""
    layers = require_layers(model, merged=False)
    if not all(layer.enabled for layer in layers.values()):
        raise ValueError("the adapters are switched off here; merge outside of lora_disabled")
    # a weight may be shared as a parameter, as its memory, or with the whole module (then only one name got an adapter)
    own = Counter(layer.base.weight.data_ptr() for layer in layers.values())
    bases = {id(layer.base) for layer in layers.values()}
    others = {p.data_ptr() for name, m in model.named_modules(remove_duplicate=False)
              if not (name.split(".")[-1] == "base" and id(m) in bases) for p in m.parameters(recurse=False)}
    if shared := [name for name, layer in layers.items()
                  if (at := layer.base.weight.data_ptr()) in others or own[at] > 1]:
        raise SharedWeight(f"{shared[0]} cannot be merged: its weight is shared with another layer, "
                           "which would change as well")
    for layer in layers.values():
        weight = layer.base.weight
        layer.backup = weight.clone()
        with torch.autocast(weight.device.type, enabled=False):
            delta = layer.scaling * (layer.lora_B @ layer.lora_A)  # [out, in]
        weight.copy_(weight + (delta.T if is_conv1d(layer.base) else delta))  # bf16 + fp32 gives fp32


@contextlib.contextmanager
def merged(model):
    """Inside the block the adapters are merged, if they can be: the model computes the same function up to rounding,
    without the adapters' extra matrix products. After the block the base weights are bit-exactly restored, from a copy
    of those under adapters that memory holds inside the block."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(SharedWeight):
            merge(model)
            stack.callback(unmerge, model)
        yield


@torch.no_grad()
def unmerge(model):
    """Undo `merge`: the base weights get back exactly their old bits. ValueError if nothing is merged."""
    for layer in require_layers(model, merged=True).values():
        layer.base.weight.copy_(layer.backup)
        layer.backup = None


def remove(model):
    """Put the base layers back in place of the adapted ones. After `merge` these hold the merged weights, so that
    model.save_pretrained then writes a plain transformers model."""
    for name, layer in lora_layers(model).items():
        setattr(model.get_submodule(name.rpartition(".")[0]), last(name), layer.base)


# --- 3. files, in PEFT's layout -------------------------------------------------------------

file_key = "base_model.model.{}.weight".format  # PEFT's key for a name in lora_state
CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
REQUIRED = {"peft_type", "r", "lora_alpha", "target_modules"}
# PEFT options that this file reads, or that do not change the arithmetic of a loaded adapter. Any other option that
# is set is refused: a LoRA variant that this file does not compute must not load silently.
HARMLESS = {"auto_mapping", "base_model_name_or_path", "fan_in_fan_out", "inference_mode", "revision",
            "megatron_core", "peft_version", "qalora_group_size", "task_type", *REQUIRED, "lora_dropout", "use_rslora"}
# The only values that these options may have. Other values of init_lora_weights change W0.
ALLOWED = {"peft_type": ["LORA"], "bias": ["none"], "init_lora_weights": [True, False, "gaussian", "orthogonal"]}


def peft_select(names, target_modules):
    """Select names by PEFT's rule: a string is a regular expression, a list holds full names or endings of names."""
    if isinstance(target_modules, str):
        return [n for n in names if re.fullmatch(target_modules, n)]
    return [n for n in names if any(n == t or n.endswith("." + t) for t in target_modules)]


@contextlib.contextmanager
def errors_name(path):
    """Turn any error about a file into one ValueError that starts with the file's name."""
    try:
        yield path
    except (OSError, ValueError, RecursionError, re.error, SafetensorError) as error:
        raise ValueError(f"{path}: {error}") from error


def save_adapter(model, folder, base_model_name=""):
    """Write adapter_config.json and adapter_model.safetensors. Equal adapters give equal bytes. ValueError for a model
    without adapters, or with adapters of different settings."""
    layers, folder = lora_layers(model), Path(folder)
    settings = {(m.r, m.alpha, m.dropout.p, m.rslora) for m in layers.values()}
    if len(settings) != 1:
        raise ValueError(f"{folder}: one adapter setting can be saved, the model has {len(settings)}")
    [(r, alpha, dropout, rslora)] = settings
    # Use the first, shortest description that selects exactly these layers. The last description always does.
    names = [n for n, _ in model.named_modules() if n.rpartition(".")[0] not in layers]
    descriptions = [sorted(set(map(last, layers))), sorted(layers), "|".join(map(re.escape, sorted(layers)))]
    targets = next(d for d in descriptions if peft_select(names, d) == list(layers))
    config = {"base_model_name_or_path": base_model_name, "bias": "none",
              "fan_in_fan_out": any(is_conv1d(m.base) for m in layers.values()),
              "inference_mode": True, "init_lora_weights": True, "lora_alpha": alpha, "lora_dropout": dropout,
              "peft_type": "LORA",
              "r": r, "target_modules": targets, "task_type": "CAUSAL_LM", "use_rslora": rslora}
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {file_key(n): t.cpu().contiguous() for n, t in lora_state(model).items()}
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def read_config(path):
    """(settings for LoRALinear, target_modules) of an adapter_config.json."""
    config = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(config, dict) or not REQUIRED <= set(config):
        raise ValueError(f"not a JSON object with {', '.join(sorted(REQUIRED))}")
    for key, value in config.items():
        if (value not in ALLOWED[key]) if key in ALLOWED else (value and key not in HARMLESS):
            raise ValueError(f"the PEFT option {key} = {value!r} is not supported")
    targets = config["target_modules"]
    if not isinstance(targets, (str, list)) or not all(isinstance(t, str) for t in targets):
        raise ValueError(f"target_modules must be a string or a list of strings, not {targets!r}")
    settings = {"r": config["r"], "alpha": config["lora_alpha"],
                "dropout": config.get("lora_dropout", 0.0), "rslora": config.get("use_rslora", False)}
    check_settings(**settings)
    return settings, targets


def check_tensors(tensors, bases, r):
    """ValueError unless the file holds A and B of each base layer, in the right shapes, and nothing else."""
    shapes = {}
    for name, (out_features, in_features) in zip(bases, map(out_in, bases.values())):
        shapes |= {file_key(f"{name}.lora_A"): [r, in_features], file_key(f"{name}.lora_B"): [out_features, r]}
    if odd := sorted(set(tensors) ^ set(shapes)):
        fault = "missing" if odd[0] in shapes else "unexpected: the model has no such adapter"
        raise ValueError(f"{odd[0]} is {fault}")
    for key, t in tensors.items():
        if list(t.shape) != shapes[key] or not t.is_floating_point():
            raise ValueError(f"{key} is {t.dtype} {list(t.shape)}, the model needs floats {shapes[key]}")


def load_adapter(model, folder):
    """Load an adapter into the model's adapters. If the model has none, load it into new, trainable adapters.

    Everything is checked before the model changes. ValueError, with the file's name, if a file does not fit the model.
    Pickle files (adapter_model.bin) are never read. As in PEFT, target_modules may be a regular expression, and a bad
    one can take for ever.
    """
    layers = require_layers(model, merged=False) if lora_layers(model) else {}
    with errors_name(Path(folder) / CONFIG_FILE) as path:
        settings, targets = read_config(path)
        for layer, key in itertools.product(layers.values(), ("r", "alpha", "rslora")):
            if getattr(layer, key) != settings[key]:
                raise ValueError(f"{key} is {settings[key]}, in the model it is {getattr(layer, key)}")
        names = layers or (all_linear(model) if targets == "all-linear" else peft_select(linear_layers(model), targets))
        bases = {n: layers[n].base if layers else model.get_submodule(n) for n in names}
        if not bases:
            raise ValueError(f"target_modules {targets!r} match no linear layer of the model")
    with errors_name(Path(folder) / WEIGHTS_FILE) as path:
        tensors = load_file(path)
        for name, base in bases.items():  # PEFT also writes the frozen output head
            if ((frozen := tensors.pop(file_key(f"{name}.base_layer"), None)) is not None
                    and not torch.equal(frozen.to(base.weight), base.weight)):
                raise ValueError(f"{name}.base_layer.weight is not the model's: the adapter belongs to other weights")
        check_tensors(tensors, bases, settings["r"])
    if not layers:
        attach(model, bases, **settings)
    for name, tensor in lora_state(model).items():
        tensor.copy_(tensors[file_key(name)])


# --- 4. a small demonstration ---------------------------------------------------------------


def demo(ranks=(1, 2, 4), size=8, steps=200, seed=0):
    """Learn a rank-2 change of a matrix with several ranks; return one dict of results per rank.

    `best` is the smallest error that any matrix of rank r can have: the norm of the singular
    values after the first r (Eckart and Young). Ranks below 2 are too small, ranks above 2 are not needed.
    """
    g, rows = torch.Generator().manual_seed(seed), []
    change = torch.randn(size, 2, generator=g) @ torch.randn(2, size, generator=g)
    x = torch.eye(size)  # with these inputs the squared error is ||scaling * B A - change||^2
    for r in ranks:
        base = nn.utils.skip_init(nn.Linear, size, size, bias=False)  # does not use the global random generator
        nn.init.normal_(base.weight, generator=g)
        layer = LoRALinear(base, r, alpha=r, generator=g)
        target, parameters = base(x) + x @ change.T, lora_parameters(layer)
        for _ in range(steps):
            loss = (layer(x) - target).square().sum()
            for p, grad in zip(parameters, torch.autograd.grad(loss, parameters)):
                p.data -= 0.02 * grad
        learned = layer(x)
        merge(layer)
        rows.append({"r": r, "trained": sum(p.numel() for p in parameters), "full": change.numel(),
                     "error": loss.sqrt().item(),
                     "best": torch.linalg.svdvals(change)[r:].norm().item(),
                     "merge_error": (layer(x) - learned).abs().max().item()})
    return rows


def main(argv=None):
    print("A rank-2 change of an 8x8 matrix, learned by LoRA:")
    for row in demo():
        print("r={r}  error {error:8.5f}  (best possible {best:.5f}) "
              " trained {trained} of {full} numbers  merged differs by {merge_error:.0e}".format(**row))


if __name__ == "__main__":
    main()
