"""Running out of memory is told apart from every other error, in whatever words it comes."""

import errno

import pytest
import torch

from layerskip.errors import first_line, out_of_memory


def test_main_memory_that_pytorch_cannot_have_is_recognized():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    line = out_of_memory(caught.value)
    assert line.startswith("out of memory in main memory (wanted 1.049e+06 TiB more): lower --max-new-tokens")
    assert "\n" not in line


def test_memory_of_a_gpu_is_recognized_with_how_much_was_wanted():
    """In the words of PyTorch 2.13; no GPU is needed for them."""
    error = torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 8.00 GiB of which 1.00 GiB is "
        "free. Including non-PyTorch memory, this process has 7.00 GiB memory in use."
    )
    assert out_of_memory(error).startswith("out of memory on the GPU (wanted 2.50 GiB more): lower --max-new-tokens")


@pytest.mark.parametrize("error", [MemoryError(), OSError(errno.ENOMEM, "Cannot allocate memory")])
def test_pythons_and_the_systems_words_are_recognized(error):
    assert out_of_memory(error).startswith("out of memory in main memory: lower")


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), OSError(errno.ENOSPC, "full"), ValueError("memory")])
def test_other_errors_are_not_about_memory(error):
    assert out_of_memory(error) is None


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("\n one.\ntwo\n"), "one"),
        (KeyError(), "KeyError"),
        (OSError(errno.ENOSPC, "full"), "[Errno 28] full"),
    ],
)
def test_the_first_line_of_an_error_says_something(error, line):
    assert first_line(error) == line
