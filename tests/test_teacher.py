"""teacher.py: the filter by hand and against one-by-one forwards, calls in plain text, the funnel, whole runs."""
import dataclasses
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import small

import data
import teacher
import toolplay
from teacher import Candidate
from tools import BUILTIN, Call, UserError, execute, load_tools

ROOT = Path(toolplay.__file__).parent
CALC = Call("calculator", {"expression": "2 * 3"})


# ---------------------------------------------------------------- equations

def test_weights_and_losses_by_hand():
    assert teacher.loss_weights(7).tolist() == pytest.approx([1 / 3, 0.8 / 3, 0.6 / 3, 0.4 / 3, 0.2 / 3, 0, 0])
    assert teacher.loss_weights().sum().item() == pytest.approx(1)
    logp = torch.tensor([-9.0, -1.0, -2.0, -3.0, -4.0, -5.0, -9.0])
    assert teacher.weighted_loss(logp, 1) == pytest.approx((1 + 0.8 * 2 + 0.6 * 3 + 0.4 * 4 + 0.2 * 5) / 3)
    assert teacher.weighted_loss(logp, 5) == pytest.approx((5 + 0.8 * 9) / 3)  # the text ends; the weights are not rescaled
    # the gain over no call and over the call without its result
    assert teacher.gain(1.0, 3.0, 2.5) == 1.5 and teacher.gain(1.0, 1.2, 2.5) == pytest.approx(0.2)


def test_positions():
    logp = torch.tensor([0.9, 0.5, 0.01, 0.3, 0.4]).log()
    assert teacher.best_positions(logp, 0.05, 2) == [1, 4]  # never before the first token
    assert teacher.best_positions(logp, 0.35, 5) == [1, 4] and teacher.best_positions(logp, 0.0, 9) == [1, 2, 3, 4]


def test_alone_in_an_empty_folder(tmp_path):
    shutil.copy(ROOT / "teacher.py", tmp_path)
    code = "import teacher, sys; assert not {'toolplay', 'data', 'transformers'} & set(sys.modules); print(teacher.gain(1, 3, 2.5))"
    assert subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True).stdout.strip() == "1.5"


# ---------------------------------------------------------------- calls in plain text

@pytest.mark.parametrize("text, call", [
    ("calculator(2 * 3)] apples", CALC), (" calculator( 2 * 3 ) -> 6]", CALC),
    ("weather(Quebec City)]", Call("weather", {"city": "Quebec City"})),
    ("search(who wrote (1984)?)]", Call("search", {"query": "who wrote (1984)?"})), ("calculator(2 * 3", None), ("calculator()]", None),
    ("nothing(2)]", None), ("2 * 3]", None), ("", None)])
def test_read_call(text, call):
    assert teacher.read_call(text, BUILTIN) == call


def test_a_damaged_line_is_one_line(tmp_path, capsys):
    (tmp_path / "augmented.jsonl").write_text('{"text": "a", "ids": [1], "candidates": [{}]}\n')
    with pytest.raises(SystemExit) as stop:
        teacher.main(["--show", str(tmp_path)])
    assert stop.value.code == 2 and "line 1: it is damaged" in capsys.readouterr().err


@pytest.mark.parametrize("more", [{"source": "jsonl", "path": "x.jsonl"}, {"source": "toolbench"}, {"mix": {"weather": 1}},
                                  {"data": "synthetic"}])
def test_conversations_are_nothing_for_the_teacher(more):
    with pytest.raises(UserError, match='"text" names a file'):
        toolplay.load_config({"method": "teacher", **more}, [])


def test_lines_of_json_under_another_name_are_no_prose(tmp_path):
    (tmp_path / "a.txt").write_text('{"text": "one"}\n{"text": "two"}\n')
    with pytest.raises(UserError, match="jsonl"):
        teacher.read_texts(tmp_path / "a.txt", 5)
    (tmp_path / "b.txt").write_text("Page one\fgoes on\u2028here\r\nand two\n")
    assert [x["text"] for x in teacher.read_texts(tmp_path / "b.txt", 5)] == ["Page one\fgoes on\u2028here", "and two"]


@pytest.mark.parametrize("text, call", [("unit.convert(5)]", Call("unit.convert", {"n": 5})), ("get-time()]", Call("get-time", {})),
                                        ("unit.convert()]", None)])
def test_calls_of_tools_of_ones_own(text, call):
    tools = load_tools([{"name": "get-time", "description": "", "parameters": {}},
                        {"name": "unit.convert", "description": "",
                         "parameters": {"properties": {"n": {"type": "integer"}}, "required": ["n"]}}])
    assert teacher.read_call(text, tools) == call


