"""Check what ``make dist`` built: ``python -m tools.check_dist`` looks into it and tries the wheel.

The pure wheel is unpacked outside of the checkout, and an interpreter that sees it, torch and what
torch needs, but none of the frameworks, has to import it, train, and say which extra is missing.
Wheels for platforms lie beside it: ``check_native`` and ``check_install`` look into them further.
"""

from __future__ import annotations

import ast
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from email.parser import Parser
from importlib import metadata
from pathlib import Path

from tools.check_native import SHIPPED
from tools.messages import ROOT

__all__ = ["check", "main"]

# Code -> the extra that an ImportError must name when it is not there.
EXTRAS = {
    "from neurms.callbacks import NeuRMSCallback": "lightning",
    "from neurms.callbacks import PreconditionerProfiler": "lightning",
    "from neurms.integrations.lightning import optimizer_config": "lightning",
    "from neurms.integrations.keras import keras_racs": "keras",
    "from neurms.callbacks.keras import NeuRMSCallback": "keras",
    "from neurms.callbacks.transformers import PreconditionerProfiler": "transformers",
    "from neurms.integrations.transformers import trainer_optimizers": "transformers",
    "from neurms import metrics": "report",
}

STEP = """
import torch, neurms
assert not {"lightning", "keras", "rich", "matplotlib", "transformers"} & set(sys.modules)
model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
before = model[0].weight.detach().clone()
for name in ("neurms", "racs"):
    optimizer = neurms.create(name, model, lr=1e-2)
    loss = torch.nn.functional.cross_entropy(model(torch.randn(32, 8)), torch.arange(32) % 4)
    loss.backward()
    optimizer.step()
assert not torch.equal(before, model[0].weight)
print(neurms.__version__, neurms.__file__)
"""


def check(folder: Path) -> list[str]:
    """Return what is wrong with the wheel and the sdist in ``folder``, nothing if all is well."""
    wheels, sdists = sorted(folder.glob("*-any.whl")), sorted(folder.glob("*.tar.gz"))
    if len(wheels) != 1 or len(sdists) != 1:
        found = wheels + sdists
        return [f"{folder} must hold one pure wheel and one sdist, not {found}; run make dist"]
    problems = _sdist_problems(sdists[0])
    for path in folder.glob("*.whl"):
        problems += [f"{path.name}: {problem}" for problem in _wheel_problems(path)]
    with tempfile.TemporaryDirectory() as scratch:
        package, site = Path(scratch, "wheel"), Path(scratch, "site")
        with zipfile.ZipFile(wheels[0]) as wheel:
            wheel.extractall(package)
        _link_torch(site)
        problems += _run_problems(package, site)
    return problems


def _wheel_problems(path: Path) -> list[str]:
    with zipfile.ZipFile(path) as wheel:
        names = set(wheel.namelist())
        described = next(name for name in names if name.endswith(".dist-info/METADATA"))
        about = Parser().parsestr(wheel.read(described).decode())
    source = {p.relative_to(ROOT).as_posix() for p in _package_files()}
    problems = [f"the wheel lacks {name}" for name in sorted(source - names)]
    if not path.name.endswith("-any.whl"):
        names = {name for name in names if not name.startswith(SHIPPED)}
    foreign = {n for n in names - source if ".dist-info/" not in n}
    problems += [f"the wheel holds {name}, which is not the package's" for name in sorted(foreign)]
    if about["Version"] != _version():
        problems.append(f"the wheel is of version {about['Version']}, the source of {_version()}")
    if about.get_all("Requires-Dist", [])[0].partition(";")[0].rstrip("0123456789.>=") != "torch":
        problems.append("the wheel's first requirement is not torch")
    return problems


def _sdist_problems(path: Path) -> list[str]:
    with tarfile.open(path) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    wanted = {"pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff", "PKG-INFO"}
    wanted.add("hatch_build.py")
    wanted |= {p.relative_to(ROOT).as_posix() for p in _package_files()}
    return [f"the sdist lacks {name}" for name in sorted(wanted - names)]


def _package_files() -> list[Path]:
    found = (p for p in (ROOT / "neurms").rglob("*") if p.is_file())
    return [p for p in found if "__pycache__" not in p.parts and p.suffix != ".pyc"]


def _version() -> str:
    tree = ast.parse((ROOT / "neurms" / "version.py").read_text())
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__version__":
            return str(ast.literal_eval(node.value))
    raise LookupError("neurms/version.py assigns no __version__")


def _run_problems(package: Path, site: Path) -> list[str]:
    problems = []
    start = f"import sys; sys.path[:0] = [{str(package)!r}, {str(site)!r}]\n"
    for source in (STEP, *EXTRAS):
        ended = subprocess.run(
            # Without site-packages, the user's folder, or the current one.
            [sys.executable, "-I", "-S", "-c", start + source],
            capture_output=True,
            text=True,
            cwd=package,
            timeout=600,
        )
        if source == STEP:
            if ended.returncode or str(package) not in ended.stdout:
                problems.append(f"the wheel does not train with torch alone:\n{ended.stderr}")
        elif f'pip install "neurms[{EXTRAS[source]}]"' not in ended.stderr.rpartition("\n\n")[2]:
            problems.append(
                f"{source!r} without {EXTRAS[source]} does not name the extra:\n{ended.stderr}"
            )
    return problems


def _link_torch(site: Path) -> None:
    """Make a folder of packages that holds torch and what torch requires."""
    site.mkdir()
    for name in _required("torch"):
        for file in metadata.distribution(name).files or []:
            top = file.parts[0]
            origin = Path(str(metadata.distribution(name).locate_file(top)))
            if top not in ("..", "__pycache__") and not (site / top).exists() and origin.exists():
                (site / top).symlink_to(origin)


def _required(name: str) -> set[str]:
    """Return a distribution and all that it requires, extras left out."""
    seen: set[str] = set()
    waiting = [name]
    while waiting:
        one = waiting.pop()
        if one in seen:
            continue
        try:
            requirements = metadata.requires(one) or []
        except metadata.PackageNotFoundError:
            continue
        seen.add(one)
        waiting += [_name_of(text) for text in requirements if "extra ==" not in text]
    return seen


def _name_of(requirement: str) -> str:
    end = next((i for i, c in enumerate(requirement) if not (c.isalnum() or c in "-_.")), None)
    return _normal(requirement[:end])


def _normal(name: str) -> str:
    return name.lower().replace("_", "-").replace(".", "-")


def main() -> int:
    """Print what is wrong; return 1 if anything is."""
    problems = check(ROOT / "dist")
    print("\n".join(problems) or "dist/: the wheels and the sdist are as they should be")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
