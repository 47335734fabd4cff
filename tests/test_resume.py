"""Runs: the same bytes twice, the same bytes after any kill -9, and clear errors for what cannot be resumed."""
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import small

import sft
import toolplay
from toolplay import Run, Trainer, UserError, load_config, newest_checkpoint

WORDS = ["Hello.", "It is 4.", "No, thanks.", "Sunny, I think.", "A", "391!", "Tell me more about it.", "Yes?"]


@pytest.fixture(scope="module")
def zygote():
    return small.zygote()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for name, words in (("train", WORDS), ("dev", WORDS[::3])):
        lines = [{"messages": [{"role": "system", "content": "."}, {"role": "user", "content": f"{n}?"},
                               {"role": "assistant", "content": w}]} for n, w in enumerate(words)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    return folder


@pytest.fixture
def config(corpus, tmp_path):
    def make(name="run", **more):
        return {"model": "tiny", "source": "jsonl", "path": str(corpus / "train.jsonl"), "eval_path": str(corpus / "dev.jsonl"),
                "run_dir": str(tmp_path / name),
                "device": "cpu", "batch_size": 3, "steps": 7, "save_every": 2, "eval_every": 3, "lora_r": 4, "lora_dropout": 0.3,
                "lr": 0.01, "micro_tokens": 40, **more}
    return make


def train(config, resume=False):
    run = Run(load_config(config), resume=resume)
    sft.train(run)
    return run.folder


def results(folder):
    """The bytes that may depend only on config and seed."""
    folder = Path(folder)
    files = [folder / "metrics.jsonl", *sorted((folder / "adapter").glob("*")), *sorted((folder / "model").glob("*"))]
    # a killed process may leave a temporary file
    out = {str(f.relative_to(folder)): f.read_bytes() for f in files if not f.name.startswith(".")}
    assert len(out) >= 3
    return out


def test_two_runs_are_bit_identical(config):
    a, b = results(train(config("a"))), results(train(config("b")))
    assert a == b
    assert a != results(train(config("c", seed=1)))
    lines = [json.loads(line) for line in a["metrics.jsonl"].splitlines()]
    assert [x["step"] for x in lines] == list(range(1, 8))
    assert [x["step"] for x in lines if "eval_loss" in x] == [3, 6, 7]
    assert lines[-1]["eval_loss"] < lines[0]["loss"]


def test_the_weights_of_the_lowest_evaluation_loss_are_kept(config):
    steady = {"schedule": "constant", "warmup": 0, "lr": 9.0, "eval_every": 1}  # so large a step that the loss goes up and down
    lines = [json.loads(line) for line in (train(config("best", **steady)) / "metrics.jsonl").read_text().splitlines()]
    best = min(lines, key=lambda x: x["eval_loss"])["step"]
    assert 1 <= best < 7
    weights = [results(folder)["adapter/adapter_model.safetensors"] for folder in (
        train(config("best", **steady), resume=True), train(config("short", **steady, steps=best)),
        train(config("last", **steady, keep_best=False)))]
    assert weights[0] == weights[1] != weights[2]


def test_the_run_folder_says_how_it_was_made(config):
    folder = train(config(steps=2))
    made = json.loads((folder / "config.json").read_text())
    assert made["lr"] == 0.01 and made["provenance"]["seed"] == 0 and "torch" in made["provenance"]["packages"]
    assert {p.name for p in folder.iterdir()} == {"config.json", "metrics.jsonl", "timing.jsonl", "checkpoint", "adapter"}
    assert [p.name for p in (folder / "checkpoint").iterdir()] == ["step-00000002"]


# ---------------------------------------------------------------- kill -9

@pytest.fixture(scope="module")
def uninterrupted(zygote, corpus, tmp_path_factory):
    """The results of each kind of run without an interruption."""
    known = {}

    def get(config):
        key = json.dumps({**config, "run_dir": ""})
        if key not in known:
            folder = tmp_path_factory.mktemp("whole") / "run"
            codes, stderr = zygote.run("train", config={**config, "run_dir": str(folder)})
            assert codes == [0], stderr
            known[key] = results(folder)
        return known[key]
    return get


def killed_then_resumed(zygote, config, *kills, pid=None):
    for n, (place, nth) in enumerate(kills):
        codes, stderr = zygote.run("train", config=config, place=place, nth=nth, resume=n > 0, pid=pid)
        assert codes == [-signal.SIGKILL], f"{place} {nth}: {stderr}"
    codes, stderr = zygote.run("train", config=config, resume=True, pid=pid)
    assert codes == [0], stderr
    left = [p.name for p in toolplay.Path(config["run_dir"]).rglob(".*")]
    return results(config["run_dir"]), left


KILLS = [("start", 1), ("step", 1), ("step", 6), ("log", 5), ("checkpoint", 2), ("inside the checkpoint", 1), ("inside the checkpoint", 3),
         ("fsync", 1), ("fsync", 9),
         ("rename", 1), ("rename", 4), ("rename", 6), ("rename", 8), ("removing the old checkpoint", 2), ("saving the model", 2),
         ("end", 1)]


@pytest.mark.parametrize("place, nth", KILLS)
def test_kill_9_then_resume_gives_the_same_bytes(zygote, uninterrupted, config, place, nth):
    got, _ = killed_then_resumed(zygote, config(), (place, nth))
    assert got == uninterrupted(config())


def test_killed_again_and_again(zygote, uninterrupted, config):
    got, left = killed_then_resumed(zygote, config(), ("inside the checkpoint", 1), ("log", 3), ("rename", 4), ("checkpoint", 1),
                                    ("inside the checkpoint", 1), ("step", 1))
    assert got == uninterrupted(config())
    assert not [name for name in left if name.startswith(".step")]  # half-written checkpoints are removed


@pytest.mark.parametrize("kills", [[("inside the checkpoint", 1)], [("rename", 4)]])
def test_killed_in_a_container(zygote, uninterrupted, config, kills):
    """The resuming process has the same pid as the killed process, and finds its half-written files."""
    got, _ = killed_then_resumed(zygote, config(), *kills, pid=7)
    assert got == uninterrupted(config())


@pytest.mark.parametrize("more", [{"lora_r": 0, "lr": 1e-3}, {"lora_r": 0, "lora_skip": 0.5}, {"keep_best": False}, {"eval_every": 0},
                                  {"precision": "fp16"},
                                  {"schedule": "linear", "warmup": 0.5, "weight_decay": 0.1}, {"steps": 0, "epochs": 2.5}], ids=str)
def test_other_kinds_of_runs_resume_too(zygote, uninterrupted, config, more):
    got, _ = killed_then_resumed(zygote, config(**more), ("inside the checkpoint", 2))
    assert got == uninterrupted(config(**more))


# ---------------------------------------------------------------- Ctrl-C, and a finished run

def test_interrupt_leaves_a_checkpoint_of_the_very_step(config, monkeypatch):
    whole, step = results(train(config("whole"))), toolplay.train_step

    def interrupted(trainer, *args, **kwargs):
        if trainer.step == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return step(trainer, *args, **kwargs)
    monkeypatch.setattr(toolplay, "train_step", interrupted)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(toolplay.Interrupted):
        train(config())
    assert signal.getsignal(signal.SIGINT) is before
    folder = toolplay.Path(config()["run_dir"])
    assert newest_checkpoint(folder).name == "step-00000005"
    monkeypatch.setattr(toolplay, "train_step", step)
    assert results(train(config(), resume=True)) == whole


def test_resuming_a_finished_run_changes_nothing(config):
    before = results(train(config()))
    assert results(train(config(), resume=True)) == before


# ---------------------------------------------------------------- what cannot be resumed

def test_other_data_than_the_run_began_with_are_refused(config, tmp_path):
    lines = (Path(config()["path"])).read_text().splitlines()
    path = tmp_path / "mine.jsonl"
    path.write_text("\n".join(lines))
    folder = train(config(path=str(path)))
    shutil.rmtree(folder / "adapter")
    path.write_text("\n".join(lines[1:] + lines[:1]))
    with pytest.raises(UserError, match="data have changed"):
        train(config(path=str(path)), resume=True)


def test_an_adapter_goes_on_with_its_own_rank_and_scale(config, capsys):
    start = train(config("start", lora_r=2, lora_alpha=8.0, lora_dropout=0.0))
    more = config("more", start_from=str(start), lora_r=4, lora_alpha=1.0, lora_dropout=0.5)
    folder = train(more)
    kept = json.loads((folder / "config.json").read_text())
    assert (kept["lora_r"], kept["lora_alpha"], kept["lora_dropout"]) == (2, 8.0, 0.5)
    assert json.loads((folder / "adapter" / "adapter_config.json").read_text())["lora_dropout"] == 0.5
    before = results(folder)
    assert results(train(more, resume=True)) == before  # the run's own config.json is not another config
    other = json.loads((start / "config.json").read_text())
    (start / "config.json").write_text(json.dumps({**other, "model": "smollm2-135m"}))
    train(config("third", start_from=str(start)))
    assert "was trained with model = \"smollm2-135m\"" in capsys.readouterr().err


def test_another_config_is_refused_by_name(config):
    train(config(steps=2))
    with pytest.raises(UserError, match="lr was 0.01, now 0.02"):
        Run(load_config(config(steps=2, lr=0.02)), resume=True)
    Run(load_config(config(steps=2, micro_tokens=64)), resume=True)  # if memory is too small, micro_tokens may be lowered


def damage(folder, how):
    state, weights = folder / "state.pt", folder / "trained.safetensors"
    if how == "cut state":
        state.write_bytes(state.read_bytes()[:-500])
    elif how == "empty state":
        state.write_bytes(b"")
    elif how == "no state":
        state.unlink()
    elif how == "garbage state":
        state.write_bytes(b"garbage" * 100)
    elif how == "foreign state":
        torch.save({"hello": 1}, state)
    elif how == "state is a list":
        torch.save([1, 2], state)
    elif how == "cut weights":
        weights.write_bytes(weights.read_bytes()[:-7])
    elif how == "empty weights":
        weights.write_bytes(b"")
    elif how == "no weights":
        weights.unlink()
    elif how == "empty folder":
        shutil.rmtree(folder)
        folder.mkdir()


@pytest.fixture(scope="module")
def checkpoint(corpus, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("good") / "run"
    return train({"model": "tiny", "source": "jsonl", "path": str(corpus / "train.jsonl"), "eval_examples": 0, "run_dir": str(run_dir),
                  "device": "cpu", "steps": 1, "lora_r": 2})


@pytest.mark.parametrize("how", ["cut state", "empty state", "no state", "garbage state", "foreign state", "state is a list", "cut weights",
                                 "empty weights", "no weights",
                                 "empty folder"])
def test_a_damaged_checkpoint_is_one_clear_line(checkpoint, tmp_path, how):
    folder = tmp_path / "run"
    shutil.copytree(checkpoint, folder)
    damage(newest_checkpoint(folder), how)
    config = load_config({**{k: v for k, v in json.loads((folder / "config.json").read_text()).items() if k != "provenance"},
                          "run_dir": str(folder)})
    with pytest.raises(UserError) as error:
        train(dict(vars(config)), resume=True)
    assert "step-00000001" in str(error.value) and "\n" not in str(error.value)


def test_a_checkpoint_of_another_model_is_refused(checkpoint):
    trainer = Trainer(load_config({"device": "cpu"}), {"w": torch.nn.Parameter(torch.ones(2))}, 3)
    with pytest.raises(UserError, match="another model"):
        toolplay.load_checkpoint(newest_checkpoint(checkpoint), trainer)


def test_pickles_are_not_run(checkpoint, tmp_path):
    """A checkpoint is data: code hidden in it is refused, not executed."""
    folder = tmp_path / "step-00000001"
    shutil.copytree(newest_checkpoint(checkpoint), folder)

    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "executed"),))
    torch.save({"optimizer": Evil()}, folder / "state.pt")
    with pytest.raises(UserError):
        toolplay.load_checkpoint(folder, Trainer(load_config({"device": "cpu"}), {"w": torch.nn.Parameter(torch.ones(2))}, 3))
    assert not (tmp_path / "executed").exists()


