"""
gpu_check.py - does the GPU compute the same as the CPU, and how fast is a training step on it?

    python benchmarks/gpu_check.py                       SmolLM2-135M
    python benchmarks/gpu_check.py --model tiny --steps 3

Prints for eight conversations the largest difference of the log-probs and the relative difference of the gradients
between CPU (fp32) and GPU (fp32, fp16, bf16). Then prints examples per second, loss scale and peak memory of real
training steps in each precision. The first loss scale is far too large on purpose: steps that overflow must be skipped
and counted, and the other steps must train.
"""
import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

import data
import lora
import sft
import toolplay


def gradients(model, rows):
    """Log-probs [B, T] and the adapters' gradients of the summed loss: computed on the model's device, returned in fp32
    on the CPU."""
    model.zero_grad(set_to_none=True)
    device = model.get_input_embeddings().weight.device
    logp = toolplay.token_logprobs(model, rows)
    sft.sft_loss(logp, sft.pad_mask(rows, device))[0].backward()
    return logp.detach().float().cpu(), torch.cat([p.grad.reshape(-1).float().cpu()
                                                   for p in lora.lora_parameters(model)])


def main():
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--steps", type=int, default=16)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("gpu_check: this machine has no usable GPU")
    print(torch.cuda.get_device_name(), "torch", torch.__version__)
    config = toolplay.load_config({"model": options.model, "examples": 8 * (options.steps + 1), "eval_examples": 0,
                                   "batch_size": 8, "max_tokens": 4096, "micro_tokens": 16384})
    model, tokenizer = toolplay.load_model(options.model)
    rows, _ = data.dataset(config, tokenizer)
    lora.add_lora(model, config.lora_targets, config.lora_r, config.lora_alpha, seed=0)
    with torch.no_grad():  # lora_B starts at zero, so lora_A's gradient would be zero
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(0, 0.02, generator=torch.Generator().manual_seed(0))
    logp, gradient = gradients(model, rows[:8])
    model.to("cuda")
    for name, dtype in (("fp32", None), ("fp16", torch.float16), ("bf16", torch.bfloat16)):
        with torch.autocast("cuda", dtype, enabled=dtype is not None):
            logp_gpu, gradient_gpu = gradients(model, rows[:8])
        print(f"{name}: log-probs differ by at most {float((logp - logp_gpu).abs().max()):.1e}, gradients by "
              f"{float((gradient - gradient_gpu).norm() / gradient.norm()):.1e} (relative)")
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    start = {n: p.detach().clone() for n, p in parameters.items()}

    def loss(group):
        return sft.sft_loss(toolplay.token_logprobs(model, group), sft.pad_mask(group, "cuda"))
    for precision in ("fp32", "fp16", "bf16"):
        with torch.no_grad():
            for n, p in parameters.items():
                p.copy_(start[n])
        config.precision = precision
        trainer = toolplay.Trainer(config, parameters, options.steps)
        if precision == "fp16":
            trainer.scaler = torch.amp.GradScaler("cuda", init_scale=2.0 ** 30)
        torch.cuda.reset_peak_memory_stats()
        losses, times = [], []
        for step in range(options.steps):
            torch.cuda.synchronize()
            begin = time.perf_counter()
            info = toolplay.train_step(trainer, rows[8 * step:8 * step + 8], loss, size=lambda row: sum(row[1]))
            torch.cuda.synchronize()
            times.append(time.perf_counter() - begin)
            losses.append(info["loss"])
        print(f"{precision}: loss {losses[0]:.3f} -> {losses[-1]:.3f}, {8 / sorted(times)[len(times) // 2]:.1f} "
              f"examples/s, {info['skipped']} of {options.steps} steps skipped, "
              f"loss scale {trainer.scaler.get_scale():.0f}, "
              f"peak memory {torch.cuda.max_memory_allocated() / 1e9:.1f} GB")


if __name__ == "__main__":
    main()
