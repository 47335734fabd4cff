"""The command line from outside: verbs, one-line errors, resumable predict, Ctrl-C, the guided tour, W&B offline."""
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import data
import toolplay
from tools import Tool, UserError

ROOT = Path(toolplay.__file__).parent
TINY = ["--method=sft", "--model=tiny", "--examples=24", "--eval_examples=4", "--batch_size=4", "--steps=4", "--save_every=2",
        "--eval_every=2",
        "--max_tokens=4000", "--lora_r=2"]


def cli(*argv, code=0, capsys=None):
    """Run a verb in this process -> what it printed."""
    try:
        toolplay.main(list(map(str, argv)))
        left = 0
    except SystemExit as stop:
        left = stop.code or 0
    out = capsys.readouterr()
    assert left == code, out
    assert "Traceback" not in out.err
    return out


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    toolplay.main(["train", str(ROOT / "configs" / "sft_tiny.json"), *TINY, f"--run_dir={folder}"])
    return folder


def test_a_run_folder_holds_what_the_readme_says(run):
    assert {"config.json", "metrics.jsonl", "timing.jsonl", "checkpoint", "adapter"} <= {p.name for p in run.iterdir()}
    config = json.loads((run / "config.json").read_text())
    assert config["lora_r"] == 2 and config["provenance"]["packages"]["torch"].startswith("2.13.0")
    lines = [json.loads(x) for x in (run / "metrics.jsonl").read_text().splitlines()]
    assert [x["step"] for x in lines] == [1, 2, 3, 4] and "eval_loss" in lines[1] and "eval_loss" in lines[3]


def test_sft_py_is_the_same_run(run, tmp_path):
    import sft
    sft.main([str(ROOT / "configs" / "sft_tiny.json"), *TINY, f"--run_dir={tmp_path / 'x'}"])
    assert (tmp_path / "x" / "metrics.jsonl").read_bytes() == (run / "metrics.jsonl").read_bytes()
    assert (tmp_path / "x" / "adapter" / "adapter_model.safetensors").read_bytes() == (
        run / "adapter" / "adapter_model.safetensors").read_bytes()


def test_a_file_trains_its_own_method(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["dpo.py", "c.json"])
    (tmp_path / "c.json").write_text('{"model": "tiny", "examples": 4}')  # no "method": sft
    err = cli("train", "c.json", code=2, capsys=capsys).err
    assert 'its method is "sft", not "dpo"' in err and not (tmp_path / "runs").exists()


def test_an_existing_run_is_not_overwritten(run, capsys):
    out = cli("train", ROOT / "configs" / "sft_tiny.json", *TINY, f"--run_dir={run}", code=2, capsys=capsys)
    assert out.err.count("\n") == 1 and "--resume" in out.err and "--run_dir" in out.err


