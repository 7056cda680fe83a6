"""Several teachers: each row is judged, written and taught by its own, and by no other."""

from collections import Counter

import pytest
import reference
import torch
from datasets import Dataset
from test_mixed_batches import spy_on_trained_batches
from test_sampler import EOS, FREE, left_padded, sample
from test_skd_trainer import losses, make_trainer, update_of
from tiny import byte_tokenizer, save_models, tiny_model

from skd_trl import SKDConfig, SKDTrainer, SpecKDTrainer
from skd_trl.sampling.acceptance import ACCEPTANCE_RULES
from skd_trl.sampling.interleaved import Execution, interleaved_sample
from skd_trl.sampling.participants import LocalParticipant
from skd_trl.sampling.prompts import Prompts
from skd_trl.sampling.several_teachers import SeveralTeachers
from skd_trl.training.distributed import keyed_generator


SIZES = {"hidden_size": 48, "intermediate_size": 80}
NAMES = ["first", "second", "first", "first", "second", "first", "second", "first"]
ROWS = [
    {
        "messages": [
            {"role": "user", "content": "q" * (3 + i)},
            {"role": "assistant", "content": "ab" * (1 + (5 * i) % 7)},
        ],
        "teacher_id": name,
    }
    for i, name in enumerate(NAMES)
]


def teachers():
    return {"first": tiny_model(seed=2), "second": tiny_model("qwen3", seed=3, **SIZES)}


def make(tmp_path, rows=ROWS, **settings):
    return make_trainer(tmp_path, rows, teacher=settings.pop("teacher", None) or teachers(), **settings)


# The sampler


PROMPTS = [[5, 9, 200], [7], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11], [30, 31, 32, 33, 34], [9, 9], [4, 8, 15]]
WHICH = [1, 0, 1, 1, 0, 1]
ENDS = [EOS, *range(20, 60)]


def sample_several(which=WHICH, *, own_prompts=PROMPTS, noise, rule=None, **execution):
    ids, mask = left_padded(own_prompts)
    own = torch.tensor(which)
    participants = [
        LocalParticipant(model, FREE, prompts=Prompts(ids[own == i], mask[own == i]))
        for i, model in enumerate(teachers().values())
    ]
    return interleaved_sample(
        LocalParticipant(tiny_model(seed=1), FREE),
        SeveralTeachers(participants, which),
        *left_padded(PROMPTS),
        accept=rule or ACCEPTANCE_RULES["top_k"](k=80),
        max_new_tokens=12,
        eos_token_ids=ENDS,
        noise=noise,
        execution=Execution(**{"num_draft_tokens": 3, **execution}),
    )


@pytest.mark.parametrize("max_rows", [None, 1, 2, 4])
@pytest.mark.parametrize("own_prompts", [PROMPTS, [[3, *p, 8] for p in PROMPTS]], ids=["one prompt", "two prompts"])
def test_each_row_is_that_of_the_specification_with_its_own_teacher(max_rows, own_prompts):
    noise = torch.rand((6, 12, 3), generator=torch.Generator().manual_seed(0))
    rollout = sample_several(own_prompts=own_prompts, noise=noise, max_rows=max_rows)
    student, *judges = (reference.in_float64(model) for model in (tiny_model(seed=1), *teachers().values()))
    lengths = set()
    for row, prompt in enumerate(PROMPTS):
        tokens, replaced = reference.interleave(
            student, judges[WHICH[row]], prompt, accepts=reference.top_k_accepts(80), max_new_tokens=12,
            eos_token_ids=ENDS, uniforms=noise[row], student_sampling={}, teacher_sampling={},
            teacher_prompt=own_prompts[row],
        )  # fmt: skip
        labels = rollout.labels[row]
        assert labels[labels != -100].tolist() == tokens
        assert rollout.replaced[row, : len(tokens)].tolist() == replaced
        lengths.add(len(tokens))
    assert len(lengths) > 1  # rows ended at different times, and the others moved


