"""Honest numbers: methods, plain samplers and peers on the same model, prompts and seeds, interleaved in one run."""
