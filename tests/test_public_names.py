"""The public names import from the top level, and a misspelt one gets the nearest."""

import importlib

import pytest

import stackwise

NAMES = [name for name in stackwise.__all__ if not name.startswith("_")]


@pytest.mark.parametrize("name", NAMES)
def test_a_public_name_imports_and_has_help(name):
    thing = getattr(stackwise, name)
    assert thing.__name__ == name
    assert thing.__doc__
    assert thing.__module__ == stackwise._HOME_OF[name], (
        "it is defined in one place, the one it is imported from"
    )
    assert getattr(stackwise, name) is thing


def test_the_list_of_names_is_complete():
    assert sorted(stackwise._HOME_OF) == sorted(NAMES)
    assert dir(stackwise) == sorted(stackwise.__all__)


def test_a_misspelt_name_is_an_attribute_error_with_the_nearest():
    with pytest.raises(AttributeError, match="did you mean 'StackWiseConfig'"):
        stackwise.StackwiseConfig  # noqa: B018
    with pytest.raises(ImportError, match="StackWiseConfg"):
        exec("from stackwise import StackWiseConfg")


def test_the_version_is_that_of_the_package():
    assert stackwise.__version__.count(".") == 2
    assert importlib.import_module("stackwise").__version__ == stackwise.__version__
