"""What `neurms.callbacks` loads, and what it says without Lightning."""

import subprocess
import sys

WITHOUT_LIGHTNING = """
import sys
sys.modules["lightning"] = None
import neurms.callbacks, neurms.integrations
for statement in (
    "from neurms.callbacks import NeuRMSCallback",
    "import neurms.callbacks.lightning",
    "import neurms.integrations.lightning",
):
    try:
        exec(statement)
    except ImportError as error:
        assert 'pip install "neurms[lightning]"' in str(error), error
    else:
        raise SystemExit(f"{statement} worked")
"""


def python(source: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", source], capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr


def test_a_missing_lightning_names_the_extra():
    python(WITHOUT_LIGHTNING)


def test_the_index_loads_no_framework():
    python("import sys, neurms.callbacks; assert 'lightning' not in sys.modules")
