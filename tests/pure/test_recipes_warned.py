"""FutureWarnings go to a file, and others to standard error."""

import warnings

import pytest

from distflash.recipes.warned import future_warnings_in

pytestmark = pytest.mark.filterwarnings("default")


def test_future_warnings_go_to_the_file_and_others_are_shown(tmp_path, capsys):
    path = tmp_path / "warnings.log"
    with future_warnings_in(path, active=True):
        warnings.warn("soon another name", FutureWarning, stacklevel=1)
        warnings.warn("look at this: FutureWarning: or not", UserWarning, stacklevel=1)
    assert "soon another name" in path.read_text() and "look at this" not in path.read_text()
    shown = capsys.readouterr().err
    assert "UserWarning: look at this" in shown and "another name" not in shown
    with pytest.warns(FutureWarning, match="as before"):
        warnings.warn("as before", FutureWarning, stacklevel=1)


def test_a_run_without_them_leaves_no_file_and_other_ranks_keep_nothing(tmp_path, capsys):
    path = tmp_path / "warnings.log"
    with future_warnings_in(path, active=True):
        pass
    with future_warnings_in(path, active=False):
        warnings.warn("soon another name", FutureWarning, stacklevel=1)
    assert not path.exists() and not capsys.readouterr().err
