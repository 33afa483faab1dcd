"""Where hasten meets what others run: thin, and imported only when asked for.

`batch` generates many images into a folder, `comfyui` is a node pack, `vllm_omni` and `sglang` are plug-ins of these
engines.
"""
