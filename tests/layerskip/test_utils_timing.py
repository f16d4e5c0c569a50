"""Clocks count their own phases. Nothing here depends on how fast anything is."""

import pytest
import torch

from layerskip.utils import PhaseClock, device_seconds, synchronize

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("name", DEVICES)
def test_a_phase_adds_up_over_its_blocks_and_apart_from_other_phases(name):
    device = torch.device(name)
    clock = PhaseClock(device)
    work = torch.ones(300, 300, device=device)
    with clock.phase("one"):
        work @ work
    after_one = clock.seconds("one")
    with clock.phase("other"):
        work @ work
    assert clock.seconds("one") == after_one > 0
    with clock.phase("one"):
        work @ work
    assert clock.seconds("one") > after_one
    assert clock.seconds("other") > 0


@pytest.mark.parametrize("name", DEVICES)
def test_reading_a_phase_twice_gives_the_same_seconds(name):
    clock = PhaseClock(torch.device(name))
    with clock.phase("one"):
        torch.ones(300, 300, device=name) @ torch.ones(300, 300, device=name)
    assert clock.seconds("one") == clock.seconds("one")


def test_a_phase_that_never_was_has_no_seconds():
    assert PhaseClock(torch.device("cpu")).seconds("never") == 0.0


@pytest.mark.parametrize("name", DEVICES)
def test_device_time_does_not_run_backwards(name):
    device = torch.device(name)
    synchronize(device)
    before = device_seconds(device)
    assert device_seconds(device) >= before
