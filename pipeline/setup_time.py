"""What set-up takes on a machine with a GPU where medcot is not installed yet: packages, and compiling llama.cpp.

The run begins when the packages are there. llama.cpp is compiled next to training, whose work is the GPU's: first for
the CPU, which export waits for, then with CUDA, which evaluation waits for (pipeline/llama_background.py).
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from pipeline.hardware import Hardware
from pipeline.speeds import MEASURED_CORE_GFLOPS, SECOND_THREAD

# Unsloth's packages on a Kaggle T4 took pip 211 s (the notebook that pipeline/speeds.py cites); and medcot's own.
_PACKAGES_SECONDS = 240.0
# Processor time on the 2-core machine of LOG.md: llama-cpp-python for the CPU, and what CUDA for one architecture adds.
_CPU_BUILD, _CUDA_BUILD = 9 * 60.0, 33 * 60.0


class SetUp(BaseModel):
    """Seconds; ``cuda_build`` is 0 where llama.cpp is not built with CUDA.

    A later session that finds the wheels of this one needs neither build.
    """

    model_config = ConfigDict(frozen=True)
    packages: float
    cpu_build: float
    cuda_build: float

    @classmethod
    def on(cls, hardware: Hardware, cpu_gflops: float) -> SetUp:
        """The first time on this machine, whose cores have two hardware threads each."""
        measured_cores = cpu_gflops / MEASURED_CORE_GFLOPS * SECOND_THREAD
        return cls(
            packages=_PACKAGES_SECONDS,
            cpu_build=_CPU_BUILD / measured_cores,
            cuda_build=_CUDA_BUILD / measured_cores if hardware.gpu_names and hardware.llama_on_gpu else 0.0,
        )

    @property
    def builds(self) -> float:
        return self.cpu_build + self.cuda_build
