"""What a benchmark asks of the machine: memory speed, energy counters, the page cache."""

import os
from pathlib import Path

import pytest

from bench.bandwidth import measure_bandwidth
from bench.cold_load import cold_load
from bench.energy import energy_meter


def test_memory_delivers_some_gigabytes_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.bandwidth._ARRAY_BYTES", 64 << 20)
    found = measure_bandwidth(2)
    assert found.threads == 2 and found.array_bytes == 64 << 20 and len(found.bytes_per_second) == 5
    assert 1e8 < found.best < 1e13


def test_energy_is_the_difference_of_the_packages_counters(tmp_path: Path) -> None:
    def count(zone: str, microjoules: int) -> None:
        (tmp_path / zone).mkdir(exist_ok=True)
        (tmp_path / zone / "energy_uj").write_text(f"{microjoules}\n")

    count("intel-rapl:0", 5_000_000)
    count("intel-rapl:1", 1_000_000)
    count("intel-rapl:0:0", 7)  # the cores, which are a part of package 0
    meter = energy_meter(on_gpu=False, powercap=tmp_path)
    assert meter.of(lambda: count("intel-rapl:0", 8_000_000)) == 3.0
    assert meter.of(lambda: count("intel-rapl:0", 10)) is None  # the counter ran over
    assert "2 processor package(s)" in meter.source


def test_without_a_counter_the_reason_is_said(tmp_path: Path) -> None:
    meter = energy_meter(on_gpu=False, powercap=tmp_path)
    assert meter.of(lambda: None) is None and "no RAPL" in meter.source


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_counter_for_root_only_is_said(tmp_path: Path) -> None:
    (tmp_path / "intel-rapl:0").mkdir()
    (tmp_path / "intel-rapl:0" / "energy_uj").touch(0o000)
    assert "root only" in energy_meter(on_gpu=False, powercap=tmp_path).source


def test_a_cold_load_reads_from_the_disk_what_a_warm_one_does_not(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(os.urandom(8 << 20))
    reading = cold_load(path, path.read_bytes)
    assert reading.seconds is not None and reading.seconds > 0
    nothing = cold_load(path, lambda: None)  # as if all had been in memory
    if Path("/proc/self/io").exists():
        assert nothing.note is not None and "not quite cold" in nothing.note