def test_large_seeds(config):
    Run(load_config(config(seed=2 ** 63 - 1)))


def test_a_log_cut_in_mid_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert toolplay.read_lines(path) == [{"step": 1}, {"step": 2}]
    assert toolplay.read_lines(tmp_path / "none") == []


# ---------------------------------------------------------------- atomic files

def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path):
    def fail(aside):
        aside.mkdir()
        (aside / "half").write_text("half")
        raise RuntimeError("[enforce fail at inline_container.cc] . PytorchStreamWriter failed writing file\nand more")
    with pytest.raises(OSError, match="x: cannot be written"):
        toolplay.write_atomic(tmp_path / "x", fail)
    assert not list(tmp_path.iterdir())


def test_a_mistake_in_a_folder_that_was_there_is_said_and_costs_nothing(tmp_path):
    (tmp_path / "real" / "wandb").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    config = toolplay.load_config({"model": "tiny", "run_dir": str(tmp_path / "link"), "examples": 4, "max_tokens": 20, "device": "cpu"})
    with pytest.raises(UserError, match="max_tokens = 20"):
        toolplay.train(SimpleNamespace(config=str(written(tmp_path, config)), overrides=[], resume=False))
    assert [p.name for p in (tmp_path / "real").iterdir()] == ["wandb"]
    (tmp_path / "real" / "notes.txt").write_text("mine")  # and so does any other file
    for _ in range(2):
        with pytest.raises(UserError, match="max_tokens = 20"):
            toolplay.train(SimpleNamespace(config=str(written(tmp_path, config)), overrides=[], resume=False))
    assert sorted(p.name for p in (tmp_path / "real").iterdir()) == ["notes.txt", "wandb"]


