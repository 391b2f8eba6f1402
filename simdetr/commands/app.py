"""What ``label`` does: the labelling app. It loads no torch here: the app computes in a process of its own."""

from __future__ import annotations

from pathlib import Path


def label(
    images: Path,
    out: Path = Path("runs/labelling"),
    run: Path | None = None,
    labels: Path | None = None,
    config: tuple[str, ...] = (),
    host: str = "127.0.0.1",
    port: int = 8000,
    token: str | None = None,
    database: str | None = None,
    device: str | None = None,
    no_browser: bool = False,
    no_propose: bool = False,
    max_upload_mb: int = 200,
) -> None:
    """Label images on a page of the browser, with proposals of a detector that learns from it.

    Ctrl-C ends it; the same command goes on with what is there. A run that was at work can be resumed on the page.

    Args:
        images: Folder or list file of the images; they are only read.
        out: Folder of the labels, uploads and runs.
        run: Run folder, detector folder or checkpoint that proposes boxes first and that trainings start from.
        labels: Labels of another tool to begin with, put on images that nobody has inspected.
        config: YAML files of the trainings; a recipe for few labels without any.
        host: Address to listen on; any but this machine's own needs a token.
        port: 0 takes a free one.
        token: What every request has to know; made up and printed where one is needed.
        database: URL of another database than ``labels.sqlite`` in ``--out``.
        device: Torch device of the runs; the GPU if there is one.
        no_browser: Do not open the page.
        no_propose: Do not mine the images for proposals where there is no detector.
        max_upload_mb: Largest file that is taken.
    """
    try:
        from simdetr.app import server
        from simdetr.app.settings import AppSettings
    except ImportError as error:
        missing = (error.name or "").partition(".")[0]
        if missing in ("", "simdetr"):
            raise
        raise ImportError(f"label: {missing} is not installed; `pip install 'simdetr[app]'` brings it") from error
    settings = AppSettings(
        images=images,
        out=out,
        run=run,
        labels=labels,
        host=host,
        port=port,
        token=token,
        database=database,
        config=config,
        propose=not no_propose,
        device=device,
        max_upload_mb=max_upload_mb,
    )
    server.serve(settings, opens_browser=not no_browser)