@pytest.mark.parametrize("text, arguments", [("convert(5, GBP)]", {"amount": 5, "currency": "GBP"}), ("convert(5)]", {"amount": 5}),
                                             ("convert(5, currency='GBP')]", {"amount": 5, "currency": "GBP"}),
                                             ("convert(currency='GBP', amount=5)]", {"amount": 5, "currency": "GBP"}),
                                             ("pop(year=2000, country='France')]", {"country": "France", "year": 2000}),
                                             ("pop(France, 2000)]", {"country": "France", "year": 2000}),
                                             ("weather(city='Oslo', unit='celsius')]", {"city": "Oslo", "unit": "celsius"}),
                                             ("weather(Oslo, Norway)]", {"city": "Oslo, Norway"}),
                                             ("calculator(max(1, 2))]", {"expression": "max(1, 2)"})])
def test_arguments_by_place_and_by_name(text, arguments):
    field = {"number": {"type": "number"}, "text": {"type": "string"}}
    tools = load_tools([*BUILTIN,
                        {"name": "convert", "description": "",
                         "parameters": {"type": "object", "properties": {"amount": field["number"], "currency": field["text"]},
                                        "required": ["amount"]}},
                        {"name": "pop", "description": "",
                         "parameters": {"type": "object", "properties": {"country": field["text"], "year": {"type": "integer"}},
                                        "required": ["country", "year"]}}])
    call = teacher.read_call(text, tools)
    assert call.arguments == arguments and list(call.arguments) == list(arguments)
    assert teacher.read_call(teacher.call_text(call, start=""), tools) == call  # the call in the text is the call that was tried
    assert teacher.read_call("convert(1,000)]", tools) is None  # ambiguous: one number, or a number and a currency
    for text in ("convert(5, amount=3)]", "convert(1e999)]", "convert(currency=GBP)]", "convert(" + '{"a":' * 3000 + ")]"):
        assert (made := teacher.read_call(text, tools)) is None or not execute(made, tools).ok


def test_results_in_words():
    said = lambda name, **arguments: teacher.result_text(execute(Call(name, arguments), BUILTIN))  # noqa: E731
    assert said("calculator", expression="2 * 3") == "6" and said("calculator", expression="1 / 0") is None
    assert said("weather", city="Oslo").split(", ")[0].lstrip("-").isdigit()
    assert said("weather", city="Nowhereville") is None
    assert 10 < len(said("search", query="Eiffel Tower")) <= 80


def test_inserted_calls_are_trained_and_their_results_are_not():
    tok = small.tokenizer()
    ids = teacher.ids_of(tok, "3 pairs, so 6 shoes")
    row, mask = teacher.insert(ids, [Candidate(12, CALC, "6")], tok)
    assert tok.decode(row) == "3 pairs, so [calculator(2 * 3) -> 6]6 shoes"
    assert tok.decode([i for i, m in zip(row, mask) if not m]) == " 6]"
    assert teacher.insert(ids, [], tok) == (ids, [1] * len(ids))


# ---------------------------------------------------------------- oracles

def naive(model, ids):
    """The log-prob of each token, with one forward for this row alone."""
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0].double()
    return [0.0] + [float(torch.log_softmax(logits[t - 1], -1)[ids[t]]) for t in range(1, len(ids))]


def test_the_filters_losses_are_those_of_one_by_one():
    model, tok = small.model("llama"), small.tokenizer()
    units = [(teacher.ids_of(tok, text), Candidate(i, CALC, "6"))
             for text, i in (("3 pairs, so 6 shoes", 12), ("3 pairs, so 6 shoes", 5), ("ab", 1), ("Twice 3 is 6.", 11))]
    for (ids, (i, call, result)), got in zip(units, teacher.losses(model, tok, units, budget=50)):
        for prefix, loss in zip(("", "[calculator(2 * 3)]", "[calculator(2 * 3) -> 6]"), got):
            head = teacher.ids_of(tok, prefix)
            logp = naive(model, head + ids)[len(head):]
            weights = [max(0, 1 - 0.2 * t) / 3 for t in range(len(ids) - i)]
            assert loss == pytest.approx(-sum(w * x for w, x in zip(weights, logp[i:])), abs=1e-5)


def test_the_probability_of_a_call_is_that_of_one_by_one():
    model = small.model("llama")
    rows = [([5, 6, 7, 8], [0, 0, 1, 1]), ([5, 6, 9], [0, 1, 1])]
    out = toolplay.token_logprobs(model, rows, also=(3, 4), budget=4)
    for b, (ids, mask) in enumerate(rows):
        with torch.no_grad():
            logp = torch.log_softmax(model(torch.tensor([ids])).logits[0], -1)
        for t, m in enumerate(mask):
            assert torch.allclose(out["also"][b, t], logp[t - 1, [3, 4]] if m else torch.zeros(2), atol=1e-5)


