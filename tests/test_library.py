"""Which compiled library is loaded, why another one is not, and who is told."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import types
import warnings
from pathlib import Path

import pytest
import torch

from metarec_fast import _library
from metarec_fast._library import Library

PACKAGE = Path(_library.__file__).parent

ADAPT = """
start, table, bias = torch.zeros(4), torch.ones(9, 4), torch.zeros(9)
known = mf.Entries(torch.tensor([1, 2]), torch.tensor([1.0, 2.0]), torch.tensor([0, 2]))
print(mf.functional.adapt(start, table, bias, known).user.tolist())
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where libraries are looked for, empty; torch has CUDA 13.0."""
    monkeypatch.setattr(_library, "FOLDER", tmp_path)
    monkeypatch.setattr(_library, "cpu", Library("_C", True))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    return tmp_path


def built(folder: Path, version: str = "13.0.88") -> None:
    (folder / "_C_cuda.version").write_text(version + "\n")
    (folder / "_C_cuda.so").write_bytes(b"not a library")


def test_cuda_kernels_that_were_not_built_are_called_so(folder):
    assert _library._load_cuda() == Library("_C_cuda", False, "it was not built")
    (folder / "_C_cuda.version").write_text("13.0.88\n")
    assert _library._load_cuda() == Library("_C_cuda", False, "it was not built")


def test_a_torch_without_cuda_is_why_cuda_kernels_are_not_loaded(folder, monkeypatch):
    built(folder)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert _library._load_cuda().reason == "torch was built without CUDA"


@pytest.mark.parametrize(("library", "torchs"), [("12.8.93", "13.0"), ("13.0.88", "12.6"), ("1.2", "13.0")])
def test_cuda_kernels_of_another_major_version_are_not_loaded(folder, monkeypatch, library, torchs):
    built(folder, library)
    monkeypatch.setattr(torch.version, "cuda", torchs)
    loaded = _library._load_cuda()
    assert not loaded.loaded
    assert loaded.reason == f"it was built for CUDA {library}, torch for CUDA {torchs}"


def test_another_minor_version_is_tried(folder):
    built(folder, "13.2.1")
    assert _library._load_cuda().reason.startswith("it does not load: ")


def test_cuda_kernels_without_the_operators_of_the_cpu_are_not_loaded(folder, monkeypatch):
    built(folder)
    monkeypatch.setattr(_library, "cpu", Library("_C", False, "it was not built"))
    assert _library._load_cuda().reason == "_C is missing: it was not built"


def test_a_cpu_library_that_does_not_load_says_why(folder):
    (folder / "_C.so").write_bytes(b"not a library")
    loaded = _library._load("_C")
    assert not loaded.loaded
    assert loaded.reason.startswith("it does not load: ")
    assert "\n" not in loaded.reason


def test_tensors_where_there_are_no_kernels_are_said_once_for_each_kind_of_device(monkeypatch):
    monkeypatch.setattr(_library, "cuda", Library("_C_cuda", False, "it was not built"))
    monkeypatch.setattr(_library, "_missed", set())
    far, other = (types.SimpleNamespace(device=torch.device(kind)) for kind in ("cuda", "xpu"))
    with pytest.warns(
        RuntimeWarning, match="PyTorch reference on cuda, right but slow, because _C_cuda is missing: it"
    ):
        assert not _library.loaded_for(far)
    with pytest.warns(
        RuntimeWarning, match="PyTorch reference on xpu, right but slow, because it has no kernels there"
    ):
        assert not _library.loaded_for(other)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not _library.loaded_for(far)
        assert not _library.loaded_for(other)
        assert _library.loaded_for(torch.zeros(1)) == _library.cpu.loaded
    monkeypatch.setattr(_library, "cuda", Library("_C_cuda", True))
    assert _library.loaded_for(far)


def import_copy(folder: Path, before: str) -> subprocess.CompletedProcess[str]:
    """Imports a copy of the package whose CUDA library is broken, in a process of its own, and adapts on the CPU."""
    copy = folder / "metarec_fast"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__", "_C_cuda*"))
    built(copy)
    code = f"import torch\n{before}\nimport metarec_fast as mf\nassert mf.__file__.startswith({str(folder)!r})\n{ADAPT}"
    return subprocess.run([sys.executable, "-W", "always", "-c", code], cwd=folder, capture_output=True, text=True,
                          check=True, timeout=120, env={**os.environ, "PYTHONPATH": str(folder)})  # fmt: skip


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has CUDA")
def test_a_wheel_with_cuda_inside_loads_and_works_on_a_torch_without_cuda(tmp_path):
    done = import_copy(tmp_path, before="")
    assert "metarec_fast" not in done.stderr
    assert done.stdout.startswith("[[0.")


def test_cuda_kernels_that_do_not_fit_are_one_warning_and_the_cpu_works(tmp_path):
    done = import_copy(tmp_path, before="torch.version.cuda = '12.6'")
    assert done.stderr.count("RuntimeWarning") == 1
    assert "metarec_fast has no CUDA kernels, and is slow on a GPU: it was built for CUDA 13.0.88, torch" in done.stderr
    assert done.stdout.startswith("[[0.")


def test_whoever_does_not_compile_does_not_wait_for_the_compiler(tmp_path):
    code = f"import sys, torch\nimport metarec_fast as mf\n{ADAPT}\nassert 'torch._dynamo' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, timeout=120)
