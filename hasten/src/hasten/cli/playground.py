"""`hasten playground`: a page to try settings on."""

from __future__ import annotations

from hasten.cli import options
from hasten.cli.common import console, opened
from hasten.errors import ConfigError

__all__ = ["playground"]


def playground(
    model: options.ModelName = "emoji-flux",
    host: options.Host = "127.0.0.1",
    port: options.Port = 7860,
    device: options.Device = None,
) -> None:
    """Try settings in a browser: full and fast image side by side, what differs, times, and the Python line.

    Example: hasten playground --model emoji-flux
    """
    from hasten.integrations.playground import CSS, Playground, page

    blocks = page(Playground(opened(model, device)))
    console.print(f"[bold]http://{host}:{port}[/bold]", soft_wrap=True)
    try:
        blocks.launch(server_name=host, server_port=port, css=CSS, share=False, footer_links=[], quiet=True)
    except OSError as error:
        raise ConfigError(f"--port {port}: cannot listen there ({error}); give another one") from error
