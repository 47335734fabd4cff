"""How dpo.json and ppo.json were made: the peers' own functions on random numbers, in float64. Tests need neither peer.

    pip install trl==1.16.0 numpy==2.4.6
    pip download --no-deps verl==0.9.1
    python tests/golden/make.py verl-0.9.1-py3-none-any.whl

TRL computes its losses inside DPOTrainer and CPOTrainer, so these are given stub objects. verl's core_algos imports ray's and
hydra's world, which its formulas do not need: those modules are replaced by mocks.
"""
import importlib.util
import json
import sys
import zipfile
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch

HERE = Path(__file__).parent


def dpo():
    from trl.experimental.cpo.cpo_trainer import CPOTrainer
    from trl.trainer.dpo_trainer import DPOTrainer
    torch.manual_seed(0)
    accelerator = SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x)
    cases = []
    for n in range(6):
        B, T = 1 + n, 9
        mask = (torch.rand(2 * B, T + 1) < 0.6).long()
        mask[:, 0], mask[:, -1] = 0, 1
        logp = -2 * torch.rand(2 * B, T, dtype=torch.float64) * mask[:, 1:]
        ref = -2 * torch.rand(2 * B, T, dtype=torch.float64) * mask[:, 1:]
        chosen, rejected = (logp * mask[:, 1:]).sum(1).chunk(2)
        ref_chosen, ref_rejected = (ref * mask[:, 1:]).sum(1).chunk(2)
        outputs = SimpleNamespace(log_probs=logp, entropy=logp * 0, mean_logits=logp * 0, is_top1=logp < 0)
        losses = {}
        for variant, smoothing, beta in (("sigmoid", 0.0, 0.1), ("sigmoid", 0.0, 0.7), ("hinge", 0.0, 0.1), ("ipo", 0.0, 0.1), ("ipo", 0.0, 0.5),
                                         ("robust", 0.0, 0.1), ("robust", 0.2, 0.3)):
            trainer = SimpleNamespace(model=SimpleNamespace(training=False), accelerator=accelerator, aux_loss_enabled=False, ld_alpha=None,
                                      precompute_ref_logps=True, f_divergence_type="reverse_kl", loss_types=[variant], loss_weights=[1.0], beta=beta,
                                      label_smoothing=smoothing, use_weighting=False, _metrics=defaultdict(lambda: defaultdict(list)), _total_train_tokens=0)
            inputs = {"input_ids": mask, "attention_mask": mask, "completion_mask": mask, "ref_chosen_logps": ref_chosen, "ref_rejected_logps": ref_rejected}
            losses[f"{variant} {smoothing} {beta}"] = float(DPOTrainer._compute_loss(trainer, lambda **_: outputs, inputs, False))
        for smoothing, beta in ((0.1, 0.1), (0.3, 0.7)):  # conservative DPO: only CPOTrainer smooths, of log-probs; here of log-ratios, of which the loss is the same function
            trainer = SimpleNamespace(accelerator=accelerator, beta=beta, loss_type="sigmoid", label_smoothing=smoothing, alpha=0.0)
            losses[f"sigmoid {smoothing} {beta}"] = float(CPOTrainer.cpo_loss(trainer, chosen - ref_chosen, rejected - ref_rejected)[0].mean())
        mean = (logp * mask[:, 1:]).sum(1) / mask[:, 1:].sum(1)
        for beta, gamma in ((2.0, 0.5), (2.5, 1.4)):
            trainer = SimpleNamespace(accelerator=accelerator, beta=beta, loss_type="simpo", simpo_gamma=gamma, label_smoothing=0.0, alpha=0.0)
            losses[f"simpo {gamma} {beta}"] = float(CPOTrainer.cpo_loss(trainer, *mean.chunk(2))[0].mean())
        cases.append({"mask": mask[:, 1:].tolist(), "logp": logp.tolist(), "ref_logp": ref.tolist(), "losses": losses})
    return cases


def verl_functions(wheel):
    for name in ("omegaconf", "tensordict", "verl", "verl.trainer", "verl.trainer.config", "verl.utils", "verl.utils.import_utils", "verl.utils.device",
                 "verl.workers", "verl.workers.config"):
        sys.modules[name] = mock.MagicMock()
    sys.modules["verl.trainer.config"].AlgoConfig = type("AlgoConfig", (), {})
    loaded = []
    for path in ("verl/utils/torch_functional.py", "verl/trainer/ppo/core_algos.py"):
        name = path[:-3].replace("/", ".")
        source = Path("/tmp") / name
        source.write_bytes(zipfile.ZipFile(wheel).read(path))
        spec = importlib.util.spec_from_loader(name, importlib.machinery.SourceFileLoader(name, str(source)))
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        sys.modules["verl"].utils.torch_functional = sys.modules["verl.utils.torch_functional"]
        spec.loader.exec_module(module)
        loaded.append(module)
    return loaded


def ppo(wheel):
    functional, core = verl_functions(wheel)
    torch.manual_seed(0)
    cases = []
    for n in range(6):
        B, T = 2 + 2 * (n // 2), 12
        mask = (torch.rand(B, T) < 0.7).double()
        mask[:, n % T] = 1  # no row without a model token
        draw = lambda: torch.randn(B, T, dtype=torch.float64)  # noqa: E731
        rewards, values, old_logp = draw() * mask, draw(), -draw().abs()
        logp, new_values, ref_logp = old_logp + 0.3 * draw(), values + 0.3 * draw(), old_logp + 0.3 * draw()
        gamma, lam = (1.0, 0.95) if n % 2 == 0 else (0.9, 0.6)
        advantages, returns = core.compute_gae_advantage_return(rewards, values, mask, gamma, lam)
        config = mock.MagicMock(clip_ratio=0.2, clip_ratio_low=None, clip_ratio_high=None, global_batch_info={})
        config.get = lambda key, default: 1.5  # low, so that the dual clip is felt
        policy, policy_info = core.compute_policy_loss_vanilla(old_logp, logp, advantages, mask, "token-mean", config)
        config.get = lambda key, default: 1e9  # no dual clip
        plain, _ = core.compute_policy_loss_vanilla(old_logp, logp, advantages, mask, "token-mean", config)
        value, value_clipped = core.compute_value_loss(new_values, returns, values, mask, 0.2)
        group = np.arange(B) // 2
        index = {"rloo": core.compute_rloo_outcome_advantage, "grpo": core.compute_grpo_outcome_advantage}
        baselines = {name: f(rewards.clone(), mask, group)[0] for name, f in index.items()}
        made = {"whitened": functional.masked_whiten(rewards, mask), "scaled": functional.masked_whiten(rewards, mask, shift_mean=False),
                "advantages": advantages * mask, "returns": returns * mask, "policy_loss": plain, "dual_clip_policy_loss": policy,
                "clip_fraction": torch.tensor(policy_info["actor/pg_clipfrac"]), "value_loss": value, "value_clip_fraction": value_clipped,
                "k1": core.kl_penalty(logp, ref_logp, "k1"), "k3": core.kl_penalty(logp, ref_logp, "k3"), **baselines}
        given = {"mask": mask, "rewards": rewards, "values": values, "old_logp": old_logp, "logp": logp, "new_values": new_values, "ref_logp": ref_logp}
        cases.append({"gamma": gamma, "lam": lam, "given": {k: v.tolist() for k, v in given.items()}, "made": {k: v.tolist() for k, v in made.items()}})
    return cases


if __name__ == "__main__":
    for name, cases in (("dpo", dpo()), ("ppo", ppo(sys.argv[1]))):
        (HERE / f"{name}.json").write_text(json.dumps(cases) + "\n")
