"""Kernels for runs: forked from a warm parent where that can be, started from nothing elsewhere.

The parent is `sdkit.batch.zygote`; each process that executes runs has one, whichever thread asks.
"""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import uuid

from jupyter_client.manager import AsyncKernelManager
from jupyter_client.provisioning.local_provisioner import LocalProvisioner

_zygote, _zygote_lock = None, threading.Lock()


def warm_zygote(packages, threads=None):
    """Returns this process's Zygote, started on the first call, and again where it was killed.

    The first caller's arguments hold, for the one that takes its place too: a run that finds less
    warmed than it needs imports the rest.
    """
    global _zygote
    with _zygote_lock:
        if _zygote is not None and _zygote.is_lost():
            _zygote.clean_up()
            packages, threads = _zygote.packages, _zygote.threads
            _zygote = None
        if _zygote is None:
            _zygote = Zygote(packages, threads=threads).__enter__()
        return _zygote


def close_zygote():
    """Ends this process's Zygote and the kernels that it forked, if there is one."""
    global _zygote
    with _zygote_lock:
        if _zygote is not None:
            _zygote.__exit__(None, None, None)
            _zygote = None


def make_manager_class(zygote, log):
    """Returns the class of jupyter_client's kernel manager for one run, for nbclient to make.

    Args:
        zygote: Forks the kernel; one with `trouble` leaves it to jupyter_client, which starts it
            from nothing.
        log: File for what the kernel writes outside of the notebook.

    Returns:
        The class, and a list to which the kernel's process is added when it starts.
    """
    processes = []

    class Provisioner(LocalProvisioner):
        async def launch_kernel(self, cmd, **kwargs):
            if zygote.threads:
                kwargs["env"].setdefault("OMP_NUM_THREADS", str(zygote.threads))
            if zygote.trouble:
                await super().launch_kernel(cmd, **kwargs)
            else:
                self.process = zygote.fork(
                    self.parent.connection_file,
                    cwd=kwargs["cwd"],
                    environment=dict(kwargs["env"]),
                    log=log,
                )
                self.pid = self.process.pid
            processes.append(self.process)
            return self.connection_info

    class Manager(AsyncKernelManager):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            name = uuid.uuid4().hex[:12]
            if not zygote.trouble:
                # Unix sockets in a folder of ours: no port that another process may take first.
                self.transport = "ipc"
                self.connection_file = os.path.join(zygote.folder, f"{name}.json")
            self.provisioner = Provisioner(
                kernel_id=name, kernel_spec=self.kernel_spec, parent=self
            )

    return Manager, processes


