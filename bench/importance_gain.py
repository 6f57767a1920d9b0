"""What an importance matrix gains: each quantization with and without it, against the 16-bit model on held-out text.

    python -m bench.importance_gain F16.gguf --train train.jsonl --data eval.jsonl --quant Q4_K_M --out gain

libllama quantizes the 16-bit file, so the figures do not depend on medcot's own export; its bytes are the same
(tests/test_importance.py). All models are mapped at once.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from multiprocessing import get_context
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from bench.divergence import REFERENCE, Divergence, compare, mean_per_token, summarize
from export.gguf_model import GgufModel
from export.importance import DEFAULT_TOKENS, MAX_LENGTH, measure_importance, training_sequences
from export.importance_file import ImportanceMatrix, read_importance, write_importance
from export.quant_types import file_type
from pipeline.artifacts import write_json
from pipeline.errors import MedcotError
from pipeline.prompts import Example
from pipeline.results import Estimate

_CONSOLE = Console(stderr=True)
_CONTEXT = 2048  # tokens of the longest record


@click.command(help=__doc__)
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--data", required=True, type=click.Path(path_type=Path), help="Held-out records (JSON lines).")
@click.option("--train", type=click.Path(path_type=Path), help="Records to measure the importance matrix on.")
@click.option("--imatrix", type=click.Path(path_type=Path), help="An importance matrix instead of --train.")
@click.option("--measure-on", type=click.Path(path_type=Path), help="The GGUF to measure with (default: MODEL).")
@click.option("--tokens", default=DEFAULT_TOKENS, show_default=True, help="Tokens of --train to measure on.")
@click.option("--quant", "quantizations", multiple=True, default=["Q4_K_M", "Q3_K_M"], show_default=True)
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder for the GGUFs and gain.json.")
@click.option("--threads", default=1, show_default=True)
def main(
    model: Path,
    data: Path,
    train: Path | None,
    imatrix: Path | None,
    measure_on: Path | None,
    tokens: int,
    quantizations: Sequence[str],
    out: Path,
    threads: int,
) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        if imatrix is None:
            if train is None:
                raise MedcotError(
                    "Name the text to measure on (--train FILE) or an importance matrix (--imatrix FILE)."
                )
            imatrix = out / "imatrix.gguf"
            write_importance(imatrix, _measure(measure_on or model, train, tokens, threads))
        else:
            read_importance(imatrix)
        files = {name: _quantized(model, name, None, out) for name in quantizations}
        weighted = {name: _quantized(model, name, imatrix, out) for name in quantizations}
        records = _compare(model, files, weighted, _examples(data), threads)
        _report(records, quantizations, out)
    except MedcotError as error:
        raise click.ClickException(str(error)) from error


def _examples(path: Path) -> list[Example]:
    from pipeline.prepare import load_examples

    return load_examples(path)


def _measure(model: Path, train: Path, tokens: int, threads: int) -> ImportanceMatrix:
    with GgufModel(model, n_ctx=MAX_LENGTH, n_threads=threads) as loaded:
        sequences = training_sequences(loaded.chat_format, _examples(train), tokens=tokens)
    with _CONSOLE.status("") as status:
        return measure_importance(
            model,
            sequences,
            [train.name],
            threads=threads,
            progress=lambda done, total: status.update(f"importance matrix: {done} of {total} tokens"),
        )


def _quantized(source: Path, quantization: str, imatrix: Path | None, out: Path) -> Path:
    """The file, made by libllama in a process of its own (it may abort)."""
    target = out / f"{quantization}{'-imatrix' if imatrix else ''}.gguf"
    _CONSOLE.print(f"quantizing {target.name}", highlight=False)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        number = int(file_type(quantization).number)
        if pool.submit(_quantize, source, target, number, imatrix).result() != 0:
            raise MedcotError(f"libllama could not quantize {source} to {quantization}.")
    return target


def _quantize(source: Path, target: Path, number: int, imatrix: Path | None) -> int:
    import llama_cpp

    silent = llama_cpp.llama_log_callback(lambda level, text, data: None)
    llama_cpp.llama_log_set(silent, ctypes.c_void_p(0))
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = number
    if imatrix is not None:
        importance = read_importance(imatrix)
        values = {name: matrix.mean_squares for name, matrix in importance.matrices.items()}
        entries = (llama_cpp.llama_model_imatrix_data * (len(values) + 1))()  # the last one ends the list
        for entry, (name, array) in zip(entries, values.items(), strict=False):
            entry.name, entry.size = name.encode(), array.size
            entry.data = array.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        parameters.imatrix = ctypes.cast(entries, ctypes.POINTER(llama_cpp.llama_model_imatrix_data))
    return int(llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(parameters)))


def _compare(
    model: Path, files: dict[str, Path], weighted: dict[str, Path], examples: Sequence[Example], threads: int
) -> dict[str, list[Divergence]]:
    paths = {**files, **{f"{name} + imatrix": path for name, path in weighted.items()}}
    with GgufModel(model, n_ctx=_CONTEXT, n_threads=threads) as reference, ExitStack() as stack:
        encoded = [reference.chat_format.encode(example) for example in examples]
        opened = {
            name: stack.enter_context(GgufModel(path, n_ctx=_CONTEXT, n_threads=threads))
            for name, path in paths.items()
        }
        results: dict[str, list[Divergence]] = {name: [] for name in (REFERENCE, *paths)}
        for index, example in enumerate(encoded, start=1):
            for name, record in compare(reference, opened, example.input_ids, len(example.prompt_ids)).items():
                results[name].append(record)
            _CONSOLE.print(f"record {index} of {len(encoded)}", highlight=False)
    return results


def _report(records: dict[str, list[Divergence]], quantizations: Sequence[str], out: Path) -> None:
    summaries = {name: summarize(each) for name, each in records.items()}
    gains = {name: _gain(records[name], records[f"{name} + imatrix"]) for name in quantizations}
    table = Table("model", "perplexity", "mean KL divergence (nats)", "same most likely token")
    for name, summary in summaries.items():
        table.add_row(
            name, _shown(summary.perplexity, 3), _shown(summary.mean_kl, 5), _shown(summary.top1_agreement, 4)
        )
    Console().print(table)
    for name, gain in gains.items():
        Console().print(
            f"{name}: mean KL divergence changes by {_shown(gain, 5)}, paired over records", highlight=False
        )
    write_json(
        out / "gain.json",
        {
            "summaries": {name: summary.model_dump() for name, summary in summaries.items()},
            "mean_kl_change": {name: gain.model_dump() for name, gain in gains.items()},
            "records": {name: [_sums(record) for record in each] for name, each in records.items()},
        },
    )


def _sums(record: Divergence) -> dict[str, float]:
    return {
        "tokens": record.tokens,
        "nll": float(record.nll.sum()),
        "kl": float(record.kl.sum()),
        "same_top": int(record.same_top.sum()),
    }


def _gain(plain: Sequence[Divergence], weighted: Sequence[Divergence]) -> Estimate:
    """Change of the mean divergence with the importance matrix, on the same records."""
    differences = [float((with_it.kl - without.kl).sum()) for with_it, without in zip(weighted, plain, strict=True)]
    return mean_per_token(differences, [record.tokens for record in plain])


def _shown(estimate: Estimate, digits: int) -> str:
    return f"{estimate.value:.{digits}f} [{estimate.low:.{digits}f}, {estimate.high:.{digits}f}]"


if __name__ == "__main__":
    main()
