"""The build that set-up begins on a GPU machine and does not wait for; what needs llama.cpp waits.

    python -m pipeline.llama_background start    install what is kept from an earlier session, else compile from now on

On a T4's machine, with two to four slow cores, the build with CUDA takes half an hour and more; training meanwhile
needs the GPU. So the build runs next to it with a low priority: first for the CPU (ten minutes; export, verify
and chat need no more), then with CUDA, which compiles 5 of those minutes again. Waiting for CUDA before export would
hold back the GGUF of a short training by more than that; compiling for the CPU in set-up would hold back all training.

What set-up has ordered is noted for this environment until it is installed; a background process that has been ended
is started again by whoever waits for it.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from pipeline import kept_wheels, platforms
from pipeline.errors import MedcotError
from pipeline.file_lock import lock, try_lock
from pipeline.llama_build import Recipe, cpu_recipe, give_way, progress, wanted
from pipeline.llama_install import (
    ROOT,
    compile_and_keep,
    folder,
    has_cuda,
    in_use_file,
    install,
    is_installed,
    log_of,
    prove,
    setup_status,
)

START_AGAIN = f"PYTHONPATH={ROOT} {sys.executable} -m pipeline.llama_background start"
_POLL_SECONDS = 2.0
_SECONDS_BETWEEN_NEWS = 60.0

Announce = Callable[[str], None]


@dataclass(frozen=True)
class Order:
    """What set-up has asked for: the build for this machine and, until that is there, the one for the CPU."""

    best: Recipe
    meanwhile: Recipe

    @property
    def recipes(self) -> list[Recipe]:
        """In the order they are compiled in."""
        return list(dict.fromkeys([self.meanwhile, self.best]))


@dataclass(frozen=True)
class State:
    """Of the background build: ``failed`` says why there is no build as ordered, ``done`` counts objects.

    ``built`` is what only has to be installed.
    """

    title: str
    built: bool
    running: bool
    done: tuple[int, int] | None
    failed: str | None
    log: Path


def start(announce: Announce) -> None:
    """Install what is kept; what is not is compiled in the background from now on."""
    found = wanted(ROOT / "requirements-gpu.txt")
    order = Order(found.recipe, cpu_recipe(ROOT / "requirements-gpu.txt"))
    if found.why_no_cuda:
        announce(f"{found.why_no_cuda}: llama-cpp-python is built for the CPU, and GGUFs run there")
    _forget_failures(order)
    if is_installed(order.best) and prove(None, on_gpu=order.best.cuda is not None) is None:
        _order_file().unlink(missing_ok=True)
        return
    folder().mkdir(parents=True, exist_ok=True)
    _order_file().write_text(json.dumps({"best": asdict(order.best), "meanwhile": asdict(order.meanwhile)}))
    if _install_kept(order.best, announce):
        return
    if not is_installed(order.meanwhile):
        _install_kept(order.meanwhile, announce)
    _forget_failures(order)  # what was kept and does not run is compiled again
    if attached := kept_wheels.offered(order.best):
        announce(f"{attached} has this build: if it is of a notebook of yours, MEDCOT_WHEELS={attached} installs it")
    _start_builder()
    announce(
        f"{order.best.title} is compiled in the background (log: {log_of(order.best)}); "
        "training does not wait for it, and what needs it does"
    )


def wait_for_build(on_gpu: bool, announce: Announce) -> None:
    """Until the llama-cpp-python that set-up has begun to build is installed; returns at once where it has begun none.

    ``on_gpu`` waits for the build with CUDA, where one is ordered; when that fails, the one for the CPU remains, with
    one sentence. Raises MedcotError when neither can be built.
    """
    order = _read_order()
    if order is not None:
        _wait(order, on_gpu, announce)


@contextlib.contextmanager
def llama_cpp(on_gpu: bool, announce: Announce) -> Iterator[None]:
    """Around what uses llama.cpp: ``wait_for_build``, and then nobody replaces it meanwhile."""
    wait_for_build(on_gpu, announce)
    if _read_order() is None:
        yield
        return
    with in_use_file().open("w") as stream:
        lock(stream, shared=True)
        yield


def will_offload() -> bool:
    """Whether llama.cpp computes on the GPU here when it is needed: built with CUDA, or that build is under way."""
    order = _read_order()
    if order is not None and order.best.cuda is not None and _failure(order.best) is None:
        return True
    return has_cuda()


def state() -> State | None:
    """Of the build that set-up has begun; None when there is none, or it is installed."""
    order = _read_order()
    if order is None or is_installed(order.best):
        return None
    return State(
        order.best.title,
        built=kept_wheels.find(order.best) is not None,
        running=_builder_runs(),
        done=progress(log_of(order.best)) or progress(log_of(order.meanwhile)),
        failed=_failure(order.best),
        log=log_of(order.best),
    )


def _wait(order: Order, on_gpu: bool, announce: Announce) -> None:
    """Until the best build, or one that suffices, is installed."""
    enough = [order.best] if on_gpu else [order.best, order.meanwhile]
    started, news, starts = time.monotonic(), 0.0, 0
    own: subprocess.Popen[bytes] | None = None
    while True:
        if any(is_installed(recipe) for recipe in enough):
            return
        if any(_install_kept(recipe, announce) for recipe in enough):
            continue
        failure = _failure(order.best)
        if failure is not None and order.meanwhile not in enough:
            announce(
                f"{order.best.title} could not be built ({failure}): the build for the CPU is used; "
                f"to try again: {START_AGAIN}"
            )
            enough = [order.meanwhile]
            continue
        if all(_failure(recipe) is not None for recipe in enough):
            raise MedcotError(f"llama-cpp-python could not be built ({_failure(enough[-1])}): {START_AGAIN}")
        if (own is None or own.poll() is not None) and not _builder_runs():
            # It was ended, or the machine was; twice is no accident.
            starts += 1
            if starts > 2:
                raise MedcotError(
                    f"The build of llama-cpp-python ends without a result (log: {log_of(enough[0])}): {START_AGAIN}"
                )
            own = _start_builder()
        if time.monotonic() - started >= news:
            news += _SECONDS_BETWEEN_NEWS
            target = order.best if kept_wheels.find(order.meanwhile) else order.meanwhile
            done = progress(log_of(target))
            announce(
                f"waiting for {enough[0].title}"
                + (f": {done[0]} of {done[1]} objects are compiled" if done else "")
                + f", {(time.monotonic() - started) / 60:.0f} minutes so far"
            )
        time.sleep(_POLL_SECONDS)


def build_ordered() -> None:
    """The background process: compiles what is ordered and keeps it; a failure is left as one sentence."""
    order = _read_order()
    with (folder() / "builder.lock").open("w") as stream:
        attempts = 5  # whoever looks whether a build runs has the lock for a moment
        while not try_lock(stream):
            attempts -= 1
            if attempts == 0:
                return
            time.sleep(0.2)
        if order is None:
            return
        give_way()
        compiling = folder() / "compiling"  # one for both: the second build reuses what the first has made
        for recipe in order.recipes:
            if _failure(recipe) is not None or kept_wheels.find(recipe) or is_installed(recipe):
                continue
            try:
                compile_and_keep(recipe, compiling)
            except MedcotError as error:
                _failure_file(recipe).write_text(str(error), encoding="utf-8")
        shutil.rmtree(compiling, ignore_errors=True)


def _install_kept(recipe: Recipe, announce: Announce) -> bool:
    """Whether a wheel was kept that runs here and is now installed."""
    wheel = None if _failure(recipe) else kept_wheels.find(recipe)
    if wheel is None:
        return False
    reason = install(wheel, recipe, announce)
    if reason is not None:
        _failure_file(recipe).write_text(f"the wheel does not run here: {reason}", encoding="utf-8")
        kept_wheels.forget(recipe)  # to try again is to compile again
        return False
    announce(f"{recipe.title} is installed from {wheel.parent}")
    return True


def _forget_failures(order: Order) -> None:
    for recipe in order.recipes:
        _failure_file(recipe).unlink(missing_ok=True)


def _start_builder() -> subprocess.Popen[bytes]:
    with (folder() / "builder.log").open("ab") as stream:
        return subprocess.Popen(
            [sys.executable, "-m", "pipeline.llama_background", "build"],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))},
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=stream,
            start_new_session=True,  # it outlives set-up, and the notebook's cell
        )


def _builder_runs() -> bool:
    with (folder() / "builder.lock").open("w") as stream:
        return not try_lock(stream)


def _order_file() -> Path:
    return folder() / f"order-{platforms.environment_id()}.json"


def _failure_file(recipe: Recipe) -> Path:
    return folder() / f"{recipe.key}.failed"


def _failure(recipe: Recipe) -> str | None:
    try:
        return _failure_file(recipe).read_text(encoding="utf-8")
    except OSError:
        return None


def _read_order() -> Order | None:
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        read = json.loads(_order_file().read_text(encoding="utf-8"))
        return Order(*(_recipe(read[name]) for name in ("best", "meanwhile")))
    return None


def _recipe(fields: dict[str, object]) -> Recipe:
    return Recipe(**{name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()})  # type: ignore[arg-type]


def main(arguments: list[str]) -> int:
    return setup_status((lambda _: build_ordered()) if arguments == ["build"] else start)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