@pytest.mark.parametrize("argv,words", [
    (["train", "nowhere.json"], ["nowhere.json", "cannot read"]),
    (["train", ROOT / "configs" / "sft_tiny.json", "--learning_rat=1"], ["learning_rat", "unknown key"]),
    (["train", ROOT / "configs" / "sft_tiny.json", "--lr=-1"], ["command line", "lr = -1", "> 0"]),
    (["predict", "--model", "tiny", "--input", "absent.jsonl", "--output", "o.jsonl"], ["absent.jsonl"]),
    (["eval", "--run", "no/such/run"], ["no/such/run", "not a run folder"]),
    (["chat", "--model", "no-such-org/no-such-model"], ["no-such-org/no-such-model", "cannot be loaded"]),
    (["predict", "--model", "tiny", "--input", "x", "--output", "y", "--tools", "absent.json"], ["absent.json"]),
    (["predict", "--model", "tiny", "--input", "x", "--output", "y", "--batch-size", "0"], ["--batch-size", "at least 1"]),
    (["predict", "--model", "tiny", "--input", "x", "--output", "y", "--temperature", "nan"], ["--temperature", "at least 0"]),
    (["chat"], ["--run", "--model", "--help"]),
    (["fly"], ["fly", "--help"]),
    (["train", ROOT / "configs" / "sft_tiny.json", "--path=x.jsonl", "--run_dir=r"], ["path", "source"]),
    (["train", ROOT / "configs" / "sft_tiny.json", "--start_from=nowhere", "--run_dir=r"], ["start_from", "nowhere", "adapter"]),
    (["train", ROOT / "configs" / "sft_tiny.json", '--mix={"canonical": 1}', "--run_dir=r"], ["canonical", "mix"]),
])
def test_a_users_mistake_is_one_line_and_exit_code_2(argv, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # do not wait for a hub that cannot be reached
    err = cli(*argv, code=2, capsys=capsys).err
    assert all(word in err for word in words), err
    assert err.splitlines()[-1].startswith("error: ")


def test_resuming_what_never_began_begins_it(tmp_path, capsys):
    out = cli("train", ROOT / "configs" / "sft_tiny.json", "--resume", f"--run_dir={tmp_path / 'r'}", "--steps=1", "--examples=8",
              "--eval_examples=0", capsys=capsys)
    assert "nothing to resume" in out.err and (tmp_path / "r" / "adapter").is_dir()


def test_predict_streams_resumes_and_reports_bad_lines(run, tmp_path, capsys):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    weather = {"type": "function", "function": {"name": "get_rain", "description": "Rain.",
                                                "parameters": {"type": "object", "properties": {}}}}
    good = [{"id": "a", "prompt": "What is 2 + 2?"}, {"id": 2, "messages": [{"role": "user", "content": "hi"}]},
            {"id": "c", "prompt": "rain?", "tools": [weather]}, {"id": "d", "prompt": "no tools", "tools": []}]
    bad = ["{broken", '{"prompt": "no id"}', '{"id": "x"}', '{"id": "y", "messages": []}', '{"id": "a", "prompt": "again"}',
           '{"id": "z", "prompt": "p", "tools": 3}']
    source.write_text("\n".join([json.dumps(g) for g in good[:2]] + bad + [json.dumps(g) for g in good[2:]]) + "\n")
    out = cli("predict", "--run", run, "--input", source, "--output", target, "--max-new-tokens", 5, capsys=capsys)
    for number in range(3, 9):
        assert f"line {number}:" in out.err
    lines = [json.loads(x) for x in target.read_text().splitlines()]
    assert [x["id"] for x in lines] == ["a", 2, "c", "d"]
    assert all(set(x) == {"id", "output", "calls", "results", "final"} and isinstance(x["output"], str) for x in lines)
    whole = target.read_bytes()
    target.write_bytes(whole[:whole.index(b"\n") + 10])  # as if killed in the middle of the second line
    cli("predict", "--run", run, "--input", source, "--output", target, "--max-new-tokens", 5, capsys=capsys)
    assert target.read_bytes() == whole


def test_predict_into_a_file_by_way_of_stdout(run, tmp_path):
    (tmp_path / "in.jsonl").write_text('{"id": 1, "prompt": "hi"}\n{"id": Infinity, "prompt": "hi"}\n'
                                       + json.dumps({"id": 2, "prompt": "long " * 1000}) + "\n")
    with open(tmp_path / "out.jsonl", "w") as out:
        done = subprocess.run([sys.executable, ROOT / "toolplay.py", "predict", "--run", run, "--input", tmp_path / "in.jsonl", "--output",
                               "/dev/stdout", "--max-new-tokens", "3"],
                              stdout=out, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 0
    assert [json.loads(line)["id"] for line in (tmp_path / "out.jsonl").read_text().splitlines()] == [1]
    assert "line 2:" in done.stderr and "no room for an answer" in done.stderr


def test_predict_keeps_what_it_did_not_write(run, tmp_path, capsys):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"id": 1, "prompt": "half a character: \\ud800"}\n{"id": "\\udfff", "prompt": "hi"}\n{"id": 2, "prompt": '
                      '"hi"}\n{"id": 3, "prompt": "ho"}\n')
    answer = {"id": 2, "output": "a line\u2028and another", "calls": [], "results": [], "final": "caf\u00e9"}
    target.write_text(json.dumps(answer, ensure_ascii=False) + "\n" + '{"id": 3, "output": "café'[:-1], encoding="utf-8")
    target.write_bytes(target.read_bytes() + "é".encode()[:1])  # as if killed in the middle of a character
    out = cli("predict", "--run", run, "--input", source, "--output", target, "--max-new-tokens", 3, capsys=capsys)
    assert "line 1:" in out.err and "line 2:" in out.err
    lines = target.read_text(encoding="utf-8").split("\n")[:-1]
    assert json.loads(lines[0]) == answer and [json.loads(x)["id"] for x in lines] == [2, 3]
    for foreign in ("# my notes\n", '{"id": 1, "prompt": "an input file"}\n', "[1]\n"):
        target.write_text(foreign)
        assert "holds no answers" in cli("predict", "--run", run, "--input", source, "--output", target, code=2, capsys=capsys).err
        assert target.read_text() == foreign


def test_a_run_that_was_moved_goes_on_where_it_is(run, tmp_path, capsys):
    shutil.copytree(run, tmp_path / "moved")
    out = cli("train", tmp_path / "moved", "--resume", capsys=capsys)
    assert f"done: {tmp_path / 'moved'}" in out.out


def test_no_git_on_the_machine(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    assert toolplay.provenance(0)["git_commit"] is None


def test_the_tour_runs_the_choice(capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda prompt="": "2")
    assert "learned by LoRA" in cli(capsys=capsys).out
    monkeypatch.setattr("builtins.input", lambda prompt="": "99")
    assert "choose a number" in cli(code=2, capsys=capsys).err


def test_chat_remembers_its_calls(monkeypatch, capsys):
    from tools import Call, format_call
    said, call, inputs = [], format_call(Call("calculator", {"expression": "17 * 23"})), iter(["17 * 23?", "and twice that?", ""])

    def rollout(model, tokenizer, chats, tools, **more):
        said.append(chats[0]["messages"])
        e = toolplay.Episode([], [], [], 0, turns=[call, "391."], final="391.", stop="end")
        e.calls, e.results = [Call("calculator",
                                   {"expression": "17 * 23"})], [toolplay.execute(Call("calculator", {"expression": "17 * 23"}), tools)]
        return [e]
    monkeypatch.setattr(toolplay, "rollout", rollout)
    monkeypatch.setattr("builtins.input", lambda prompt="": next(inputs))
    out = cli("chat", "--model", "tiny", capsys=capsys).out
    assert 'calculator(expression="17 * 23")' in out and '{"result": 391}' in out
    assert [m["role"] for m in said[1]] == ["user", "assistant", "tool", "assistant", "user", "assistant", "tool",
                                            "assistant"][:len(said[1])]
    assert said[1][2]["content"] == '<tool_response>{"result": 391}</tool_response>'


def test_chat_and_tour(run, capsys, monkeypatch, tmp_path):
    answers = iter(["hello", ""])
    monkeypatch.setattr("builtins.input", lambda prompt="": next(answers))
    out = cli("chat", "--run", run, "--max-new-tokens", 4, capsys=capsys).out
    assert "Tools: calculator, weather, search" in out and "answer" in out
    assert "the demo" in cli(capsys=capsys).out


def test_custom_tools_from_a_json_file(tmp_path, capsys, monkeypatch):
    (tmp_path / "mytools.py").write_text("def shout(text):\n    return text.upper()\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    file = tmp_path / "tools.json"
    file.write_text(json.dumps([{"name": "shout", "description": "Shout.", "function": "mytools:shout",
                                 "parameters": {"type": "object", "properties": {"text": {"type": "string"}}, "required": ["text"]}}]))
    from tools import Call, execute
    assert execute(Call("shout", {"text": "a"}), toolplay.read_tools(file)).value == "A"
    for text in ("{", '["nosuch"]', '[{"name": "x", "description": "", "function": "nomodule_x:f", "parameters": {"type": "object", '
                                    '"properties": {}}}]'):
        file.write_text(text)
        assert cli("predict", "--model", "tiny", "--tools", file, "--input", "x", "--output", "y", code=2,
                   capsys=capsys).err.count("\n") == 1


def test_tools_of_a_line_by_name(run, tmp_path, capsys, monkeypatch):
    """A name in a line's `tools` means the known tool of that name, built-in or from --tools."""
    (tmp_path / "shouting.py").write_text("def shout(text: str) -> str:\n    \"\"\"Shout.\"\"\"\n    return text.upper()\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    # the parameters come from the function
    (tmp_path / "t.json").write_text(json.dumps(["calculator", {"name": "shout", "function": "shouting:shout"}]))
    assert toolplay.read_tools(tmp_path / "t.json")["shout"].signature() == "shout(text: string) - Shout."
    (tmp_path / "in.jsonl").write_text('{"id": 1, "prompt": "a", "tools": ["calculator", "shout"]}\n{"id": 2, "prompt": "a", "tools": '
                                       '["weather", "nosuch"]}\n')
    out = cli("predict", "--run", run, "--tools", tmp_path / "t.json", "--input", tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl",
              "--max-new-tokens", 2, capsys=capsys)
    assert [json.loads(x)["id"] for x in (tmp_path / "out.jsonl").read_text().splitlines()] == [1]
    assert "nosuch" in out.err
    known = toolplay.read_tools(tmp_path / "t.json")
    mixed = ["weather", {"name": "shout", "description": "In other words.", "parameters": known["shout"].parameters}]
    chat = data.check_conversation({"messages": [{"role": "user", "content": "a"}], "tools": mixed}, {**toolplay.BUILTIN, **known})
    assert chat["tools"][1].function is known["shout"].function and chat["tools"][1].description == "In other words."


def test_tools_of_a_line_in_other_spellings(run, tmp_path, capsys, monkeypatch):
    """Lines may also use the key `functions`, or JSON text. The model is offered what the line declares; the known functions are run."""
    offered, dial = [], {"name": "dial", "description": "Dial.", "parameters": {"type": "object", "properties": {}}}
    monkeypatch.setattr(toolplay, "rollout",
                        lambda model, tokenizer, chats, **more: [
                            offered.append([(t.name, t.function is not None) for t in c["tools"]])
                            or toolplay.Episode([], [], [], 0, turns=["x"], final="x", stop="end") for c in chats])
    lines = [{"id": 1, "prompt": "a", "functions": [dial]}, {"id": 2, "prompt": "a", "tools": json.dumps([dial, "calculator"])},
             {"id": 3, "prompt": "a", "tools": None, "functions": []}]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, lines)))
    cli("predict", "--run", run, "--input", tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl", capsys=capsys)
    assert offered == [[("dial", False)], [("dial", False), ("calculator", True)], []]
    import eval as evaluation
    expected = {"calls": [{"name": "dial", "arguments": {}}]}
    assert evaluation.as_case({"prompt": "a", "functions": [dial], "expected": expected}).calls[0].name == "dial"
    assert [t.name for t in data.with_tools(lines[0], [Tool("convert", "", {}, None)])["tools"]] == ["dial", "convert"]
    (tmp_path / "in.jsonl").write_text('{"id": 9, "prompt": "a"}')
    assert "3 of other prompts" in cli("predict", "--run", run, "--input", tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl",
                                       capsys=capsys).out


def test_a_corpus_that_is_not_there_is_the_users_to_know(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("TOOLPLAY_SEARCH", str(tmp_path / "nope.jsonl"))
    assert "nope.jsonl" in cli("predict", "--model", "tiny", "--input", "x", "--output", "y", code=2, capsys=capsys).err


def test_trie_and_validate(capsys):
    out = cli("trie", ROOT / "configs" / "sft_tiny.json", "--examples=24", capsys=capsys).out
    nodes, heads = map(int, re.search(r"are (\d+) nodes.*runs on (\d+) of them", out).groups())
    assert "times fewer" in out and 0 < heads < nodes
    assert "everything is in order" in cli("validate", "--model", "tiny", capsys=capsys).out


def start(*argv, **env):
    return subprocess.Popen([sys.executable, str(ROOT / "toolplay.py"), *map(str, argv)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            text=True,
                            cwd=ROOT, env={**os.environ, **env})


@pytest.fixture(scope="module")
def tracked(tmp_path_factory):
    """A run with Weights & Biases, started before the next test so that both import torch at the same time -> (process, folder)."""
    pytest.importorskip("wandb")
    folder = tmp_path_factory.mktemp("tracked") / "x"
    process = start("train", ROOT / "configs" / "sft_tiny.json", *TINY, "--wandb=true", "--wandb_tags=[\"t\"]", f"--run_dir={folder}",
                    WANDB_MODE="offline", WANDB_SILENT="true")
    yield process, folder
    process.kill()


def test_ctrl_c_leaves_a_resumable_run(tmp_path, run, request):
    if toolplay.importlib.util.find_spec("wandb"):
        request.getfixturevalue("tracked")
    folder = tmp_path / "x"
    process = start("train", ROOT / "configs" / "sft_tiny.json", *TINY, "--steps=4000", f"--run_dir={folder}")
    while not (folder / "metrics.jsonl").exists() or not (folder / "metrics.jsonl").read_text():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and f"toolplay.py train {folder} --resume" in err and "Traceback" not in err
    assert toolplay.newest_checkpoint(folder)


def test_wandb_offline_really_runs(tracked):
    process, folder = tracked
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert list(folder.glob("wandb/offline-run-*/run-*.wandb")), list(folder.rglob("*"))


def test_wandb_missing_is_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    out = cli("train", ROOT / "configs" / "sft_tiny.json", *TINY, "--wandb=true", f"--run_dir={tmp_path / 'x'}", capsys=capsys)
    assert "wandb: the package is not installed" in out.err and (tmp_path / "x" / "adapter").is_dir()


def test_demo_end_to_end_on_tiny(tmp_path, capsys):
    out = cli("demo", "--n", 10, *TINY, f"--run_dir={tmp_path / 'demo'}", capsys=capsys).out
    for words in ("question", "before", "after", "| tool_accuracy |", "What next?", "small talk"):
        assert words in out
    if toolplay.importlib.util.find_spec("matplotlib"):
        assert (tmp_path / "demo" / "demo.png").stat().st_size > 10000


def test_calls_are_held_to_the_schemas_where_the_run_or_the_user_says_so(run, tmp_path, capsys, monkeypatch):
    """eval, its BFCL suite and predict use the config's settings in `HELD`, unless the command line sets them."""
    asked, cases, rollout = [], tmp_path / "cases.jsonl", toolplay.rollout
    cases.write_text('{"id": 1, "prompt": "hi"}\n')
    monkeypatch.setattr(toolplay, "rollout", lambda *args, **kwargs: asked.append(tuple(kwargs[key] for key in toolplay.HELD))
                        or rollout(*args, **{**kwargs, "max_new_tokens": 4}))
    held = tmp_path / "held"
    shutil.copytree(run, held)
    config = json.loads((held / "config.json").read_text())
    toolplay.write_json(held / "config.json", {**config, "constrained": True, "call_margin": 0.5, "beams": 3, "grounding": 1.5})
    for n, (verb, folder, flag, expected) in enumerate([
            ("eval", run, [], (False, 0, 1, 0)), ("eval", held, [], (True, 0.5, 3, 1.5)),
            ("eval", held, ["--no-constrained", "--call-margin", 0, "--beams", 1, "--grounding", 0], (False, 0, 1, 0)),
            ("predict", run, ["--constrained", "--call-margin", 2, "--beams", 2, "--grounding", 3], (True, 2, 2, 3)),
            ("predict", held, [], (True, 0.5, 3, 1.5))]):
        where = (["--data", cases, "--out", tmp_path / "r.json"] if verb == "eval"
                 else ["--input", cases, "--output", tmp_path / f"{n}.jsonl"])
        cli(verb, "--run", folder, *where, *flag, capsys=capsys)
        assert asked.pop() == expected and not asked
        kept = {} if verb == "predict" else json.loads((tmp_path / "r.json").read_text())
        assert verb == "predict" or tuple(kept[key] for key in toolplay.HELD) == expected


def test_weights_that_are_gone_are_saved_again(run, tmp_path, capsys):
    shutil.copytree(run, tmp_path / "x")
    shutil.rmtree(tmp_path / "x" / "adapter")
    cli("train", tmp_path / "x", "--resume", capsys=capsys)
    assert (tmp_path / "x" / "adapter").is_dir()


def test_damage_in_a_run_folder_is_one_line(run, tmp_path, capsys):
    shutil.copytree(run, tmp_path / "x")
    (tmp_path / "x" / "metrics.jsonl").write_text('{"step": "x"}\n')
    assert "damaged" in cli("train", tmp_path / "x", "--resume", code=2, capsys=capsys).err
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "before.json").write_text('{"report": {}}')
    assert "before.json" in cli("demo", f"--run_dir={tmp_path / 'd'}", *TINY, "--model=tiny", "--resume", code=2, capsys=capsys).err


def test_lines_that_are_not_to_be_learned_are_skipped(tmp_path, capsys):
    """A line is skipped if each of its answers has OpenAI's weight 0."""
    lines = [{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho", "weight": n}]} for n in (1, 0)]
    (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert "line 2: it has no assistant message (or only messages of weight 0)" in cli("trie", ROOT / "configs" / "sft_tiny.json",
                                                                                   "--source=jsonl", f"--path={tmp_path / 'm.jsonl'}",
                                                                                   capsys=capsys).err


def test_full_fine_tuning_saves_a_model(tmp_path, capsys):
    cli("train", ROOT / "configs" / "sft_tiny.json", *TINY, "--lora_r=0", "--lr=0.0001", f"--run_dir={tmp_path / 'x'}", capsys=capsys)
    model, tokenizer, _ = toolplay.load_run(tmp_path / "x")
    assert toolplay.rollout(model, tokenizer, [{"messages": [{"role": "user", "content": "hi"}]}], {}, temperature=0,
                            max_new_tokens=3)[0].turns


def test_config_reference_names_every_key():
    text = toolplay.config_reference()
    for key in [f.name for f in toolplay.dataclasses.fields(toolplay.config_class("sft"))]:
        assert f"| `{key}` |" in text, key
    readme = (ROOT / "README.md").read_text()
    assert text.strip() in readme, "README's config reference is out of date: python -c 'import toolplay; print(toolplay.config_reference())'"


# ---------------------------------------------------------------- no file of the user is lost

def test_a_result_never_replaces_a_folder(run, tmp_path, capsys):
    """A link or a device is not replaced either; the error names a missing folder."""
    cases = tmp_path / "cases.jsonl"
    cases.write_text('{"prompt": "hi"}\n')
    kept = sorted(p.name for p in run.iterdir())
    for out in (run, tmp_path):
        assert "folder of that name" in cli("eval", "--run", run, "--data", cases, "--out", out, code=2, capsys=capsys).err
    assert sorted(p.name for p in run.iterdir()) == kept and cases.exists()  # the error comes before any work
    (tmp_path / "target.json").write_text("old")
    (tmp_path / "link.json").symlink_to(tmp_path / "target.json")
    toolplay.write_json(tmp_path / "link.json", [1])
    assert (tmp_path / "link.json").is_symlink() and json.loads((tmp_path / "target.json").read_text()) == [1]
    toolplay.write_json("/dev/null", [1])
    assert not Path("/dev/null").is_file()
    with pytest.raises(UserError, match="there is no folder"):
        toolplay.write_json(tmp_path / "nowhere" / "a.json", [1])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cases.jsonl", "link.json", "target.json"]  # no half-written file is left


def test_a_damaged_line_amid_answers_loses_none(run, tmp_path, capsys):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"id": 1, "prompt": "hi"}\n')
    text = '{"id": 1, "output": "a"}\n{"id": 2, "out\n{"id": 3, "output": "c"}\n'
    target.write_text(text)
    assert "line 2" in cli("predict", "--run", run, "--input", source, "--output", target, code=2, capsys=capsys).err
    assert target.read_text() == text


def test_a_run_that_did_not_begin_leaves_no_folder(tmp_path, capsys):
    """After an error that shows only with the data or the model, the corrected config can start without --resume."""
    where = tmp_path / "run"
    for wrong in ("--max_tokens=3", "--start_from=nowhere"):
        for more in ([], ["--resume"]):
            cli("train", ROOT / "configs" / "sft_tiny.json", f"--run_dir={where}", wrong, *more, code=2, capsys=capsys)
            assert not where.exists()
    cli("train", ROOT / "configs" / "sft_tiny.json", f"--run_dir={where}", "--steps=1", capsys=capsys)


@pytest.mark.parametrize("text", ["[]", "null", "5", '{"records": 5}', '{"records": [{"id": 1}]}', '{"records": ["a"]}', "{", "[" * 9000])
def test_compare_refuses_damaged_results(run, tmp_path, text, capsys):
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "eval.json").write_text(text)
    assert "eval.json" in cli("compare", tmp_path / "run", code=2, capsys=capsys).err


def test_mixed_columns_and_flags_without_a_verb(run, tmp_path, capsys):
    """Tables write null where a line has no messages or tools; an unknown flag gives a one-line error, wherever it is."""
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"id": 1, "prompt": "hi", "messages": null, "tools": null}\n')
    cli("predict", "--run", run, "--input", source, "--output", target, "--max-new-tokens", 2, capsys=capsys)
    assert len(target.read_text().splitlines()) == 1
    assert "unknown argument --version" in cli("--version", code=2, capsys=capsys).err
    assert "at least 0" in cli("eval", "--run", run, "--data", source, "--failures", "-1", code=2, capsys=capsys).err


def test_predict_goes_on_from_a_first_line_that_a_kill_cut_off(run, tmp_path, capsys):
    (tmp_path / "in.jsonl").write_text('{"id": 1, "prompt": "Hi"}\n')
    for held, code in (('{"id": 1, "output": "half', 0), ('{"id', 0), ("some notes of mine", 2), ('{"id": 1, "output": "half\nmore', 2)):
        (tmp_path / "out.jsonl").write_text(held)
        cli("predict", "--run", run, "--max-new-tokens", "2", "--input", tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl",
            code=code, capsys=capsys)
        if code:
            assert (tmp_path / "out.jsonl").read_text() == held
        else:
            assert [json.loads(line)["id"] for line in open(tmp_path / "out.jsonl")] == [1]


def test_a_run_and_a_model_are_told_apart(run, tmp_path, capsys):
    assert "it is a run folder, not a model; eval, predict and chat take it as --run" in cli("chat", "--model", run, code=2,
                                                                                             capsys=capsys).err
    toolplay.load_model("tiny")[0].save_pretrained(tmp_path / "m")
    assert f"it is a model, not a run folder; use --model {tmp_path / 'm'}" in cli("chat", "--run", tmp_path / "m", code=2,
                                                                                   capsys=capsys).err


@pytest.mark.parametrize("key, text, words", [("steps", "1" + "0" * 400, "below 2^63"),
                                              ("lora_targets", '["nope"]', "lora_targets, lora_skip: no linear layer matches nope")])
def test_settings_that_no_run_can_have(tmp_path, capsys, key, text, words):
    assert words in cli("train", toolplay.ROOT / "configs/sft_tiny.json", f"--{key}={text}", f"--run_dir={tmp_path / 'r'}", code=2,
                        capsys=capsys).err


def test_text_settings_may_look_like_json():
    config = toolplay.load_config({}, ["--run_dir=true", "--wandb_name=2024"])
    assert (config.run_dir, config.wandb_name) == ("true", "2024")


def test_a_state_space_model_is_sampled_from():
    import transformers
    torch = toolplay.torch
    torch.manual_seed(0)
    model = transformers.MambaForCausalLM(transformers.MambaConfig(vocab_size=258, hidden_size=16, state_size=4,
                                                                   num_hidden_layers=1)).eval()
    tokenizer = toolplay.load_model("tiny")[1]
    episode = toolplay.rollout(model, tokenizer, [{"messages": [{"role": "user", "content": "Hi"}]}], {}, temperature=0.0, max_new_tokens=5,
                               max_turns=1)[0]
    ids = episode.ids[:episode.prompt]
    for token in episode.ids[episode.prompt:]:
        assert token == int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
        ids.append(token)


def test_a_tokenizer_with_more_tokens_than_the_model_knows_is_one_line(tmp_path):
    net, tokenizer = toolplay.load_model("tiny")
    tokenizer.add_tokens(["<new>"])
    net.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="its tokenizer has 259 tokens, but the model knows 258; save it again after"):
        toolplay.load_model(tmp_path)


def test_a_gguf_is_known_by_all_of_it(tmp_path, monkeypatch, capsys):
    """The cache key covers the whole file: a file exported again after more training may differ only in the middle."""
    monkeypatch.setenv("TOOLPLAY_CACHE", str(tmp_path / "cache"))
    for middle in b"ab":
        (tmp_path / "m.gguf").write_bytes(b"GGUF" + bytes(2 ** 21) + bytes([middle]) + bytes(2 ** 21))
        with pytest.raises(SystemExit):
            toolplay.main(["eval", "--model", str(tmp_path / "m.gguf")])
    folders = re.findall(r"safetensors in (\S+)", capsys.readouterr().err)
    assert len(set(folders)) == 2


def test_a_result_never_replaces_what_is_none(run, tmp_path, capsys):
    mine = tmp_path / "mine.jsonl"
    line = json.dumps({"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}], "tools": []}) + "\n"
    mine.write_text(line)
    kept = shutil.copytree(run, tmp_path / "run")
    for path in (mine, kept / "config.json"):
        before = path.read_bytes()
        assert "holds something else" in cli("eval", "--model", "tiny", "--data", mine, "--out", path, code=2, capsys=capsys).err
        assert path.read_bytes() == before
    for _ in range(2):  # an earlier result may be replaced
        cli("eval", "--run", kept, "--data", mine, "--out", tmp_path / "r.json", "--failures", 0, capsys=capsys)
        cli("compare", kept, "--csv", tmp_path / "r.csv", capsys=capsys)
    assert "holds something else" in cli("compare", kept, "--csv", mine, code=2, capsys=capsys).err
    for argv in (["--jsonl", mine, "--out", mine], ["--toolbench", mine, "--out", tmp_path / "o", "--report", mine]):
        with pytest.raises(SystemExit) as stop:
            data.main(list(map(str, argv)))
        assert stop.value.code == 2 and "it is read here" in capsys.readouterr().err
    assert mine.read_text() == line
    assert "no such run folder" in cli("compare", tmp_path / "nowhere", code=2, capsys=capsys).err
    assert "does not go with" in cli("eval", "--model", "tiny", "--data", mine, "--split", "dev", code=2, capsys=capsys).err
    assert "tokens/nodes" in cli("trie", kept, capsys=capsys).out


def test_a_preview_shows_what_training_takes(tmp_path, capsys):
    answer = lambda text: {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": text}], "tools": ["search"]}  # noqa: E731
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, [
        answer("ho"), answer("<tool_call>{bad}</tool_call>"), answer('<tool_call>{"name": "convert", "arguments": {}}</tool_call>'),
        {"prompt": "hi", "completion": "from TRL"}])))
    data.main(["--jsonl", str(tmp_path / "mine.jsonl"), "--out", str(tmp_path / "out.jsonl")])
    assert "2 conversations written" in (out := capsys.readouterr()).out and "line 2: an assistant turn holds" in out.err
    assert json.loads((tmp_path / "out.jsonl").read_text().splitlines()[1])["messages"][1]["content"] == "from TRL"
    (tmp_path / "in.jsonl").write_text(json.dumps({"id": 1, "prompt": "hi", "completion": "from TRL"}) + "\n")
    cli("predict", "--model", "tiny", "--input", tmp_path / "in.jsonl", "--output", tmp_path / "answers.jsonl", "--max-new-tokens", 2,
        capsys=capsys)
    assert json.loads((tmp_path / "answers.jsonl").read_text())["id"] == 1  # the prompt alone is answered


def test_only_training_runs_in_several_processes(run, tmp_path, capsys, monkeypatch):
    """Two ranks of predict would write over each other's answers."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    for argv in (["demo"], ["predict", "--run", run, "--input", "x", "--output", tmp_path / "y"], ["eval", "--run", run]):
        assert f"{argv[0]} runs in one process" in cli(*argv, code=2, capsys=capsys).err
