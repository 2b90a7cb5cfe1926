"""`mechun doctor`: whether this installation can do the work, checked and not assumed."""

import os
import platform
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib import metadata, util
from pathlib import Path

from mechun.cli import options
from mechun.cli.console import Console

OK, LOOK, BROKEN = "ok", "look", "broken"


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Attributes:
        name: What was looked at.
        state: ok; look (it works, but something may surprise); or broken.
        detail: What was found, and the remedy where there is one to take.
    """

    name: str
    state: str
    detail: str


def run_doctor(as_json: options.AsJson = False, debug: options.Debug = False) -> int:  # noqa: ARG001 - main reads --debug
    """Check the installation: versions, devices, the bundled model, what may get in the way."""
    import pandas as pd

    console = Console("doctor", as_json)
    checks = list(examine())
    broken = [check.name for check in checks if check.state == BROKEN]
    frame = pd.DataFrame([asdict(check) for check in checks])
    console.show(frame, {"broken": len(broken), "checks": len(checks)})
    console.close(f"broken: {', '.join(broken)}" if broken else "all well; next: mechun score")
    return 1 if broken else 0


def examine() -> Iterator[Check]:
    """Look at the installation, cheapest first; a check that fails in an unforeseen way counts as broken.

    Cost: imports torch and transformer_lens, and loads the bundled model (about ten seconds).
    """
    yield from check_versions()
    for name, look in CHECKS.items():
        try:
            yield Check(name, *look())
        except Exception as fault:  # whatever it is, the reader should see it in the table
            yield Check(name, BROKEN, f"{type(fault).__name__}: {fault}")


def check_versions(package: str = "mechun") -> Iterator[Check]:
    """The installed version of every requirement, against what the package asks for."""
    from packaging.requirements import Requirement

    for line in metadata.requires(package) or []:
        requirement = Requirement(line)
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            found = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            yield Check(requirement.name, BROKEN, f"not installed; pip install '{requirement}'")
            continue
        fits = requirement.specifier.contains(found, prereleases=True)
        wanted = f"{requirement.specifier}" or "any version"
        yield Check(requirement.name, OK if fits else BROKEN, f"{found}, {wanted} wanted")


def check_circuits() -> tuple[str, str]:
    """Whether `circuits` is ours: an event framework on PyPI goes by the same import name."""
    spec = util.find_spec("circuits")
    if spec is None or not spec.origin:
        return BROKEN, "the package circuits is not there; reinstall mechun"
    folder = Path(spec.origin).parent
    if not (folder / "engine.py").exists():
        return BROKEN, f"{folder} is another package; pip uninstall circuits, then reinstall mechun"
    try:
        other = metadata.version("circuits")
    except metadata.PackageNotFoundError:
        return OK, str(folder)
    return LOOK, f"{folder}, but PyPI's circuits {other} is installed too and may overwrite it"


def _check_python() -> tuple[str, str]:
    return OK, f"{platform.python_version()} on {platform.system()} {platform.machine()}"


def _check_torch() -> tuple[str, str]:
    import torch

    cores = os.cpu_count() or 1
    detail = f"{torch.get_num_threads()} threads on {cores} cores"
    return (LOOK, f"{detail}; more threads than cores") if torch.get_num_threads() > cores else (OK, detail)


def _check_devices() -> tuple[str, str]:
    import torch

    if torch.cuda.is_available():
        return OK, ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
    if torch.backends.mps.is_available():
        return LOOK, "cpu; mps only when asked for with --device mps, for its results can differ"
    return OK, "cpu"


def _check_hub() -> tuple[str, str]:
    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    return OK, "offline: only local folders and the local cache" if offline else "online; HF_HUB_OFFLINE=1 forbids it"


def _check_organism() -> tuple[str, str]:
    from mechun.data.sources import load_facts
    from mechun.models import load_model

    model = load_model("organism")
    return OK, f"{model.name} {model.fingerprint[:8]}, {len(load_facts('organism'))} facts"


def _check_folder() -> tuple[str, str]:
    with tempfile.NamedTemporaryFile(dir=Path.cwd(), prefix=".mechun-"):
        return OK, f"{Path.cwd()} can be written"


CHECKS: dict[str, Callable[[], tuple[str, str]]] = {
    "python": _check_python,
    "package circuits": check_circuits,
    "torch threads": _check_torch,
    "devices": _check_devices,
    "hub": _check_hub,
    "organism": _check_organism,
    "working folder": _check_folder,
}
"""Every check but the versions: a name, and a function that returns the state and the detail."""