def test_the_probability_of_a_call_at_each_place_is_asked_behind_the_examples():
    model, tok = small.model("llama"), small.tokenizer()
    open_id, = teacher.ids_of(tok, teacher.opening(tok))
    rows, heads = [teacher.ids_of(tok, text) for text in ("3 pairs, 6", "ab")], [teacher.ids_of(tok, "Call: "), []]
    for ids, head, got in zip(rows, heads, teacher.open_logprobs(model, tok, rows, heads, settings())):
        asked = range(1 - bool(head), len(ids))  # the very first token is not predicted
        assert got[list(asked)].tolist() == pytest.approx([naive(model, head + ids[:i] + [open_id])[-1] for i in asked], abs=1e-5)


def test_the_loss_with_tools_is_of_the_text_behind_its_best_call(monkeypatch):
    """The loss covers only the text's own tokens; the call comes before them."""
    model, tok = small.model("llama"), small.tokenizer()
    rows, call = [teacher.ids_of(tok, text) for text in ("3 pairs, 6", "A day.")], "[calculator(2 * 3) -> 6]"
    monkeypatch.setattr(teacher, "SURE", 0.0)
    monkeypatch.setattr(teacher, "complete", lambda m, t, begun, tools, most: [("calculator(2 * 3)]", []), ("no call", [])])
    opens = teacher.open_logprobs(model, tok, rows, [[], []], settings())
    place = int(opens[0][1:].argmax()) + 1
    with_call = naive(model, rows[0][:place] + teacher.ids_of(tok, call) + rows[0][place:])
    own = with_call[:place] + with_call[place + len(teacher.ids_of(tok, call)):]
    expected = -sum(own + naive(model, rows[1])) / sum(len(row) - 1 for row in rows)
    assert teacher.text_loss(model, tok, rows, BUILTIN, settings()) == pytest.approx(expected, abs=1e-5)
    assert teacher.text_loss(model, tok, rows, {}, settings()) != pytest.approx(expected, abs=1e-5)


def settings(**more):
    return SimpleNamespace(**{"tau_s": 0.0, "positions": 3, "samples": 2, "tau_f": 0.5, "call_tokens": 24, "micro_tokens": 1024,
                              "precision": "fp32", **more})


def test_half_precision_is_for_guesses_not_for_the_filter(monkeypatch):
    model, tok = small.model("llama"), small.tokenizer()
    rows, seen = [teacher.ids_of(tok, "3 pairs, so 6 shoes")], {}
    monkeypatch.setattr(teacher, "sample_calls", lambda m, t, prompts, c, seed: seen.update(guess=torch.is_autocast_enabled("cpu"))
                        or ["calculator(2 * 3)]"] * len(prompts))
    monkeypatch.setattr(teacher, "losses", lambda m, t, units, b: seen.update(verdict=torch.is_autocast_enabled("cpu"))
                        or [(3.0, 2.0, 1.2)] * len(units))
    teacher.annotate(model, tok, rows, {"calculator": BUILTIN["calculator"]}, settings(precision="bf16"), 0)
    assert seen == {"guess": True, "verdict": False}


def test_the_funnel(monkeypatch):
    model, tok = small.model("llama"), small.tokenizer()
    rows = [teacher.ids_of(tok, text) for text in ("3 pairs, so 6 shoes", "A quiet day.")]
    monkeypatch.setattr(teacher, "sample_calls",
                        lambda m, t, prompts, c, seed: [["calculator(2 * 3)]", "calculator(1 / 0)]", "no call", "calculator(2 * 4)]"][n % 4]
                                                        for n in range(len(prompts))])
    # gains 0.8 and 0.4
    monkeypatch.setattr(teacher, "losses", lambda m, t, units, b: [(3.0, 2.0, 1.2 if c.result == "6" else 1.6) for _, c in units])
    found, left_out, funnel = teacher.annotate(model, tok, rows, {"calculator": BUILTIN["calculator"]}, settings(), 0)
    assert funnel == {"positions": 6, "sampled": 12, "parsed": 9, "distinct": 9, "executed": 6, "kept": 3}
    for candidates in found:
        assert [c["kept"] for c in candidates] == [c["result"] == "6" for c in candidates]
        assert all(c["minus"] == 2.0 for c in candidates)
        assert all(c["kept"] == (not c["why"]) for c in candidates)
    assert sorted((x["why"], x["text"]) for row in left_out
                  for x in row) == 3 * [("division by zero", "[calculator(1 / 0)]")] + 3 * [("no call of calculator", "no call")]


