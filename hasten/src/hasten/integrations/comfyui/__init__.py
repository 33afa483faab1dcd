"""The ComfyUI node pack: `hasten comfyui install PATH` links this folder into `custom_nodes`, which imports it.

`adapters` describes the denoisers as ComfyUI's own classes have them, `nodes` has the nodes.
"""

from hasten.integrations.comfyui.nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
