"""The server as a process of its own, as tests and benchmarks use it."""

import json
import subprocess
import sys
import urllib.request
from typing import Any, Self


class EarthEngineServer:
    """Starts the server, tells it how to behave, and asks what it saw.

    Args:
        options: Of its command line.
    """

    def __init__(self, *options: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, '-m', 'tests.earthengine_server', *options],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        self.url = self.process.stdout.readline().strip()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *args: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Stop it; may be called again."""
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            assert stream is not None
            stream.close()

    def set(self, **faults: Any) -> None:
        """Forget what was seen and behave anew: see :meth:`Faults.set`."""
        request = urllib.request.Request(
            f'{self.url}/faults', json.dumps(faults).encode(), method='POST'
        )
        urllib.request.urlopen(request).close()

    def counts(self) -> dict[str, int]:
        """Requests, those served, peak of concurrency, refusals, initialisations."""
        return self._get('/counts')

    def log(self) -> list[dict[str, Any]]:
        """Grid and fault of each request."""
        return self._get('/log')

    def _get(self, path: str) -> Any:
        with urllib.request.urlopen(f'{self.url}{path}') as answer:
            return json.load(answer)