def test_what_the_text_goes_on_with_is_kept_and_what_is_unrelated_is_not(monkeypatch):
    """The real filter, and a model that finds a token probable if the row already contains it."""
    model, tok = small.model("llama"), small.tokenizer()

    def copying(model, batch, budget=None, also=()):
        width = max(len(ids) for ids, _ in batch)
        logp = torch.tensor([[math.log(0.9 if t < len(ids) and ids[t] in ids[:t] else 0.01) for t in range(width)] for ids, _ in batch])
        return {"logp": logp, "also": torch.zeros(len(batch), width, len(also))} if also else logp
    monkeypatch.setattr(toolplay, "token_logprobs", copying)
    monkeypatch.setattr(teacher, "sample_calls", lambda m, t, prompts, c, seed: ["calculator(2 * 3)]"] * len(prompts))
    monkeypatch.setattr(teacher, "best_positions", lambda logp, tau_s, k: [len(logp) - 2])
    rows = [teacher.ids_of(tok, text) for text in ("So he has 6.", "So he has no.", "So he has 9.")]
    found, _, funnel = teacher.annotate(model, tok, rows, {"calculator": BUILTIN["calculator"]}, settings(samples=1), 0)
    assert [[c["kept"] for c in candidates] for candidates in found] == [[True], [False], [False]]
    assert funnel["kept"] == 1


def test_no_call_stands_inside_a_character():
    tok = small.tokenizer()
    ids = teacher.ids_of(tok, "café 6 → 日")
    inside = teacher.inside_characters(tok, ids)
    text = tok.decode(ids)
    assert inside and teacher.inside_characters(tok, teacher.ids_of(tok, "plain 6")) == []
    assert all(tok.decode(ids[:i]) + tok.decode(ids[i:]) == text for i in range(1, len(ids)) if i not in inside)


