"""A tiny configuration of every denoiser class that diffusers ships, and what is seen of each at every site.

The classes are listed from the installed diffusers; what has no configuration here is "untested", and a check fails.
"""
