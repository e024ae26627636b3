"""Folders and files that tests read."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
DATA = ROOT / "tests/data"
HELPERS = ROOT / "tests/helpers"
PROGRAMS = ROOT / "tests/programs"
SHARED = ROOT.parent / "shared"  # absent outside the developers' machines: what needs it is skipped by name
