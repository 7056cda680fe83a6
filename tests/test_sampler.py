"""The batched, cached, block-wise sampler against the specification in `reference.py`."""

import pytest
import reference
import torch
from scipy.stats import chisquare
from tiny import ARCHITECTURES, tiny_model
from torch.nn.utils.rnn import pad_sequence

from skd_trl.sampling.acceptance import ACCEPTANCE_RULES
from skd_trl.sampling.admission import prove
from skd_trl.sampling.interleaved import Execution, interleaved_sample
from skd_trl.sampling.participants import LocalParticipant, Participant
from skd_trl.sampling.sampling_params import SamplingParams, shaped_probs


PAD, EOS, V = 256, 257, 259
GREEDY, FREE = SamplingParams(temperature=0.0), SamplingParams()
PROMPTS = [[5, 9, 200], [7], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11], [30, 31, 32, 33, 34]]


def left_padded(prompts):
    width = max(map(len, prompts), default=0)
    ids = [[PAD] * (width - len(p)) + p for p in prompts]
    mask = [[0] * (width - len(p)) + [1] * len(p) for p in prompts]
    return tuple(torch.tensor(rows, dtype=torch.long).reshape(len(prompts), width) for rows in (ids, mask))


def sample(
    student, teacher, prompts=PROMPTS, rule=None, *, student_sampling=FREE, teacher_sampling=FREE,
    vocab_size=None, noise=None, max_new_tokens=12, eos_token_ids=(EOS,), **execution,
):  # fmt: skip
    """`interleaved_sample` on lists of prompts, drafts of three tokens unless told otherwise."""
    return interleaved_sample(
        LocalParticipant(student, student_sampling, vocab_size=vocab_size),
        LocalParticipant(teacher, teacher_sampling, vocab_size=vocab_size),
        *left_padded(prompts),
        accept=rule or ACCEPTANCE_RULES["top_k"](k=3),
        max_new_tokens=max_new_tokens,
        eos_token_ids=eos_token_ids,
        noise=noise,
        execution=Execution(**{"num_draft_tokens": 3, **execution}),
    )


def responses(rollout, prompts=PROMPTS):
    return [row[row != -100].tolist() for row in rollout.labels]


def greedy_text(model, prompt, length):
    model, tokens = reference.in_float64(model), []
    while len(tokens) < length and (not tokens or tokens[-1] != EOS):
        tokens.append(int(reference.next_logits(model, prompt + tokens).argmax()))
    return tokens


@pytest.fixture(scope="module", params=ARCHITECTURES)
def pair(request):
    return tiny_model(request.param, seed=1), tiny_model(request.param, seed=2)


@pytest.mark.parametrize("num_draft_tokens", [1, 3, 6])
def test_accepting_all_of_the_vocabulary_greedily_is_the_students_greedy_text(pair, num_draft_tokens):
    student, teacher = pair
    rollout = sample(
        student,
        teacher,
        rule=ACCEPTANCE_RULES["top_k"](k=V),
        num_draft_tokens=num_draft_tokens,
        student_sampling=GREEDY,
        teacher_sampling=GREEDY,
    )
    assert responses(rollout) == [greedy_text(student, prompt, 12) for prompt in PROMPTS]
    assert not rollout.replaced.any()


@pytest.mark.parametrize("num_draft_tokens", [1, 3, 6])
def test_accepting_only_the_teachers_favourite_greedily_is_the_teachers_greedy_text(pair, num_draft_tokens):
    student, teacher = pair
    rollout = sample(
        student,
        teacher,
        rule=ACCEPTANCE_RULES["top_k"](k=1),
        num_draft_tokens=num_draft_tokens,
        student_sampling=GREEDY,
        teacher_sampling=GREEDY,
    )
    assert responses(rollout) == [greedy_text(teacher, prompt, 12) for prompt in PROMPTS]
    assert rollout.replaced.any()


