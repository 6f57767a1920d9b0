"""An export survives: kills, interruptions, full disks and refused shards; the same call then gives the same bytes."""

import errno
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from hub_server import Fault, HubServer
from safetensors.torch import load_file, save_file
from tiny_models import save_adapter, save_model

from export import hub_files, partial_files
from export.export import export_models, open_model
from export.journal import JOURNAL_NAME, locked_journal
from export.merged_weights import WeightedAdapter
from pipeline.artifacts import artifact_files
from pipeline.errors import MedcotError

pytestmark = pytest.mark.broad


ROOT = Path(__file__).resolve().parent.parent
FILES = ["m-F16.gguf", "m-Q4_0.gguf", "m-base-Q8_0.gguf"]
CHILD = """
import sys, time
from pathlib import Path
from export import partial_files
from export.export import export_models
partial_files._SYNC_BYTES = 0
export_models(
    Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), "m", ["F16", "Q4_0"], "Q8_0",
    lambda *_: time.sleep(0.004), announce=lambda text: print(text, flush=True),
)
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model") / "base", hidden=192, feed_forward=384, layers=4)


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_adapter(tmp_path_factory.mktemp("model") / "adapter", base)


@pytest.fixture(scope="module")
def undisturbed(base: Path, adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("undisturbed")
    export(base, adapter, out)
    assert sorted(contents(out)) == ["Modelfile", *FILES]
    return contents(out)


@pytest.fixture
def syncs_every_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(partial_files, "_SYNC_BYTES", 0)


class Stop:
    """A progress callback that raises after so many calls, one a tensor here, and remembers what it was told first."""

    def __init__(self, error: BaseException | None = None, calls: int = 0) -> None:
        self.error, self.calls = error, calls
        self.first: tuple[str, int, int] | None = None

    def __call__(self, tensor: str, done: int, total: int) -> None:
        self.first = self.first or (tensor, done, total)
        self.calls -= 1
        if self.error is not None and self.calls < 0:
            raise self.error


def export(base: Path, adapter: Path | WeightedAdapter, out: Path, stop: Stop | None = None) -> list[str]:
    said: list[str] = []
    export_models(base, adapter, out, "m", ["F16", "Q4_0"], "Q8_0", stop, announce=said.append)
    return said


def interrupt(base: Path, adapter: Path, out: Path, calls: int = 20) -> None:
    with pytest.raises(KeyboardInterrupt):
        export(base, adapter, out, Stop(KeyboardInterrupt(), calls))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def partials(out: Path) -> list[Path]:
    return [out / f".{name}.partial" for name in FILES]


def child(code: str, *arguments: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


@pytest.mark.broad
def test_killed_at_any_moment_it_goes_on_and_gives_the_same_bytes(
    base: Path, adapter: Path, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    whole = sum(len(undisturbed[name]) for name in FILES)
    moments = sorted(random.Random(4).sample(range(whole // 20, whole), 6))
    gone_on_behind = []
    for bytes_written in moments:
        process = child(CHILD, base, adapter, out)
        while sum(path.stat().st_size for path in partials(out) if path.exists()) < bytes_written:
            assert process.poll() is None, process.communicate()
            time.sleep(0.001)
        process.kill()
        said, _ = process.communicate()
        assert process.returncode == -signal.SIGKILL
        gone_on_behind.append(int(re.findall(r"behind tensor (\d+) of 38", said)[0]) if said else 0)
        assert not any((out / name).exists() for name in FILES)
    last = child(CHILD, base, adapter, out)
    said, errors = last.communicate()
    assert last.returncode == 0, errors
    gone_on_behind.append(int(re.findall(r"behind tensor (\d+) of 38", said)[0]))
    assert gone_on_behind == sorted(gone_on_behind) and gone_on_behind[-1] > 20
    assert len(set(gone_on_behind)) >= 4, "most kills came behind new tensors"
    assert contents(out) == undisturbed


@pytest.mark.parametrize("renamed", [0, 1, 3])
def test_killed_while_the_files_get_their_names(
    renamed: int, base: Path, adapter: Path, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    code = f"""
import os, signal
from pathlib import Path
count = 0
def replace(self, target, rename=Path.replace):
    global count
    if str(target).endswith("gguf"):
        if count == {renamed}:
            os.kill(os.getpid(), signal.SIGKILL)
        count += 1
    return rename(self, target)
