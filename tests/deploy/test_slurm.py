"""The Slurm recipe: it parses, asks for what there is, and serves with a command of Tinsmith's."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

from tests.actors.script import ROOT
from tests.deploy.commands import parsed

RECIPE = ROOT / "deploy" / "slurm" / "tinsmith.sbatch"


def test_the_script_parses_and_asks_slurm_for_what_there_is():
    subprocess.run(["bash", "-n", RECIPE], check=True)
    text = RECIPE.read_text()
    options = re.findall(r"^#SBATCH --([a-z-]+)=\S+$", text, re.M)
    assert len(options) == text.count("#SBATCH")
    known = "job-name nodes ntasks-per-node cpus-per-task gpus-per-node time signal output"
    assert set(options) == set(known.split())


def test_what_it_serves_with_is_a_command_of_tinsmith():
    (line,) = re.findall(r"set -- (tinsmith serve (?:[^\\\n]|\\\n)*)\n", RECIPE.read_text())
    words = shlex.split(line.replace("\\\n", " ").replace("${TINSMITH_PORT:-8000}", "8000"))
    name, options = parsed(words)
    assert name == "serve"
    assert (options["address"], options["host"], options["port"]) == ("auto", "0.0.0.0", 8000)
    assert options["api_key_file"] == Path("$KEYS")
