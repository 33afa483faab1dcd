"""hasten: faster visual generation on diffusers pipelines, without retraining."""

import lazy_loader

__version__ = "0.2.0"

# The public names stand in `__init__.pyi`; each is imported when it is first used, so that `import hasten` is light.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