class Zygote:
    """Context manager around the process of `sdkit.batch.zygote`, and everything it forked.

    Attributes:
        trouble: Why no kernel can be forked here, or None; known once it is ready.
        folder: Where connection files and sockets go; it vanishes with the process.
        import_seconds: What the imports took, once.
        is_closed: Whether its context has been left: the sweep is over.
    """

    def __init__(self, packages=(), *, threads=None):
        """Prepares; nothing starts yet.

        Args:
            packages: Keys of `sdkit.batch.zygote.WARM`: what the notebook imports.
            threads: Threads for the arithmetic of each kernel; None leaves it to the machine, and
                a variable OMP_NUM_THREADS that is set already wins.
        """
        self.packages, self.threads = packages, threads
        self._lock, self._ready = threading.Lock(), False
        self.trouble = self.folder = self.import_seconds = self._process = None
        self.is_closed = False

    def __enter__(self):
        """Starts the process, which imports on its own; `wait_until_ready` before the first use."""
        self._control, theirs = socket.socketpair()
        self.folder = tempfile.mkdtemp(prefix="sdkit-")  # short: a socket's path has 104 bytes
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the process
        environment = os.environ | {
            # Looking whether there is a card must not start CUDA, which no fork would survive.
            "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
        }
        # matplotlib reads it when it is imported, ipykernel sets it only when it starts.
        environment.setdefault("MPLBACKEND", "module://matplotlib_inline.backend_inline")
        if self.threads:
            environment.setdefault("OMP_NUM_THREADS", str(self.threads))
        with theirs:
            self._process = subprocess.Popen(
                [
                    sys.executable,
                    "-P",
                    "-m",
                    "sdkit.batch.zygote",
                    str(theirs.fileno()),
                    self.folder,
                    *self.packages,
                ],  # fmt: skip
                pass_fds=[theirs.fileno()],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=self._stderr,
                start_new_session=True,  # an interrupt from the keyboard is for the sweep alone
            )
        return self

    def __exit__(self, *error):
        """Ends the process; it takes every kernel with it."""
        self.is_closed = True
        self.clean_up()

    def clean_up(self):
        """Leaves nothing of the process, one that was killed included: no socket, no folder."""
        if not self._ready:  # still importing: it has forked nothing, and would hear late
            self._process.kill()
        self._control.close()
        self._process.wait()
        self._stderr.close()
        shutil.rmtree(self.folder, ignore_errors=True)  # where the process itself could not

    def is_lost(self):
        """Whether it was of use and is not there any more, as where memory ran out."""
        return self.trouble is None and self._process.poll() is not None

    def wait_until_ready(self):
        """Waits for the imports and the trial; afterwards `trouble` is known."""
        with self._lock:
            if self._ready:
                return
            line = self._control.makefile().readline()
            if line:
                for name, value in json.loads(line).items():
                    setattr(self, name, value)
            else:
                self._process.wait()
                self._stderr.seek(0)
                lines = self._stderr.read().decode(errors="replace").split("\n")
                reason = next((line for line in reversed(lines) if line.strip()), "no reason given")
                self.trouble = f"the warm parent ended ({reason})"
            self._ready = True

    def fork(self, connection_file, *, cwd, environment, log):
        """Returns a ForkedKernel that listens as its connection file says."""
        ours, theirs = socket.socketpair()
        with theirs, self._lock:
            socket.send_fds(self._control, [b"+"], [theirs.fileno()])
        request = {
            "connection_file": str(connection_file), "cwd": str(cwd),
            "environment": environment, "log": str(log),
        }  # fmt: skip
        ours.sendall(json.dumps(request).encode() + b"\n")
        return ForkedKernel(ours)


class ForkedKernel:
    """A forked kernel, with as much of `subprocess.Popen` as jupyter_client asks for.

    Attributes:
        pid: Its process id, and that of its group.
        returncode: None while it runs; as of `Popen` once it has ended.
        used: {"cpu_seconds", "peak_memory_gib"} once it has ended, {} if nobody could tell.
    """

    stdin = stdout = stderr = None

    def __init__(self, life):
        """Takes the socket on whose other end the kernel lives."""
        self._life, self._lock = life, threading.Lock()
        line = b""  # letter by letter: how it ended may be behind it already
        while not line.endswith(b"\n") and (letter := life.recv(1)):
            line += letter
        self.pid = json.loads(line)["pid"]
        self.returncode, self.used = None, {}

    def poll(self):
        """Returns its exit code, or None while it runs."""
        return self._receive(socket.MSG_DONTWAIT)

    def wait(self):
        """Returns its exit code when it has ended."""
        return self._receive(0)

    def send_signal(self, number):
        """Sends a signal to the kernel and what it started."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, number)

    def kill(self):
        """Ends it at once."""
        self.send_signal(signal.SIGKILL)

    def terminate(self):
        """Asks it to end."""
        self.send_signal(signal.SIGTERM)

    def _receive(self, flags):
        with self._lock:  # one thread runs the notebook, another watches its time
            if self.returncode is None:
                try:
                    told = self._life.recv(4096, flags)
                except BlockingIOError:
                    return None
                self.used = json.loads(told) if told else {"exit_code": -signal.SIGKILL}
                self.returncode = self.used.pop("exit_code")
                self._life.close()
            return self.returncode