Path.replace = replace
from export import journal
def remove(self):
    os.kill(os.getpid(), signal.SIGKILL)
journal.Journal.remove = remove
{CHILD}"""
    process = child(code, base, adapter, tmp_path)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert sum((tmp_path / name).exists() for name in FILES) == renamed
    stop = Stop()
    said = export(base, adapter, tmp_path, stop)
    assert stop.first is None and "behind tensor 38 of 38" in said[0]
    assert contents(tmp_path) == undisturbed


def test_an_older_file_is_not_taken_for_the_one_that_was_to_be_renamed(
    base: Path, adapter: Path, undisturbed: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in FILES:
        (tmp_path / name).write_bytes(bytes(len(undisturbed[name])))

    def fail(self: Path, target: Path) -> Path:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    with monkeypatch.context() as patched, pytest.raises(MedcotError, match="Operation not permitted"):
        patched.setattr(Path, "replace", fail)
        export(base, adapter, tmp_path)
    partials(tmp_path)[1].unlink()
    export(base, adapter, tmp_path)
    assert contents(tmp_path) == undisturbed


def test_an_interruption_keeps_what_is_complete(
    base: Path, adapter: Path, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    """With syncs minutes apart too: there is time for one at the end."""
    for error in (KeyboardInterrupt(), MemoryError(), ValueError("a fault of ours")):
        out = tmp_path / type(error).__name__
        said: list[str] = []
        with pytest.raises(type(error)):
            export_models(base, adapter, out, "m", ["F16", "Q4_0"], "Q8_0", Stop(error, 20), announce=said.append)
        assert said == ["The same command goes on behind tensor 20 of 38."]
        assert {path.name for path in out.iterdir()} == {JOURNAL_NAME, *(path.name for path in partials(out))}
        assert artifact_files(out) == []
        stop = Stop()
        [going_on] = export(base, adapter, out, stop)
        assert going_on.startswith("Going on behind tensor 20 of 38: 0.00 of 0.01 GB")
        assert stop.first is not None and 0 < stop.first[1] < stop.first[2]
        assert contents(out) == undisturbed


@pytest.mark.usefixtures("syncs_every_tensor")
def test_bytes_behind_the_journal_are_not_trusted(
    base: Path, adapter: Path, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    interrupt(base, adapter, tmp_path)
    for path in partials(tmp_path):
        with path.open("ab") as stream:
            stream.write(b"\xff" * len(undisturbed[FILES[0]]))
    with (tmp_path / JOURNAL_NAME).open("ab") as stream:
        stream.write(b'{"steps": 3')  # cut in the middle of a line
    interrupt(base, adapter, tmp_path, 10)
    [said] = export(base, adapter, tmp_path)
    assert "behind tensor 30" in said
    assert contents(tmp_path) == undisturbed


@pytest.mark.usefixtures("syncs_every_tensor")
def test_it_starts_anew_where_what_lies_there_is_of_no_use(
    base: Path, adapter: Path, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    def shorten(out: Path) -> None:
        os.truncate(partials(out)[1], 5000)

    def change_head(out: Path) -> None:
        with partials(out)[0].open("r+b") as stream:
            stream.seek(200)
            stream.write(b"?")

    def delete_one(out: Path) -> None:
        partials(out)[2].unlink()

    def exaggerate(out: Path) -> None:
        with (out / JOURNAL_NAME).open("a") as stream:
            stream.write('{"steps": 35}\n')

    def scribble(out: Path) -> None:
        (out / JOURNAL_NAME).write_bytes(b"\xff\x00 no journal\n")

    for damage in (shorten, change_head, delete_one, exaggerate, scribble):
        out = tmp_path / damage.__name__
        interrupt(base, adapter, out)
        damage(out)
        stop = Stop()
        export(base, adapter, out, stop)
        assert stop.first is not None and stop.first[0] == "token_embd.weight", "the first tensor"
        assert contents(out) == undisturbed, damage.__name__


def test_other_inputs_start_anew(base: Path, adapter: Path, undisturbed: dict[str, bytes], tmp_path: Path) -> None:
    """Another weight of the adapter, other files, another change time of the base: nothing of them shows in heads."""
    changed = tmp_path / "base"
    shutil.copytree(base, changed)
    out, reference = tmp_path / "out", tmp_path / "reference"
    export(changed, WeightedAdapter(adapter, 0.5), reference)

    interrupt(changed, adapter, out)
    [said] = export(changed, WeightedAdapter(adapter, 0.5), out)
    assert "of other inputs or settings: begun anew" in said
    assert contents(out) == contents(reference) != undisturbed
    for path in out.iterdir():
        path.unlink()

    interrupt(changed, adapter, out)
    path = changed / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"][0] += 1
    tensors["model.embed_tokens.weight"][0] += 1
    save_file(tensors, path, metadata={"format": "pt"})
    [said] = export(changed, adapter, out)
    assert "begun anew" in said
    export(changed, adapter, tmp_path / "fresh")
    assert contents(out) == contents(tmp_path / "fresh") != undisturbed

    interrupt(base, adapter, tmp_path / "other")
    export_models(base, adapter, tmp_path / "other", "n", ["F16"])
    assert sorted(path.name for path in (tmp_path / "other").iterdir()) == ["Modelfile", "n-F16.gguf"]


def test_two_exports_into_one_folder(base: Path, adapter: Path, tmp_path: Path) -> None:
    interrupt(base, adapter, tmp_path)
    before = contents(tmp_path)
    with locked_journal(tmp_path), pytest.raises(MedcotError, match=r"Another export is writing into .*: wait until"):
        export(base, adapter, tmp_path)
    assert contents(tmp_path) == before
    export(base, adapter, tmp_path)


@pytest.mark.usefixtures("syncs_every_tensor")
def test_bad_weights_leave_nothing(base: Path, adapter: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(base, broken)
    tensors = load_file(broken / "model.safetensors")
    tensors["model.layers.3.mlp.down_proj.weight"][1, 2] = float("inf")
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    out = tmp_path / "out"
    with pytest.raises(MedcotError, match=r"down_proj\.weight holds NaN or infinite values"):
        export(broken, adapter, out)
    assert list(out.iterdir()) == []


FULL_DISK = """
import hashlib, json, sys
from pathlib import Path
from export.export import export_models
from pipeline.errors import MedcotError
base, adapter, out = map(Path, sys.argv[1:])
filler = out / "filler"
done = 0
def fill(tensor, done, total):
    if done > total // 2 and not filler.exists():
        try:
            filler.write_bytes(bytes(1 << 26))
        except OSError:
            pass
