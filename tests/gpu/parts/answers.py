"""Questions answered at 8B on the GPU: in 4 bit under transformers in batches, and by llama.cpp where it has CUDA."""

from __future__ import annotations

from answering import AnswerRequest, AnswerResult
from cuda_llama import built_folder, put_on_path
from part import Recorder, perform
from random_gguf import random_gguf
from synthetic import random_base

from bench import child
from pipeline.hardware import usable_cores

_QUESTIONS, _NEW_TOKENS = 16, 96
_REHEARSED_QUESTIONS, _REHEARSED_NEW_TOKENS = 3, 4


def measure(recorder: Recorder) -> None:
    request = recorder.request
    questions, new_tokens = _QUESTIONS, _NEW_TOKENS
    if request.rehearse:
        questions, new_tokens = _REHEARSED_QUESTIONS, _REHEARSED_NEW_TOKENS
    models = {"transformers, 4 bit": random_base(request.work, request.rehearse)}
    if built_folder(request).is_dir():
        put_on_path(request)
        models["llama.cpp, Q4_K_M"] = random_gguf(request)
    elif request.rehearse:
        models["llama.cpp, Q4_K_M"] = random_gguf(request)
    speeds = []
    for name, model in models.items():
        asked = AnswerRequest(
            model=model,
            threads=1 if request.rehearse else usable_cores(),
            questions=questions,
            max_new_tokens=new_tokens,
        )
        told = child.ask("answering", asked, AnswerResult, f"Answering by {name}")
        speeds.append(told.tokens / told.seconds)
        recorder.figure(name, speeds[-1], "tokens/s")
        recorder.figure(f"{name}: loading", told.load_seconds, "s")
        if told.gpu_bytes is not None:
            recorder.figure(f"{name}: GPU memory", told.gpu_bytes / 1e9, "GB")
        recorder.check(f"{name}: answered", told.tokens > 0, f"{told.tokens} tokens to {questions} questions")
        recorder.check(f"{name}: on the GPU", told.on_gpu or request.rehearse, f"{told.engine}, {told.weights}")
    if len(speeds) == 2:
        recorder.figure("llama.cpp over transformers", speeds[1] / speeds[0])


if __name__ == "__main__":
    perform(measure)
