"""Decoders with recurrent state: what they write is what they write without a cache, at any draft length."""

import pytest
import reference
import torch
from peft import LoraConfig
from scipy.stats import chisquare
from tape import Tape
from test_round import HostWaits
from test_sampler import (
    GREEDY,
    PROMPTS,
    exact_two_token_distribution,
    greedy_text,
    responses,
    sample,
)
from test_skd_trainer import losses, make_trainer, update_of
from tiny import HYBRIDS, tiny_model
from transformers import TrainerCallback

from skd_trl import SpecKDTrainer
from skd_trl.sampling import interleaved, ragged_cache, recurrent_state
from skd_trl.sampling.acceptance import ACCEPTANCE_RULES
from skd_trl.sampling.admission import prove
from skd_trl.sampling.nucleus import Nucleus
from skd_trl.sampling.ragged_cache import RaggedDecoder
from skd_trl.sampling.recurrent_state import Reading
from skd_trl.sampling.rounds import Rounds
from skd_trl.sampling.sampling_params import SamplingParams


pytestmark = pytest.mark.skipif("qwen3_5_text" not in HYBRIDS, reason="this transformers has no such layers")
# How each is prefilled: padding that leaves no trace, and whether several tokens can follow on a state.
WAYS = dict.fromkeys(HYBRIDS, ("left", True)) | {"mamba": ("left", False), "rwkv": (None, True), "xlstm": (None, True)}


@pytest.mark.parametrize("architecture", HYBRIDS)
def test_a_state_is_admitted_by_proof_with_room_to_spare(architecture):
    proof = prove(tiny_model(architecture, seed=1))
    assert proof.error < 1e-4 and proof.limit > 3 * proof.error
    assert (proof.padding, proof.continues) == WAYS[architecture]


@pytest.mark.parametrize("architecture", HYBRIDS)
def test_every_row_equals_the_one_row_token_at_a_time_cache_free_reference(architecture):
    """With refilled places and blocks of which any number is kept."""
    student, teacher = tiny_model(architecture, seed=1), tiny_model(architecture, seed=2)
    uniforms = torch.rand((len(PROMPTS), 12, 3), generator=torch.Generator().manual_seed(3))
    sampling = {"temperature": 0.7, "top_p": 0.9}
    rollout = sample(
        student, teacher, rule=ACCEPTANCE_RULES["top_k"](k=60), num_draft_tokens=4, max_rows=2, eos_token_ids=range(0, 259, 9),
        noise=uniforms, student_sampling=SamplingParams(**sampling), teacher_sampling=SamplingParams(**sampling),
    )  # fmt: skip
    models = reference.in_float64(student), reference.in_float64(teacher)
    for model in models:
        model.config._experts_implementation = "eager"  # grouped products know no float64
    for row, prompt in enumerate(PROMPTS):
        tokens, replaced = reference.interleave(
            *models, prompt, accepts=reference.top_k_accepts(60), max_new_tokens=12, eos_token_ids=set(range(0, 259, 9)),
            uniforms=uniforms[row], student_sampling=sampling, teacher_sampling=sampling,
        )  # fmt: skip
        assert responses(rollout)[row] == tokens
        assert rollout.replaced[row, : len(tokens)].tolist() == replaced
    assert 0 < rollout.num_replaced < rollout.num_tokens


@pytest.mark.parametrize("rule, author", [("always", 0), ("never", 1)])
def test_one_model_alone_writes_its_own_text(rule, author):
    models = tiny_model("qwen3_5_text", seed=1), tiny_model("qwen3_5_text", seed=2)
    rollout = sample(*models, rule=ACCEPTANCE_RULES[rule](), student_sampling=GREEDY, teacher_sampling=GREEDY)
    assert responses(rollout) == [greedy_text(models[author], prompt, 12) for prompt in PROMPTS]


