"""The invariants I1 to I7 of the engine: a scenario for each side of each, in C, and proof that scenarios can fail.

tests/c/rig.h says how a scenario fixes its interleaving; tests/mutants.py lists what is broken on purpose, and who must
notice.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import mutants
import pytest
from c_programs import run, scenarios


@pytest.mark.parametrize(("program", "name"), scenarios(), ids=lambda value: value)
def test_scenario(program: str, name: str, tmp_path: Path) -> None:
    run("plain", program, tmp_path, name)


@pytest.mark.parametrize("flavour", ["asan", "tsan"])
@pytest.mark.parametrize("program", sorted({program for program, _ in scenarios()}))
def test_scenarios_under_sanitizers(program: str, flavour: str, tmp_path: Path) -> None:
    for own, name in scenarios():
        if own == program:
            run(flavour, program, tmp_path, name)


def test_each_invariant_has_mutants() -> None:
    names = [mutant.name for mutant in mutants.MUTANTS]
    assert len(set(names)) == len(names)
    for invariant in ("i1", "i2", "i3", "i4", "i5", "i6", "i7"):
        assert sum(name.startswith(f"{invariant}_") for name in names) >= 4, invariant
    assert {scenario for mutant in mutants.MUTANTS for scenario in mutant.scenarios} <= mutants.PROGRAM_OF.keys()


@pytest.fixture(scope="module")
def trials(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Future[list[str]]]]:
    """All mutants, by name, being tried in the background: most of the time they hang."""
    base = tmp_path_factory.mktemp("engine")
    mutants.prepare(base)
    with ThreadPoolExecutor(mutants.PARALLEL) as pool:
        yield {mutant.name: pool.submit(mutants.survives, mutant, base) for mutant in mutants.MUTANTS}
        pool.shutdown(cancel_futures=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", [mutant.name for mutant in mutants.MUTANTS])
def test_mutant_is_noticed(name: str, trials: dict[str, Future[list[str]]]) -> None:
    assert trials[name].result() == []