def export(progress=None):
    export_models(base, adapter, out, "m", ["F16", "Q4_0"], "Q8_0", progress, announce=print)
for attempt in (fill, None):
    try:
        export(attempt)
    except MedcotError as error:
        print(error)
    print(sorted(path.name for path in out.iterdir()))
    if attempt is None:
        filler.unlink()
export()
print(json.dumps({path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in out.glob("*.gguf")}))
"""


def can_mount() -> bool:
    command = ["unshare", "--mount", "--map-root-user", "true"]
    return shutil.which("unshare") is not None and subprocess.run(command, capture_output=True).returncode == 0


@pytest.mark.skipif(not can_mount(), reason="a small disk cannot be mounted here (unshare --mount)")
def test_a_full_disk_leaves_no_file_and_says_how_much_is_missing(
    base: Path, adapter: Path, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    """On a disk of its own: another program fills it in the middle, then there is not even room to begin."""
    out = tmp_path / "disk"
    out.mkdir()
    script = tmp_path / "full_disk.py"
    script.write_text(FULL_DISK)
    mount = f'mount -t tmpfs -o size=8m tmpfs "{out}" && exec "$@"'
    command = ["unshare", "--mount", "--map-root-user", "sh", "-c", mount, "sh", sys.executable, str(script)]
    done = subprocess.run(
        [*command, str(base), str(adapter), str(out)],
        capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    full, left, refused, still_left, going_on, hashes = done.stdout.splitlines()
    missing = re.search(r"the disk is full, (\d\.\d{3}) GB more are needed\. The same command goes on behind", full)
    planned = sum(len(undisturbed[name]) for name in FILES)
    assert missing is not None and 0 < float(missing[1]) * 1e9 < 0.6 * planned
    assert f"To give up, delete {', '.join(str(path) for path in partials(out))}." in full
    assert not any(f"'{name}'" in left for name in FILES) and ".m-F16.gguf.partial" in left
    assert re.search(r"has 0\.00 GB free and the files need 0\.\d+ GB", refused) and still_left == left
    assert "Going on behind" in going_on
    assert json.loads(hashes) == {name: hashlib.sha256(undisturbed[name]).hexdigest() for name in FILES}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("MEDCOT_CACHE", str(tmp_path / "scratch"))
    monkeypatch.setattr(hub_files, "RETRY_WAITS", (0.0,))
    with HubServer() as server:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.endpoint)
        template = server.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        yield server
    huggingface_hub.close_session()


@pytest.mark.usefixtures("syncs_every_tensor")
def test_shards_whose_tensors_are_written_are_not_fetched_again(hub: HubServer, tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", hidden=128, layers=4, max_shard_size="200KB")
    shards = [path.name for path in sorted(base.glob("*.safetensors"))]
    assert len(shards) > 3
    export_models(base, None, tmp_path / "local", "m", ["F16", "Q4_0"])
    hub.add("someone/base", base)
    hub.misbehave(Fault(shards[2], flip=(base / shards[2]).stat().st_size - 1))
    said: list[str] = []
    fetched: list[tuple[str, int, int]] = []

    def attempt() -> None:
        folder, weights = open_model("someone/base", fetching=lambda *state: fetched.append(state))
        with weights:
            export_models(folder, None, tmp_path / "out", "m", ["F16", "Q4_0"], weights=weights, announce=said.append)

    with pytest.raises(MedcotError, match=r"arrived damaged twice.* The same command goes on behind tensor \d+ of"):
        attempt()
    hub.behave()
    fetched.clear()
    attempt()
    assert len(said) == 1 and re.match(r"Going on behind tensor \d+ of", said[0])
    assert [title for title, done, size in fetched if done == size] == [f"someone/base/{name}" for name in shards[2:]]
    assert contents(tmp_path / "out") == contents(tmp_path / "local")


FAULTS = """
import contextlib, io, json, sys
from pipeline import cli
found = {}
for name, arguments in json.loads(sys.argv[1]).items():
    sys.argv = ["medcot", "export", *arguments]
    told = io.StringIO()
    with contextlib.redirect_stderr(told):
        try:
            cli.main()
            status = 0
        except SystemExit as end:
            status = end.code
    found[name] = [status, told.getvalue()]
