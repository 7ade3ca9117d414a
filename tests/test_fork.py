"""Other processes and threads: fork in the middle of use, spawned workers, many threads. Nothing may hang.

Each test runs a script in an interpreter of its own, so that a hang ends there and the scripts own all their threads.
"""

import os
import subprocess
import sys
import textwrap

import pytest

WATCHDOG = 60
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")

COMMON = f"""
import os, signal, sys, threading, time
import torch
from nybble.nn import Linear

SCHEMES = ("w8a8", "w4a16g32", "w4a8g64asym")
N, K, M = 256, 512, 32  # large enough for several threads

def make(scheme="w8a8", seed=7):
    torch.manual_seed(seed)
    return Linear.from_dense(torch.nn.Linear(K, N), scheme)

def just_loaded(layer):
    fresh = Linear(K, N, scheme=layer.scheme)
    fresh.load_state_dict(layer.state_dict())
    return fresh

def equal(a, b):
    return a.detach().numpy().tobytes() == b.detach().numpy().tobytes()

def in_child(check):
    '''Runs a check in a forked child; its exit code, or "hangs".'''
    pid = os.fork()
    if pid == 0:
        try:
            os._exit(0 if check() else 1)
        except BaseException as error:
            os.write(2, repr(error).encode())
        finally:
            os._exit(2)
    end = time.monotonic() + {WATCHDOG}
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return "hangs"

torch.set_grad_enabled(False)
torch.set_num_threads(4)
"""


