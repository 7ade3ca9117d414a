"""nybble as a citizen of its process: what an import and a call leave alone. Each test starts fresh interpreters."""

import hashlib
import os
import platform
import subprocess
import sys
import textwrap

import pytest
import torch

import nybble
from nybble.dispatch import targets
from nybble.dispatch.registry import specs

TIMEOUT = 120


def python(script, *arguments, path=None, **environment):
    """Runs a script in a new interpreter and returns its output; a hang is a failure."""
    command = [sys.executable, "-c", textwrap.dedent(script), *arguments]
    if path is not None:
        path.write_text(textwrap.dedent(script))
        command[1:3] = [str(path)]
    environment = {**os.environ, **environment}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip()


# --- the import


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_import_takes_less_than_200_ms_of_cpu_time_on_top_of_torch():
    """The best of twelve forks of an interpreter that has imported torch; on slow cores, less than a quarter of what torch
    takes. Its objects are frozen: half of the time would be a garbage collection of torch's. CPU time, since other programs
    may use the cores."""
    output = python("""
        import gc, os, sys, time
        start = time.process_time()
        import torch
        os.write(1, f"{time.process_time() - start}\\n".encode())
        assert "nybble" not in sys.modules
        gc.freeze()
        for _ in range(12):
            if os.fork() == 0:
                start = time.process_time()
                import nybble
                os.write(1, f"{time.process_time() - start}\\n".encode())
                os._exit(0)
            os.wait()
    """)
    of_torch, *times = [float(line) for line in output.split()]
    assert len(times) == 12
    assert min(times) < max(0.200, of_torch / 4), (of_torch, times)


def test_import_and_calls_open_no_socket_and_start_no_process():
    output = python("""
        import sys
        import torch
        seen = []
        sys.addaudithook(lambda event, _: seen.append(event))
        import nybble
        layer = nybble.nn.Linear.from_dense(torch.nn.Linear(70, 33), "w4a16g32")
        layer(torch.randn(3, 70)), nybble.kernels(), str(nybble.explain(layer))
        bad = ("socket.", "subprocess.", "os.exec", "os.system", "os.spawn", "os.posix_spawn", "os.fork", "urllib.")
        assert "import" in seen
        print([event for event in seen if event.startswith(bad)])
        import socket
        socket.socket().close()
        assert "socket.__new__" in seen, "the hook would have seen it"
    """)
    assert output == "[]"


GLOBAL_STATE = """
    import os, sys, locale, random, signal, threading, warnings
    import numpy as np
    import torch

    def state():
        tiny = sys.float_info.min
        return {
            "threads": (torch.get_num_threads(), torch.get_num_interop_threads(), threading.active_count()),
            "default dtype": torch.get_default_dtype(),
            "default device": str(torch.get_default_device()),
            "deterministic": torch.are_deterministic_algorithms_enabled(),
            "matmul precision": torch.get_float32_matmul_precision(),
            "gradients": torch.is_grad_enabled(),
            "warnings": list(warnings.filters),
            "showwarning": warnings.showwarning,
            "environment": dict(os.environ),
            "numpy errors": np.geterr(),
            "torch random": torch.get_rng_state().sum().item(),
            "random": hash(random.getstate()),
            "signals": [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGSEGV)],
            "locale": locale.setlocale(locale.LC_ALL),
            "excepthook": sys.excepthook,
            "recursion limit": sys.getrecursionlimit(),
            "directory": os.getcwd(),
            "denormal python": (5e-324 != 0.0, tiny / 2 != 0.0),
            "denormal numpy": bool(np.float32(1e-38) * np.float32(0.1) != 0),
            "denormal torch": bool((torch.full((64,), 1e-38) * 0.1 != 0).all()),
        }

    def calls():
        for scheme in ("w8a8", "w8a16", "w4a8g32", "w4a16g64asym"):
            layer = nybble.nn.Linear.from_dense(dense, scheme)
            for m in (1, 64):
                layer(x[:m]), layer(x[:m].bfloat16())
        nybble.kernels(), nybble.explain(layer), layer.state_dict(), repr(layer)
"""


def test_import_and_calls_change_no_global_state():
    output = python(
        textwrap.dedent(GLOBAL_STATE)
        + textwrap.dedent("""
        torch.set_num_threads(3)
        dense, x = torch.nn.Linear(512, 256), torch.randn(64, 512)
        before = state()
        assert before["denormal python"] == (True, True) and before["denormal torch"]
        import nybble
        imported = state()
        calls()
        called = state()
        for name in before:
            if before[name] != imported[name]: print("import changed", name, before[name], imported[name])
            if before[name] != called[name]: print("a call changed", name, before[name], called[name])
        """)
    )
    assert output == ""


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="MXCSR is a register of x86")
def test_mxcsr_is_unchanged():
    """Its control bits: rounding, exception masks, flush to zero, denormals are zero."""
    output = python(
        textwrap.dedent(GLOBAL_STATE)
        + textwrap.dedent("""
        import ctypes, mmap
        try:
            code = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
        except OSError:
            raise SystemExit(print("no executable memory"))
        code.write(b"\\x0f\\xae\\x1f\\xc3")  # stmxcsr [rdi]; ret
        store = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(ctypes.addressof(ctypes.c_char.from_buffer(code)))
        def control():
            word = ctypes.c_uint32()
            store(ctypes.byref(word))
            return word.value & 0xFFC0
        dense, x = torch.nn.Linear(512, 256), torch.randn(64, 512)
        before = control()
        import nybble
        imported = control()
        calls()
        called = control()
        torch.set_flush_denormal(True)
        calls()
        print(f"{before:x} {imported:x} {called:x} {control():x}")
        """)
    )
    if output == "no executable memory":
        pytest.skip("this system gives no executable memory, and MXCSR cannot be read without")
    assert output == "1f80 1f80 1f80 9fc0"  # what the user sets stays set, too


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="no /proc/self/maps here")
def test_one_openmp_runtime_is_mapped():
    output = python("""
        import re, torch, nybble
        layer = nybble.nn.Linear.from_dense(torch.nn.Linear(512, 256), "w8a8")
        layer(torch.randn(64, 512))
        paths = {line.split()[-1] for line in open("/proc/self/maps") if "/" in line}
        print([path for path in sorted(paths) if re.search(r"lib(g|i|)omp(5)?[-.]", path)])
    """)
    assert output.count("omp") >= 1
    assert len(output.split(",")) == 1, output


