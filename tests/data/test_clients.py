"""Records at the engine's doors: errors name client, file and line, and what is reported reaches the caller."""

import json

import pytest

import flora_core as flora
from flora_core.config.recipe import load
from flora_core.runs.build import build_clients
from tests.support.federations import make_federation, make_model, make_records, make_tokenizer

GOOD = {"instruction": "w1 w2", "output": "w3"}
NO_SYSTEM = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{{ m.content + ' ' }}{% if m.role == 'assistant' %}{{ '</s>' }}{% endif %}{% endfor %}"
)


def write(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def trainer(data, tokenizer=None, callbacks=(), model=None, **settings):
    """A trainer of one client with these data."""
    spec = flora.ClientSpec("ann", data, flora.AdapterConfig(2, 4))
    cohort = flora.attach(model or make_model(), [spec], ["q_proj"])
    try:
        config = flora.TrainConfig(max_length=32, **settings)
        return flora.CohortTrainer(cohort, config, tokenizer or make_tokenizer(), callbacks=callbacks)
    finally:
        flora.detach(cohort.model)


def test_a_template_that_fails_names_client_file_and_line(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = NO_SYSTEM
    path = write(tmp_path / "a.jsonl", GOOD, {**GOOD, "system": "w4"})
    with pytest.raises(ValueError, match=r"client 'ann': .*a\.jsonl, line 2: the chat template refuses it \(no system"):
        trainer(path, tokenizer)


def test_a_bad_record_names_client_and_place(tmp_path):
    with pytest.raises(ValueError, match=r"client 'ann', record 1: .* no answer"):
        trainer([GOOD, {"messages": [{"role": "user", "content": "w1"}]}])
    path = write(tmp_path / "a.jsonl", GOOD, {"instruction": "w1", "output": "w2", "response": "w3"})
    with pytest.raises(ValueError, match=r"client 'ann': .*a\.jsonl, line 2: output and response both hold"):
        trainer(path)
    with pytest.raises(ValueError, match=r"^client 'ann', record 0: a multiple-choice question"):
        trainer([{"question": "w1", "choices": ["w2", "w3"], "answer": 0}])


def test_tokens_beyond_the_embedding_are_refused_before_training_and_evaluation(tmp_path):
    tokenizer, model = make_tokenizer(), make_model()
    tokenizer.add_tokens(["new"])
    path = write(tmp_path / "a.jsonl", GOOD, {**GOOD, "output": "new"})
    with pytest.raises(
        ValueError, match=r"client 'ann': token id 28 \('new'\) of .*a\.jsonl, line 2 is beyond .* 28 rows"
    ):
        trainer(path, tokenizer, model=model)
    with pytest.raises(ValueError, match=r"evaluation: token id 28 \('new'\) of .*a\.jsonl, line 2 is beyond"):
        flora.evaluate(model, tokenizer, path)


def test_what_is_noticed_is_reported_by_event_or_warning():
    data = [{**GOOD, "hint": "w5"}, {**GOOD, "output": ""}]
    events = []
    trainer(data, callbacks=[events.append])
    messages = [event["message"] for event in events if event["event"] == "warning" and event["client"] == "ann"]
    assert len(messages) == 2
    assert "hint (in 1 of 2)" in messages[0]
    assert "all answers are empty" in messages[1]
    assert "client 'ann', record 1" in messages[1]
    with pytest.warns(UserWarning, match="client 'ann': .*(hint|all answers are empty)") as caught:
        trainer(data)
    assert len(caught) == 2


def test_a_recipe_refuses_unknown_fields(tmp_path):
    path = write(tmp_path / "a.jsonl", *({**record, "hint": "w1"} for record in make_records("a", 20)))
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"model: m\ndata: {{path: {path}, label: category}}\nclients: {{count: 2}}\nfederation: {{rounds: 1}}\n"
    )
    with pytest.warns(UserWarning, match=r"a\.jsonl: fields that nothing reads.*: hint \(in 20 of 20\)"):
        build_clients(load(recipe))
    with pytest.raises(ValueError, match=r"a\.jsonl, line 1: unknown fields: hint"):
        build_clients(load(recipe, ["data.unknown=refuse"]))
    # A column that the recipe names has a use.
    build_clients(load(recipe, ["data.unknown=refuse", "data.label=hint"]))


def test_held_out_records_are_normalised_once_and_their_digest_is_that_of_the_rows(tmp_path):
    rows = make_records("b", 4)
    given = [
        make_federation(tmp_path / name, eval_data=data)
        for name, data in (("a", rows), ("b", write(tmp_path / "e.jsonl", *rows)))
    ]
    assert [dict(record) for record in given[0].held_out.records or []] == rows
    assert given[0].held_out.records == given[1].held_out.records
