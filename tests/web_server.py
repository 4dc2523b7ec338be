"""A web server of the files of a folder, run as a program: it prints its address."""

import re
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


class Handler(SimpleHTTPRequestHandler):
    """Gives files, and parts of them, on connections that stay open."""

    protocol_version = 'HTTP/1.1'

    def do_GET(self) -> None:
        wanted = re.fullmatch(r'bytes=(\d+)-(\d*)', self.headers.get('Range', ''))
        path = Path(self.translate_path(self.path))
        if wanted is None or not path.is_file():
            super().do_GET()
            return
        content = path.read_bytes()
        first = int(wanted[1])
        part = content[first : int(wanted[2] or len(content)) + 1]
        last = first + len(part) - 1
        self.send_response(206)
        self.send_header('Content-Range', f'bytes {first}-{last}/{len(content)}')
        self.send_header('Content-Length', str(len(part)))
        self.end_headers()
        self.wfile.write(part)

    def log_message(self, *arguments: Any) -> None:
        pass


if __name__ == '__main__':
    handler = partial(Handler, directory=sys.argv[1])
    server = ThreadingHTTPServer(('127.0.0.1', 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(f'http://127.0.0.1:{server.server_address[1]}', flush=True)
    # Ends with the process that has the other end.
    sys.stdin.read()
