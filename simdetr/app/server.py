"""The app: routes, guard, page; and the server that runs it."""

from __future__ import annotations

import logging
import threading
import webbrowser
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.encoders import jsonable_encoder
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse
from fastapi.staticfiles import StaticFiles
from sqlalchemy.exc import IntegrityError, OperationalError
from sqlalchemy.orm.exc import StaleDataError

from simdetr.app import image_routes, label_routes, project_routes, run_routes, shot_routes
from simdetr.app.desk import Desk
from simdetr.app.guard import Guard
from simdetr.app.refusals import FieldRefusal, Refusal
from simdetr.app.settings import AppSettings

LOG = logging.getLogger(__name__)
STATIC = Path(__file__).parent / "static"
_GRACE_S = 3


def create_app(settings: AppSettings) -> FastAPI:
    """The app over its folder; it opens the database at once, and begins to work when it is served."""
    desk = Desk.open(settings)

    @asynccontextmanager
    async def at_work(app: FastAPI) -> AsyncIterator[None]:
        desk.runs.start()
        try:
            yield
        finally:
            desk.close()

    app = FastAPI(
        title="simdetr labelling",
        docs_url=None,  # these pages would load scripts from elsewhere
        redoc_url=None,
        openapi_url="/api/openapi.json",
        lifespan=at_work,
    )
    app.state.desk = desk
    app.add_middleware(Guard, token=settings.token, loopback=settings.on_loopback, max_upload_mb=settings.max_upload_mb)
    for module in (project_routes, image_routes, run_routes, shot_routes, label_routes):
        app.include_router(module.router)
    _answer_refusals(app)
    _serve_page(app)
    return app


def _answer_refusals(app: FastAPI) -> None:
    @app.exception_handler(Refusal)
    async def refused(request: Request, refusal: Refusal) -> JSONResponse:
        return JSONResponse({"detail": refusal.detail} | jsonable_encoder(refusal.more), refusal.status)

    @app.exception_handler(FieldRefusal)
    async def wrong_field(request: Request, refusal: FieldRefusal) -> JSONResponse:
        problem = {"loc": list(refusal.place), "msg": refusal.message, "type": "value_error"}
        return JSONResponse({"detail": [problem]}, 422)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        # without the input: it may be large, or no number that JSON knows
        problems = [{name: one[name] for name in ("loc", "msg", "type")} for one in error.errors()]
        return JSONResponse({"detail": jsonable_encoder(problems)}, 422)

    @app.exception_handler(StaleDataError)
    @app.exception_handler(IntegrityError)
    async def crossed(request: Request, error: Exception) -> JSONResponse:
        LOG.info("two writes have crossed: %s", error)
        return JSONResponse({"detail": "something else was changed or deleted at the same moment; try again"}, 409)

    @app.exception_handler(OperationalError)
    async def busy(request: Request, error: OperationalError) -> JSONResponse:
        LOG.warning("database: %s", error.orig)
        return JSONResponse({"detail": "the database is busy; try again"}, 503)


def _serve_page(app: FastAPI) -> None:
    @app.get("/", include_in_schema=False)
    def page() -> FileResponse:
        return FileResponse(STATIC / "index.html", headers={"cache-control": "no-cache"})

    app.mount("/static", StaticFiles(directory=STATIC), name="static")


class Server(uvicorn.Server):
    """A server that says where it is once it listens.

    Args:
        config: uvicorn's.
        settings: Of the app.
        opens_browser: Open the page.
    """

    def __init__(self, config: uvicorn.Config, settings: AppSettings, *, opens_browser: bool) -> None:
        super().__init__(config)
        self.settings, self.opens_browser = settings, opens_browser

    async def startup(self, sockets: Any = None) -> None:  # noqa: ANN401
        """Listen, then say so."""
        await super().startup(sockets)
        for server in self.servers:
            for socket in server.sockets:
                address = address_of(self.settings, socket.getsockname()[1])
                LOG.info("the page is at %s (end with Ctrl-C)", address)
                if self.opens_browser:
                    threading.Thread(target=webbrowser.open, args=(address,), daemon=True).start()
                return


def address_of(settings: AppSettings, port: int) -> str:
    """Where a person finds the page, with the token if one is needed."""
    host = "127.0.0.1" if settings.host in ("0.0.0.0", "::") else settings.host
    name = f"[{host}]" if ":" in host else host
    return f"http://{name}:{port}/" + ("" if settings.token is None else f"?token={settings.token}")


def serve(settings: AppSettings, *, opens_browser: bool = True) -> None:
    """Serve the app until it is stopped.

    Raises:
        RuntimeError: Another app works in the same folder, or the port is taken.
    """
    app = create_app(settings)
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        log_level="warning",
        access_log=False,  # addresses may hold the token
        timeout_graceful_shutdown=_GRACE_S,
        server_header=False,
    )
    server = Server(config, settings, opens_browser=opens_browser)
    try:
        server.run()
    except SystemExit as stop:  # uvicorn's way out where it cannot listen; or a signal, once it has closed
        if server.started:
            raise
        raise RuntimeError(f"port: {settings.host}:{settings.port} cannot be listened on; choose another") from stop
    if not server.started:
        raise RuntimeError("the app could not be started; see the messages above")
