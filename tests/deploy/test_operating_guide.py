"""docs/operating.md lists every setting with the default that the settings have."""

import re
from pathlib import Path

from exeunt.server.settings import Settings, setting_default

GUIDE = Path(__file__).parents[2] / "docs" / "operating.md"
ROW = re.compile(r"^\| (`--[^|]+`) \| ([^|]+) \|", re.MULTILINE)


def documented() -> dict[str, str]:
    """Defaults by flag, as the table has them: a row of several flags has as many defaults, or one for all."""
    found: dict[str, str] = {}
    for names, defaults in ROW.findall(GUIDE.read_text()):
        flags = re.findall(r"`(--[a-z-]+)`", names)
        shown = [default.strip() for default in defaults.split(",")]
        found |= dict(zip(flags, shown if len(shown) == len(flags) else shown * len(flags), strict=True))
    return found


def test_every_setting_is_documented_with_its_default() -> None:
    table = documented()
    flags = {f"--{name.replace('_', '-')}": name for name in Settings.model_fields if name != "model"}
    assert set(table) == set(flags)
    for flag, name in flags.items():
        default = setting_default(name)
        if default:
            assert table[flag].replace(" ", "") == default, flag
        else:
            assert not any(character.isdigit() for character in table[flag]), flag
