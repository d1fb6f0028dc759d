"""Makes a wheel of packages of prebuilt kernels: `python packaging/kernels.py FOLDER OUT`, or `make kernels`.

FOLDER has a package of `kvfold prebuild` in each of its folders. Installed, they lie side by side in `kvfold_kernels`, where
kvfold finds them; the wheel has no code of its own, and wheels for other GPUs and other versions of Triton may lie beside it.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MANIFEST = "prebuilt.json"
PROJECT = """
[build-system]
requires = ["hatchling>=1.27"]
build-backend = "hatchling.build"

[project]
name = "{name}"
version = "{version}"
description = "Compiled GPU kernels of kvfold {version}: {words}"
license = "Apache-2.0"
requires-python = ">=3.10"
dependencies = ["kvfold=={version}"]

[tool.hatch.build.targets.wheel.force-include]
{folders}
"""


def slug(manifest: dict) -> str:
    """What a package is for, as a name."""
    return f"{manifest['target']}-{manifest['multiprocessors']}-triton{manifest['triton']}"


def project(folder: Path) -> str:
    """The text of pyproject.toml, for all packages below a folder."""
    found = {path.parent.resolve(): json.loads(path.read_text()) for path in sorted(folder.glob(f"*/{MANIFEST}"))}
    if not found:
        raise SystemExit(f"{folder} must have packages of kvfold prebuild in folders, found none")
    versions = {manifest["about"]["kvfold"] for manifest in found.values()}
    if len(versions) > 1:
        raise SystemExit(f"{folder} must have packages of one version of kvfold, found {', '.join(sorted(versions))}")
    names = [slug(manifest) for manifest in found.values()]
    if len(set(names)) < len(names):
        raise SystemExit(f"{folder} must have one package for each target and Triton, found {', '.join(names)}")
    targets = sorted({manifest["target"] for manifest in found.values()})
    return PROJECT.format(
        name="kvfold-kernels-" + re.sub(r"[^a-z0-9]+", "-", "-".join(names).lower()),
        version=versions.pop(),
        words=", ".join(targets),
        folders="\n".join(f'"{path}" = "kvfold_kernels/{name}"' for path, name in zip(found, names, strict=True)),
    )


def main() -> None:
    folder, out = map(Path, sys.argv[1:])
    with tempfile.TemporaryDirectory() as place:
        Path(place, "pyproject.toml").write_text(project(folder))
        command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(out.resolve())]
        subprocess.run(command, cwd=place, check=True)


if __name__ == "__main__":
    main()