print(json.dumps(found))
"""


def test_bad_inputs_are_one_sentence_and_exit_status_1(base: Path, adapter: Path, tmp_path: Path) -> None:
    expected: dict[str, tuple[str, list[str]]] = {}

    def case(name: str, message: str, *, change: object = None, damage: object = None) -> None:
        folder = tmp_path / name
        shutil.copytree(base, folder)
        path = folder / "model.safetensors"
        if change is not None:
            tensors = load_file(path)
            change(tensors)  # type: ignore[operator]
            save_file(tensors, path, metadata={"format": "pt"})
        if damage is not None:
            path.write_bytes(damage(path.read_bytes()))  # type: ignore[operator]
        expected[name] = (message, ["--base", str(folder)])

    key = "model.layers.2.mlp.up_proj.weight"
    case("truncated", r"is truncated: it has \d+ bytes of \d+\. Download it again", damage=lambda data: data[:-1000])
    case("header", "its header is no JSON.: download it again", damage=lambda data: data[:8] + b"#" + data[9:])
    case("dtype", f"{key} is stored as I32; export reads", change=lambda t: t.update({key: t[key].to(torch.int32)}))
    case("missing", f"has no tensor {key}: the checkpoint is incomplete", change=lambda t: t.pop(key))
    case("nan", f"{key} holds NaN", change=lambda t: t[key][3].fill_(float("nan")))
    case("infinite", f"{key} holds NaN or inf", change=lambda t: t[key][3].fill_(float("-inf")))
    narrow = save_adapter(tmp_path / "narrow", save_model(tmp_path / "other"))
    expected["adapter"] = ("is an adapter for another model", ["--base", str(base), "--adapter", str(narrow)])
    commands = {
        name: [*arguments, "--out", str(tmp_path / "out" / name), "--quant", "Q8_0"]
        for name, (_, arguments) in expected.items()
    }
    process = child(FAULTS, Path(json.dumps(commands)))
    output, errors = process.communicate()
    assert process.returncode == 0, errors
    for name, (status, told) in json.loads(output).items():
        assert status == 1, (name, told)
        assert re.fullmatch(rf"Error: .*{expected[name][0]}.*\.\n", told), (name, told)
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
