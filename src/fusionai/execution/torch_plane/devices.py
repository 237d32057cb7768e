"""The devices that torch can use here, their names and memory, and the CPU threads of this process."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import psutil
import torch

from fusionai.errors import ConfigError

_wanted_threads: int | None = None


def device_names() -> tuple[str, ...]:
    """Return the usable devices, best first: "cuda:0", "cuda:1", "mps", "cpu"."""
    names = [f"cuda:{index}" for index in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    if torch.backends.mps.is_available():
        names.append("mps")
    return (*names, "cpu")


def torch_device(name: str) -> torch.device:
    """Return a device by name. Raises ConfigError when this machine has none of that name."""
    names = device_names()
    if name not in names:
        raise ConfigError(f"device {name!r} is not usable here; usable: {', '.join(names)}")
    return torch.device(name)


def device_description(name: str) -> str:
    """Return a device's name for people, such as "NVIDIA GeForce RTX 3080"."""
    device = torch_device(name)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "mps":
        return f"{_processor_name()} GPU"
    return _processor_name()


def memory_bytes(name: str) -> int:
    """Return a device's total memory in bytes."""
    device = torch_device(name)
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    if device.type == "mps":
        return int(torch.mps.recommended_max_memory())
    return int(psutil.virtual_memory().total)


def set_threads(count: int) -> None:
    """Limit the CPU threads of torch in this process. Raises ConfigError when `count` is below 1."""
    global _wanted_threads
    if count < 1:
        raise ConfigError(f"threads must be at least 1, got {count}")
    _wanted_threads = count
    torch.set_num_threads(count)


def apply_threads() -> None:
    """Make the calling thread keep to the limit of `set_threads`.

    In torch the limit belongs to a thread: a thread that computed before `set_threads` keeps its old limit.
    """
    if _wanted_threads is not None and torch.get_num_threads() != _wanted_threads:
        torch.set_num_threads(_wanted_threads)


def synchronise(device: torch.device) -> None:
    """Wait until a device has finished its queue of work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def release_cached_memory(device: torch.device) -> None:
    """Give memory that torch keeps for reuse back to the system."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()


def _processor_name() -> str:
    """Return the processor's name: from the system, or else from Python's `platform`."""
    try:
        name = _system_processor_name().strip()
    except (OSError, ValueError, subprocess.SubprocessError):
        name = ""
    return name or platform.processor() or platform.machine() or "unknown processor"


def _system_processor_name() -> str:
    if sys.platform == "win32":
        import winreg

        path = r"HARDWARE\DESCRIPTION\System\CentralProcessor\0"
        with winreg.OpenKey(winreg.HKEY_LOCAL_MACHINE, path) as key:
            return str(winreg.QueryValueEx(key, "ProcessorNameString")[0])
    if sys.platform == "darwin":
        command = ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=5).stdout
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
        field, _, value = line.partition(":")
        if field.strip() in ("model name", "Model", "cpu model"):
            return value
    return ""
