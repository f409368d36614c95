"""The lab's S3 endpoint: moto's server, which fails when it is told to."""

from collections.abc import Callable, Iterable
from typing import Any

from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import run_simple

from cluster.lab import layout


class Failing:
    """Answers with a 500 as long as ``layout.S3_FAILS`` exists."""

    def __init__(self, application: Callable[..., Iterable[bytes]]) -> None:
        self._application = application

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        if layout.S3_FAILS.exists():
            start_response("500 Internal Server Error", [("Content-Length", "0")])
            return []
        return self._application(environ, start_response)


def main() -> None:
    """Serve for ever."""
    application = DomainDispatcherApplication(create_backend_app)
    host, port = layout.address(layout.HEAD), layout.S3_PORT
    run_simple(host, port, Failing(application), threaded=True)


if __name__ == "__main__":
    main()
