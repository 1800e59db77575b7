"""Each planted fault is found by the tests that its entry names, which the default `pytest` runs."""

import pytest

from mutants import MUTANTS, Mutant, apply, copy_project, is_found


@pytest.fixture
def project(tmp_path):
    copy_project(tmp_path)
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("mutant", MUTANTS, ids=[mutant.name for mutant in MUTANTS])
def test_a_planted_fault_is_found(project, mutant):
    apply(mutant, project)
    assert is_found(mutant, project)


@pytest.mark.parametrize("mutant", MUTANTS, ids=[mutant.name for mutant in MUTANTS])
def test_a_fault_has_its_place(project, mutant):
    before = {name: (project / name).read_text() for name in mutant.files}
    apply(mutant, project)
    for name, text in before.items():
        assert (project / name).read_text() != text
        compile((project / name).read_text(), name, "exec")


def test_a_place_that_has_gone_is_an_error(project):
    mutant = Mutant("of another file", "compute_gae", "no such line", "", "test_algorithm.py")
    with pytest.raises(ValueError, match="0 places in compute_gae"):
        apply(mutant, project)
