"""Settings: flags over environment over defaults, checked, and one sentence for what is wrong."""

import pytest
from pydantic import ValidationError

from exeunt.server.settings import (
    Settings,
    invalid_setting,
    load_settings,
    nearest_variable,
    unknown_variables,
)


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in Settings.model_fields:
        monkeypatch.delenv(f"EXEUNT_{name.upper()}", raising=False)


def test_defaults() -> None:
    settings = load_settings({})
    assert (settings.host, settings.port, settings.model) == ("127.0.0.1", 8000, None)
    assert settings.default_compression.model_dump(exclude_none=True) == {}
    assert settings.max_body_bytes == 4 * 2**20


def test_flags_come_before_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXEUNT_PORT", "9000")
    monkeypatch.setenv("EXEUNT_HOST", "0.0.0.0")
    settings = load_settings({"port": "9001"})
    assert (settings.host, settings.port) == ("0.0.0.0", 9001)


def test_every_form_of_value(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXEUNT_KV_CACHE_MEMORY", "512MiB")
    monkeypatch.setenv("EXEUNT_ALLOWED_ORIGINS", "http://a, http://b")
    monkeypatch.setenv("EXEUNT_DEFAULT_COMPRESSION", '{"weights": "full", "early_exit": false}')
    monkeypatch.setenv("EXEUNT_LOG_JSON", "1")
    monkeypatch.setenv("EXEUNT_API_KEY", "")
    settings = load_settings({})
    assert settings.kv_cache_memory == 512 * 2**20
    assert settings.allowed_origins == ("http://a", "http://b")
    assert settings.default_compression.weights == "full"
    assert settings.default_compression.early_exit is not None
    assert settings.default_compression.early_exit.mode == "off"
    assert settings.log_json
    assert settings.api_key is None


def test_the_key_is_not_printed() -> None:
    assert "sesame" not in repr(load_settings({"api_key": "sesame"}))


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"port": "x"}, '--port is "x"; it must be a whole number'),
        ({"device": "mps"}, '--device is "mps"; it must be auto, cpu, cuda or cuda:N.'),
        (
            {"kv_cache_memory": "much"},
            '--kv-cache-memory is "much"; it must be a number of bytes such as 512MiB.',
        ),
        (
            {"kv_cache_memory": "1e3"},
            '--kv-cache-memory is "1e3"; it must be a number of bytes such as 512MiB.',
        ),
        ({"default_compression": "{"}, '--default-compression is "{"; it must be a JSON object such as'),
        ({"log_json": "perhaps"}, '--log-json is "perhaps"; it must be true or false.'),
        ({"port": "65536"}, '--port is "65536"; it must be at most 65535'),
        ({"request_timeout": "nan"}, '--request-timeout is "nan"; it must be a finite number'),
        ({"audit_share": "1.5"}, '--audit-share is "1.5"; it must be at most 1'),
        ({"audit_share": "nan"}, '--audit-share is "nan"; it must be a finite number'),
        ({"request_timeout": "0"}, '--request-timeout is "0"; it must be above 0'),
        ({"weights": "int8"}, "--weights is \"int8\"; it must be 'int4', 'full' or 'both'"),
        (
            {"default_compression": '{"n":1,"n":2}'},
            r'--default-compression is "{\"n\":1,\"n\":2}"; the key "n" is given twice',
        ),
        ({"default_compression": '{"kv": 1}'}, "--default-compression (kv) is 1; "),
        (
            {"default_compression": '{"kv_cahce": "full"}'},
            '--default-compression (kv_cahce) is "full"; there is no such field (did you mean kv_cache?); the fields',
        ),
        (
            {"default_compression": '{"early_exit": {"mod": "off"}}'},
            '--default-compression (early_exit.mod) is "off"; there is no such field (did you mean mode?); the fields',
        ),
        ({"default_compression": '{"linear_block": 1}'}, "--default-compression (linear_block) is 1; "),
    ],
)
def test_what_is_wrong_is_one_sentence(given: dict[str, object], sentence: str) -> None:
    with pytest.raises(ValidationError) as caught:
        load_settings(given)
    assert invalid_setting(caught.value, given).startswith(sentence)


def test_what_is_wrong_in_the_environment_is_named_as_it_stands_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("EXEUNT_MAX_NUM_SEQS", "0")
    with pytest.raises(ValidationError) as caught:
        load_settings({"port": "80"})
    said = invalid_setting(caught.value, {"port": "80"})
    assert said == 'EXEUNT_MAX_NUM_SEQS (--max-num-seqs) is "0"; it must be at least 1.'


def test_misspelt_variables_are_noticed() -> None:
    environment = {
        "EXEUNT_PROT": "1",
        "EXEUNT_PORT": "1",
        "EXEUNT_NATIVE": "0",
        "EXEUNT_TUNED": "0",
        "HOME": "/",
        "exeunt_host": "x",
    }
    assert unknown_variables(environment) == ["EXEUNT_PROT"]


@pytest.mark.parametrize(
    ("name", "guess"),
    [
        ("EXEUNT_PROT", " (did you mean EXEUNT_PORT?)"),
        ("EXEUNT_MAX_NUM_SEQ", " (did you mean EXEUNT_MAX_NUM_SEQS?)"),
        ("exeunt_hots", " (did you mean EXEUNT_HOST?)"),
        ("EXEUNT_XYZZY", ""),
    ],
)
def test_a_misspelt_variable_is_guessed(name: str, guess: str) -> None:
    assert nearest_variable(name) == guess
