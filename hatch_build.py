"""Put the native kernels into a wheel: ``NEURMS_WHEEL=native hatchling build -t wheel``.

Without that variable the wheel is pure. ``CXX`` names the compiler, which may be a cross compiler:
the wheel is for the machine that it compiles for.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

TAGS = {"linux": "manylinux_2_28_{machine}", "darwin": "macosx_11_0_{machine}"}
SHIPPED = "neurms/compiled/native/shipped"


class NativeKernels(BuildHookInterface):  # type: ignore[type-arg]
    """Compile one library for each level of the machine's processors."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile, and add the libraries, the platform's tag and a list of what is inside."""
        asked = os.environ.get("NEURMS_WHEEL", "pure")
        if asked not in ("pure", "native"):
            raise ValueError(f"NEURMS_WHEEL={asked!r} is unknown; choose 'pure' or 'native'")
        if asked == "pure" or version == "editable":
            return
        folder = self._folder()
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        toolchain = _toolchain(Path(self.root))
        cxx = toolchain.compiler()
        if cxx is None:
            raise RuntimeError("NEURMS_WHEEL='native' needs a C++ compiler; set CXX or install g++")
        machine = _machine(cxx)
        for level in toolchain.levels(machine):
            library = folder / f"kernels-{level.name}.so"
            self.app.display_info(f"compiling {library.name} for {machine}")
            toolchain.compile_library(cxx, library, level.flags, strip=True)
            build_data["force_include"][str(library)] = f"{SHIPPED}/{library.name}"
        inventory = folder / "neurms.cdx.json"
        inventory.write_text(_inventory(folder, self.metadata.version, toolchain.version(cxx)))
        build_data["sbom_files"].append(str(inventory))
        build_data["pure_python"] = False
        build_data["tag"] = "py3-none-" + TAGS[sys.platform].format(machine=machine)

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Remove what was compiled."""
        shutil.rmtree(self._folder(), ignore_errors=True)

    def _folder(self) -> Path:
        return Path(self.root, "build", "native")


def _toolchain(root: Path) -> ModuleType:
    """Return the package's module of that name, without the package, which needs torch."""
    path = root / "neurms" / "compiled" / "native" / "toolchain.py"
    spec = importlib.util.spec_from_file_location("neurms_toolchain", path)
    if spec is None or spec.loader is None:
        raise FileNotFoundError(f"{path} cannot be read; build from a complete checkout or sdist")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def _machine(cxx: str) -> str:
    done = subprocess.run([cxx, "-dumpmachine"], capture_output=True, text=True, check=True)
    return done.stdout.strip().partition("-")[0]


def _inventory(folder: Path, version: str, compiler: str) -> str:
    """Return a software bill of materials in CycloneDX's form; it holds no date and no serial."""
    libraries = [
        {
            "type": "library",
            "name": path.name,
            "version": version,
            "hashes": [
                {"alg": "SHA-256", "content": hashlib.sha256(path.read_bytes()).hexdigest()}
            ],
            "licenses": [{"license": {"id": "Apache-2.0"}}],
            "description": "compiled from the C++ sources beside it",
        }
        for path in sorted(folder.glob("*.so"))
    ]
    record = {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {
            "component": {"type": "library", "name": "neurms", "version": version},
            "tools": {"components": [{"type": "application", "name": compiler.splitlines()[0]}]},
        },
        "components": libraries,
    }
    return json.dumps(record, indent=1) + "\n"
