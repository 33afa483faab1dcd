"""How robust are person detectors to clothing, over whole walks?

A person walks past a camera, in clothes whose texture is the worst possible one for the detector that watches. Over the
whole walking sequence, with the body moving, the cloth folding and the light changing, in how many frames is the person
still found, and how much of the loss do defences win back?

What holds for everything here:

* Simulation only. Textures are rendered onto simulated bodies and judged by public detectors on the same machine.
* Sequences, not single images: a result is about a walk, frame by frame.
* An attack never comes alone: every measured attack is paired with defences against it, and both are reported.

Where things are: `drape.scene` renders a walk to buffers, `drape.texture` and `drape.gamut` make printable textures,
`drape.objective` and `drape.optimise` find the worst ones, `drape.controls` has what they are compared with,
`drape.detectors` the detectors, `drape.defences` the defences, `drape.metrics` and `drape.evaluate` the measures,
`drape.report` the page, `drape.cli` the command line.
"""

__version__ = "0.1.0"
