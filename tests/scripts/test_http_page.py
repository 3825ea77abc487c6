"""docs/http.md says what the server takes and gives."""

from exeunt.server.api.schemas import EarlyExitOptions, GenerateBody
from scripts.http_page import PAGE, page


def test_the_page_is_that_of_this_server() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run python -m scripts.http_page"


def test_every_field_of_a_request_is_there_with_its_limits() -> None:
    lines = page().splitlines()
    for field in (*GenerateBody.model_fields, *EarlyExitOptions.model_fields):
        assert any(line.startswith(f"| `{field}` |") for line in lines), field
    (top_p,) = (line for line in lines if line.startswith("| `top_p` |"))
    assert "`1.0`" in top_p
    assert "above 0; at most 1" in top_p
    (stop,) = (line for line in lines if line.startswith("| `stop` |"))
    assert "list of string" in stop
    assert "at most 16 of them; each at least 1 long; each at most 256 long" in stop


def test_links_lead_to_tables() -> None:
    text = page()
    for part in text.split("](#")[1:]:
        name = part.split(")", 1)[0]
        assert f"\n## {name}\n" in text.lower(), name
