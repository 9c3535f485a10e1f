"""A wire of some length: a proxy in front of PostgreSQL's socket that holds everything back for a while.

python run_delay.py ORDER, with `target` (the socket's path), `directory` (where to listen) and `delay`
(seconds each way). Two threads for each direction of each connection: one stamps what arrives, one
passes it on when it is due, so that the delay costs time and not throughput.
"""

from __future__ import annotations

import os
import queue
import socket
import threading
import time

from wire import ORDER, say, wait_for_end

Pieces = queue.SimpleQueue[tuple[float, bytes]]


def arrive(source: socket.socket, pieces: Pieces) -> None:
    """Stamp what arrives with the time when it is due at the other end."""
    while data := source.recv(1 << 16):
        pieces.put((time.monotonic() + ORDER["delay"], data))
    pieces.put((time.monotonic() + ORDER["delay"], b""))


def leave(pieces: Pieces, sink: socket.socket) -> None:
    """Pass on what is due; at the end say goodbye."""
    while True:
        due, data = pieces.get()
        time.sleep(max(0.0, due - time.monotonic()))
        if not data:
            sink.shutdown(socket.SHUT_WR)
            return
        sink.sendall(data)


def main() -> None:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(os.path.join(ORDER["directory"], ".s.PGSQL.5432"))
    listener.listen(64)
    threading.Thread(target=lambda: (wait_for_end(), os._exit(0)), daemon=True).start()
    say(open=True)
    while True:
        near, _ = listener.accept()
        far = socket.socket(socket.AF_UNIX)
        far.connect(ORDER["target"])
        for source, sink in ((near, far), (far, near)):
            pieces: Pieces = queue.SimpleQueue()
            threading.Thread(target=arrive, args=[source, pieces], daemon=True).start()
            threading.Thread(target=leave, args=[pieces, sink], daemon=True).start()


main()
