"""What pip says of foreign packages, read; medcot's own, checked against what is installed."""

from pathlib import Path

import pytest

from pipeline.pip_conflicts import foreign, pinned, unmet


def install(site: Path, name: str, version: str, *requires: str) -> None:
    folder = site / f"{name.replace('-', '_')}-{version}.dist-info"
    folder.mkdir(parents=True)
    lines = "".join(f"Requires-Dist: {each}\n" for each in requires)
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{lines}")


def test_only_what_follows_the_resolvers_heading_is_taken_for_a_conflict() -> None:
    heading = "ERROR: pip's dependency resolver does not currently take into account all the packages."
    line = "a-b 1.0 requires c==2, but you have c 3 which is incompatible."
    other = "WARNING: Running pip as the 'root' user"
    assert foreign([other, heading, line, "A_C 1 requires d, which is not installed."]) == (["a-b", "a-c"], [other])
    assert foreign([line]) == ([], [line])


def test_what_medcots_packages_lack_is_found_through_their_requirements(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, "zz-own", "2.0", "zz-near>=1", "zz-extra==9; extra == 'gpu'", "zz-never; sys_platform == 'no'")
    install(tmp_path, "zz_near", "1.5+cu128", "zz-far>=2,<3", "zz-absent", "zz-own")
    install(tmp_path, "zz-far", "3.1")
    monkeypatch.syspath_prepend(str(tmp_path))
    own, problems = unmet(["zz-own==2.0"])
    assert own == {"zz-own", "zz-near", "zz-far"}
    assert sorted(problems) == [
        "zz-near needs zz-absent, which is not installed",
        "zz-near needs zz-far<3,>=2, 3.1 is installed",
    ]
    assert unmet(["zz-own[gpu]==2.0"])[1][0] == "zz-own needs zz-extra==9, which is not installed"


def test_packages_that_need_each_other_with_extras_are_checked_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, "zz-a", "1", "zz-b[x]")
    install(tmp_path, "zz-b", "1", "zz-a[y]; extra == 'x'")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert unmet(["zz-a==1"]) == ({"zz-a", "zz-b"}, [])


def test_comments_pin_nothing() -> None:
    assert pinned("# torch==1\n\na==1 # why\nb\n") == ["a==1", "b"]
