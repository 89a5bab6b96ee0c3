"""A process that has imported what every run imports, and forks a kernel whenever it is asked.

A kernel that starts from nothing spends 8 to 10 s on importing torch and diffusers (on 2 cores).
One forked from here has them at once, and is a process image of its own: no model, patch or setting
of one run is there in the next. Forking is only safe while one thread runs and no device has been
touched, so nothing here computes, and a forked child has to pass a trial before any run is trusted
to one.

Nobody outlives anybody: the kernels end with this process, and this process with the one that
started it, however that one ended.
"""

import atexit
import contextlib
import ctypes
import gc
import importlib
import json
import os
import selectors
import shutil
import signal
import socket
import sys
import time
import traceback

ALWAYS = ("ipykernel.kernelapp", "ipykernel.ipkernel")
_MATPLOTLIB = (
    "matplotlib.axes", "matplotlib.figure", "matplotlib.widgets", "matplotlib.backends.backend_agg",
)  # fmt: skip
# What is imported for a notebook that imports a package. matplotlib.pyplot must not be: its inline
# backend looks for the running kernel when it is imported, and would show no figure later.
WARM = {
    "numpy": ("numpy",),
    "pandas": ("pandas",),
    "PIL": ("PIL.Image",),
    "skimage": ("skimage.metrics",),
    "matplotlib": _MATPLOTLIB,
    "torch": ("torch",),
    "transformers": ("torch", "transformers"),
    "diffusers": ("torch", "transformers", "diffusers"),
    "peft": ("torch", "transformers", "peft"),
    "sdkit": (
        "pandas", "PIL.Image", "skimage.metrics", *_MATPLOTLIB, "tqdm.auto", "sdkit.loading",
        "sdkit.generation", "sdkit.diagnosis.ablation",
    ),
}  # fmt: skip
TRIAL_SECONDS = 60
PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


def main(control, folder, packages):
    """Imports, tries a fork, says so over `control`, and serves until its other end is closed.

    The folder, for connection files and sockets, is removed then: nobody else may be left to do it.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt is for the sweep to handle
    request = None
    try:
        started = time.perf_counter()
        for name in (*ALWAYS, *(module for package in packages for module in WARM[package])):
            importlib.import_module(name)
        seconds = time.perf_counter() - started
        gc.collect()
        gc.freeze()  # the collector of a child leaves these pages alone, so that they stay shared
        _send(control, {"import_seconds": seconds, "trouble": find_fork_problem()})
        request = serve(control)
    finally:
        if request is None:
            shutil.rmtree(folder, ignore_errors=True)
    if request is not None:
        run_kernel(request)


def find_fork_problem():
    """Returns why a forked child cannot compute on this machine's device, or None if it can."""
    if not hasattr(os, "fork"):
        return "this system cannot fork"
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            signal.alarm(TRIAL_SECONDS)
            code = 0 if "torch" not in sys.modules or _compute() else 2
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return None if code == 0 else f"a forked process failed its trial (exit code {code})"


def _compute():
    """Libraries that are not fork-safe abort or hang here, where it costs nothing."""
    import torch

    from sdkit.device import choose_device

    device, _ = choose_device()
    matrix = torch.ones(512, 512, device=device)
    return float((matrix @ matrix).sum()) == 512.0**3


def serve(control):
    """Forks a kernel for each socket that comes over `control`; returns its request in the child.

    Over that socket comes the request, one line of JSON. Back go the kernel's process id, and when
    it has ended its exit code and what it used. Where the other end is closed, the kernel is
    killed: nobody is left who could want it.

    Returns:
        In a forked child what it was asked for; None here, once `control` is closed.
    """
    kernels = {}  # process id: socket
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake)
    with selectors.DefaultSelector() as selector:
        selector.register(control, selectors.EVENT_READ)
        selector.register(woken, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                if key.fileobj is control:
                    life = _receive_socket(control)
                    if life is None:
                        for pid in kernels:
                            _kill_group(pid)
                            os.waitpid(pid, 0)
                        return None
                    line = life.makefile().readline()
                    if not line:  # who asked has ended meanwhile
                        life.close()
                        continue
                    request, parent = json.loads(line), os.getpid()
                    pid = os.fork()
                    if pid == 0:
                        _leave(parent, [control, life, *kernels.values()], (woken, wake))
                        return request
                    with contextlib.suppress(OSError):  # the child does it too: who comes first
                        os.setpgid(pid, pid)
                    kernels[pid] = life
                    selector.register(life, selectors.EVENT_READ, pid)
                    _send(life, {"pid": pid})
                elif key.fileobj == woken:
                    os.read(woken, 4096)
                    for life in _reap(kernels):
                        if life in selector.get_map():
                            selector.unregister(life)
                        life.close()
                else:  # closed at the other end
                    selector.unregister(key.fileobj)
                    _kill_group(key.data)


def run_kernel(request):
    """Turns this forked process into the IPython kernel of one run."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["environment"])
    for number, flags in enumerate((os.O_RDONLY, os.O_WRONLY, os.O_WRONLY)):
        path = os.devnull if number == 0 else request["log"]
        opened = os.open(path, flags | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(opened, number)
        os.close(opened)
    from ipykernel.kernelapp import IPKernelApp

    if "numpy" in sys.modules:  # else every run would draw the same "random" numbers
        sys.modules["numpy"].random.seed()
    arguments = ["-f", request["connection_file"], f"--IPKernelApp.parent_handle={os.getppid()}"]
    sys.argv = ["ipykernel_launcher", *arguments]
    IPKernelApp.launch_instance(argv=arguments)
    # What the run registered is done; taking torch apart module by module is not worth its 0.3 s.
    atexit._run_exitfuncs()
    os._exit(0)


def _leave(parent, sockets, descriptors):
    """Makes a forked child a process of its own, which ends when its parent does."""
    os.setpgid(0, 0)
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before that line
            os._exit(1)
    for opened in sockets:
        opened.close()
    for descriptor in descriptors:
        os.close(descriptor)


def _reap(kernels):
    """Tells of each kernel that has ended how, and returns it; what it started ends with it."""
    ended = []
    for pid in list(kernels):
        found, status, used = os.wait4(pid, os.WNOHANG)
        if found:
            _kill_group(pid)
            with contextlib.suppress(OSError):  # nobody may be left to be told
                _send(
                    kernels[pid],
                    {
                        "exit_code": os.waitstatus_to_exitcode(status),
                        "cpu_seconds": used.ru_utime + used.ru_stime,
                        "peak_memory_gib": used.ru_maxrss / MAXRSS_PER_GIB,
                    },
                )
            ended.append(kernels.pop(pid))
    return ended


MAXRSS_PER_GIB = 1024**3 if sys.platform == "darwin" else 1024**2  # bytes there, KiB elsewhere


def _kill_group(pid):
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


def _receive_socket(control):
    data, descriptors, _, _ = socket.recv_fds(control, 1, 1)
    return socket.socket(fileno=descriptors[0]) if data else None


def _send(connection, message):
    connection.sendall(json.dumps(message).encode() + b"\n")


if __name__ == "__main__":
    main(socket.socket(fileno=int(sys.argv[1])), sys.argv[2], sys.argv[3:])