def test_the_hidden_states_that_are_kept_are_those_of_a_fresh_forward():
    student, teacher = tiny_model("qwen3_5_text", seed=1), tiny_model("qwen3_5_text", seed=2)
    rollout = sample(student, teacher, rule=ACCEPTANCE_RULES["top_k"](k=60), noise=torch.Generator().manual_seed(0))
    assert 0 < rollout.num_replaced < rollout.num_tokens
    caught = []
    hook = teacher.get_output_embeddings().register_forward_pre_hook(lambda _, args: caught.append(args[0]))
    for row, prompt in enumerate(PROMPTS):
        text = responses(rollout)[row]
        with torch.no_grad():
            teacher(torch.tensor([prompt + text]))
        fresh = caught.pop()[0, len(prompt) - 1 : -1]
        torch.testing.assert_close(rollout.teacher_hidden_states[row, : len(text)], fresh, rtol=1e-4, atol=1e-4)
    hook.remove()


@pytest.mark.parametrize("pair", [("qwen3_5_text", "qwen3_5_text"), ("llama", "mamba2")])
def test_a_text_depends_neither_on_its_neighbours_nor_on_the_draft_length(pair):
    student, teacher = tiny_model(pair[0], seed=1), tiny_model(pair[1], seed=2)
    uniforms = torch.rand((len(PROMPTS), 12, 3), generator=torch.Generator().manual_seed(0))
    rule = ACCEPTANCE_RULES["top_k"](k=60)
    together = responses(sample(student, teacher, noise=uniforms, rule=rule))
    for num_draft_tokens in (1, 2, 12):
        assert (
            responses(sample(student, teacher, noise=uniforms, rule=rule, num_draft_tokens=num_draft_tokens))
            == together
        )
    for row, prompt in enumerate(PROMPTS):
        assert (
            responses(sample(student, teacher, [prompt], noise=uniforms[row : row + 1], rule=rule))[0] == together[row]
        )


@pytest.mark.parametrize("architecture", HYBRIDS)
@pytest.mark.parametrize("neighbour", [[5, 6], [77, 6], [5, 6, 7]])
def test_a_prompt_of_one_token_has_no_trace_of_its_neighbour(architecture, neighbour):
    model = tiny_model(architecture, seed=1)
    settings = {"rule": ACCEPTANCE_RULES["never"](), "student_sampling": GREEDY, "teacher_sampling": GREEDY}
    alone, beside = (
        sample(model, model, prompts, **settings).teacher_hidden_states[0] for prompts in ([[77]], [[77], neighbour])
    )
    assert (alone - beside).abs().max() < 1e-4 * alone.abs().max()


@pytest.mark.parametrize("architecture", ["qwen3_5_text", "lfm2", "mamba"])
def test_a_beginning_that_all_prompts_share_is_read_once_where_a_state_can_be_continued(architecture):
    student, teacher = tiny_model(architecture, seed=1), tiny_model(architecture, seed=2)
    beginning = [(7 * i) % 250 for i in range(60)]
    prompts = [beginning + own for own in ([3], [3, 4, 5], [9, 8], [6, 5, 4])]
    num_read = []
    hook = teacher.register_forward_pre_hook(
        lambda _, args, kw: num_read.append(kw["input_ids"].numel()), with_kwargs=True
    )
    uniforms = torch.rand((4, 6, 3), generator=torch.Generator().manual_seed(0))
    rule = ACCEPTANCE_RULES["top_k"](k=60)
    prove(teacher)
    num_read.clear()
    together = sample(student, teacher, prompts, noise=uniforms, rule=rule, max_new_tokens=6, max_rows=2)
    assert (max(num_read) == 60) == WAYS[architecture][1]
    hook.remove()
    for row, prompt in enumerate(prompts):
        alone = sample(student, teacher, [prompt], noise=uniforms[row : row + 1], rule=rule, max_new_tokens=6)
        assert responses(alone)[0] == responses(together)[row]


