"""Starts the server and prints its URL; stops when its input is closed."""

import argparse
import io
import json
import socket
import struct
import sys
import threading
import time
from contextlib import suppress
from functools import lru_cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from typing import Any

import numpy as np

from tests.earthengine_server.evaluate import EvaluationError, Evaluator
from tests.earthengine_server.faults import Faults
from tests.earthengine_server.world import places

FAULTS = Faults()
LARGEST = 48 * 2**20
#: Pixels that are computed at a time, and how many requests may do so: a pixel takes
#: hundreds of bytes meanwhile, and many requests may be in flight.
STRIP = 2**16
COMPUTING = threading.Semaphore(2)

_PATHS = {
    'algorithms.list': ('GET', 'v1/{+parent}/algorithms', 'parent', 'algorithms'),
    'value.compute': ('POST', 'v1/{+project}/value:compute', 'project', 'value'),
    'image.computePixels': (
        'POST',
        'v1/{+project}/image:computePixels',
        'project',
        'image',
    ),
}


def discovery(url: str) -> bytes:
    """Describe the interface to the client library, as far as it is here."""
    resources: dict = {}
    for name, (method, path, parameter, resource) in _PATHS.items():
        parameters = {
            parameter: {
                'type': 'string',
                'location': 'path',
                'required': True,
                'pattern': '^projects/[^/]+$',
            }
        }
        description = {
            'id': f'earthengine.projects.{name}',
            'path': path,
            'httpMethod': method,
            'parameters': parameters,
            'parameterOrder': [parameter],
            'response': {'$ref': 'Any'},
        }
        if method == 'POST':
            description['request'] = {'$ref': 'Any'}
        if name == 'algorithms.list':
            parameters['pageToken'] = {'type': 'string', 'location': 'query'}
        methods = resources.setdefault(resource, {'methods': {}})['methods']
        methods[name.split('.')[1]] = description
    document = {
        'kind': 'discovery#restDescription',
        'name': 'earthengine',
        'version': 'v1',
        'rootUrl': f'{url}/',
        'servicePath': '',
        'baseUrl': f'{url}/',
        'batchPath': 'batch',
        'parameters': {'prettyPrint': {'type': 'boolean', 'location': 'query'}},
        'schemas': {'Any': {'id': 'Any', 'type': 'object'}},
        'resources': {'projects': {'resources': resources}},
    }
    return json.dumps(document).encode()


@lru_cache
def algorithms() -> bytes:
    """The functions of Earth Engine, from the client library's own tests."""
    return (files('ee') / 'tests' / 'algorithms.json').read_bytes()


