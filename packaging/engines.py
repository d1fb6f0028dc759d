"""Makes the folders that tests/engines imports vLLM and SGLang from: `python packaging/engines.py build/engines`.

Wheels come from the package index without their dependencies. Their Python files and metadata are unpacked, no binaries: the
tests run on a CPU. Only the light packages that the engines import are installed, into a folder of their own, so that the
environment stays as it is. Standard library only.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import zipfile
from pathlib import Path

ENGINES = {"vllm": "0.33.0", "sglang": "0.5.23"}

# SGLang looks for the sources of its kernels when it is imported.
WANTED, WHOLE = (".py", ".json", ".txt"), ("sglang/kernels/",)

# What the engines import beside torch, transformers and what these need: versions for torch 2.13 and Python 3.11.
PACKAGES = """
    aiohappyeyeballs==2.7.1 aiohttp==3.14.5 aiosignal==1.4.0 apache-tvm-ffi==0.1.15.post2 attrs==26.1.0 blake3==1.0.11
    cachetools==8.0.2 cbor2==6.3.0 certifi==2026.10.19.post1 charset-normalizer==3.5.3 cloudpickle==3.1.3
    compressed-tensors==0.20.1 dill==0.4.1 distro==1.9.0 einops==0.8.2 fastapi==0.165.0 frozenlist==1.8.0 gguf==0.19.0
    httpcore==1.0.9 httpx==0.28.1 ijson==3.6.0 ipython==9.18.1 jiter==0.19.0 jsonschema-specifications==2025.9.1
    jsonschema==4.26.0 lark==1.3.1 llguidance==1.9.1 loguru==0.7.3 msgspec==0.23.0 multidict==7.2.1 openai-harmony==0.0.8
    openai==3.57.0 opentelemetry-api==1.45.2 orjson==3.13.0 partial-json-parser==0.2.1.1.post7 prometheus-client==0.26.0
    propcache==0.5.4 protobuf==7.36.2 psutil==7.2.2 py-cpuinfo==9.0.0 pybase64==1.5.1 python-json-logger==4.2.0
    pyzmq==27.3.0 referencing==0.37.0 requests==2.34.2 rpds-py==2026.9.1 sentencepiece==0.2.3 setproctitle==1.3.8
    sniffio==1.3.1 starlette==1.10.0 tiktoken==0.14.0 traitlets==5.16.1 urllib3==2.8.0 uvloop==0.23.0 xgrammar==0.2.9
    yarl==1.25.1
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("place", type=Path, help="the folder to fill: wheels, vllm, sglang and packages")
    place = parser.parse_args().place
    for engine, version in ENGINES.items():
        unpack(find_wheel(engine, version, place / "wheels"), place / engine)
    install(place / "packages")


def find_wheel(engine: str, version: str, folder: Path) -> Path:
    """The wheel of an engine: one that lies in the folder, else downloaded to it."""
    pattern = f"{engine}-{version}-*.whl"
    if not list(folder.glob(pattern)):
        pip("download", "--no-deps", "--only-binary=:all:", "--dest", str(folder), f"{engine}=={version}")
    return next(folder.glob(pattern))


def unpack(wheel: Path, folder: Path) -> None:
    """Python files, data that they read, and metadata. A folder that has this wheel already stays as it is."""
    done = folder / ".wheel"
    if done.is_file() and done.read_text() == wheel.name:
        return
    with zipfile.ZipFile(wheel) as archive:
        wanted = [n for n in archive.namelist() if n.endswith(WANTED) or n.startswith(WHOLE) or ".dist-info/" in n]
        archive.extractall(folder, wanted)
    done.write_text(wheel.name)


def install(folder: Path) -> None:
    """The light packages, unless they were installed before from this very list."""
    done = folder / ".packages"
    if not (done.is_file() and done.read_text() == PACKAGES):
        pip("install", "--no-deps", "--upgrade", "--target", str(folder), *PACKAGES.split())
        done.write_text(PACKAGES)


def pip(command: str, *arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", command, "--quiet", "--disable-pip-version-check", *arguments], check=True)


if __name__ == "__main__":
    main()
