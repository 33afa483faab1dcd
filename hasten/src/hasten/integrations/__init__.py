"""Where hasten meets what others run: thin, and imported only when asked for.

`batch` generates many images into a folder, on one machine; `ray_batch` does the same on a cluster.
"""
