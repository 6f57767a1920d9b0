"""What set-up takes on a machine where medcot is not installed yet: packages, and llama.cpp compiled from source.

The build for the CPU comes before the run. The build with CUDA is made next to training, whose work is the GPU's; what
of it is not done when training ends is made next to export and verification, on the cores that they use.
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
    """Seconds; ``cuda`` is 0 where llama.cpp is not built with CUDA. A later session that finds the wheels needs less."""

    model_config = ConfigDict(frozen=True)
    packages: float
    llama: float
    cuda: float = 0.0

    @classmethod
    def on(cls, hardware: Hardware, cpu_gflops: float) -> SetUp:
        """The first time on this machine, whose cores have two hardware threads each."""
        measured_cores = cpu_gflops / MEASURED_CORE_GFLOPS * SECOND_THREAD
        return cls(
            packages=_PACKAGES_SECONDS,
            llama=_CPU_BUILD / measured_cores,
            cuda=_CUDA_BUILD / measured_cores if hardware.llama_on_gpu else 0.0,
        )

    @property
    def before_the_run(self) -> float:
        return self.packages + self.llama
