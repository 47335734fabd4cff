"""Configs are strict; each error is one line with the file, the key, what was given and what is allowed."""
import dataclasses
import json

import pytest
import small

import toolplay
from toolplay import UserError, load_config


@pytest.fixture
def file(tmp_path):
    def write(content):
        path = tmp_path / "mine.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        return path
    return write


def complaint(source, overrides=()):
    with pytest.raises(UserError) as error:
        load_config(source, overrides)
    text = str(error.value)
    assert "\n" not in text
    return text


def test_defaults_then_file_then_override(file):
    path = file({"comment": "why", "lr": 0.5, "batch_size": 4})
    config = load_config(path, ["--batch_size=8", "--model=tiny", "--lora_targets=[\"q_proj\"]", "--wandb=true", "--epochs=2"])
    assert (config.lr, config.batch_size, config.model, config.lora_targets, config.wandb,
            config.epochs) == (0.5, 8, "tiny", ["q_proj"], True, 2)
    assert config.warmup == toolplay.Config().warmup and config.keep_best is True  # the method's own keys exist too
    assert config.run_dir == "runs/mine" and load_config({}).run_dir == "runs/sft"
    assert load_config(path, ["--lr=1", "--lr=2"]).lr == 2
    assert load_config(path, ["--run_dir="]).run_dir == "runs/mine"


def test_a_resolved_config_can_be_read_again(file):
    config = load_config({"lr": 0.25, "tools": [], "mix": {"arithmetic": 1}})
    again = load_config(file({**dataclasses.asdict(config), "provenance": {"git_commit": None}}))
    assert dataclasses.asdict(again) == dataclasses.asdict(config)


def test_defaults_are_not_shared():
    load_config({}).lora_targets.append("oops")
    assert load_config({}).lora_targets == ["all-linear"]


@pytest.mark.parametrize("key, near", [("learning_rat", None), ("lora_rank", "lora_"), ("batchsize", "batch_size"), ("LR", None),
                                       ("keep_bst", "keep_best"), ("", None)])
def test_unknown_keys(file, key, near):
    path = file({key: 1})
    text = complaint(path)
    assert str(path) in text and f'"{key}"' in text
    assert near in text if near else "lr" in text  # the nearest key, or all keys
    assert "command line" in complaint({}, [f"--{key}=1"])


BAD = [("lr", value) for value in (0, -1, "fast", None, True, [], float("nan"), float("inf"), -float("inf"))] + [
    ("batch_size", value) for value in (0, -3, 2.5, 2.0, "4", None, False, float("nan"), float("inf"))] + [
    ("steps", -1), ("seed", -1), ("seed", 0.5), ("warmup", 1.1), ("warmup", -0.1), ("lora_dropout", 2), ("epochs", 0),
    ("weight_decay", -1e-9),
    ("model", 5), ("model", None), ("run_dir", ["x"]), ("wandb", 1), ("wandb", "yes"), ("keep_best", 0), ("lora_targets", "q_proj"),
    ("lora_targets", [1]),
    ("wandb_tags", {}), ("mix", []), ("mix", {"poetry": 1}), ("mix", {"arithmetic": -1}), ("mix", {"arithmetic": "much"}),
    ("mix", {"arithmetic": float("nan")}),
    ("epochs", 1e308), ("lr", 1e-300), ("mix", {"arithmetic": 1e308, "weather": 1e308}), ("path", "a\0b"), ("run_dir", "\0"),
    ("tools", {}), ("schedule", "square"), ("schedule", 3), ("schedule", ["cosine"]), ("precision", "fp8"), ("device", "tpu"),
    ("source", None),
    ("tool_style", {}), ("method", "magic"), ("method", 1), ("method", ["sft"]), ("method", None)]


@pytest.mark.parametrize("key, value", BAD, ids=lambda x: repr(x)[:20])
def test_wrong_values(file, key, value):
    path = file({"comment": "x", key: value})
    text = complaint(path)
    assert str(path) in text and key in text and "must be" in text
    if (key, value) == ("model", 5):  # on the command line a number is a valid name
        assert load_config({}, ["--model=5"]).model == "5"
        return
    assert "must be" in complaint({}, [f"--{key}={json.dumps(value)}"])
    assert "command line" in complaint({}, [f"--{key}={json.dumps(value)}"])


def test_the_complaint_says_what_was_given_and_what_is_allowed():
    assert complaint({"batch_size": -3}) == "config: batch_size = -3: must be a whole number > 0"
    assert complaint({"schedule": "square"}) == 'config: schedule = "square": must be one of cosine, linear, constant'
    assert complaint({"wandb": "yes"}) == 'config: wandb = "yes": must be true or false'
    assert complaint({"warmup": 3}) == "config: warmup = 3: must be a number 0 to 1"