def run(tmp_path, script):
    path = tmp_path / "script.py"  # a file: spawned children import it
    path.write_text(COMMON + textwrap.dedent(script))
    done = subprocess.run(
        [sys.executable, str(path)], capture_output=True, text=True, timeout=4 * WATCHDOG, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.split()


@needs_fork
def test_a_forked_child_computes_the_same(tmp_path):
    output = run(
        tmp_path,
        """
        x = torch.randn(M, K)
        layers = [make(scheme) for scheme in SCHEMES]
        fresh = [just_loaded(layer) for layer in layers]
        expected = [layer(x) for layer in layers]  # the pool of threads runs now, and does not live in a child
        state = [layer.qweight for layer in layers]
        shared = make().share_memory()
        checks = {
            "packed": lambda: all(equal(layer(x), y) for layer, y in zip(layers, expected)),
            "first call": lambda: all(equal(layer(x), y) for layer, y in zip(fresh, expected)),
            "reading": lambda: all(equal(layer.qweight, codes) for layer, codes in zip(layers, state)),
            "in a thread": lambda: in_thread(lambda: equal(layers[0](x), expected[0])),
            "shared memory": lambda: equal(shared(x), expected[0]) and shared.packed.is_shared(),
            "again": lambda: in_child(lambda: equal(layers[0](x), expected[0])) == 0,
        }
        def in_thread(check):
            results = []
            thread = threading.Thread(target=lambda: results.append(check()))
            thread.start()
            thread.join()
            return results == [True]
        print(*(in_child(check) for check in checks.values()))
        assert all(equal(layer(x), y) for layer, y in zip(layers, expected)), "the parent goes on"
        print(in_child(lambda: False), "a wrong result is seen")
        """,
    )
    assert output[:6] == ["0"] * 6
    assert output[6] == "1"


@needs_fork
def test_forks_while_a_thread_is_busy(tmp_path):
    """Locks that the other thread holds at that moment must not stay locked in the child."""
    output = run(
        tmp_path,
        """
        x = torch.randn(M, K)
        layer, fresh = make(), just_loaded(make())
        expected = layer(x)
        wrong = []

        def call(mine):
            if not equal(mine(x), expected): wrong.append(1)
        def read(mine):
            mine.state_dict()
        def pack(mine):
            mine.unpack()
            mine.pack()

        for work in (call, read, pack):
            stop, rounds = threading.Event(), [0]
            def loop():
                torch.set_grad_enabled(False)
                torch.set_num_threads(4)
                mine = make()
                while not stop.is_set():
                    work(mine)
                    rounds[0] += 1
            thread = threading.Thread(target=loop)
            thread.start()
            while rounds[0] < 3: time.sleep(0.001)
            codes = []
            while len(codes) < 20 and not any(codes):
                codes.append(in_child(lambda: equal(layer(x), expected) and equal(fresh(x), expected)))
            before = rounds[0]
            while rounds[0] < before + 3: time.sleep(0.001)
            stop.set()
            thread.join()
            print(work.__name__, *codes)
        assert not wrong and equal(layer(x), expected)
        """,
    )
    assert output == [word for work in ("call", "read", "pack") for word in (work, *["0"] * 20)]


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_worker_processes(tmp_path, method):
    """Layers, packed and not, in shared memory and not, are sent to a worker and compute there."""
    if method == "forkserver" and not hasattr(os, "fork"):
        pytest.skip("this system has no fork")
    output = run(
        tmp_path,
        f"""
        import torch.multiprocessing as mp

        def worker(layers, x, queue):
            torch.set_grad_enabled(False)
            queue.put([layer(x).numpy().tobytes() for layer in layers])

        if __name__ == "__main__":
            context = mp.get_context({method!r})
            x = torch.randn(M, K)
            layers = [make(scheme) for scheme in SCHEMES]
            expected = [layer(x).numpy().tobytes() for layer in layers]
            layers += [just_loaded(layer) for layer in layers]
            for layer in layers[1:5]:
                layer.share_memory()
            queue = context.Queue()
            child = context.Process(target=worker, args=(layers, x, queue))
            child.start()
            result = queue.get(timeout={WATCHDOG})
            child.join({WATCHDOG})
            print(child.exitcode, result == 2 * expected)
        """,
    )
    assert output == ["0", "True"]


def test_data_loader_workers(tmp_path):
    output = run(
        tmp_path,
        f"""
        class Rows(torch.utils.data.Dataset):
            def __init__(self):
                self.layer = make()
                self.x = torch.randn(16, M, K)
                self.y = [self.layer(x) for x in self.x]
            def __len__(self):
                return 16
            def __getitem__(self, i):
                with torch.no_grad():
                    return i, self.layer(self.x[i])

        if __name__ == "__main__":
            rows, seen = Rows(), []
            for indices, y in torch.utils.data.DataLoader(rows, batch_size=4, num_workers=2, timeout={WATCHDOG}):
                assert all(equal(part, rows.y[i]) for i, part in zip(indices.tolist(), y))
                seen += indices.tolist()
            print(*seen)
        """,
    )
    assert [int(i) for i in output] == list(range(16))


def test_many_threads_with_mixed_calls_equal_serial_ones(tmp_path):
    output = run(
        tmp_path,
        """
        import random
        layers = [make(scheme, seed) for seed, scheme in enumerate((*SCHEMES, "w8a16", "w4a8"))]
        inputs = [torch.randn(m, K).to(dtype) for m in (1, 5, 64) for dtype in (torch.float32, torch.bfloat16)]
        serial = {(i, j): layer(x).view(torch.uint8) for i, layer in enumerate(layers) for j, x in enumerate(inputs)}
        wrong, counts = [], []
        def work(seed):
            torch.set_grad_enabled(False)
            choose, done = random.Random(seed), 0
            torch.set_num_threads(1 + seed % 4)
            for _ in range(150):
                i, j = choose.choice(list(serial))
                layer = layers[i]
                kind = choose.random()
                if kind < 0.05: layer = just_loaded(layer)
                elif kind < 0.1: layer.state_dict()
                if not equal(layer(inputs[j]).view(torch.uint8), serial[i, j]): wrong.append((i, j))
                done += 1
            counts.append(done)
        threads = [threading.Thread(target=work, args=(seed,), daemon=True) for seed in range(8)]
        for thread in threads: thread.start()
        for thread in threads: thread.join(60)
        print(len(wrong), sum(thread.is_alive() for thread in threads), sum(counts))
        """,
    )
    assert output == ["0", "0", str(8 * 150)]
