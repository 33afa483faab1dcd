"""Numbers that are added to the scores of keys: attention then gives some tokens more weight than others.

`softmax(q k + log w)` counts a key as if it were there `w` times. Models whose attention takes an additive mask get the
numbers as that mask, by the arguments of their own forward: FLUX. Qwen-Image's takes none.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from diffusers.models.transformers.transformer_flux import FluxAttention, FluxAttnProcessor, FluxIPAdapterAttnProcessor
from torch import Tensor, nn
from torch.nn import functional

from hasten.errors import AdapterError, TargetError

__all__ = ["check_key_bias", "with_key_bias"]

PROCESSORS = (FluxAttnProcessor, FluxIPAdapterAttnProcessor)
# Of diffusers, which add a mask of real numbers. Flash and Sage attention refuse masks.
BACKENDS = ("native", "_native_math", "_native_efficient")


def check_key_bias(transformer: nn.Module, wanted: str) -> None:
    """Find out whether all attention of a transformer takes a bias, as it is now.

    Args:
        transformer: the transformer.
        wanted: what the bias is for, to begin the error with.

    Raises:
        TargetError: if it does not: another model, processor or backend, or attention spread over several devices.
    """
    layers = [module for module in transformer.modules() if isinstance(module, FluxAttention)]
    if not layers:
        raise TargetError(
            f"{wanted} needs attention that takes a mask of real numbers, as FLUX's does, and not that of "
            f"{type(transformer).__name__}; leave it out for this pipeline"
        )
    for layer in layers:
        processor: Any = layer.processor
        if type(processor) not in PROCESSORS:
            raise TargetError(
                f"{wanted} is known for {' and '.join(kind.__name__ for kind in PROCESSORS)}, and the transformer has "
                f"{type(processor).__name__}; leave it out, or call transformer.set_attn_processor(FluxAttnProcessor())"
            )
        if getattr(processor, "_parallel_config", None) is not None:  # not in diffusers 0.35
            raise TargetError(f"{wanted} cannot run with attention over several devices; leave one of the two out")
        active = processor._attention_backend or _AttentionBackendRegistry.get_active_backend()[0]
        backend = AttentionBackendName(active).value
        if backend not in BACKENDS:
            raise TargetError(
                f"{wanted} needs an attention backend that adds a mask of real numbers ({', '.join(BACKENDS)}), not "
                f"{backend!r}; leave it out, or call transformer.set_attention_backend('native')"
            )


def with_key_bias(arguments: Mapping[str, Any], bias: Tensor) -> dict[str, Any]:
    """Arguments of a FLUX transformer's forward with a bias on the keys of its image tokens.

    Args:
        arguments: by name; `encoder_hidden_states` `[B, T, C]` are the text, whose keys stay as they are.
        bias: `[S]`, in the order of the image tokens, in the dtype of the forward.

    Raises:
        AdapterError: if the pipeline gives a mask of its own.
    """
    given = arguments.get("joint_attention_kwargs") or {}
    if given.get("attention_mask") is not None:
        raise AdapterError(
            "the pipeline was called with an attention_mask in joint_attention_kwargs, in the place of which a bias on "
            "keys would stand; leave one of the two out"
        )
    mask = functional.pad(bias, (arguments["encoder_hidden_states"].shape[1], 0))  # the text comes first
    return {**arguments, "joint_attention_kwargs": {**given, "attention_mask": mask[None, None, None]}}
