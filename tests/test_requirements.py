"""What `make` installs: each file by its checksum."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
_PIN = re.compile(r"([A-Za-z0-9._-]+)==(\S+)")


def pins(name: str) -> dict[str, tuple[str, str]]:
    """Version and the rest of the entry, by the name that PyPI has it by."""
    text = (ROOT / "requirements" / name).read_text().replace("\\\n", " ")
    entries = {}
    for line in text.splitlines():
        if line and not line.startswith("#"):
            match = _PIN.match(line)
            assert match, line
            entries[re.sub(r"[-_.]+", "-", match[1]).lower()] = (match[2], line[match.end() :])
    return entries


def test_what_is_pinned_is_locked_with_checksums() -> None:
    pinned, locked = pins("pinned.txt"), pins("locked.txt")
    assert len(pinned) > 100
    assert {name: version for name, (version, _) in pinned.items()}.items() <= {
        name: version for name, (version, _) in locked.items()
    }.items()
    for name, (_, rest) in {**locked, **pins("unresolved.txt")}.items():
        assert re.search(r"--hash=sha256:[0-9a-f]{64}\b", rest), name


def test_make_installs_nothing_without_a_checksum() -> None:
    recipe = (ROOT / "Makefile").read_text()
    recipe = recipe[recipe.index("$(READY):") : recipe.index("demo:")]
    for line in re.findall(r"\$\(PIP\) install (.*?) &&", recipe):
        assert "--require-hashes" in line or line.endswith("--no-build-isolation -e ."), line
