"""Runs of `sft_nb` in which something goes wrong on purpose: a line of JSON comes in for each, a line of JSON goes out.

python tests/faulty.py FOLDER LIBRARY, with LIBRARY, made of faulty.c, in LD_PRELOAD. All is imported once; each run is a child of its own. What may be
asked for: words (of the command line), fault ('', 'trace', 'kill', 'full', 'readonly'), at (the call that it happens at, from 1), prepare (Python that runs first)."""
import contextlib
import ctypes
import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path

FAULTS = 'off', 'trace', 'kill', 'full', 'readonly'


def child(home, library, ask):
    "Never returns"
    for stream, name in ((1, 'said'), (2, 'complained')):
        with open(home/name, 'wb') as file: os.dup2(file.fileno(), stream)
    os.chdir(home)
    trace = os.open(home/'trace', os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
    status = 70
    try:
        exec(ask.get('prepare', ''), {})
        from sft_nb.cli import main
        library.arm(FAULTS.index(ask.get('fault') or 'off'), ask.get('at', 1), str(home/'runs').encode(), trace)
        try: status = main(ask['words']) or 0
        except SystemExit as e: status = e.code if isinstance(e.code, int) else 1
    except BaseException: traceback.print_exc()
    library.arm(0, 0, b'', -1)
    with contextlib.suppress(OSError, ValueError):
        for stream in (sys.stdout, sys.stderr): stream.flush()
    os._exit(status)


def wait(pid, ask):
    "The status of a child, killed by chance if that was asked for"
    if 'secs' in ask:
        ends = time.monotonic() + ask['secs']
        while time.monotonic() < ends:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done: return os.waitstatus_to_exitcode(status)
            time.sleep(.002)
        os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def main(folder, path):
    home, library = Path(folder).resolve(), ctypes.CDLL(path)
    library.arm.argtypes = ctypes.c_int, ctypes.c_long, ctypes.c_char_p, ctypes.c_int
    import torch
    torch.set_num_threads(1) # a child of a process with threads would wait for them
    import matplotlib.figure, safetensors.torch, scipy.stats  # noqa: E401, F401
    import sft_nb.cli, sft_nb.export, sft_nb.job, sft_nb.proof  # noqa: E401, F401
    print('{}', flush=True)
    for line in sys.stdin:
        ask = json.loads(line)
        begun = time.perf_counter()
        pid = os.fork()
        if not pid: child(home, library, ask)
        status = wait(pid, ask)
        told = {name: (home/name).read_text(errors='replace') for name in ('said', 'complained', 'trace')}
        print(json.dumps(told | {'status': status, 'secs': time.perf_counter() - begun}), flush=True)


if __name__ == '__main__': main(*sys.argv[1:])