@pytest.mark.parametrize(
    "names", [("qwen3_5_text", "qwen3_5_text"), ("mamba2", "mamba2"), ("llama", "qwen3_5_text"), ("mamba2", "llama")]
)
def test_two_tokens_are_distributed_as_the_algorithm_says(names):
    """Chi-square over 36 outcomes, 10,000 texts in blocks of two. Rejects a true sampler with probability 1e-5 in each of 4 cases."""
    num_texts, prompt = 10_000, [1, 4, 2]
    small = {"vocab_size": 6, "initializer_range": 0.3}
    student, teacher = tiny_model(names[0], seed=5, **small), tiny_model(names[1], seed=6, **small)
    rollout = sample(
        student, teacher, [prompt] * num_texts, ACCEPTANCE_RULES["top_k"](k=2), num_draft_tokens=2, max_new_tokens=3,
        eos_token_ids=[], noise=torch.Generator().manual_seed(5),
    )  # fmt: skip
    first, second = rollout.labels[:, len(prompt)], rollout.labels[:, len(prompt) + 1]
    counts = torch.bincount(first * 6 + second, minlength=36).double()
    expected = (
        num_texts
        * exact_two_token_distribution(
            reference.in_float64(student), reference.in_float64(teacher), prompt, reference.top_k_accepts(2), {}, {}
        ).flatten()
    )
    rare = expected < 5
    observed = torch.cat([counts[~rare], counts[rare].sum()[None]])
    wanted = torch.cat([expected[~rare], expected[rare].sum()[None]])
    observed, wanted = observed[wanted > 0], wanted[wanted > 0]
    assert len(wanted) > 5 and counts[expected == 0].sum() == 0
    assert chisquare(observed.numpy(), wanted.numpy()).pvalue > 1e-5


@pytest.mark.parametrize(
    "pair", [("qwen3_5_text", "qwen3_5_text"), ("lfm2", "mamba2"), ("llama", "nemotron_h"), ("rwkv", "xlstm")]
)
def test_captured_rounds_write_the_texts_of_plain_ones(pair):
    student, teacher = tiny_model(pair[0], seed=1), tiny_model(pair[1], seed=2)
    rounds, before = Rounds(capture=True, make_graph=Tape), Tape.num_replays
    for prompts in (PROMPTS, PROMPTS[::-1]):  # the second window finds states of the first
        uniforms = torch.rand((4, 12, 3), generator=torch.Generator().manual_seed(0))
        settings = {
            "rule": ACCEPTANCE_RULES["top_k"](k=60),
            "noise": uniforms,
            "max_rows": 2,
            "eos_token_ids": range(0, 259, 9),
        }
        captured = sample(student, teacher, prompts, **settings, rounds=rounds)
        assert responses(captured) == responses(sample(student, teacher, prompts, **settings))
    assert rounds.reason is None and Tape.num_replays > before + 2


@pytest.mark.parametrize("architecture", ["qwen3_5_text", "mamba2"])
@pytest.mark.parametrize(
    ("rule", "num_draft_tokens", "with_graphs"),
    [("never", 1, False), ("always", 1, True), ("top_k", 1, True), ("top_k", 3, False)],
)
def test_a_block_of_which_nothing_is_kept_is_not_read_twice(
    monkeypatch, architecture, rule, num_draft_tokens, with_graphs
):
    """Where a nucleus does not fit its candidates, a row keeps no token of the block, not even of one."""
    model, other = (
        tiny_model(name, seed=seed, vocab_size=1100, initializer_range=0.1)
        for name, seed in ((architecture, 2), ("llama", 1))
    )
    pair = (other, model) if rule == "never" else (model, other)
    settings = {
        "rule": ACCEPTANCE_RULES[rule](**({"k": 300} if rule == "top_k" else {})),
        "num_draft_tokens": num_draft_tokens,
        "student_sampling": SamplingParams(top_p=0.9),
        "teacher_sampling": SamplingParams(top_p=0.95),
        "noise": torch.rand((len(PROMPTS), 12, 3), generator=torch.Generator().manual_seed(1)),
        "rounds": Rounds(capture=True, make_graph=Tape) if with_graphs else None,
    }
    monkeypatch.setattr(interleaved, "CANDIDATES_ON_CPU", ())
    plain = sample(*pair, **{**settings, "rounds": None})
    monkeypatch.setattr(interleaved, "CANDIDATES_ON_CPU", (8, 64))
    missed, observe = [], Nucleus.observe
    monkeypatch.setattr(Nucleus, "observe", lambda self, num: missed.append(num) or observe(self, num))
    missing = sample(*pair, **settings)
    assert sum(missed) > 0 and missing.num_rounds == plain.num_rounds  # those that were repeated are none
    assert responses(missing) == responses(plain)
    for name, values in plain.teacher_signal.items():
        torch.testing.assert_close(missing.teacher_signal[name], values, atol=1e-4, rtol=1e-4)


