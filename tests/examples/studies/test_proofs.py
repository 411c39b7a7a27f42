"""The proofs study: its theorems, Agda as its judge, and its script."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from itertools import islice, product
from pathlib import Path

import pytest

from examples.studies.proofs.agda import Agda
from examples.studies.proofs.logic import (
    And,
    Atom,
    Bottom,
    Implies,
    Or,
    atoms,
    canonical,
    draw_formula,
    prove,
    show,
    theorems,
)

ROOT = Path(__file__).resolve().parents[3]
P, Q, R = Atom("P"), Atom("Q"), Atom("R")
SWAP = "P & Q -> Q & P"


def holds(formula, world: dict[str, bool]) -> bool:
    match formula:
        case Atom(name):
            return world[name]
        case Bottom():
            return False
        case And(left, right):
            return holds(left, world) and holds(right, world)
        case Or(left, right):
            return holds(left, world) or holds(right, world)
        case Implies(left, right):
            return not holds(left, world) or holds(right, world)


def test_what_is_proved_is_true_and_classical_truths_without_proof_stay_without():
    generator = random.Random(0)
    proved = 0
    for _ in range(400):
        formula = draw_formula(generator, "PQR", generator.randint(2, 6))
        if prove(formula) is not None:
            proved += 1
            names = atoms(formula)
            worlds = product((False, True), repeat=len(names))
            assert all(holds(formula, dict(zip(names, w, strict=True))) for w in worlds)
    assert proved > 20
    peirce = Implies(Implies(Implies(P, Q), P), P)
    middle = Or(P, Implies(P, Bottom()))
    double_negation = Implies(Implies(Implies(P, Bottom()), Bottom()), P)
    assert [prove(f) for f in (peirce, middle, double_negation)] == [None] * 3
    for formula in (peirce, middle, double_negation):  # but not refutable
        assert prove(Implies(Implies(formula, Bottom()), Bottom())) is not None


def test_formulas_are_shown_with_the_parentheses_they_need():
    assert show(Implies(Implies(P, Q), R)) == "(P -> Q) -> R"
    assert show(Implies(P, Implies(Q, R))) == "P -> Q -> R"
    assert show(Or(And(P, Q), Implies(R, Bottom()))) == "P & Q or ~ R"
    assert show(And(Or(P, Q), And(Q, R))) == "(P or Q) & Q & R"
    assert show(canonical(Implies(R, Implies(P, R)))) == "P -> Q -> P"


async def test_agda_accepts_every_proof_and_no_trick():
    async with Agda(processes=2) as agda:
        for theorem in islice(theorems(0), 40):
            verdict = await agda.check(theorem.statement, theorem.proof)
            assert verdict.holds, (theorem, verdict)
        assert (await agda.check(SWAP, "\\ x -> (snd x , fst x)")).holds
        for trick, says in {
            "\\ x -> x": "P !=< Q",
            "theorem": "Termination",
            "?": "leaves something open",
            "_": "leaves something open",
            "": "empty",
            "\\ x -> (snd x , fst y)": "Not in scope: y",
            "\\ x -> (snd x": "Parse error",
            "a\nb": "one line",
            "absurd {! !}": "plain term",
            "\\ x -> x -- comment": "plain term",
            "\\ x -> (snd x , fst x) ; evil : False ; evil = evil": "Termination",
        }.items():
            verdict = await agda.check(SWAP, trick)
            assert not verdict.holds
            assert says in verdict.message, (trick, verdict)


async def test_agda_that_dies_is_started_again():
    async with Agda(processes=1) as agda:
        assert (await agda.check("P -> P", "\\ a -> a")).holds
        agda.all[0].process.kill()
        assert (
            await agda.check("P -> Q -> P", "\\ a b -> a")
        ).message == "Agda gave up on this term"
        assert (await agda.check("P -> Q -> Q", "\\ a b -> b")).holds


@pytest.mark.slow
def test_the_script_goes_through_all_its_stages(tiny_llama, tmp_path):
    sizes = {"theorems": 20, "held-out": 4, "samples": 2, "epochs": 1}
    flags = [f"--{name}={value}" for name, value in sizes.items()]
    done = subprocess.run(
        [sys.executable, "-m", "examples.studies.proofs.train", "--model", tiny_llama, *flags],
        cwd=ROOT,
        env={**os.environ, "TINSMITH_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    for stage in ("base, few-shot", "LoRA on a fifth", "all parameters on all"):
        assert 0 <= result[stage]["pass@1"]["value"] <= result[stage]["pass@2"]["value"] <= 1