def test_a_rows_hidden_states_are_those_of_its_own_teacher():
    noise = torch.rand((6, 12, 3), generator=torch.Generator().manual_seed(0))
    rollout = sample_several(noise=noise)
    for i, model in enumerate(teachers().values()):
        rows = [row for row, which in enumerate(WHICH) if which == i]
        alone = sample(
            tiny_model(seed=1), model, [PROMPTS[row] for row in rows], ACCEPTANCE_RULES["top_k"](k=80),
            noise=noise[rows], eos_token_ids=ENDS,
        )  # fmt: skip
        states = alone.teacher_hidden_states
        kept = rollout.teacher_hidden_states[rows][:, : states.shape[1]]
        torch.testing.assert_close(kept[..., : states.shape[-1]], states, atol=2e-4, rtol=1e-4)
        assert not kept[..., states.shape[-1] :].any()


def test_a_round_is_one_forward_of_each_teacher_on_its_own_rows(monkeypatch):
    calls, judge, several = [], LocalParticipant.judge, SeveralTeachers.judge

    def counted(self, proposals):
        calls[-1].append((self.model.config.hidden_size, len(proposals)))
        return judge(self, proposals)

    def counted_round(self, proposals):
        calls.append([])
        return several(self, proposals)

    monkeypatch.setattr(LocalParticipant, "judge", counted)
    monkeypatch.setattr(SeveralTeachers, "judge", counted_round)
    sample_several(noise=torch.rand((6, 12, 3), generator=torch.Generator().manual_seed(0)))
    assert calls[0] == [(32, 2), (48, 4)]
    for of_round in calls:
        counts = Counter(size for size, _ in of_round)
        assert max(counts.values()) == 1 and all(num_rows > 0 for _, num_rows in of_round)


def test_a_teacher_without_rows_has_no_forward_and_prompts_that_are_not_its_own_are_refused():
    noise = torch.rand((6, 12, 3), generator=torch.Generator().manual_seed(0))
    assert len(sample_several([0] * 6, noise=noise).labels) == 6
    ids, mask = left_padded(PROMPTS)
    models = teachers().values()
    wrong = SeveralTeachers([LocalParticipant(m, FREE, prompts=Prompts(ids, mask)) for m in models], WHICH)
    with pytest.raises(ValueError, match=r"\[6, 6\] prompts for 6 rows, of which \[2, 4\]"):
        interleaved_sample(
            tiny_model(seed=1), wrong, ids, mask, accept=ACCEPTANCE_RULES["top_k"](k=3), max_new_tokens=3, eos_token_ids=[EOS]
        )  # fmt: skip


# The trainer


@pytest.mark.parametrize("rollout", ["teacher", "interleaved"])
def test_rows_are_routed_by_their_teacher_id(tmp_path, rollout):
    greedy = {"teacher_temperature": 0.0} if rollout == "teacher" else {}
    trainer = make(
        tmp_path, rollout=rollout, shuffle_dataset=False, per_device_train_batch_size=8, max_grad_norm=0.0, **greedy
    )
    own = {tuple(row["prompt_ids"]): row["teacher_index"] for row in trainer.train_dataset}
    assert [own[tuple(row["prompt_ids"])] for row in trainer.train_dataset] == [NAMES.index(n) for n in NAMES]
    uniforms = torch.rand((8, 16, 3), generator=keyed_generator("sampling", trainer.args.seed, 0, 0))
    seen = spy_on_trained_batches(trainer)
    trainer.train()
    student, *judges = (reference.in_float64(model) for model in (tiny_model(seed=1), *teachers().values()))
    texts = []
    for i, labels in enumerate(seen[0]["labels"]):
        prompt = seen[0]["prompts"][i][seen[0]["prompt_attention_mask"][i] == 1].tolist()
        arguments = {
            "accepts": reference.top_k_accepts(80) if rollout == "interleaved" else lambda *args: False,
            "max_new_tokens": 16, "eos_token_ids": trainer.eos_token_ids, "uniforms": uniforms[i], "student_sampling": {},
            "teacher_sampling": {"temperature": 0} if greedy else {},
        }  # fmt: skip
        both = [reference.interleave(student, judge, prompt, **arguments)[0] for judge in judges]
        assert labels[labels != -100].tolist() == both[own[tuple(prompt)]]
        texts.append(both[0] != both[1])
    assert all(texts)  # a text tells whose it is


