"""Each example runs."""

import subprocess
import sys
from pathlib import Path

from PIL import Image

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_show_views(tmp_path):
    out = tmp_path / "views.png"
    photo = EXAMPLES / "photos" / "rocket.jpg"
    command = [sys.executable, EXAMPLES / "show_views.py", photo, out, "--enlarge", "2"]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert run.stdout == "1280x854 pixels take 1792 positions of the prompt\n"
    with Image.open(out) as sheet:
        assert sheet.width > 3 * 512
        assert len(sheet.getcolors(1 << 24)) > 1000
