"""SGLang: hasten in its diffusers back-end, registered by the entry point `sglang.multimodal_gen.plugins`.

    sglang serve --model-path MODEL --backend diffusers --cache-dit-config hasten.yaml

where the file has an entry `hasten`, whose content is that of a configuration (see `hasten.load`):

    hasten:
      computed_steps: 9
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from hasten.acceleration import accelerate
from hasten.errors import ConfigError
from hasten.quality.configuration import configuration_of, read

__all__ = ["TARGET", "apply", "register"]

log = logging.getLogger("hasten")

ENTRY = "hasten"
TARGET = "sglang.multimodal_gen.runtime.pipelines.diffusers_pipeline.DiffusersPipeline._apply_cache_dit"


def register() -> None:
    """Stand around the place where the engine switches its cache on."""
    from sglang.multimodal_gen.runtime.platforms.plugins import HookRegistry  # type: ignore[import-not-found]
    from sglang.srt.plugins.hook_registry import HookType  # type: ignore[import-not-found]

    HookRegistry.register(TARGET, apply, HookType.AROUND)


def apply(original: Callable[..., Any], engine: Any, pipe: Any, server_args: Any) -> Any:
    """The pipeline, accelerated if the engine's cache configuration has an entry `hasten`.

    Raises:
        ConfigError, CertificateError: for a configuration that cannot work here.
    """
    given = server_args.cache_dit_config
    if isinstance(given, (str, Path)) and Path(given).is_file():
        content, folder = read(Path(given)), Path(given).parent
    else:
        content, folder = given, Path()
    if not isinstance(content, Mapping) or ENTRY not in content:
        return original(engine, pipe, server_args)
    if len(content) > 1:
        others = ", ".join(sorted(map(str, set(content) - {ENTRY})))
        raise ConfigError(f"two caches would each forecast from the other's forecasts; leave {others} or hasten out")
    run = accelerate(pipe, configuration_of(content[ENTRY], f"{ENTRY} of {given}", folder))
    log.info("%r", run)
    return pipe
