"""The exceptions of the package.

Each names the argument or file, the value, and the way out. All derive from
:class:`DynamicVisGeoError`: the command line shows them as one line and exits with 2.
"""

from collections.abc import Iterator


class DynamicVisGeoError(Exception):
    """Base class of every error that this package raises on purpose."""


class SpecError(DynamicVisGeoError, ValueError):
    """An argument has a value that cannot be used."""


class SourceError(DynamicVisGeoError):
    """An image, a folder of images, or a points file cannot be used."""


class ServerError(SourceError):
    """A server of images cannot be reached, or refuses all that it is asked."""


class CheckpointError(DynamicVisGeoError):
    """A checkpoint cannot be fetched, read, or fitted to the model."""


class UpstreamError(DynamicVisGeoError):
    """The official DynamicVis code cannot be found, fetched, or run."""


class OutputError(DynamicVisGeoError):
    """An output cannot be written, or exists already."""


class RunEndedError(OutputError):
    """Another process has finished or removed the run that this one works on."""


class EarthEngineError(DynamicVisGeoError):
    """Earth Engine did not give what was asked for.

    Attributes:
        chip: The chip that was being fetched, None if no chip was.
        status: HTTP status of the last answer, None if there was none.
        server_message: What the server said, None if it said nothing.
    """

    def __init__(
        self,
        message: str,
        *,
        chip: str | None = None,
        status: int | None = None,
        server_message: str | None = None,
    ) -> None:
        """Keep the message and its parts.

        Args:
            message: All of it, in one line.
            chip: The chip that was being fetched.
            status: HTTP status of the last answer.
            server_message: Words of the server.
        """
        super().__init__(message)
        self.chip = chip
        self.status = status
        self.server_message = server_message


class AuthenticationError(EarthEngineError):
    """There are no usable credentials for Earth Engine."""


class ProjectError(EarthEngineError):
    """The Google Cloud project is missing, or not registered for Earth Engine."""


class PermissionDeniedError(EarthEngineError):
    """The account may not do this, or may not read this collection."""


class SessionError(EarthEngineError):
    """Earth Engine is already initialised for another server in this process."""


class NoImageryError(EarthEngineError):
    """No scene has a pixel for this place and time."""


class QuotaError(EarthEngineError):
    """Earth Engine kept answering that a quota is used up."""


class RequestTooLargeError(EarthEngineError):
    """Earth Engine cannot compute this in one request, however small."""


class ComputationError(EarthEngineError):
    """Earth Engine kept failing on one request, while it answered another."""


class UnavailableError(EarthEngineError):
    """Earth Engine could not be reached, or kept failing."""


def causes_of(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error, and those that led to it, the root last.

    Args:
        error: The error; None yields none.
    """
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def one_line(error: BaseException) -> str:
    """Join the lines of an error's message.

    Args:
        error: Of any library.

    Returns:
        The message in one line.
    """
    return ' '.join(str(error).split())
