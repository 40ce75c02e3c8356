"""Python text that measures peak memory in a process of its own; scripts of memory tests begin with it."""

from __future__ import annotations

MEASURE_PEAK = """
import threading, time
from pathlib import Path

def read_resident():
    status = Path("/proc/self/status").read_text()
    return sum(int(status.split(name + ":")[1].split()[0]) * 1024 for name in ("RssAnon", "RssShmem"))

def measure_peak(action):
    peak, done = [0], threading.Event()
    def watch():
        while not done.is_set():
            peak[0] = max(peak[0], read_resident())
            time.sleep(0.001)
    thread = threading.Thread(target=watch)
    thread.start()
    result = action()
    done.set()
    thread.join()
    return result, peak[0]
"""
