"""Tiny random models, adapters and tokenizers for the tests of every stage."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

SHARED = Path("../shared")
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] }}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
ARCHITECTURES = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
}
LORA_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TEXT = [
    "The patient was given 250 mg of metformin; it's well tolerated.\n\nShe'll return in 12 weeks.",
    "def f(x):\n    return x * 2.5  # naïve",
    "Боль в груди 胸痛 😀",
]


def save_tokenizer(folder: Path, split: str | None = None, *, adds_bos: bool = False, composes: bool = False) -> int:
    """A byte-level BPE tokenizer; returns its size.

    It cuts text in SmolLM2's manner, or by the regular expression ``split`` as Llama 3, Qwen2 and Mistral Nemo do;
    ``composes`` is Qwen2's NFC.
    """
    tokenizer = Tokenizer(models.BPE())
    if composes:
        tokenizer.normalizer = normalizers.NFC()
    if split is None:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(split), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    tokenizer.decoder = decoders.ByteLevel()
    controls = [AddedToken(text, special=True) for text in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=controls, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(TEXT * 4, trainer)
    tokenizer.add_tokens([AddedToken("<think>", normalized=False)])
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<|im_start|> $A", special_tokens=[("<|im_start|>", tokenizer.token_to_id("<|im_start|>"))]
        )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        unk_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        chat_template=CHATML,
    )
    fast.save_pretrained(folder)
    return len(fast)


def save_model(
    folder: Path,
    *,
    architecture: str = "llama",
    hidden: int = 64,
    feed_forward: int = 160,
    layers: int = 3,
    heads: int = 4,
    kv_heads: int = 2,
    tied: bool = True,
    dtype: torch.dtype = torch.float16,
    vocabulary: int | None = None,
    max_shard_size: str = "5GB",
    seed: int = 0,
    **config: object,
) -> Path:
    """A model with random weights; with the tokenizer above unless ``vocabulary`` is given."""
    folder.mkdir(parents=True, exist_ok=True)
    size = vocabulary or save_tokenizer(folder) + 5
    torch.manual_seed(seed)
    config_class, model_class = ARCHITECTURES[architecture]
    settings = config_class(
        vocab_size=size,
        hidden_size=hidden,
        intermediate_size=feed_forward,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=1024,
        tie_word_embeddings=tied,
        initializer_range=0.15,
        **config,
    )
    model = model_class(settings)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            if name.endswith(".bias"):
                parameter.uniform_(-0.5, 0.5)
    model.to(dtype).save_pretrained(folder, max_shard_size=max_shard_size)
    return folder


def save_vocabulary_gguf(folder: Path, size: int, path: Path) -> Any:
    """A GGUF without tensors from the tokenizer in ``folder``, loaded."""
    import llama_cpp

    from export.tokenizer_metadata import read_vocabulary

    writer = gguf.GGUFWriter(path, "llama")
    # llama.cpp reads these even of a file that is only a vocabulary.
    writer.add_context_length(512)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(64)
    writer.add_block_count(1)
    writer.add_head_count(4)
    writer.add_layer_norm_rms_eps(1e-5)
    read_vocabulary(folder, size).add_metadata(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    return llama_cpp.Llama(str(path), vocab_only=True, n_threads=1, verbose=False)


def save_gguf(folder: Path, template: str = CHATML) -> Path:
    """A model as above in 16 bit, exported with this chat template."""
    from export.export import export_models

    base = save_model(folder / "base", layers=2)
    (base / "chat_template.jinja").write_text(template, encoding="utf-8")
    return folder / "gguf" / export_models(base, None, folder / "gguf", "tiny", ["F16"]).ship


def save_adapter(folder: Path, base: Path, *, tokens: int | None = None, seed: int = 1, **settings: object) -> Path:
    """A LoRA adapter with random changes of all that it trains, so that it changes the model visibly.

    With ``tokens`` the embeddings are resized before, as for a tokenizer with added tokens.
    """
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    torch.manual_seed(seed)
    if tokens is not None:
        model.resize_token_embeddings(tokens)
    config = LoraConfig(
        **{"r": 4, "lora_alpha": 8, "target_modules": LORA_TARGETS, "task_type": "CAUSAL_LM", **settings}
    )
    adapted = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
            elif parameter.requires_grad and "lora_A" not in name:
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
    adapted.save_pretrained(folder)
    return folder


def read_tensors(path: Path) -> dict[str, gguf.ReaderTensor]:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


def read_metadata(path: Path) -> dict[str, object]:
    return {key: field.contents() for key, field in gguf.GGUFReader(path).fields.items() if not key.startswith("GGUF.")}


def tensor_bytes(tensor: gguf.ReaderTensor) -> np.ndarray:
    return np.ascontiguousarray(tensor.data).view(np.uint8).reshape(-1)


_QUANTIZE = """
import ctypes, json, sys, llama_cpp
from pathlib import Path
source, jobs, importance = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3]
if importance:
    import numpy as np
    from export.importance_file import read_importance
    matrix = read_importance(Path(importance))
    values = {name: np.ascontiguousarray(matrix.of(name)) for name in matrix.matrices}
    entries = (llama_cpp.llama_model_imatrix_data * (len(values) + 1))()
    for entry, (name, array) in zip(entries, values.items()):
        entry.name, entry.size = name.encode(), array.size
        entry.data = array.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