def test_states_of_a_block_of_one_token_take_no_room_where_every_draw_fits():
    rounds = Rounds(capture=True, make_graph=Tape)  # keeps the decoders
    settings = {"num_draft_tokens": 1, "rule": ACCEPTANCE_RULES["always"](), "rounds": rounds, "max_new_tokens": 2}
    teacher = tiny_model("llama", seed=1, vocab_size=1100)

    def rooms(**sampling):
        sample(tiny_model("mamba2", seed=2, vocab_size=1100), teacher, **settings, **sampling)
        return {len(slot.states) for slot in rounds.decoders["student"].states.slots.values()}

    assert rooms(teacher_sampling=SamplingParams(top_p=0.9)) == {1}  # the teacher draws nothing
    assert rooms(student_sampling=SamplingParams(0.0, top_p=0.9)) == {1}
    assert rooms(student_sampling=SamplingParams(top_p=0.9)) == {2}


def test_a_round_with_states_never_waits_for_the_device(monkeypatch):
    waits, original, rounds = HostWaits(monkeypatch), interleaved.interleave_round, []

    def watched(*arguments):
        rounds.append(1)
        with waits:
            return original(*arguments)

    monkeypatch.setattr(interleaved, "interleave_round", watched)
    sample(tiny_model("qwen3_5_text", seed=1), tiny_model("mamba2", seed=2), max_rows=3)
    assert len(rounds) > 3 and waits.seen == []


def test_idle_forwards_call_the_mixers_as_often_as_a_block_does():
    model, calls = tiny_model("qwen3_5_text", seed=1), []
    decoder = RaggedDecoder(model, 2, 8)
    model.model.layers[0].linear_attn.in_proj_a.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad(), decoder.states.idle(torch.Size((1, 3))):
        model(torch.zeros((1, 3), dtype=torch.long), use_cache=False)
    num_idle = len(calls)
    decoder.states.begin_round(3)
    with torch.no_grad():
        decoder(torch.ones((2, 3), dtype=torch.long), torch.arange(3).expand(2, 3), reading=Reading(step=0))
    assert num_idle == len(calls) - num_idle == 3


def one_token_too_many(monkeypatch):
    keep = recurrent_state.RecurrentStates.keep
    monkeypatch.setattr(
        recurrent_state.RecurrentStates, "keep", lambda self, count: keep(self, (count + 1).clamp(max=4))
    )


def a_state_that_stays(monkeypatch):
    monkeypatch.setattr(recurrent_state.RecurrentStates, "begin_rows", lambda self, rows: None)


def a_row_that_moves_without_its_state(monkeypatch):
    monkeypatch.setattr(recurrent_state.RecurrentStates, "move_row", lambda self, source, target: None)


@pytest.mark.parametrize("fault", [one_token_too_many, a_state_that_stays, a_row_that_moves_without_its_state])
@pytest.mark.parametrize("architecture", ["qwen3_5_text", "mamba2", "lfm2"])
def test_a_planted_fault_is_refused(monkeypatch, architecture, fault):
    fault(monkeypatch)
    with pytest.raises(ValueError, match="other hidden states on the sampler's cache"):
        prove(tiny_model(architecture, seed=1))


def test_padding_that_leaves_a_trace_is_not_used(monkeypatch):
    """Then prompts are read in groups of equal length."""
    original = ragged_cache.RaggedDecoder.masks
    monkeypatch.setattr(
        ragged_cache.RaggedDecoder,
        "masks",
        lambda self, positions, num_slots, padding=None: original(self, positions, num_slots),
    )
    student, teacher = tiny_model("qwen3_5_text", seed=1), tiny_model("qwen3_5_text", seed=2)
    assert prove(student).padding is None
    rollout = sample(student, teacher, rule=ACCEPTANCE_RULES["always"](), student_sampling=GREEDY)
    assert responses(rollout) == [greedy_text(student, prompt, 12) for prompt in PROMPTS]


