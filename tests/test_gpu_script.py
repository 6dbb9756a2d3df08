"""`python3 scripts/gpu` where there is no GPU: its sentence, and a dry run whose stages are resumed."""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: what it measures is not a test")


def run(*arguments):
    return subprocess.run([sys.executable, ROOT / "scripts" / "gpu", *map(str, arguments)], capture_output=True, text=True)


def test_without_a_gpu_one_sentence_says_what_is_missing_and_what_to_do():
    done = run()
    assert done.returncode == 2 and not done.stdout
    assert "sees no GPU" in done.stderr and "--dry" in done.stderr and len(done.stderr.strip().splitlines()) == 1


def test_a_dry_run_does_not_write_among_the_results():
    done = run("--dry")
    assert done.returncode == 2 and "name a folder with --out" in done.stderr


@pytest.mark.skipif(not find_spec("triton"), reason="needs Triton's interpreter")
def test_a_dry_run_goes_through_a_stage_and_resumes_behind_it(tmp_path):
    done = run("--dry", "--out", tmp_path, "--seconds", 40, "quantized", "claims")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "claims: not run, it may take 400 s and --seconds 40 leaves less" in done.stdout
    (path,) = tmp_path.iterdir()
    rows = json.loads(path.read_text())["stages"]["quantized"]["rows"]
    assert len(rows) == 4 and all(row["us"] > 0 and row["floor_us"] > 0 for row in rows)
    assert "int4_g128" in done.stdout
    assert "quantized: known" in run("--dry", "--out", tmp_path, "quantized").stdout
    assert "unknown stage 'nothing'" in run("--dry", "--out", tmp_path, "nothing").stderr
