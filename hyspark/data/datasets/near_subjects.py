"""Subjects whose names differ in their last part alone, and which are perhaps one: 100000_00001 and 100000_00002."""

import re
from collections import defaultdict
from collections.abc import Collection, Sequence

from hyspark.data.datasets.cases import Case
from hyspark.data.datasets.visits import has_digit, subject_of
from hyspark.utils.text import listing

SIGNS = r"-_./ "
"""Characters between the parts of a name."""
BEFORE_LAST = re.compile(rf"(.*[^{SIGNS}])[{SIGNS}]+[^{SIGNS}]+", re.DOTALL)
BEFORE_LETTERS = re.compile(r"([^\W\d_]*\d+)[^\W\d_]+\d*")
"""A number with letters behind it: p1a, P001V2."""
LEVELS = 3
"""Number of last parts that two names of one subject may differ in."""


def near_subject_faults(training: Sequence[Case], validation: Sequence[Case], subjects: Sequence[str]) -> list[str]:
    """Report subjects of the two sides of a split that are perhaps one subject.

    Args:
        training: cases to train on.
        validation: cases to validate on.
        subjects: subject of each case, those of training first.
    """
    broader = broader_subjects(subjects)
    sides: tuple[dict[str, str], dict[str, str]] = ({}, {})
    members = defaultdict(set)
    for i, (case, subject) in enumerate(zip([*training, *validation], subjects, strict=True)):
        sides[i >= len(training)].setdefault(broader[subject], case.name)
        members[broader[subject]].add((subject, case.name))
    both = [name for name in sides[0] if name in sides[1] and len({subject for subject, _ in members[name]}) > 1]
    if not both:
        return []
    pairs = listing([f"{sides[0][name]} and {sides[1][name]}" for name in both], 3)
    pattern = subject_pattern(both)
    groups = [{subject_of(name, pattern) for _, name in members[subject]} for subject in both]
    serves = all(len(group) == 1 for group in groups) and len(set.union(*groups)) == len(groups)
    advice = f"set subject_regex to '{pattern}'" if serves else "name the cases of each side in a splits.json"
    return [f"perhaps one subject in training and in validation: {pairs}; if so, {advice}"]


def broader_subjects(subjects: Collection[str]) -> dict[str, str]:
    """Return the name that each subject has without its last parts, if these seem to number scans; else its own name.

    Names without their last part are of patients if they have numbers, differ in these alone, and none has more names
    than there are of them. liver_1 and liver_2 have no such beginning.
    """
    broader = {subject: subject for subject in subjects}
    for _ in range(LEVELS):
        shorter = shortened(set(broader.values()))
        broader = {subject: shorter.get(name, name) for subject, name in broader.items()}
    return broader


def shortened(names: Collection[str]) -> dict[str, str]:
    """Return names without their last part, of those whose beginnings seem to be of patients."""
    forms: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for name in names:
        found = BEFORE_LAST.fullmatch(name) or BEFORE_LETTERS.fullmatch(name)
        if found and has_digit(found[1]):
            forms[name_pattern(found[1])][found[1]].append(name)
    return {
        name: beginning
        for beginnings in forms.values()
        if 2 <= len(beginnings) >= max(map(len, beginnings.values()))
        for beginning, numbered in beginnings.items()
        for name in numbered
    }


def name_pattern(name: str) -> str:
    """Return a regular expression of names that differ from a name in their numbers."""
    return "".join(part_pattern(part) for part in re.split(rf"([{SIGNS}]+)", name))


def part_pattern(part: str) -> str:
    """Return the regular expression of one part of a name."""
    if found := re.fullmatch(r"([^\W\d_]*)\d+", part):
        return rf"{found[1]}\d+"
    return rf"[^{SIGNS}]+" if has_digit(part) else re.sub(r"([^\w\- ])", r"\\\1", part)


def subject_pattern(subjects: Collection[str]) -> str:
    """Return a pattern that finds these subjects, and others of their form, in case names, and whole names else."""
    # A name of a case has "-" where a folder's path has "/".
    patterns = {name_pattern(subject).replace(r"\/", "-") for subject in subjects}
    known = "|".join(sorted(patterns, key=lambda pattern: (-len(pattern), pattern)))
    return f"^(?:{known})|.+" if len(patterns) > 1 else f"^{known}|.+"
