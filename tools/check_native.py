"""Look into a wheel that holds native kernels: ``python -m tools.check_native dist/*linux*.whl``.

Nothing but the C interface may be visible, no stack be executable, no OpenMP runtime be brought
along, and no system be asked for more than the wheel's tag says.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from neurms.compiled.native.signatures import HEADER, signatures
from neurms.compiled.native.toolchain import levels

__all__ = ["libraries", "main", "native_problems"]

SHIPPED = "neurms/compiled/native/shipped/"
GLIBC = (2, 28)
"""What manylinux_2_28 promises."""

EVERYWHERE = {"libc.so.6", "libm.so.6", "libgcc_s.so.1", "libstdc++.so.6"}
"""What torch itself asks of every Linux; the dynamic linker's own name varies."""


def native_problems(wheel: Path) -> list[str]:
    """Return what is wrong with the libraries in a wheel, nothing if all is well."""
    machine = re.search(r"manylinux_2_28_(\w+)\.whl$", wheel.name)
    if machine is None:
        return [f"{wheel.name} is not tagged manylinux_2_28"]
    found, wanted = libraries(wheel), {f"kernels-{lv.name}.so" for lv in levels(machine.group(1))}
    problems = [f"{wheel.name} lacks {name}" for name in sorted(wanted - set(found))]
    problems += [f"{wheel.name} holds {name}" for name in sorted(set(found) - wanted)]
    with tempfile.TemporaryDirectory() as folder:
        for name, content in found.items():
            path = Path(folder, name)
            path.write_bytes(content)
            problems += [f"{name} {problem}" for problem in _library_problems(path)]
    return problems + _audit(wheel)


def libraries(wheel: Path) -> dict[str, bytes]:
    """Return the name and the content of each library in a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.startswith(SHIPPED)]
        return {name.removeprefix(SHIPPED): archive.read(name) for name in names}


def _library_problems(path: Path) -> list[str]:
    from elftools.elf.elffile import ELFFile

    problems = []
    with path.open("rb") as stream:
        elf = ELFFile(stream)
        dynamic = elf.get_section_by_name(".dynamic")
        needed = {tag.needed for tag in dynamic.iter_tags() if tag.entry.d_tag == "DT_NEEDED"}
        if foreign := {n for n in needed - EVERYWHERE if not n.startswith("ld-linux")}:
            problems.append(f"needs {', '.join(sorted(foreign))}")
        symbols = elf.get_section_by_name(".dynsym").iter_symbols()
        visible = {s.name for s in symbols if s["st_shndx"] != "SHN_UNDEF" and s.name}
        if visible != (declared := set(signatures(HEADER.read_text()))):
            problems.append(f"shows other names than kernels.h: {sorted(visible ^ declared)}")
        stacks = [s for s in elf.iter_segments() if s["p_type"] == "PT_GNU_STACK"]
        if len(stacks) != 1 or stacks[0]["p_flags"] & 1:
            problems.append("asks for an executable stack")
    return problems


def _audit(wheel: Path) -> list[str]:
    command = [sys.executable, "-m", "auditwheel", "show", "--json", str(wheel)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return [f"auditwheel refuses {wheel.name}: {done.stderr}"]
    tag = json.loads(done.stdout)["overall_tag"]
    glibc = re.match(r"manylinux_(\d+)_(\d+)_", tag)
    if glibc is None or tuple(map(int, glibc.groups())) > GLIBC:
        return [f"{wheel.name} would be {tag} by its symbols"]
    return []


def main() -> int:
    """Print what is wrong, and the sizes; return 1 if anything is."""
    problems = []
    for path in map(Path, sys.argv[1:]):
        problems += native_problems(path)
        print(f"{path.name}: {path.stat().st_size / 1024:.0f} KiB, unpacked of it")
        for name, content in libraries(path).items():
            print(f"  {name}: {len(content) / 1024:.0f} KiB")
    print("\n".join(problems) or "the libraries are as they should be")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