@pytest.mark.parametrize("rollout", ["dataset", "interleaved", "student"])
def test_one_update_is_the_sum_of_the_gradients_of_a_run_for_each_teacher(tmp_path, rollout):
    settings = {"max_grad_norm": 0.0, "shuffle_dataset": False, "per_device_train_batch_size": 8}
    trainer = make(tmp_path, rollout=rollout, **settings)
    seen = spy_on_trained_batches(trainer)
    update, (batch,) = update_of(trainer), seen
    assert ("teacher_hidden_states" in batch) == (rollout == "interleaved")
    total, num_all = 0, int((batch["labels"] != -100).sum())
    for i, teacher in enumerate(teachers().values()):
        rows = []
        for row in (batch["teacher_index"] == i).nonzero().flatten().tolist():
            labels = batch["labels"][row]
            prompt = batch["prompts"][row][batch["prompt_attention_mask"][row] == 1]
            rows.append({"prompt_ids": prompt.tolist(), "response_ids": labels[labels != -100].tolist()})
        alone = make_trainer(
            tmp_path, rows, teacher=teacher, rollout="dataset", **settings | {"per_device_train_batch_size": len(rows)}
        )
        total = total + update_of(alone) * sum(len(row["response_ids"]) for row in rows) / num_all
    assert update.norm() > 0.1
    assert (update - total).norm() < 1e-4 * total.norm()


CUTS = [
    (SKDTrainer, {"rollout": "dataset"}),
    (SKDTrainer, {"rollout": "interleaved"}),
    (SKDTrainer, {"rollout": "interleaved", "lmbda": 0.5, "lmbda_unit": "prompt"}),
    (SpecKDTrainer, {"rollout": "dataset", "gate": "greedy_top_k", "gate_top_k": 60, "gate_normalizer": "accepted"}),
]


@pytest.mark.parametrize(
    "trainer_class, settings", CUTS, ids=lambda x: "-".join(map(str, x.values())) if isinstance(x, dict) else ""
)
def test_eight_rows_of_two_teachers_are_one_update_however_they_are_cut(tmp_path, trainer_class, settings):
    settings = {**settings, "max_grad_norm": 0.0, "shuffle_dataset": False, "seed": 3, "trainer_class": trainer_class}
    whole = make(tmp_path, per_device_train_batch_size=8, **settings)
    expected = update_of(whole)
    assert expected.norm() > 0.05
    for batch_size in (1,):  # every batch has one teacher
        cut = make(
            tmp_path, per_device_train_batch_size=batch_size, gradient_accumulation_steps=8 // batch_size, **settings
        )
        assert (update_of(cut) - expected).norm() < 1e-4 * expected.norm()
        assert losses(cut)[0] == pytest.approx(losses(whole)[0], rel=1e-4)


def test_metrics_are_given_for_each_teacher(tmp_path):
    trainer = make(tmp_path, per_device_train_batch_size=8)
    seen = spy_on_trained_batches(trainer)
    trainer.train()
    log, (batch,) = trainer.state.log_history[0], seen
    for i, name in enumerate(("first", "second")):
        rows = batch["teacher_index"] == i
        num_tokens = int((batch["labels"][rows] != -100).sum())
        assert log[f"num_tokens_{name}"] == num_tokens
        assert log[f"replaced_share_{name}"] == pytest.approx(int(batch["replaced"][rows].sum()) / num_tokens)
        assert log[f"acceptance_rate_{name}"] == pytest.approx(1 - log[f"replaced_share_{name}"])
    shares = [log[f"num_tokens_{name}"] / log["response_length"] / 8 for name in ("first", "second")]
    for metric, whole in (("divergence", log["loss"]), ("teacher_entropy", log["teacher_entropy"])):
        own = [log[f"{metric}_{name}"] for name in ("first", "second")]
        assert sum(share * value for share, value in zip(shares, own, strict=True)) == pytest.approx(whole, rel=1e-3)


def test_several_evaluation_sets_given_later_and_prepared_ones_are_each_prepared_once(tmp_path, monkeypatch):
    rows = Dataset.from_list(ROWS)
    trainer = make(tmp_path, rollout="dataset", eval_dataset=rows)
    expected = trainer.evaluate()["eval_loss"]
    prepared, original = [], trainer._prepare
    trainer._prepare = lambda dataset, **rest: prepared.append(dataset) or original(dataset, **rest)
    sets = trainer.evaluate({"a": rows, "b": rows.select(range(3))})
    assert [len(dataset) for dataset in prepared] == [8, 3]
    assert sets["eval_a_loss"] == pytest.approx(expected, rel=1e-5)
    assert sets["eval_b_loss"] != pytest.approx(expected, rel=1e-3)
    assert trainer.evaluate(trainer.eval_dataset)["eval_loss"] == pytest.approx(expected, rel=1e-5)
    assert trainer.evaluate(trainer.train_dataset)["eval_loss"] == pytest.approx(expected, rel=1e-5)
    assert trainer.predict(trainer.eval_dataset).metrics["test_loss"] == pytest.approx(expected, rel=1e-5)
    assert len(prepared) == 2
    few = trainer.evaluate(trainer.eval_dataset.select(range(3)))  # another data set, of prepared rows
    assert few["eval_loss"] == pytest.approx(sets["eval_b_loss"], rel=1e-5)


