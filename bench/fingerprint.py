"""Where a figure comes from: the machine, the software on it and the revision of this code. Nothing here imports torch.

`fingerprint()` is everything that explains a timing. `machine_id()` digests only what stays put between two runs on one
machine (processor and its instruction sets, cores, memory, GPU, versions of Python and torch), because a history keyed
on load or clock would never meet itself again. `revision()` names the commit and, by a digest, uncommitted changes of
the code that measures.
"""

import json
import os
import platform
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from bench.record import Profile

_ROOT = Path(__file__).resolve().parent.parent
# Only what can change a figure: an edited page or test does not make a measurement another one.
_MEASURING = ("dsv3", "bench", "ablations", "pyproject.toml", "constraints.txt")
_INSTRUCTION_SETS = (
    *("avx2", "fma", "avx512f", "avx512_bf16", "avx512_fp16", "avx512_vnni"),
    *("amx_tile", "amx_bf16", "amx_fp16", "amx_int8"),
)
_ARM_INSTRUCTION_SETS = ("asimd", "asimddp", "asimdhp", "bf16", "i8mm", "sve", "sve2")


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """The part of a record that all figures of one run share."""

    machine: str
    revision: str
    profile: Profile
    corpus: str | None = None


def provenance(profile: Profile, corpus: str | None = None) -> Provenance:
    """The provenance of a run here and now; `corpus` is the digest of the text that it reads, if it reads one."""
    return Provenance(machine=machine_id(), revision=revision(), profile=profile, corpus=corpus)


def utc_now() -> str:
    """This moment in UTC, to the second, as ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def fingerprint(corpus: str | None = None, experts: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Everything that explains a figure measured here; what this system does not tell is None.

    `experts`: which dispatch they take here, `dsv3.moe.dispatch.chosen_here()`; to ask for that takes torch.
    """
    return {
        "machine": machine_id(),
        "revision": revision(),
        "corpus": corpus,
        "time": utc_now(),
        **_stable(),
        "python_implementation": platform.python_implementation(),
        "packages": {name: _version(name) for name in ("numpy", "scipy", "transformers", "triton", "pytest-benchmark")},
        "kernel": platform.release(),
        "instruction_sets": instruction_sets(),
        "affinity": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "memory_limit": _read("/sys/fs/cgroup/memory.max"),
        "governor": _read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        "transparent_hugepages": _read("/sys/kernel/mm/transparent_hugepage/enabled"),
        "address_randomisation": _read("/proc/sys/kernel/randomize_va_space"),
        "load": [round(load, 2) for load in os.getloadavg()] if hasattr(os, "getloadavg") else None,
        "steal_share": _steal_share(),
        "expert_dispatch": None if experts is None else dict(experts),
        "threads": {name: os.environ.get(name) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")},
        "gpu": gpus(),
    }


def machine_id() -> str:
    """Twelve hexadecimal digits that name this machine with its Python and torch; equal from run to run."""
    return sha256(json.dumps(_stable(), sort_keys=True).encode()).hexdigest()[:12]


def revision() -> str:
    """The commit, "+" a digest of uncommitted changes to measuring code if any; outside a repository the version."""
    commit = _git("rev-parse", "--short=12", "HEAD")
    if commit is None:
        return f"dsv3-{_version('dsv3') or 'unknown'}"
    changes = (_git("diff", "HEAD", "--", *_MEASURING) or "") + _untracked()
    return commit + (f"+{sha256(changes.encode()).hexdigest()[:8]}" if changes else "")


def save(folder: Path | str, corpus: str | None = None, experts: Mapping[str, str] | None = None) -> Path:
    """Write the fingerprint as `<folder>/machines/<machine id>.json`, whole or not at all, and return the path.

    Without `experts` those of an earlier run stay: this one has none to ask for.
    """
    path = Path(folder) / "machines" / f"{machine_id()}.json"
    known = saved(folder, machine_id()).get("expert_dispatch") if experts is None else experts
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps(fingerprint(corpus, known), indent=2, sort_keys=True) + "\n")
    temporary.replace(path)
    return path