def test_an_extension_of_another_version_refuses_the_import():
    output = python("""
        import importlib.abc, importlib.machinery, sys
        class Finder(importlib.abc.MetaPathFinder):
            def find_spec(self, name, path, target=None):
                if name != "nybble._C": return None
                others = [finder for finder in sys.meta_path if finder is not self]
                spec = next(spec for finder in others if (spec := finder.find_spec(name, path, target)))
                run = spec.loader.exec_module
                def exec_module(module):
                    run(module)
                    module.version = "0.0.7"
                spec.loader.exec_module = exec_module
                return spec
        sys.meta_path.insert(0, Finder())
        import torch
        try:
            import nybble
        except ImportError as error:
            print(error)
    """)
    assert "0.0.7" in output
    assert nybble.__version__ in output


# --- NYBBLE_TARGET


@pytest.fixture
def fresh_detection():
    """Detection that reads the environment again, before and after the test."""
    targets.detect.cache_clear()
    yield
    targets.detect.cache_clear()


def test_a_target_that_does_not_exist_is_refused_by_name(monkeypatch, fresh_detection):
    monkeypatch.setenv(targets.CAP_VARIABLE, "nonsense")
    with pytest.raises(ValueError, match="NYBBLE_TARGET='nonsense'") as error:
        nybble.kernels()
    assert all(name in str(error.value) for name in targets.names())


def test_a_target_that_this_machine_lacks_is_refused_with_the_reason(monkeypatch, fresh_detection):
    monkeypatch.setattr(targets.native, "cpu", lambda *_: ("a CPU", ("avx2", "fma", "f16c", "avx512f"), {}))
    monkeypatch.setenv(targets.CAP_VARIABLE, "avx512vnni")
    with pytest.raises(ValueError, match="NYBBLE_TARGET='avx512vnni'") as error:
        nybble.kernels()
    assert "lacks avx512bw" in str(error.value)
    assert "avx512f," not in str(error.value)


def test_a_bad_target_does_not_break_the_import():
    output = python(
        """
        import nybble
        try:
            nybble.kernels()
        except ValueError as error:
            print(error)
        """,
        NYBBLE_TARGET="nonsense",
    )
    assert "NYBBLE_TARGET='nonsense'" in output


RESULTS = """
    import hashlib, torch
    from nybble.nn import Linear

    def results():
        digest = hashlib.sha256()
        generator = torch.Generator().manual_seed(11)
        for scheme in ("w8a8", "w4a8g32", "w4a8g64asym", "w4a8"):
            for n, k in ((33, 70), (16, 128), (257, 515)):
                weight = torch.randn(n, k, generator=generator)
                layer = Linear.from_weight(weight, torch.randn(n, generator=generator), scheme)
                for m in (1, 7, 64):
                    for dtype in (torch.float32, torch.bfloat16, torch.float16):
                        x = torch.randn(m, k, generator=generator).to(dtype)
                        digest.update(layer(x).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()
"""


@pytest.fixture(scope="module")
def results_here():
    """Of the kernels that this process uses, on one thread."""
    scope, threads = {}, torch.get_num_threads()
    exec(textwrap.dedent(RESULTS), scope)  # noqa: S102 the same text that the other interpreters run
    torch.set_num_threads(1)
    try:
        return scope["results"]()
    finally:
        torch.set_num_threads(threads)


@pytest.mark.sampled(every=4)
@pytest.mark.parametrize("target", [name for name in targets.names() if name not in ("torch", "triton")])
def test_integer_kernels_give_the_same_bits_on_every_target(target, results_here):
    reason = targets.detect().missing.get(target)
    if reason:
        pytest.skip(f"{target}: {reason}")
    script = textwrap.dedent(RESULTS) + textwrap.dedent("""
        import nybble
        torch.set_num_threads(3)
        layer = Linear.from_weight(torch.randn(16, 32), None, "w8a8")
        print(results(), nybble.explain(layer, m=64).kernel)
    """)
    digest, kernel = python(script, NYBBLE_TARGET=target).split()
    level = targets.names().index(target)
    below = [spec.name for spec in specs() if spec.scheme == "w8a8" and targets.names().index(spec.target) <= level]
    assert kernel == below[-1]
    assert len(results_here) == 2 * hashlib.sha256().digest_size
    assert digest == results_here