def test_teachers_may_be_named_with_paths_in_the_configuration(tmp_path):
    save_models(tmp_path, {"one": 2, "two": 3})
    settings = {"rollout": "dataset", "max_grad_norm": 0.0, "per_device_train_batch_size": 8}

    class ByPath(SKDTrainer):
        def __init__(self, teacher_model=None, **kwargs):
            super().__init__(**kwargs)

    paths = {"first": str(tmp_path / "one"), "second": str(tmp_path / "two")}
    named = make(tmp_path, trainer_class=ByPath, teacher_models=paths, **settings)
    given = make(tmp_path, teacher={"first": tiny_model(seed=2), "second": tiny_model(seed=3)}, **settings)
    assert torch.equal(update_of(named), update_of(given))


def test_a_formatting_func_may_say_whose_a_row_is_or_leave_it_to_the_row(tmp_path):
    expected = [NAMES.index(name) for name in NAMES]
    plain = [{"messages": row["messages"], "whose": row["teacher_id"]} for row in ROWS]
    functions = [
        (plain, lambda row: {"messages": row["messages"], "teacher_id": row["whose"]}),
        (ROWS, lambda row: {"messages": row["messages"]}),
    ]
    for rows, function in functions:
        for given in (rows, Dataset.from_list(rows).to_iterable_dataset()):
            trainer = make(tmp_path, given, formatting_func=function, shuffle_dataset=False)
            assert [row["teacher_index"] for row in trainer.train_dataset] == expected


def test_teachers_may_be_named_with_numbers(tmp_path):
    numbers = [NAMES.index(name) for name in NAMES]
    rows = [{**row, "teacher_id": i} for row, i in zip(ROWS, numbers, strict=True)]
    settings = {"rollout": "dataset", "max_grad_norm": 0.0, "per_device_train_batch_size": 8, "shuffle_dataset": False}
    numbered = dict(enumerate(teachers().values()))
    trainer = make(tmp_path, rows, teacher=numbered, **settings)
    assert trainer.train_dataset["teacher_index"][:] == numbers
    assert torch.equal(update_of(trainer), update_of(make(tmp_path, **settings)))
    with pytest.raises(ValueError, match="Row 1.*its `teacher_id` is 7; the teachers are 0, 1"):
        make(tmp_path, [rows[0], {**rows[1], "teacher_id": 7}], teacher=numbered)


def test_what_several_teachers_cannot_be_is_refused(tmp_path):
    with pytest.raises(ValueError, match="Row 1.*its `teacher_id` is 'third'; the teachers are first, second"):
        make(tmp_path, [ROWS[0], {**ROWS[1], "teacher_id": "third"}])
    with pytest.raises(ValueError, match="cannot be turned into tokens.*Row 1.*has the role 'nobody'"):
        make(tmp_path, [ROWS[0], {**ROWS[1], "messages": [{"role": "nobody", "content": "?"}]}])
    with pytest.raises(ValueError, match="has no `teacher_id`"):
        make(tmp_path, [{"messages": row["messages"]} for row in ROWS])
    with pytest.raises(ValueError, match="teacher_model_name_or_path beside them"):
        make(tmp_path, teacher_model_name_or_path="x")
    with pytest.raises(ValueError, match="teacher_models is empty"):
        SKDTrainer(tiny_model(seed=1), {}, SKDConfig(str(tmp_path), bf16=False, use_cpu=True))
    with pytest.raises(TypeError, match="teacher 'first' is of type int"):
        make(tmp_path, teacher={"first": 3})
    with pytest.raises(ValueError, match="lacks"):
        make(
            tmp_path,
            teacher={**teachers(), "second": tiny_model(seed=3, vocab_size=200)},
            processing_class=byte_tokenizer(),
        )
