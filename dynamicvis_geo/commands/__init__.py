"""The commands of ``dynamicvis-geo``, a module each.

``add_arguments(parser)`` adds a command's arguments, and ``run(arguments)`` does it and
may return an exit code. What is heavy (PyTorch, TorchGeo, GeoPandas) is imported within
``run``, so that ``--help`` is quick.
"""

#: The commands in the order in which help lists them, with what each of them does.
COMMANDS = {
    'embed': 'embed chips of GeoTIFFs or of Earth Engine composites',
    'merge': 'make an output of what unfinished runs have left',
    'fetch': 'fetch chips from Earth Engine into a cache',
    'cache': 'show or empty a cache of chips',
    'demo': 'embed a synthetic scene with random weights',
    'predict': 'run what a YAML file describes, every class configurable',
    'probe': 'score embeddings on labelled plots',
    'predict-map': 'turn feature maps into class maps',
    'similar': 'find the places that are most like examples',
    'change': 'find what has changed between two dates',
    'plot': 'draw images, feature maps and embeddings',
    'report': 'write a page that tells of a run',
    'card': 'write a dataset card, as Hugging Face shows it',
    'info': 'show the configuration, or inspect a checkpoint',
    'verify': 'compare this implementation with the official code',
    'convert': 'write the backbone of a checkpoint as safetensors',
    'completion': 'let a shell complete commands, options and files',
}

#: What the shell sees if the images of some chips could not be had.
SOME_FAILED = 3
