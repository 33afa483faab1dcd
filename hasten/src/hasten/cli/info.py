"""`hasten methods` and `hasten models`: what there is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from hasten.bench import subject
from hasten.cli.common import console
from hasten.errors import HastenError

if TYPE_CHECKING:
    from hasten.registry import MethodInfo


def list_methods(
    name: Annotated[str | None, typer.Argument(help="One method, with all of its parameters.")] = None,
) -> None:
    """List the methods, or show the parameters of one."""
    from hasten import methods, registry

    known = methods()
    if name is not None:
        _show_method(registry.info(name))
        return
    table = Table()
    for heading in ("name", "kind", "what it does", "paper", "calibration"):
        table.add_column(heading, overflow="fold")
    for info in known:
        fitted = "needed" if info.needs_calibration else "-"
        table.add_row(f"[bold]{info.name}[/bold]", info.kind, info.summary, info.paper, fitted)
    console.print(table)
    console.print("parameters of one: hasten methods NAME")


def _show_method(info: MethodInfo) -> None:
    console.print(f"[bold]{info.name}[/bold] ({info.kind}): {info.summary}", highlight=False)
    console.print(f"{info.paper}; {'needs a calibration' if info.needs_calibration else 'needs no calibration'}")
    table = Table("parameter", "default", "allowed", "meaning")
    for parameter in info.parameters.values():
        table.add_row(*map(Text, (parameter.name, str(parameter.default), parameter.expected, parameter.meaning)))
    console.print(table)


def list_models() -> None:
    """List the installed models, and the families of transformers that hasten knows."""
    from hasten import models

    table = Table("name", "makes", "size", "what it is", title="installed models", title_justify="left")
    for name in subject.names():
        try:
            model = subject.load(name)
        except HastenError as error:
            table.add_row(name, "-", "-", Text(str(error), "red"))
            continue
        frames = model.call.get("num_frames")
        sizes = ", ".join(f"{height}x{width}" for height, width in model.sizes) or "any"
        table.add_row(name, model.kind, sizes + (f", {frames} frames" if frames else ""), model.about)
    for name in subject.streaming_names():
        try:
            table.add_row(name, "streaming video", "-", subject.load_streaming(name).about)
        except HastenError as error:
            table.add_row(name, "-", "-", Text(str(error), "red"))
    console.print(table)
    families = Table("transformer", "sites", title="families with an adapter", title_justify="left")
    for family, adapter in sorted(models.registered().items()):
        sites = ["hidden", "output", *(["module"] if all(stack.modules for stack in adapter.stacks) else [])]
        families.add_row(family, ", ".join(sites))
    console.print(families)
    console.print("any diffusers pipeline with one of these, or with one whose blocks can be found, is a --model;")
    console.print("so is one with a UNet (sites output and deep)")
