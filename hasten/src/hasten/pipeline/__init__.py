"""How hasten stands in a pipeline: runs, steps and passes, hooks on modules, noise levels of schedulers."""
