"""Releases of triton: on untested ones the Hopper kernel raises, and the portable kernel warns."""

import warnings

import pytest
import torch

from distflash.doctor import machine as doctor
from distflash.kernels import Hopper, Problem, Triton
from distflash.kernels.machine import MACHINES
from distflash.kernels.versions import gluon_reasons, is_tested

pytestmark = pytest.mark.pure

TESTED = ["3.6.0", "3.7.1", "3.8.0+git1234", "3.9.2"]
UNTESTED = ["3.5.1", "3.10.0", "3.10.0rc1", "4.0.0"]
PROBLEM = Problem(torch.device("cpu"), torch.bfloat16, heads=4, kv_heads=2, d_qk=128, d_v=128)


def reasons(kernel, version, monkeypatch):
    """Of a call on a Hopper GPU with such a triton; a warning is an error."""
    triton = pytest.importorskip("triton")
    monkeypatch.setattr(triton, "__version__", version)
    return kernel(machine=MACHINES["sm_90"]).not_supported_reasons(PROBLEM)


@pytest.mark.parametrize("version", TESTED)
@pytest.mark.parametrize("kernel", [Hopper, Triton])
def test_a_tested_release_is_taken_without_a_word(kernel, version, monkeypatch):
    assert is_tested(version) and not gluon_reasons(version)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert reasons(kernel, version, monkeypatch) == []


@pytest.mark.parametrize("version", UNTESTED)
def test_the_hopper_kernel_refuses_another_release_and_names_the_remedies(version, monkeypatch):
    with pytest.warns(UserWarning):
        (reason,) = reasons(Hopper, version, monkeypatch)
    assert f"written for triton 3.6 to 3.9, and triton {version} is installed" in reason
    assert "install one of these releases" in reason and "df.kernels.Triton()" in reason


@pytest.mark.parametrize("version", UNTESTED)
def test_the_portable_kernel_only_warns(version, monkeypatch):
    with pytest.warns(UserWarning, match=f"tested with triton 3.6 to 3.9, and triton {version} is installed"):
        assert reasons(Triton, version, monkeypatch) == []


def test_the_doctor_says_that_a_release_is_not_tested(monkeypatch):
    monkeypatch.setattr(doctor.metadata, "version", lambda name: "3.10.0")
    found = {each.check: each for each in doctor.versions()}
    assert found["triton"].result == "3.10.0: not tested, 3.6 to 3.9 are" and found["triton"].ok
    assert found["einops"].result == "3.10.0"
