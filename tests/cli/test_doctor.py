"""``layerskip doctor``: what it finds, and that it reports what is broken instead of failing."""

import subprocess
import sys

import pytest
import torch

from cli import doctor_command
from cli.common import describe_bfloat16
from layerskip.packed_linear import has_kernels_for
from layerskip.utils import Device
from tests.cli.conftest import ENVIRONMENT


def test_it_says_what_is_installed_and_what_it_runs_on(layerskip):
    done = layerskip("doctor")
    assert (done.status, done.err) == (0, "")
    lines = dict(line.split(maxsplit=1) for line in done.out.splitlines())
    assert "torch 2." in lines["versions"]
    assert "optuna " in lines["versions"]
    assert lines["device"].startswith("cpu: ")
    assert lines["dtype"].startswith("float32 on cpu: output is identical to plain decoding")
    assert lines["studies"] == "sqlite:///layerskip.db: does not exist yet; a search creates it"


def test_one_object_has_all_of_it(layerskip):
    result = layerskip("doctor", "--json").object
    assert result["ok"] is True
    assert result["model"] is None
    assert set(result["versions"]) == {"python", "layerskip", "torch", "transformers", "optuna"}
    assert all(result["versions"].values())
    assert result["cache"]["writable"] is True
    assert result["cache"]["free_bytes"] > 0


def test_it_makes_no_database(layerskip, elsewhere):
    layerskip("doctor")
    assert list(elsewhere.iterdir()) == []


def test_a_database_that_cannot_be_used_is_said_so_without_its_password(layerskip):
    done = layerskip("doctor", "--storage", "nothing://me:s3cr3t@host/db")
    assert done.status == 0
    assert "studies     " in done.out
    assert "unknown kind of database" in done.out
    assert "s3cr3t" not in done.out + done.err
    result = layerskip("doctor", "--storage", "nothing://me:s3cr3t@host/db", "--json").object
    assert result["storage"]["reachable"] is False


def test_a_cache_that_cannot_be_written_is_a_fault(layerskip, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LAYERSKIP_CACHE", str(tmp_path / "file"))
    done = layerskip("doctor")
    assert done.status == 1
    line = f"layerskip: cache folder {tmp_path / 'file'}: not writable; set LAYERSKIP_CACHE to a folder that is"
    assert line in done.err.splitlines()
    assert layerskip("doctor", "--json").object["ok"] is False


def test_studies_are_counted(layerskip):
    import optuna

    from studies.storage import open_storage

    optuna.create_study(study_name="s", storage=open_storage("sqlite:///layerskip.db"))
    assert layerskip("doctor", "--json").object["storage"]["studies"] == 1
    for url in ("sqlite:///layerskip.db?timeout=5", "sqlite+pysqlite:///layerskip.db"):
        assert layerskip("doctor", "--storage", url, "--json").object["storage"]["studies"] == 1


@pytest.mark.parametrize("url", ["sqlite:///none.db?timeout=5", "sqlite+pysqlite:///none.db"])
def test_a_database_that_is_not_there_yet_is_no_fault_however_its_url_is_written(layerskip, elsewhere, url):
    assert f"{url}: does not exist yet; a search creates it" in layerskip("doctor", "--storage", url).out
    assert list(elsewhere.iterdir()) == []


@pytest.fixture
def without(monkeypatch):
    """Some packages are not installed."""

    def pretend(*packages):
        found = doctor_command.version

        def version(name):
            if name in packages:
                raise doctor_command.PackageNotFoundError(name)
            return found(name)

        monkeypatch.setattr(doctor_command, "version", version)

    return pretend


def test_a_package_that_is_needed_and_missing_is_a_fault(layerskip, without):
    without("optuna")
    done = layerskip("doctor", "smollm2")  # and no model is loaded then
    assert done.status == 1
    assert "optuna missing" in done.out
    assert "layerskip: the package 'optuna' is not installed" in done.err.splitlines()
    assert layerskip("doctor", "--json").object["ok"] is False


def test_a_checkout_need_not_be_installed(layerskip, without):
    without("layerskip")
    result = layerskip("doctor", "--json").object
    assert (result["ok"], result["versions"]["layerskip"]) == (True, None)


def test_it_works_where_libraries_cannot_even_be_imported():
    code = """
import sys
for name in ("torch", "optuna", "transformers", "sqlalchemy"):
    sys.modules[name] = None
from cli import main
sys.exit(main.run(["doctor"]))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=ENVIRONMENT, timeout=60
    )
    assert done.returncode == 0
    assert "versions    python " in done.stdout
    assert "Traceback" not in done.stderr
    assert "layerskip: import of torch halted; None in sys.modules" in done.stderr.splitlines()


def test_an_apple_gpu_is_said_not_to_be_supported(layerskip, monkeypatch):
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: True)
    assert "device      mps: Apple GPU; not supported, 'auto' takes the CPU" in layerskip("doctor").out


def test_a_gpu_is_named_with_its_memory_and_capability(layerskip, monkeypatch):
    class Properties:
        name, total_memory, major, minor = "A GPU", 24 * 2**30, 8, 9

    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda index: Properties)
    from layerskip.utils import devices

    assert devices()[0] == Device("cuda:0", "A GPU, 24 GiB, compute capability 8.9", True)


@pytest.mark.parametrize(
    ("options", "advice"),
    [
        (["--dtype", "float32"], "output is identical to plain decoding"),
        (["--dtype", "bfloat16"], "near-ties may be resolved differently, with or without a draft"),
    ],
)
def test_the_dtype_comes_with_advice(layerskip, options, advice):
    assert advice in layerskip("doctor", *options).out


def test_a_bad_device_is_said_and_the_rest_is_looked_at(layerskip):
    done = layerskip("doctor", "--device", "abacus")
    assert done.status == 0
    assert "device 'abacus' is not available" in done.err
    assert "versions    python" in done.out


def test_with_a_model_it_says_whether_speculation_can_pay(layerskip, model_folder):
    done = layerskip("doctor", model_folder)
    assert done.status == 0
    assert "v(k)        cost of verifying k tokens, in plain steps: 1: 1.00 · 2: " in done.out
    assert "draft       half of the sublayers skipped: " in done.out
    assert done.out.splitlines()[-1].startswith("Speculation ")
    result = layerskip("doctor", model_folder, "--json").object["model"]
    assert result["verdict"].startswith("Speculation ")
    assert isinstance(result["can_pay"], bool)
    assert len(result["drafts"]) == 5
    assert result["verification"]["1"] == pytest.approx(1)


@pytest.mark.parametrize(
    ("saved", "expected"),
    [(0.05, "at about 20 tokens/s here instead of 10"), (0.005, None), (-0.1, None), (None, None)],
)
def test_bfloat16_is_advised_where_it_was_measured_to_be_clearly_faster(saved, expected):
    advice = describe_bfloat16(10.0, saved)
    assert advice is None if expected is None else expected in advice


def test_what_bfloat16_would_take_is_measured_with_the_model(layerskip, model_folder):
    own = layerskip("doctor", model_folder, "--json").object["model"]
    assert (own["bfloat16_step_seconds"] is not None) == has_kernels_for(torch.bfloat16)
    shorter = layerskip("doctor", model_folder, "--dtype", "bfloat16", "--json").object["model"]
    assert shorter["bfloat16_step_seconds"] is None


def test_a_model_that_cannot_be_loaded_is_an_error_in_one_line_and_nothing_is_said_to_be_measured(layerskip):
    done = layerskip("doctor", "./nowhere")
    assert done.status == 1
    assert "layerskip: model './nowhere': no such file or folder" in done.err
    assert "measuring" not in done.err
