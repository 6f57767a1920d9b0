"""Where medcot runs: Kaggle, Colab or a machine of one's own, and what follows from it.

    python3 pipeline/platforms.py               the service's name, or nothing on a machine of one's own
    python3 pipeline/platforms.py environment   what tells this Python environment from others
    python3 pipeline/platforms.py check         a note when the service lends no GPU; exit 1 and one sentence when its
                                                package index is out of reach

The one place that knows these services' folders and limits; both change them without notice. Standard library alone,
and nothing of ours: scripts/setup.sh asks it before anything is installed.

Sources: https://www.kaggle.com/docs/notebooks, the image of both (https://github.com/googlecolab/backend-info,
https://github.com/Kaggle/docker-python, which builds on Colab's), and what the machines report of themselves.
"""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path

# A TPU's environment names it in one of these.
_TPU_VARIABLES = ("TPU_ACCELERATOR_TYPE", "TPU_NAME", "TPU_WORKER_ID", "COLAB_TPU_ADDR")
_INDEX = "https://pypi.org/simple"
_SECONDS_TO_ANSWER = 5
_MOUNT_DRIVE = (
    "before the run mount Google Drive (from google.colab import drive; drive.mount('/content/drive')), or after it "
    "upload what it made (medcot publish)"
)


@dataclass(frozen=True)
class Service:
    """A service that lends machines: what it takes away again, and where its settings are."""

    name: str
    session_hours: float
    limits: str
    gpu_setting: str
    internet_setting: str


KAGGLE = Service(
    name="Kaggle",
    session_hours=12,
    limits="Kaggle ends a session after 12 hours and keeps 19.5 GiB of /kaggle/working",
    gpu_setting="choose a T4 (on Kaggle: Settings, Accelerator, GPU T4 x2)",
    internet_setting="switch it on (on Kaggle: Settings, Turn on internet; the account needs a verified phone number)",
)
COLAB = Service(
    name="Colab",
    session_hours=12,
    limits="free Colab ends a session after at most 12 hours, often earlier, and keeps nothing",
    gpu_setting="choose a T4 (on Colab: Runtime, Change runtime type, T4 GPU)",
    internet_setting="Colab's machines always have it: try again",
)
_SERVICES = {service.name: service for service in (KAGGLE, COLAB)}


@dataclass(frozen=True)
class Platform:
    """What this machine is and where its room is.

    ``runs`` holds a folder for each run and ``persistence`` says what becomes of it; ``kept`` is where copies outlive
    the machine (None: nowhere, or no need), ``to_keep`` what to do where nothing would be kept; ``scratch`` is where
    downloads and temporary files go (None: where they always go). ``wheels`` is where what set-up has compiled outlives
    the machine, if anywhere, and ``attached`` what the user has brought into this session. A ``service`` brings its own
    PyTorch: packages go next to that, into no virtual environment.
    """

    name: str
    service: Service | None
    runs: Path
    persistence: str
    kept: Path | None = None
    to_keep: str | None = None
    scratch: Path | None = None
    wheels: Path | None = None
    attached: Path | None = None


def detect(environ: Mapping[str, str], root: Path = Path("/")) -> Platform:
    """The platform of a machine with this environment and file system."""
    # Kaggle first: its image is built on Colab's and may carry Colab's variables.
    if "KAGGLE_KERNEL_RUN_TYPE" in environ or (root / "kaggle/working").is_dir():
        return _kaggle(environ, root)
    if "COLAB_RELEASE_TAG" in environ or (root / "content/sample_data").is_dir():
        return _colab(environ, root)
    return Platform(
        name=f"{platform.system()} {platform.machine()}",
        service=None,
        runs=Path(environ.get("MEDCOT_RUNS") or "runs"),
        persistence="stays on this machine",
    )


def here() -> Platform:
    return detect(os.environ)


def environment_id() -> str:
    """Tells Python environments apart, also one that was made anew in the place of another.

    What set-up has installed is in one environment, and what it notes about it must hold for no other.
    """
    import hashlib  # here, because every command imports this module
    import sysconfig

    packages = Path(sysconfig.get_path("purelib"))
    # A container's file system may number its folders anew at any time, and a service's environment is its only one.
    made = packages.stat().st_ino if packages.is_dir() and here().service is None else 0
    return hashlib.sha256(f"{sys.prefix} {sys.version} {packages} {made}".encode()).hexdigest()[:12]


def service_named(name: str) -> Service | None:
    """The service of that name; None for a machine of one's own."""
    return _SERVICES.get(name)


