import json
import sys
from importlib import metadata

import pytest
import torch
import torch.distributed as dist

from regate_ds.job.ranks import Ranks
from regate_ds.recipe.doctor import examine as doctor
from regate_ds.recipe.doctor.check import Check

FUSED_ADAM = "class FusedAdam: pass\n"


def examined(name: str) -> Check:
    (check,) = (f for f in doctor.examine() if f.name == name)
    return check


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Puts a package of a single source text per module on the path, until the test ends."""

    def write(name: str, **modules: str) -> None:
        for module, text in {"__init__": "", **modules}.items():
            folder = tmp_path / name if module == "__init__" else tmp_path / name / module
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "__init__.py").write_text(text)

    monkeypatch.syspath_prepend(tmp_path)
    yield write
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


def test_a_machine_that_runs_the_tests_lacks_nothing_required():
    assert not doctor.lacks_required(doctor.examine())


def test_a_missing_package_is_required_and_says_how_to_get_it(monkeypatch):
    def version(name):
        if name == "peft":
            raise metadata.PackageNotFoundError(name)
        return "1.0"

    monkeypatch.setattr(metadata, "version", version)
    monkeypatch.setattr(doctor, "import_module", lambda _: None)
    checks = doctor.examine()
    assert [f.name for f in checks if f.is_required and not f.is_fine] == ["peft"]
    assert "pip install" in examined("peft").advice
    assert doctor.lacks_required(checks)
    assert doctor.as_text(checks).endswith("something required is missing or broken")


@pytest.mark.parametrize("kind", ["ImportError", "RuntimeError"])
def test_a_required_package_that_cannot_be_imported_is_broken(kind, install, monkeypatch):
    install("own_kernels", __init__=f"print('hello')\nraise {kind}('undefined symbol\\nmore')\n")
    monkeypatch.setattr(metadata, "version", lambda _: "1.0")
    found = doctor._package("own_kernels", "1.0")
    assert (found.found, found.advice) == ("broken", "1.0: undefined symbol")
    assert doctor.as_text([found]).startswith("BROKEN   own_kernels")


@pytest.mark.parametrize(
    ("version", "advice"), [("2.13.0+cpu", ""), ("2.12.0", "tested with 2.13.0")]
)
def test_another_version_than_the_tested_one_is_named_but_accepted(version, advice, monkeypatch):
    monkeypatch.setattr(metadata, "version", lambda _: version)
    torch_found = examined("torch")
    assert (torch_found.is_fine, torch_found.advice) == (True, advice)


def test_apex_that_is_not_installed_is_optional(monkeypatch):
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda _: None)
    apex = examined("apex")
    assert (apex.found, apex.is_required) == ("absent", False)


def test_nvidias_apex_is_known_by_its_optimizer(install):
    install("apex", optimizers=FUSED_ADAM)
    assert (examined("apex").found, examined("apex").is_fine) == ("NVIDIA's", True)


def test_pypis_apex_is_found_out_without_importing_it(install):
    install("apex", __init__="raise SystemExit('imported')\n")
    apex = examined("apex")
    assert (apex.found, apex.is_fine) == ("not NVIDIA's", False)
    assert "pip uninstall apex" in apex.advice


@pytest.mark.parametrize("text", ["", "import no_such_library\n"])
def test_nvidias_apex_that_cannot_be_used_is_to_be_built_again(text, install):
    install("apex", optimizers=text)
    assert examined("apex").found == "present, but fails"
    assert "build it again" in examined("apex").advice


def test_attention_kernels_are_shown_with_their_version(install):
    install("flash_attn", __init__="__version__ = '2.8.1'\n")
    assert (examined("flash_attn").found, examined("flash_attn").is_fine) == ("2.8.1", True)


def test_attention_kernels_built_for_another_torch_are_named(install):
    install("flash_attn", __init__="raise OSError('undefined\\nsymbol')\n")
    found = examined("flash_attn")
    assert (found.found, found.is_fine) == ("present, but fails", False)
    assert f"build it for torch {torch.__version__}: undefined symbol" in found.advice


def test_gloo_is_tried_and_leaves_no_group_behind():
    assert examined("gloo").found == "works"
    assert not dist.is_initialized()


def test_gloo_that_cannot_bind_says_what_to_set(monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("no\ninterface")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(dist, "init_process_group", fail)
    gloo = examined("gloo")
    assert (gloo.is_required, gloo.is_fine) == (True, False)
    assert gloo.advice == "set GLOO_SOCKET_IFNAME to a network interface: no interface"


def test_a_build_without_nccl_is_a_lack_only_where_there_are_gpus(monkeypatch):
    monkeypatch.setattr(dist, "is_backend_available", lambda _: False)
    for has_gpu in (False, True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda has_gpu=has_gpu: has_gpu)
        assert doctor._backend("nccl").is_required == has_gpu
        assert doctor._backend("gloo").is_required != has_gpu


def test_a_gpu_that_torch_does_not_see_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: f"/bin/{name}")
    assert "sees no GPU" in examined("GPUs").advice


def test_a_missing_compiler_is_named(monkeypatch):
    monkeypatch.setattr(doctor.shutil, "which", lambda _: None)
    assert "install gcc" in examined("C compiler").advice


def test_the_launcher_and_its_first_rank_are_named():
    ranks = Ranks("srun", 1, 2, address="n1", port=77)
    assert doctor._job(ranks).found == "srun, first rank at n1:77"


def test_versions_as_tested_share_a_line_and_others_have_their_own():
    usual = [Check(n, "1.0", True, True, is_version=True) for n in ("one", "two")]
    other = Check("three", "2.0", True, True, "tested with 1.0", is_version=True)
    lines = doctor.as_text([*usual, other]).splitlines()
    assert lines[0] == "ok       one 1.0, two 1.0"
    assert lines[1].split() == ["ok", "three", "2.0", "tested", "with", "1.0"]


@pytest.mark.parametrize(("free", "is_fine"), [(3 * 2**30, True), (2**30, False)])
def test_what_a_run_needs_is_compared_with_what_is_free(free, is_fine):
    found = doctor._room("disk", 2 * 2**30, free, "free some")
    assert (found.is_fine, found.advice) == (is_fine, "" if is_fine else "free some")
    assert found.found.startswith("needs 2.0 GiB")


def test_the_findings_fit_on_one_screen_and_read_back_from_json():
    checks = doctor.examine()
    assert len(doctor.as_text(checks).splitlines()) <= 24
    names = [check["name"] for check in json.loads(doctor.as_json(checks))]
    assert names == [check.name for check in checks]
