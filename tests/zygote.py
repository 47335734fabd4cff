"""A process that imports everything once and forks itself for each scenario (see small.Zygote).

It reads one JSON line per scenario and answers with one JSON line. A child may end itself with SIGKILL at any point, which
the tests of resuming need. A child may also hang; its time limit then ends it.
"""
import json
import os
import signal
import socket
import sys
import tempfile
import time
import traceback
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # a forked process would inherit a pool of threads that do not exist in it
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch  # noqa: E402
import transformers  # noqa: E402, F401

import dpo  # noqa: E402, F401
import eval  # noqa: E402, F401
import lora  # noqa: E402
import ppo  # noqa: E402, F401
import sft  # noqa: E402
import toolplay  # noqa: E402


def kill_at(place, nth):
    """kill -9 this process the nth time it reaches a place."""
    if not place:
        return
    count, me = [0], os.getpid()

    def now():
        count[0] += 1
        if count[0] == nth:
            os.kill(me, signal.SIGKILL)

    def before(owner, name, half=None):
        original = getattr(owner, name)

        def wrapped(*args, **kwargs):
            if half:
                half(*args, **kwargs)
            now()
            return original(*args, **kwargs)
        setattr(owner, name, wrapped)

    def half_line(run, step, metrics, tokens=0):
        if count[0] + 1 == nth:
            with open(run.folder / "metrics.jsonl", "a") as file:
                file.write(json.dumps({"step": step, **metrics})[:25])

    if place == "step":
        before(toolplay, "train_step")
    elif place == "rollout":  # at a token inside a rollout
        before(toolplay, "sample")
    elif place == "accumulation":  # between the micro-batches of a step
        before(torch.Tensor, "backward")
    elif place == "log":
        before(toolplay.Run, "log", half_line)
    elif place == "checkpoint":
        before(toolplay.Run, "checkpoint")
    elif place == "inside the checkpoint":  # the weights are written, the state is not
        before(torch, "save")
    elif place == "fsync":
        before(os, "fsync")
    elif place == "rename":
        before(os, "replace")
        before(os, "rename")  # a folder replaces another folder
    elif place == "removing the old checkpoint":
        before(toolplay.shutil, "rmtree", lambda folder, *args, **kwargs: next(Path(folder).glob("*")).unlink())
    elif place == "saving the model":
        before(lora, "save_adapter")
    elif place == "start":
        before(toolplay.Run, "start")
    elif place == "end":
        before(toolplay.Run, "finish")
    else:
        raise ValueError(place)


def train(config, place="", nth=1, resume=False, rank_cwds=None, slow_rank=None, pid=None):
    """A whole training run. It is killed on the way if a place is given."""
    rank = int(os.environ.get("RANK", 0))
    if rank_cwds:  # the run folder is relative, so its location shows which rank wrote to it
        os.chdir(rank_cwds[rank])
    if rank == slow_rank:
        pick = toolplay.pick_device
        toolplay.pick_device = lambda name: time.sleep(1) or pick(name)
    kill_at(place, nth)
    if pid:  # in a container, the process that resumes often has the pid of the killed process
        os.getpid = lambda: pid
    run = toolplay.Run(toolplay.load_config(config), resume=resume)
    sys.modules[run.config.method].train(run)


def steps(batches, micro_tokens, out):
    """train_step on given batches of rows; rank 0 saves the gradients, the returned values and the weights."""
    toolplay.start_distributed()
    trainer, loss, taken = small_trainer(micro_tokens)
    infos = [toolplay.train_step(trainer, batch, loss, size=lambda row: sum(row[1])) for batch in batches]
    if toolplay.world_rank()[0] == 0:
        torch.save({"gradients": taken, "infos": infos, "weights": {n: p.detach() for n, p in trainer.parameters.items()}}, out)


def small_trainer(micro_tokens, double=True, **config):
    """tiny in double precision, where the order of additions does not matter -> (trainer, loss, list that gets each step's gradient)."""
    model, _ = toolplay.load_model("tiny")
    model = model.double() if double else model
    settings = {"lr": 1e-3, "micro_tokens": micro_tokens, "max_grad_norm": 1e9, "warmup": 0.0, "device": "cpu", **config}
    trainer = toolplay.Trainer(toolplay.load_config(settings), dict(model.named_parameters()), 10)
    taken = []
    trainer.optimizer.register_step_pre_hook(lambda *_: taken.append({n: p.grad.clone() for n, p in trainer.parameters.items()}))

    def loss(rows):
        return sft.sft_loss(toolplay.token_logprobs(model, rows), sft.pad_mask(rows))
    trainer.model = model
    return trainer, loss, taken


def child(order, rank, port, log):
    handle = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(handle, 2)
    os.dup2(handle, 1)
    torch.set_num_threads(1)
    if order["ranks"] > 1:
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(order["ranks"]), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1",
                          MASTER_PORT=str(port))
    code = 1
    try:
        {"train": train, "steps": steps}[order["scenario"]](**order["args"])
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def warm_up():
    """Import what torch and transformers import only at first use; no backward pass, so that forking stays possible."""
    import tqdm  # noqa: F401
    model, _ = toolplay.load_model("tiny")
    with torch.no_grad():
        toolplay.takes_trie(model)
    weight = torch.nn.Parameter(torch.ones(1))
    weight.grad = torch.ones(1)
    torch.optim.AdamW([weight]).step()


def main():
    torch.set_num_threads(1)
    warm_up()
    for line in sys.stdin:
        order = json.loads(line)
        with tempfile.NamedTemporaryFile("r", suffix=".log", errors="replace") as log:
            port, children = free_port(), []
            for rank in range(order["ranks"]):
                pid = os.fork()
                if pid == 0:
                    child(order, rank, port, log.name)
                children.append(pid)
            codes, deadline = {}, time.monotonic() + order["timeout"]
            while len(codes) < len(children):
                for pid in set(children) - set(codes):
                    ended, status = os.waitpid(pid, os.WNOHANG)
                    if ended:
                        codes[pid] = os.waitstatus_to_exitcode(status)
                    elif time.monotonic() > deadline:
                        os.kill(pid, signal.SIGKILL)
                        os.waitpid(pid, 0)
                        codes[pid] = None
                time.sleep(0.01)
            print(json.dumps({"codes": [codes[pid] for pid in children], "stderr": log.read()}), flush=True)


if __name__ == "__main__":
    main()
