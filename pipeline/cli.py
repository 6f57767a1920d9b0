"""The command line. Commands import their bodies when they run, so ``--help`` answers at once.

The only place where an error becomes a message and an exit status: 0 done, 1 error, 2 usage, 3 a gate failed.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from pipeline import __version__, platforms
from pipeline.errors import MedcotError

if TYPE_CHECKING:
    from pipeline.results import ExportedModels, Verification
    from pipeline.run import RunOutcome

STAGE = click.Choice(["prepare", "train", "export", "verify", "evaluate", "bench", "report"])
EXISTING_GGUF = click.Path(path_type=Path)
INTERRUPTED = 130  # 128 + SIGINT, as shells have it
# Set-up may still be compiling it.
_USES_LLAMA_CPP = frozenset({"export", "verify", "evaluate", "bench", "chat", "serve", "space"})
_ON_GPU = frozenset({"evaluate", "bench"})

set_option = click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change one setting; may be repeated."
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document and nothing else.")


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="medcot")
@click.option("--debug", is_flag=True, help="Show where an error came from.")
def cli(debug: bool) -> None:
    """From a reasoning model and medical chain-of-thought data to one verified GGUF for a laptop.

    Example: medcot run smollm2-cpu
    """
    if debug:
        os.environ["MEDCOT_DEBUG"] = "1"
    command = click.get_current_context().invoked_subcommand
    if command in _USES_LLAMA_CPP and not {"-h", "--help"} & set(sys.argv):
        from pipeline.llama_background import wait_for_build

        wait_for_build(command in _ON_GPU, lambda text: click.echo(text, err=True))


@cli.command()
@click.argument("config", required=False)
@set_option
@click.option("--run-dir", type=click.Path(path_type=Path), help="Folder of the run [default: runs/<name>].")
@click.option(
    "--keep",
    type=click.Path(path_type=Path),
    help="Copy what is finished into this folder too, and go on from there on another machine "
    "[default: Google Drive, where Colab has it mounted].",
)
@click.option("--only", type=STAGE, help="Run this stage alone; what it needs must be there.")
@click.option("--until", type=STAGE, help="Stop after this stage.")
@click.option(
    "--first-report/--no-first-report",
    default=None,
    help="Write a report as soon as the GGUF is verified, before evaluation and benchmark [default: on Kaggle and "
    "Colab].",
)
@click.option("--force", type=STAGE, multiple=True, help="Make this stage again even if it is up to date.")
@click.option("--no-plan", is_flag=True, help="Begin without the plan, also where it says that the run cannot fit.")
@json_option
def run(
    config: str | None,
    overrides: tuple[str, ...],
    run_dir: Path | None,
    keep: Path | None,
    only: str | None,
    until: str | None,
    first_report: bool | None,
    force: tuple[str, ...],
    no_plan: bool,
    as_json: bool,
) -> None:
    """Run the pipeline: plan, prepare, train, export, verify, evaluate, bench, report.

    CONFIG is a preset's name or a YAML file. Stages that are up to date are skipped.

    Example: medcot run smollm2-cpu --set training.max_steps=30
    """
    from pipeline.config import load_config
    from pipeline.ranks import is_first
    from pipeline.run import run as run_stages

    if only and until:
        raise click.UsageError("--only and --until exclude each other.")
    resolved = load_config(config, overrides)
    platform = platforms.here()
    if platform.to_keep and not (run_dir or keep) and is_first():
        click.echo(f"Note: nothing that this run makes is kept: {platform.to_keep}.", err=True)
    outcome = run_stages(
        resolved,
        run_dir or platform.runs / resolved.name,
        keep=keep or platform.kept,
        only=only,
        until=until,
        force=force,
        plan_first=not no_plan,
        first_report=platform.service is not None if first_report is None else first_report,
        announce=lambda text: click.echo(text, err=True),
    )
    if not is_first():
        return  # of several processes under torchrun the first one tells what was done
    if as_json:
        _print_json(_run_document(outcome))
    else:
        _print_run(outcome)


@cli.command()
@click.argument("config", required=False)
@set_option
@click.option(
    "--machine", help="Plan for another machine: kaggle-t4, kaggle-t4x2, colab-t4, rtx-3060-12gb, rtx-4060-8gb."
)
@click.option("--run-dir", type=click.Path(path_type=Path), help="Folder of the run [default: runs/<name>].")
@json_option
def plan(
    config: str | None, overrides: tuple[str, ...], machine: str | None, run_dir: Path | None, as_json: bool
) -> None:
    """Show what a run would take, and one training example with its loss mask. Exit 1 when it cannot fit.

    Example: medcot plan deepseek-r1-8b --machine kaggle-t4
    """
    from pipeline.config import load_config
    from pipeline.machines import machine_named
    from pipeline.plan import make_plan, raise_if_impossible
    from pipeline.plan_display import print_plan

    resolved = load_config(config, overrides)
    elsewhere = None if machine is None else machine_named(machine)
    made = make_plan(resolved, run_dir or platforms.here().runs / resolved.name, elsewhere)
    if as_json:
        _print_json(made.model_dump(mode="json"))
    else:
        print_plan(made)
    raise_if_impossible(made)


@cli.command()
@click.argument("experiments")
@set_option
@click.option("--out", type=click.Path(path_type=Path), help="Folder of the sweep [default: runs/<name>-sweep].")
@click.option("--ray", "ray_address", metavar="ADDRESS", help="Run on this Ray cluster; 'local' starts one here.")
@json_option
def sweep(
    experiments: str, overrides: tuple[str, ...], out: Path | None, ray_address: str | None, as_json: bool
) -> None:
    """Run several experiments and compare them in one table. Exit 1 when one failed.

    EXPERIMENTS is a preset's name or a YAML file: a configuration and what each experiment, or a grid, changes in it.
    Each is an ordinary run in a folder of its own; the same command goes on after an interruption.

    \b
    Example: medcot sweep configs/experiments/tinyllama-flashcards.yaml
             medcot sweep smollm2-cpu --set training.max_steps=10 --out /shared/sweep --ray 10.0.0.1:6379
    """
    from bench.sweep_report import print_result, write_result
    from bench.sweep_result import collect
    from pipeline.sweep import run_sweep
    from pipeline.sweep_file import default_folder, load_sweep

    planned = load_sweep(experiments, overrides)
    folder = out or default_folder(planned)
    outcomes = run_sweep(planned, folder, ray_address=ray_address, announce=lambda text: click.echo(text, err=True))
    result = collect(planned, outcomes)
    paths = write_result(result, folder)
    if as_json:
        _print_json(result.model_dump(mode="json"))
    else:
        print_result(result)
        click.echo(f"Table and plots:  {paths[0]}")
    if any(row.state == "failed" for row in result.experiments):
        raise SystemExit(1)


@cli.command("export")
@click.option("--base", required=True, help="Hub id, folder, or package:<module>/<file>.gguf.")
@click.option(
    "--adapter",
    "adapters",
    multiple=True,
    metavar="DIR[=WEIGHT]",
    help="Folder of a LoRA adapter (peft), and how much of it; may be repeated: the changes add up.",
)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder for the GGUFs.")
@click.option(
    "--quant", "quantizations", multiple=True, metavar="TYPE", default=("Q4_K_M",), show_default=True,
    help="A file of this type; may be repeated.",
)  # fmt: skip
@click.option("--base-quant", metavar="TYPE", help="Also write the base without adapters, to compare with.")
@click.option(
    "--adapter-gguf",
    type=click.Choice(["F32", "F16"]),
    is_flag=False,
    flag_value="F32",
    help="Also write the adapters alone as one small GGUF, for llama.cpp's --lora [alone: F32].",
)
@click.option("--name", default="model", show_default=True, help="Names the files: <name>-<quant>.gguf.")
@click.option("--imatrix", default="none", show_default=True, metavar="auto|none|FILE", help="Importance matrix.")
@click.option(
    "--imatrix-text",
    type=click.Path(path_type=Path),
    help="Records to measure it on (a train.jsonl of medcot) [default: the packaged cases].",
)
@click.option(
    "--verify/--no-verify",
    default=True,
    show_default=True,
    help="Compare every written file with base and adapter afterwards.",
)
@json_option
def export_command(
    base: str,
    adapters: tuple[str, ...],
    out: Path,
    quantizations: tuple[str, ...],
    base_quant: str | None,
    adapter_gguf: Literal["F32", "F16"] | None,
    name: str,
    imatrix: str,
    imatrix_text: Path | None,
    verify: bool,
    as_json: bool,
) -> None:
    """Merge LoRA adapters into their base and write quantized GGUFs, in one pass.

    After an interruption the same command goes on where it was. Exit 3 when a file is not what the adapter made of
    the base.

    \b
    Example: medcot export --base ./base --adapter ./adapter --out ./gguf --quant Q4_K_M --quant F16
             medcot export --base ./base --adapter ./a=0.7 --adapter ./b=0.3 --out ./gguf --adapter-gguf
    """
    from contextlib import ExitStack

    from export.export import export_models, open_model, tokenizer_folder
    from export.exported_proof import verify_written, why_not_verifiable
    from export.fingerprint import model_fingerprint
    from export.measured_export import export_with_imatrix, measuring_text
    from export.merged_weights import parse_adapter
    from pipeline.hardware import hide_gpu
    from pipeline.progress import ExportProgressBar

    hide_gpu()
    several = [parse_adapter(adapter) for adapter in adapters]
    if adapter_gguf and not several:
        raise click.UsageError("--adapter-gguf needs an --adapter.")
    with ExportProgressBar() as bar, ExitStack() as stack:
        folder, base_weights = open_model(base, fetching=bar.fetched)
        weights = stack.enter_context(base_weights)
        result = export_with_imatrix(
            imatrix,
            lambda out_dir, wanted, base_wanted, importance: export_models(
                folder,
                several,
                out_dir,
                name,
                wanted,
                base_wanted,
                bar.written,
                adapter_gguf=adapter_gguf if out_dir == out else None,
                given_as=base,
                weights=weights,
                importance=importance,
                announce=bar.note,
            ),
            out,
            name,
            quantizations,
            base_quant,
            lambda: measuring_text(tokenizer_folder(folder, several), imatrix_text),
            lambda: model_fingerprint(folder, weights, several),
            bar.measured,
            bar.note,
        )
        reason = why_not_verifiable(several, weights)
    for warning in result.warnings:
        click.echo(f"Warning: {warning}", err=True)
    proof = None
    if verify and reason is not None:
        click.echo(reason, err=True)
    elif verify:
        proof = verify_written(result, out, folder, several)
        _print_proof(proof)
    if as_json:
        verification = None if proof is None else proof.model_dump(mode="json")
        _print_json({**result.model_dump(mode="json"), "verification": verification})
    else:
        _print_exported(out, result)
    if proof is not None:
        from export.verify import raise_if_failed

        raise_if_failed(proof)


@cli.command()
@click.argument("gguf", type=EXISTING_GGUF)
@click.option("--base", required=True, help="Hub id, folder, or package:<module>/<file>.gguf.")
@click.option("--adapter", type=click.Path(path_type=Path), help="Folder of the LoRA adapter it was made with.")
@json_option
def verify(gguf: Path, base: str, adapter: Path | None, as_json: bool) -> None:
    """Compare a GGUF with the model it was made from: tokens, template, end of turn, logits. Exit 3 when they differ.

    Limits follow from the file's type: the squared error of the logits for 16 and 32 bit, their divergence below.

    Example: medcot verify gguf/model-Q4_K_M.gguf --base ./base --adapter ./adapter
    """
    from export.verify import raise_if_failed, verify_gguf
    from pipeline.base_model import local_base
    from pipeline.config import VerifyConfig
    from pipeline.hardware import hide_gpu
    from pipeline.sources import sample_examples

    hide_gpu()
    settings = VerifyConfig.model_validate({})
    result = verify_gguf(gguf, local_base(base), adapter, sample_examples(settings.prompts), settings)
    if as_json:
        _print_json(result.model_dump(mode="json"))
    else:
        for check in result.checks:
            click.echo(f"{'ok    ' if check.passed else 'FAILED'}  {check.name}: {check.detail}")
    raise_if_failed(result)


@cli.command()
@click.argument("models", nargs=-1, required=True, type=EXISTING_GGUF)
@click.option("--data", required=True, type=click.Path(path_type=Path), help="JSONL with Question, Response, ...")
@click.option("--rows", type=click.IntRange(min=1), default=24, show_default=True)
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=1024, show_default=True)
@click.option(
    "--choice-rows", type=click.IntRange(min=0), help="Of those with options, how many to ask as multiple choice [all]."
)
@click.option(
    "--gate", "gates", multiple=True, metavar="METRIC=CONDITION",
    help="Exit 3 unless the metric is better, not worse (than the base), or within '>= NUMBER'; may be repeated.",
)  # fmt: skip
@click.option(
    "--max-minutes", type=click.FloatRange(min=0, min_open=True),
    help="End in time with the records measured by then; continues with the rest once it is raised.",
)  # fmt: skip
@click.option("--out", type=click.Path(path_type=Path), help="Folder for the records, to go on after a break.")
@json_option
def evaluate(
    models: tuple[Path, ...],
    data: Path,
    rows: int,
    max_new_tokens: int,
    choice_rows: int | None,
    gates: tuple[str, ...],
    max_minutes: float | None,
    out: Path | None,
    as_json: bool,
) -> None:
    """Measure models on held-out records: perplexity, wording, form of the answers, multiple choice.

    MODELS are GGUFs, models' folders or adapters' folders. The first of several is what the others are compared with.

    \b
    Example: medcot evaluate base-Q4_K_M.gguf tuned-Q4_K_M.gguf --data held_out.jsonl
             medcot evaluate F16.gguf Q4_K_M.gguf --data held_out.jsonl --gate 'answer_perplexity=not worse'
    """
    from pipeline.gates import parse_gate, split_gate

    wanted = []
    for gate in gates:
        try:
            wanted.append(parse_gate(*split_gate(gate)))
        except ValueError as error:
            raise MedcotError(f"--gate {gate!r}: {error}.") from error
        if wanted[-1].needs_reference and len(models) < 2:
            raise MedcotError(f"--gate {gate!r} compares two models: name the one to compare with first.")
    from bench.evaluate import evaluate_files
    from bench.evaluation_display import print_evaluation
    from bench.gates import raise_if_failed

    result = evaluate_files(
        models,
        data,
        rows=rows,
        max_new_tokens=max_new_tokens,
        choice_rows=choice_rows,
        gates=wanted,
        out_dir=out,
        max_minutes=max_minutes,
    )
    if as_json:
        _print_json(result.model_dump(mode="json"))
    else:
        print_evaluation(result)
    raise_if_failed(result)


@cli.command()
@click.argument("models", nargs=-1, required=True, type=EXISTING_GGUF)
@click.option("--data", type=click.Path(path_type=Path), help="Held-out records to compare on [default: the run's].")
@click.option("--out", type=click.Path(path_type=Path), help="Also write benchmark.json into this folder.")
@click.option("--repeats", type=click.IntRange(min=1), default=5, show_default=True)
@click.option(
    "--depth", "depths", type=click.IntRange(min=0), multiple=True, metavar="TOKENS",
    help="Also measure with so many tokens in the context; may be repeated.",
)  # fmt: skip
@click.option("--threads", type=click.IntRange(min=1), help="[default: one per physical core]")
@click.option(
    "--ctx", "context_tokens", type=click.IntRange(min=64), help="Context (tokens) [default: what is needed]."
)
@click.option("--kv-type", type=click.Choice(["f32", "f16", "bf16", "q8_0", "q4_0"]), default="f16", show_default=True)
@click.option("--flash-attention", is_flag=True, help="llama.cpp's flash attention; q8_0 and q4_0 caches need it.")
@click.option("--gpu-layers", type=click.IntRange(min=-1), default=0, show_default=True, help="On the GPU; -1: all.")
@click.option(
    "--dtype", type=click.Choice(["auto", "float32", "bfloat16", "float16"]), default="auto", show_default=True,
    help="Of models under transformers; auto: 32 bit on a CPU.",
)  # fmt: skip
@click.option("--load-in-4bit", is_flag=True, help="Models under transformers in 4 bit (NVIDIA GPUs only).")
@click.option("--max-kl", type=click.FloatRange(min=0, min_open=True), help="Quality budget: mean divergence (nats).")
@click.option("--min-top1", type=click.FloatRange(min=0, max=1), help="Quality budget: same likeliest token (share).")
@click.option(
    "--memory-gb", type=click.FloatRange(min=0, min_open=True), help="Memory budget (1e9 bytes) [default: 8]."
)
@click.option(
    "--max-minutes", type=click.FloatRange(min=0, min_open=True),
    help="End in time: fewer repeats of each file, then without transformers and the comparison of quality.",
)  # fmt: skip
@json_option
def bench(
    models: tuple[Path, ...],
    data: Path | None,
    out: Path | None,
    repeats: int,
    depths: tuple[int, ...],
    threads: int | None,
    context_tokens: int | None,
    kv_type: str,
    flash_attention: bool,
    gpu_layers: int,
    dtype: Literal["auto", "float32", "bfloat16", "float16"],
    load_in_4bit: bool,
    max_kl: float | None,
    min_top1: float | None,
    memory_gb: float | None,
    max_minutes: float | None,
    as_json: bool,
) -> None:
    """Measure models on this machine: speed, memory, loading, and what quantization cost; recommend a file.

    MODELS are GGUFs of one model, or folders of models or adapters (under transformers). Their most exact file is
    what the others are held against; the smallest one inside the budgets is recommended.

    \b
    Example: medcot bench runs/smollm2-cpu/gguf/*.gguf
             medcot bench gguf/*.gguf --data held_out.jsonl --depth 2048 --threads 4
    """
    from bench.benchmark_display import print_benchmark
    from bench.speed import bench_models
    from pipeline.config import BenchConfig

    if kv_type.startswith("q") and not flash_attention:
        raise click.UsageError(f"--kv-type {kv_type} needs --flash-attention.")
    budget = {"max_mean_kl": max_kl, "min_top1_agreement": min_top1}
    given = {
        "repeats": repeats,
        "depths": (0, *depths),
        "threads": threads,
        "context_tokens": context_tokens,
        "kv_type": kv_type,
        "flash_attention": flash_attention,
        "gpu_layers": gpu_layers,
        "max_minutes": max_minutes,
        "quality_budget": {key: value for key, value in budget.items() if value is not None},
        **({} if memory_gb is None else {"memory_budget_gb": memory_gb}),
    }
    settings = BenchConfig.model_validate(given)
    result = bench_models(models, settings, out, data=data, dtype=dtype, load_in_4bit=load_in_4bit)
    if as_json:
        _print_json(result.model_dump(mode="json"))
    else:
        print_benchmark(result)


@cli.command()
@click.argument("runs", nargs=-1, required=True, metavar="RUN...", type=click.Path(path_type=Path))
@click.option(
    "--out", type=click.Path(path_type=Path), help="Folder for the files [default: RUN/report; of several: comparison]."
)
@json_option
def report(runs: tuple[Path, ...], out: Path | None, as_json: bool) -> None:
    """Write the report of a run again, whatever it has finished, or compare several runs on one page.

    RUN is a folder that medcot run made.

    \b
    Example: medcot report runs/smollm2-cpu
             medcot report runs/smollm2-cpu runs/longer --out comparison
    """
    from bench.report_command import report_runs

    page, document = report_runs(runs, out)
    if as_json:
        click.echo(document.model_dump_json(indent=2, by_alias=True))
        return
    for sentence in document.decision:
        click.echo(sentence.text)
    click.echo(f"Report:  {page}")


@cli.command()
@click.argument("gguf", type=EXISTING_GGUF)
@click.option("--prompt", help="Answer this and end.")
@click.option("--history", type=click.Path(path_type=Path), help="Keep the conversation in this file, and go on.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), help="Of thought and answer together [default: 1024]")
@click.option("--ctx", "n_ctx", type=click.IntRange(min=64), default=4096, show_default=True, help="Context (tokens).")
@click.option("--temperature", type=click.FloatRange(min=0, max=2), help="[default: by model]")
@click.option("--top-p", type=click.FloatRange(min=0, max=1), help="[default: by model]")
@click.option("--seed", type=click.IntRange(min=0, max=2**31 - 1), help="[default: 0]")
@click.option("--think", metavar="on|off|N", help="Leave the thought out, or end it after N tokens [default: on]")
@click.option("--system", metavar="TEXT", help="System prompt; '' for none [default: by model]")
@click.option("--threads", type=click.IntRange(min=1), help="[default: all cores]")
@click.option("--hide-thought", is_flag=True, help="Show one line in the thought's place.")
@click.option("--country", metavar="CODE", help="Whose emergency numbers to name, such as DE [default: locale's].")
@click.option("--emergency-number", metavar="NUMBER", help="Emergency number in warnings [default: by country].")
@click.option("--red-flags", type=click.Path(path_type=Path), help="Your own red-flag rules (YAML).")
@json_option
def chat(
    gguf: Path,
    prompt: str | None,
    history: Path | None,
    max_new_tokens: int | None,
    n_ctx: int,
    temperature: float | None,
    top_p: float | None,
    seed: int | None,
    think: str | None,
    system: str | None,
    threads: int | None,
    hide_thought: bool,
    country: str | None,
    emergency_number: str | None,
    red_flags: Path | None,
    as_json: bool,
) -> None:
    """Talk to a GGUF in the terminal; its thought and its answer are told apart. /help there lists the commands.

    Example: medcot chat runs/smollm2-cpu/gguf/smollm2-cpu-Q4_K_M.gguf --prompt "What is sepsis?"
    """
    # libgomp's threads spin while they wait. Beside a busy browser llama.cpp loses nine tenths of its speed to that,
    # and with a short spin nothing where it is alone; PyTorch does lose, so this is for the chat only (LOG.md,
    # 2026-11-22). The library reads the variable when it is loaded.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    from chat.terminal import run_chat

    run_chat(
        gguf,
        prompt,
        n_ctx=n_ctx,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        think=think,
        system=system,
        threads=threads,
        show_thought=not hide_thought,
        as_json=as_json,
        history=history,
        emergency_number=emergency_number,
        country=country,
        red_flags=red_flags,
    )


@cli.command()
@click.argument("models", nargs=-1, required=True, metavar="GGUF [GGUF]", type=EXISTING_GGUF)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; others need a password.")
@click.option("--port", type=click.IntRange(0, 65535), default=7860, show_default=True, help="0: any free one.")
@click.option("--password", "asks_password", is_flag=True, help="Ask for a password to set (or MEDCOT_PASSWORD).")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=1024, show_default=True)
@click.option("--thought-budget", type=click.IntRange(min=0), help="Tokens of thought before the answer.")
@click.option("--ctx", "n_ctx", type=click.IntRange(min=64), default=4096, show_default=True, help="Context (tokens).")
@click.option("--temperature", type=click.FloatRange(0.1, 1), help="[default: by model]")
@click.option("--top-p", type=click.FloatRange(min=0, max=1), help="[default: by model]")
@click.option("--seed", type=int, help="[default: another for each conversation]")
@click.option("--threads", type=click.IntRange(min=1), help="[default: all cores]")
@click.option("--country", metavar="CODE", help="Whose emergency numbers to name, such as DE [default: locale's].")
@click.option("--emergency-number", metavar="NUMBER", help="Emergency number in warnings [default: by country].")
@click.option("--red-flags", type=click.Path(path_type=Path), help="Your own red-flag rules (YAML).")
@click.option("--api", "as_api", is_flag=True, help="No page: an OpenAI-compatible endpoint (key: MEDCOT_API_KEY).")
@json_option
def serve(models: tuple[Path, ...], asks_password: bool, as_api: bool, **settings: Any) -> None:
    """Chat with a GGUF, or with two side by side, on a web page of this machine.

    \b
    Example: medcot serve base-Q4_K_M.gguf tuned-Q4_K_M.gguf
             medcot serve --api tuned-Q4_K_M.gguf
    """
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as for chat
    if as_api:
        from chat.api import serve_api

        if asks_password:
            raise click.UsageError("--password is for the page; the API has a key: set MEDCOT_API_KEY.")
        serve_api(models, api_key=os.environ.get("MEDCOT_API_KEY"), **settings)
        return
    from chat.web_server import serve as serve_page

    password = os.environ.get("MEDCOT_PASSWORD")
    if asks_password:
        password = click.prompt("Password", hide_input=True, confirmation_prompt=True)
    serve_page(models, password=password, **settings)


@cli.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--gguf", required=True, type=EXISTING_GGUF, help="The model of the Space.")
@click.option("--base", type=EXISTING_GGUF, help="Show this one beside it.")
@click.option("--model-repo", metavar="OWNER/NAME", help="Fetch the GGUFs from there: they are not in the folder.")
@click.option("--title", help="[default: the GGUF's name]")
@click.option("--license", "license_id", metavar="ID", help="As the hub names it [default: as the GGUF says].")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=1024, show_default=True)
@click.option("--thought-budget", type=click.IntRange(min=0), help="Tokens of thought before the answer.")
@click.option("--ctx", "n_ctx", type=click.IntRange(min=64), default=4096, show_default=True, help="Context (tokens).")
@json_option
def space(folder: Path, gguf: Path, base: Path | None, as_json: bool, **settings: Any) -> None:
    """Write a Hugging Face Space: a folder with the page for a GGUF, for free CPU hardware.

    Example: medcot space ./space --gguf tuned-Q4_K_M.gguf --base base-Q4_K_M.gguf
    """
    from chat.space import write_space

    written = write_space(folder, gguf, base, announce=lambda text: click.echo(text, err=True), **settings)
    for note in written.notes:
        click.echo(f"Warning: {note}", err=True)
    if as_json:
        _print_json(written.model_dump(mode="json"))
        return
    for model in written.models:
        place = f"fetched from {model.repo}" if model.repo else str(folder / model.file)
        click.echo(f"{model.file}  {model.size_bytes / 1e6:.1f} MB  {place}")
    click.echo(f"{folder}  {(written.file_bytes + written.code_bytes) / 1e6:.1f} MB in all")
    click.echo(f"Upload it:  hf upload YOU/NAME {folder} . --repo-type space")


@cli.command()
@click.argument("repository", metavar="OWNER/NAME")
@click.option("--run-dir", type=click.Path(path_type=Path), help="Folder of the run [default: the only one in runs].")
@click.option("--gguf", "ggufs", multiple=True, metavar="FILE", help="Also this GGUF of the run; may be repeated.")
@click.option("--all-ggufs", is_flag=True, help="All GGUFs of the run [default: the one that ships].")
@click.option("--adapter/--no-adapter", default=True, show_default=True, help="The LoRA adapter and its tokenizer.")
@click.option("--report/--no-report", default=True, show_default=True, help="The report: it shows held-out records.")
@click.option("--public", is_flag=True, help="For everyone to see [default: private].")
@click.option("--unverified", is_flag=True, help="Also a run that a gate has stopped or that is not verified.")
@click.option("--dry-run", is_flag=True, help="List files and sizes; send and write nothing.")
@json_option
def publish(repository: str, run_dir: Path | None, as_json: bool, **options: Any) -> None:
    """Publish a run on the Hugging Face Hub: model card, GGUF, Modelfile, adapter and report, in one commit.

    The token is HF_TOKEN's or that of 'hf auth login'. After an interruption the same command goes on. Exit 3 for a
    run that a gate has stopped.

    \b
    Example: medcot publish YOU/my-model --dry-run
             medcot publish YOU/my-model --run-dir runs/smollm2-cpu --all-ggufs
    """
    from bench.publication import print_publication
    from bench.publish import only_run
    from bench.publish import publish as publish_run

    published = publish_run(
        repository, run_dir or only_run(), announce=lambda text: click.echo(text, err=True), **options
    )
    if as_json:
        _print_json(published.model_dump(mode="json"))
    else:
        print_publication(published)


@cli.command()
@json_option
def doctor(as_json: bool) -> None:
    """Show what this machine has and what is missing, with the command that fixes it.

    Exit 1 when something is missing that `medcot run` or `medcot chat` needs here; hints alone leave 0.

    Example: medcot doctor
    """
    from pipeline.doctor import examine, print_findings

    findings = examine()
    if as_json:
        _print_json([finding.model_dump(mode="json") for finding in findings])
    else:
        print_findings(findings)
    if any(finding.problem for finding in findings):
        raise SystemExit(1)


def main() -> None:
    """Entry point: run a command and end with the right status."""
    from pipeline.processes import quiet_libraries

    quiet_libraries()
    try:
        platforms.use_scratch(platforms.here(), os.environ)
        cli.main(standalone_mode=False)
    except click.exceptions.Exit as error:
        sys.exit(error.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        click.echo("Interrupted.", err=True)
        sys.exit(INTERRUPTED)
    except BrokenPipeError:
        # The reader of our output has gone (``medcot ... | head``); nothing may be written at exit either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except MedcotError as error:
        _show_traceback_if_asked()
        if not getattr(error, "already_told", False):
            click.echo(f"Error: {error}", err=True)
        sys.exit(error.exit_status)
    except OSError as error:
        _show_traceback_if_asked()
        click.echo(f"Error: {error.filename or 'input/output'}: {error.strerror or error}.", err=True)
        sys.exit(1)
    except Exception as error:
        _show_traceback_if_asked()
        first_line = (str(error).strip() or "no message").splitlines()[0]
        click.echo(
            f"Error: {type(error).__name__}: {first_line} (a fault in medcot or a library; --debug shows where)",
            err=True,
        )
        sys.exit(1)


def _show_traceback_if_asked() -> None:
    if os.environ.get("MEDCOT_DEBUG"):
        import traceback

        traceback.print_exc()


def _print_json(document: Any) -> None:
    click.echo(json.dumps(document, ensure_ascii=False, indent=2))


def _run_document(outcome: RunOutcome) -> dict[str, Any]:
    return {
        "run_dir": str(outcome.run_dir),
        "gguf": None if outcome.shipped_gguf is None else str(outcome.shipped_gguf),
        "stages": [
            {
                "name": item.stage.name,
                "status": item.status,
                "seconds": item.manifest.seconds,
                "peak_memory_bytes": item.manifest.peak_memory_bytes,
                "path": str(item.path),
                "result": item.manifest.result,
            }
            for item in outcome.stages
        ],
    }


def _print_exported(out: Path, result: ExportedModels) -> None:
    for file in result.files:
        click.echo(f"{out / file.name}  {file.size_bytes / 1e6:.1f} MB  {file.bits_per_weight:.2f} bits/weight")
    if result.adapter_gguf:
        click.echo(f"{out / result.adapter_gguf}  {(out / result.adapter_gguf).stat().st_size / 1e6:.1f} MB")


def _print_proof(result: Verification) -> None:
    """What a verification found, on standard error: its failed checks, or one line."""
    for check in result.checks:
        if not check.passed:
            click.echo(f"FAILED  {check.name}: {check.detail}", err=True)
    if result.passed:
        found = f"{result.top1_agreement:.1%} of {result.positions} tokens predicted alike by the most exact file"
        click.echo(f"Verified: the trained model ({len(result.checks)} checks passed, {found}).", err=True)


def _print_run(outcome: RunOutcome) -> None:
    from rich.console import Console
    from rich.table import Table

    if all(item.status == "up to date" for item in outcome.stages):
        click.echo("Everything is up to date: nothing was done.")
    table = Table(title=f"Run {outcome.run_dir}", title_justify="left")
    for heading in ("stage", "status", "time", "peak memory", "artifact"):
        table.add_column(heading, justify="right" if heading in ("time", "peak memory") else "left")
    for item in outcome.stages:
        minutes, seconds = divmod(round(item.manifest.seconds), 60)
        table.add_row(
            item.stage.name,
            item.status,
            f"{minutes}:{seconds:02}",
            f"{item.manifest.peak_memory_bytes / 2**30:.1f} GiB",
            str(item.path),
        )
    total_minutes, total_seconds = divmod(round(sum(item.manifest.seconds for item in outcome.stages)), 60)
    table.caption = f"{total_minutes}:{total_seconds:02} in all"
    Console().print(table)
    if outcome.shipped_gguf is not None:
        click.echo(f"Chat with it:  {_own_command()} chat {outcome.shipped_gguf}")


def _own_command() -> str:
    """How this medcot is called from the current folder: by name, or by its path in an environment not activated."""
    import shutil

    script = Path(sys.executable).parent / "medcot"
    if not script.is_file() or shutil.which("medcot") == str(script):
        return "medcot"
    return str(script.relative_to(Path.cwd())) if script.is_relative_to(Path.cwd()) else str(script)


if __name__ == "__main__":
    main()
