"""`hasten comfyui install`: the node pack into a ComfyUI."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from hasten.cli.common import console
from hasten.errors import ConfigError, FileError

app = typer.Typer(no_args_is_help=True, help="Nodes for ComfyUI.")


@app.callback()
def _group() -> None:
    """Keeps `install` a command of its own."""


@app.command()
def install(
    path: Annotated[Path, typer.Argument(help="ComfyUI's folder, the one with main.py and custom_nodes.")],
) -> None:
    """Link the nodes into custom_nodes; ComfyUI has to run in an environment where hasten is installed.

    Example: hasten comfyui install ~/ComfyUI
    """
    nodes = path / "custom_nodes"
    if not nodes.is_dir() or not (path / "main.py").is_file():
        raise ConfigError(f"{path} is no ComfyUI: it lacks main.py or custom_nodes; give the folder that has both")
    spec = find_spec("hasten.integrations")
    assert spec is not None
    source = Path((spec.submodule_search_locations or [""])[0]) / "comfyui"
    link = nodes / "hasten"
    if link.is_symlink() and link.resolve() == source.resolve():
        console.print(f"{link} is there already", soft_wrap=True)
        return
    if link.exists() or link.is_symlink():
        raise ConfigError(f"{link} is there, and is not this installation's; remove it first")
    try:
        link.symlink_to(source, target_is_directory=True)
    except OSError as error:
        raise FileError(
            f"{link}: cannot be made ({error.strerror or error}); choose a folder that you may write"
        ) from error
    console.print(f"linked: [bold]{link}[/bold]; restart ComfyUI, its nodes are under 'hasten'", soft_wrap=True)
    console.print(f"workflows: [bold]{source / 'workflows'}[/bold]", soft_wrap=True)
    console.print(f"calibrations and LEAP files go to [bold]{path / 'models' / 'hasten'}[/bold]", soft_wrap=True)