def test_kept_tokens_are_in_the_teachers_top_k_and_saved_hidden_states_are_those_of_a_fresh_forward(pair):
    student, teacher = pair
    k, seen_kept, seen_replaced = 80, 0, 0
    rollout = sample(student, teacher, rule=ACCEPTANCE_RULES["top_k"](k=k), noise=torch.Generator().manual_seed(0))
    heads_input = []
    hook = teacher.get_output_embeddings().register_forward_pre_hook(lambda module, args: heads_input.append(args[0]))
    for row, prompt in enumerate(PROMPTS):
        response = responses(rollout)[row]
        with torch.no_grad():
            logits = teacher(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        fresh = heads_input[-1][0, len(prompt) - 1 : -1]
        reused = rollout.teacher_hidden_states[row, : len(response)]
        assert (reused - fresh).abs().max() < 2e-5 * fresh.abs().max()
        for position, token in enumerate(response):
            rank = int((logits[position] > logits[position, token]).sum())
            if rollout.replaced[row, position]:
                seen_replaced += 1
                assert rollout.teacher_rank[row, position] >= k
            else:
                seen_kept += 1
                assert rank < k
                assert rank == rollout.teacher_rank[row, position]
    hook.remove()
    assert seen_kept > 4 and seen_replaced > 4


SETTINGS = [  # student's and teacher's sampling
    ({}, {}),
    ({"temperature": 0.5, "top_p": 0.5}, {"temperature": 0.2, "top_p": 0.5}),  # the paper's
    ({"temperature": 1.3, "top_k": 7}, {"temperature": 0.8, "top_p": 0.9, "top_k": 40}),
]


@pytest.mark.parametrize("student_sampling, teacher_sampling", SETTINGS)
@pytest.mark.parametrize("num_draft_tokens, max_rows", [(1, None), (4, None), (5, 2), (6, 1)])
def test_every_row_equals_the_one_row_token_at_a_time_cache_free_reference(
    num_draft_tokens, max_rows, student_sampling, teacher_sampling
):
    student, teacher = tiny_model("llama", seed=1), tiny_model("llama", seed=2)
    uniforms = torch.rand((len(PROMPTS), 20, 3), generator=torch.Generator().manual_seed(3))
    eos = set(range(0, 259, 9))  # many, so that rows end early and at different lengths
    rollout = sample(
        student,
        teacher,
        rule=ACCEPTANCE_RULES["top_k"](k=25),
        num_draft_tokens=num_draft_tokens,
        max_rows=max_rows,
        max_new_tokens=20,
        eos_token_ids=eos,
        noise=uniforms,
        student_sampling=SamplingParams(**student_sampling),
        teacher_sampling=SamplingParams(**teacher_sampling),
    )
    models = reference.in_float64(student), reference.in_float64(teacher)
    for row, prompt in enumerate(PROMPTS):
        tokens, replaced = reference.interleave(
            *models,
            prompt,
            accepts=reference.top_k_accepts(25),
            max_new_tokens=20,
            eos_token_ids=eos,
            uniforms=uniforms[row],
            student_sampling=student_sampling,
            teacher_sampling=teacher_sampling,
        )
        assert responses(rollout)[row] == tokens
        assert rollout.replaced[row, : len(tokens)].tolist() == replaced
    assert rollout.replaced.any() and len({len(r) for r in responses(rollout)}) > 1


def exact_two_token_distribution(student, teacher, prompt, accepts, student_sampling, teacher_sampling):
    """P(first, second) under Algorithm 1: keep a proposal that passes, else draw from the teacher. (V, V) float64."""

    def next_token(tokens):
        own = reference.probabilities(reference.next_logits(student, tokens), **student_sampling)
        teacher_logits = reference.next_logits(teacher, tokens)
        other = reference.probabilities(teacher_logits, **teacher_sampling)
        kept = torch.tensor([accepts(t, teacher_logits, own, other, None) for t in range(len(own))])
        return own * kept + (own * ~kept).sum() * other

    first = next_token(prompt)
    return torch.stack([first[t] * next_token(prompt + [t]) for t in range(len(first))])


@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("num_draft_tokens", [1, 2, 3])
@pytest.mark.parametrize(
    "student_sampling, teacher_sampling", [({}, {}), ({"temperature": 0.6, "top_p": 0.9}, {"temperature": 2.0})]
)
def test_two_tokens_are_distributed_as_the_algorithm_says_whatever_the_draft_length(
    k, num_draft_tokens, student_sampling, teacher_sampling
):
    """Chi-square over 36 outcomes, 20,000 texts. Rejects a true sampler with probability 1e-5 in each of 18 cases."""
    num_texts, prompt = 20_000, [1, 4, 2]
    small = {"vocab_size": 6, "initializer_range": 0.3}
    student, teacher = tiny_model("llama", seed=5, **small), tiny_model("llama", seed=6, **small)
    rollout = sample(
        student, teacher, [prompt] * num_texts, ACCEPTANCE_RULES["top_k"](k=k),
        num_draft_tokens=num_draft_tokens, max_new_tokens=3, eos_token_ids=[],
        student_sampling=SamplingParams(**student_sampling), teacher_sampling=SamplingParams(**teacher_sampling),
        noise=torch.Generator().manual_seed(100 * k + num_draft_tokens),
    )  # fmt: skip
    first, second = rollout.labels[:, len(prompt)], rollout.labels[:, len(prompt) + 1]
    counts = torch.bincount(first * 6 + second, minlength=36).double()
    expected = num_texts * exact_two_token_distribution(
        reference.in_float64(student), reference.in_float64(teacher), prompt, reference.top_k_accepts(k),
        student_sampling, teacher_sampling,
    ).flatten()  # fmt: skip
    assert counts[expected == 0].sum() == 0
    # Cells with fewer than 5 expected texts are pooled, as the approximation wants.
    rare = expected < 5
    observed = torch.cat([counts[~rare], counts[rare].sum()[None]])
    wanted = torch.cat([expected[~rare], expected[rare].sum()[None]])
    observed, wanted = observed[wanted > 0], wanted[wanted > 0]
    assert len(wanted) > 5
    assert chisquare(observed.numpy(), wanted.numpy()).pvalue > 1e-5


def test_a_rows_text_depends_neither_on_its_neighbours_nor_on_the_draft_length():
    student, teacher = tiny_model("qwen2", seed=1), tiny_model("qwen2", seed=2)
    uniforms = torch.rand((len(PROMPTS), 12, 3), generator=torch.Generator().manual_seed(0))
    together = responses(sample(student, teacher, noise=uniforms, rule=ACCEPTANCE_RULES["top_k"](k=60)))
    for row, prompt in enumerate(PROMPTS):
        for num_draft_tokens in (1, 2, 12):
            alone = sample(
                student, teacher, [prompt], noise=uniforms[row : row + 1], num_draft_tokens=num_draft_tokens,
                rule=ACCEPTANCE_RULES["top_k"](k=60),
            )  # fmt: skip
            assert responses(alone)[0] == together[row]


def test_counters_add_up():
    student, teacher = tiny_model(seed=1), tiny_model(seed=2)
    rollout = sample(student, teacher, rule=ACCEPTANCE_RULES["top_k"](k=60), eos_token_ids=list(range(0, 259, 7)))
    assert rollout.num_accepted + rollout.num_replaced == rollout.num_tokens == sum(map(len, responses(rollout)))
    assert rollout.num_tokens <= rollout.num_drafted
    assert rollout.num_truncated == sum(row[-1] % 7 != 0 for row in responses(rollout))
    kept = ~rollout.replaced & (rollout.proposals != -100)
    tokens = pad_sequence([row[row != -100] for row in rollout.labels], batch_first=True, padding_value=-100)
    assert torch.equal(rollout.proposals[kept], tokens[kept])


def test_the_teachers_and_the_students_own_texts_come_from_the_rules_never_and_always():
    student, teacher = tiny_model(seed=1), tiny_model(seed=2)
    for rule, author, greedy in (("never", teacher, "teacher_sampling"), ("always", student, "student_sampling")):
        rollout = sample(student, teacher, rule=ACCEPTANCE_RULES[rule](), **{greedy: GREEDY})
        assert responses(rollout) == [greedy_text(author, prompt, 12) for prompt in PROMPTS]
    assert rollout.teacher_hidden_states is None  # the teacher never ran


def test_models_come_back_in_the_mode_they_came_in_even_after_an_error():
    student, teacher = tiny_model(seed=1).train(), tiny_model(seed=2)
    student.model.layers[0].eval()
    sample(student, teacher)
    with pytest.raises(ValueError):
        sample(student, teacher, [[1], []])
    assert student.training and student.lm_head.training and not student.model.layers[0].mlp.training
    assert not teacher.training


def test_gradient_checkpointing_and_dropout_do_not_reach_the_sampler():
    student, teacher = tiny_model(seed=1), tiny_model(seed=2)
    expected = sample(student, teacher, noise=torch.Generator().manual_seed(0)).labels
    student.gradient_checkpointing_enable()
    student.train()
    assert torch.equal(sample(student, teacher, noise=torch.Generator().manual_seed(0)).labels, expected)


def test_an_adapter_takes_part_in_the_draft():
    from peft import LoraConfig, get_peft_model

    student, teacher = tiny_model(seed=1), tiny_model(seed=2)
    peft_student = get_peft_model(
        tiny_model(seed=1), LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    )
    accept_all = ACCEPTANCE_RULES["top_k"](k=V)
    plain = sample(student, teacher, rule=accept_all, student_sampling=GREEDY)
    adapted = sample(peft_student, teacher, rule=accept_all, student_sampling=GREEDY)
    assert responses(adapted) == [greedy_text(peft_student, prompt, 12) for prompt in PROMPTS]
    assert responses(adapted) != responses(plain)


@pytest.mark.parametrize(
    "prompts, kwargs, message",
    [
        ([[1, 2], []], {}, r"Prompts \[1\] are empty"),
        ([[1] * 505], {}, "505 tokens.*512"),
        ([[1, 2]], {"num_draft_tokens": 0}, "num_draft_tokens=0"),
        ([[1, 2]], {"max_new_tokens": 0}, "max_new_tokens=0"),
        ([[1, 2]], {"max_rows": 0}, "max_rows=0"),
        ([[1, 2]], {"vocab_size": 300}, "vocab_size=300"),
        ([[1, 2, 250]], {"vocab_size": 100}, "token id 250"),
        ([[1, -7, 2], [3]], {}, "token id -7"),
        ([[1, 2]], {"noise": torch.rand(1, 9, 3)}, r"\(1, 9, 3\).*1 prompts with max_new_tokens=12"),
        ([[1, 2], [3]], {"noise": torch.rand(1, 12, 3)}, r"2 prompts with max_new_tokens=12.*torch.rand\(2, 12, 3\)"),
    ],
)
def test_input_that_cannot_work_is_refused_with_its_number(prompts, kwargs, message):
    with pytest.raises(ValueError, match=message):
        sample(tiny_model(seed=1), tiny_model(seed=2), prompts, **kwargs)


@pytest.mark.parametrize("accept", ["top_k", ACCEPTANCE_RULES["top_k"], 25])
def test_a_rule_that_is_no_object_of_one_is_refused_with_what_to_give(accept):
    with pytest.raises(
        ValueError, match=r"accept=.* is no AcceptanceRule: give one, such as ACCEPTANCE_RULES\['top_k'\]\(k=25\)"
    ):
        sample(tiny_model(seed=1), tiny_model(seed=2), rule=accept)


def test_whole_numbers_of_other_types_and_a_mask_of_floats_are_taken():
    student, teacher = tiny_model(seed=1), tiny_model(seed=2)
    ids, mask = left_padded(PROMPTS)
    settings = {"accept": ACCEPTANCE_RULES["top_k"](k=60), "max_new_tokens": 12, "eos_token_ids": [EOS]}

    def rollout(ids, mask):
        return interleaved_sample(student, teacher, ids, mask, noise=torch.Generator().manual_seed(0), **settings)

    expected = rollout(ids, mask)
    for types in ((torch.int32, torch.float32), (torch.int64, torch.bfloat16), (torch.int16, torch.bool)):
        found = rollout(*(values.to(dtype) for values, dtype in zip((ids, mask), types, strict=True)))
        for name in ("input_ids", "attention_mask", "labels", "replaced"):
            assert torch.equal(getattr(found, name), getattr(expected, name))
            assert getattr(found, name).dtype == getattr(expected, name).dtype


def test_an_end_of_sequence_is_one_id_or_several_of_which_some_are_none():
    student, teacher = tiny_model(seed=1), tiny_model(seed=2)

    def texts(eos_token_ids):
        return responses(
            sample(student, teacher, student_sampling=GREEDY, teacher_sampling=GREEDY, eos_token_ids=eos_token_ids)
        )

    end = texts([])[0][5]
    expected = texts([end])
    assert expected[0][-1] == end and len(expected[0]) <= 6
    assert texts(end) == texts([end, None]) == texts((None, end)) == expected
    assert texts([None]) == texts([])


def test_right_padded_prompts_and_mismatched_vocabularies_are_refused():
    student, teacher = tiny_model(seed=1), tiny_model(seed=2)
    ids, mask = left_padded(PROMPTS)
    settings = {"accept": ACCEPTANCE_RULES["always"](), "max_new_tokens": 4, "eos_token_ids": []}
    with pytest.raises(ValueError, match="not left-padded"):
        interleaved_sample(student, teacher, ids.flip(1), mask.flip(1), **settings)
    with pytest.raises(ValueError, match="259.*300.*vocab_size"):
        interleaved_sample(student, tiny_model(seed=2, vocab_size=300), ids, mask, **settings)


def test_an_encoder_decoder_is_refused():
    from transformers import T5Config, T5ForConditionalGeneration

    t5 = T5ForConditionalGeneration(
        T5Config(vocab_size=259, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0)
    )
    with pytest.raises(ValueError, match="encoder-decoder.*rollout='dataset'"):
        sample(t5, tiny_model(seed=2))


def test_attention_that_cannot_be_ragged_is_refused():
    from transformers import GPTNeoConfig, GPTNeoForCausalLM

    def gpt_neo(window_size):
        kinds = [[["global", "local"], 1]]
        sizes = {"vocab_size": 259, "hidden_size": 16, "num_layers": 2, "num_heads": 2, "window_size": window_size}
        return GPTNeoForCausalLM(GPTNeoConfig(**sizes, attention_types=kinds, max_position_embeddings=64))

    split = tiny_model(seed=2)
    split.hf_device_map = {"model": 0, "lm_head": 1}
    for model, message in (
        (gpt_neo(4), r"needs 23 positions.* student has 4 "),
        (gpt_neo(22), r"needs 23 positions.* student has 22 "),
        (split, "split over .'0', '1'"),
    ):
        with pytest.raises(ValueError, match=message):
            sample(model, tiny_model(seed=2))
    text = responses(
        sample(gpt_neo(23), tiny_model(seed=2), rule=ACCEPTANCE_RULES["always"](), student_sampling=GREEDY)
    )
    assert len(text) == len(PROMPTS)


def test_longrope_models_sample_before_their_frequencies_change_and_not_beyond():
    """Beyond the original positions cached keys would be turned by other angles than queries, in all rows at once."""
    rope = {
        "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4,
    }  # fmt: skip
    student, teacher = (
        tiny_model(
            "phi3", seed=seed, max_position_embeddings=128, original_max_position_embeddings=32, rope_parameters=rope
        )
        for seed in (1, 2)
    )
    prompts = [[*range(1, 23)], [5, 6]]
    with pytest.raises(ValueError, match="33 positions, but the student has 32"):
        sample(student, teacher, prompts, max_new_tokens=11)
    for rule, writer in ((ACCEPTANCE_RULES["always"](), student), (ACCEPTANCE_RULES["top_k"](k=1), teacher)):
        rollout = sample(
            student, teacher, prompts, rule, max_new_tokens=10, num_draft_tokens=4,
            student_sampling=GREEDY, teacher_sampling=GREEDY,
        )  # fmt: skip
        assert responses(rollout) == [greedy_text(writer, prompt, 10) for prompt in prompts]


def test_what_ties_with_the_last_token_of_a_nucleus_or_a_top_k_is_in_it_whatever_stands_beside():
    """100 tokens tie for the last place: a sort's order among them depends on how many candidates it was given."""
    logits = torch.full((2, 3000), -20.0)
    logits[0, 0], logits[0, 100:200] = 2.0, -5.0
    logits[1] = 0.0  # a row that no short list of candidates will do for
    together = shaped_probs(logits, SamplingParams(top_p=0.95))
    alone = shaped_probs(logits[:1], SamplingParams(top_p=0.95))
    assert torch.equal(together[:1], alone)
    assert alone.count_nonzero() == 101
    assert shaped_probs(logits, SamplingParams(top_k=3)).count_nonzero(-1).tolist() == [101, 3000]
    assert shaped_probs(logits, SamplingParams(top_p=0.3)).sum(-1).tolist() == pytest.approx([1, 1])


@pytest.mark.parametrize("vocab_size", [259, 2000])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_noise_of_one_in_half_precision_draws_from_the_nucleus(dtype, vocab_size):
    student, teacher = (tiny_model(seed=seed, vocab_size=vocab_size) for seed in (1, 2))
    noise = torch.rand((len(PROMPTS), 12, 3), generator=torch.Generator().manual_seed(0)).to(dtype)
    noise[:, ::2] = 1.0
    cut = SamplingParams(top_p=0.5)
    for rule in ("top_k", "mixture", "always", "never"):
        settings = {"rule": ACCEPTANCE_RULES[rule](), "student_sampling": cut, "teacher_sampling": cut}
        found, expected = (
            sample(student, teacher, noise=values, **settings)
            for values in (noise, noise.float().clamp(max=1 - 2**-24))
        )
        assert torch.equal(found.labels, expected.labels) and torch.equal(found.replaced, expected.replaced)


BEGINNING = list(range(60, 80))


@pytest.mark.parametrize(
    "prompts, num_shared",
    [
        ([BEGINNING + prompt for prompt in PROMPTS], 20),
        ([BEGINNING, BEGINNING + [7], BEGINNING + [1, 2, 3]], 19),  # one prompt is nothing but the beginning
        ([BEGINNING] * 3, 19),
        ([BEGINNING[1:], BEGINNING], 0),  # nothing in common, although the same columns hold the same tokens
    ],
)
@pytest.mark.parametrize("architecture", ["llama", "gemma3_text", "gpt2"])
@pytest.mark.parametrize("max_rows", [None, 2])
def test_a_beginning_that_all_prompts_share_is_run_once_and_changes_no_text(
    architecture, prompts, num_shared, max_rows
):
    student, teacher = tiny_model(architecture, seed=1), tiny_model(architecture, seed=2)
    uniforms = torch.rand((len(prompts), 12, 3), generator=torch.Generator().manual_seed(3))
    num_tokens = []
    prove(teacher)
    hook = teacher.get_input_embeddings().register_forward_hook(
        lambda m, args, out: num_tokens.append(args[0].numel())
    )
    rule = ACCEPTANCE_RULES["top_k"](k=60)
    together = responses(sample(student, teacher, prompts, rule, noise=uniforms, max_rows=max_rows), prompts)
    hook.remove()
    assert num_tokens[0] == (num_shared or 2 * 19)  # one row, or both
    for row, prompt in enumerate(prompts):
        assert responses(sample(student, teacher, [prompt], rule, noise=uniforms[row : row + 1])) == [together[row]]


@pytest.mark.parametrize(
    "who, rule, method, way_out",
    [
        ("student", "top_k", "step", "never"),
        ("teacher", "top_k", "judge", "always"),
        ("teacher", "never", "judge", "always"),
    ],
)
def test_a_participant_without_the_method_that_the_rule_needs_is_refused_with_the_rule_that_does_not(
    who, rule, method, way_out
):
    models = {"student": tiny_model(seed=1), "teacher": tiny_model(seed=2), who: Participant()}
    with pytest.raises(
        ValueError, match=rf"The {who}, a Participant, has no `{method}`.*ACCEPTANCE_RULES\['{way_out}'\]"
    ):
        interleaved_sample(
            *models.values(),
            torch.tensor([[5]]),
            torch.tensor([[1]]),
            accept=ACCEPTANCE_RULES[rule](),
            max_new_tokens=2,
            eos_token_ids=[],
        )