class RefusalError(Exception):
    """An answer that is an error."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def compute(body: dict) -> bytes:
    """Compute pixels as a NumPy file."""
    grid, bands = body['grid'], body['bandIds']
    width, height = grid['dimensions']['width'], grid['dimensions']['height']
    crs = grid.get('crsCode') or grid['crsWkt']
    size = width * height * len(bands) * 3
    if size > LARGEST:
        raise RefusalError(
            400,
            f'Total request size ({size} bytes) must be less than or equal to '
            f'{LARGEST} bytes.',
        )
    if FAST:
        return blank(height, width, tuple(bands))
    lon, lat = places(crs, grid['affineTransform'], height, width)
    rows = max(1, STRIP // width)
    strips = []
    for top in range(0, height, rows):
        strip = slice(top, top + rows)
        with COMPUTING:
            strips.append(evaluate(body, bands, lon[strip], lat[strip]))
    return as_npy(np.concatenate(strips))


def evaluate(body: dict, bands: list[str], lon: Any, lat: Any) -> Any:
    """Compute the pixels of some places as a structured array."""
    try:
        image = Evaluator(body['expression'], lon, lat).run()
    except EvaluationError as error:
        raise RefusalError(400, str(error)) from error
    missing = [band for band in bands if band not in image.bands]
    if missing:
        raise RefusalError(400, f"Band '{missing[0]}' does not exist.")
    layers = {band: image.bands[band]() for band in bands}
    pixels = np.zeros(lon.shape, [(band, layers[band][0].dtype) for band in bands])
    for band, (values, valid) in layers.items():
        pixels[band] = np.where(valid, values, 0)
    return pixels


@lru_cache
def blank(height: int, width: int, bands: tuple[str, ...]) -> bytes:
    """Pixels that cost nothing, to measure everything else."""
    pixels = np.zeros((height, width), [(band, np.uint16) for band in bands])
    for i, band in enumerate(bands):
        pixels[band] = np.arange(height * width).reshape(height, width) % 3000 + i
    return as_npy(pixels)


@lru_cache
def rectangle(side: int) -> bytes:
    """Three bands of a square as the JSON of a feature."""
    values = (np.arange(side * side) % 3000).reshape(side, side).tolist()
    properties = dict.fromkeys(('B4', 'B3', 'B2'), values)
    feature = {'type': 'Feature', 'geometry': None, 'properties': properties}
    return json.dumps({'result': feature}).encode()


def as_npy(pixels: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, pixels)
    return file.getvalue()


class Handler(BaseHTTPRequestHandler):
    """Answers one connection."""

    protocol_version = 'HTTP/1.1'
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        path = self.path.split('?')[0]
        if path == '/$discovery/rest':
            with FAULTS.lock:
                FAULTS.counts['initialized'] += 1
            self.answer(200, discovery(f'http://{self.headers["Host"]}'))
        elif path.endswith('/algorithms'):
            self.answer(200, algorithms())
        elif path == '/counts':
            self.answer(200, json.dumps(FAULTS.counts).encode())
        elif path == '/log':
            self.answer(200, json.dumps([*FAULTS.log]).encode())
        else:
            self.refuse(404, f'No such path: {path}')

    def do_POST(self) -> None:
        length = int(self.headers.get('Content-Length', 0))
        body = json.loads(self.rfile.read(length) or b'{}')
        if self.path == '/faults':
            FAULTS.set(**body)
            self.answer(200, b'{}')
        elif 'value:compute' in self.path and FAST:
            # What sampleRectangle() would give for a chip, to compare with.
            with FAULTS.request({}):
                FAULTS.wait()
                self.answer(200, rectangle(SIDE))
        elif 'value:compute' in self.path:
            with FAULTS.request({}):
                value = Evaluator(body['expression'], None, None).run()
                self.answer(200, json.dumps({'result': value}).encode())
        elif 'image:computePixels' in self.path:
            with FAULTS.request(body['grid']) as fault:
                self.pixels(body, fault)
        else:
            self.refuse(404, f'No such path: {self.path}')

    def pixels(self, body: dict, fault: Any) -> None:
        # A refusal takes no time; all else takes as long as it takes.
        if fault != 429:
            FAULTS.wait()
        if isinstance(fault, int):
            self.refuse(fault, FAULTS.message or f'Told to fail with {fault}.')
        elif fault == 'html':
            self.answer(200, b'<html>Sign in to this network</html>', 'text/html')
        elif fault == 'hang':
            time.sleep(FAULTS.hang_s)
            self.close_connection = True
        elif fault in ('dripping head', 'dripping body'):
            self.drip(fault == 'dripping head')
        elif fault == 'reset':
            # Closing with a linger of zero seconds sends a reset.
            option = struct.pack('ii', 1, 0)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, option)
            self.connection.shutdown(socket.SHUT_RD)
            self.close_connection = True
        elif fault == 'close':
            self.close_connection = True
        else:
            try:
                content = compute(body)
            except RefusalError as refusal:
                self.refuse(refusal.status, str(refusal))
                return
            if fault == 'short':
                content = content[: len(content) // 2]
            if fault == 'truncated':
                self.head(200, len(content), 'application/octet-stream')
                self.wfile.write(content[: len(content) // 2])
                self.close_connection = True
            else:
                self.answer(200, content, 'application/octet-stream')

    def drip(self, head: bool) -> None:
        """Send a byte ten times a second, and never an end."""
        begin = b'HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n'
        self.wfile.write(begin if head else begin + b'\r\n')
        for _ in range(int(10 * FAULTS.hang_s)):
            self.wfile.write(b'x')
            time.sleep(0.1)
        self.close_connection = True

    def refuse(self, status: int, message: str) -> None:
        error = {'code': status, 'message': message, 'status': 'FAILED'}
        self.answer(status, json.dumps({'error': error}).encode())

    def answer(self, status: int, body: bytes, kind: str = 'application/json') -> None:
        self.head(status, len(body), kind)
        self.wfile.write(body)

    def head(self, status: int, length: int, kind: str) -> None:
        self.send_response(status)
        self.send_header('Content-Type', kind)
        self.send_header('Content-Length', str(length))
        if status >= 400 and FAULTS.retry_after is not None:
            self.send_header('Retry-After', str(FAULTS.retry_after))
        self.end_headers()

    def log_message(self, *args: Any) -> None:
        pass


class Server(ThreadingHTTPServer):
    """Answers many connections at a time."""

    daemon_threads = True
    request_queue_size = 256

    def handle_error(self, request: Any, client_address: Any) -> None:
        # Clients that went away are part of the tests.
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


parser = argparse.ArgumentParser(prog='python -m tests.earthengine_server')
parser.add_argument('--port', type=int, default=0)
parser.add_argument('--latency', type=float, default=0.0, help='seconds an answer')
parser.add_argument('--limit', type=int, help='requests at a time')
parser.add_argument('--fast', action='store_true', help='the same pixels everywhere')
parser.add_argument('--side', type=int, default=512, help='of a JSON answer')
arguments = parser.parse_args()
FAST, SIDE = arguments.fast, arguments.side
FAULTS.set(latency=arguments.latency, limit=arguments.limit)
server = Server(('127.0.0.1', arguments.port), Handler)
print(f'http://127.0.0.1:{server.server_port}', flush=True)
threading.Thread(target=server.serve_forever, daemon=True).start()
with suppress(KeyboardInterrupt):
    sys.stdin.read()
