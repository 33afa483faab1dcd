"""How robust are person detectors to clothing? This package will measure it; this release contains no functions yet.

The question: a person walks past a camera, wearing clothes whose texture is the worst possible one for the detector
that watches. Over the whole walking sequence, with the body moving, the cloth folding and the light changing, in how
many frames is the person still found, and how much of the loss do defences win back?

What holds for everything that will be added here:

* Simulation only. Textures are rendered onto simulated bodies and judged by detectors that run on the same machine.
* Sequences, not single pictures: a result is about a walk, frame by frame.
* An attack never comes alone: every measured attack is paired with a defence against it, and both are reported.
"""

__version__ = "0.0.1"
