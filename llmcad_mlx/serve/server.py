"""The server as a whole: a socket, a worker with the model, uvicorn between them, and an orderly end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import threading
from collections.abc import Callable, Generator
from concurrent.futures import Future
from types import FrameType

import uvicorn

from llmcad_mlx.api import Engine
from llmcad_mlx.errors import UsageError
from llmcad_mlx.serve.app import Api
from llmcad_mlx.serve.jobs import FairQueue, Job
from llmcad_mlx.serve.limits import protocol_with
from llmcad_mlx.serve.metrics import Metrics
from llmcad_mlx.serve.options import ServerSettings
from llmcad_mlx.serve.prompt_cache import PromptCache
from llmcad_mlx.serve.worker import Ending, ServedModel, Worker

_log = logging.getLogger(__name__)
_MAX_HEAD_BYTES = 32 << 10
_MAX_CONNECTIONS = 1000
_IDLE_S = 30
_LINGER_S = 5  # how long answers that were broken off may take to reach their clients


class LlmServer:
    """Serves one model.

    server = LlmServer(settings, load, "name")
    server.start()   # takes the address, loads the model; raises what either raises
    server.run()     # serves until SIGINT, SIGTERM or `stop`
    """

    def __init__(self, settings: ServerSettings, load: Callable[[], Engine], name: str) -> None:
        """`load` runs on the worker's thread. `name`: what the model is called towards clients."""
        self._settings = settings
        self._queue: FairQueue[Job] = FairQueue(settings.max_queue)
        self._metrics = Metrics()
        cache = PromptCache(settings.prompt_cache_bytes)
        self._worker = Worker(load, self._queue, self._metrics, name, cache)
        self._socket: socket.socket | None = None
        self._model: ServedModel | None = None
        self._uvicorn: _Uvicorn | None = None
        self.url = ""
        """Where the server is, after `start`."""

    def start(self) -> ServedModel:
        """Take the address, then load. Raises UsageError for an address that is not to be had."""
        host = self._settings.host
        self._socket = _bind(host, self._settings.port)
        port = self._socket.getsockname()[1]
        self.url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        try:
            self._model = self._worker.start()
        except BaseException:
            self._socket.close()
            raise
        return self._model

    def run(self) -> Ending:
        """Serve until told to stop. Raises KeyboardInterrupt when told so twice: a generation may still run."""
        if self._socket is None or self._model is None:
            raise RuntimeError("start the server before running it")
        api = Api(self._settings, self._model, self._worker, self._queue, self._metrics)
        config = uvicorn.Config(
            api.asgi(),
            http=protocol_with(self._settings.header_s),
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,  # anybody can write such a header
            h11_max_incomplete_event_size=_MAX_HEAD_BYTES,
            limit_concurrency=_MAX_CONNECTIONS,
            timeout_keep_alive=_IDLE_S,
            timeout_graceful_shutdown=_LINGER_S,
        )
        self._uvicorn = _Uvicorn(config, self._worker)
        try:
            self._uvicorn.run(sockets=[self._socket])
        finally:
            api.close()
            self._socket.close()
        if self._uvicorn.force_exit:
            raise KeyboardInterrupt
        return self._uvicorn.wait_for_worker()

    def stop(self) -> None:
        """Make `run` return; from any thread."""
        if self._uvicorn is not None:
            self._uvicorn.stop()


class _Uvicorn(uvicorn.Server):
    """uvicorn, with signals that end generations too and leave the exit code alone."""

    def __init__(self, config: uvicorn.Config, worker: Worker) -> None:
        super().__init__(config)
        self._worker = worker
        self._ending: Future[Ending] = Future()
        # On a thread of its own: that may last a round, and the event loop has answers to send.
        self._closing = threading.Thread(target=self._close, name="closing", daemon=True)

    def _close(self) -> None:
        self._ending.set_result(self._worker.close())

    def stop(self) -> None:
        """Refuse what waits, break off what runs, then end."""
        self.should_exit = True
        if self._closing.ident is None:
            self._closing.start()

    def wait_for_worker(self) -> Ending:
        """After `run`: close the worker, if that was not done yet."""
        self.stop()
        return self._ending.result()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.should_exit:
            self.force_exit = True
        else:
            _log.warning("shutting down; once more to leave at once")
            self.stop()

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """uvicorn raises its signals again when it is done, which would be the program's exit code."""
        if threading.current_thread() is not threading.main_thread():
            yield  # a test's, or somebody's own program: signals are its business
            return
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self.handle_exit, number, None)
        try:
            yield
        finally:
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.remove_signal_handler(number)


def _bind(host: str, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        server = socket.socket(family, kind, protocol)
    except OSError as error:
        raise UsageError(f"host: {host} is no address of this machine: {error.strerror}") from None
    try:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind(address)
    except OSError as error:
        server.close()
        raise UsageError(f"port: {host}:{port} cannot be used: {error.strerror}; give another --port") from None
    return server