def test_one_call_at_a_position(monkeypatch):
    model, tok = small.model("llama"), small.tokenizer()
    monkeypatch.setattr(teacher, "sample_calls", lambda m, t, prompts, c, seed: ["calculator(2 * 3)]", "calculator(2 * 4)]"]
                        * (len(prompts) // 2))
    monkeypatch.setattr(teacher, "losses", lambda m, t, units, b: [(3.0, 3.0, 1.0 if c.result == "8" else 2.0) for _, c in units])
    found, _, funnel = teacher.annotate(model, tok, [teacher.ids_of(tok, "Twice 3 is 6.")], {"calculator": BUILTIN["calculator"]},
                                        settings(), 0)
    assert funnel["executed"] == 6 and funnel["kept"] == 3 and {c["result"] for c in found[0] if c["kept"]} == {"8"}


# ---------------------------------------------------------------- with and without tools

TOK = small.tokenizer()


class Scripted:
    """A cache whose model writes what `follow` returns for the text so far, letter by letter, and ends where `follow` returns nothing."""
    follow = staticmethod(lambda text: "")

    def __init__(self, model, prompts):
        self.texts = [TOK.decode(p) for p in prompts]

    def step(self, ids):
        logits = torch.zeros(len(ids), small.VOCAB)
        for n, row in enumerate(ids):
            self.texts[n] += TOK.decode(row)
            said = self.follow(self.texts[n])
            logits[n, teacher.ids_of(TOK, said)[0] if said else TOK.eos_token_id] = 2
            logits[n, teacher.ids_of(TOK, "x")[0]] = 1  # the second choice, if that token is not allowed
        return logits

    def keep(self, rows):
        self.texts = [self.texts[r] for r in rows]


def continued(script, text):
    """The letter after `text` in the first line of a script that begins with `text`."""
    return next((line[len(text)] for line in script if line.startswith(text) and len(line) > len(text)), "")


def test_calls_are_executed_while_the_text_is_written(monkeypatch):
    script = ["2 pairs of 3: [calculator(2 * 3) -> 6] 6 shoes", "In Nowhere: [weather(Nowhere) -> ] fog", "No call: [what] is this",
              "Open: [calculator(1 + 1 + 1 + 1 + 1 + 1"]
    monkeypatch.setattr(toolplay, "SharedPrefixCache", Scripted)
    monkeypatch.setattr(toolplay, "agree", lambda *trial: True)  # the trial would fail: it compares real logits
    monkeypatch.setattr(Scripted, "follow", staticmethod(lambda text: continued(script, text)))
    prompts = [teacher.ids_of(TOK, line[:line.index(":") + 2]) for line in script]
    said = teacher.complete(small.model("llama"), TOK, prompts, BUILTIN, most=12, call_tokens=30)
    assert said[0] == (" 6 shoes", [(CALC, "6")]) and said[1] == (" fog", []) and said[2] == (" is this", [])
    assert said[3][1] == []
    without = teacher.complete(small.model("llama"), TOK, prompts, {}, most=3)
    assert all(calls == [] and "[" not in text for text, calls in without)
    monkeypatch.setattr(teacher, "CACHED", 40)  # at most two rows of 15 at once
    assert teacher.complete(small.model("llama"), TOK, prompts, BUILTIN, most=12, call_tokens=30) == said


def test_calls_that_fail_come_to_an_end(monkeypatch):
    script = ["So: " + "[weather(Nowhere) -> ] " * 9]
    monkeypatch.setattr(toolplay, "SharedPrefixCache", Scripted)
    monkeypatch.setattr(toolplay, "agree", lambda *trial: True)  # the trial would fail: it compares real logits
    monkeypatch.setattr(Scripted, "follow", staticmethod(lambda text: continued(script, text)))
    (text, calls), = teacher.complete(small.model("llama"), TOK, [teacher.ids_of(TOK, "So: ")], BUILTIN, most=12)
    assert calls == [] and "[" not in text and len(text) <= 12


def test_a_call_begins_where_its_token_is_among_the_most_probable_ones(monkeypatch):
    """Toolformer, sec. 4.2: models prefer to continue the text. Only one call a text: otherwise the model would write nothing else."""
    open_id, = teacher.ids_of(TOK, teacher.opening(TOK))

    class Second(Scripted):
        def step(self, ids):
            logits = super().step(ids)
            logits[:, open_id] = logits[:, open_id].clamp(min=1.5)  # always the second best
            return logits
    monkeypatch.setattr(toolplay, "SharedPrefixCache", Second)
    monkeypatch.setattr(toolplay, "agree", lambda *trial: True)  # the trial would fail: it compares real logits
    said = lambda call_top: teacher.complete(small.model("llama"), TOK, [teacher.ids_of(TOK, "So: ")] * 2, BUILTIN, most=8, call_top=call_top)  # noqa: E731
    monkeypatch.setattr(Second, "follow", staticmethod(lambda text: continued(["So: two", "So: [calculator(2 * 3) -> 6] 6 it is"], text)))
    assert said(1) == [("two", [])] * 2
    assert said(2) == [(" 6 it is", [(CALC, "6")])] * 2


def test_a_cache_without_a_shared_prefix():
    model = small.model("llama")
    toolplay.takes_trie(model)  # gives the model our attention
    cache = toolplay.SharedPrefixCache(model, [[1, 2, 3], [4, 5]])
    with torch.no_grad():
        got = cache.step([[6], [7]])
        for row, ids in zip(got, ([1, 2, 3, 6], [4, 5, 7])):
            assert torch.allclose(row, model(torch.tensor([ids])).logits[0, -1], atol=1e-4)


def test_right_number():
    assert teacher.right_number(" 276 pens", 276) and teacher.right_number("1,276.", 1276)
    assert teacher.right_number("-3.50 left", -3.5)
    assert teacher.right_number(" .5 metres", 0.5) and not teacher.right_number(" .5", 5)
    assert not teacher.right_number("27 pens, or 276", 276) and not teacher.right_number("many", 276)


# ---------------------------------------------------------------- texts and runs

def test_built_in_prose():
    texts = {split: teacher.prose(split, 200, 1) for split in ("train", "test")}
    assert texts["train"] == teacher.prose("train", 200, 1)
    assert {x["kind"] for x in texts["train"]} == {"calculator", "weather", "search", "plain"}
    assert not {x["text"] for x in texts["train"]} & {x["text"] for x in texts["test"]}
    assert not any("{" in x["text"] for split in texts.values() for x in split)
    for item in texts["test"]:
        if "answer" in item:
            assert item["text"].startswith(item["prompt"])
            assert teacher.right_number(item["text"][len(item["prompt"]):], item["answer"])


def test_texts_from_files(tmp_path):
    (tmp_path / "a.txt").write_text("One.\n\nTwo.\nThree.\n")
    (tmp_path / "a.jsonl").write_text('{"text": "One."}\nbroken\n{"text": "Two."}\n')
    assert [x["text"] for x in teacher.read_texts(tmp_path / "a.txt", 2)] == ["One.", "Two."]
    assert [x["text"] for x in teacher.read_texts(tmp_path / "a.jsonl", 9)] == ["One.", "Two."]
    (tmp_path / "g.JSONL").write_text(json.dumps({"question": "Two and 3?", "answer": "They are 2 + 3 = <<2+3=5>>5\n#### 5"})
                                      + '\n{"text": "\\ud83d"}\n{"question": "?"}\n')
    assert [x["text"] for x in teacher.read_texts(tmp_path / "g.JSONL", 9)] == ["Two and 3? They are 2 + 3 = 5"]
    (tmp_path / "empty.txt").write_text("\n")
    for name in ("empty.txt", "nowhere.txt"):
        with pytest.raises(UserError):
            teacher.read_texts(tmp_path / name, 2)


def config(tmp_path, **more):
    return toolplay.load_config({"method": "teacher", "model": "tiny", "texts": 6, "texts_at_once": 2, "positions": 2, "samples": 2,
                                 "eval_examples": 4, "batch_size": 3, "lora_r": 2,
                                 "max_tokens": 4000, "tau_f": -100, "steps": 2, "save_every": 1, "device": "cpu",
                                 "run_dir": str(tmp_path / "run"), **more})


@pytest.fixture
def calls(monkeypatch):
    """tiny's weights are too small to write a call; this sampler writes a calculator call."""
    monkeypatch.setattr(teacher, "sample_calls", lambda m, t, prompts, c, seed: ["calculator(2 * 3)]" if "calculator" in str(seed) else "?"
                                                                                 for _ in prompts])


def test_a_run(tmp_path, calls, capsys):
    teacher.train(toolplay.Run(config(tmp_path)))
    folder = tmp_path / "run"
    lines = [json.loads(line) for line in (folder / "augmented.jsonl").read_text().splitlines()]
    assert len(lines) == 6 and all("[calculator(2 * 3) -> 6]" in x["augmented"] for x in lines)
    assert lines[0]["candidates"][0]["minus"] > 0
    result = json.loads((folder / "teacher.json").read_text())
    assert set(result["before"]) == set(result["after"]) == {"loss", "loss_with_tools", "right", "right_with_tools", "n", "calls"}
    assert (folder / "adapter").is_dir()
    assert "6 texts: 36 positions -> 72 sampled -> 24 parsed" in capsys.readouterr().err  # 6 texts x 3 tools x 2 positions, 2 samples each
    teacher.main(["--show", str(folder)])
    assert "best 10" in capsys.readouterr().out


def test_an_interrupted_annotation_goes_on_to_the_same_bytes(tmp_path, calls, monkeypatch, capsys):
    teacher.train(toolplay.Run(config(tmp_path / "a")))
    real, count = teacher.annotate, []

    def stop(*args):
        count.append(1)
        if len(count) == 3:
            raise KeyboardInterrupt
        return real(*args)
    cut = config(tmp_path / "b")
    with monkeypatch.context() as patch:
        patch.setattr(teacher, "annotate", stop)
        (tmp_path / "c.json").write_text(json.dumps(dataclasses.asdict(cut)))
        with pytest.raises(SystemExit, match="130"):
            toolplay.main(["train", str(tmp_path / "c.json")])
    assert f"toolplay.py train {cut.run_dir} --resume" in capsys.readouterr().err
    teacher.train(toolplay.Run(cut, resume=True))
    for name in ("augmented.jsonl", "metrics.jsonl", "adapter/adapter_model.safetensors"):
        assert (tmp_path / "a/run" / name).read_bytes() == (tmp_path / "b/run" / name).read_bytes(), name
    whole = (tmp_path / "a/run/augmented.jsonl").read_bytes()  # as if killed inside the second group of two, inside a line
    lines = whole.splitlines(keepends=True)
    part = config(tmp_path / "c")
    toolplay.Run(part)
    (tmp_path / "c/run/augmented.jsonl").write_bytes(b"".join(lines[:3]) + lines[3][:40])
    teacher.train(toolplay.Run(part, resume=True))
    assert (tmp_path / "c/run/augmented.jsonl").read_bytes() == whole


def test_texts_that_grow_too_long_by_their_calls_teach_nothing(tmp_path, calls, capsys):
    (tmp_path / "t.txt").write_text("a" * 60 + "\n" + "b" * 20 + "\n")
    assert teacher.ids_of(small.tokenizer(), "a" * 60) and len(teacher.ids_of(small.tokenizer(), "a" * 60)) == 60
    with pytest.raises(UserError, match="no call helped in a text that fits max_tokens"):
        teacher.train(toolplay.Run(config(tmp_path, text=str(tmp_path / "t.txt"), max_tokens=60, tau_f=-100, positions=1,
                                          eval_examples=0, annotate_with=["search"])))
    with pytest.raises(UserError, match="no call helped in a text that fits max_tokens"):
        (tmp_path / "t.txt").write_text("a" * 60 + "\n")
        teacher.train(toolplay.Run(config(tmp_path / "b", text=str(tmp_path / "t.txt"), max_tokens=60, eval_examples=0)))
    assert "texts with their calls are longer than max_tokens = 60" in capsys.readouterr().err


def test_texts_that_cannot_be_annotated_are_left_out_before_the_work_begins(tmp_path, capsys, monkeypatch):
    """A text stands twice in the context, behind the examples. A text of one token has no loss."""
    texts = tmp_path / "t.txt"
    texts.write_text("a\nbc\n" + "d" * 500 + "\n")
    monkeypatch.setattr(toolplay, "context_of", lambda model: 700)
    monkeypatch.setattr(teacher, "few_shot", lambda tool, tokenizer: ([5] * 50, [6] * 2))
    monkeypatch.setattr(teacher, "annotated_texts", lambda run, model, tokenizer, texts, tools: sys.exit([x["text"] for x in texts]))
    with pytest.raises(SystemExit) as ended:
        teacher.train(toolplay.Run(config(tmp_path, text=str(texts), eval_examples=0)))
    assert ended.value.code == ["bc"]
    said = capsys.readouterr().err
    assert "1 of 3 texts are one token long" in said and "what fits the model's context twice = 300" in said
    monkeypatch.setattr(teacher, "OPEN", "((")
    with pytest.raises(UserError, match="is not one token of its"):
        teacher.train(toolplay.Run(config(tmp_path / "b", text=str(texts), eval_examples=0)))


def test_prose_has_the_weather_of_its_own_cities(tmp_path, monkeypatch):
    usual = teacher.prose("test", 60)
    (tmp_path / "cities.json").write_text('{"cities": [{"name": "Oz"}]}')
    monkeypatch.setenv("TOOLPLAY_CITIES", str(tmp_path / "cities.json"))
    assert teacher.prose("test", 60) == usual and any(item["kind"] == "weather" for item in usual)


def test_nothing_to_learn_from_is_an_error_that_a_lower_threshold_mends(tmp_path, calls, monkeypatch):
    with pytest.raises(UserError, match="no call helped.*--resume and a tau_f below [-0-9.]+, or"):
        teacher.train(toolplay.Run(config(tmp_path, tau_f=100)))
    with monkeypatch.context() as patch:
        patch.setattr(teacher, "annotate", lambda *args: pytest.fail("annotated anew"))
        teacher.train(toolplay.Run(config(tmp_path, tau_f=-100.0), resume=True))
    teacher.train(toolplay.Run(config(tmp_path / "b", tau_f=-100.0)))
    for name in ("augmented.jsonl", "metrics.jsonl"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "b/run" / name).read_bytes(), name
    assert json.loads((tmp_path / "run/config.json").read_text())["tau_f"] == -100
    with pytest.raises(UserError, match="tau_f was -100"):
        toolplay.Run(config(tmp_path, tau_f=0.5), resume=True)


def test_prompts_are_sampled_from_in_turn_with_the_same_draws(monkeypatch):
    model, tok = small.model("llama"), small.tokenizer()
    prompts = [teacher.ids_of(tok, f"Some text number {n} [") for n in (1, 1, 22, 3)]
    once = teacher.sample_calls(model, tok, prompts, settings(), "s")
    monkeypatch.setattr(teacher, "CACHED", 10)
    assert teacher.sample_calls(model, tok, prompts, settings(), "s") == once and len(once) == 4


def test_a_tool_without_parameters_may_be_given_some():
    tools = load_tools([{"name": "now", "description": "", "parameters": {}}])
    assert teacher.read_call("now(please)]", tools) is None and teacher.read_call("now()]", tools).arguments == {}


def test_gsm8k_texts_can_be_asked_for_their_answer(tmp_path):
    lines = [{"question": "Two and 3?", "answer": "2 + 3 = <<2+3=5>>5 apples.\n#### 5"},
             {"question": "How much?", "answer": "It is $<<1>>1,250.\n#### 1,250"},
             {"question": "How far?", "answer": "It is 12 miles, by bus 3.\n#### 12"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    first, second, third = teacher.read_texts(tmp_path / "a.jsonl", 9)
    assert (first["text"], first["prompt"], first["answer"]) == ("Two and 3? 2 + 3 = 5 apples.", "Two and 3? 2 + 3 =", 5)
    # the third text does not end in the answer
    assert (second["prompt"], second["answer"]) == ("How much? It is $", 1250) and "prompt" not in third


# ---------------------------------------------------------------- the calls as conversations

def found(tmp_path):
    """Ten texts as a teacher run leaves them: one has a kept call, one has a dropped call, eight have none."""
    text = "Two bags of 3 apples are 6 apples."
    candidate = {"position": 7, "offset": text.index(" 6"), "call": {"name": "calculator", "arguments": {"expression": "2 * 3"}},
                 "result": "6", "kept": True}
    lines = ([{"text": text, "candidates": [candidate]}, {"text": text, "candidates": [{**candidate, "kept": False}]}]
             + [{"text": f"Nothing to count in text {n}.", "candidates": []} for n in range(8)])
    (tmp_path / "augmented.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


def test_surviving_calls_become_conversations(tmp_path, capsys):
    made = data.read_teacher(found(tmp_path), "train", 50)
    assert made == data.read_teacher(tmp_path / "augmented.jsonl", "train", 50) and len(made) == 2  # as many without a call as with one
    with_call, = (c for c in made if c["kind"] == "calculator")
    asked, called, result, said = with_call["messages"]
    assert "Two bags of 3 apples are" in asked["content"] and " 6" not in asked["content"]
    assert called["tool_calls"] == [{"name": "calculator", "arguments": {"expression": "2 * 3"}}]
    assert result["content"] == '{"result": 6}'
    assert said["content"] == "6 apples." and with_call["answer"] == 6
    line = (tmp_path / "augmented.jsonl").read_text().splitlines()[0]
    for rest, answer in (("6.", 6), ("60 apples.", None), ("6.50 a bag.", None)):  # 60 is not the call's result
        (tmp_path / "b.jsonl").write_text(line.replace("6 apples.", rest) + "\n")
        assert data.read_teacher(tmp_path / "b.jsonl", "train", 1)[0]["answer"] == answer
    (tmp_path / "b.jsonl").write_text(line.replace('"2 * 3"', '"2 / 0"') + "\n" + line + "\n")  # a call that fails today
    assert len(data.read_teacher(tmp_path / "b.jsonl", "train", 9)) == 1
    assert "1 calls of the train part are left out" in capsys.readouterr().err
    without, = (c for c in made if c["kind"] == "no_tool")
    assert "tool_calls" not in without["messages"][1] and without["answer"] is None
    # a repeated text counts once: of these nine texts none belongs to "dev"
    assert len(data.read_teacher(tmp_path, "train", 1)) == 1 and data.read_teacher(tmp_path, "dev", 9) == []
    # a file for evaluation is not divided
    config = toolplay.load_config({"source": "teacher", "path": str(tmp_path), "eval_path": str(tmp_path), "eval_examples": 9})
    assert len(data.conversations(config, "dev", None)) == 2 == len(data.conversations(config, "train", None))


def test_a_run_without_surviving_calls_is_an_error(tmp_path):
    (tmp_path / "augmented.jsonl").write_text(json.dumps({"text": "No call here.", "candidates": []}) + "\n")
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UserError):
            data.read_teacher(path, "train", 5)
    with pytest.raises(UserError, match="path"):
        toolplay.load_config({"data": "teacher"})


@pytest.mark.parametrize("method", ["sft", "dpo", "ppo"])
def test_they_are_data_for_every_method(tmp_path, method):
    more = {"iterations": 1, "prompts": 2, "samples": 2, "max_new_tokens": 4} if method == "ppo" else {"steps": 1}
    config = toolplay.load_config({"method": method, "model": "tiny", "data": "teacher", "path": str(found(tmp_path)), "max_tokens": 4000,
                                   "eval_examples": 2,
                                   "device": "cpu", "run_dir": str(tmp_path / "run"), **more})
    __import__(method).train(toolplay.Run(config))
    assert json.loads((tmp_path / "run" / "config.json").read_text())["source"] == "teacher"
    assert (tmp_path / "run" / "adapter").is_dir()


def test_calls_and_results_of_a_tool_of_ones_own():
    """Without examples a model writes calls as in Python; the text of a result has all its values."""
    from tools import Result, Tool
    tools = {"capital": Tool("capital", "", {"type": "object", "properties": {"country": {"type": "string"}}, "required": ["country"]},
                             lambda country: "Paris")}
    for written in ('capital("France")]', "capital(country=France)]", "capital(country='France')]", "capital(France) ->"):
        assert teacher.read_call(written, tools) == Call("capital", {"country": "France"})
    assert teacher.result_text(Result("where", True, {"city": "Paris"})) == "Paris"
    assert teacher.result_text(Result("weigh", True, {"value": 3, "unit": "kg"})) == "3, kg"
    assert teacher.result_text(Result("divisors", True, [1, 2, 3])) == "1, 2, 3"
    assert teacher.result_text(Result("power", True, 2 ** 300)) is None  # its first 80 digits are another number