def written(folder, config):
    (folder / "c.json").write_text(json.dumps(dataclasses.asdict(config)))
    return folder / "c.json"


def test_a_pipe_is_written_to():
    """As in `--out >(gzip > r.gz)` and `--csv /dev/stdout | tee t`: the real path of a pipe is no file's."""
    end, pipe = os.pipe()
    toolplay.write_json(f"/dev/fd/{pipe}", {"a": 1})
    os.close(pipe)
    with open(end) as written:
        assert json.load(written) == {"a": 1}


def test_an_unfinished_run_is_used_with_a_note(config, capsys):
    folder = train(config(steps=2))
    toolplay.load_run(folder)
    assert "has not finished" not in capsys.readouterr().err
    (folder / ".lock").touch()  # as a stopped or killed run leaves it
    toolplay.load_run(folder)
    assert f"{folder}: its training has not finished" in capsys.readouterr().err


def test_write_atomic_leaves_the_old_file_when_writing_fails(tmp_path):
    path = tmp_path / "x.json"
    toolplay.write_json(path, {"a": 1})

    def fail(aside):
        aside.write_text("half")
        raise OSError("disk full")
    with pytest.raises(OSError):
        toolplay.write_atomic(path, fail)
    assert json.loads(path.read_text()) == {"a": 1}
    toolplay.write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 2} and [p.name for p in tmp_path.iterdir()] == ["x.json"]


