"""A load on an engine in this process: the engine that a server would have, whoever counts what it does."""

from dataclasses import asdict

import pytest

from exeunt.compression.model import LoadedModel, load_bundle
from exeunt.compression.variant import Variant
from exeunt.deploy.bench_load import Load
from exeunt.deploy.load_driver import LoadDriver, LoadError, load_config, server_metrics
from exeunt.deploy.loading import engine_config
from exeunt.server.engine_metrics import Uncounted
from exeunt.server.request import ExitPolicy
from exeunt.server.settings import given_settings
from tests.deploy.server_process import byte_bundle

LOAD = Load(concurrency=2, prompt_tokens=8, max_new_tokens=6, requests=3)
SIZES = {"max_model_len", "max_num_seqs", "max_num_queued_reqs", "max_num_batched_tokens", "kv_cache_bytes"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load_bundle(byte_bundle(tmp_path_factory.mktemp("load")))


def test_but_for_its_sizes_the_engine_is_a_servers(model: LoadedModel) -> None:
    served = asdict(engine_config(model, given_settings({"max_num_seqs": 2})))
    loaded = asdict(load_config(model, LOAD))
    assert {name for name, value in loaded.items() if value != served[name]} <= SIZES
    assert (loaded["max_model_len"], loaded["max_num_seqs"], loaded["max_num_queued_reqs"]) == (14, 2, 2)
    assert loaded["max_num_batched_tokens"] == served["max_num_batched_tokens"]


@pytest.mark.parametrize("exits", [ExitPolicy(), ExitPolicy("approximate", 0.5), ExitPolicy("verified")])
def test_answers_are_the_same_whether_they_are_counted_or_not(model: LoadedModel, exits: ExitPolicy) -> None:
    answers = []
    for metrics in (server_metrics(model), Uncounted()):
        driver = LoadDriver(model, load_config(model, LOAD), metrics)
        try:
            traces = driver.run(driver.prompts(3, 8), Variant("int4", "int4"), exits, LOAD)
        finally:
            driver.close()
        answers.append([trace.ids for trace in traces])
        assert [sum(trace.by_exit.values()) for trace in traces] == [6, 6, 6]
    assert answers[0] == answers[1]


@pytest.mark.parametrize(
    ("load", "said"),
    [
        (Load(prompt_tokens=5000), "--prompt-tokens is 5000 and --max-new-tokens 64, together 5064"),
        (Load(concurrency=10**12), "--concurrency is 1000000000000; so many sequences"),
    ],
)
def test_a_load_that_has_no_room_is_refused(model: LoadedModel, load: Load, said: str) -> None:
    with pytest.raises(LoadError, match=said):
        load_config(model, load)
