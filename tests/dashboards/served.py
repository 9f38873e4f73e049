"""A dashboard on a free port, as a real server: for browsers, and for clients that misbehave."""

import socket
import threading
import time

import uvicorn

from dashboards.app import create_app

TOKEN = "right-token"


class Server(uvicorn.Server):
    """Tells the streams to end when it begins to stop."""

    def __init__(self, config, closing):
        super().__init__(config)
        self.closing = closing

    async def shutdown(self, sockets=None):
        self.closing.set()
        await super().shutdown(sockets)


class Served:
    """A dashboard on a free port, which can be stopped and started again."""

    def __init__(self, url, **options):
        self.url = url
        self.options = options
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.base = f"http://127.0.0.1:{self.port}"
        self.start()

    def start(self):
        app = create_app(self.url, token=TOKEN, **self.options)
        config = uvicorn.Config(app, port=self.port, log_level="critical", timeout_graceful_shutdown=3)
        self.server = Server(config, app.state.closing)
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()
        while not self.server.started:
            time.sleep(0.02)

    def stop(self):
        self.server.should_exit = True
        self.thread.join(10)
