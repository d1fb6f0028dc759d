"""Installs kvfold as a new user does, and uses it: `python packaging/smoke.py WHAT FOLDER [OUT]`, or `make wheel`.

WHAT is a wheel, or a clone such as this. FOLDER becomes a virtual environment. Into it goes WHAT, then its extras, and what
README.md shows is run after each, far from the repository. No GPU is needed; what needs one must say so. Exits with 1 at the
first thing that is not as it should be. OUT gets a line of JSON for each step, with its seconds.
"""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TEXT = "Entries are means of windows. " * 60


class Failed(Exception):
    pass


class User:
    """Runs programs of a virtual environment in an empty folder."""

    def __init__(self, environment: Path, home: Path) -> None:
        self.bin, self.home = environment / "bin", home
        self.steps: list[dict[str, object]] = []

    def run(self, *command: str, exits: int = 0, says: tuple[str, ...] = (), lines: int | None = None) -> None:
        """Checks the exit code, words in what is printed, and how many lines that has."""
        print("$", *(word if len(word) < 60 else "..." for word in command), flush=True)
        program = [str(self.bin / command[0]), *command[1:]]
        # torch says on import that there is no numpy, which neither it nor kvfold asks for.
        quiet = {**os.environ, "PYTHONWARNINGS": "ignore:Failed to initialize NumPy"}
        out, begin = subprocess.PIPE, time.perf_counter()
        done = subprocess.run(program, cwd=self.home, stdout=out, stderr=subprocess.STDOUT, text=True, env=quiet)
        seconds = time.perf_counter() - begin
        print(f"  {seconds:.1f} s", flush=True)
        self.steps.append({"step": " ".join(self._plainly(word) for word in command), "s": round(seconds, 1)})
        missing = [words for words in says if words not in " ".join(done.stdout.split())]
        if done.returncode != exits or missing or (lines is not None and len(done.stdout.splitlines()) != lines):
            print(done.stdout)
            wanted = f"exit code {exits}, {lines or 'any number of'} lines, words {list(says)}"
            raise Failed(f"{' '.join(command[:3])}: exit code {done.returncode}, missing {missing}; wanted {wanted}")

    @staticmethod
    def _plainly(word: str) -> str:
        """Without folders of this machine; a program is README's example."""
        if "\n" in word:
            return "README's example"
        return re.sub(r"^/[^\[]*/", "", word) if len(word) < 200 else "..."

    def install(self, *what: str) -> None:
        constraints = str(ROOT / "constraints.txt")
        self.run("python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-c", constraints, *what)


def use(user: User, wheel: Path, text: Path) -> None:
    """What is run, extra by extra."""
    example = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[0]
    where = "import kvfold, pathlib; print('from', pathlib.Path(kvfold.__file__).parents[1].name)"

    user.install(str(wheel))
    user.run("python", "-c", where, says=("from site-packages",))
    user.run("python", "-c", example, says=("tensor(",))
    user.run("kvfold", "info", exits=2, says=("pip install 'kvfold[cli]'",), lines=1)
    user.run("python", "-m", "kvfold", exits=2, says=("pip install 'kvfold[cli]'",), lines=1)

    user.install(f"{wheel}[cli]")
    user.run("kvfold", "--version", says=(version(),))
    user.run("python", "-m", "kvfold", "--help", says=("info", "verify", "explain", "bench", "demo"))
    user.run("kvfold", "info", says=("fp8_ds_mla_vllm_triton", "Integrations"))
    user.run("kvfold", "info", "--kernels", says=("Kernels for fold rows",))
    user.run("kvfold", "info", "--formats", says=("576*N",))
    user.run("kvfold", "explain", "csa", "--start", "9", "--new", "4", "--format", "fp8_ds_mla", says=("0, 8 to 13",))
    user.run("kvfold", "verify", "--quick", "--device", "cpu", "--json", "verify.json", says=("passed on backend torch in",))
    user.run("kvfold", "demo", exits=2, says=("pip install 'kvfold[demo]'",), lines=1)
    gpu = subprocess.run([str(user.bin / "python"), "-c", "import torch, sys; sys.exit(torch.cuda.is_available())"]).returncode
    if not gpu:
        user.run("kvfold", "bench", "decode", exits=2, says=("needs a GPU",), lines=1)

    user.install(f"{wheel}[demo]")
    user.run("kvfold", "demo", says=("all agree", "bit-identical"))
    user.run("kvfold", "demo", "--text", str(text), "--out", "other", says=("all agree",))
    for picture in ("demo-out", "other"):
        if not (user.home / picture / "kvfold-demo.png").is_file():
            raise Failed(f"no picture in {picture}")


def version() -> str:
    return re.search(r'^__version__ = "(.+)"$', (ROOT / "src" / "kvfold" / "_version.py").read_text(), re.MULTILINE)[1]


def main(arguments: list[str]) -> None:
    if len(arguments) not in (2, 3) or not (arguments[0].endswith(".whl") or Path(arguments[0], "pyproject.toml").is_file()):
        sys.exit("usage: python packaging/smoke.py WHEEL|CLONE FOLDER [OUT]")
    what, environment = (Path(argument).resolve() for argument in arguments[:2])
    venv.create(environment, clear=True, with_pip=True)
    with tempfile.TemporaryDirectory() as home:
        text = Path(home) / "text.txt"
        text.write_text(TEXT)
        user = User(environment, Path(home))
        try:
            use(user, what, text)
        except Failed as problem:
            sys.exit(str(problem))
    if len(arguments) == 3:
        git = ("git", "-C", str(ROOT), "rev-parse", "--short", "HEAD")
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
        about = {"python": platform.python_version(), "cores": len(os.sched_getaffinity(0)), "commit": commit}
        with open(arguments[2], "a") as out:
            for step in user.steps:
                row = {"bench": "newcomer", "from": "wheel" if what.suffix == ".whl" else "clone", **step, **about}
                out.write(json.dumps(row) + "\n")
    print(f"{what.name} is good")


if __name__ == "__main__":
    main(sys.argv[1:])
