"""Theorems of intuitionistic propositional logic, with proofs as Agda terms to learn from.

Formulas are drawn at random; a prover for the contraction-free calculus G4ip (Dyckhoff, 1992) keeps
those that hold, with a proof term each. Nothing here decides what counts as a proof: Agda does.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from typing import TypeAlias


@dataclass(frozen=True)
class Atom:
    name: str


@dataclass(frozen=True)
class Bottom:
    pass


@dataclass(frozen=True)
class And:
    left: Formula
    right: Formula


@dataclass(frozen=True)
class Or:
    left: Formula
    right: Formula


@dataclass(frozen=True)
class Implies:
    left: Formula
    right: Formula


Formula: TypeAlias = "Atom | Bottom | And | Or | Implies"

# How tightly each connective binds, as Prelude.agda declares it.
_ARROW, _OR, _AND, _TIGHT = range(4)


def show(formula: Formula, around: int = _ARROW) -> str:
    """As Agda reads it, with no more parentheses than needed."""
    match formula:
        case Atom(name):
            return name
        case Bottom():
            return "False"
        case Implies(left, Bottom()):
            return _parenthesised(f"~ {show(left, _TIGHT)}", _AND, around)
        case Implies(left, right):
            text = f"{show(left, _OR)} -> {show(right)}"
            return _parenthesised(text, _ARROW, around)
        case Or(left, right):
            text = f"{show(left, _AND)} or {show(right, _OR)}"
            return _parenthesised(text, _OR, around)
        case And(left, right):
            text = f"{show(left, _TIGHT)} & {show(right, _AND)}"
            return _parenthesised(text, _AND, around)


def _parenthesised(text: str, binds: int, around: int) -> str:
    return f"({text})" if binds < around else text


def atoms(formula: Formula) -> list[str]:
    """Names in order of appearance."""
    match formula:
        case Atom(name):
            return [name]
        case Bottom():
            return []
        case _:
            return list(dict.fromkeys([*atoms(formula.left), *atoms(formula.right)]))


def canonical(formula: Formula) -> Formula:
    """The formula with its atoms named P, Q, R, ... in order of appearance, so that two theorems
    that differ in names only are one."""
    names = dict(zip(atoms(formula), "PQRSTUVW", strict=False))

    def rename(part: Formula) -> Formula:
        match part:
            case Atom(name):
                return Atom(names[name])
            case Bottom():
                return part
            case _:
                return type(part)(rename(part.left), rename(part.right))

    return rename(formula)


Term: TypeAlias = tuple
"""A proof term: ("var", number), ("name", text), ("lam", number, body), ("app", function, argument)
or ("pair", left, right)."""


def prove(goal: Formula) -> str | None:
    """A proof of `goal` as an Agda term; None if it does not hold."""
    term = _prove([], goal, count())
    return None if term is None else _show_term(_eta(term), {}, _WHOLE)


def _app(function: Term, argument: Term) -> Term:
    if function[0] == "lam":
        return _substitute(function[2], function[1], argument)
    return ("app", function, argument)


def _first(pair: Term) -> Term:
    return pair[1] if pair[0] == "pair" else _call("fst", pair)


def _second(pair: Term) -> Term:
    return pair[2] if pair[0] == "pair" else _call("snd", pair)


def _call(name: str, *arguments: Term) -> Term:
    term: Term = ("name", name)
    for argument in arguments:
        term = ("app", term, argument)
    return term


def _substitute(term: Term, variable: int, value: Term) -> Term:
    # Variables are numbered uniquely, so nothing is captured.
    match term:
        case ("var", number):
            return value if number == variable else term
        case ("name", _):
            return term
        case ("lam", bound, body):
            return ("lam", bound, _substitute(body, variable, value))
        case ("app", ("name", "fst"), argument):
            return _first(_substitute(argument, variable, value))
        case ("app", ("name", "snd"), argument):
            return _second(_substitute(argument, variable, value))
        case ("app", function, argument):
            return _app(
                _substitute(function, variable, value), _substitute(argument, variable, value)
            )
        case ("pair", left, right):
            return (
                "pair",
                _substitute(left, variable, value),
                _substitute(right, variable, value),
            )
    raise AssertionError(term)


def _prove(context: list[tuple[Formula, Term]], goal: Formula, fresh: Iterator[int]) -> Term | None:
    for formula, term in context:
        if formula == goal:
            return term
        if formula == Bottom():
            return _call("absurd", term)
    match goal:
        case Implies(left, right):
            variable = next(fresh)
            body = _prove([*context, (left, ("var", variable))], right, fresh)
            return None if body is None else ("lam", variable, body)
        case And(left, right):
            first = _prove(context, left, fresh)
            second = None if first is None else _prove(context, right, fresh)
            return None if second is None else ("pair", first, second)
    for index, (formula, term) in enumerate(context):
        rest = context[:index] + context[index + 1 :]
        match formula:
            case And(left, right):
                parts = [(left, _first(term)), (right, _second(term))]
                return _prove(rest + parts, goal, fresh)
            case Or(left, right):
                branches = []
                for side in (left, right):
                    variable = next(fresh)
                    body = _prove([*rest, (side, ("var", variable))], goal, fresh)
                    if body is None:
                        return None
                    branches.append(("lam", variable, body))
                return _call("either", *branches, term)
            case Implies(Bottom(), _):
                return _prove(rest, goal, fresh)
            case Implies(Atom() as atom, right):
                known = next((t for f, t in rest if f == atom), None)
                if known is not None:
                    return _prove([*rest, (right, _app(term, known))], goal, fresh)
            case Implies(And(left, right), result):
                a, b = next(fresh), next(fresh)
                applied = _app(term, ("pair", ("var", a), ("var", b)))
                curried = ("lam", a, ("lam", b, applied))
                return _prove(
                    [*rest, (Implies(left, Implies(right, result)), curried)], goal, fresh
                )
            case Implies(Or(left, right), result):
                split = []
                for side, name in ((left, "inl"), (right, "inr")):
                    variable = next(fresh)
                    body = _app(term, _call(name, ("var", variable)))
                    split.append((Implies(side, result), ("lam", variable, body)))
                return _prove(rest + split, goal, fresh)
    # What follows may fail, and another choice succeed.
    if isinstance(goal, Or):
        for side, name in ((goal.left, "inl"), (goal.right, "inr")):
            proof = _prove(context, side, fresh)
            if proof is not None:
                return _call(name, proof)
    for index, (formula, term) in enumerate(context):
        match formula:
            case Implies(Implies(left, right), result):
                rest = context[:index] + context[index + 1 :]
                b, ignored = next(fresh), next(fresh)
                weaker = ("lam", b, _app(term, ("lam", ignored, ("var", b))))
                premise = _prove(
                    [*rest, (Implies(right, result), weaker)], Implies(left, right), fresh
                )
                if premise is None:
                    continue
                proof = _prove([*rest, (result, _app(term, premise))], goal, fresh)
                if proof is not None:
                    return proof
    return None


def _eta(term: Term) -> Term:
    match term:
        case ("lam", bound, body):
            body = _eta(body)
            if body[0] == "app" and body[2] == ("var", bound) and not _uses(body[1], bound):
                return body[1]
            return ("lam", bound, body)
        case ("app" | "pair" as kind, left, right):
            return (kind, _eta(left), _eta(right))
    return term


def _uses(term: Term, variable: int) -> bool:
    match term:
        case ("var", number):
            return number == variable
        case ("name", _):
            return False
        case ("lam", _, body):
            return _uses(body, variable)
        case (_, left, right):
            return _uses(left, variable) or _uses(right, variable)
    raise AssertionError(term)


_WHOLE, _FUNCTION, _ARGUMENT = range(3)


def _show_term(term: Term, names: dict[int, str], place: int) -> str:
    match term:
        case ("var", number):
            return names[number]
        case ("name", name):
            return name
        case ("lam", _, _):
            bound = []
            while term[0] == "lam":
                names = names | {term[1]: "abcdefghijklmnopqrstuvwxyz"[len(names) % 26]}
                bound.append(names[term[1]])
                term = term[2]
            text = f"\\ {' '.join(bound)} -> {_show_term(term, names, _WHOLE)}"
            return text if place == _WHOLE else f"({text})"
        case ("app", function, argument):
            function_text = _show_term(function, names, _FUNCTION)
            text = f"{function_text} {_show_term(argument, names, _ARGUMENT)}"
            return f"({text})" if place == _ARGUMENT else text
        case ("pair", left, right):
            # A function on the left would swallow the comma.
            first = _show_term(left, names, _FUNCTION)
            return f"({first} , {_show_term(right, names, _WHOLE)})"
    raise AssertionError(term)


@dataclass(frozen=True)
class Theorem:
    """`statement` over the atoms `names`, and one proof of it."""

    statement: str
    names: tuple[str, ...]
    proof: str


def draw_formula(generator: random.Random, names: str, size: int) -> Formula:
    """A random formula with `size` connectives."""
    if size == 0:
        return Bottom() if generator.random() < 0.08 else Atom(generator.choice(names))
    left = generator.randint(0, size - 1)
    kind = generator.choices((Implies, And, Or), (5, 2, 2))[0]
    return kind(
        draw_formula(generator, names, left), draw_formula(generator, names, size - 1 - left)
    )


def theorems(
    seed: int,
    *,
    atoms_used: int = 3,
    sizes: tuple[int, int] = (3, 6),
    lengths: tuple[int, int] = (14, 56),
) -> Iterator[Theorem]:
    """Different theorems without end, with `sizes` connectives, whose proofs have `lengths`
    characters."""
    generator = random.Random(seed)
    seen: set[Formula] = set()
    while True:
        size = generator.randint(*sizes)
        formula = canonical(draw_formula(generator, "PQRSTUVW"[:atoms_used], size))
        if formula in seen:
            continue
        seen.add(formula)
        proof = prove(formula)
        if proof is not None and lengths[0] <= len(proof) <= lengths[1]:
            yield Theorem(show(formula), tuple(atoms(formula)), proof)
