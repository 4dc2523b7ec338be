"""The exceptions of the package.

Each names the argument or file, the value, and the way out. All derive from
:class:`DynamicVisGeoError`: the command line shows them as one line and exits with 2.
"""


class DynamicVisGeoError(Exception):
    """Base class of every error that this package raises on purpose."""


class SpecError(DynamicVisGeoError, ValueError):
    """An argument has a value that cannot be used."""


class SourceError(DynamicVisGeoError):
    """An image, a folder of images, or a points file cannot be used."""


class CheckpointError(DynamicVisGeoError):
    """A checkpoint cannot be fetched, read, or fitted to the model."""


class UpstreamError(DynamicVisGeoError):
    """The official DynamicVis code cannot be found, fetched, or run."""


class OutputError(DynamicVisGeoError):
    """An output cannot be written, or exists already."""
