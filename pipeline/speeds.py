"""How fast machines compute and read: published figures of GPUs, what our stages reach of them, and this CPU's speed.

Times of a plan are work (pipeline/estimate.py) divided by a speed of this module. Nothing here is fitted to a limit;
each figure names its source.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from pipeline.hardware import Hardware

# Of the CPU's float32 matrix product, what training, a forward pass in float32, and llama.cpp's prompt processing and
# parallel decoding reach. Fitted to the default run (LOG.md, 2026-11-22).
CPU_TRAINING, CPU_FORWARD, CPU_PROMPT, CPU_DECODE = 0.52, 0.8, 0.45, 0.18
# One core of LOG.md's 2-core machine: its float32 matrix product in GFLOP/s. What is known of that machine only (the
# quantizers, compiling) is converted to others by this figure.
MEASURED_CORE_GFLOPS = 80.0
# What a second hardware thread adds to a core that compiles (SPECrate's and LLVM builds' usual 20 to 30 %).
SECOND_THREAD = 1.25
# A single conversation under llama.cpp on a CPU reads all weights for each token, at about this rate, and needs as long
# again for each layer's start and end.
CPU_BYTES_PER_SECOND, CPU_SECONDS_PER_LAYER = 12e9, 0.27e-3
DOWNLOAD_BYTES_PER_SECOND = 50e6
# A file in the system's page cache or on a local SSD; and one on a hosted machine's network disk, where memory is too
# small to keep it (Google's persistent disks of 100 to 200 GB: https://cloud.google.com/compute/docs/disks/performance).
CACHED_BYTES_PER_SECOND, HOSTED_DISK_BYTES_PER_SECOND = 1e9, 0.2e9


@dataclass(frozen=True)
class GpuModel:
    """NVIDIA's data sheets: dense tensor-core TFLOP/s in 16 bit (the P100 has no tensor cores), memory in GB/s."""

    teraflops: float
    gigabytes: float


GPU_MODELS = {
    "T4": GpuModel(65, 320),
    "P100": GpuModel(18.7, 732),
    "V100": GpuModel(112, 900),
    "A10G": GpuModel(70, 600),
    "A10": GpuModel(125, 600),
    "L4": GpuModel(121, 300),
    "L40": GpuModel(181, 864),
    "A100": GpuModel(312, 1555),
    "H100": GpuModel(989, 2000),
    "H200": GpuModel(989, 4800),
    "RTX 3060": GpuModel(51, 360),
    "RTX 3090": GpuModel(71, 936),
    "RTX 4060": GpuModel(60, 272),
    "RTX 4090": GpuModel(165, 1008),
    "RTX 5090": GpuModel(210, 1792),
}

# Training on a GPU: a share of its TFLOP/s for the products, and for every layer of every forward pass (with its
# recomputation and backward pass) the time in which the CPU starts some hundred kernels. Two figures published for a T4
# give the two constants: this very recipe on R1-Distill-Llama-8B, 60 steps of 2 x 4 records in 1,181 s
# (https://github.com/develops20/DeepSeek-R1-Distill-Llama-8B-Medical-COT, the notebook's train_runtime), whose products
# are most of the work; and the TinyLlama flashcards, 1,500 forward passes of 4 short cards in 17.6 minutes, which
# mostly wait for kernels to start.
GPU_TRAINING, GPU_LAYER_SECONDS = 0.28, 0.02
# llama.cpp on a GPU. One conversation: the share of the memory's rate at which weights are read, 60 % on a P40, the
# slowest of the published ones (llama 7B Q4_K_S, 54 tokens/s: https://github.com/ggml-org/llama.cpp/pull/4766); 78 %
# on a 3070 (8B Q4_K_M, 71 tokens/s: https://github.com/XiongjieDai/GPU-Benchmarks-on-LLM-Inference).
GPU_READING = 0.6
# Prompts: the P40's 934 tokens/s (Q4_0, the same page) are 27 % of its integer dot products' rate; a T4 reaches as much
# of its own without its tensor cores, 0.13 of their 65 TFLOP/s. The 3070's 2,402 tokens/s are 0.48 of its own.
GPU_PROMPT = 0.13
# Several conversations at once: the weights are read once and the products come on top, and llama.cpp takes longer than
# the sum of both (A100, 7B F16: 5 conversations 424 tokens/s, 16 of them 933, where the sum would be 1.4 and 1.6 times
# as fast: https://github.com/ggml-org/llama.cpp/pull/3776).
GPU_TOGETHER = 1.6
# Each step of parallel decoding in our own process: the batch's rows, and the likeliest of 16 x 128,256 logits, in
# Python and NumPy on a slow core.
STEP_SECONDS = 5e-3
# transformers: what a token takes besides the weights is a third of a training pass, the forward one. Several rows of a
# 4-bit matrix are multiplied in 16 bit, into which it is unpacked each time: 0.5 bytes read, 2 written and 2 read a
# weight (https://github.com/bitsandbytes-foundation/bitsandbytes/releases/tag/0.40.0: the kernels for one row are
# about 8 times as fast).
TRANSFORMERS_LAYER_SECONDS = GPU_LAYER_SECONDS / 3
UNPACKED_4BIT_BYTES = 4.5


def gpu_model(hardware: Hardware) -> GpuModel | None:
    """Published figures of the (first) GPU; None for one that is not in the table, or without a GPU."""
    name = hardware.gpu_names[0] if hardware.gpu_names else ""
    known = [model for model in GPU_MODELS if model in name]
    return GPU_MODELS[max(known, key=len)] if known else None


def measure_cpu_gflops(seconds: float = 0.4) -> float:
    """GFLOP/s of NumPy's float32 matrix product on all cores: how fast this CPU is today."""
    import numpy as np

    a = np.ones((1024, 1024), dtype=np.float32)
    a @ a  # starts the threads
    started, products = time.perf_counter(), 0
    while (elapsed := time.perf_counter() - started) < seconds:
        a @ a
        products += 1
    return products * 2 * 1024**3 / elapsed / 1e9
