"""Systematic names of organic molecules by a small grammar.

A name's level is the number of features on its carbon skeleton: a ring, a double or triple bond,
a characteristic group (the suffix), a substituent (a prefix); an aromatic parent counts as one.
Level 1 is `hexan-2-ol` or `2-chlorohexane` (and, with none, `hexane`); level 3 is
`2-bromocyclohexan-1-one`.

The grammar knows no chemistry beyond the numbers of the carbon atoms: what it writes is checked by
OPSIN (`checkers.py`), and what is no molecule is dropped there.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass

STEMS = ["meth", "eth", "prop", "but", "pent", "hex", "hept", "oct", "non", "dec", "undec", "dodec"]
TIMES = {1: "", 2: "di", 3: "tri", 4: "tetra"}
SUBSTITUENTS = [
    "bromo",
    "chloro",
    "ethoxy",
    "ethyl",
    "fluoro",
    "iodo",
    "methoxy",
    "methyl",
    "nitro",
]
WEAK = ["amino", "hydroxy"]  # a suffix themselves unless another one comes first
SUFFIXES = ["ol", "one", "amine", "thiol"]  # on a numbered carbon
END_SUFFIXES = ["al", "amide", "nitrile", "oic_acid", "oate"]  # on the first carbon of a chain
ARENES = {
    "benzene": 6,
    "phenol": 6,
    "aniline": 6,
    "benzoic acid": 6,
    "benzaldehyde": 6,
    "benzonitrile": 6,
    "benzamide": 6,
}
"""Aromatic parents and their positions; all but benzene itself bear their group at position 1."""


@dataclass(frozen=True)
class Molecule:
    """What a name says. Positions are 1 to `carbons`; a bond's is the lower of its two."""

    carbons: int
    ring: bool = False
    bonds: tuple[tuple[int, str], ...] = ()
    suffix: tuple[int, str] | None = None
    substituents: tuple[tuple[int, str], ...] = ()


def draw_name(generator: random.Random, level: int, max_carbons: int = 10) -> str:
    """A name with `level` features on at most `max_carbons` (up to 12) skeleton carbons."""
    while True:
        if level >= 2 and generator.random() < 0.15:
            return _arene(generator, level - 1)
        molecule = _aliphatic(generator, level, generator.randint(1, max_carbons))
        if molecule is not None:
            acid_of = generator.choice(STEMS[:4]) + "yl "
            ester = molecule.suffix is not None and molecule.suffix[1] == "oate"
            return (acid_of if ester else "") + spell(lowest_numbering(molecule))


def names(level: int, count: int, seed: int = 0, max_carbons: int = 10) -> list[str]:
    """Up to `count` different names of a level, the same for the same arguments; fewer where the
    grammar has no more."""
    generator = random.Random(f"{seed} {level}")
    found: dict[str, None] = {}
    for _ in range(20 * count):
        if len(found) == count:
            break
        found[draw_name(generator, level, max_carbons)] = None
    return list(found)


def _aliphatic(generator: random.Random, features: int, carbons: int) -> Molecule | None:
    """A chain or ring with so many features, each on carbons of its own; None if they do not fit."""
    ring = carbons >= 3 and generator.random() < 0.25
    left = features - ring
    free = set(range(1, carbons + 1))
    ends = set() if ring else {1, carbons}
    suffix = None
    if left and generator.random() < 0.6:
        kind = generator.choice(SUFFIXES if ring else SUFFIXES + END_SUFFIXES)
        # A ketone at the end of a chain would be an aldehyde.
        places = {1} if kind in END_SUFFIXES else free - ends if kind == "one" else free
        if not places:
            return None
        suffix = (generator.choice(sorted(places)), kind)
        free.discard(suffix[0])
        left -= 1
    bonds: list[tuple[int, str]] = []
    while left and generator.random() < 0.35:
        starts = sorted(p for p in free if p + 1 in free)
        if not starts:
            return None
        start = generator.choice(starts)
        bonds.append((start, "en" if ring else generator.choice(["en", "yn"])))
        free -= {start, start + 1}
        left -= 1
    substituents = []
    weak = WEAK if suffix and suffix[1] not in ("ol", "amine", "thiol") else []
    for _ in range(left):
        kind = generator.choice(SUBSTITUENTS + weak)
        places = set(free)
        if kind in ("methyl", "ethyl"):  # at the end of a chain they would only make it longer
            places -= ends
        if kind == "ethyl" and not ring:
            places -= {2, carbons - 1}
        if not places:
            return None
        position = generator.choice(sorted(places))
        free.discard(position)
        substituents.append((position, kind))
    return Molecule(carbons, ring, tuple(bonds), suffix, tuple(substituents))


