"""One loaded GGUF: its chat format, its logits, its tokens. The only importer of llama_cpp's inference.

libllama aborts the whole process on some broken files, so whatever loads a GGUF that has not been proven does it
in a child process (``export/verify.py``, ``chat/proof.py``).
"""

from __future__ import annotations

import codecs
import ctypes
from collections.abc import Generator, Iterator, Sequence
from functools import cached_property
from pathlib import Path

import llama_cpp
import numpy as np
import numpy.typing as npt

from export.recipe_metadata import SYSTEM_KEY, check_recorded_template
from pipeline.errors import MedcotError
from pipeline.hardware import usable_cores
from pipeline.prompts import ChatFormat
from pipeline.vocabulary import LlamaCppVocabulary

GGUF_MAGIC = b"GGUF"
PROMPT_PART = 128  # tokens of a prompt between two chances to stop; 512 at once take as much time on a CPU (SmolLM2)


class GgufModel:
    """A GGUF under llama.cpp. ``n_ctx`` 0 takes the model's own context length (tokens).

    ``system`` None takes the system prompt that the file says it was trained with, if any; "" takes none.
    ``kv_type`` is ggml's name of the type of cached keys and values; the quantized ones need ``flash_attention``.
    ``llama`` is the file as someone else has loaded it already, with settings of its own.
    """

    def __init__(
        self,
        path: Path,
        *,
        n_ctx: int = 2048,
        n_threads: int | None = None,
        n_gpu_layers: int = 0,
        n_batch: int = 512,
        system: str | None = None,
        flash_attention: bool = False,
        kv_type: str = "f16",
        llama: llama_cpp.Llama | None = None,
    ) -> None:
        check_is_gguf(path)
        cache_type = getattr(llama_cpp, f"GGML_TYPE_{kv_type.upper()}")
        threads = n_threads or usable_cores()  # llama-cpp-python would take half of them
        self.path = path
        try:
            self._llama = llama or llama_cpp.Llama(
                str(path),
                n_ctx=n_ctx,
                n_batch=n_batch,
                n_threads=threads,
                n_threads_batch=threads,
                n_gpu_layers=n_gpu_layers,
                flash_attn=flash_attention,
                type_k=cache_type,
                type_v=cache_type,
                verbose=False,
            )
        except (ValueError, RuntimeError) as error:
            on_gpu = " Or the GPU lacks room: CUDA_VISIBLE_DEVICES= keeps it on the CPU." if n_gpu_layers else ""
            raise MedcotError(
                f"{path} cannot be loaded by llama.cpp ({error}): it is truncated, damaged, or of an "
                f"architecture this llama-cpp-python does not know. Download or export it again.{on_gpu}"
            ) from error

        self.system = self.metadata.get(SYSTEM_KEY) if system is None else system or None

    def close(self) -> None:
        self._llama.close()

    def __enter__(self) -> GgufModel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def n_ctx(self) -> int:
        return int(self._llama.n_ctx())

    @property
    def n_vocab(self) -> int:
        return int(self._llama.n_vocab())

    @property
    def metadata(self) -> dict[str, str]:
        return dict(self._llama.metadata)

    @cached_property
    def vocabulary(self) -> LlamaCppVocabulary:
        return LlamaCppVocabulary(self._llama)

    @property
    def chat_template(self) -> str:
        template = self.metadata.get("tokenizer.chat_template")
        if not template:
            raise MedcotError(f"{self.path} holds no chat template: it is not a chat model, or export it again.")
        return template

    @cached_property
    def chat_format(self) -> ChatFormat:
        """Raises MedcotError where the file's template is not the one that export wrote."""
        check_recorded_template(self.path, self.chat_template, self.metadata)
        return ChatFormat(self.chat_template, self.vocabulary, self.system)

    def is_end_of_generation(self, token: int) -> bool:
        """Whether llama.cpp's programs stop at ``token``, or the chat template ends turns with it."""
        return self.llama_cpp_stops_at(token) or token == self._end_of_turn

    def llama_cpp_stops_at(self, token: int) -> bool:
        vocab = llama_cpp.llama_model_get_vocab(self._llama.model)
        return bool(llama_cpp.llama_vocab_is_eog(vocab, token))

    @cached_property
    def _end_of_turn(self) -> int | None:
        """None for a file without a template, which can still be timed."""
        if "tokenizer.chat_template" not in self.metadata:
            return None
        return self.vocabulary.control_tokens[self.chat_format.end_of_turn]

    def tokenize_like_llama_cpp(self, text: str) -> list[int]:
        """The whole text as llama.cpp's own tools tokenize it: control tokens recognised, BOS not added.

        Brought into the vocabulary's Unicode form first, which those tools leave to whoever writes the text.
        """
        return list(self._llama.tokenize(self.vocabulary.normalized(text).encode(), add_bos=False, special=True))

    def logits(self, ids: Sequence[int], chunk: int = 64) -> Generator[npt.NDArray[np.float32], None, None]:
        """Next-token logits at every position of ``ids``, as consecutive blocks [<= chunk, n_vocab].

        Only one block is held at a time; it is valid until the next one is asked for.
        """
        if len(ids) > self.n_ctx:
            raise MedcotError(f"{len(ids)} tokens do not fit the context of {self.n_ctx} of {self.path}.")
        self._llama.reset()
        context = self._llama.ctx
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        batch = llama_cpp.llama_batch_init(chunk, 0, 1)
        try:
            for start in range(0, len(ids), chunk):
                block = ids[start : start + chunk]
                batch.n_tokens = len(block)
                for index, token in enumerate(block):
                    batch.token[index] = token
                    batch.pos[index] = start + index
                    batch.n_seq_id[index] = 1
                    batch.seq_id[index][0] = 0
                    batch.logits[index] = 1
                if llama_cpp.llama_decode(context, batch) != 0:
                    raise MedcotError(f"llama.cpp could not evaluate tokens {start}.. of {self.path}.")
                pointer = llama_cpp.llama_get_logits(context)
                address = ctypes.cast(pointer, ctypes.POINTER(ctypes.c_float * (len(block) * self.n_vocab)))
                yield np.ctypeslib.as_array(address.contents).reshape(len(block), self.n_vocab)
        finally:
            llama_cpp.llama_batch_free(batch)
            llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)

    def evaluate(self, ids: Sequence[int]) -> None:
        """Take ``ids`` into the context behind what is there, logits for the last one only; back when all is done."""
        context = self._llama.ctx
        size = int(self._llama.n_batch)
        for start in range(0, len(ids), size):
            block = ids[start : start + size]
            tokens = (llama_cpp.llama_token * len(block))(*block)
            if llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(tokens, len(block))) != 0:
                raise MedcotError(f"llama.cpp could not evaluate {len(ids)} tokens of {self.path}.")
        llama_cpp.llama_synchronize(context)

    def keep_first(self, tokens: int) -> None:
        """Forget all of the context but its first ``tokens``; of recurrent models 0 only."""
        self._llama.reset()
        memory = llama_cpp.llama_get_memory(self._llama.ctx)
        if tokens == 0:
            llama_cpp.llama_memory_clear(memory, True)
        elif not llama_cpp.llama_memory_seq_rm(memory, 0, tokens, -1):
            raise MedcotError(f"{self.path} cannot go back in its context: measure it at depth 0 only.")

    def read_prompt(self, ids: Sequence[int]) -> Iterator[int]:
        """Evaluate all of ``ids`` but the last in parts, so that ``generate`` begins at once; the caller may end it.

        Yields how many of them the cache holds: first what earlier calls left there (the longest common beginning),
        then after each part.
        """
        held = self._keep_common_beginning(ids)
        yield held
        while held < len(ids) - 1:
            part = ids[held : min(held + PROMPT_PART, len(ids) - 1)]
            self._llama.eval(part)
            held += len(part)
            yield held

    def _keep_common_beginning(self, ids: Sequence[int]) -> int:
        """Drop from the cache what ``ids`` do not begin with; the number of ids that stay, at most all but the last."""
        held = self._llama.input_ids[: min(self._llama.n_tokens, len(ids) - 1)]
        different = np.flatnonzero(held != np.asarray(ids[: len(held)], dtype=held.dtype))
        common = int(different[0]) if len(different) else len(held)
        memory = llama_cpp.llama_get_memory(self._llama.ctx)
        if common == 0 or not llama_cpp.llama_memory_seq_rm(memory, -1, common, -1):
            self._llama.reset()  # a recurrent model cannot go back
            return 0
        self._llama.n_tokens = common
        return common

    def generate(
        self,
        ids: Sequence[int],
        max_new_tokens: int,
        *,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> Iterator[int]:
        """Yield new token ids until the end of turn (which is not yielded), the limit or the context's end.

        ``temperature`` 0 is greedy. The common prefix with the previous call's tokens is not evaluated again.
        """
        room = self.n_ctx - len(ids)
        if room <= 0:
            raise MedcotError(
                f"The prompt has {len(ids)} tokens and the context {self.n_ctx}: shorten it or open a larger context."
            )
        self._llama.set_seed(seed)
        stream = self._llama.generate(
            list(ids),
            top_k=0 if temperature > 0 else 1,
            top_p=top_p,
            min_p=0.0,
            temp=temperature,
            repeat_penalty=1.0,
        )
        for count, token in enumerate(stream, start=1):
            if self.is_end_of_generation(token):
                return
            yield int(token)
            if count >= min(max_new_tokens, room):
                return

    def text(self, ids: Sequence[int]) -> str:
        """Ids as text, control tokens spelled out."""
        return self._bytes(ids).decode("utf-8", errors="replace")

    def stream_text(self, ids: Iterator[int]) -> Iterator[str]:
        """Ids as pieces of text; a character whose bytes span tokens is held until it is whole."""
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        for token in ids:
            piece = decoder.decode(self._bytes([token]))
            if piece:
                yield piece
        last = decoder.decode(b"", final=True)
        if last:
            yield last

    def _bytes(self, ids: Sequence[int]) -> bytes:
        vocab = llama_cpp.llama_model_get_vocab(self._llama.model)
        pieces = []
        buffer = ctypes.create_string_buffer(512)
        for token in ids:
            length = llama_cpp.llama_token_to_piece(vocab, token, buffer, len(buffer), 0, True)
            pieces.append(buffer.raw[: max(length, 0)])
        return b"".join(pieces)


def supports_gpu() -> bool:
    """Whether this llama-cpp-python can put layers on a GPU."""
    return bool(llama_cpp.llama_supports_gpu_offload())


def check_is_gguf(path: Path) -> None:
    """Raise MedcotError unless ``path`` is a file that begins as a GGUF does."""
    if path.is_dir():
        raise MedcotError(f"{path} is a folder: name the GGUF file inside it.")
    try:
        with path.open("rb") as stream:
            magic = stream.read(4)
    except FileNotFoundError as error:
        raise MedcotError(f"{path} does not exist: name a GGUF file (medcot export writes one).") from error
    except OSError as error:
        raise MedcotError(f"{path} cannot be read: {error.strerror}.") from error
    if magic != GGUF_MAGIC:
        raise MedcotError(f"{path} is not a GGUF (it begins with {magic!r}): name the file that medcot export wrote.")
