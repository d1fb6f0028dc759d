"""Writes kvfold as a kernel repository of the Hugging Face Hub: `python packaging/hub.py FOLDER`, or `make hub`.

    README.md                    the repository's card
    build.toml                   for kernel-builder, with
    torch-ext/kvfold/            the package it builds from, and
    build/torch-cpu/, -cuda/, -rocm/    what `kernels.get_kernel` loads, ready to upload: the package itself and
        metadata.json            its identity and the digest of each file
        kvfold/__init__.py       for versions of `kernels` that look there

The package is that of a wheel without the command line, the demo and the plug-ins of engines, whose imports the Hub does not
allow. This script needs the standard library only.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "kvfold"
LEFT_OUT = ("__main__.py", "demo/", "integrations/vllm/", "integrations/sglang/")
BACKENDS = ("cpu", "cuda", "rocm")

BUILD = """\
[general]
name = "kvfold"
version = {version}
edition = 5
license = "Apache-2.0"
backends = [{backends}]

[torch-noarch]
"""

# One copy of the modules under one name: this package is the one above, whichever of the two a loader opens.
INNER = '''\
"""kvfold, for versions of the `kernels` library that open this folder."""

from pathlib import Path

_outer = Path(__file__).resolve().parents[1] / "__init__.py"
__path__ = [str(_outer.parent)]
exec(compile(_outer.read_text(), str(_outer), "exec"))
'''

CARD = """\
---
library_name: kernels
license: apache-2.0
tags:
  - kernels
---

# kvfold

GPU kernels for the KV-cache compressor of DeepSeek-V4, as Triton code: version {release}, for torch 2.7 and triton 3.5
or newer.

```python
import importlib
from kernels import get_kernel

kvfold = get_kernel("OWNER/kvfold", version={version}, trust_remote_code=True)      # the owner of this repository
patch = importlib.import_module(kvfold.__name__ + ".integrations.transformers").patch
patch(model)          # a DeepSeek-V4 model of transformers 5.17 or newer: model(...) and model.generate(...) as before
```

`kvfold.compress` and all else is as in the package of that name. There are no layers to replace by name: a compressor's state
belongs to the cache, which a layer without state cannot hold. The ROCm variant was compiled and not run.
"""


def modules() -> dict[str, bytes]:
    """The package's files by their path in it."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE).as_posix()
        if not name.startswith(LEFT_OUT):
            found[name] = path.read_bytes()
    return found


def variant(files: dict[str, bytes], backend: str, version: int) -> dict[str, bytes]:
    """The files of one folder of `build/`, by their path in it."""
    files = {**files, "kvfold/__init__.py": INNER.encode()}
    digests = {name: hashlib.sha256(data).digest() for name, data in files.items()}
    # The id names the operators too, so two states of the sources must never share one.
    unique = hashlib.sha256(b"".join(name.encode() + digests[name] for name in sorted(digests))).hexdigest()[:10]
    metadata = {
        "name": "kvfold",
        "id": f"_kvfold_{backend}_{unique}",
        "version": version,
        "license": "Apache-2.0",
        "python-depends": [],
        "backend": {"type": backend},
        "digest": {
            "algorithm": "sha256",
            "files": {name: base64.b64encode(digest).decode() for name, digest in digests.items()},
        },
    }
    return {**files, "metadata.json": (json.dumps(metadata, indent=2) + "\n").encode()}


def layout() -> dict[str, bytes]:
    """Every file of the repository by its path."""
    files = modules()
    release = re.search(r'^__version__ = "(.+)"$', files["_version.py"].decode(), re.MULTILINE)[1]
    version = int(release.split(".")[0])  # of the interface; by the Hub's convention 0 while it may still change
    made = {f"torch-ext/kvfold/{name}": data for name, data in files.items()}
    for backend in BACKENDS:
        made |= {f"build/torch-{backend}/{name}": data for name, data in variant(files, backend, version).items()}
    backends = ", ".join(f'"{backend}"' for backend in BACKENDS)
    made["build.toml"] = BUILD.format(version=version, backends=backends).encode()
    made["README.md"] = CARD.format(version=version, release=release).encode()
    return made


def _ours(build: Path) -> bool:
    return build.is_file() and '\nname = "kvfold"\n' in build.read_text()


def main(arguments: list[str]) -> None:
    if len(arguments) != 1 or arguments[0].startswith("-"):
        sys.exit("usage: python packaging/hub.py FOLDER    (a new one, or one that this command wrote)")
    folder = Path(arguments[0])
    if folder.exists() and not (folder.is_dir() and (not any(folder.iterdir()) or _ours(folder / "build.toml"))):
        sys.exit(f"FOLDER must be new, empty, or one that this command wrote, got {folder}")
    for old in ("build", "torch-ext"):  # a module that is gone must not stay
        shutil.rmtree(folder / old, ignore_errors=True)
    made = layout()
    for name, data in made.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    print(f"{len(made)} files in {folder}")


if __name__ == "__main__":
    main(sys.argv[1:])