def _arene(generator: random.Random, features: int) -> str:
    parent = generator.choice(list(ARENES))
    positions = range(1 if parent == "benzene" else 2, ARENES[parent] + 1)
    places = generator.sample(positions, features)
    places = min(_ring_numberings(places, turn=parent == "benzene"), key=sorted)
    kinds = SUBSTITUENTS if parent in ("benzene", "aniline", "phenol") else SUBSTITUENTS + WEAK
    substituents = tuple((p, generator.choice(kinds)) for p in places)
    alone = parent == "benzene" and len(substituents) == 1
    return prefixes(substituents, numbered=not alone) + parent


def _ring_numberings(places: list[int], turn: bool) -> Iterator[list[int]]:
    """Both ways around a ring of six, from position 1 or, with `turn`, from any."""
    for offset in range(6 if turn else 1):
        yield [(p - 1 + offset) % 6 + 1 for p in places]
        yield [(1 - p + offset) % 6 + 1 for p in places]


def lowest_numbering(molecule: Molecule) -> Molecule:
    """The same molecule, numbered so that its suffix, its bonds, then its substituents have the
    lowest numbers (IUPAC rule P-31.1.4)."""
    return min((_renumber(molecule, step) for step in _numberings(molecule)), key=_locants)


def _locants(molecule: Molecule) -> tuple[object, ...]:
    return (
        molecule.suffix[0] if molecule.suffix else 0,
        sorted(p for p, _ in molecule.bonds),
        sorted(p for p, kind in molecule.bonds if kind == "en"),
        sorted(p for p, _ in molecule.substituents),
        sorted(molecule.substituents, key=lambda s: (s[1], s[0])),
    )


def _numberings(molecule: Molecule) -> Iterator[Callable[[int], int]]:
    """Every way of numbering the skeleton, as a map from old positions to new ones."""
    n = molecule.carbons
    for offset in range(n if molecule.ring else 1):
        yield lambda p, offset=offset: (p - 1 + offset) % n + 1
        yield lambda p, offset=offset: (n - p + offset) % n + 1


def _renumber(molecule: Molecule, new: Callable[[int], int]) -> Molecule:
    n, suffix = molecule.carbons, molecule.suffix

    def bond(p: int) -> int:
        """A bond's position is that of its lower end; in a ring, n is bound to 1."""
        a, b = new(p), new(p % n + 1)
        return min(a, b) if abs(a - b) == 1 else max(a, b)

    return Molecule(
        n,
        molecule.ring,
        tuple(sorted((bond(p), kind) for p, kind in molecule.bonds)),
        (new(suffix[0]), suffix[1]) if suffix else None,
        tuple(sorted((new(p), kind) for p, kind in molecule.substituents)),
    )


def spell(molecule: Molecule) -> str:
    """The name of a molecule as it is numbered."""
    features = len(molecule.bonds) + len(molecule.substituents) + (molecule.suffix is not None)
    # A number is left out where there is no choice.
    one_place = molecule.carbons == 1 or (
        features <= 1 and (molecule.ring or molecule.carbons == 2)
    )
    stem = ("cyclo" if molecule.ring else "") + STEMS[molecule.carbons - 1]
    parent = _suffixed(stem + _unsaturation(molecule, not one_place), molecule, not one_place)
    return prefixes(molecule.substituents, not one_place) + parent


def prefixes(substituents: tuple[tuple[int, str], ...], numbered: bool = True) -> str:
    """`2-bromo-1,1-dichloro`, in alphabetical order."""
    positions: dict[str, list[int]] = defaultdict(list)
    for position, kind in substituents:
        positions[kind].append(position)
    parts = []
    for kind in sorted(positions):
        locants = ",".join(map(str, sorted(positions[kind])))
        word = TIMES[len(positions[kind])] + kind
        parts.append(f"{locants}-{word}" if numbered else word)
    return ("-" if numbered else "").join(parts)


def _unsaturation(molecule: Molecule, numbered: bool) -> str:
    """`ane`, `-2-ene`, `-2-en-4-yne`, `a-1,3-diene`, `-3-ene-1,5-diyne`"""
    at = {kind: sorted(p for p, k in molecule.bonds if k == kind) for kind in ("en", "yn")}
    text = ""
    for kind, positions in at.items():
        if positions:
            times = TIMES[len(positions)]
            vowel = ("e" if text else "a") if times else ""
            text += (
                vowel + (f"-{','.join(map(str, positions))}-" if numbered else "") + times + kind
            )
    return (text or "an") + "e"


def _suffixed(chain: str, molecule: Molecule, numbered: bool) -> str:
    if molecule.suffix is None:
        return chain
    position, kind = molecule.suffix
    word = kind.replace("_", " ")
    stem = chain.removesuffix("e") if word[0] in "aeiou" else chain
    return f"{stem}-{position}-{word}" if kind in SUFFIXES and numbered else stem + word
