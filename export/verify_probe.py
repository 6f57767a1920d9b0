"""The child process of ``export/verify.py``: loads one GGUF and answers what it makes of texts and token ids.

    python -m export.verify_probe FOLDER

reads FOLDER/request.json and writes FOLDER/answer.json and FOLDER/logits-<n>.npy. It is a process of its own
because libllama aborts on some broken files.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from pydantic import BaseModel

from export.gguf_model import GgufModel
from pipeline.errors import MedcotError
from pipeline.processes import end_with_parent
from pipeline.prompts import ChatFormat, Example, Vocabulary

REQUEST_NAME = "request.json"
ANSWER_NAME = "answer.json"


class Conversation(BaseModel):
    """Messages to render; ``add_generation_prompt`` as in transformers."""

    messages: list[dict[str, str]]
    add_generation_prompt: bool


class ReferenceExample(BaseModel):
    question: str
    reasoning: str | None
    answer: str

    @property
    def example(self) -> Example:
        return Example(self.question, self.reasoning, self.answer)


class Request(BaseModel):
    gguf: Path
    system: str | None
    texts: list[str]
    conversations: list[Conversation]
    examples: list[ReferenceExample]
    evaluate: list[list[int]]


class Segments(BaseModel):
    """Ids of one text: after a control token or at the start, and going on from other text."""

    at_start: list[int]
    after_text: list[int]


class VocabularyView(BaseModel):
    """What a tokenizer and chat template make of the request; both sides have one, and they are compared.

    ``whole`` are texts tokenized in one piece, control tokens recognised; ``rendered`` is None where the
    template refuses the conversation.
    """

    bos_token: str | None
    eos_token: str
    eos_id: int
    adds_bos: bool
    size: int
    whole: list[list[int]]
    segments: list[Segments]
    rendered: list[str | None]
    example_ids: list[list[int]]


class Answer(BaseModel):
    view: VocabularyView
    eos_ends_generation: bool
    tokenizer_model: str
    file_type: int


def vocabulary_view(
    request: Request,
    vocabulary: Vocabulary,
    chat_format: ChatFormat,
    size: int,
    whole: list[list[int]],
    rendered: list[str | None],
) -> VocabularyView:
    """The part of the answer that is computed the same way for both tokenizers."""
    return VocabularyView(
        bos_token=vocabulary.bos_token,
        eos_token=vocabulary.eos_token,
        eos_id=vocabulary.control_tokens.get(vocabulary.eos_token, -1),
        adds_bos=vocabulary.adds_bos,
        size=size,
        whole=whole,
        segments=[
            Segments(
                at_start=vocabulary.encode_text(text, after_text=False),
                after_text=vocabulary.encode_text(text, after_text=True),
            )
            for text in request.texts
        ],
        rendered=rendered,
        example_ids=[chat_format.encode(each.example).input_ids for each in request.examples],
    )


def logits_path(folder: Path, index: int) -> Path:
    return folder / f"logits-{index}.npy"


def main(folder: Path) -> None:
    end_with_parent()
    request = Request.model_validate_json((folder / REQUEST_NAME).read_bytes())
    context = max([512, *map(len, request.evaluate)])
    with GgufModel(request.gguf, n_ctx=context, system=request.system) as model:
        chat_format = model.chat_format
        view = vocabulary_view(
            request,
            model.vocabulary,
            chat_format,
            model.n_vocab,
            [model.tokenize_like_llama_cpp(text) for text in request.texts],
            [_render(chat_format, conversation) for conversation in request.conversations],
        )
        answer = Answer(
            view=view,
            eos_ends_generation=view.eos_id >= 0 and model.is_end_of_generation(view.eos_id),
            tokenizer_model=model.metadata.get("tokenizer.ggml.model", ""),
            file_type=int(model.metadata.get("general.file_type", -1)),
        )
        (folder / ANSWER_NAME).write_text(answer.model_dump_json(), encoding="utf-8")
        for index, ids in enumerate(request.evaluate):
            _write_logits(model, ids, logits_path(folder, index))


def _render(chat_format: ChatFormat, conversation: Conversation) -> str | None:
    try:
        return chat_format.render(conversation.messages, conversation.add_generation_prompt)
    except MedcotError:
        return None


def _write_logits(model: GgufModel, ids: list[int], path: Path) -> None:
    """Next-token logits at every position, float32 [positions, vocabulary], streamed to the disk."""
    logits = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(len(ids), model.n_vocab))
    start = 0
    for block in model.logits(ids):
        logits[start : start + len(block)] = block
        start += len(block)
    logits.flush()


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]))
    except MedcotError as error:
        sys.exit(str(error))
