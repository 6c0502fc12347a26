"""Energy meters on a made-up sysfs tree: what is there is read, what is not is said."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from jpq_export.bench.energy import find_meters


@pytest.fixture(autouse=True)
def no_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A PATH with one empty folder."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    return folder


def put(folder: Path, **files: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in files.items():
        (folder / name).write_text(f"{value}\n", encoding="ascii")
    return folder


def test_nothing_there_is_a_reason(tmp_path: Path) -> None:
    meters = find_meters(tmp_path)
    assert meters.reason is not None
    assert "no readable meter" in meters.reason
    assert meters.around(lambda: 7) == (7, {})


def test_rapl_counts_and_wraps(tmp_path: Path) -> None:
    zone = put(
        tmp_path / "powercap/intel-rapl:0", name="package-0", energy_uj=9_000_000, max_energy_range_uj=10_000_000
    )
    put(tmp_path / "powercap/intel-rapl:0:0", name="core", energy_uj=1, max_energy_range_uj=10)
    put(tmp_path / "powercap/intel-rapl:1", name="package-1", max_energy_range_uj=10)  # its counter is root's
    meters = find_meters(tmp_path)
    assert meters.reason is None
    assert meters.around(lambda: put(zone, energy_uj=9_500_000))[1] == {"rapl package-0": pytest.approx(0.5)}
    assert meters.around(lambda: put(zone, energy_uj=500_000))[1] == {"rapl package-0": pytest.approx(1.0)}


def test_a_jetson_reports_watts_by_rail(tmp_path: Path) -> None:
    put(tmp_path / "hwmon/hwmon0", name="coretemp", in1_label="no", in1_input=1, curr1_input=1)
    chip = put(tmp_path / "hwmon/hwmon3", name="ina3221", in1_label="VDD_IN", in1_input=5000, curr1_input=2000)
    put(chip, in2_label="VDD_CPU", in2_input=1000)  # without a current
    _, joules = find_meters(tmp_path).around(lambda: time.sleep(0.2))
    assert set(joules) == {"ina3221 VDD_IN"}
    assert 10 * 0.2 <= joules["ina3221 VDD_IN"] < 10 * 2  # 10 W for as long as the sleep took
    put(chip, curr1_input=4000)
    _, twice = find_meters(tmp_path).around(lambda: time.sleep(0.2))
    assert twice["ina3221 VDD_IN"] > 20 * 0.2


def test_a_gpu_that_reports_nothing_is_left_out(tmp_path: Path, no_gpu: Path) -> None:
    program = no_gpu / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 30.5\necho '[N/A]'\n")
    program.chmod(0o755)
    _, joules = find_meters(tmp_path).around(lambda: time.sleep(0.1))
    assert set(joules) == {"nvidia-smi GPU 0"}
    assert joules["nvidia-smi GPU 0"] >= 3.05
    program.write_text("#!/bin/sh\nexit 9\n")
    assert find_meters(tmp_path).reason is not None
