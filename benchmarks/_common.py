"""What the benchmarks share: on which machine, with which versions and of which commit a figure is."""

import importlib.metadata
import json
import os
import platform
import statistics
import subprocess


def hardware():
    """The processor's or accelerator's name and how many cores or devices there are."""
    import jax

    device = jax.devices()[0]
    return processor() if device.platform == "cpu" else f"{jax.device_count()} x {device.device_kind}"


def hardware_of(device):
    """The same for a process that says only the kind of its device."""
    return processor() if device == "cpu" else device


def processor():
    """The processor's name and how many cores this process may use."""
    try:
        with open("/proc/cpuinfo") as lines:
            name = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {cores()} cores"


def cores():
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def versions(*packages):
    """Installed versions of those packages that are there, and Python's."""
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit():
    """The commit of this checkout, followed by -dirty where tracked files differ from it; None outside a repository."""
    folder = os.path.dirname(os.path.abspath(__file__))

    def git(*arguments):
        command = ["git", "--no-optional-locks", "-C", folder, *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def spread(values, digits=2):
    """`median (lowest to highest)` as text."""
    median, low, high = (f"{value:.{digits}f}" for value in (statistics.median(values), min(values), max(values)))
    return f"{median} ({low} to {high})"


def save_record(options, hardware, versions, **measured):
    """Write what a benchmark measured to its `--json` file, where one was asked for, with what a figure must name."""
    if options.json:
        record = {"options": vars(options), "hardware": hardware, "versions": versions, "commit": commit(), **measured}
        with open(options.json, "w") as file:
            json.dump(record, file, indent=2)