for target, number in jobs:
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype, parameters.nthread = number, 1
    if importance:
        parameters.imatrix = ctypes.cast(entries, ctypes.POINTER(llama_cpp.llama_model_imatrix_data))
    status = llama_cpp.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(parameters))
    if status:
        sys.exit(f"llama_model_quantize failed for {target}")
"""


def quantize_with_libllama(source: Path, jobs: list[tuple[str, int]], importance: Path | None = None) -> None:
    """libllama's own quantizer from an F32 GGUF to (path, file type number), in a child process."""
    import json

    command = [sys.executable, "-c", _QUANTIZE, str(source), json.dumps(jobs), str(importance or "")]
    subprocess.run(command, check=True, capture_output=True)


_LOGITS = """
import ctypes, json, sys
import llama_cpp as l
import numpy as np
gguf, ids, adapters, out = json.loads(sys.argv[1])
l.llama_backend_init()
model = l.llama_model_load_from_file(gguf.encode(), l.llama_model_default_params())
settings = l.llama_context_default_params()
settings.n_ctx = settings.n_batch = settings.n_ubatch = max(256, len(ids))
settings.n_threads = settings.n_threads_batch = 1
settings.type_k = settings.type_v = 0  # F32: the cache must not round
settings.flash_attn_type = l.LLAMA_FLASH_ATTN_TYPE_DISABLED
context = l.llama_init_from_model(model, settings)
assert model and context
loaded = [l.llama_adapter_lora_init(model, path.encode()) for path in adapters]
assert all(loaded), "the adapter was not loaded"
if loaded:
    pointers = (l.llama_adapter_lora_p_ctypes * len(loaded))(*loaded)
    scales = (ctypes.c_float * len(loaded))(*[1.0] * len(loaded))
    assert l.llama_set_adapters_lora(context, pointers, len(loaded), scales) == 0
batch = l.llama_batch_init(len(ids), 0, 1)
batch.n_tokens = len(ids)
for i, token in enumerate(ids):
    batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = token, i, 1, 0, 1
assert l.llama_decode(context, batch) == 0
size = l.llama_vocab_n_tokens(l.llama_model_get_vocab(model))
np.save(out, np.ctypeslib.as_array(l.llama_get_logits(context), (len(ids), size)))
"""


def llama_cpp_logits(path: Path, ids: list[int], adapters: tuple[Path, ...] = ()) -> np.ndarray:
    """Logits [positions, vocabulary] from llama.cpp in 32 bit, the file adapted or not, in a child process."""
    import json
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "logits.npy"
        job = json.dumps([str(path), ids, [str(adapter) for adapter in adapters], str(out)])
        done = subprocess.run([sys.executable, "-c", _LOGITS, job], check=False, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        return np.load(out)
