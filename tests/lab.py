"""JupyterLab in a real browser: headless Chromium, driven by Playwright, nothing from outside."""

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import nbformat

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
REPOSITORY = Path(__file__).parent.parent
LOOPBACK = ("localhost", "127.0.0.1", "[::1]")
OUTPUT = ".jp-OutputArea"


class Lab:
    """A running JupyterLab over a folder, and one browser."""

    def __init__(self, url, token, browser, folder):
        self.url, self.token, self.browser, self.folder = url, token, browser, folder

    @contextmanager
    def opened(self, name):
        """A page with a notebook; every request to another machine is noted and refused."""
        context = self.browser.new_context(viewport={"width": 1280, "height": 1000})
        page = context.new_page()
        page.foreign = []

        def judge(route, request):
            host = request.url.split("/")[2].rsplit(":", 1)[0]
            if request.url.startswith(("data:", "blob:")) or host in LOOPBACK:
                route.continue_()
            else:
                page.foreign.append(request.url)
                route.abort()

        page.route("**/*", judge)
        page.goto(
            f"{self.url}/lab/workspaces/{secrets.token_hex(4)}/tree/{name}?token={self.token}"
        )
        page.wait_for_selector(".jp-Notebook .jp-Cell", timeout=90_000)
        # Before the kernel is there, "run all" would ask which one to take.
        page.wait_for_selector("#jp-main-statusbar >> text=Idle", timeout=90_000)
        try:
            yield page
        finally:
            context.close()


@contextmanager
def running_lab(folder):
    """Starts JupyterLab on a free port of this machine alone, and a browser; ends both."""
    from playwright.sync_api import sync_playwright

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    token, url = secrets.token_hex(16), f"http://127.0.0.1:{port}"
    settings = folder / ".lab" / "@jupyterlab" / "apputils-extension"
    settings.mkdir(parents=True)
    (settings / "notification.jupyterlab-settings").write_text('{"fetchNews": "false"}')
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(
            filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")])
        ),
        "JUPYTERLAB_SETTINGS_DIR": str(folder / ".lab"),
        "JUPYTERLAB_WORKSPACES_DIR": str(folder / ".lab" / "workspaces"),
        "JUPYTER_CONFIG_DIR": str(folder / ".lab" / "config"),
        "JUPYTER_RUNTIME_DIR": str(folder / ".lab" / "runtime"),
    }
    command = [
        sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", f"--port={port}",
        "--ip=127.0.0.1", f"--IdentityProvider.token={token}", f"--ServerApp.root_dir={folder}",
        "--ServerApp.use_redirect_file=False", "--LabApp.expose_app_in_browser=True",
        "--LabApp.news_url=", "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
    ]  # fmt: skip
    with (folder / ".lab" / "log").open("w") as log:
        server = subprocess.Popen(
            command, env=environment, stdout=log, stderr=log, start_new_session=True
        )
    try:
        wait_for(url, token, server, folder / ".lab" / "log")
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(
                executable_path=CHROMIUM, args=["--no-sandbox", "--disable-dev-shm-usage"]
            )
            yield Lab(url, token, browser, folder)
            browser.close()
    finally:
        server.terminate()
        try:
            server.wait(30)  # it ends its kernels
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()


def wait_for(url, token, server, log, timeout_seconds=240):
    end = time.monotonic() + timeout_seconds
    while time.monotonic() < end and server.poll() is None:
        try:
            urllib.request.urlopen(f"{url}/api/status?token={token}", timeout=2).close()
            return
        except OSError:
            time.sleep(0.2)
    raise RuntimeError(f"JupyterLab did not start: {log.read_text()[-2000:]}")


def write_notebook(path, *cells):
    notebook = nbformat.v4.new_notebook(
        metadata={
            "kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}
        }
    )
    notebook.cells = [nbformat.v4.new_code_cell(cell) for cell in cells]
    nbformat.write(notebook, path)
    return path.name


def run_all(page, *, timeout_seconds):
    """Runs every cell and waits until the last one has a number and the kernel rests."""
    page.evaluate("() => { window.jupyterapp.commands.execute('notebook:run-all-cells'); }")
    page.wait_for_function(
        """() => {
            const cells = [...document.querySelectorAll('.jp-Notebook .jp-CodeCell')];
            const prompts = cells.map(c => c.querySelector('.jp-InputPrompt')?.textContent || '');
            return prompts.length && prompts.every(p => /\\[\\d+\\]/.test(p));
        }""",
        timeout=timeout_seconds * 1000,
    )
