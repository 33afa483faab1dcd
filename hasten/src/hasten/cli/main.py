"""The `hasten` command."""

from __future__ import annotations

from typing import Annotated

import typer

from hasten.cli import boundary, certify, comfyui, fit, generate, info, measure, playground, serve, tokens

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Faster visual generation on diffusers pipelines, without retraining.\n\n"
    "Start with [bold]hasten demo[/bold]: it draws with a bundled model, plain and accelerated, and shows both.",
)
app.command()(measure.demo)
app.command("methods")(info.list_methods)
app.command("models")(info.list_models)
app.command()(measure.bench)
app.command()(measure.report)
app.command()(fit.calibrate)
app.command()(fit.tune)
app.command()(generate.generate)
app.command()(serve.serve)
app.command()(playground.playground)
app.command()(certify.certify)
app.command()(certify.certificates)
app.add_typer(tokens.app, name="tokens")
app.add_typer(comfyui.app, name="comfyui")


def _version(wanted: bool) -> None:
    if wanted:
        from hasten import __version__

        print(__version__)
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Say what is done and decided.")] = False,
) -> None:
    """Options that stand before the command."""
    boundary.log_to_terminal(verbose)


def main() -> None:
    """Entry point: errors end as one line, see `hasten.cli.boundary`."""
    boundary.run(app)
