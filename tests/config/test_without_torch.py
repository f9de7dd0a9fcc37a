"""Work on configurations never imports torch, and starts fast enough for a command line."""

import subprocess
import sys

import pytest


def run(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize(
    "work",
    [
        "import stackwise",
        "import stackwise.config.root",
        "from stackwise import StackWiseConfig; StackWiseConfig.from_yaml('demo').validate()",
        "from stackwise import StackWiseConfig as C; "
        "C.from_dict({'training': {'stages': [{'train': ['all'], 'max_steps': 1}]}}).validate()",
        "from stackwise import ConfigError, ArchitectureConfig",
        "from stackwise.config.schema import schema_rows; schema_rows()",
        "from stackwise.config.resolve import resolve; from stackwise import StackWiseConfig; resolve(StackWiseConfig())",
        "import stackwise; dir(stackwise)",
    ],
)
def test_torch_is_not_imported(work):
    heavy = "{'torch', 'numpy', 'tokenizers', 'transformers', 'matplotlib', 'rich', 'typer'}"
    assert run(f"import sys; {work}; print(sorted({heavy} & set(sys.modules)))") == "[]"


def test_importing_the_package_imports_no_part_of_it():
    assert run("import sys, stackwise; print([m for m in sys.modules if m.startswith('stackwise.')])") == "[]"