def saved(folder: Path | str, machine: str) -> dict[str, Any]:
    """The fingerprint that `save` left in the folder; where there is none to read, why, in its place."""
    path = Path(folder) / "machines" / f"{machine}.json"
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        return {"fingerprint": f"missing: no machines/{machine}.json"}
    except ValueError as error:  # not JSON, or no text at all
        return {"fingerprint": f"unreadable: machines/{machine}.json ({error})"}
    return found if isinstance(found, dict) else {"fingerprint": f"unreadable: machines/{machine}.json is no object"}


def cpu_vendor() -> str:
    """Who made the processor, as the system spells it; the architecture's name where it does not say."""
    return _cpuinfo("vendor_id") or _cpuinfo("CPU implementer") or platform.machine()


def instruction_sets() -> list[str]:
    """The vector and matrix extensions of this processor on which kernels depend."""
    flags = (_cpuinfo("flags") or _cpuinfo("Features") or "").split()
    return [name for name in _INSTRUCTION_SETS + _ARM_INSTRUCTION_SETS if name in flags]


def gpus() -> list[dict[str, Any]]:
    """Name, memory, driver, power limit and clocks of each NVIDIA GPU; empty without one or without nvidia-ml-py."""
    try:
        import pynvml
    except ImportError:
        return []
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return []
    try:
        return [_gpu(pynvml, index) for index in range(pynvml.nvmlDeviceGetCount())]
    finally:
        pynvml.nvmlShutdown()


def _gpu(nvml: Any, index: int) -> dict[str, Any]:
    device = nvml.nvmlDeviceGetHandleByIndex(index)

    def ask(question: Any, *arguments: Any) -> Any:
        try:
            answer = question(device, *arguments)
        except nvml.NVMLError_NotSupported:
            return None
        return answer.decode() if isinstance(answer, bytes) else answer

    driver = nvml.nvmlSystemGetDriverVersion()
    return {
        "name": ask(nvml.nvmlDeviceGetName),
        "memory": ask(lambda handle: nvml.nvmlDeviceGetMemoryInfo(handle).total),
        "driver": driver.decode() if isinstance(driver, bytes) else driver,
        "vbios": ask(nvml.nvmlDeviceGetVbiosVersion),
        "power_limit_mw": ask(nvml.nvmlDeviceGetEnforcedPowerLimit),
        "max_sm_clock_mhz": ask(nvml.nvmlDeviceGetMaxClockInfo, nvml.NVML_CLOCK_SM),
        "mig": ask(lambda handle: nvml.nvmlDeviceGetMigMode(handle)[0]),
    }


def _stable() -> dict[str, Any]:
    return {
        "processor": _cpuinfo("model name") or platform.processor() or platform.machine(),
        "vendor": cpu_vendor(),
        "architecture": platform.machine(),
        "instruction_sets": instruction_sets(),  # a virtual machine may call two processors by one name
        "system": platform.system(),
        "cores": os.cpu_count(),
        "memory_gib": _memory_gib(),
        "gpus": [gpu["name"] for gpu in gpus()],
        "python": ".".join(platform.python_version_tuple()[:2]),
        "torch": _version("torch"),
    }


def _memory_gib() -> int | None:
    if not hasattr(os, "sysconf"):
        return None
    return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30)


def _cpuinfo(key: str) -> str | None:
    for line in (_read("/proc/cpuinfo") or "").splitlines():
        name, _, value = line.partition(":")
        if name.strip() == key:
            return value.strip()
    return None


def _steal_share() -> float | None:
    """Share of all processor time since boot that the host gave to others (field 8 of /proc/stat's first line)."""
    ticks = [int(tick) for tick in (_read("/proc/stat") or "cpu").splitlines()[0].split()[1:9]]
    return round(ticks[7] / sum(ticks), 4) if len(ticks) == 8 else None


def _read(path: str) -> str | None:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(("git", *arguments), cwd=_ROOT, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _untracked() -> str:
    names = (_git("ls-files", "--others", "--exclude-standard", "--", *_MEASURING) or "").splitlines()
    parts = [f"{name}:{sha256((_ROOT / name).read_bytes()).hexdigest()}" for name in sorted(names)]
    return "\n".join(parts)
