"""The child process of ``export/verify_child.py``: loads one GGUF and answers what it makes of texts and token ids.

    python -m export.verify_probe FOLDER

reads FOLDER/request.json and writes FOLDER/answer.json and FOLDER/logits-<n>.npy. It is a process of its own
because libllama aborts on some broken files.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel

from export.gguf_model import GgufModel
from export.recipe_metadata import SYSTEM_KEY, TEMPLATE_KEY
from pipeline.errors import MedcotError
from pipeline.processes import end_with_parent
from pipeline.prompts import ChatFormat, Example, Vocabulary

REQUEST_NAME = "request.json"
ANSWER_NAME = "answer.json"
NO_ROOM_STATUS = 75  # sysexits.h EX_TEMPFAIL: the disk is full, nothing is known of the GGUF


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
    """``evaluate`` are the sequences of ids whose logits are wanted.

    With ``max_new_tokens`` above 0 the prompt ``question_ids`` is answered, greedily, up to that many tokens.
    """

    gguf: Path
    system: str | None
    texts: list[str]
    conversations: list[Conversation]
    examples: list[ReferenceExample]
    evaluate: list[list[int]]
    question_ids: list[int] = []
    max_new_tokens: int = 0
    threads: int | None = None


class Segments(BaseModel):
    """Ids of one text: at the start, after a control token, and going on from other text."""

    at_start: list[int]
    after_control: list[int]
    after_text: list[int]


class VocabularyView(BaseModel):
    """What a tokenizer and chat template make of the request; both sides have one, and they are compared.

    ``strips`` are the control tokens that swallow white space beside them. ``whole`` are texts tokenized in one piece,
    control tokens recognised; ``rendered`` is None where the
    template refuses the conversation; ``refusal`` says why there are no ``example_ids``, if there are none.
    """

    bos_token: str | None
    eos_token: str
    eos_id: int
    adds_bos: bool
    strips: list[str]
    size: int
    whole: list[list[int]]
    segments: list[Segments]
    rendered: list[str | None]
    example_ids: list[list[int]]
    refusal: str | None
    end_of_turn: str
    template_sha256: str


class Answer(BaseModel):
    """``stop_ids`` are the tokens at which llama.cpp's own programs end a generation.

    ``answer_tokens`` is the length of the greedy answer and None where none was asked for; ``answer_ended`` says
    whether the model ended it itself.
    """

    view: VocabularyView
    turn_ends_generation: bool
    stop_ids: list[int]
    answer_tokens: int | None
    answer_ended: bool
    recorded_template_sha256: str | None
    recorded_system: str | None
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
    try:
        end_of_turn = chat_format.end_of_turn
        example_ids = [chat_format.encode(each.example).input_ids for each in request.examples]
        refusal = None
    except MedcotError as error:
        end_of_turn, example_ids, refusal = vocabulary.eos_token, [], str(error)
    return VocabularyView(
        bos_token=vocabulary.bos_token,
        eos_token=vocabulary.eos_token,
        eos_id=vocabulary.control_tokens.get(vocabulary.eos_token, -1),
        adds_bos=vocabulary.adds_bos,
        strips=sorted(vocabulary.strips_left | vocabulary.strips_right),
        size=size,
        whole=whole,
        segments=[
            Segments(
                at_start=vocabulary.encode_text(text, "nothing"),
                after_control=vocabulary.encode_text(text, "control"),
                after_text=vocabulary.encode_text(text, "text"),
            )
            for text in request.texts
        ],
        rendered=rendered,
        example_ids=example_ids,
        refusal=refusal,
        end_of_turn=end_of_turn,
        template_sha256=chat_format.template_sha256,
    )


def logits_path(folder: Path, index: int) -> Path:
    return folder / f"logits-{index}.npy"


def main(folder: Path) -> None:
    end_with_parent()
    request = Request.model_validate_json((folder / REQUEST_NAME).read_bytes())
    context = max([512, len(request.question_ids) + request.max_new_tokens, *map(len, request.evaluate)])
    with GgufModel(request.gguf, n_ctx=context, n_threads=request.threads, system=request.system) as model:
        # Not the model's own: a template that was changed after export is found by a check with a name.
        chat_format = ChatFormat(model.chat_template, model.vocabulary, request.system)
        view = vocabulary_view(
            request,
            model.vocabulary,
            chat_format,
            model.n_vocab,
            [model.tokenize_like_llama_cpp(text) for text in request.texts],
            [_render(chat_format, conversation) for conversation in request.conversations],
        )
        recorded_template = model.metadata.get(TEMPLATE_KEY)
        usable = view.refusal is None and recorded_template in (None, view.template_sha256)
        answer_tokens, answer_ended = _answer_question(model, request) if usable else (None, False)
        answer = Answer(
            view=view,
            turn_ends_generation=model.llama_cpp_stops_at(model.vocabulary.control_tokens[view.end_of_turn]),
            stop_ids=[token for token in range(model.n_vocab) if model.llama_cpp_stops_at(token)],
            answer_tokens=answer_tokens,
            answer_ended=answer_ended,
            recorded_template_sha256=recorded_template,
            recorded_system=model.metadata.get(SYSTEM_KEY),
            tokenizer_model=model.metadata.get("tokenizer.ggml.model", ""),
            file_type=int(model.metadata.get("general.file_type", -1)),
        )
        (folder / ANSWER_NAME).write_text(answer.model_dump_json(), encoding="utf-8")
        for index, ids in enumerate(request.evaluate):
            # Where writing fails the generator must not outlive the model whose context it clears: that is a crash.
            with closing(model.logits(ids)) as blocks:
                write_logits(logits_path(folder, index), blocks, (len(ids), model.n_vocab))


def write_logits(path: Path, blocks: Iterable[npt.NDArray[np.float32]], shape: tuple[int, int]) -> None:
    """Next-token logits at every position, [positions, vocabulary] in 32 bit, streamed to the disk as .npy.

    Not through a memory map: on a full disk that ends the process with a signal instead of an error.
    """
    header = {"descr": np.lib.format.dtype_to_descr(np.dtype(np.float32)), "fortran_order": False, "shape": shape}
    try:
        with path.open("wb") as stream:
            np.lib.format.write_array_header_1_0(stream, header)
            for block in blocks:
                stream.write(np.ascontiguousarray(block, dtype=np.float32).data)
    except OSError as error:
        raise NoRoom(
            f"The logits to compare need {np.prod(shape) * 4 / 1e9:.2f} GB for each conversation in {path.parent} "
            f"({error.strerror}): free some disk space, set TMPDIR to a larger disk, or lower verify.prompts."
        ) from error


class NoRoom(MedcotError):
    """The temporary folder cannot hold the logits."""


def _render(chat_format: ChatFormat, conversation: Conversation) -> str | None:
    try:
        return chat_format.render(conversation.messages, conversation.add_generation_prompt)
    except MedcotError:
        return None


def _answer_question(model: GgufModel, request: Request) -> tuple[int | None, bool]:
    if not request.max_new_tokens:
        return None, False
    count = sum(1 for _ in model.generate(request.question_ids, request.max_new_tokens))
    return count, count < request.max_new_tokens


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]))
    except NoRoom as error:
        print(error, file=sys.stderr)
        sys.exit(NO_ROOM_STATUS)
    except MedcotError as error:
        sys.exit(str(error))
