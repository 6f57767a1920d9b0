"""One protocol for what can be measured; behind it llama.cpp (a GGUF) and transformers (folders).

    with open_engine(Path("runs/smollm2-cpu/gguf/smollm2-cpu-Q4_K_M.gguf"), Settings()) as engine:
        ids = engine.chat_format.question_ids("What is the capital of France?")
        print(engine.text(engine.generate(ids, 64)))

Each engine also times what a person waits for (``*_seconds``, ``answer_times``), since what must not be cached or
computed for it differs between the two.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from export.verify_logits import log_softmax
from pipeline.adapter_recipe import check_template, read_recipe
from pipeline.config import KvType
from pipeline.errors import MedcotError
from pipeline.hardware import usable_cores
from pipeline.prompts import ChatFormat
from pipeline.sampling import DEFAULT_TEMPERATURE, DEFAULT_TOP_P
from pipeline.tokenizer_files import has_tokenizer
from pipeline.vocabulary import TransformersVocabulary

ADAPTER_CONFIG = "adapter_config.json"
_BATCH = {"cuda": 16, "cpu": 4}  # prompts that transformers answers together
EngineName = Literal["llama.cpp", "transformers"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class Settings:
    """How a model is opened; ``threads`` None takes one per physical core that this process may use."""

    context_tokens: int = 4096
    threads: int | None = None
    system: str | None = None
    dtype: Dtype = "auto"
    load_in_4bit: bool = False
    revision: str | None = None
    flash_attention: bool = False
    kv_type: KvType = "f16"
    gpu_layers: int = 0

    @property
    def thread_count(self) -> int:
        return self.threads or usable_cores()


def all_layers_where_possible() -> int:
    """``gpu_layers`` for a GGUF that has a GPU to itself: -1 (all) where llama.cpp can put any there, else 0."""
    from export.gguf_model import supports_gpu

    return -1 if supports_gpu() else 0


class Engine(Protocol):
    """A loaded model. Ids are the model's own tokens; log-probabilities are natural logarithms."""

    name: EngineName
    weights: str
    file_bytes: int
    vocabulary_size: int
    on_gpu: bool

    @property
    def chat_format(self) -> ChatFormat: ...

    def token_log_probabilities(self, ids: Sequence[int]) -> npt.NDArray[np.float64]:
        """``log p(ids[i + 1] | ids[: i + 1])`` for each i: one value fewer than there are ids."""

    def next_log_probabilities(self, ids: Sequence[int]) -> npt.NDArray[np.float32]:
        """``log p(token | ids)`` for every token of the vocabulary."""

    def generate(self, ids: Sequence[int], max_new_tokens: int) -> list[int]:
        """Greedy continuation without the end of turn; shorter than the limit where the model ended it."""

    def generate_many(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> Iterator[tuple[int, list[int]]]:
        """``generate`` for each prompt, together where that is faster: (index, new ids) as each one ends."""

    def text(self, ids: Sequence[int]) -> str:
        """Ids as text, control tokens spelled out."""

    def prompt_seconds(self, ids: Sequence[int], repeats: int, before: Sequence[int] = ()) -> list[float]:
        """Times to evaluate ids together, ``before`` being in the context already: llama-bench's pp."""

    def decode_seconds(self, ids: Sequence[int], repeats: int, before: Sequence[int] = ()) -> list[float]:
        """The same one by one, as generation does, without sampling: llama-bench's tg."""

    def answer_times(self, prompt: Sequence[int], max_new_tokens: int, seed: int) -> list[float]:
        """Seconds from a new prompt to each token of an answer, sampled as the chat does; at least to one."""

    @property
    def bytes_per_token(self) -> int:
        """Weights read for one generated token."""

    def close(self) -> None: ...

    def __enter__(self) -> Engine: ...

    def __exit__(self, *_: object) -> None: ...


def open_engine(path: Path, settings: Settings) -> Engine:
    """A GGUF under llama.cpp; a model's folder, or an adapter's that names its base, under transformers."""
    if not path.is_dir():
        return LlamaCppEngine(path, settings)
    if (path / ADAPTER_CONFIG).is_file():
        return TransformersEngine(base_of_adapter(path), path, settings)
    if (path / "config.json").is_file():
        return TransformersEngine(path, None, settings)
    raise MedcotError(f"{path} is no model: name a GGUF, a folder with config.json or one with adapter_config.json.")


def check_distinct_names(paths: Sequence[Path]) -> None:
    """Raises MedcotError: results go by the file's name."""
    names = [path.name for path in paths]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise MedcotError(f"Two models are called {twice}: rename one, since results go by the file's name.")


def target_log_probabilities(blocks: Iterable[npt.NDArray[np.float32]], ids: Sequence[int]) -> npt.NDArray[np.float64]:
    """Log-probability of each id after the first, from blocks of logits [block, vocabulary] over ``ids``.

    A block is dropped before the next is asked for, so memory does not grow with the length. The exponentials
    are 32-bit and their sum is 64-bit: an error below 1e-6 nats.
    """
    targets = np.asarray(ids[1:], dtype=np.int64)
    result = np.empty(len(targets), dtype=np.float64)
    start = 0
    for block in blocks:
        used = block[: max(0, len(targets) - start)]
        if len(used):
            largest = used.max(axis=1, keepdims=True)
            total = np.exp(used - largest).sum(axis=1, dtype=np.float64)
            own = used[np.arange(len(used)), targets[start : start + len(used)]]
            result[start : start + len(used)] = (own - largest[:, 0]).astype(np.float64) - np.log(total)
        start += len(block)
    return result


def _last_log_probabilities(blocks: Iterable[npt.NDArray[np.float32]]) -> npt.NDArray[np.float32]:
    """Of the last position. A block must not be kept: llama.cpp writes the next one over it, and frees the last."""
    for block in blocks:
        last = block[-1:].copy()
    return log_softmax(last)[0]


class LlamaCppEngine:
    """A GGUF; weights stay mapped, logits are read block by block."""

    name: EngineName = "llama.cpp"

    def __init__(self, path: Path, settings: Settings) -> None:
        from export.gguf_model import GgufModel, supports_gpu

        self._model = GgufModel(
            path,
            n_ctx=settings.context_tokens,
            n_threads=settings.thread_count,
            system=settings.system,
            flash_attention=settings.flash_attention,
            kv_type=settings.kv_type,
            n_gpu_layers=settings.gpu_layers,
        )
        self._threads = settings.thread_count
        self.on_gpu = settings.gpu_layers != 0 and supports_gpu()
        self.file_bytes = path.stat().st_size
        self.vocabulary_size = self._model.n_vocab
        self.weights = _gguf_weights(self._model.metadata)

    @cached_property
    def chat_format(self) -> ChatFormat:
        return self._model.chat_format

    def token_log_probabilities(self, ids: Sequence[int]) -> npt.NDArray[np.float64]:
        return target_log_probabilities(self._model.logits(ids), ids)

    def next_log_probabilities(self, ids: Sequence[int]) -> npt.NDArray[np.float32]:
        return _last_log_probabilities(self._model.logits(ids))

    def generate(self, ids: Sequence[int], max_new_tokens: int) -> list[int]:
        return list(self._model.generate(ids, max_new_tokens))

    def generate_many(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> Iterator[tuple[int, list[int]]]:
        from bench.parallel_decoding import decode_greedily

        return decode_greedily(self._model, prompts, max_new_tokens, self._threads)

    def text(self, ids: Sequence[int]) -> str:
        return self._model.text(ids)

    def prompt_seconds(self, ids: Sequence[int], repeats: int, before: Sequence[int] = ()) -> list[float]:
        return self._timed(lambda: self._model.evaluate(ids), repeats, before)

    def decode_seconds(self, ids: Sequence[int], repeats: int, before: Sequence[int] = ()) -> list[float]:
        def one_by_one() -> None:
            for token in ids:
                self._model.evaluate([token])

        return self._timed(one_by_one, repeats, before)

    def _timed(self, work: Callable[[], None], repeats: int, before: Sequence[int]) -> list[float]:
        self._model.keep_first(0)
        self._model.evaluate(before)
        seconds = []
        for _ in range(repeats):
            self._model.keep_first(len(before))
            started = time.perf_counter()
            work()
            seconds.append(time.perf_counter() - started)
        self._model.keep_first(0)
        return seconds

    def answer_times(self, prompt: Sequence[int], max_new_tokens: int, seed: int) -> list[float]:
        self._model.keep_first(0)
        started = time.perf_counter()
        tokens = self._model.generate(
            prompt, max_new_tokens, temperature=DEFAULT_TEMPERATURE, top_p=DEFAULT_TOP_P, seed=seed
        )
        times = [time.perf_counter() - started for _ in tokens]
        return times or [time.perf_counter() - started]

    @property
    def bytes_per_token(self) -> int:
        from bench.gguf_weights import weights_of

        return weights_of(self._model.path).bytes_per_token

    def close(self) -> None:
        self._model.close()

    def __enter__(self) -> LlamaCppEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class TransformersEngine:
    """A model's folder under PyTorch, with a LoRA adapter merged into it where there is one.

    The tokenizer is the adapter's where its folder has one: that is what trained. In 4 bit (CUDA only) the
    adapter stays beside the weights, because merging would round the sum to 4 bit again.
    """

    name: EngineName = "transformers"

    def __init__(self, base: Path, adapter: Path | None, settings: Settings) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        from pipeline.base_model import load_tokenizer

        if settings.threads is not None or not torch.cuda.is_available():
            torch.set_num_threads(settings.thread_count)
        self._torch = torch
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self.on_gpu = self._device == "cuda"
        in_4bit = settings.load_in_4bit and self._device == "cuda"
        try:
            model = AutoModelForCausalLM.from_pretrained(
                base,
                dtype=_torch_dtype(settings.dtype, self._device),
                quantization_config=_four_bit(torch) if in_4bit else None,
                device_map={"": 0} if in_4bit else None,
            )
        except (OSError, ValueError) as error:
            raise MedcotError(f"transformers cannot load {base}: {str(error).splitlines()[0]}") from error
        with_tokenizer = adapter if adapter and has_tokenizer(adapter) else base
        self._tokenizer = load_tokenizer(with_tokenizer)
        if adapter is not None:
            model = _with_adapter(model, adapter, merge=not in_4bit)
        self._model = model.eval() if in_4bit else model.to(self._device).eval()
        self.weights = "bnb-4bit" if in_4bit else str(model.dtype).removeprefix("torch.")
        self.file_bytes = sum(_weight_bytes(folder) for folder in (base, adapter) if folder)
        self.vocabulary_size = int(model.config.get_text_config().vocab_size)
        self._recipe = read_recipe(adapter)
        self._system = self._recipe.system if settings.system is None and self._recipe else settings.system
        self._with_tokenizer = with_tokenizer

    @cached_property
    def chat_format(self) -> ChatFormat:
        template = self._tokenizer.chat_template
        check_template(self._recipe, template, str(self._with_tokenizer))
        return ChatFormat(template, TransformersVocabulary(self._tokenizer), self._system)

    def token_log_probabilities(self, ids: Sequence[int]) -> npt.NDArray[np.float64]:
        return target_log_probabilities(self._logits(ids[:-1]), ids)

    def next_log_probabilities(self, ids: Sequence[int]) -> npt.NDArray[np.float32]:
        return _last_log_probabilities(self._logits(ids))

    def _logits(self, ids: Sequence[int], block: int = 64) -> Iterator[npt.NDArray[np.float32]]:
        """Next-token logits at every position of ids, a block of positions at a time."""
        torch = self._torch
        with torch.inference_mode():
            past = None
            for start in range(0, len(ids), block):
                part = self._tensor(ids[start : start + block])
                output = self._model(part, past_key_values=past, use_cache=True)
                past = output.past_key_values
                yield output.logits[0].float().cpu().numpy()

    def generate(self, ids: Sequence[int], max_new_tokens: int) -> list[int]:
        return self._generate_together([ids], max_new_tokens)[0]

    def generate_many(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> Iterator[tuple[int, list[int]]]:
        # Prompts of like length share a batch: padding is computed as well.
        order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
        size = _BATCH[self._device]
        while order:
            batch, order = order[:size], order[size:]
            try:
                written = self._generate_together([prompts[index] for index in batch], max_new_tokens)
            except self._torch.OutOfMemoryError:
                if len(batch) == 1:
                    raise
                size, order = len(batch) // 2, batch + order
                continue
            yield from zip(batch, written, strict=True)

    def _generate_together(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[list[int]]:
        """Greedy continuations of several prompts, padded on the left so that all go on from the same place."""
        ends = self._end_ids
        width = max(map(len, prompts))
        padded = [[min(ends)] * (width - len(ids)) + list(ids) for ids in prompts]
        seen = [[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts]
        with self._torch.inference_mode():
            output = self._model.generate(
                self._torch.tensor(padded, device=self._device),
                attention_mask=self._torch.tensor(seen, device=self._device),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                temperature=None,
                top_p=None,
                top_k=None,
                eos_token_id=sorted(ends),
                pad_token_id=min(ends),
            )
        return [list(itertools.takewhile(lambda token: token not in ends, row)) for row in output[:, width:].tolist()]

    @cached_property
    def _end_ids(self) -> set[int]:
        """The template's end of turn, and whatever else the model's own configuration ends on."""
        controls = self.chat_format.vocabulary.control_tokens
        own = self._model.generation_config.eos_token_id
        ends = {controls[self.chat_format.end_of_turn], controls[self.chat_format.vocabulary.eos_token]}
        return ends | ({own} if isinstance(own, int) else set(own or ()))

    def text(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def prompt_seconds(self, ids: Sequence[int], repeats: int, before: Sequence[int] = ()) -> list[float]:
        return [self._seconds([self._tensor(ids)], before) for _ in range(repeats)]

    def decode_seconds(self, ids: Sequence[int], repeats: int, before: Sequence[int] = ()) -> list[float]:
        parts = [self._tensor([token]) for token in ids]
        return [self._seconds(parts, before) for _ in range(repeats)]

    def _seconds(self, parts: Sequence[Any], before: Sequence[int]) -> float:
        past: Any = None
        with self._torch.inference_mode():
            if before:
                past = self._model(self._tensor(before), use_cache=True, logits_to_keep=1).past_key_values
            started = time.perf_counter()
            for part in parts:
                output = self._model(part, past_key_values=past, use_cache=True, logits_to_keep=1)
                past = output.past_key_values
            output.logits.argmax().item()  # waits for a GPU
        return time.perf_counter() - started

    def answer_times(self, prompt: Sequence[int], max_new_tokens: int, seed: int) -> list[float]:
        self._torch.manual_seed(seed)
        part = self._tensor(prompt)
        times: list[float] = []
        past: Any = None
        started = time.perf_counter()
        with self._torch.inference_mode():
            while len(times) < max_new_tokens:
                output = self._model(part, past_key_values=past, use_cache=True, logits_to_keep=1)
                past, token = output.past_key_values, self._sampled(output.logits[0, -1].float())
                times.append(time.perf_counter() - started)
                if token in self._end_ids:
                    break
                part = self._tensor([token])
        return times

    def _sampled(self, logits: Any) -> int:
        """Nucleus sampling (Holtzman et al. 2019): of the likeliest tokens that together have DEFAULT_TOP_P."""
        probabilities, order = self._torch.softmax(logits / DEFAULT_TEMPERATURE, dim=-1).sort(descending=True)
        probabilities[probabilities.cumsum(0) - probabilities >= DEFAULT_TOP_P] = 0
        return int(order[self._torch.multinomial(probabilities, 1)].item())

    @property
    def bytes_per_token(self) -> int:
        embedding, output = self._model.get_input_embeddings().weight, self._model.get_output_embeddings().weight
        weights = sum(each.numel() * each.element_size() for each in self._model.parameters())
        return int(weights if embedding is output else weights - embedding.numel() * embedding.element_size())

    def _tensor(self, ids: Sequence[int]) -> Any:
        return self._torch.tensor([list(ids)], device=self._device)

    def close(self) -> None:
        del self._model

    def __enter__(self) -> TransformersEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _gguf_weights(metadata: dict[str, str]) -> str:
    """The quantization a GGUF says it has, for example ``Q4_K_M``."""
    import gguf

    try:
        return gguf.LlamaFileType(int(metadata["general.file_type"])).name.removeprefix("MOSTLY_").removeprefix("ALL_")
    except (KeyError, ValueError):
        return "unknown"


def base_of_adapter(adapter: Path) -> Path:
    """Folder of the base model that an adapter's folder names; raises MedcotError."""
    from pipeline.base_model import local_base

    try:
        base = json.loads((adapter / ADAPTER_CONFIG).read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (json.JSONDecodeError, KeyError, UnicodeDecodeError) as error:
        raise MedcotError(f"{adapter / ADAPTER_CONFIG} does not name its base model.") from error
    return local_base(base, None)


def _torch_dtype(dtype: Dtype, device: str) -> Any:
    """``auto`` is 32 bit on a CPU, so that merging loses nothing, and the checkpoint's own type on a GPU."""
    import torch

    if dtype == "auto":
        return torch.float32 if device == "cpu" else "auto"
    return getattr(torch, dtype)


def _four_bit(torch: Any) -> Any:
    from transformers import BitsAndBytesConfig

    compute = torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute)


def _with_adapter(model: Any, adapter: Path, *, merge: bool) -> Any:
    from peft import PeftModel

    try:
        adapted = PeftModel.from_pretrained(model, adapter)
    except (OSError, ValueError, RuntimeError) as error:
        raise MedcotError(f"{adapter} does not fit this base model: {str(error).splitlines()[0]}") from error
    return adapted.merge_and_unload() if merge else adapted


def _weight_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))
