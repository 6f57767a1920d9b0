"""What makes a GGUF usable elsewhere: an Ollama Modelfile beside it.

Format: https://docs.ollama.com/modelfile
"""

from __future__ import annotations

import re
from pathlib import Path

from export.ollama_template import TurnTexts, go_template, is_plain, turn_texts
from export.tokenizer_metadata import Vocabulary, chat_format
from pipeline.artifacts import write_text
from pipeline.errors import MedcotError
from pipeline.prompts import ChatFormat

# Tokens: several turns with their thoughts. The model's own context may be 131,072, for which an 8B model's keys and
# values take 17 GB; 8,192 take 1 GB.
LONGEST_CONTEXT = 8192
# R1 repeats itself under greedy decoding: https://huggingface.co/deepseek-ai/DeepSeek-R1-Distill-Llama-8B
_R1_MARKS = ("<｜Assistant｜>", "<think>")
_R1_SAMPLING = ("PARAMETER temperature 0.6", "PARAMETER top_p 0.95")
_NO_TEMPLATE = (
    "# The chat template does more than a TEMPLATE of Ollama's can say, so there is none here. Ollama reads the GGUF's",
    "# own template only in part: it takes one of its own that resembles it, or else sends the bare question, without",
    "# marks of turns. Write a TEMPLATE before you rely on the answers, or use medcot chat or llama.cpp.",
)


def write_modelfile(
    path: Path, gguf_name: str, vocabulary: Vocabulary, system: str | None = None, context: int | None = None
) -> None:
    """Write the Modelfile for ``gguf_name`` beside it, for ``ollama create NAME -f Modelfile``.

    ``system`` is the prompt that the model was trained with, ``context`` the tokens it can attend to. A chat template
    that Ollama's own kind cannot express is left out, and the file says what that means.
    """
    chat = _chat_format(vocabulary)
    turns = _turns(chat, vocabulary)
    lines = [f"FROM ./{gguf_name}"]
    if turns is None or (system and turns.before_system is None):
        lines += _NO_TEMPLATE
        if system:
            lines.append("# The system prompt of the training is not here either.")
    else:
        if turns.before_system is None:
            lines.append("# The chat template has no place for a system prompt: Ollama leaves one out.")
        if system and not is_plain(system):
            lines.append("# The system prompt is inside TEMPLATE: SYSTEM cannot hold its characters.")
            turns = turns.with_default_system(system)
        lines.append(f'TEMPLATE """{go_template(turns)}"""')
        if system and is_plain(system):
            lines.append(f'SYSTEM """{system}"""')
    lines += [f'PARAMETER stop "{text}"' for text in _stops(chat, vocabulary, turns)]
    if context is not None:
        lines.append(f"PARAMETER num_ctx {min(context, LONGEST_CONTEXT)}")
    if all(mark in vocabulary.chat_template for mark in _R1_MARKS):
        lines += _R1_SAMPLING
    write_text(path, "\n".join(lines) + "\n")


def _chat_format(vocabulary: Vocabulary) -> ChatFormat | None:
    try:
        return chat_format(vocabulary)
    except MedcotError:  # not even valid Jinja; what that means is in the file
        return None


def _turns(chat: ChatFormat | None, vocabulary: Vocabulary) -> TurnTexts | None:
    if chat is None:
        return None
    try:
        turns = turn_texts(chat.chat_template)
    except MedcotError:
        return None
    bos = chat.vocabulary.bos_token
    return turns.without_bos(bos) if turns is not None and bos and vocabulary.add_bos else turns


def _stops(chat: ChatFormat | None, vocabulary: Vocabulary, turns: TurnTexts | None) -> list[str]:
    """What ends the model's turn: the template's own end, the vocabulary's, and a question it writes by itself."""
    eos = vocabulary.tokens[vocabulary.special_ids["eos"]]
    try:
        end = chat.end_of_turn if chat is not None else eos
    except MedcotError:
        end = eos
    # Only a mark such as <|user|> or [INST]: ordinary words would cut an answer short.
    behind = "" if turns is None else turns.after_answer.strip().removeprefix(end).strip()
    bos = None if chat is None else chat.vocabulary.bos_token
    asks = re.match(r"[<\[]\S+", behind.removeprefix(bos or ""))
    return list(dict.fromkeys([end, eos, *([asks[0]] if asks else [])]))