@pytest.mark.parametrize("key, value", [("lr", 1), ("lr", 1e-30), ("epochs", 3), ("warmup", 0), ("warmup", 1), ("steps", 0), ("lora_r", 0),
                                        ("weight_decay", 0),
                                        ("lora_targets", ["q_proj"]), ("mix", {"weather": 0.5}), ("model", "ünï/cødé"), ("eval_every", 0)])
def test_good_values(file, key, value):
    assert getattr(load_config(file({key: value})), key) == value


@pytest.mark.parametrize("content, says", [
    ('{"lr": 1, "lr": 2}', '"lr" occurs twice'), ('{"mix": {"weather": 1, "weather": 2}}', "twice"), ("", "JSON"), ("{", "JSON"),
    ("{'lr': 1}", "JSON"),
    ('{"lr": 1,}', "JSON"), ("lr = 1", "JSON"), ("[]", "object"), ("3", "object"), ("null", "object"), ("[" * 100000, "JSON"),
    ('{"lr": 1} x', "JSON")])
def test_files_that_are_no_config(file, content, says):
    path = file(content)
    text = complaint(path)
    assert str(path) in text and says in text


def test_files_that_cannot_be_read(tmp_path):
    assert "nowhere.json" in complaint(tmp_path / "nowhere.json") and "configs" in complaint(tmp_path / "nowhere.json")
    assert str(tmp_path) in complaint(tmp_path)  # a folder
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00{")
    assert "binary.json" in complaint(tmp_path / "binary.json")


@pytest.mark.parametrize("item", ["lr=1", "--lr", "-lr=1", "lr", "", "--=1"])
def test_overrides_that_are_none(item):
    assert complaint({}, [item])


def test_strings_need_no_quotes_on_the_command_line():
    assert load_config({}, ["--run_dir=a b/c=d"]).run_dir == "a b/c=d"
    assert load_config({}, ['--run_dir="quoted"']).run_dir == "quoted"


def test_values_that_belong_together():
    assert "path" in complaint({"source": "jsonl"})
    assert load_config({"source": "jsonl", "path": "x.jsonl"}).path == "x.jsonl"


@pytest.mark.parametrize("settings, words", [
    ({"lora_dropout": 1}, "0 to below 1"), ({"lora_skip": 1.0}, "0 to below 1"), ({"lora_targets": []}, "lora_targets"),
    ({"tools": [5]}, "tools: 5"), ({"tools": ["calculator"]}, "must be an object"),
    ({"data": "jsonl", "source": "jsonl"}, "another name"),
    ({"source": "jsonl", "path": "a", "eval_path": "b", "eval_examples": 0}, "eval_path is not read while eval_examples = 0")])
def test_what_would_fail_later_fails_at_once(settings, words):
    assert words in complaint(settings)


def test_a_typo_of_our_models_does_not_ask_the_hub():
    with pytest.raises(UserError, match='did you mean "tiny"'):
        toolplay.load_model("TINY")


def test_the_reference_names_every_key():
    text = toolplay.config_reference()
    for f in dataclasses.fields(load_config({})):
        assert text.count(f"| `{f.name}` |") == 1, f.name


def test_every_config_in_the_repository_is_good():
    for path in (small.ROOT / "configs").glob("*.json"):
        load_config(path)


def test_a_byte_order_mark_is_no_mistake(tmp_path):
    (tmp_path / "c.json").write_text('\ufeff{"lr": 0.5}', encoding="utf-8")
    assert toolplay.load_config(tmp_path / "c.json").lr == 0.5


def test_more_than_the_model_has_is_one_line():
    with pytest.raises(UserError, match="lora_r = 1000000000: .* at most 128 wide"):
        toolplay.prepare_model(toolplay.load_config({"model": "tiny", "lora_r": 10 ** 9}), "cpu")
    with pytest.raises(UserError, match="1025 tokens, the model knows 1024 positions"):
        toolplay.token_logprobs(small.model("gpt2"), [([1] * 1025, [1] * 1025)])


def test_a_home_folder_is_found(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert toolplay.load_config({"run_dir": "~/x"}).run_dir == str(tmp_path / "x")


def test_what_people_type_on_the_command_line(file):
    assert load_config({}, ["--lr=.001"]).lr == 0.001 and load_config({}, ["--epochs=2."]).epochs == 2.0
    assert load_config({}, ["--lr", "0.01", "--seed", "3"]).lr == 0.01
    teacher = load_config({"method": "teacher", "k": 20}, ["--m=10", "--text", "corpus.txt"])
    assert (teacher.positions, teacher.samples, teacher.text) == (20, 10, "corpus.txt")
    assert "another name" in complaint({"method": "teacher", "k": 20, "positions": 5})
    assert "unknown key" in complaint({"k": 20})
    assert load_config(toolplay.ROOT / "configs" / "teacher.json", ["--k=20"]).positions == 20  # the file sets positions
    assert load_config({"method": "teacher", "k": 20}, ["--positions=5"]).positions == 5
