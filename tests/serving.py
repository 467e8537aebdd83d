"""Serves the app to tests."""

import socket
import threading
import time


def serve_in_background(app):
    """Serve an app on a free port; return its address, and what stops it."""
    import uvicorn

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="critical", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.05)

    def stop():
        server.should_exit = True
        thread.join(20)

    return f"http://127.0.0.1:{port}", stop