# ---------------------------------------------------------------- who owns the folder

@pytest.mark.parametrize("held", ["checkpoint", "model", "adapter", "metrics.jsonl", "pairs.json"])
def test_a_folder_of_somebody_elses_is_left_alone(config, tmp_path, held):
    mine = tmp_path / "run" / held / "mine.txt" if "." not in held else tmp_path / "run" / held
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    for resume in (False, True):
        with pytest.raises(UserError, match=f"holds {held}, but no config.json"):
            train(config(), resume)
    assert mine.read_text() == "mine" and not (tmp_path / "run/config.json").exists()


def test_one_process_trains_in_a_folder(config, tmp_path):
    folder = train(config(steps=2))
    code = f"import fcntl, time; f = open({str(folder / '.lock')!r}, 'w'); fcntl.lockf(f, fcntl.LOCK_EX); print('held', flush=True); time.sleep(60)"
    other = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    try:
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(UserError, match="another process is training in it"):
            Run(load_config(config(steps=2)), resume=True)
    finally:
        other.kill()
        other.wait()
    Run(load_config(config(steps=2)), resume=True).finish()
    assert not (folder / ".lock").exists()


def test_what_a_killed_process_was_writing_goes(config):
    folder = train(config(steps=2))
    (folder / ".model.123").mkdir()
    (folder / ".model.123.old").mkdir()
    (folder / ".mine").write_text("mine")
    sft.train(Run(load_config(config(steps=2)), resume=True))
    assert {p.name for p in folder.iterdir() if p.name.startswith(".")} == {".mine"}


def test_other_threads_are_said_on_resume(config, capsys):
    folder = train(config(steps=2))
    made = json.loads((folder / "config.json").read_text())
    made["provenance"]["threads"] = 77
    (folder / "config.json").write_text(json.dumps(made))
    Run(load_config(config(steps=2)), resume=True)
    assert "began with other threads: what it comes to may differ in the last digits" in capsys.readouterr().err


@pytest.mark.parametrize("ratio, chosen", [(0.5, "bf16"), (0.9, "fp32")])
def test_the_fastest_precision_is_chosen_once(config, ratio, chosen, monkeypatch, capsys):
    monkeypatch.setattr(toolplay, "product_ratio", lambda: ratio)
    folder = train(config(steps=1, precision="fastest"))
    assert json.loads((folder / "config.json").read_text())["precision"] == chosen
    assert f"precision = fastest: {chosen} (a matrix product in bf16 takes {ratio} times as long" in capsys.readouterr().err
    monkeypatch.setattr(toolplay, "product_ratio", lambda: 1.4 - ratio)  # resumed on another machine
    run = Run(load_config(config(steps=1, precision="fastest")), resume=True)
    assert run.config.precision == run.written["precision"] == chosen


def test_what_a_resumed_run_may_change_is_kept_and_its_beginning_too(config):
    folder = train(config(steps=2))
    made = json.loads((folder / "config.json").read_text())
    made["provenance"].update(threads=77, git_commit="begun")
    (folder / "config.json").write_text(json.dumps(made))
    sft.train(Run(load_config(config(steps=2, micro_tokens=64, constrained=True, save_every=7, wandb_project="mine")), resume=True))
    now = json.loads((folder / "config.json").read_text())
    assert (now["micro_tokens"], now["constrained"], now["save_every"], now["wandb_project"]) == (64, True, 7, "mine") and now["provenance"] == made["provenance"]


def test_a_second_ctrl_c_stops_at_once(config, tmp_path):
    run = Run(load_config(config()))
    trainer = Trainer(run.config, {"w": torch.nn.Parameter(torch.ones(2))}, 7)
    with pytest.raises(KeyboardInterrupt):
        for _ in run.steps(trainer, 7):
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            pytest.fail("it went on")
    run.finish()