def test_rows_that_are_read_apart_are_refused_where_weights_are_spread_over_ranks():
    """Ranks with other numbers of rows would gather them in another order, and wait for ever."""
    model = tiny_model("rwkv", seed=1)
    prove(model)
    next(model.parameters()).ds_id = 0  # ZeRO-3's mark
    with pytest.raises(ValueError, match="row by row.*shard_teacher=False"):
        prove(model)


# Training


@pytest.mark.parametrize("rollout", ["dataset", "interleaved", "student", "teacher"])
def test_eight_rows_give_one_update_however_they_are_accumulated(tmp_path, rollout):
    """Rows alone against one padded batch: padding leaves no trace in a loss or a gradient."""
    settings = {"rollout": rollout, "max_grad_norm": 0.0, "shuffle_dataset": False, "seed": 3}

    def trainer(batch_size, **more):
        models = {"model": tiny_model("qwen3_5_text", seed=1), "teacher": tiny_model("qwen3_5_text", seed=2)}
        cut = {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": 8 // batch_size}
        return make_trainer(tmp_path, **models, **cut, **settings, **more)

    whole = trainer(8)
    expected = update_of(whole)
    assert expected.norm() > 0.1
    for cut in (trainer(1), trainer(2, gradient_checkpointing=True), trainer(4)):
        update = update_of(cut)
        assert (update - expected).norm() < 1e-4 * expected.norm()
        assert losses(cut)[0] == pytest.approx(losses(whole)[0], rel=1e-4)


def test_a_killed_run_of_a_hybrid_pair_resumes_with_the_losses_of_an_uninterrupted_one(tmp_path):
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "num_draft_tokens": 3}

    def run(directory, **more):
        models = {"model": tiny_model("qwen3_5_text", seed=1), "teacher": tiny_model("qwen3_5_text", seed=2)}
        return make_trainer(directory, **models, **settings, **more)

    whole, killed, resumed = (
        run(tmp_path / "whole"),
        run(tmp_path / "killed", callbacks=[Stops()]),
        run(tmp_path / "killed"),
    )
    whole.train()
    with pytest.raises(KeyboardInterrupt):
        killed.train()
    resumed.train(resume_from_checkpoint=True)
    assert losses(resumed) == losses(whole) and len(losses(whole)) == 4 and len(set(losses(whole))) == 4
    for ours, theirs in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


class Stops(TrainerCallback):
    """The machine goes away in the third step."""

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 2:
            raise KeyboardInterrupt


def test_an_adapter_on_the_mixers_projections_is_trained_and_drafts(tmp_path):
    names = ["in_proj_qkv", "in_proj_z", "in_proj_a", "in_proj_b", "out_proj"]
    config = LoraConfig(target_modules=names, r=2, init_lora_weights=False)
    models = {"model": tiny_model("qwen3_5_text", seed=1), "teacher": tiny_model("qwen3_5_text", seed=2)}
    trainer = make_trainer(tmp_path, **models, peft_config=config, max_steps=2)
    trainer.train()
    trained = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * len(names) and all(loss > 0 for loss in losses(trainer))
    # What the adapted student writes in blocks is what it writes without a cache.
    student = trainer.model.eval()
    text = sample(student, models["teacher"], rule=ACCEPTANCE_RULES["always"](), student_sampling=GREEDY)
    assert responses(text) == [greedy_text(student, prompt, 12) for prompt in PROMPTS]


def test_the_gate_weighs_the_tokens_of_a_hybrid_pair(tmp_path):
    models = {"model": tiny_model("lfm2", seed=1), "teacher": tiny_model("qwen3_5_text", seed=2)}
    settings = {"trainer_class": SpecKDTrainer, "rollout": "interleaved", "gate_top_k": 60, "max_steps": 2}
    trainer = make_trainer(tmp_path, **models, **settings)
    trainer.train()
    assert all(entry["loss"] > 0 and 0 < entry["gate_weight"] < 1 for entry in trainer.state.log_history[:2])
