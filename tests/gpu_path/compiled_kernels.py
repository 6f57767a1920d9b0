"""Compile Unsloth's kernels for a T4 (sm_75), at the widths of Llama-3.1-8B, and print what came out as JSON.

No GPU is needed: Triton brings its own ptxas. Each kernel's entry is the bytes of its machine code and the shared
memory of a block, of which a T4 has 65,536 bytes.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)
os.environ["UNSLOTH_ALLOW_CPU"] = "1"
os.environ["UNSLOTH_DISABLE_STATISTICS"] = "1"

import torch  # noqa: F401  (Unsloth wants it first)
import unsloth  # noqa: F401
from triton import compile as compile_kernel
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from unsloth.kernels import cross_entropy_loss, rms_layernorm, rope_embedding, swiglu

HALF, SINGLE, LONGS, COUNT = "*fp16", "*fp32", "*i64", "i32"


@dataclass(frozen=True)
class Kernel:
    """A kernel, the values of its constants, and the types of its other arguments where they are not ``rest``."""

    function: Any
    constants: dict[str, Any]
    types: dict[str, str] = field(default_factory=dict)
    rest: str = COUNT
    warps: int = 4


KERNELS = {
    "swiglu": Kernel(swiglu._fg_kernel, {"BLOCK_SIZE": 1024, "LONG_INDEXING": 0}, {"e": HALF, "g": HALF, "h": HALF}),
    "swiglu backward": Kernel(
        swiglu._DWf_DW_dfg_kernel,
        {"BLOCK_SIZE": 1024, "LONG_INDEXING": 0},
        {"DW": HALF, "e": HALF, "g": HALF},
    ),
    "rms norm": Kernel(
        rms_layernorm._rms_layernorm_forward,
        {"BLOCK_SIZE": 4096, "LONG_INDEXING": False},
        {"Y": HALF, "X": HALF, "W": HALF, "r": SINGLE, "eps": "fp32"},
        warps=8,
    ),
    "rms norm backward": Kernel(
        rms_layernorm._rms_layernorm_backward,
        {"GEMMA": False, "LONG_INDEXING": False, "BLOCK_SIZE": 4096, "TRAIN_W": False, "FROM_Y": False},
        {"dY": HALF, "dX": HALF, "X": HALF, "W": HALF, "r": SINGLE, "dW": HALF, "eps": "fp32"},
        warps=8,
    ),
    "rotary embedding": Kernel(
        rope_embedding._rope_embedding_QK,
        {
            **{f"{each}_seq_stride": 4096 for each in ("q", "qo")},
            **{f"{each}_seq_stride": 1024 for each in ("k", "ko")},
            **{f"{each}_dim_stride": 1 for each in ("q", "qo", "k", "ko")},
            **{"n_heads_Q": 32, "n_heads_K": 8, "n_groups_Q": 8, "half_head_dim": 64, "BLOCK_SIZE": 64},
            **{"HEADS_Q": 4, "HEADS_K": 4, "BACKWARD_PASS": False, "HAS_ROPE_INDICES": False},
            **{"LONG_INDEXING": False, "CAST_TO_SIN": True, "EVICT_INDICES": False},
        },
        {**dict.fromkeys(("Q", "Q_out", "K", "K_out", "cos", "sin"), HALF), "rope_embedding_indices": "*i32"},
    ),
    "cross entropy": Kernel(
        cross_entropy_loss._chunked_cross_entropy_forward,
        {
            "VOCAB_SIZE": 128256,
            "N_CHUNKS": 2,
            "BLOCK_SIZE": 65536,
            "DO_SOFTCAPPING": False,
            "SOFTCAP": 0.0,
            "DO_LOGIT_SCALING": False,
            "LOGIT_SCALE": 0.0,
            "EVICT": "",
        },
        {"logits_ptr": HALF, "logits_row_stride": "i64", "labels_ptr": LONGS},
        rest=SINGLE,
        warps=32,
    ),
}


def compiled(kernel: Kernel) -> dict[str, int]:
    function = kernel.function
    while not (hasattr(function, "arg_names") and hasattr(function, "__name__")):
        function = function.fn  # heuristics and autotuning are wrapped around it
    names = function.arg_names
    signature = {
        name: "constexpr" if name in kernel.constants else kernel.types.get(name, kernel.rest) for name in names
    }
    constants = {(names.index(name),): value for name, value in kernel.constants.items()}
    made = compile_kernel(
        ASTSource(function, signature, constants), target=GPUTarget("cuda", 75, 32), options={"num_warps": kernel.warps}
    )
    return {"machine code": len(made.asm["cubin"]), "shared memory": made.metadata.shared}


if __name__ == "__main__":
    print(json.dumps({name: compiled(kernel) for name, kernel in KERNELS.items()}))
