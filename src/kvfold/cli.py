"""The command line: registers the commands of `kvfold.commands`."""

from __future__ import annotations

try:
    import typer

    from .commands import bench, demo, explain, info, replay, verify
except ImportError as error:
    if (error.name or "").partition(".")[0] not in ("typer", "rich"):
        raise
    raise ImportError(f"kvfold's command line needs {error.name}: pip install 'kvfold[cli]'") from error

app = typer.Typer(help="GPU kernels for DeepSeek-V4's KV-cache compressor.", no_args_is_help=True, add_completion=False)
for command in (info.info, verify.verify, explain.explain, replay.replay, bench.bench, demo.demo):
    app.command()(command)