def no_gpu_sentence(environ: Mapping[str, str], root: Path = Path("/")) -> str:
    """What to say of a service's session without GPU; one with a TPU is told that it is of no use."""
    tpu = any(name in environ for name in _TPU_VARIABLES) or (root / "dev/accel0").exists()
    return "this session has no GPU" + (", and medcot does not use its TPU" if tpu else "")


def nvidia_smi(*arguments: str) -> str | None:
    """What the NVIDIA driver's own tool answers; None where there is none, or where it fails.

    PyTorch, asked instead, would keep memory of the GPU for as long as this process lives.
    """
    import shutil  # here, because every command imports this module
    import subprocess

    if not shutil.which("nvidia-smi"):
        return None
    told = subprocess.run(["nvidia-smi", *arguments], capture_output=True, text=True, check=False)
    return told.stdout if told.returncode == 0 else None


def driver_answers() -> bool:
    """Whether there is an NVIDIA driver at work."""
    return nvidia_smi() is not None


def use_scratch(platform: Platform, environ: MutableMapping[str, str]) -> None:
    """Send downloads and temporary files to the platform's scratch folder; what the user has set stays.

    HF_HOME is left alone, because the hub's token lies in it; where the user has set it, his caches stay in it too.
    """
    if platform.scratch is None:
        return
    places = {"MEDCOT_CACHE": "cache", "TMPDIR": "tmp"}
    if "HF_HOME" not in environ:
        places |= {"HF_HUB_CACHE": "hub", "HF_XET_CACHE": "xet", "HF_DATASETS_CACHE": "datasets"}
    for variable, name in places.items():
        if variable not in environ:
            folder = platform.scratch / name
            folder.mkdir(parents=True, exist_ok=True)
            environ[variable] = str(folder)


def _kaggle(environ: Mapping[str, str], root: Path) -> Platform:
    # Only /kaggle/working is kept, and only 19.5 GiB of it; outside it some 60 GiB more are free.
    temp = root / "kaggle/temp"
    writable = os.access(temp if temp.is_dir() else temp.parent, os.W_OK)
    return Platform(
        name=KAGGLE.name,
        service=KAGGLE,
        runs=Path(environ.get("MEDCOT_RUNS") or root / "kaggle/working/runs"),
        persistence="kept as the output of Save Version; of an interactive session only with Settings, Persistence, "
        "Files only",
        scratch=temp if writable else root / "tmp/medcot",
        wheels=root / "kaggle/working/wheels",
        attached=root / "kaggle/input",
    )


def _colab(environ: Mapping[str, str], root: Path) -> Platform:
    drive = root / "content/drive/MyDrive"
    mounted = os.access(drive, os.W_OK)  # a mount that has dropped is none; Path.is_dir would raise
    return Platform(
        name=COLAB.name,
        service=COLAB,
        runs=Path(environ.get("MEDCOT_RUNS") or root / "content/runs"),
        persistence="lost with the machine" + (f", but copied to {drive / 'medcot'} on the way" if mounted else ""),
        kept=drive / "medcot" if mounted else None,
        wheels=drive / "medcot/wheels" if mounted else None,
        to_keep=None if mounted else _MOUNT_DRIVE,
    )


def why_no_index(platform: Platform, environ: Mapping[str, str]) -> str | None:
    """One sentence when a service's machine cannot reach its package index; None when it can, or is no service's.

    pip would try for a minute and then tell in thirty lines.
    """
    if platform.service is None:
        return None
    import socket
    from urllib.parse import urlsplit

    index = urlsplit(environ.get("PIP_INDEX_URL") or _INDEX)
    if not index.hostname:
        return None  # a folder on this machine
    host, port = index.hostname or "", index.port or (80 if index.scheme == "http" else 443)
    try:
        socket.create_connection((host, port), _SECONDS_TO_ANSWER).close()
    except OSError:
        return f"{host} cannot be reached, this notebook has no internet: {platform.service.internet_setting}."
    return None


def main(arguments: list[str]) -> int:
    platform = here()
    if arguments == ["environment"]:
        print(environment_id())
        return 0
    if arguments == ["check"]:
        if platform.service and not driver_answers():
            print(f"setup: {no_gpu_sentence(os.environ)}: {platform.service.gpu_setting}", file=sys.stderr)
        reason = why_no_index(platform, os.environ)
        if reason:
            print(f"Error in setup: {reason}", file=sys.stderr)
        return 1 if reason else 0
    print(platform.service.name if platform.service else "")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
